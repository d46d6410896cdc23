"""Loads a checkpoint, with an adapter where one is given; tells each thing that can go wrong in one clear line."""

import copy
import hashlib
import heapq
import json
import os
import re
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file, find_adapter_config_file

from safetyheads.errors import (
    InputError,
    UnsupportedModelError,
    first_line,
    library_failures,
    one_line,
    shorten,
    time_limit,
)
from safetyheads.files import MOST_BYTES, leaves, read_json, read_toml
from safetyheads.model import attention
from safetyheads.model.architecture import hooked_device, input_device
from safetyheads.model.names import find_model
from safetyheads.model.options import DTYPES, LoadOptions
from safetyheads.model.planning import allowed_memory, is_out_of_memory
from safetyheads.model.tokenizer_files import refuse_growth

_SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Texts of a checkpoint that libraries read whole; a log or a data set may lie beside them.
_TEXTS = (
    "*config.json",
    "*token*.json",
    "*template*.json",
    "*.index.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)
# A tokenizer is tried on so many of its own tokens.
_N_PROVED = 64
_STDERR = threading.RLock()
# Where processors of other senses keep the chat template that their tokenizers lack.
_PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
TEXT_MODELS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""transformers' auto classes of models that can be asked by text alone; the first that knows a config counts."""
_NONSENSICAL = "cannot load {}, whose config.json may be wrong: {}"
_BRINGS_CODE = "{} brings its own Python code; to run that code, give --trust-remote-code"
# Words of errors in transformers, which speak of options that are not ours -> what to say instead.
_MEANINGS = {
    "trust_remote_code": _BRINGS_CODE,
    "offload_folder": "{} has weights to be offloaded to the disk; give --offload-folder",
    "ignore_mismatched_sizes": "the weights of {} do not fit its config.json: tensors have other shapes",
}
_SETTINGS_FILES = ("config.json", "generation_config.json")
_QUIETLY = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
# Smallest and largest value of a config's sizes: nonsense here would be built for hours, or not at all.
_SIZES = read_toml(Path(__file__).with_name("config_bounds.toml"))["sizes"]
_CONFIG_BOUNDS = {name: entry["from_to"] for entry in _SIZES for name in entry["names"]}
_MEMORY_SHARE = 0.5
# Where wrappers keep the model: torch.compile, DistributedDataParallel and its kin.
_WRAPPERS = ("_orig_mod", "module")
# Seconds to wait for the hub's first answer.
_HUB_TIMEOUT = 10.0
# Methods that keep activations as they are, and how the config of one that does so now and then says it.
_ROUND_WEIGHTS_ALONE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    **dict.fromkeys(
        ("gptq", "awq", "hqq", "aqlm", "eetq", "higgs", "vptq", "spqr", "auto-round", "mxfp4"), lambda settings: True
    ),
    "bitsandbytes": lambda settings: bool(settings.get("load_in_4bit", settings.get("_load_in_4bit"))),
    "quanto": lambda settings: settings.get("activations") is None,
}
# The base class of a refused connection: the HTTP client, and with it the name, differs between versions.
_CLIENT_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]
_CLIENT = sys.modules[_CLIENT_ERROR.__module__.partition(".")[0]]
# What transformers, the hub and safetensors raise where a checkpoint cannot be read; the last one is of a proxy that
# the environment names.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, getattr(_CLIENT, "InvalidURL", _CLIENT_ERROR))
HUB_ERRORS = (_CLIENT_ERROR, *UNREADABLE)
"""What asking the hub raises, also where a proxy or token in the environment cannot be one."""
# What their code trips over where a config says nonsense: words for numbers, a list for an object, no heads at all.
_NONSENSE = (
    *(TypeError, AttributeError, ArithmeticError, AssertionError, LookupError, RecursionError),
    hub_errors.StrictDataclassError,
)


def load_model(
    path: str, options: LoadOptions
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, "Adapter | None", int | None]:
    """Load a checkpoint, or a model by a name of ours, as the options say; not yet proved.

    The model on eager attention, its tokenizer, its adapter, and the bytes that batches may take beside the weights
    (None for half of what is free).
    """
    if options.device_map is not None:
        _refuse_places(options.device_map)
    place = choose_device(options.device)
    name = path
    path, own_adapter = find_model(name)
    if own_adapter is not None and options.adapter is not None:
        raise InputError(f"{name} has an adapter of its own, so --adapter cannot go on it")
    if is_adapter(path, options.revision):  # transformers would take it in silently
        raise InputError(f"{path} is an adapter; give its base as the model, and --adapter {path}")
    file = look_at(path, options, path)
    adapter = None if options.adapter is None else find_adapter(options.adapter, options.allow_pickle)
    if own_adapter is not None:
        adapter = find_adapter(own_adapter)._replace(name=name)
    model = _base(path, options, place, file, adapter)
    if adapter is not None:
        put_on(model, adapter, path)
    refuse_broken_weights(model, path)
    _forget_lengths(model)
    if options.device_map is None and not is_quantised(model):
        model = model.to(place)
    _refuse_own_attention(model)
    tokenizer = read_tokenizer(path, options, file, adapter)
    budget = options.memory_bytes
    places = {place for place in getattr(model, "hf_device_map", {}).values() if isinstance(place, int)}
    if budget is None and len(places) > 1:  # the fullest of several devices
        budget = min(allowed_memory(torch.device(place), None, _MEMORY_SHARE) for place in places)
    return model.eval(), tokenizer, adapter, budget


def borrow(model: Any) -> tuple[PreTrainedModel, Callable[[], None]]:
    """Take a model in memory for proofs, in evaluation mode; gives it and what puts it back as it was."""
    if hasattr(model, "active_peft_config"):
        if model.active_peft_config.is_prompt_learning:
            raise InputError("the adapter adds virtual tokens and changes no module, so it cannot be proved")
        model = model.get_base_model()  # peft put its factors into the modules of this one
    kind, why = type(model).__name__, None
    if not isinstance(model, PreTrainedModel):
        inner = next((f"; give the model inside it, its .{name}" for name in _WRAPPERS if hasattr(model, name)), "")
        raise InputError(f"a {kind} is no transformers model{inner}")
    parameters = list(model.parameters())
    if any(module._compiled_call_impl is not None for module in model.modules()):
        why = f"the {kind} is compiled, and compiled code does not see an ablation; wrap it before it is compiled"
    elif any(type(parameter).__name__ == "DTensor" for parameter in parameters):
        why = f"the weights of the {kind} are spread over processes"
    elif str(model.dtype).removeprefix("torch.") not in DTYPES:
        why = f"the {kind} is in {model.dtype}; known are {', '.join(DTYPES[:-1])}"
    elif (device := input_device(model)).type not in ("cpu", "cuda"):
        why = f"the {kind} is on {device}; ablations are proved on cpu and cuda"
    if why is not None:
        raise InputError(why)
    _refuse_own_attention(model)
    refuse_broken_weights(model, f"the {kind}")
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    for config in list(configs.values()):
        configs |= {id(part): part for name in config.sub_configs if (part := getattr(config, name)) is not None}
    functions = [(config, config._attn_implementation) for config in configs.values()]
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in parameters]

    def restore() -> None:
        for config, function in functions:
            config._attn_implementation_internal = function
        for module, mode in modes:
            module.training = mode
        for parameter, asks in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(asks)
        vars(model).pop("_safetyheads_ablated", None)

    return model.eval(), restore


def _refuse_own_attention(model: PreTrainedModel) -> None:
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{model.config.model_type}: {type(model).__name__} computes attention without transformers' attention "
            "registry, so no ablation can be put into it"
        )


def use_our_attention(model: PreTrainedModel) -> None:
    """Set the model to our attention function and mask."""
    attention.register()
    model.set_attn_implementation(attention.ATTENTION_NAME)
    if model.config._attn_implementation != attention.ATTENTION_NAME:
        raise UnsupportedModelError(f"{model.config.model_type}: the attention implementation cannot be set")


# Reading a checkpoint


def is_adapter(path: str, revision: str | None) -> bool:
    """Whether a directory, or what the hub has under that name, is an adapter; refuses what is neither of the two."""
    # os.path and not pathlib: a text that cannot be a path at all is a missing one, no other error.
    if not os.path.exists(path):
        look_at_hub(path, revision)
    there = os.path.isdir(path) or not os.path.exists(path)
    return there and find_adapter_config_file(path, revision=revision) is not None


def look_at(path: str, options: LoadOptions, name: str) -> Path | None:
    """Refuse what cannot be a checkpoint, before anything is read into memory; the GGUF file, where it is one.

    ``name`` is for messages, as below.
    """
    if os.path.exists(path):
        if options.revision is not None:
            raise InputError(f"{path} is on this machine; --revision chooses a version of a model on the hub")
        if (file := gguf_file(path)) is not None:
            return file
        if not os.path.isdir(path):
            raise InputError(
                f"{name} is a file; a model is a directory with config.json and weights, a GGUF file, or a hub id"
            )
        look_at_directory(Path(path), name)
        if not Path(path, "config.json").is_file():
            raise InputError(f"{name} has no config.json, so it is not a model directory")
        _weights_file(Path(path), name, _SAFE_WEIGHTS, _PICKLED_WEIGHTS, options.allow_pickle)
    refuse_stray_weights(path, options.revision, options.allow_pickle)
    return None


def look_at_directory(path: Path, name: str) -> None:
    """Refuse a local directory that cannot be a checkpoint, or a tokenizer alone, because its files are none."""
    for file in (*path.iterdir(), *path.glob("additional_chat_templates/*")):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"{name} holds {file.name}, which is no regular file")
        is_read = any(fnmatch(file.name, pattern) for pattern in _TEXTS)
        if is_read and file.is_file() and file.stat().st_size > MOST_BYTES:
            raise InputError(f"{file} is larger than {MOST_BYTES >> 20} MiB")
    for file in path.glob("*token*.json"):
        read_json(file)


def _refuse_wrong_settings(path: str, name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse a config that transformers would build for hours, or stumble over; it is read before anything is built."""
    places = {kept: cached_file(path, kept, revision=revision, **_QUIETLY) for kept in _SETTINGS_FILES}
    found = {kept: read_json(Path(place)) for kept, place in places.items() if place}
    for which, fields in found.items():
        for key in (key for key, value in fields.items() if key.endswith("_token_id") and isinstance(value, dict)):
            raise InputError(f"{which} of {name} is wrong: {key} must be a number or a list; got {fields[key]!r}")
    _refuse_wrong_sizes(found, name)
    # Where transformers has the family's code itself, code that a checkpoint brings beside it is not run.
    described = found.get("config.json", {})
    family = described.get("model_type")
    is_shipped = isinstance(family, str) and family in transformers.CONFIG_MAPPING
    if "auto_map" in described and not trust_remote_code and not is_shipped:
        raise InputError(_BRINGS_CODE.format(name))
    if "generation_config.json" in found:
        try:
            transformers.GenerationConfig.from_dict(found["generation_config.json"])
        except (*UNREADABLE, *_NONSENSE) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"generation_config.json of {name} is wrong: {one_line(error)}") from error


def _refuse_wrong_sizes(files: Mapping[str, Any], name: str) -> None:
    for of, fields in ((f"{which} of {name}", fields) for which, fields in files.items()):
        for place, value in leaves(fields, of):
            key = place.removeprefix(f"{of}.")
            # Lists give a number to each layer, or several that end an answer.
            bounds = _CONFIG_BOUNDS.get(key.rstrip(".0123456789").rpartition(".")[2])
            if bounds is None or value is None or value == [] or (value is False and bounds[0] == 0):
                continue
            least, most = bounds
            if not isinstance(value, int | type(most)) or isinstance(value, bool) or not least <= value <= most:
                said = f"must be from {least} to {most}; got {shorten(repr(value))}"
                raise InputError(f"{of} is wrong: {key} {said}")


def refuse_stray_weights(name: str, revision: str | None = None, allow_pickle: bool = False) -> None:
    """Refuse a checkpoint whose config or index names weights outside of it, or pickles where they are not allowed."""
    read = {"config.json": "transformers_weights", _SAFE_WEIGHTS[1]: "weight_map", _PICKLED_WEIGHTS[1]: "weight_map"}
    for file, field in list(read.items()):
        if file == _PICKLED_WEIGHTS[1] and not allow_pickle:
            continue
        found = cached_file(name, file, revision=revision or "main", **_QUIETLY)
        named = read_json(Path(found)).get(field) if found else None
        for weights in set(map(str, named.values() if isinstance(named, dict) else [named] if named else ())):
            path, where = PurePosixPath(weights.replace("\\", "/")), f"the {file} of {name} names the weights {weights}"
            if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                raise InputError(f"{where}, which are outside of it")
            if not allow_pickle and not weights.endswith((".safetensors", ".safetensors.index.json")):
                raise InputError(f"{where}, a pickle, which can run code when read; to allow it, give --allow-pickle")
            if field == "transformers_weights" and weights.endswith(".json") and weights not in read:
                raise InputError(f"{where}, another index than {_SAFE_WEIGHTS[1]}")


def _weights_file(directory: Path, name: str, safe: Sequence[str], pickled: Sequence[str], allow_pickle: bool) -> Path:
    file = next((file for file in (*safe, *pickled) if (directory / file).is_file()), None)
    if file is None:
        raise InputError(f"{name} has no weights ({safe[0]})")
    if file in pickled and not allow_pickle:
        raise InputError(
            f"{name} has pickled weights only, which can run code when read; to allow it, give --allow-pickle"
        )
    return directory / file


def look_at_hub(name: str, revision: str | None = None) -> None:
    """Refuse at once what is neither a directory nor on the hub: left alone, transformers retries for half a minute."""
    try:
        for file in ("config.json", "adapter_config.json"):
            if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
                return
        HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT)
    except hub_errors.HFValidationError:
        raise InputError(f"{name!r} is neither a directory nor a hub id") from None
    except HUB_ERRORS as error:
        why = f"the hub cannot be reached ({first_line(error)})"
        if isinstance(error, hub_errors.RepositoryNotFoundError):
            why = "no such model on the hub that you may read (private and gated ones need a token in HF_TOKEN)"
        elif isinstance(error, hub_errors.RevisionNotFoundError):
            why = f"the model on the hub has no revision {revision}"
        elif isinstance(error, hub_errors.HfHubHTTPError):
            why = f"the hub answers: {first_line(error)}"
        raise InputError(f"{name}: no such directory, and {why}") from error


_BASES: ContextVar[dict[Any, PreTrainedModel] | None] = ContextVar("bases", default=None)


@contextmanager
def bases_shared() -> Iterator[None]:
    """Within, the model that was read last is kept without its adapter; what it is base of shares its weights.

    Each comes with modules of its own, so an adapter goes on one alone; nobody may change the weights. Read anew are
    models over several devices, bases that cannot be copied, and those of adapters that write into them.
    """
    token = _BASES.set({})
    try:
        yield
    finally:
        _BASES.reset(token)


def _base(
    path: str, options: LoadOptions, place: torch.device, file: Path | None, adapter: "Adapter | None"
) -> PreTrainedModel:
    bases, key = _BASES.get(), (path, replace(options, adapter=None, memory=None))
    if bases is None:
        return _read_model(path, options, place, file)
    is_shared = options.device_map is None and (adapter is None or _spares_base(adapter))
    if not is_shared or key not in bases:
        bases.clear()  # freed before another one is read
        bases[key] = _read_model(path, options, place, file)
    base = bases[key]
    # A forward of a module's own may be bound to that module, and would run it in the copy too.
    if not is_shared or any("forward" in vars(module) for module in base.modules()):
        return bases.pop(key)
    try:
        return copy.deepcopy(base, {id(tensor): tensor for tensor in base.state_dict(keep_vars=True).values()})
    except (TypeError, RuntimeError):  # it holds a lock, or whatever else there is one of
        return bases.pop(key)


def _spares_base(adapter: "Adapter") -> bool:
    """Whether putting the adapter on writes no weight of its base: it has factors of its own alone.

    Others bring embeddings or biases, or factors that were split off the base's weights.
    """
    told, names = adapter.config, [""]
    with suppress(SafetensorError, OSError), safe_open(adapter.directory / _ADAPTER_WEIGHTS, "pt") as tensors:
        names = list(tensors.keys())
    is_plain = told.get("peft_type") == "LORA" and told.get("bias", "none") == "none"
    return is_plain and told.get("init_lora_weights", True) in (True, False) and all(".lora_" in n for n in names)


def _read_model(path: str, options: LoadOptions, place: torch.device, file: Path | None) -> PreTrainedModel:
    source, folder = options.source, path
    if file is not None:
        folder, header = str(file.parent), read_header(file)
        source["gguf_file"] = file.name
    config = read_config(folder, path, **source)
    parts = (config, config.get_text_config(decoder=True))
    quantised = any(getattr(part, "quantization_config", None) is not None for part in parts)
    arguments: dict[str, Any] = {
        **source,
        "attn_implementation": "eager",
        # None lets transformers fall back to pickles, False would prefer them.
        "use_safetensors": None if options.allow_pickle else True,
        # Kernels of a quantisation were made for one dtype, and quantised weights are not moved after loading.
        "dtype": "auto" if quantised else options.dtype,
    }
    if options.device_map is not None:
        arguments |= {"device_map": options.device_map, "offload_folder": options.offload_folder}
    elif quantised:
        arguments["device_map"] = {"": str(place)}
        _refuse_places(arguments["device_map"])
    if file is not None:  # plain numbers in memory, so that everything works on them
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, unexpected = read_weights(TEXT_MODELS, folder, path, config, **arguments)
    if file is not None:
        model.config.safetyheads_quantisation = header[0]
    if arguments["dtype"] == "auto" != options.dtype and not is_quantised(model):
        model = model.to(getattr(torch, options.dtype))  # its quantisation ended with loading: plain numbers again
    _refuse_unused_weights(model, path, unexpected, quantised)
    if str(model.dtype).removeprefix("torch.") not in DTYPES:
        raise InputError(f"{path} holds {model.dtype}; give --dtype one of {', '.join(DTYPES[:-1])}")
    return model


def load_shape(path: str, options: LoadOptions) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model without weights, from its config and tokenizer alone: it can be counted, and not run."""
    config = read_config(path, path, **options.source)
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else config.dtype or torch.float32
    try:
        with torch.device("meta"):
            model = _auto_class(TEXT_MODELS, config).from_config(config, dtype=dtype)
    except (*UNREADABLE, *_NONSENSE, RuntimeError) as error:
        raise _cannot_load(path, error) from error
    return model.eval(), read_tokenizer(path, options)


def bits_of_weights(model: PreTrainedModel) -> float:
    """Bits that the weights take; of all layers' matrices by the config's quantisation, where it has one."""
    settings, plain = _quantisation_settings(model), 8.0 * model.dtype.itemsize
    bits = settings.get("bits") or (4 if settings.get("load_in_4bit") else 8)
    # In layers a scale of 16 bits for each 32 to 128 weights; embeddings and the head stay as they are.
    packed = {n for n, weight in model.named_parameters() if settings and _LAYER_NUMBER.search(n) and weight.ndim > 1}
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    return sum(size * (bits + 0.5 if name in packed else plain) for name, size in sizes.items())


def read_config(path: str, name: str, **arguments: Any) -> PreTrainedConfig:
    """A checkpoint's config; ``name`` is for messages.

    The attention that it names is left out, ours replaces it, and so is what it says of a pass's outputs.
    """
    try:
        if "gguf_file" not in arguments:
            _refuse_wrong_settings(path, name, arguments["revision"], arguments["trust_remote_code"])
        config = transformers.AutoConfig.from_pretrained(path, **arguments)
    except InputError:
        raise
    except (*UNREADABLE, *_NONSENSE) as error:
        raise _cannot_load(name, error) from error
    if "gguf_file" in arguments:
        _refuse_wrong_sizes({"the header": config.to_dict()}, name)
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            part._attn_implementation_internal = None
            # What a pass returns is for its caller to say; a classifier that was told to return a tuple has no logits.
            part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
            _refuse_unknown_quantisation(getattr(part, "quantization_config", None), name)
    return config


def read_weights(
    kinds: Sequence[str], path: str, name: str, config: PreTrainedConfig, **arguments: Any
) -> tuple[PreTrainedModel, Collection[str]]:
    """A checkpoint as the first of transformers' auto classes that knows its config, and tensors it has no use for."""
    try:
        model, report = _auto_class(kinds, config).from_pretrained(
            path, config=config, output_loading_info=True, **arguments
        )
    except UnpicklingError as error:
        raise InputError(
            f"cannot load {name}: its pickle is broken or holds more than weights, and is not run"
        ) from error
    except (*UNREADABLE, *_NONSENSE, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise _cannot_load(name, error) from error
    # They are drawn at random: a judge without a classifier's head would still give verdicts.
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"the weights of {name} lack {len(missing)} tensors, {missing[0]} among them")
    return model, report["unexpected_keys"]


def _auto_class(kinds: Sequence[str], config: PreTrainedConfig) -> Any:
    known = [kind for kind in kinds if type(config) in getattr(transformers, kind)._model_mapping]
    return getattr(transformers, (*known, kinds[0])[0])


def _cannot_load(name: str, error: BaseException) -> InputError:
    said = next((said for words, said in _MEANINGS.items() if words in str(error)), None)
    if said is not None:
        return InputError(said.format(name))
    if isinstance(error, _NONSENSE):
        return InputError(_NONSENSICAL.format(name, one_line(error)))
    return InputError(f"cannot load {name}: {first_line(error)}")


def _refuse_unknown_quantisation(settings: Any, name: str) -> None:
    """Left alone, transformers reads such weights as plain numbers."""
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", settings)
    method = getattr(method, "value", method)
    by_bits = isinstance(settings, dict) and (settings.get("load_in_4bit") or settings.get("load_in_8bit"))
    if method not in [*AUTO_QUANTIZATION_CONFIG_MAPPING] and not by_bits:
        raise InputError(f"{name} is quantised in a way that this transformers does not know: {method!r}")


def read_tokenizer(
    path: str, options: LoadOptions, file: Path | None = None, adapter: "Adapter | None" = None
) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer where it brings one, as fine-tunes do with their chat template, else the checkpoint's.

    Its chat template comes with it, wherever the checkpoint keeps that.
    """
    source, arguments = path, options.source
    if adapter is not None and adapter.has_tokenizer:
        source, file = str(adapter.directory), None
    if file is not None:
        source, arguments["gguf_file"] = str(file.parent), file.name
    if os.path.isdir(source):
        look_at_directory(Path(source), source)
    try:
        _refuse_growing_texts(source, arguments["revision"])
        with _silent_stderr(), library_failures():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **arguments)
            # What fails on any text, of signs or of letters, fails on its own.
            known = heapq.nsmallest(_N_PROVED, tokenizer.get_vocab().values())
            words = (text for token in known if (text := tokenizer.decode([token])).isalpha())
            for text in (tokenizer.decode(known), next(words, "")):
                tokenizer(text)
    except (*UNREADABLE, *_NONSENSE, RuntimeError) as error:
        if file is None and os.path.isdir(source) and not _has_tokenizer(Path(source)):
            raise InputError(f"{source} has no tokenizer ({' or '.join(_TOKENIZER_FILES)})") from error
        raise InputError(f"cannot load the tokenizer of {source}: {first_line(error)}") from error
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or not longest > 0:
        raise InputError(f"tokenizer_config.json of {source} is wrong: model_max_length is {longest!r}")
    if file is not None:
        mend_tokenizer(tokenizer, read_header(file)[1])
        return tokenizer
    for kept in () if tokenizer.chat_template else _PROCESSOR_FILES:
        found = cached_file(source, kept, revision=arguments["revision"], _raise_exceptions_for_missing_entries=False)
        template = None if found is None else read_json(Path(found)).get("chat_template")
        if isinstance(template, str):
            tokenizer.chat_template = template
            break
    return tokenizer


def _refuse_growing_texts(path: str, revision: str) -> None:
    """Refuse rules of a tokenizer that no memory holds; whichever of several files transformers takes."""
    config = cached_file(path, "tokenizer_config.json", revision=revision, **_QUIETLY)
    others = read_json(Path(config)).get("fast_tokenizer_files") if config else None
    for name in ("tokenizer.json", *(others or ())):
        if found := cached_file(path, name, revision=revision, **_QUIETLY):
            refuse_growth(read_json(Path(found)))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Within, nothing reaches stderr: a panic of Rust code writes there before it is an exception."""
    with _STDERR, open(os.devnull, "w") as nowhere:  # one thread at a time, or the last one restores the silence
        kept = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _forget_lengths(model: nn.Module) -> None:
    """Make a dynamic RoPE a function of its row alone: transformers' keeps the angles of the longest row so far."""

    def reset(module: Any, *_: Any) -> None:
        for name in [name for name in module._buffers if name.endswith("original_inv_freq")]:
            module.register_buffer(name.replace("original_", ""), getattr(module, name), persistent=False)
            setattr(module, name.replace("original_inv_freq", "max_seq_len_cached"), module.original_max_seq_len)

    for module in model.modules():
        kinds = getattr(module, "rope_type", "")
        if "dynamic" in (kinds.values() if isinstance(kinds, dict) else (kinds,)):
            module.register_forward_pre_hook(reset)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


# Devices


def choose_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a CUDA device where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; use cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name} is not one that was proved; use cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _refuse_places(device_map: str | Mapping[str, Any]) -> None:
    """Refuse a map onto devices that are not there, before a model is read."""
    for name, place in () if isinstance(device_map, str) else device_map.items():
        if place != "disk":
            try:
                choose_device(f"cuda:{place}" if isinstance(place, int) else str(place))
            except InputError as error:
                raise InputError(f"the device map's place of {name or 'the model'!r}: {error}") from None
    if find_spec("accelerate") is None:
        raise InputError("a device map needs accelerate; install safetyheads[accelerate]")


def device_layout(model: nn.Module) -> str | None:
    """A device map in one line, such as ``cuda:0 (14 modules), cuda:1 (20 modules)``; None where there is none."""
    placed: Mapping[str, Any] = getattr(model, "hf_device_map", {})
    if len(set(placed.values())) < 2:
        return None
    counts = Counter(f"cuda:{place}" if isinstance(place, int) else str(place) for place in placed.values())
    return ", ".join(f"{place} ({n} modules)" for place, n in sorted(counts.items()))


# Quantised and wrapped weights


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether the checkpoint's quantisation is in force, so that weights are not numbers of ``model.dtype``."""
    return bool(getattr(model, "is_quantized", False))


def quantisation(model: PreTrainedModel) -> str | None:
    """The method, such as ``bitsandbytes`` or ``gptq``; None where weights are plain numbers."""
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method)) if is_quantised(model) else None


def dequantised(model: PreTrainedModel) -> str | None:
    """How the file was quantised that plain weights were made from, such as ``dequantised GGUF (210 Q4_1, ...)``."""
    return getattr(model.config, "safetyheads_quantisation", None)


def rounds_activations(model: PreTrainedModel) -> bool:
    """Whether a quantised model may round activations too: all that is not known to leave them as they are."""
    leaves_them = _ROUND_WEIGHTS_ALONE.get(quantisation(model) or "")
    return leaves_them is None or not leaves_them(_quantisation_settings(model))


def _quantisation_settings(model: PreTrainedModel) -> Mapping[str, Any]:
    described: Any = getattr(model.config, "quantization_config", None)
    return described if isinstance(described, dict) else vars(described) if described is not None else {}


def refuse_wrapped(name: str, model: PreTrainedModel, does: str) -> None:
    """Refuse a model whose weights are more than plain numbers in memory; ``does`` says for whom: "baselines edit"."""
    method = quantisation(model)
    if method is not None:
        raise InputError(f"{name} is quantised ({method}); {does} plain weights only")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise InputError(f"{name} has an adapter on it; {does} plain weights only, so merge it first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{name} is offloaded; {does} weights in memory only")


# Adapters. They stay beside the base's weights and are not merged, so a fine-tune is audited as it was published.

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_NAME, _PREFIX = "default", "base_model.model."
_ADAPTER_WEIGHTS, _PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
# Settings that say where things lay, not what the adapter does.
_WHEREABOUTS = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
# Patterns such as (a|a)*b take for ever on some names of modules; a sound one takes no time on these.
_MODULE_NAMES = ("model.layers.31.self_attn.q_proj", "transformer.h.11.attn.c_attn", "a" * 64, "a." * 32)
_PATTERN_SECONDS = 2
# For all patterns on all names of the base, of every thread together; putting modules in takes seconds.
_INJECTION_SECONDS = 300
# Heads that peft names in the config of every classifier's adapter, whichever of them its base has.
_CLASSIFIER_HEADS = ("classifier", "score")
_FETCHED = (
    f"{_ADAPTER_CONFIG} {_ADAPTER_WEIGHTS} tokenizer* special_tokens_map.json chat_template* vocab* merges*".split()
)


class Adapter(NamedTuple):
    """An adapter, found and looked at, before it is put on a base."""

    name: str
    """A path or hub id, as it was given."""
    directory: Path
    config: Mapping[str, Any]
    sha256: str
    """Fingerprint of its weights and of the settings that change what it does."""

    @property
    def base(self) -> str | None:
        """The base that its config names: a path or hub id of whoever trained it."""
        named = self.config.get("base_model_name_or_path")
        return str(named) if named else None

    @property
    def has_tokenizer(self) -> bool:
        """Whether it brings a tokenizer of its own, as fine-tunes with a new chat template do."""
        return _has_tokenizer(self.directory)


def find_adapter(name: str, allow_pickle: bool = False, revision: str | None = None) -> Adapter:
    """Look at a local adapter, or fetch one from the hub."""
    directory = Path(name)
    if not os.path.exists(name):
        look_at_hub(name)
        try:
            directory = Path(snapshot_download(name, revision=revision, allow_patterns=_FETCHED))
        except OSError as error:
            raise InputError(f"the adapter {name} cannot be fetched: {first_line(error)}") from error
    if not directory.is_dir():
        raise InputError(f"the adapter {name} is a file; an adapter is a directory with {_ADAPTER_CONFIG}, or a hub id")
    if not (directory / _ADAPTER_CONFIG).is_file():
        raise InputError(f"{name} has no {_ADAPTER_CONFIG}, so it is not an adapter")
    config = read_json(directory / _ADAPTER_CONFIG)
    weights = _weights_file(directory, f"the adapter {name}", [_ADAPTER_WEIGHTS], [_PICKLED_ADAPTER], allow_pickle)
    if find_spec("peft") is None:
        raise InputError(f"{name} is an adapter; to read it, install safetyheads[peft]")
    from peft import PeftType, PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind, why = config.get("peft_type"), None
    ranks = [rank for name, rank in leaves(config) if name.partition(".")[0] in ("r", "rank_pattern")]
    if not isinstance(kind, str) or kind not in {known.value for known in PeftType}:
        why = f"is of a kind that this peft does not know: {kind}"
    elif getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(kind)), "uses_shared_state", False):
        why = (
            f"is a {kind}: its modules share weights that stand in none of them, so it cannot be put on a base module "
            "by module; merge it into its base and give the merged model"
        )
    elif issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)], PromptLearningConfig):
        why = f"is a {kind}: it adds virtual tokens and changes no module, so it is not read"
    elif config.get("alora_invocation_tokens"):
        why = "acts from certain tokens on only (aLoRA), which replayed layers cannot see"
    elif any(isinstance(rank, int) and rank > weights.stat().st_size for rank in ranks):
        why = "has a rank for which its weights are too few"
    if why is not None:
        raise InputError(f"the adapter {name} {why}")
    for text in set(_texts(config)):
        try:
            with time_limit(_PATTERN_SECONDS), suppress(re.error, OverflowError, RecursionError):  # peft will tell
                for module in _MODULE_NAMES:
                    re.fullmatch(text, module)
        except TimeoutError:
            raise InputError(f"the adapter {name} has a pattern that may never end: {shorten(text)!r}") from None
    settings = {name: value for name, value in config.items() if name not in _WHEREABOUTS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with weights.open("rb") as file:
        hashlib.file_digest(file, lambda: digest)
    return Adapter(name, directory, config, digest.hexdigest())


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, names of fields too: all that peft may take for a pattern."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)


def _bring_back(model: PreTrainedModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in wrapped:
        base = layer.get_base_layer()
        place = hooked_device(base)
        parts = [part for name, part in layer.named_modules() if not name.startswith("base_layer")]
        for part in parts if place is not None else ():
            for attribute, parameter in part._parameters.items():
                if part is not base and parameter is not None and parameter.is_meta:
                    empty = torch.empty_like(parameter, device=place)
                    part._parameters[attribute] = nn.Parameter(empty, requires_grad=False)


def put_on(model: PreTrainedModel, adapter: Adapter, base: str) -> None:
    """Load the adapter into its base, unmerged; InputError where it is not for this base.

    Through peft itself, since transformers knows fewer kinds of adapters.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from peft.utils import load_peft_weights

    refused = f"the adapter {adapter.name} is not for {base}"
    try:
        config = PeftConfig.from_pretrained(str(adapter.directory))
        config.inference_mode = True
        # As peft compares them: by any end of a module's name, and by whole parts of a parameter's.
        fields = (("modules_to_save", model.named_modules, ""), ("target_parameters", model.named_parameters, "."))
        for field, named, dot in fields:
            places = [f".{place}" for place, _ in named(remove_duplicate=False)]
            for name in adapter.config.get(field) or ():
                if name not in _CLASSIFIER_HEADS and not any(place.endswith(dot + name) for place in places):
                    raise InputError(f"its {field} names {shorten(repr(name))}, which the base lacks")
        with time_limit(_INJECTION_SECONDS):
            inject_adapter_in_model(config, model, _ADAPTER_NAME)
        if adapter.config.get("layer_replication"):
            # The model's config says how to attend; layers that peft copied would keep the old way.
            shared = model.config.get_text_config(decoder=True)
            for module in model.modules():
                if type(getattr(module, "config", None)) is type(shared):
                    module.config = shared
        _bring_back(model)
        # As peft does by itself: in half precision the two small factors would lose most.
        cast_adapter_dtype(model, _ADAPTER_NAME)
        tensors = load_peft_weights(str(adapter.directory), device="cpu")
        # What stands for whole modules is looked up by names without peft's prefix, factors by names with it.
        tensors = {name if ".lora_" in name else name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
        report: Any = set_peft_model_state_dict(model, tensors, _ADAPTER_NAME)
    except TimeoutError:
        raise InputError(
            f"the adapter {adapter.name} has a pattern that may never end on the names of {base}"
        ) from None
    except KeyError as error:
        raise InputError(f"{refused}: it lacks {error.args[0] if error.args else 'something'}") from error
    except (SafetensorError, UnpicklingError) as error:
        raise InputError(f"the weights of the adapter {adapter.name} are broken: {first_line(error)}") from error
    except (*UNREADABLE, *_NONSENSE, RuntimeError, re.error) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        why = "tensors have other shapes" if "size mismatch" in str(error) else one_line(error)
        raise InputError(f"{refused}: {why}") from error
    # What belongs to the adapter bears its name; the rest is the base's, wherever it was moved to. AdaLoRA's numbers of
    # ranks are saved nowhere: peft sets them by the config.
    missing = {name for name in report.missing_keys if _ADAPTER_NAME in name.split(".") and ".ranknum." not in name}
    # Of tied tensors one is saved, and stands for all.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    missing = {name for name in missing if id(parameters.get(name)) not in given}
    for names, what in ((missing, "lacks"), (report.unexpected_keys, "holds, where the base has none,")):
        if names:
            raise InputError(f"{refused}: it {what} {len(names)} tensors, {min(names)} among them")
    model._hf_peft_config_loaded = True  # so that transformers knows


# The weights as they are, wherever and in whatever form they lie

# Beside tensors, quantised modules keep such values in their state.
_PLAIN_VALUES = (str, int, float, bool, torch.dtype, type(None))
# Tensors of a checkpoint that a text model rightly leaves alone: other senses and what joins them to it, heads that
# guess further tokens, and buffers that are computed anew.
_BESIDE_TEXT = re.compile(
    r"(^|[._])(vision|visual|image|video|audio|speech|talker|code2wav|multi_modal|multimodal|multimodality|mm"
    r"|connector|aligner|resampler|mtp|nextn)([._]|$)"
    r"|(^|\.)(inv_freq|position_ids|masked_bias|version|_extra_state)$"
)
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
# Each format of quantised checkpoints has further tensors, scales and the like, that only its kernels know.
_PLAIN_TENSORS = ("weight", "bias")


def fingerprint(model: nn.Module) -> str:
    """sha256 of all weights, by name, dtype and bytes; the same wherever they lie."""
    digest = hashlib.sha256()
    for name, part in _parts_of(model):
        if isinstance(part, Tensor):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {part}".encode())
    return digest.hexdigest()


@torch.inference_mode()
def try_out(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that loads and cannot run a token: what a config says of caches is looked at no sooner."""
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except (*_NONSENSE, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise _cannot_load(name, error) from error


def refuse_broken_weights(model: nn.Module, path: str) -> None:
    """Refuse weights that are not all finite."""
    for name, part in _parts_of(model):
        if not isinstance(part, Tensor) or not part.is_floating_point():
            continue
        # float8 knows NaN, but has no function that looks for it.
        values = part if part.dtype.itemsize > 1 else part.float()
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"the weights of {path} are broken: {name} holds NaN or infinity")


def _refuse_unused_weights(model: Any, path: str, unexpected: Collection[str], is_quantised: bool) -> None:
    """Refuse tensors without a place in the model of this config: it would be another model in silence."""
    config, head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    heads = [f"{name}." for name, module in model.named_modules() if module is head]
    within = (f"{model.base_model_prefix}.", *heads)
    # Layers after the last one that guess further tokens (DeepSeek-V3 and its kin).
    n_beyond = getattr(config, "num_nextn_predict_layers", None)
    beyond = range(config.num_hidden_layers, config.num_hidden_layers + (n_beyond if isinstance(n_beyond, int) else 0))
    numbers = {name: number for name in unexpected if (number := _LAYER_NUMBER.search(name))}
    unused = [
        name
        for name in sorted(unexpected)
        if name.startswith(within)
        and not _BESIDE_TEXT.search(name)
        and not (name in numbers and int(numbers[name][1]) in beyond)
        and (not is_quantised or name.rpartition(".")[2] in _PLAIN_TENSORS)
        and not _is_bias_of_zeros(model, path, name)
    ]
    if unused:
        raise InputError(
            f"the weights of {path} hold {len(unused)} tensors that its config.json has no place for, {unused[0]} "
            "among them"
        )


def _is_bias_of_zeros(model: PreTrainedModel, path: str, name: str) -> bool:
    """Whether a tensor is one of the biases of zeros that some tools write for every projection."""
    if not name.endswith(".bias") or dequantised(model) is not None:
        return False
    commit = getattr(model.config, "_commit_hash", None)
    for file in Path(str(cached_file(path, "config.json", revision=commit))).parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118, since it is no dict
                return not bool(tensors.get_tensor(name).any())
    return False


def _parts_of(model: nn.Module) -> Iterator[tuple[str, Tensor | str]]:
    """The model's state by name, in one order, as plain whole tensors; what else quantised modules keep, as text."""
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor) and value.is_meta:  # accelerate keeps it elsewhere until its module runs
            module, _, attribute = name.rpartition(".")
            hook = getattr(model.get_submodule(module), "_hf_hook", None)
            hooks = getattr(hook, "hooks", (hook,))  # several in sequence, or the one
            maps = [getattr(each, "weights_map", None) for each in hooks]
            stored = next((weights for weights in maps if weights is not None), None)
            if stored is None:
                raise InputError(
                    f"the weights cannot be read: {name} is on no device, and accelerate does not know where it is"
                )
            value = stored[attribute]
        yield from _plain(name, value)
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):  # what adapters do besides their weights
            settings = [
                getattr(module, setting, None) for setting in ("scaling", "active_adapters", "disable_adapters")
            ]
            yield name, str(settings)


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor | str]]:
    if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
        inner, context = value.__tensor_flatten__()
        yield name, f"{type(value).__name__} {context}"
        for attribute in inner:
            yield from _plain(f"{name}.{attribute}", getattr(value, attribute))
    elif isinstance(value, Tensor) and value.is_quantized:
        yield name, str(value.qscheme())
        yield name, value.int_repr()
        yield name, value.dequantize()
    elif isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _plain(f"{name}.{number}", item)
    elif isinstance(value, _PLAIN_VALUES):
        yield name, str(value)
    else:
        raise InputError(f"the weights cannot be fingerprinted: {name} is a {type(value).__name__}")


# GGUF files, read as plain weights: the file, its quantisation, and a tokenizer that splits text as the file says.

SUFFIX = ".gguf"
# Splitting rules by the file's tokenizer.ggml.pre. transformers knows some; these split off every digit, then go on as
# GPT-2 does, which transformers takes for GPT-2 alone.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_AS_GPT2 = ("gpt-2", "default")


class TokenizerWarning(UserWarning):
    """A tokenizer may split text in another way than its model was trained with."""


def gguf_file(path: str) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a directory that holds no other weights."""
    place = Path(path)
    if place.is_dir() and not (place / "config.json").is_file():
        files = sorted(place.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            raise InputError(f"{path} holds {len(files)} GGUF files; give the path of one, such as {files[0]}")
        place = files[0] if files else place
    if place.suffix.lower() != SUFFIX or not place.is_file():
        return None
    if find_spec("gguf") is None:
        raise InputError(f"{place} is a GGUF file; to read it, install safetyheads[gguf]")
    return place


def read_header(file: Path) -> tuple[str, dict[str, Any]]:
    """How the weights are quantised, in words, and what the file says of its tokenizer, by GGUF's names."""
    from gguf import GGUFReader

    class Reader(GGUFReader):  # gguf's own reads on beyond the file's end, for as long as a length in it says
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) < count:
                raise ValueError("it ends before its header does")
            return values

    try:
        reader = Reader(file)
        counts = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        fields: dict[str, Any] = {
            name: field.contents()
            for name in ("tokenizer.ggml.pre", "tokenizer.ggml.model", "tokenizer.chat_template", "split.count")
            if (field := reader.get_field(name)) is not None
        }
    except (*UNREADABLE, *_NONSENSE, MemoryError) as error:
        raise InputError(f"{file} is no GGUF file that can be read: {first_line(error)}") from error
    for name, value in fields.items():
        if not isinstance(value, int if name == "split.count" else str):
            raise InputError(f"{file} is no GGUF file that can be read: its {name} is {shorten(repr(value))}")
    if fields.get("split.count", 1) > 1:
        raise InputError(f"{file} is one part of a model in {fields['split.count']} files; join them first")
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    return f"dequantised GGUF ({kinds})", fields


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, header: Mapping[str, Any]) -> None:
    """Give a tokenizer made from a GGUF file the file's rule for splitting text; warn where nobody knows the rule.

    Beside other files of a tokenizer transformers also forgets the file's chat template.
    """
    tokenizer.chat_template = tokenizer.chat_template or header.get("tokenizer.chat_template")
    rule = header.get("tokenizer.ggml.pre") if header.get("tokenizer.ggml.model") == "gpt2" else None
    backend: Any = tokenizer.backend_tokenizer
    if rule in _SINGLE_DIGITS:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif rule not in (None, *_AS_GPT2) and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        warnings.warn(
            f"the GGUF file splits text by the rule {rule!r}, which is not known here: some tokens may differ from "
            "those the model was trained with",
            TokenizerWarning,
            stacklevel=2,
        )

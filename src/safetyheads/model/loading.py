"""From a path or hub id to a proved engine. Owns what can go wrong with a checkpoint, each as one clear line."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.files import read_json
from safetyheads.model import adapters, attention, placement
from safetyheads.model.hub import first_line, look_at_hub, one_line
from safetyheads.model.planning import is_out_of_memory
from safetyheads.model.weights import refuse_broken_weights, refuse_unused_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from safetyheads.model.engine import Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by name; ``auto`` keeps the checkpoint's own."""

_SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Methods that keep activations as they are, and how the config of one that does so now and then says it.
_ROUND_WEIGHTS_ALONE: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    **dict.fromkeys(
        ("gptq", "awq", "hqq", "aqlm", "eetq", "higgs", "vptq", "spqr", "auto-round", "mxfp4"), lambda settings: True
    ),
    "bitsandbytes": lambda settings: bool(settings.get("load_in_4bit", settings.get("_load_in_4bit"))),
    "quanto": lambda settings: settings.get("activations") is None,
}
# What transformers, the hub and safetensors raise where a checkpoint cannot be read.
UNREADABLE = (OSError, ValueError, KeyError, ImportError)
# What their code trips over where a config says nonsense: words for numbers, a list for an object, no heads at all.
_NONSENSE = (TypeError, AttributeError, ArithmeticError, StrictDataclassError)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What is loaded, and where to; see :meth:`safetyheads.model.engine.Engine.load`, which documents each."""

    path: str
    """A local directory or a hub id."""
    dtype: str = "float32"
    """Of the weights; a quantised checkpoint keeps its own."""
    device: str = "cpu"
    """The one device of the model, where no map lays it out."""
    adapter: str | None = None
    """A PEFT adapter to put on it, a directory or a hub id."""
    device_map: placement.DeviceMap | None = None
    """Where its modules go, where there are several places."""
    offload_folder: str | None = None
    """Where weights go that a device map puts on the disk and that no safetensors file holds as they are used."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings."""
    allow_pickle: bool = False
    """Read weights that are not safetensors."""

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; known are {', '.join(DTYPES)} and auto")
        if self.device_map is not None:
            if self.device not in ("cpu", "auto"):
                raise InputError("a device map and one device exclude each other")
            placement.refuse_device_map(self.device_map)
        elif self.offload_folder is not None:
            raise InputError("an offload folder belongs to a device map")


def load_engine(options: LoadOptions, check: bool) -> Engine:
    """As :meth:`safetyheads.model.engine.Engine.load`, which documents it."""
    from safetyheads.model.engine import Engine

    place = placement.choose_device(options.device)
    path = options.path
    # os.path and not pathlib: a text that cannot be a path at all is a missing one, no other error.
    if os.path.exists(path):
        _look_at_directory(Path(path), options.trust_remote_code, options.allow_pickle)
    else:
        look_at_hub(path)
        adapters.refuse_as_model(path)
    adapter = None if options.adapter is None else adapters.find_adapter(options.adapter, options.allow_pickle)
    model = _load_model(options, place)
    if adapter is not None:
        adapters.put_on(model, adapter, path)
    refuse_broken_weights(model, path)
    if _is_placed_by_us(options, model):
        model = model.to(place)
    if options.device_map is not None:
        # accelerate makes offloaded parameters anew while the model runs; under inference mode they cannot ask for
        # gradients again, and nobody wants theirs.
        model.requires_grad_(False)
    model = model.eval()
    tokenizer = _load_tokenizer(_where_the_tokenizer_is(path, adapter), options.trust_remote_code)
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{model.config.model_type}: {type(model).__name__} computes attention without transformers' attention "
            "registry, so no ablation can be put into it"
        )
    engine = Engine(model, tokenizer, name=path)
    engine.adapter = adapter
    if check:
        # The proof of our attention needs the family's own, so the model comes with eager attention.
        engine.check()
    else:
        use_our_attention(model)
    return engine


def _is_placed_by_us(options: LoadOptions, model: PreTrainedModel) -> bool:
    """Whether the model is to be moved as a whole: none that is laid out or quantised may be."""
    return options.device_map is None and not is_quantised(model)


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether the checkpoint's quantisation is in force, so that weights are not numbers of ``model.dtype``."""
    return bool(getattr(model, "is_quantized", False))


def quantisation(model: PreTrainedModel) -> str | None:
    """The method, such as ``bitsandbytes`` or ``gptq``; None where weights are plain numbers."""
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method)) if is_quantised(model) else None


def rounds_activations(model: PreTrainedModel) -> bool:
    """Whether a quantised model may round activations too: all that is not known to leave them as they are."""
    leaves_them = _ROUND_WEIGHTS_ALONE.get(quantisation(model) or "")
    described: Any = getattr(model.config, "quantization_config", None)
    settings = described if isinstance(described, dict) else vars(described) if described is not None else {}
    return leaves_them is None or not leaves_them(settings)


def refuse_wrapped(name: str, model: PreTrainedModel, does: str) -> None:
    """Refuse a model whose weights are more than plain numbers in this process's memory.

    Args:
        name: what the error calls the model.
        model: the model.
        does: who needs plain weights, with its verb, such as ``baselines edit``.
    """
    method = quantisation(model)
    if method is not None:
        raise InputError(f"{name} is quantised ({method}); {does} plain weights only")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{name} has an adapter on it; {does} plain weights only, so merge it first")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{name} is offloaded; {does} weights in memory only")


def use_our_attention(model: PreTrainedModel) -> None:
    """Set the model to our attention function and mask."""
    attention.register()
    model.set_attn_implementation(attention.ATTENTION_NAME)
    if model.config._attn_implementation != attention.ATTENTION_NAME:
        raise UnsupportedModelError(f"{model.config.model_type}: the attention implementation cannot be set")


def _look_at_directory(path: Path, trust_remote_code: bool, allow_pickle: bool) -> None:
    """Refuse a local directory that cannot be a checkpoint, before anything is read into memory."""
    if not path.is_dir():
        raise InputError(f"{path} is a file; a model is a directory with config.json and weights, or a hub id")
    adapters.refuse_as_model(str(path))
    config = path / "config.json"
    if not config.is_file():
        raise InputError(f"{path} has no config.json, so it is not a model directory")
    described = read_json(config)
    if "auto_map" in described and not trust_remote_code and not _is_shipped(described.get("model_type")):
        raise InputError(f"{path} brings its own Python code; to run that code, give --trust-remote-code")
    generation = path / "generation_config.json"
    if generation.is_file():
        read_json(generation)
    if any((path / name).is_file() for name in _SAFE_WEIGHTS):
        return
    if not any((path / name).is_file() for name in _PICKLED_WEIGHTS):
        raise InputError(f"{path} has no weights (model.safetensors)")
    if not allow_pickle:
        raise InputError(
            f"{path} has pickled weights only, which can run code when read; to allow it, give --allow-pickle"
        )


def _is_shipped(family: Any) -> bool:
    """Whether transformers has the family's code itself: then code that a checkpoint brings beside it is not run."""
    from transformers import CONFIG_MAPPING

    return isinstance(family, str) and family in CONFIG_MAPPING


def _load_model(options: LoadOptions, place: torch.device) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = options.path
    arguments: dict[str, Any] = {
        "attn_implementation": "eager",
        "trust_remote_code": options.trust_remote_code,
        # None lets transformers fall back to pickles, False would prefer them.
        "use_safetensors": None if options.allow_pickle else True,
        **_dtype_and_place(options, place),
    }
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **arguments)
    except (*UNREADABLE, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{path} brings its own Python code; to run that code, give --trust-remote-code"
            ) from error
        if "offload_folder" in str(error):
            raise InputError(f"{path} has weights to be offloaded to the disk; give --offload-folder") from error
        raise InputError(f"cannot load {path}: {first_line(error)}") from error
    except _NONSENSE as error:
        raise _told_as_nonsense(path, error) from error
    except RuntimeError as error:
        # transformers' own words for shapes that differ speak of an option that is not ours.
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(f"the weights of {path} do not fit its config.json: tensors have other shapes") from error
        # A quantised checkpoint's kernels may want another device than is there.
        config = _config(options)
        if config is None or _method(config) is None or is_out_of_memory(error):
            raise
        raise InputError(f"cannot load {path}: {first_line(error)}") from error
    if arguments["dtype"] == "auto" != options.dtype and not is_quantised(model):
        model = model.to(DTYPES[options.dtype])  # its quantisation ended with loading: plain numbers again
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"the weights of {path} lack {len(missing)} tensors, {missing[0]} among them")
    config = _config(options)
    is_described_as_quantised = config is not None and _method(config) is not None
    refuse_unused_weights(model, path, report["unexpected_keys"], is_described_as_quantised)
    if model.dtype not in DTYPES.values():
        raise InputError(f"{path} holds {model.dtype}; give --dtype one of {', '.join(DTYPES)}")
    return model


def _dtype_and_place(options: LoadOptions, place: torch.device) -> dict[str, Any]:
    """How from_pretrained is told in which dtype to load, and where to."""
    chosen: dict[str, Any] = {"dtype": DTYPES.get(options.dtype, options.dtype)}
    config = _config(options)
    method = None if config is None else _method(config)
    if options.device_map is not None:
        chosen |= {"device_map": options.device_map, "offload_folder": options.offload_folder}
    if method is not None:
        # Its kernels were made for one dtype, and quantised weights are not moved after loading.
        chosen["dtype"] = "auto"
        if options.device_map is None:
            placement.refuse_device_map({"": str(place)})
            chosen["device_map"] = {"": str(place)}
    return chosen


def _config(options: LoadOptions) -> Any:
    """The checkpoint's config, before anything else is loaded; None where it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    except UNREADABLE:
        return None  # told when the model itself cannot be loaded
    except _NONSENSE as error:
        raise _told_as_nonsense(options.path, error) from error


def _told_as_nonsense(path: str, error: Exception) -> InputError:
    return InputError(f"cannot load {path}, whose config.json may be wrong: {one_line(error)}")


def _method(config: Any) -> str | None:
    """The quantisation that a config names."""
    for each in (config, config.get_text_config(decoder=True)):
        described = getattr(each, "quantization_config", None)
        if described is not None:
            get = described.get if isinstance(described, dict) else partial(getattr, described)
            return str(get("quant_method", "an unnamed method"))
    return None


def _where_the_tokenizer_is(path: str, adapter: adapters.Adapter | None) -> str:
    """The adapter's own, where it has one: fine-tunes bring their chat template with it."""
    return str(adapter.directory) if adapter is not None and adapter.has_tokenizer else path


def _load_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (*UNREADABLE, *_NONSENSE) as error:
        if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in _TOKENIZER_FILES):
            raise InputError(f"{path} has no tokenizer ({' or '.join(_TOKENIZER_FILES)})") from error
        raise InputError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error

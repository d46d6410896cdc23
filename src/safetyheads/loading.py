"""From a path or hub id to a proved engine. Owns what can go wrong with a checkpoint, each as one clear line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safetyheads import attention
from safetyheads.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from safetyheads.engine import Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes by name; ``auto`` keeps the checkpoint's own."""

_HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""
_SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def load_engine(path: str, dtype: str, device: str, trust_remote_code: bool, allow_pickle: bool, check: bool) -> Engine:
    """As :meth:`safetyheads.engine.Engine.load`, which documents it."""
    from safetyheads.engine import Engine

    place = choose_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)} and auto")
    # os.path and not pathlib: a text that cannot be a path at all is a missing one, no other error.
    if os.path.exists(path):
        _look_at_directory(Path(path), trust_remote_code, allow_pickle)
    else:
        look_at_hub(path)
    model = _load_model(path, dtype, trust_remote_code, allow_pickle)
    refuse_broken_weights(model, path)
    model = model.to(place).eval()
    tokenizer = _load_tokenizer(path, trust_remote_code)
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{model.config.model_type}: {type(model).__name__} computes attention without transformers' attention "
            "registry, so no ablation can be put into it"
        )
    engine = Engine(model, tokenizer, name=path)
    if check:
        # The proof of our attention needs the family's own, so the model comes with eager attention.
        engine.check()
    else:
        use_our_attention(model)
    return engine


def use_our_attention(model: PreTrainedModel) -> None:
    """Set the model to our attention function and mask."""
    attention.register()
    model.set_attn_implementation(attention.ATTENTION_NAME)
    if model.config._attn_implementation != attention.ATTENTION_NAME:
        raise UnsupportedModelError(f"{model.config.model_type}: the attention implementation cannot be set")


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


def _look_at_directory(path: Path, trust_remote_code: bool, allow_pickle: bool) -> None:
    """Refuse a local directory that cannot be a checkpoint, before anything is read into memory."""
    if not path.is_dir():
        raise InputError(f"{path} is a file; a model is a directory with config.json and weights, or a hub id")
    config = path / "config.json"
    if not config.is_file():
        raise InputError(f"{path} has no config.json, so it is not a model directory")
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise InputError(f"{config} is not valid JSON") from None
    if "auto_map" in described and not trust_remote_code:
        raise InputError(f"{path} brings its own Python code; to run that code, give --trust-remote-code")
    if any((path / name).is_file() for name in _SAFE_WEIGHTS):
        return
    if not any((path / name).is_file() for name in _PICKLED_WEIGHTS):
        raise InputError(f"{path} has no weights (model.safetensors)")
    if not allow_pickle:
        raise InputError(
            f"{path} has pickled weights only, which can run code when read; to allow it, give --allow-pickle"
        )


def look_at_hub(name: str) -> None:
    """Refuse at once what is neither a directory nor on the hub: left alone, transformers retries for half a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    # The base class of a refused connection: the HTTP client, and with it the name, differs between versions.
    client_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except HFValidationError:
        raise InputError(f"{name!r} is neither a directory nor a hub id") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name}: no such directory, and no such model on the hub that you may read") from None
    except HfHubHTTPError as error:
        raise InputError(f"{name}: no such directory, and the hub answers: {first_line(error)}") from error
    except (client_error, OSError) as error:
        raise InputError(f"{name}: no such directory, and the hub cannot be reached ({first_line(error)})") from error


def _load_model(path: str, dtype: str, trust_remote_code: bool, allow_pickle: bool) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": DTYPES.get(dtype, dtype),
        "attn_implementation": "eager",
        "trust_remote_code": trust_remote_code,
        # None lets transformers fall back to pickles, False would prefer them.
        "use_safetensors": None if allow_pickle else True,
    }
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{path} brings its own Python code; to run that code, give --trust-remote-code"
            ) from error
        raise InputError(f"cannot load {path}: {first_line(error)}") from error
    except RuntimeError as error:
        # transformers' own words for shapes that differ speak of an option that is not ours.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise InputError(f"the weights of {path} do not fit its config.json: tensors have other shapes") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(f"the weights of {path} lack {len(missing)} tensors, {missing[0]} among them")
    if model.dtype not in DTYPES.values():
        raise InputError(f"{path} holds {model.dtype}; give --dtype one of {', '.join(DTYPES)}")
    return model


def _load_tokenizer(path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in _TOKENIZER_FILES):
            raise InputError(f"{path} has no tokenizer ({' or '.join(_TOKENIZER_FILES)})") from error
        raise InputError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error


def refuse_broken_weights(model: PreTrainedModel, path: str) -> None:
    """Refuse weights that are not all finite."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise InputError(f"the weights of {path} are broken: {name} holds NaN or infinity")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

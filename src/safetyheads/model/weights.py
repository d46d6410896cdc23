"""The weights as they are. Owns reading them wherever and in whatever form they lie: offloaded to the CPU or the disk,
quantised; and telling those that are broken or that nothing uses. It changes none of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from safetyheads.errors import InputError

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

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
# Of quantised checkpoints each format has tensors of its own, scales and the like, that only its kernels know.
_PLAIN_TENSORS = ("weight", "bias")


def fingerprint(model: nn.Module) -> str:
    """sha256 of all weights, by name, dtype and bytes; the same wherever they lie."""
    digest = hashlib.sha256()
    for name, part in parts_of(model):
        if isinstance(part, Tensor):
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {part}".encode())
    return digest.hexdigest()


def refuse_broken_weights(model: nn.Module, path: str) -> None:
    """Refuse weights that are not all finite."""
    for name, part in parts_of(model):
        if not isinstance(part, Tensor) or not part.is_floating_point():
            continue
        # float8 knows NaN, but has no function that looks for it.
        values = part if part.dtype.itemsize > 1 else part.float()
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"the weights of {path} are broken: {name} holds NaN or infinity")


def refuse_unused_weights(model: Any, path: str, unexpected: Collection[str], is_quantised: bool) -> None:
    """Refuse weights that the model as its config describes it has no place for: it would be another model in silence.

    Args:
        model: as it was loaded.
        path: of its checkpoint.
        unexpected: names of tensors without a place, but for those that the family itself tells to ignore.
        is_quantised: whether the checkpoint is.
    """
    config, head = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    heads = [f"{name}." for name, module in model.named_modules() if module is head]
    within = (f"{model.base_model_prefix}.", *heads)
    # Layers after the last one that guess further tokens (DeepSeek-V3 and its kin).
    further = getattr(config, "num_nextn_predict_layers", None) or 0
    last = config.num_hidden_layers + further if further else None

    def is_further(name: str) -> bool:
        number = _LAYER_NUMBER.search(name)
        return last is not None and number is not None and config.num_hidden_layers <= int(number[1]) < last

    unused = [
        name
        for name in sorted(unexpected)
        if name.startswith(within)
        and not _BESIDE_TEXT.search(name)
        and not is_further(name)
        and (not is_quantised or name.rpartition(".")[2] in _PLAIN_TENSORS)
    ]
    unused = [name for name in unused if not _changes_nothing(path, name)]
    if unused:
        raise InputError(
            f"the weights of {path} hold {len(unused)} tensors that its config.json has no place for, {unused[0]} "
            "among them"
        )


def _changes_nothing(path: str, name: str) -> bool:
    """Whether a tensor is a bias of zeros: some tools write one for every projection."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    if not name.endswith(".bias"):
        return False
    for file in Path(str(cached_file(path, "config.json"))).parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118, since it is no dict
                return not bool(tensors.get_tensor(name).any())
    return False


def parts_of(model: nn.Module) -> Iterator[tuple[str, Tensor | str]]:
    """The model's state by name, in one order, as plain whole tensors; what else quantised modules keep, as text."""
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor) and value.is_meta:
            value = _offloaded(model, name)
        yield from _plain(name, value)


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor | str]]:
    """A value taken apart until only plain tensors and texts are left."""
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


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """A tensor that accelerate keeps elsewhere until its module runs."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # several in sequence, or the one
        stored = getattr(each, "weights_map", None)
        if stored is not None:
            return stored[own]
    raise InputError(f"the weights cannot be read: {name} is on no device, and accelerate does not know where it is")


@contextmanager
def weights_changed(engine: Engine) -> Iterator[None]:
    """Whatever the engine measured of its weights is of no use inside, and of use again after."""
    engine.weights_version, version = object(), engine.weights_version
    try:
        yield
    finally:
        engine.weights_version = version

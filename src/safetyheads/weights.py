"""The weights as they are. Owns reading them wherever and in whatever form they lie: offloaded to the CPU or the disk,
split over processes, quantised. It changes none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from safetyheads.errors import InputError

# Beside tensors, quantised modules keep such values in their state.
_PLAIN_VALUES = (str, int, float, bool, torch.dtype, type(None))


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


def parts_of(model: nn.Module) -> Iterator[tuple[str, Tensor | str]]:
    """The model's state by name, in one order, as plain whole tensors; what else quantised modules keep, as text."""
    from torch.distributed.tensor import DTensor

    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor) and value.is_meta:
            value = _offloaded(model, name)
        if isinstance(value, DTensor):
            value = value.full_tensor()
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

"""Where a model runs. Owns devices and device maps.

It refuses to know how: accelerate's hooks move what a module is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from safetyheads.errors import InputError
from safetyheads.model.planning import allowed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DeviceMap: TypeAlias = str | Mapping[str, Any]
"""accelerate's: a strategy's name, or modules by name with their places; ``disk`` and, beside GPUs, ``cpu`` offload."""

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate lays a model out by itself."""

_MEMORY_SHARE = 0.5


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


def refuse_device_map(device_map: DeviceMap) -> None:
    """Refuse a map that cannot be used, before a model is read."""
    if isinstance(device_map, str) and device_map not in STRATEGIES:
        raise InputError(f"unknown device map {device_map!r}; known are {', '.join(STRATEGIES)}")
    if not device_map:
        raise InputError("the device map is empty; it gives modules by name their places")
    for name, place in () if isinstance(device_map, str) else device_map.items():
        if place != "disk":
            try:
                choose_device(f"cuda:{place}" if isinstance(place, int) else str(place))
            except InputError as error:
                raise InputError(f"the device map's place of {name or 'the model'!r}: {error}") from None
    if find_spec("accelerate") is None:
        raise InputError("a device map needs accelerate; install safetyheads[accelerate]")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model's inputs belong: where its embedding runs, wherever that keeps its weight."""
    embedding = model.get_input_embeddings()
    return hooked_device(embedding) or embedding.weight.device


def hooked_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook brings a module's weights and inputs together; None where there is no hook."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # several in sequence, or the one
        place = getattr(each, "execution_device", None)
        if place is not None:
            return torch.device(place)
    return None


def layout(model: nn.Module) -> str | None:
    """A device map in one line, such as ``cuda:0 (14 modules), cuda:1 (20 modules)``; None where there is none."""
    placed: Mapping[str, Any] = getattr(model, "hf_device_map", {})
    if len(set(placed.values())) < 2:
        return None
    counts = Counter(f"cuda:{place}" if isinstance(place, int) else str(place) for place in placed.values())
    return ", ".join(f"{place} ({n} modules)" for place, n in sorted(counts.items()))


def least_memory(model: nn.Module) -> int | None:
    """Bytes that batches may take on the fullest of several devices; None where there is but one."""
    devices = {torch.device(place) for place in getattr(model, "hf_device_map", {}).values() if isinstance(place, int)}
    free = [allowed_memory(device, None, _MEMORY_SHARE) for device in devices]
    return min(free) if len(free) > 1 else None

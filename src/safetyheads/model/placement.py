"""Where a model runs. Owns devices, device maps, and which heads one of several processes computes.

It refuses to know how: accelerate's hooks move what a module is given, transformers splits the weights.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.model.planning import allowed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from safetyheads.model.architecture import Architecture

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
    """Bytes that batches may take, where they must fit more than one place; None where there is but one.

    On several devices the fullest one decides; under tensor parallel all processes must plan alike, or they would wait
    for each other for ever.
    """
    devices = {torch.device(place) for place in getattr(model, "hf_device_map", {}).values() if isinstance(place, int)}
    free = [allowed_memory(device, None, _MEMORY_SHARE) for device in devices]
    if not is_split(model):
        return min(free) if len(free) > 1 else None
    import torch.distributed as dist

    here = model.get_parameter(next(name for name, _ in model.named_parameters())).device
    least = torch.tensor(min([*free, allowed_memory(here, None, _MEMORY_SHARE)]), device=here)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


# Tensor parallel


def refuse_without_siblings() -> None:
    """Refuse tensor parallel in a process that nobody started with others."""
    if n_processes() < 2:
        raise InputError("tensor parallel needs several processes: start them by torchrun --nproc-per-node N")


def refuse_indivisible(config: Any) -> None:
    """Refuse heads that the processes cannot share evenly, before weights are read."""
    n_heads = config.num_attention_heads
    n_kv_heads, size = getattr(config, "num_key_value_heads", None) or n_heads, n_processes()
    if n_heads % size or n_kv_heads % size:
        raise InputError(
            f"tensor parallel over {size} processes needs numbers of heads that they divide; this model has {n_heads} "
            f"query and {n_kv_heads} key heads"
        )


def n_processes() -> int:
    """Processes that torchrun started together; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def is_split(model: nn.Module) -> bool:
    """Whether the model is one process's part of a tensor-parallel one."""
    return (getattr(model, "_tp_size", None) or 1) > 1


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads of every layer that this process computes; its siblings compute the others."""

    rank: int
    """This process among its siblings: its heads are those from ``rank / size`` of each layer's on."""
    size: int
    """Processes, each with as many heads."""

    def own(self, selected: Tensor) -> Tensor:
        """Of a selection of heads [n_rows, n_heads], the columns of this process's."""
        return selected.chunk(self.size, dim=1)[self.rank]

    def mean(self, own: Tensor) -> Tensor:
        """The mean over all heads, from the mean over this process's."""
        import torch.distributed as dist

        summed = own.clone()
        dist.all_reduce(summed)
        return summed / self.size


def own_part(architecture: Architecture) -> tuple[HeadShare | None, Architecture]:
    """Which heads this process computes, and the architecture as it is here; None where it computes all of them.

    Found by running the model, already on our attention: not every family's plan splits its heads.

    Raises:
        UnsupportedModelError: the heads are split in a way that no share of them tells.
    """
    import torch.distributed as dist

    there = {layer: architecture.shapes[layer] for layer in architecture.with_heads}
    here = _heads_computed(architecture)
    size = dist.get_world_size()
    if all(shape is not None and here[layer] == shape.n_heads for layer, shape in there.items()):
        return None, architecture
    shapes = []
    for layer, shape in enumerate(architecture.shapes):
        if shape is not None and (here[layer] * size != shape.n_heads or shape.n_kv_heads % size):
            raise UnsupportedModelError(
                f"{architecture.family}: refused, because layer {layer} computes {here[layer]} of its {shape.n_heads} "
                f"heads in each of {size} processes"
            )
        shapes.append(shape and replace(shape, n_heads=here[layer], n_kv_heads=shape.n_kv_heads // size))
    return HeadShare(dist.get_rank(), size), replace(architecture, shapes=tuple(shapes))


@torch.inference_mode()
def _heads_computed(architecture: Architecture) -> dict[int, int]:
    """Layer -> how many heads its attention function was given in this process."""
    from safetyheads.model.attention import AttentionCall, attention_calls

    seen: dict[int, int] = {}

    def call(layer: int) -> AttentionCall:
        return AttentionCall(observe=lambda **attended: seen.update({layer: attended["output"].shape[2]}))

    some = torch.arange(4)[None].to(next(architecture.decoder.parameters()).device)
    with attention_calls(architecture.attentions, {layer: call(layer) for layer in architecture.with_heads}):
        architecture.decoder(input_ids=some, use_cache=False)
    return seen

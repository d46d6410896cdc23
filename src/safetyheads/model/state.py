"""Tells what was done to a model since it was proved: what a claim about it rests on, apart from its weights' numbers.

Does not see weights that were changed in place; ``Engine.weights_changed`` announces these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from safetyheads.model.attention import is_ablation_hook

State: TypeAlias = Mapping[str, tuple[Any, ...]]
"""By module: the values of ``_FACTS``; under an empty name, what holds for all of torch."""

# What is compared of a module, as a sentence about it where it differs.
_FACTS = (
    "is another module",
    "is in {} mode",
    "has other forward hooks",
    "has another forward method",
    "computes attention by {}",
    "has weights of {}",
    "has other adapters in force",
)
_ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters")
# Hooks of these are part of how a model or a method works, and are taken off by who put them on.
_KNOWN_HOOKS = ("safetyheads.", "transformers.", "accelerate.", "peft.", "torch.utils.")


def state_of(model: nn.Module) -> State:
    """The state of a model, without a pass over it."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, module in model.named_modules():
        own = vars(module)
        dtypes = {str(each.dtype).removeprefix("torch.") for each in own["_parameters"].values() if each is not None}
        found[name or type(model).__name__] = (
            module,
            "training" if module.training else "evaluation",
            tuple(_hooks(own["_forward_pre_hooks"], own["_forward_hooks"])),
            own.get("forward"),
            getattr(own.get("config"), "_attn_implementation", None),
            ", ".join(sorted(dtypes)),
            tuple(str(own[name]) for name in _ADAPTERS if name in own),
        )
    kinds = {parameter.device.type for parameter in model.parameters()} - {"meta"}
    cast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind))
    everywhere = (torch_modules._global_forward_pre_hooks, torch_modules._global_forward_hooks)
    return {**found, "": (cast, tuple(_hooks(*everywhere)))}


def change(before: State, now: State) -> str | None:
    """In words, the first thing that is not as it was; None where all is."""
    for name in {**before, **now}:
        if name not in now or name not in before:
            return f"{name} {'was added' if name in now else 'is gone'}"
        old, new = before[name], now[name]
        if not name and old != new:
            return "autocast is on" if new[0] else "autocast is off" if old[0] else "there are other global hooks"
        for words, one, other in zip(_FACTS, old, new, strict=False):
            if one != other:
                return f"{name} {words.format(other)}"
    return None


def _hooks(*tables: Mapping[int, Any]) -> Iterator[Any]:
    """Hooks that change what a model computes for all we know, and those of an ablation that was never taken off."""
    for hook in (hook for table in tables for hook in table.values()):
        function = getattr(hook, "func", hook)
        source = getattr(function, "__module__", None) or type(hook).__module__
        if is_ablation_hook(hook) or not source.startswith(_KNOWN_HOOKS):
            yield hook

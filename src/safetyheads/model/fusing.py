"""Fused elementwise work. Owns which parts of a layer are compiled; knows no ablations.

Attention is left alone: layers are left from inside it. Norms and MLPs are compiled once a kind of module, for any
shape. On the CPU that saves 2 to 3 % and costs 20 seconds at first (bench/LOG.md), so nobody gets it unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any

import torch

from safetyheads.model.architecture import Architecture
from safetyheads.model.replay import instead


@contextmanager
def fused(architecture: Architecture, backend: str = "inductor") -> Iterator[None]:
    """Within, what each layer runs beside its attention is compiled.

    Args:
        architecture: the model's parts.
        backend: torch.compile's.
    """
    with ExitStack() as stack:
        for layer, attention in zip(architecture.layers, architecture.attentions, strict=True):
            for part in layer.children():
                # Linear attention and its like stay as they are too: they keep no promise about shapes. So does what
                # accelerate has a hook on: without it an offloaded module has no weights.
                if attention is not None and part is not attention and not hasattr(part, "_hf_hook"):
                    stack.enter_context(instead(part, partial(_compiled(type(part).forward, backend), part)))
        yield


@lru_cache
def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A kind's forward, compiled once for all layers; the module, and so its weights, are an argument of it."""
    compiled: Callable[..., Any] = torch.compile(forward, dynamic=True, backend=backend)
    return compiled

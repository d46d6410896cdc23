"""From groups of heads to the calls of each layer. Owns which heads a batch row ablates where; ablates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.heads import Group, Head, within
from safetyheads.model.attention import AttentionCall, RowAblation
from safetyheads.model.planning import to_device

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


def calls_of(engine: Engine, groups: Sequence[Group], ablation: Ablation) -> dict[int, AttentionCall]:
    """Layer -> the call that ablates each row's heads of that layer.

    Raises:
        InputError: a head the model does not have, or one given twice.
    """
    selected: dict[int, Tensor] = {}
    for row, group in enumerate(groups):
        for head in within(group, engine.n_layers, engine.n_heads):
            if head.layer not in selected:
                selected[head.layer] = torch.zeros(len(groups), _heads_beside(engine, head), dtype=torch.bool)
            selected[head.layer][row, head.index] = True
    return {
        layer: AttentionCall(ablations=(RowAblation(ablation, to_device(each, engine.device)),))
        for layer, each in selected.items()
    }


def _heads_beside(engine: Engine, head: Head) -> int:
    """The number of heads in a head's layer, which is to have this one."""
    shape = engine.architecture.shapes[head.layer]
    if shape is None:
        raise InputError(f"head {head}: layer {head.layer} has no attention heads that could be ablated")
    if head.index >= shape.n_heads:
        raise InputError(f"head {head} is out of range: layer {head.layer} has heads 0-{shape.n_heads - 1}")
    return shape.n_heads

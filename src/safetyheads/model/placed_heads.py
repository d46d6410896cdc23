"""Tensor parallel: which process an ablation reaches. Owns the proof that it is the one which computes the head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safetyheads.ablation import SCALING_CONTRIBUTION
from safetyheads.heads import Group, Head
from safetyheads.model.attention import attention_calls
from safetyheads.model.planning import PackedRow
from safetyheads.model.replay import decode

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


def misplaced(engine: Engine, row: PackedRow) -> float:
    """The share of all pairs of an ablated head and a head that was silenced or not, as it should not have been.

    A batch row ablates one head of each layer, by the calls that runs are made with; what is heard of each head is
    gathered from all processes, in the order in which these hold the model's weights.
    """
    facts, whole = engine.architecture, engine.whole
    groups: list[Group] = [()]  # a head that says nothing anyway is told from one that was silenced
    for index in range(whole.n_heads):
        shapes = [whole.shapes[layer] for layer in facts.with_heads]
        groups.append(
            tuple(
                Head(layer, index)
                for layer, shape in zip(facts.with_heads, shapes, strict=True)
                if shape is not None and index < shape.n_heads
            )
        )
    seen: dict[int, Tensor] = {}

    def hear(layer: int, output: Tensor) -> None:
        seen[layer] = output.abs().amax(dim=(1, 3)) > 0  # [n_rows, n_heads of this process]

    calls = {
        layer: replace(call, observe=lambda layer=layer, **attended: hear(layer, attended["output"]))
        for layer, call in engine.ablation_calls(groups, SCALING_CONTRIBUTION.at(0.0)).items()
    }
    with attention_calls(facts.attentions, calls):
        decode(facts, row, len(groups))
    wrong, n = 0, 0
    for layer in facts.with_heads:
        heard = _gathered(seen[layer])
        expected = heard[:1] & ~torch.eye(heard.shape[1], dtype=torch.bool, device=heard.device)
        wrong, n = wrong + int((heard[1 : 1 + heard.shape[1]] != expected).sum()), n + expected.numel()
    return wrong / n


def _gathered(own: Tensor) -> Tensor:
    """The heads' columns of all processes, side by side."""
    import torch.distributed as dist

    parts = [torch.empty_like(own, dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.to(torch.uint8).contiguous())
    return torch.cat(parts, dim=1).bool()

"""What a pass costs, counted. Owns floating-point operations of layers, rows and scans; times nothing.

Useful operations only: a token against the tokens it may see, weights against tokens that are really there. Padding,
masked pairs and elementwise work are not in it, so a share of the machine's peak that is computed from it is honest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from safetyheads.heads import Head
from safetyheads.model.planning import Plan, TokenSequence, row_prefix

if TYPE_CHECKING:
    from safetyheads.model.architecture import Architecture
    from safetyheads.model.engine import Engine


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """Floating-point operations of one layer; a multiplication and an addition are two."""

    query: float
    """Projection of a token to queries, where queries have one of their own; else 0, and it is in ``key_value``."""
    key_value: float
    """Projection of a token to keys and values."""
    output: float
    """Projection of a token's head outputs."""
    mlp: float
    """All else with weights that a token goes through."""
    pair: float
    """Score and weighted value of a token and a token it sees."""

    @property
    def token(self) -> float:
        """A token through all weights."""
        return self.query + self.key_value + self.output + self.mlp


@dataclass(frozen=True, slots=True)
class RowSize:
    """What of a packed row the cost depends on."""

    n_tokens: int
    n_pairs: int
    """(token, token it sees) under a causal mask, each prompt for itself."""
    n_wanted: int
    """Tokens whose last states are wanted."""
    n_wanted_pairs: int
    """Pairs of the wanted tokens alone."""


def layer_flops(architecture: Architecture, layer: int | None = None) -> LayerFlops:
    """Of one layer, from the shapes of its weights; of experts, those that a token is sent to.

    Args:
        architecture: the model's parts.
        layer: one with heads; by default the first of these.
    """
    layer = architecture.with_heads[0] if layer is None else layer
    attending, shape = architecture.attentions[layer], architecture.shapes[layer]
    assert attending is not None  # it has heads
    assert shape is not None
    whole = 2 * _weights(architecture.layers[layer], architecture.active_experts)
    attention = 2 * _weights(attending, 1.0)
    query, output = (
        0 if module is None else 2 * _weights(module, 1.0)
        for module in (architecture.query_projections[layer], architecture.output_projections[layer])
    )
    pair = 2 * shape.n_heads * (shape.d_head + shape.d_value)
    return LayerFlops(query, attention - query - output, output, whole - attention, pair)


def _weights(module: nn.Module, active_experts: float) -> float:
    """Elements of the module's matrices; of stacked ones (experts), the active share."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    return sum(matrix.numel() * (active_experts if matrix.ndim > 2 else 1.0) for matrix in matrices)


def row_sizes(sequences: Sequence[TokenSequence], layout: Plan, shares_prefix: bool = True) -> tuple[RowSize, ...]:
    """The sizes of a plan's rows."""
    sizes = []
    for row in layout.rows:
        members = [sequences[member] for member in row]
        prefix = row_prefix(members) if shares_prefix else 0
        lengths = [len(member.token_ids) for member in members]
        n_tokens = prefix + sum(length - prefix for length in lengths)
        n_pairs = _pairs(0, prefix) + sum(_pairs(prefix, length) for length in lengths)
        n_wanted = sum(member.n_wanted for member in members)
        wanted = sum(_pairs(len(member.token_ids) - member.n_wanted, len(member.token_ids)) for member in members)
        sizes.append(RowSize(n_tokens, n_pairs, n_wanted, wanted))
    return tuple(sizes)


def _pairs(start: int, end: int) -> int:
    """Pairs of the tokens at positions ``start`` to ``end`` with themselves and all before them."""
    return (start + 1 + end) * (end - start) // 2


def forward_flops(engine: Engine, rows: Sequence[RowSize]) -> float:
    """One plain run over all layers, without logits."""
    each = layer_flops(engine.architecture)
    return engine.n_layers * sum(each.token * row.n_tokens + each.pair * row.n_pairs for row in rows)


def replay_flops(engine: Engine, rows: Sequence[RowSize], start: int) -> float:
    """Replaying one group of heads whose first layer is ``start``, by the quick paths that the engine takes."""
    if not engine.capabilities.replays:
        return forward_flops(engine, rows)
    each, quick, last = layer_flops(engine.architecture), engine.capabilities, engine.n_layers - 1
    whole = sum(each.token * row.n_tokens + each.pair * row.n_pairs for row in rows)
    late = sum((each.output + each.mlp) * row.n_tokens for row in rows) if quick.starts_late else whole
    finish = whole
    if quick.prunes:
        n_wanted = sum(row.n_wanted for row in rows)
        tail = (each.output + each.mlp) * n_wanted
        attended = each.query * n_wanted + each.pair * sum(row.n_wanted_pairs for row in rows)
        finish = tail if start == last and quick.starts_late else tail + attended
        if start < last or not quick.starts_late:
            finish += each.key_value * sum(row.n_tokens for row in rows)
    elif start == last:
        finish = late
    return finish if start == last else late + (last - 1 - start) * whole + finish


def scan_flops(engine: Engine, rows: Sequence[RowSize], heads: Sequence[Head]) -> float:
    """Scoring each head alone; what rows of one layer share (their first attention) is left out."""
    by_layer = {layer: replay_flops(engine, rows, layer) for layer in {head.layer for head in heads}}
    return sum(by_layer[head.layer] for head in heads)


def screening_flops(engine: Engine, sequences: Sequence[TokenSequence], n_columns: Sequence[int]) -> float:
    """A screening: at each point a forward pass, and a backward pass a column.

    A backward pass costs what a forward does, for no weight wants a gradient; attention costs two and a half times as
    much, and each forward attends twice.
    """
    (row,) = row_sizes(sequences, Plan((tuple(range(len(sequences))),), 1, 1), shares_prefix=False)
    each = layer_flops(engine.architecture)
    tokens, pairs = each.token * row.n_tokens, each.pair * row.n_pairs
    forwards = len(n_columns) * (tokens + 2 * pairs)
    return engine.n_layers * (forwards + sum(n_columns) * (tokens + 2.5 * pairs))

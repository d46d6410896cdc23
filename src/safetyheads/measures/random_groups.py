"""Draws random groups of heads, the control for a group that was found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from safetyheads.heads import Group, Head

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


def heads_by_layer(engine: Engine) -> tuple[int, ...]:
    """Number of query heads in each layer, 0 where a layer has none."""
    return tuple(0 if shape is None else shape.n_heads for shape in engine.architecture.shapes)


def random_groups(group: Group, n_heads: int | Sequence[int], n_groups: int, seed: int = 0) -> tuple[Group, ...]:
    """Groups with as many heads in each layer as ``group``, drawn from that layer's other heads.

    They are stored with the group they control, not drawn again. Where a layer has too few other heads, all of them are
    taken and the group's own heads fill up. Groups may repeat, since a layer of eight heads has only seven others;
    whoever reports them counts the distinct ones.

    ``n_heads`` is the number of heads of every layer, or of each layer by itself.

    Returns:
        ``n_groups`` groups, heads in order; () where the group holds all heads of its layers, so there is no control.
    """
    generator = np.random.default_rng([seed, len(group)])
    by_layer: dict[int, list[int]] = defaultdict(list)
    for head in sorted(group):
        by_layer[head.layer].append(head.index)
    sizes = {layer: n_heads if isinstance(n_heads, int) else n_heads[layer] for layer in by_layer}
    if all(len(indices) == sizes[layer] for layer, indices in by_layer.items()):
        return ()
    drawn = []
    for _ in range(n_groups):
        heads: list[Head] = []
        for layer, indices in by_layer.items():
            others = [index for index in range(sizes[layer]) if index not in indices]
            n_others = min(len(indices), len(others))
            chosen = [*generator.choice(others, n_others, replace=False)] if others else []
            chosen += [*generator.choice(indices, len(indices) - n_others, replace=False)]
            heads += [Head(layer, int(index)) for index in chosen]
        drawn.append(tuple(sorted(heads)))
    return tuple(drawn)

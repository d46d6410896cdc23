"""What a found group is held against. Owns random groups matched by layer, the control that the paper lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from safetyheads.heads import Group, Head

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


def heads_by_layer(engine: Engine) -> tuple[int, ...]:
    """Query heads of each layer, 0 where a layer has none."""
    return tuple(0 if shape is None else shape.n_heads for shape in engine.architecture.shapes)


def random_groups(group: Group, n_heads: int | Sequence[int], n_groups: int, seed: int = 0) -> tuple[Group, ...]:
    """Groups with as many heads in each layer as ``group``, drawn from that layer's other heads.

    Where a layer has too few others, all of them are taken and the group's own heads fill up. Groups may repeat: a
    layer of eight heads has but seven others. A group that is all of its layers has no control at all.

    Args:
        group: what is to be matched.
        n_heads: heads a layer; by layer where layers differ.
        n_groups: how many to draw.
        seed: of the draw.
    """
    generator = np.random.default_rng([seed, len(group)])
    by_layer: dict[int, list[int]] = {}
    for head in sorted(group):
        by_layer.setdefault(head.layer, []).append(head.index)
    sizes = {layer: n_heads if isinstance(n_heads, int) else n_heads[layer] for layer in by_layer}
    if all(len(own) == sizes[layer] for layer, own in by_layer.items()):
        return ()
    drawn = []
    for _ in range(n_groups):
        heads: list[Head] = []
        for layer, own in by_layer.items():
            others = [index for index in range(sizes[layer]) if index not in own]
            n_others = min(len(own), len(others))
            chosen = [*generator.choice(others, n_others, replace=False)] if others else []
            chosen += [*generator.choice(own, len(own) - n_others, replace=False)]
            heads += [Head(layer, int(index)) for index in chosen]
        drawn.append(tuple(sorted(heads)))
    return tuple(drawn)

"""What a found group is held against. Owns random groups matched by layer, the control that the paper lacks."""

from __future__ import annotations

from collections import Counter

import numpy as np

from safetyheads.heads import Group, Head


def random_groups(group: Group, n_heads: int, n_groups: int, seed: int = 0) -> tuple[Group, ...]:
    """Groups with as many heads in each layer as ``group``, drawn from that layer's other heads.

    Where a layer has too few others, its own heads are drawn too. Groups may repeat: a layer of eight heads has but
    seven others.

    Args:
        group: what is to be matched.
        n_heads: heads a layer.
        n_groups: how many to draw.
        seed: of the draw.
    """
    generator = np.random.default_rng([seed, len(group)])
    per_layer = sorted(Counter(head.layer for head in group).items())
    drawn = []
    for _ in range(n_groups):
        heads: list[Head] = []
        for layer, count in per_layer:
            others = [index for index in range(n_heads) if Head(layer, index) not in group]
            pool = others if len(others) >= count else list(range(n_heads))
            heads += [Head(layer, int(index)) for index in generator.choice(pool, size=count, replace=False)]
        drawn.append(tuple(sorted(heads)))
    return tuple(drawn)

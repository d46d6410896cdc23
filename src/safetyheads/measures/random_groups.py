"""Draws distinct random groups of heads, the control for a group that was found.

They may share heads with it. Else a group that was itself drawn at random would often have the best rank: it alone
would hold some strong head that no control may have.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np

from safetyheads.heads import Group, Head

Matched: TypeAlias = Literal["layers", "neighbouring layers", "all layers"]
LEAST_GROUPS = 39
"""With so many, the highest of the group and its random groups has p 1 / (1 + 39) = .025; fewer cannot show that."""
ENUMERATED = 200
"""Where fewer distinct groups exist, all of them are taken: the test is then over the whole population."""


@dataclass(frozen=True, slots=True)
class RandomGroups:
    """The random groups of one group, all different, and how they were matched to it."""

    groups: tuple[Group, ...] = ()
    """Heads in order; none is the group itself."""
    matched: Matched = "layers"
    """``layers``: as many heads in each layer as the group has; ``neighbouring layers``: each head may also move one
    layer up or down; ``all layers``: any heads."""
    n_possible: int = 0
    """Distinct groups that are matched so."""

    @property
    def complete(self) -> bool:
        """Whether these are all groups that are matched so."""
        return len(self.groups) == self.n_possible


def random_groups(
    group: Group, n_heads: Sequence[int], n_groups: int, seed: int = 0, apart: bool = False
) -> RandomGroups:
    """Distinct groups as large as ``group``, from the same layers where enough exist; none for a group of all heads.

    Where the layers allow fewer than ``LEAST_GROUPS`` (or than ``n_groups``, if that is less), they are widened to the
    neighbouring layers, and then to all; if that does not do either, the matching that allows most is taken. Where
    fewer than ``ENUMERATED`` exist and at least ``LEAST_GROUPS`` are asked for, all of them are taken; else
    ``n_groups``, each set of groups equally likely. More groups of one matching begin with the same ones.

    ``n_heads`` has the number of heads of each layer, 0 for a layer without attention. Controls that are ``apart`` have
    none of the group's heads; ranks among these are no test.
    """
    pools = [_Pool(group, n_heads, matched, apart) for matched in ("layers", "neighbouring layers", "all layers")]
    enough = min(n_groups, LEAST_GROUPS)
    pool = next((pool for pool in pools if pool.n >= enough), max(pools, key=lambda pool: pool.n))
    if n_groups == 0 or pool.n == 0:
        return RandomGroups()
    if pool.n <= n_groups or (pool.n < ENUMERATED and n_groups >= LEAST_GROUPS):
        return RandomGroups(tuple(sorted(set(pool.every(0, 0)) - {pool.group})), pool.matched, pool.n)
    generator = np.random.default_rng([seed, len(group)])
    drawn: dict[Group, None] = {}
    while len(drawn) < n_groups:
        if (control := pool.draw(generator)) != pool.group:
            drawn[control] = None
    return RandomGroups(tuple(drawn), pool.matched, pool.n)


class _Pool:
    """All groups that are matched in one way, counted and drawn without listing them.

    A group is sorted by layer, and so is its control; then head i of the one stands for head i of the other. On a line
    of layers, some order of the heads keeps every head within a distance if and only if the sorted one does. So
    controls are counted layer by layer: the state is how many heads the layers below have taken.
    """

    def __init__(self, group: Group, n_heads: Sequence[int], matched: Matched, apart: bool) -> None:
        self.matched, self.group = matched, tuple(sorted(group))
        self.layers = [layer for layer, n in enumerate(n_heads) if n]
        taken = set(group) if apart else set()
        # Indices of each layer that controls may have.
        self.free = [
            [index for index in range(n_heads[layer]) if Head(layer, index) not in taken] for layer in self.layers
        ]
        self.reach = {"layers": 0, "neighbouring layers": 1, "all layers": len(self.layers)}[matched]
        # Place of each head of the group among the layers that have heads.
        self.places = [self.layers.index(head.layer) for head in self.group]
        self.count = cache(self._count)
        self.n = self.count(0, 0) - (not apart)  # the group itself is no control

    def _count(self, place: int, taken: int) -> int:
        """Groups that this layer and those above can end in, after the layers below took some heads."""
        if place == len(self.layers):
            return int(taken == len(self.group))
        return sum(self.ways(place, n) * self.count(place + 1, taken + n) for n in self.numbers(place, taken))

    def ways(self, place: int, n: int) -> int:
        """Ways to take n heads of a layer."""
        return math.comb(len(self.free[place]), n)

    def numbers(self, place: int, taken: int) -> Iterator[int]:
        """How many heads this layer may take."""
        yield 0
        for n, near in enumerate(self.places[taken:], start=1):
            if abs(near - place) > self.reach or n > len(self.free[place]):
                return
            yield n

    def every(self, place: int, taken: int) -> Iterator[Group]:
        """What this layer and those above can add, after the layers below took some heads; the group's own too."""
        if place == len(self.layers):
            yield ()
            return
        for n in self.numbers(place, taken):
            if self.count(place + 1, taken + n):
                for rest in self.every(place + 1, taken + n):
                    for indices in combinations(self.free[place], n):
                        yield tuple(Head(self.layers[place], index) for index in indices) + rest

    def draw(self, generator: np.random.Generator) -> Group:
        """One of all, each equally likely; it may be the group itself."""
        heads: list[Head] = []
        for place, layer in enumerate(self.layers):
            counts = {
                n: self.ways(place, n) * self.count(place + 1, len(heads) + n) for n in self.numbers(place, len(heads))
            }
            # Whole numbers may exceed a float, so they are scaled first.
            n = generator.choice(list(counts), p=[count / sum(counts.values()) for count in counts.values()])
            chosen = generator.choice(self.free[place], n, replace=False) if n else ()
            heads += [Head(layer, int(index)) for index in sorted(chosen)]
        return tuple(heads)

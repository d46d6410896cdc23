"""How concentrated safety is, as one number with its interval.

The concentration is the mean over group sizes 1 to S of (ASR with the group of that size ablated minus mean ASR of
random groups of that size): the area between the two curves of ASR against size, divided by S. It is 1 where the first
head frees every prompt and no random head frees any, 0 where chosen heads do as random ones do, negative where they do
worse. An answer without a verdict counts as not complied, so that every prompt is in every curve.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy  # its modules load on first use
from numpy.typing import NDArray

from safetyheads.errors import InputError
from safetyheads.stats.intervals import (
    CONFIDENCE,
    FloatArray,
    Interval,
    bootstrap_interval,
    clopper_pearson,
    places_of,
    square_and_add,
)

RANDOM, VANILLA = "random groups", "the unablated model"
"""What the curve of the chosen groups is compared with; the latter where no size has random groups."""


@dataclass(frozen=True, slots=True)
class Concentration:
    """How fast ASR rises with the number of ablated heads, compared with random heads."""

    value: float | None
    """Mean gap between the two curves, from -1 to 1; None where there is no prompt or no size."""
    interval: Interval | None
    """95 %, over prompts and random groups; None below two prompts, or with one random group."""
    n: int
    """Prompts."""
    sizes: tuple[int, ...]
    """Group sizes that the mean is over."""
    n_random: int
    """Random groups of each size, at least."""
    against: str
    """``RANDOM`` or ``VANILLA``."""


class SizeOutcome(NamedTuple):
    """Which prompts comply under the group of one size, and under its random groups."""

    size: int
    """Heads in the group."""
    complied: Sequence[float]
    """[n_prompts]: 0 or 1, or the share of several answers."""
    random: Sequence[Sequence[float]]
    """[n_random][n_prompts]; empty where a group has no random counterpart."""
    n_possible: int | None = None
    """Distinct groups that the random ones are drawn from; where they are all of them, they are no sample."""


def concentration(
    outcomes: Sequence[SizeOutcome], vanilla: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Concentration:
    """The concentration over the sizes that have random groups, or over all where none has.

    ``outcomes`` are one a size, of the same prompts in the same order as ``vanilla``, which says which of them comply
    unablated [n_prompts]; ``clusters`` says which belong together, such as near-duplicates. By default each stands
    alone.
    """
    kept, n_random = _comparable(outcomes, vanilla)
    n, sizes = len(vanilla), tuple(outcome.size for outcome in kept)
    against = RANDOM if n_random else VANILLA
    if not kept or n == 0:
        return Concentration(None, None, n, sizes, n_random, against)
    found, random = _areas(kept, vanilla)
    names = list(range(n)) if clusters is None else list(clusters)
    several = len(set(names)) > 1 and n_random != 1
    interval = _crossed_interval(kept, found, random, names) if several else None
    return Concentration(float((found - random).mean()), interval, n, sizes, n_random, against)


def prompt_gains(outcomes: Sequence[SizeOutcome], vanilla: Sequence[float]) -> tuple[FloatArray, tuple[int, ...], int]:
    """Each prompt's part of the concentration [n_prompts], the sizes it is over, and the random groups of each.

    The concentration is linear in the prompts: it is the mean of these parts.
    """
    kept, n_random = _comparable(outcomes, vanilla)
    sizes = tuple(outcome.size for outcome in kept)
    if not kept or not len(vanilla):
        return np.zeros(len(vanilla)), sizes, n_random
    found, random = _areas(kept, vanilla)
    return found - random, sizes, n_random


def _comparable(outcomes: Sequence[SizeOutcome], vanilla: Sequence[float]) -> tuple[list[SizeOutcome], int]:
    """The sizes that the concentration is over, and the fewest random groups that one of them has.

    A size whose group fills its layers has no random group, and is left out where other sizes have some.
    """
    controlled = [outcome for outcome in outcomes if len(outcome.random)]
    kept, n = controlled or list(outcomes), len(vanilla)
    if any(len(complied) != n for outcome in kept for complied in (outcome.complied, *outcome.random)):
        raise InputError(f"the outcomes of the groups are not of the {n} prompts of the unablated model")
    return kept, min((len(outcome.random) for outcome in controlled), default=0)


def _areas(kept: Sequence[SizeOutcome], vanilla: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    found = np.mean([np.asarray(outcome.complied, dtype=float) for outcome in kept], axis=0)
    controls = (outcome.random if len(outcome.random) else [vanilla] for outcome in kept)
    return found, np.mean([np.asarray(control, dtype=float).mean(axis=0) for control in controls], axis=0)


def _crossed_interval(
    kept: Sequence[SizeOutcome], found: FloatArray, random: FloatArray, clusters: Sequence[Hashable]
) -> Interval:
    """The two areas' own intervals, combined by squaring and adding with the correlation that their prompts give them.

    An area is a share, so its interval is Clopper and Pearson's of as many answers as its variance is worth (Korn and
    Graubard, 1998). The variance of the random area has a part of the prompts and a part of the groups. Both contain
    that of a prompt's outcome under a group, so it is taken off the latter once (A. Owen, The pigeonhole bootstrap,
    Annals of Applied Statistics 1 (2007) 386-411). The combination is Newcombe's; a bootstrap over prompts alone covers
    .49 to .93 of the true values (docs/statistics.md).
    """
    place = places_of(len(found), clusters)
    n, n_clusters = len(found), int(place.max()) + 1

    spread = n_clusters / (n_clusters - 1) / n**2
    sides = [np.bincount(place, side - side.mean()) for side in (found, random)]
    of_found, covariance, of_prompts = (float(sides[i] @ sides[j]) * spread for i, j in ((0, 0), (0, 1), (1, 1)))
    of_groups, least_groups = _variance_of_groups(kept, place)
    whole = of_prompts + of_groups
    # Satterthwaite's degrees of freedom of the sum.
    parts = of_prompts**2 / (n_clusters - 1) + of_groups**2 / max(1, least_groups - 1)
    freedom = whole**2 / parts if parts > 0 else n_clusters - 1
    area, control = float(found.mean()), float(random.mean())
    bounds = _share_interval(area, of_found, n_clusters - 1, n_clusters)
    random_bounds = _share_interval(control, whole, freedom, n_clusters)
    scale = math.sqrt(of_found * whole)
    return square_and_add(area, bounds, control, random_bounds, covariance / scale if scale > 0 else 0.0)


def _variance_of_groups(kept: Sequence[SizeOutcome], place: NDArray[np.intp]) -> tuple[float, int]:
    """The part of the random area's variance that is of the groups, and the fewest groups of a size.

    ``place`` is each prompt's cluster, counted from 0; as many groups as clusters where no size has two.
    """
    n_clusters = least_groups = int(place.max()) + 1
    spread, of_groups = n_clusters / (n_clusters - 1) / len(place) ** 2, 0.0
    for outcome in kept:
        if len(outcome.random) < 2:
            continue
        values = np.asarray(outcome.random, dtype=float)
        n_groups, means = len(values), values.mean(axis=1)
        apart = values - means[:, None] - values.mean(axis=0) + values.mean()
        residual = np.array([np.bincount(place, row) for row in apart])
        own = float((residual**2).sum()) * spread / (n_groups - 1) / n_groups
        drawn = 1 - n_groups / outcome.n_possible if outcome.n_possible else 1.0
        between = float(means.var(ddof=1)) / n_groups
        of_groups += max(0.0, drawn) * max(0.0, between - own) / len(kept) ** 2
        least_groups = min(least_groups, n_groups)
    return of_groups, least_groups


def change_interval(
    gained: FloatArray, sides: Sequence[Sequence[SizeOutcome]], clusters: Sequence[int] | None = None
) -> Interval | None:
    """95 % interval of a change of concentration over the same prompts, crossed over prompts and random groups.

    None below two prompts, or two clusters of them, or with one random group.

    A bootstrap over the prompts' changes [n_prompts], or clusters of them, squared and added to what each side's random
    groups leave open (Student's quantile). The groups of both sides are taken to be drawn apart; where they are the
    same heads, and do alike in both models, the interval is wider than it needs to be.
    """
    place = places_of(len(gained), clusters)
    compared = [_comparable(kept, gained.tolist()) for kept in sides]
    if len(np.unique(place)) < 2 or any(n_random == 1 for _, n_random in compared):
        return None
    value, (low, high) = float(gained.mean()), bootstrap_interval(gained, clusters, least=-2.0, most=2.0)
    groups = [_variance_of_groups(kept, place) for kept, _ in compared]
    freedom = min(n_groups for _, n_groups in groups) - 1
    half = float(scipy.special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(sum(part for part, _ in groups))
    return max(-2.0, value - math.hypot(value - low, half)), min(2.0, value + math.hypot(high - value, half))


def _share_interval(share: float, variance: float, freedom: float, n: int) -> Interval:
    """Clopper and Pearson's interval of a share with that variance; of ``n`` answers where it has none."""
    tail = (1 - CONFIDENCE) / 2
    effective = float(n)
    if variance > 1e-15 and 0 < share < 1:
        student = float(scipy.special.ndtri(1 - tail) / scipy.special.stdtrit(max(1.0, freedom), 1 - tail))
        effective = max(2.0, share * (1 - share) / variance * student**2)
    return clopper_pearson(share * effective, effective, CONFIDENCE)

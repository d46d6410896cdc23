"""How far what was found on some prompts would be found on others: resamples of the prompts, without a new model pass.

Prompts are drawn with replacement, whole clusters of near-duplicates together, within their strata where they have any.
Scores are of heads as columns 0 to H - 1; which head a column is, the caller knows.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.errors import InputError
from safetyheads.stats.intervals import CONFIDENCE, FloatArray, Rate, places_of

N_DRAWS = 1000
"""Resamples of the prompts."""
TOPS = (1, 3, 10)
"""Sizes of the top lists whose need of prompts is drawn."""
SETTLED = 0.9
"""A top list has settled where this share of it, on average, is that of all prompts."""
N_FURTHER = 4
"""Passes over all heads that :func:`repeated_search` may ask for beside those of the search itself."""
Columns: TypeAlias = frozenset[int]
"""A group of heads, as columns."""


def resampled(
    n: int,
    n_draws: int = N_DRAWS,
    clusters: Sequence[Hashable] | None = None,
    strata: Sequence[Hashable] | None = None,
    size: int | None = None,
    seed: int = 0,
) -> FloatArray:
    """Weights [n_draws, n] of the prompts in each resample; the weights of a resample sum to 1.

    Prompts of equal value in ``clusters`` [n] come and go together; by default each is alone. As many clusters are
    drawn from each of the ``strata`` [n] as it has; a cluster lies in the stratum of its first prompt. ``size``, which
    goes without strata, is the number of prompts, or clusters, in a resample; by default as many as there are.
    """
    generator = np.random.default_rng(seed)
    member = places_of(n, clusters)
    n_clusters = int(member.max()) + 1
    layer_of = [None if strata is None else strata[int((member == at).argmax())] for at in range(n_clusters)]
    drawn = np.zeros((n_draws, n_clusters), dtype=np.int64)
    for layer in dict.fromkeys(layer_of):
        inside = [at for at in range(n_clusters) if layer_of[at] == layer]
        even = np.full(len(inside), 1 / len(inside))
        drawn[:, inside] = generator.multinomial(size or len(inside), even, size=n_draws)
    weights = drawn[:, member].astype(float)
    shares: FloatArray = weights / weights.sum(axis=1, keepdims=True)
    return shares


# Ranks of single heads.


class RankStability(NamedTuple):
    """How firm one head's rank by a score is."""

    column: int
    rank: int
    """From 1; heads that tie share the best rank."""
    interval: tuple[int, int]
    """95 %: 1 + heads that are surely better, to H - heads that are surely worse (Mogstad et al., 2024)."""
    frequency: float
    """Share of the resamples where it is among the best k, k its own rank or the number of heads listed."""


def rank_stability(
    values: FloatArray, columns: Sequence[int], weights: FloatArray, resolution: float = 0.0
) -> tuple[RankStability, ...]:
    """Rank, its interval, and how often each of ``columns`` is among as many best heads as ``columns`` are.

    The interval is that of M. Mogstad, J. Romano, A. Shaikh and D. Wilhelm, Inference for ranks, Review of Economic
    Studies 91 (2024) 476-518: a head's differences from all others get one simultaneous 95 % interval, the maximum of
    their bootstrapped t statistics; heads whose interval leaves 0 out are surely better or worse. Ranks that are merely
    resampled are too sure where heads nearly tie.

    ``values`` are [n_prompts, n_heads], NaN throughout for a head without a score; ``weights`` are of the resamples
    [n_draws, n_prompts]. Means within ``resolution`` are ties.
    """
    scored = ~np.asarray(np.isnan(values).any(axis=0))
    known, mean = values[:, scored], values.mean(axis=0)
    place = np.cumsum(scored) - 1
    means = weights @ known
    found = []
    for column in columns:
        if not scored[column]:
            raise InputError(f"head {column} has no score")
        own = place[column]
        # Ranks of the resamples: 1 + heads that are better by more than a tie.
        ranks = 1 + (means > means[:, [own]] + resolution).sum(axis=1)
        rank = 1 + int((known.mean(axis=0) > mean[column] + resolution).sum())
        better, worse = _surely_apart(known, own, weights, resolution)
        interval = (1 + better, known.shape[1] - worse)
        found.append(RankStability(int(column), rank, interval, float((ranks <= len(columns)).mean())))
    return tuple(found)


def _surely_apart(values: FloatArray, own: int, weights: FloatArray, resolution: float) -> tuple[int, int]:
    """How many heads are surely better than the head ``own``, and surely worse."""
    differences = np.delete(values, own, axis=1) - values[:, [own]]
    if differences.shape[1] == 0:
        return 0, 0
    center, drawn = differences.mean(axis=0), weights @ differences
    # Of the resamples, so that it is of clusters and within strata as they are.
    error = drawn.std(axis=0)
    moves = error > 1e-15
    statistics = np.abs(drawn - center)[:, moves] / error[moves]
    limit = float(np.quantile(statistics.max(axis=1), CONFIDENCE)) if moves.any() else 0.0
    reach = limit * error + resolution
    return int((center > reach).sum()), int((center < -reach).sum())


# How many prompts a ranking needs.


@dataclass(frozen=True, slots=True)
class TopAtSize:
    """How much of the top k of all prompts as many others give."""

    n: int
    """Prompts drawn."""
    overlap: float
    """Mean share of the top k, from 0 to 1."""
    interval: tuple[float, float]
    """Between which 95 % of the draws lie."""


@dataclass(frozen=True, slots=True)
class TopNeeds:
    """How many prompts the top k needs to settle."""

    k: int
    settles: int | None
    """Fewest prompts tried from which on the mean overlap stays at :data:`SETTLED` or above; None where none are."""
    n: int
    """Prompts behind the ranking; larger numbers are forecast from these."""
    chance: float
    """Mean overlap of k heads drawn at random."""
    curve: tuple[TopAtSize, ...]


def prompts_needed(
    values: FloatArray,
    tops: Sequence[int] = TOPS,
    n_draws: int = 200,
    resolution: float = 0.0,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[TopNeeds, ...]:
    """Top-k overlap with the ranking by all prompts, against the number of prompts, for each k below the heads' number.

    Prompts are drawn with replacement, as from a population of which these are the sample. So the overlap is not 1 at
    the number that there are, and can be told for up to four times as many. Heads within ``resolution`` of the last of
    the top k count as in it. ``values`` are [n_prompts, n_heads] without NaN; ``clusters`` of near-duplicates
    [n_prompts] are drawn whole: as many as have so many prompts on average.
    """
    n, n_heads = values.shape
    share = 1.0 if clusters is None else len(set(clusters)) / n
    sizes = [size for step in range(1, 12) for size in (2**step, 3 * 2 ** (step - 1)) if size < 4 * n]
    sizes = sorted({*sizes, n, 4 * n})
    mean = values.mean(axis=0)
    inside = {k: mean >= np.sort(mean)[-k] - resolution for k in tops if k < n_heads}
    curves: dict[int, list[TopAtSize]] = {k: [] for k in inside}
    for size in sizes:
        weights = resampled(n, n_draws, clusters, size=max(1, round(share * size)), seed=seed + size)
        drawn = -(weights @ values)
        for k, curve in curves.items():
            overlap = inside[k][np.argpartition(drawn, k - 1, axis=1)[:, :k]].mean(axis=1)
            low, high = np.quantile(overlap, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
            curve.append(TopAtSize(size, float(overlap.mean()), (low, high)))
    needs = []
    for k, curve in curves.items():
        below = max((point.n for point in curve if point.overlap < SETTLED), default=0)
        settles = next((size for size in sizes if size > below), None)
        needs.append(TopNeeds(k, settles, n, float(inside[k].mean()), tuple(curve)))
    return tuple(needs)


# A search on resamples.


class Repeated(NamedTuple):
    """What a greedy search finds on resamples of its prompts."""

    same: Rate
    """Resamples that end with the same group of heads, in any order. Its interval is of the number of draws alone."""
    jaccard: float
    """Mean share of heads in common: in both groups / in either."""
    frequencies: dict[int, float]
    """Share of the resamples whose group has the head, by column; heads that no group has are left out."""
    not_followed: int
    """Resamples given up for want of a pass; they count as another group, with no head in common beyond those known."""
    further: int
    """Passes over all heads beside those of the search itself."""
    tied: int
    """Resamples where a step's best head tied with one of the group, which was then taken."""
    repeats: NDArray[np.bool_]
    """[n_draws], which resamples end with the same group."""


def repeated_search(
    group: Sequence[int],
    scores: Callable[[Columns], FloatArray],
    weights: FloatArray,
    resolution: float = 0.0,
    known: Sequence[Columns] = (),
    n_further: int = N_FURTHER,
) -> Repeated:
    """Run a greedy search of as many steps as ``group`` has heads on each resample of the prompts.

    Resamples that agree so far share a pass. Where a step's best heads tie, the group's own is taken. Passes beyond the
    search's own go to where most resamples wait, none to fewer than one in a hundred.

    Args:
        group: the search's own choice, in order.
        scores: given a group, each prompt's score of it with each further head [n_prompts, n_heads]; NaN for heads in
            it. The search's own steps are asked for too: whoever calls has them stored.
        weights: of the resamples [n_draws, n_prompts].
        resolution: means this close are ties.
        known: further groups whose scores cost nothing.
        n_further: passes at most that cost something.
    """
    target, n_draws = frozenset(group), len(weights)
    free = {frozenset(group[:step]) for step in range(len(group))} | set(known)
    waiting: dict[Columns, NDArray[np.int64]] = {frozenset(): np.arange(n_draws)}
    lost: list[tuple[Columns, NDArray[np.int64]]] = []
    further, tied = 0, np.zeros(n_draws, dtype=bool)
    for _ in group:
        following: dict[Columns, list[NDArray[np.int64]]] = {}
        for prefix, draws in sorted(waiting.items(), key=lambda item: (-len(item[1]), sorted(item[0]))):
            if prefix not in free:
                if further >= n_further or len(draws) * 100 < n_draws:
                    lost.append((prefix, draws))
                    continue
                further += 1
            means = np.nan_to_num(weights[draws] @ scores(prefix), nan=-np.inf)
            best = means.argmax(axis=1)
            top = means[np.arange(len(draws)), best]
            for column in group:
                if column not in prefix:
                    close = (means[:, column] >= top - resolution) & ~np.isin(best, list(target))
                    best[close], tied[draws[close]] = column, True
            for column in np.unique(best):
                following.setdefault(prefix | {int(column)}, []).append(draws[best == column])
        waiting = {prefix: np.concatenate(parts) for prefix, parts in following.items()}
    repeats, shared, counts = np.zeros(n_draws, dtype=bool), 0.0, Counter[int]()
    for found, draws in (*waiting.items(), *lost):
        repeats[draws] = found == target
        common = len(found & target)
        # The heads that were not searched for are taken to be others than the group's.
        shared += len(draws) * common / (2 * len(target) - common)
        counts.update(dict.fromkeys(found, len(draws)))
    frequencies = {column: count / n_draws for column, count in counts.most_common()}
    n_lost, same = sum(len(draws) for _, draws in lost), Rate(int(repeats.sum()), n_draws)
    return Repeated(same, shared / n_draws, frequencies, n_lost, further, int(tied.sum()), repeats)

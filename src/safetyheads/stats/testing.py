"""Paired changes, synergy of pairs of heads, significance tests and their corrections."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
import scipy  # its modules load on first use
from numpy.typing import NDArray

from safetyheads.display import Shown
from safetyheads.errors import InputError
from safetyheads.stats.intervals import (
    CONFIDENCE,
    FloatArray,
    Interval,
    clustered_paired_interval,
    independent_count,
    newcombe_paired_interval,
    places_of,
)

ALPHA = 0.05
"""Level of a test, after any correction."""


@dataclass(frozen=True, slots=True)
class PairedDifference(Shown):
    """How a rate changed over the same prompts. With no pair, change, interval and p_value are None."""

    change: float | None
    """Rate after minus rate before, from -1 to 1."""
    interval: Interval | None
    """95 % interval of the change: Newcombe (1998), method 10; with several answers a prompt, or near-duplicates,
    :func:`.intervals.clustered_paired_interval`."""
    n: int
    """Pairs."""
    gained: int
    """Pairs that are true after and were not before; with several answers a prompt, prompts whose rate rose."""
    lost: int
    """Pairs that were true before and are not after; with several answers a prompt, prompts whose rate fell."""
    p_value: float | None
    """Two-sided exact test that the change is 0: McNemar's with one answer a prompt, and the sign-flip test of the mean
    change with several, of which McNemar's is a case; near-duplicates flip together. 1 where no pair changed."""

    @property
    def least_p(self) -> float:
        """The least p value that as many changed pairs can give: all changed the same way, no two near-duplicates."""
        return least_attainable_p(self.gained + self.lost)


def paired_difference(
    before: Sequence[float] | FloatArray,
    after: Sequence[float] | FloatArray,
    clusters: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
) -> PairedDifference:
    """Compare two outcomes of the same prompts, in the same order.

    Outcomes are [n_prompts], or [n_prompts, n_answers], in another number on each side: 0, 1, or NaN for an answer
    without a verdict. A prompt without any verdict on one side is left out. Near-duplicates of each other are in one of
    the ``clusters`` [n_prompts]; by default each stands alone.
    """
    if len(before) != len(after):
        raise InputError(f"paired outcomes differ in length: {len(before)} before, {len(after)} after")
    old, new = (np.asarray(side, dtype=float).reshape(len(side), -1 if len(side) else 1) for side in (before, after))
    scored = ~(np.isnan(old).all(axis=1) | np.isnan(new).all(axis=1))
    old, new, together = old[scored], new[scored], None if clusters is None else np.asarray(clusters, int)[scored]
    n = len(old)
    if n == 0:
        return PairedDifference(None, None, 0, 0, 0, None)
    if together is None and old.shape[1] == new.shape[1] == 1:
        first, second = old[:, 0].astype(bool), new[:, 0].astype(bool)
        gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
        both = int((first & second).sum())
        interval = newcombe_paired_interval(both, gained, lost, n - both - gained - lost, confidence)
        return PairedDifference((gained - lost) / n, interval, n, gained, lost, exact_mcnemar(gained, lost))
    moved = _whole_steps(old, new)
    gained, lost = int((moved > 0).sum()), int((moved < 0).sum())
    change = float((np.nanmean(new, axis=1) - np.nanmean(old, axis=1)).mean())
    interval = clustered_paired_interval(old, new, confidence, None if together is None else together.tolist())
    if together is not None:
        moved = np.array([moved[together == cluster].sum() for cluster in np.unique(together)])
    return PairedDifference(change, interval, n, gained, lost, sign_flip_p(moved.tolist()))


_MOST_STEPS = 5040
"""Ten answers and fewer, in any mixture, are exact; memory grows with the steps."""


def _whole_steps(old: FloatArray, new: FloatArray) -> NDArray[np.int64]:
    """Each prompt's change as a whole number of equal steps [n_prompts], so that equal changes are equal.

    Where prompts have so many different numbers of answers that a step were below 1 / :data:`_MOST_STEPS`, changes are
    rounded to that.
    """
    sizes = [(~np.isnan(side)).sum(axis=1) for side in (old, new)]
    steps = math.lcm(*(int(size) for size in np.unique(np.concatenate(sizes))))
    if steps > _MOST_STEPS:
        return np.rint((np.nanmean(new, axis=1) - np.nanmean(old, axis=1)) * _MOST_STEPS).astype(np.int64)
    ones = [np.nansum(side, axis=1).astype(np.int64) for side in (old, new)]
    before, after = (count * (steps // size) for count, size in zip(ones, sizes, strict=True))
    return after - before


def sign_flip_p(moved: Sequence[int]) -> float:
    """Two-sided exact test that a sum of paired changes is 0: each change might as well have gone the other way.

    The p value is the share of all 2**n choices of signs whose sum is as far from 0. Where all changes are of one size
    it is McNemar's. Its statistic is the mean change itself, so it cannot point against it.
    """
    sizes = [abs(move) for move in moved if move]
    common = math.gcd(*sizes) if sizes else 1
    return _sign_flips(tuple(sorted(size // common for size in sizes)), abs(sum(moved)) // common)


@lru_cache(4096)
def _sign_flips(sizes: tuple[int, ...], observed: int) -> float:
    if not sizes or observed == 0:
        return 1.0
    if len(set(sizes)) == 1:
        return exact_mcnemar((len(sizes) + observed) // 2, (len(sizes) - observed) // 2)
    reach = sum(sizes)
    # The chance of each sum from -reach to reach. Only additions of what is positive, so that small ones stay exact.
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for size in sizes:
        moved = np.zeros_like(chances)
        moved[size:] += chances[:-size] / 2
        moved[:-size] += chances[size:] / 2
        chances = moved
    return min(1.0, 2 * float(chances[reach + observed :].sum()))


def least_attainable_p(changed: int) -> float:
    """The least p value of an exact two-sided test of ``changed`` pairs: all of them changed the same way."""
    return min(1.0, 2 * 0.5**changed)


@lru_cache(64)
def least_changed(alpha: float) -> int:
    """The fewest pairs that, all changed the same way, bring an exact two-sided test down to ``alpha``, above 0."""
    return next(changed for changed in count(1) if least_attainable_p(changed) <= alpha)


@lru_cache(4096)
def exact_mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test: are gains and losses equally likely among the pairs that changed?"""
    # With no changed pair the test has nothing to say, and binomtest rejects zero trials.
    return float(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P values adjusted for testing all of them (Holm, 1979); in the order given, () for none.

    It is Tarone's step-down where every test could give any p value.
    """
    return tarone(p_values, [0.0] * len(p_values))


def holm_of_tests(p_values: Iterable[float | None]) -> list[float | None]:
    """:func:`holm` over the p values that exist; None, where nothing was tested, stays."""
    p_values = list(p_values)
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


def tarone(p_values: Sequence[float], least: Sequence[float]) -> tuple[float, ...]:
    """P values adjusted for testing all of them, where discrete tests cannot all be significant.

    Tarone (Biometrics 46, 1990) left out of Bonferroni's count the tests whose least attainable p value lies above the
    level; G. Hommel and F. Krummenauer (Biometrics 54, 1998) made it a step-down for every level. A p value is
    multiplied by the number of tests not yet rejected that could have given one as small; the family-wise error rate
    holds as Holm's does, and nothing is rejected less often.
    ``least`` is the least p value that each test can give, by what it conditions on; 2 * .5**d for McNemar's of d
    changed pairs (:attr:`PairedDifference.least_p`).
    """
    p, floor = np.asarray(p_values, float), np.asarray(least, float)
    if p.shape != floor.shape or not ((p >= 0) & (p <= 1)).all() or (p < floor * (1 - 1e-9)).any():
        raise InputError("p values lie between 0 and 1, and none below the least that its test can give")
    adjusted, left, running = np.empty(len(p)), np.ones(len(p), bool), 0.0
    for at in np.argsort(p, kind="stable"):
        could = int((left & (floor <= p[at] * (1 + 1e-9))).sum())
        running = max(running, min(1.0, could * float(p[at])))
        adjusted[at], left[at] = running, False
    return tuple(adjusted.tolist())


def benjamini_hochberg(p_values: Sequence[float]) -> tuple[float, ...]:
    """P values adjusted so that a cut at q lets through a share of at most q false ones (Benjamini-Hochberg, 1995)."""
    if not all(0 <= p_value <= 1 for p_value in p_values):
        raise InputError("p values lie between 0 and 1")
    return tuple(scipy.stats.false_discovery_control(p_values, method="bh").tolist()) if len(p_values) else ()


def random_p_value(observed: float, random_values: Sequence[float]) -> float:
    """How often random groups do at least as well: (1 + those with a value >= observed) / (1 + all of them).

    The observed group counts as one of the draws, so N draws give no less than 1 / (1 + N).
    """
    reached = sum(value >= observed for value in random_values)
    return (1 + reached) / (1 + len(random_values))


_FARTHEST = 20.0
"""Log-odds that stand for no bound: a rate of 2e-9."""


@dataclass(frozen=True, slots=True)
class Synergy:
    """How much more two heads free together than their effects alone would give, in log-odds."""

    value: float
    """Log-odds of both, less those of each alone, plus those unablated; 0 where odds multiply. Half an answer is added
    to each count and its complement, so that it exists at 0 and n; counts are of independent prompts, so that
    near-duplicates are worth fewer."""
    interval: Interval
    """95 %."""
    n: int
    """Prompts."""
    p_value: float
    """Two-sided, of synergy 0: the level at which the interval would just reach 0."""


def log_odds_synergy(
    both: FloatArray,
    first: FloatArray,
    second: FloatArray,
    before: FloatArray,
    clusters: Sequence[int] | None = None,
) -> Synergy:
    """Synergy of a pair of heads on the scale of log-odds.

    Differences of rates cannot add up where one head alone frees most prompts: they are bounded by 1. Log-odds are not.
    The interval combines those of the four log-odds (Jeffreys), each with its distance on the side that counts, as
    Newcombe's does; the correlations between them are those of the prompts' outcomes.

    All are shares of answers that comply [n_prompts]: under both heads, under each alone, and unablated, for prompts
    that did not choose the heads. ``clusters`` are as in :func:`paired_difference`.
    """
    values = np.array([both, first, second, before], float)
    n = values.shape[1]
    if n == 0:
        raise InputError("synergy needs a prompt")
    signs = np.array([1.0, -1.0, -1.0, 1.0])
    counts, sizes = np.array([independent_count(side, clusters) for side in values]).T
    logits = np.log((counts + 0.5) / (sizes - counts + 0.5))
    value = float(signs @ logits)
    places = places_of(n, clusters)
    centred = np.array([np.bincount(places, side - side.mean()) for side in values])
    shared = centred @ centred.T
    deviations = np.sqrt(np.diag(shared))
    scale = np.outer(deviations, deviations)
    correlations = np.where(scale > 1e-12, shared / np.maximum(scale, 1e-12), 0.0)
    np.fill_diagonal(correlations, 1.0)

    def interval(confidence: float) -> Interval:
        tail = (1 - confidence) / 2
        low, high = (np.vectorize(_beta_logit)(counts + 0.5, sizes - counts + 0.5, level) for level in (tail, 1 - tail))
        # At 0 and n nothing bounds the log-odds on that side.
        low, high = np.where(counts <= 0, -_FARTHEST, low), np.where(counts >= sizes, _FARTHEST, high)
        down, up = logits - low, high - logits
        falls = signs * np.where(signs > 0, down, up)
        rises = signs * np.where(signs > 0, up, down)
        below, above = (math.sqrt(max(float(side @ correlations @ side), 0.0)) for side in (falls, rises))
        return value - below, value + above

    return Synergy(value, interval(CONFIDENCE), n, _p_of(interval))


def _beta_logit(a: float, b: float, level: float) -> float:
    """The logit of a quantile of a beta distribution, also where the quantile rounds to 0 or 1."""
    low, high = scipy.special.betaincinv(a, b, level), scipy.special.betaincinv(b, a, 1 - level)
    return math.log(max(float(low), 1e-300)) - math.log(max(float(high), 1e-300))


def _p_of(interval: Callable[[float], Interval]) -> float:
    """One less the highest level whose interval leaves 0 out."""

    def beyond(level: float) -> float:
        """How far the interval lies from 0; negative where it holds 0."""
        low, high = interval(level)
        return max(low, -high)

    lowest, highest = 1e-9, 1 - 1e-12
    if beyond(lowest) <= 0:
        return 1.0
    return 1 - (highest if beyond(highest) > 0 else float(scipy.optimize.brentq(beyond, lowest, highest)))


def equivalent(
    before: Sequence[float] | FloatArray,
    after: Sequence[float] | FloatArray,
    margin: float,
    clusters: Sequence[int] | None = None,
) -> bool:
    """Whether a rate is shown to change by less than the margin either way: two one-sided tests at 5 %.

    A point estimate within the margin shows nothing, nor does an interval that includes 0; a narrow one round 0 does.
    Arguments as for :func:`paired_difference`.
    """
    interval = paired_difference(before, after, clusters, 2 * CONFIDENCE - 1).interval
    return interval is not None and -margin < interval[0] <= interval[1] < margin


def equivalent_means(changes: Sequence[float], margin: float, clusters: Sequence[int] | None = None) -> bool:
    """Whether the mean of paired changes is shown to lie within the margin: two one-sided t tests at 5 %.

    The error is of sums over ``clusters`` of near-duplicates [n_prompts]; by default each prompt stands alone.
    """
    values = np.asarray(changes, float)
    places = places_of(len(values), clusters)
    sums = np.bincount(places, values - values.mean()) if len(values) else values
    if (n := len(sums)) < 2:
        return False
    error = math.sqrt(float((sums**2).sum()) * n / (n - 1)) / len(values)
    half_width = float(scipy.stats.t.ppf(CONFIDENCE, n - 1)) * error
    return abs(float(values.mean())) + half_width < margin

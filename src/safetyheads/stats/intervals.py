"""Rates, means and their 95 % intervals.

Every result is a frozen value that ``dataclasses.asdict`` turns into valid JSON: a number that does not exist
(a rate of no answers) is None, never NaN.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import scipy  # its modules load on first use
from numpy.typing import NDArray

from safetyheads.display import Shown
from safetyheads.errors import InputError

FloatArray: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]
"""Lower and upper bound, in the unit of the number they belong to."""
Outcomes: TypeAlias = Sequence[Sequence[float]] | FloatArray
"""[n_prompts, n_answers]: 0, 1, or NaN for an answer without a verdict."""

CONFIDENCE = 0.95
"""Level of every interval."""

N_RESAMPLES = 2000
"""Draws of a bootstrap. From one seed to another the bounds move by about 1 % of their distance."""


@dataclass(frozen=True, slots=True)
class Rate(Shown):
    """A share of scored answers. With no scored answer (``n`` 0), rate and interval are None."""

    count: int
    """Scored answers that count."""
    n: int
    """Answers that were scored."""
    unscored: int = 0
    """Answers the judge could not score; they are in neither ``count`` nor ``n``."""
    rate: float | None = field(init=False)
    """``count / n``, from 0 to 1."""
    interval: Interval | None = field(init=False)
    """95 % interval of the rate: Wilson's, or ``by_cluster``."""
    by_cluster: InitVar[Interval | None] = None
    """The interval where prompts are near-duplicates of each other (:func:`clustered_rate`)."""

    def __post_init__(self, by_cluster: Interval | None) -> None:
        if not 0 <= self.count <= self.n or self.unscored < 0:
            raise InputError(f"a rate of {self.count} of {self.n} answers, {self.unscored} unscored, cannot be")
        # Fields, not properties, so that asdict writes them: no rate is stored without its interval.
        object.__setattr__(self, "rate", self.count / self.n if self.n else None)
        object.__setattr__(self, "interval", (by_cluster or wilson_interval(self.count, self.n)) if self.n else None)

    def __str__(self) -> str:
        if self.rate is None or self.interval is None:
            return "no scored answers"
        low, high = self.interval
        return f"{self.rate:.2f} [{low:.2f}, {high:.2f}] ({self.count}/{self.n})"


@lru_cache(4096)
def wilson_interval(count: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a proportion; ``n`` is at least 1. It holds near 0 and 1, where refusals lie."""
    interval = scipy.stats.binomtest(count, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def one_sided_bounds(count: int, n: int) -> Interval:
    """Lower and upper bound of a proportion, each 95 % one-sided (Wilson); 0 and 1 where ``n`` is 0."""
    return wilson_interval(count, n, 2 * CONFIDENCE - 1) if n else (0.0, 1.0)


def clustered_rate(
    outcomes: Outcomes, clusters: Sequence[int] | None = None, confidence: float = CONFIDENCE
) -> Interval:
    """95 % interval of the share of answers that are 1, where answers to one prompt are not independent.

    Korn and Graubard, Survey Methodology 24 (1998) 193-201: the variance between prompts gives an effective number of
    answers, from the number of prompts up to that of answers, and Clopper and Pearson's exact interval is of that many.
    Where all answers or none are 1 it is the exact interval of as many answers as there are prompts.

    ``outcomes`` are [n_prompts, n_answers]; ``clusters`` says which prompts belong together, such as near-duplicates.
    By default each stands alone.
    """
    return clopper_pearson(*effective_count(outcomes, clusters, confidence), confidence)


def counted(values: FloatArray, clusters: Sequence[int] | None = None) -> Rate:
    """The share of scored answers that are 1; ``values`` are 0, 1 or NaN, [n_prompts] or [n_prompts, n_answers].

    With ``clusters`` [n_prompts], near-duplicates or prompts of several answers, the interval is that of
    :func:`clustered_rate`.
    """
    scored = ~np.isnan(values)
    by_cluster = clustered_rate(values, clusters) if clusters is not None and scored.any() else None
    return Rate(int(np.nansum(values)), int(scored.sum()), int((~scored).sum()), by_cluster)


def effective_count(
    outcomes: Outcomes, clusters: Sequence[int] | None = None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """How many independent answers these are worth (:func:`clustered_rate`): those that are 1, and all."""
    ones, sizes = _by_cluster(outcomes, clusters)
    rate = float(ones.sum() / sizes.sum())
    effective = float(_effective(np.array(rate), ((ones - rate * sizes) ** 2).sum(), sizes, confidence))
    return rate * effective, effective


def monotone_bounds(
    outcomes: Outcomes, clusters: Sequence[int] | None = None, confidence: float = CONFIDENCE
) -> tuple[Interval, float]:
    """Bounds of a share that never fall where more answers are 1, and the independent answers that they are worth.

    Arguments as for :func:`clustered_rate`, whose upper bound can fall: of 72 answers none lost may be worth 4, for
    nobody knows whether near-duplicates go together, and one lost worth 70. This one is the highest over all smaller
    numbers of losses, lying in the clusters as unfavourably as they can; the lower bound is its mirror image.
    """
    ones, sizes = _by_cluster(outcomes, clusters)
    high, worth = _highest_bound(ones, sizes, confidence)
    low, worth_below = _highest_bound(sizes - ones, sizes, confidence)
    return (1 - low, high), min(worth, worth_below)


def _highest_bound(ones: FloatArray, sizes: FloatArray, confidence: float) -> tuple[float, float]:
    """The highest upper bound over all numbers of ones up to those of the clusters, and what it is worth."""
    taken = np.arange(ones.sum() + 1)
    rates = taken / sizes.sum()
    # The most spread: the clusters that add most for each one go first. A part of a cluster counts in proportion, which
    # errs to the wide side; so neither more ones nor larger clusters of them can make it less.
    (of_each, size), times = np.unique((ones, sizes), axis=1, return_counts=True)
    gains = of_each - 2 * rates[:, None] * size
    order = np.argsort(-gains, axis=1)
    filled = np.diff(np.minimum(np.cumsum((of_each * times)[order], axis=1), taken[:, None]), axis=1, prepend=0)
    spread = (filled * np.take_along_axis(gains, order, axis=1)).sum(axis=1) + rates**2 * (sizes**2).sum()
    worth = _effective(rates, spread, sizes, confidence)
    bounds = np.array([clopper_pearson(*of, confidence)[1] for of in zip(rates * worth, worth, strict=True)])
    at = int(bounds.argmax())
    return float(bounds[at]), float(worth[at])


def places_of(n: int, clusters: Sequence[Hashable] | None) -> NDArray[np.intp]:
    """Each prompt's cluster [n], counted from 0; without ``clusters`` each stands alone."""
    if clusters is None:
        return np.arange(n)
    number = {cluster: at for at, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([number[cluster] for cluster in clusters], np.intp)


def _by_cluster(outcomes: Outcomes, clusters: Sequence[int] | None) -> tuple[FloatArray, FloatArray]:
    """Answers that are 1, and all with a verdict, of each cluster that has one."""
    values = np.asarray(outcomes, dtype=float)
    values = values.reshape(len(values), -1)
    scored = ~np.isnan(values)
    ones, sizes = np.nansum(values, axis=1), scored.sum(axis=1).astype(float)
    if clusters is not None:
        ones, sizes = (np.bincount(places_of(len(values), clusters), each) for each in (ones, sizes))
    if not scored.any():
        raise InputError("a rate needs an answer with a verdict")
    return ones[sizes > 0], sizes[sizes > 0]


def _effective(rates: FloatArray, spread: FloatArray, sizes: FloatArray, confidence: float) -> FloatArray:
    """Independent answers at each rate, where squared distances of clusters from it sum up to ``spread``."""
    n_clusters, n_answers = len(sizes), float(sizes.sum())
    # Kish's number: that of the clusters where they are of one size, fewer where some are large.
    least = n_answers**2 / float((sizes**2).sum())
    if n_clusters == 1:
        return np.full_like(rates, least)
    tail = (1 + confidence) / 2
    freedom = (scipy.special.ndtri(tail) / scipy.special.stdtrit(n_clusters - 1, tail)) ** 2
    # Of a ratio, linearised: the sizes differ where answers are unscored.
    of_rate = spread * n_clusters / (n_clusters - 1) / n_answers**2
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.clip(rates * (1 - rates) / of_rate * freedom, least, n_answers)
    return np.where((rates <= 0) | (rates >= 1), least, np.where(of_rate > 0, effective, n_answers))


def independent_count(values: FloatArray, clusters: Sequence[int] | None = None) -> tuple[float, float]:
    """As :func:`effective_count`, but plain counts where each prompt stands alone with one answer; 0 of none scored."""
    alone = clusters is None or len(set(clusters)) == len(values)
    if np.isnan(values).all() or (alone and values.size == len(values)):
        return float(np.nansum(values)), float((~np.isnan(values)).sum())
    return effective_count(values, clusters)


def clopper_pearson(count: float, n: float, confidence: float) -> Interval:
    """The exact interval of a proportion; count and n need not be whole."""
    tail = (1 - confidence) / 2
    low = 0.0 if count < 1e-9 else float(scipy.special.betaincinv(count, n - count + 1, tail))
    high = 1.0 if n - count < 1e-9 else float(scipy.special.betaincinv(count + 1, n - count, 1 - tail))
    return low, high


def newcombe_interval(before: float, old: Interval, after: float, new: Interval) -> Interval:
    """95 % interval of ``after - before`` for independent samples, from the 95 % interval of each.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998) 873-890. It squares and adds the distances to the bounds, so
    it takes any two estimates that have intervals, a concentration too; statsmodels has it for counts only.
    """
    change = after - before
    return change - math.hypot(after - new[0], old[1] - before), change + math.hypot(new[1] - after, before - old[0])


def newcombe_paired_interval(
    both: int, first: int, second: int, neither: int, confidence: float = CONFIDENCE
) -> Interval:
    """Interval, 95 % by default, of the rate of the first outcome minus that of the second, over the same pairs.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998) 2635-2650. It squares and adds the distances to the Wilson
    bounds, with the correlation phi, whose numerator is pulled towards 0 by n/2 where it is positive. Neither scipy nor
    statsmodels has it. The arguments count pairs: with both outcomes, the first or second alone, neither.
    """
    n = both + first + second + neither
    numerator: float = both * neither - first * second
    if numerator > 0:
        numerator = max(numerator - n / 2, 0.0)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    # A margin of 0 (an outcome that never or always came) leaves phi undefined; the paper takes 0.
    phi = numerator / math.sqrt(margins) if margins else 0.0
    first_bounds, second_bounds = (wilson_interval(both + alone, n, confidence) for alone in (first, second))
    return square_and_add((both + first) / n, first_bounds, (both + second) / n, second_bounds, phi)


def clustered_paired_interval(
    before: FloatArray, after: FloatArray, confidence: float = CONFIDENCE, clusters: Sequence[int] | None = None
) -> Interval:
    """Interval of the rate after minus that before, over the same prompts with several answers each.

    :func:`newcombe_paired_interval` with the interval of :func:`clustered_rate` for each side and the correlation of
    the prompts' own rates, or of the sums over ``clusters`` [n_prompts], for phi. ``before`` and ``after`` are
    [n_prompts, n_answers], NaN where there is no verdict; every prompt has a verdict on both sides.
    """
    old, new = np.nanmean(before, axis=1), np.nanmean(after, axis=1)
    places = places_of(len(old), clusters)
    apart = [np.bincount(places, weights=side - side.mean()) for side in (old, new)]
    first, second, covariance = (float(apart[i] @ apart[j]) / len(old) for i, j in ((0, 0), (1, 1), (0, 1)))
    deviation = math.sqrt(first * second)
    if covariance > 0:
        covariance = max(covariance - len(old) / (2 * len(apart[0]) ** 2), 0.0)
    phi = covariance / deviation if deviation > 0 else 0.0
    new_bounds, old_bounds = (clustered_rate(side, clusters, confidence) for side in (after, before))
    # The change is of the prompts' own rates, which differ from the answers' where some are unscored.
    return square_and_add(float(new.mean()), new_bounds, float(old.mean()), old_bounds, phi)


def square_and_add(rate_1: float, bounds_1: Interval, rate_2: float, bounds_2: Interval, phi: float) -> Interval:
    """Newcombe's interval of ``rate_1 - rate_2``, from each one's own and the correlation of their estimates."""

    def combined(distance_1: float, distance_2: float) -> float:
        # The form is positive for |phi| <= 1; rounding can leave it below 0 where it is 0 exactly.
        return math.sqrt(max(distance_1**2 - 2 * phi * distance_1 * distance_2 + distance_2**2, 0.0))

    low = rate_1 - rate_2 - combined(rate_1 - bounds_1[0], bounds_2[1] - rate_2)
    high = rate_1 - rate_2 + combined(bounds_1[1] - rate_1, rate_2 - bounds_2[0])
    return max(low, -1.0), min(high, 1.0)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over prompts, in the unit of its values."""

    mean: float | None
    """None where there is no value."""
    n: int
    """Values."""
    interval: Interval | None
    """95 % Student interval; None below two values, and for scores, whose means no interval covers."""
    standard_error: float | None
    """Sample standard deviation over the root of n; None below two values."""
    median: float | None = None
    """Of a score: median over prompts."""
    median_interval: Interval | None = None
    """95 %, exact for any distribution: two of the sorted values; None below six values."""


def mean_with_interval(values: Sequence[float]) -> Mean:
    """The mean with its 95 % Student interval; for scores of prompts use :func:`skewed_mean`."""
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise InputError("a mean needs finite values")
    n = len(numbers)
    mean = math.fsum(numbers) / n if n else None
    if mean is None or n == 1:
        return Mean(mean, n, None, None)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (n - 1)
    standard_error = math.sqrt(variance / n)
    half_width = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * standard_error
    return Mean(mean, n, (mean - half_width, mean + half_width), standard_error)


def skewed_mean(values: Sequence[float], clusters: Sequence[int] | None = None) -> Mean:
    """The mean of a score over prompts, such as Ships, without an interval; the median with one.

    For most heads a few prompts hold most of the sum. A sample that misses them looks even, so no rule that sees only
    the sample can tell when an interval of the mean covers (docs/statistics.md). That of the median always does.
    ``clusters`` [n_prompts] are near-duplicates: the median's interval is then as wide as for the number of independent
    prompts that they are worth.
    """
    mean = mean_with_interval(values)
    ordered = sorted(float(value) for value in values)
    n, middle = len(ordered), float(np.median(ordered)) if ordered else math.nan
    worth = int(independent_count((np.asarray(values, float) <= middle).astype(float), clusters)[1] + 1e-9)
    # The k-th value from either end: fewer than k of n lie beyond the median with a chance of at most the tail.
    k = int((scipy.stats.binom.cdf(np.arange(worth), worth, 0.5) <= (1 - CONFIDENCE) / 2).sum() * n / max(worth, 1))
    interval = (ordered[k - 1], ordered[n - k]) if k else None
    return Mean(mean.mean, n, None, mean.standard_error, middle if n else None, interval)


def bootstrap_interval(
    values: FloatArray, clusters: Sequence[int] | None = None, seed: int = 0, least: float = -1.0, most: float = 1.0
) -> Interval:
    """95 % percentile bootstrap interval of the mean of values [n_prompts], one a prompt.

    Prompts are drawn, or ``clusters`` of near-duplicates [n_prompts], not answers: several answers to one prompt are
    not independent. Where all values, or the means of all clusters, are equal, resampling would give a point, and claim
    a certainty that n values do not have. There the interval is the exact bound (Clopper and Pearson) on the share of
    other values that n draws can have missed, all taken to lie at one end.

    ``least`` and ``most`` are the lowest and the highest value that can occur.
    """
    places = places_of(len(values), clusters)
    sizes = np.bincount(places)
    n, (low_tail, high_tail) = len(sizes), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    if np.ptp(np.bincount(places, values) / sizes) < 1e-12:
        value, missed = float(np.mean(values)), 1 - low_tail ** (1 / n)
        return value - missed * (value - least), value + missed * (most - value)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES)
    low, high = np.quantile(draws @ np.bincount(places, values) / (draws @ sizes), [low_tail, high_tail]).tolist()
    return low, high


def most_in_population(n_population: int, n_sampled: int, n_found: int) -> int:
    """Upper bound, 95 %, on the members of a population that have a property, from a sample without replacement.

    The largest number K for which finding ``n_found`` or fewer in the sample is not rarer than 5 % (hypergeometric,
    one-sided, exact). Example: 64 of 992 sampled and none found leave up to 43.
    """
    if not 0 <= n_found <= n_sampled <= n_population:
        raise InputError(f"{n_found} found of {n_sampled} sampled of {n_population} cannot be")
    members = np.arange(n_found, n_population - (n_sampled - n_found) + 1)
    # Of a population of none the chance is NaN, and nothing is rare.
    rare = scipy.stats.hypergeom.cdf(n_found, n_population, members, n_sampled) <= 1 - CONFIDENCE
    return int(members[~rare].max())

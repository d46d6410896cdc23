"""Numbers with their uncertainty. Owns the intervals and tests; refuses to know models, prompts and judges.

Every result is a frozen value that ``dataclasses.asdict`` turns into valid JSON: a number that does not exist
(a rate of no answers) is None, never NaN. Confidence is 95 % throughout. scipy and statsmodels load on use, so
that importing the package stays quick.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from safetyheads.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIDENCE = 0.95
"""Level of every interval in this module."""

Interval: TypeAlias = tuple[float, float]
"""Lower and upper bound, in the unit of the number they belong to."""


@lru_cache(4096)
def wilson_interval(count: int, n: int) -> Interval:
    """Wilson's score interval of a proportion, 95 %; needs ``n`` of at least 1.

    It keeps its level where the rates here live, near 0 and 1, where the normal interval shrinks to a point.
    """
    from scipy.stats import binomtest

    interval = binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True, slots=True)
class Rate:
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
    """95 % Wilson interval of the rate."""

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.n or self.unscored < 0:
            raise InputError(f"a rate of {self.count} of {self.n} answers, {self.unscored} unscored, cannot be")
        # Fields, not properties, so that asdict writes them: no rate is stored without its interval.
        object.__setattr__(self, "rate", self.count / self.n if self.n else None)
        object.__setattr__(self, "interval", wilson_interval(self.count, self.n) if self.n else None)

    def __str__(self) -> str:
        if self.rate is None or self.interval is None:
            return "no scored answers"
        low, high = self.interval
        return f"{self.rate:.2f} [{low:.2f}, {high:.2f}] ({self.count}/{self.n})"


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How a yes-or-no outcome of the same prompts changed. With no pair, change, interval and p_value are None."""

    change: float | None
    """Rate after minus rate before, from -1 to 1."""
    interval: Interval | None
    """95 % interval of the change (Newcombe, 1998, method 10)."""
    n: int
    """Pairs."""
    gained: int
    """Pairs that are true after and were not before."""
    lost: int
    """Pairs that were true before and are not after."""
    p_value: float | None
    """Two-sided exact McNemar test of gained against lost; 1 where no pair changed."""


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> PairedDifference:
    """Compare two outcomes of the same prompts, in the same order.

    Raises:
        InputError: the sequences differ in length.
    """
    if len(before) != len(after):
        raise InputError(f"paired outcomes differ in length: {len(before)} before, {len(after)} after")
    n = len(before)
    both = sum(bool(b) and bool(a) for b, a in zip(before, after, strict=True))
    lost = sum(map(bool, before)) - both
    gained = sum(map(bool, after)) - both
    if n == 0:
        return PairedDifference(None, None, 0, 0, 0, None)
    return PairedDifference(
        change=(gained - lost) / n,
        interval=newcombe_paired_interval(both, gained, lost, n - both - gained - lost),
        n=n,
        gained=gained,
        lost=lost,
        p_value=exact_mcnemar(gained, lost),
    )


@lru_cache(4096)
def exact_mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test: are gains and losses equally likely among the pairs that changed?"""
    from scipy.stats import binomtest

    # With no changed pair the test has nothing to say, and binomtest does not accept no trial.
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def newcombe_paired_interval(both: int, first: int, second: int, neither: int) -> Interval:
    """95 % interval of the rate of the first outcome minus that of the second, over the same pairs.

    R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired
    data, Statistics in Medicine 17 (1998) 2635-2650, method 10: the Wilson intervals of both rates are squared
    and added, with their correlation phi, whose numerator is pulled towards 0 by n/2 where it is positive. It
    is written here because no released scipy or statsmodels has it.

    Args:
        both: pairs with both outcomes.
        first: pairs with the first outcome alone.
        second: pairs with the second outcome alone.
        neither: pairs with neither.
    """
    n = both + first + second + neither
    rate_1, rate_2 = (both + first) / n, (both + second) / n
    low_1, high_1 = wilson_interval(both + first, n)
    low_2, high_2 = wilson_interval(both + second, n)
    numerator: float = both * neither - first * second
    if numerator > 0:
        numerator = max(numerator - n / 2, 0.0)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    # A margin of 0 (an outcome that never or always came) leaves phi undefined; the paper takes 0.
    phi = numerator / math.sqrt(margins) if margins else 0.0
    change = rate_1 - rate_2
    return (
        max(change - _square_and_add(rate_1 - low_1, high_2 - rate_2, phi), -1.0),
        min(change + _square_and_add(high_1 - rate_1, rate_2 - low_2, phi), 1.0),
    )


def _square_and_add(distance_1: float, distance_2: float, phi: float) -> float:
    # The form is positive for |phi| <= 1; rounding can leave it below 0 where it is 0 exactly.
    return math.sqrt(max(distance_1**2 - 2 * phi * distance_1 * distance_2 + distance_2**2, 0.0))


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over prompts, in the unit of its values."""

    mean: float | None
    """None where there is no value."""
    n: int
    """Values."""
    interval: Interval | None
    """95 % Student interval; None below two values."""
    standard_error: float | None
    """Sample standard deviation over the root of n; None below two values."""


def mean_with_interval(values: Sequence[float]) -> Mean:
    """The mean with its 95 % Student interval.

    Student's interval and not a bootstrap: it exists from two values on and for equal values, draws no random
    numbers, and costs nothing for each of a thousand heads. Scores are skewed to the right, so with few prompts
    (below about 30) the upper bound is too low.

    Raises:
        InputError: a value is not finite.
    """
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise InputError("a mean needs finite values")
    n = len(numbers)
    if n == 0:
        return Mean(None, 0, None, None)
    mean = math.fsum(numbers) / n
    if n == 1:
        return Mean(mean, 1, None, None)
    from scipy.stats import t

    variance = math.fsum((number - mean) ** 2 for number in numbers) / (n - 1)
    standard_error = math.sqrt(variance / n)
    half_width = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * standard_error
    return Mean(mean, n, (mean - half_width, mean + half_width), standard_error)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust p values for testing all of them (Holm, 1979); in the order given, () for none.

    Raises:
        InputError: a p value is not between 0 and 1.
    """
    return _adjusted(p_values, "holm")


def benjamini_hochberg(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust p values so that a cut at q lets through a share of at most q false ones (Benjamini-Hochberg, 1995).

    Raises:
        InputError: a p value is not between 0 and 1.
    """
    return _adjusted(p_values, "fdr_bh")


def _adjusted(p_values: Sequence[float], method: str) -> tuple[float, ...]:
    if not all(0 <= p_value <= 1 for p_value in p_values):
        raise InputError("p values lie between 0 and 1")
    if not p_values:
        return ()
    from statsmodels.stats.multitest import multipletests

    return tuple(float(p_value) for p_value in multipletests(list(p_values), method=method)[1])


N_RESAMPLES = 2000
"""Draws of a bootstrap: its bounds then move by about a hundredth of their distance from one seed to another."""


def bootstrap_intervals(
    values: NDArray[np.float64], seed: int = 0, least: float = -1.0, most: float = 1.0
) -> NDArray[np.float64]:
    """95 % percentile intervals of the means over prompts [n_columns, 2]; every column sees the same draws.

    Prompts are drawn, not answers: several answers to one prompt are no independent observations. Where all values
    of a column are equal, resampling would give a point, and so claim a certainty that n values do not have; there
    it is the exact bound on the share of other values that n draws can have missed (Clopper and Pearson), all of
    which may lie at one end.

    Args:
        values: [n_prompts, n_columns], of at least one prompt.
        seed: of the draws.
        least: the lowest value that there can be.
        most: the highest.
    """
    import numpy as np

    n = len(values)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    bounds: NDArray[np.float64] = np.quantile(draws @ values, tails, axis=0).T
    equal, missed = np.ptp(values, axis=0) < 1e-12, 1 - tails[0] ** (1 / n)
    beyond = np.stack([values[0] - missed * (values[0] - least), values[0] + missed * (most - values[0])], axis=1)
    return np.where(equal[:, None], beyond, bounds)


def bootstrap_interval(values: NDArray[np.float64], seed: int = 0, least: float = -1.0, most: float = 1.0) -> Interval:
    """:func:`bootstrap_intervals` of one column [n_prompts]."""
    low, high = bootstrap_intervals(values[:, None], seed, least, most)[0].tolist()
    return low, high


def paired_change(before: NDArray[np.float64], after: NDArray[np.float64], seed: int = 0) -> PairedDifference:
    """How a rate changed over prompts that were answered several times each.

    One answer a prompt is :func:`paired_difference`. With several, prompts whose rate rose are held against prompts
    whose rate fell (exact sign test, McNemar's with one answer), and the interval is a bootstrap over prompts.

    Args:
        before: [n_prompts, n_answers] of 0 and 1; NaN is unscored, and drops the prompt where nothing else is left.
        after: the same prompts.
        seed: of the bootstrap.
    """
    import numpy as np

    scored = ~(np.isnan(before).all(axis=1) | np.isnan(after).all(axis=1))
    before, after = before[scored], after[scored]
    if before.shape[1] == 1:
        return paired_difference(before[:, 0].astype(bool).tolist(), after[:, 0].astype(bool).tolist())
    if not len(before):
        return PairedDifference(None, None, 0, 0, 0, None)
    moved = np.nanmean(after, axis=1) - np.nanmean(before, axis=1)
    gained, lost = int((moved > 0).sum()), int((moved < 0).sum())
    interval = bootstrap_interval(moved, seed)
    return PairedDifference(float(moved.mean()), interval, len(moved), gained, lost, exact_mcnemar(gained, lost))


def smallest_detectable_change(n: int, alpha: float = 0.05, tests: int = 1) -> float | None:
    """The smallest change of a rate that ``n`` pairs can show, if all changed pairs changed the same way.

    The exact McNemar test of k pairs that all changed one way gives 2 * 0.5**k; this is the smallest k/n at which
    that is at most ``alpha / tests`` (Bonferroni, which is Holm's first step). None where even all n do not do.
    A verdict of "none found" is to be read beside it: a smaller change could not have been found.

    Raises:
        InputError: ``n`` below 0, ``alpha`` outside (0, 1) or ``tests`` below 1.
    """
    if n < 0 or tests < 1 or not 0 < alpha < 1:
        raise InputError(f"no detectable change for n={n}, alpha={alpha}, tests={tests}")
    changed = 1
    while 2 * 0.5**changed > alpha / tests:
        changed += 1
    return changed / n if changed <= n else None


def random_p_value(observed: float, random_values: Sequence[float]) -> float:
    """How often random groups do at least as well: (1 + those with a value >= observed) / (1 + all of them).

    The observed group counts as one of the draws, so N draws give no less than 1 / (1 + N).
    """
    reached = sum(value >= observed for value in random_values)
    return (1 + reached) / (1 + len(random_values))


def most_in_population(n_population: int, n_sampled: int, n_found: int) -> int:
    """Upper bound, 95 %, on the members of a population that have a property, from a sample without replacement.

    The largest number K for which finding ``n_found`` or fewer in the sample is not rarer than 5 % (hypergeometric,
    one-sided, exact): 64 clean of 992 leave up to 43.
    """
    from scipy.stats import hypergeom

    if not 0 <= n_found <= n_sampled <= n_population:
        raise InputError(f"{n_found} found of {n_sampled} sampled of {n_population} cannot be")
    # The chance of so few falls as K grows, so K is found by halving.
    low, high = n_found, n_population - (n_sampled - n_found)
    while low < high:
        middle = (low + high + 1) // 2
        if hypergeom.cdf(n_found, n_population, middle, n_sampled) > 1 - CONFIDENCE:
            low = middle
        else:
            high = middle - 1
    return int(low)

"""Rates, means and their 95 % intervals.

Every result is a frozen value that ``dataclasses.asdict`` turns into valid JSON: a number that does not exist
(a rate of no answers) is None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import scipy  # its modules load on first use
from numpy.typing import NDArray

from safetyheads.errors import InputError

FloatArray: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]
"""Lower and upper bound, in the unit of the number they belong to."""

CONFIDENCE = 0.95
"""Level of every interval."""

N_RESAMPLES = 2000
"""Draws of a bootstrap. From one seed to another the bounds move by about 1 % of their distance."""


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


@lru_cache(4096)
def wilson_interval(count: int, n: int) -> Interval:
    """Wilson's score interval of a proportion; ``n`` is at least 1.

    It keeps its level near 0 and 1, where rates of refusal lie and the normal interval shrinks to a point.
    """
    interval = scipy.stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe_interval(before: float, old: Interval, after: float, new: Interval) -> Interval:
    """95 % interval of ``after - before`` for independent samples, from the 95 % interval of each.

    Method 10 of R. G. Newcombe, Interval estimation for the difference between independent proportions, Statistics in
    Medicine 17 (1998) 873-890. It squares and adds the distances to the bounds, so it takes any two estimates that have
    intervals, a concentration too; statsmodels has it for counts only.
    """
    change = after - before
    return change - math.hypot(after - new[0], old[1] - before), change + math.hypot(new[1] - after, before - old[0])


def newcombe_paired_interval(both: int, first: int, second: int, neither: int) -> Interval:
    """95 % interval of the rate of the first outcome minus that of the second, over the same pairs.

    Method 10 of R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on
    paired data, Statistics in Medicine 17 (1998) 2635-2650. It squares and adds the distances to the Wilson bounds,
    with the correlation phi, whose numerator is pulled towards 0 by n/2 where it is positive. Neither scipy nor
    statsmodels has it. The arguments count pairs: with both outcomes, the first or second alone, neither.
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

    def square_and_add(distance_1: float, distance_2: float) -> float:
        # The form is positive for |phi| <= 1; rounding can leave it below 0 where it is 0 exactly.
        return math.sqrt(max(distance_1**2 - 2 * phi * distance_1 * distance_2 + distance_2**2, 0.0))

    low = change - square_and_add(rate_1 - low_1, high_2 - rate_2)
    high = change + square_and_add(high_1 - rate_1, rate_2 - low_2)
    return max(low, -1.0), min(high, 1.0)


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

    Student's interval draws no random numbers and costs nothing for each of a thousand heads, which a bootstrap does.
    Scores are skewed to the right, so with few prompts (below about 30) the upper bound is too low.

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
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (n - 1)
    standard_error = math.sqrt(variance / n)
    half_width = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * standard_error
    return Mean(mean, n, (mean - half_width, mean + half_width), standard_error)


def bootstrap_interval(values: FloatArray, seed: int = 0, least: float = -1.0, most: float = 1.0) -> Interval:
    """95 % percentile bootstrap interval of the mean of values [n_prompts], one a prompt.

    Prompts are drawn, not answers: several answers to one prompt are not independent. Where all values are equal,
    resampling would give a point, and claim a certainty that n values do not have. There the interval is the exact
    bound (Clopper and Pearson) on the share of other values that n draws can have missed, all taken to lie at one end.

    ``least`` and ``most`` are the lowest and the highest value that can occur.
    """
    n, (low_tail, high_tail) = len(values), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    if np.ptp(values) < 1e-12:
        value, missed = float(values[0]), 1 - low_tail ** (1 / n)
        return value - missed * (value - least), value + missed * (most - value)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
    low, high = np.quantile(draws @ values, [low_tail, high_tail]).tolist()
    return low, high


def most_in_population(n_population: int, n_sampled: int, n_found: int) -> int:
    """Upper bound, 95 %, on the members of a population that have a property, from a sample without replacement.

    The largest number K for which finding ``n_found`` or fewer in the sample is not rarer than 5 % (hypergeometric,
    one-sided, exact). Example: 64 of 992 sampled and none found leave up to 43.
    """
    if not 0 <= n_found <= n_sampled <= n_population:
        raise InputError(f"{n_found} found of {n_sampled} sampled of {n_population} cannot be")
    # The chance of so few falls as K grows, so bisection finds K.
    low, high = n_found, n_population - (n_sampled - n_found)
    while low < high:
        middle = (low + high + 1) // 2
        if scipy.stats.hypergeom.cdf(n_found, n_population, middle, n_sampled) > 1 - CONFIDENCE:
            low = middle
        else:
            high = middle - 1
    return int(low)

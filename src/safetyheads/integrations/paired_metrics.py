"""Metrics of one model against another on the same samples. Owns pairing, its tests and their names; knows no lm-eval.

A metric of zeros and ones is compared as rates are (exact McNemar, Newcombe); any other number by the mean of its
differences. Where the metric is no mean over samples (a perplexity, an F1 over all), nothing can be paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from safetyheads.errors import InputError
from safetyheads.stats.intervals import Interval, Rate, mean_with_interval
from safetyheads.stats.testing import holm, paired_difference

Values: TypeAlias = Mapping[str, float]
"""A metric's value on each sample, by what identifies the sample."""

McNEMAR, T_TEST = "exact McNemar", "paired t"
"""Names of the tests."""
# A mean is summed in another order elsewhere, which moves its last bits.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class MetricChange:
    """How a metric changed on the same samples; None where that cannot be told."""

    change: float | None
    """After minus before, in the metric's unit."""
    interval: Interval | None
    """95 %: Newcombe's for zeros and ones, else Student's of the mean difference; None for what is no mean."""
    n: int
    """Samples that both have."""
    gained: int | None
    """Samples whose value rose; None where samples have none."""
    lost: int | None
    """Samples whose value fell."""
    p_value: float | None
    """Two-sided, of this comparison alone."""
    test: str | None
    """What ``p_value`` is of."""
    p_holm: float | None = None
    """Adjusted for all comparisons of the evaluation (Holm)."""


@dataclass(frozen=True, slots=True)
class MetricValue:
    """A metric of one model."""

    value: float | None
    """As the harness gives it; None where it is no finite number."""
    interval: Interval | None
    """95 %: Wilson's for zeros and ones, else Student's; None for what is no mean over samples."""
    n: int
    """Samples."""
    unit: str
    """``share`` of samples, ``mean`` over samples, or ``whole``: a number of all samples together."""


def metric_value(aggregate: float | None, values: Values, n: int | None = None) -> MetricValue:
    """A metric with its interval.

    Args:
        aggregate: the harness's own number.
        values: each sample's; none where samples have no number of their own.
        n: samples, where that is not the number of values.
    """
    numbers = list(values.values())
    if not _is_mean(aggregate, numbers):
        return MetricValue(aggregate, None, len(numbers) if n is None else n, "whole")
    if _binary(numbers):
        return MetricValue(aggregate, Rate(round(sum(numbers)), len(numbers)).interval, len(numbers), "share")
    return MetricValue(aggregate, mean_with_interval(numbers).interval, len(numbers), "mean")


def metric_change(before: MetricValue, after: MetricValue, old: Values, new: Values) -> MetricChange:
    """The change of a metric, sample by sample where it is a mean over samples.

    Args:
        before: of the first model.
        after: of the second.
        old: the first model's values.
        new: the second's, of the same samples.

    Raises:
        InputError: the samples are not the same.
    """
    if old.keys() != new.keys():
        raise InputError(f"paired samples differ: {len(old.keys() ^ new.keys())} are in one of the two alone")
    if "whole" in (before.unit, after.unit):
        known = before.value is not None and after.value is not None
        return MetricChange(after.value - before.value if known else None, None, before.n, None, None, None, None)  # type: ignore[operator]
    n = len(old)
    first, second = list(old.values()), [new[sample] for sample in old]
    if _binary(first) and _binary(second):
        found = paired_difference(list(map(bool, first)), list(map(bool, second)))
        return MetricChange(found.change, found.interval, n, found.gained, found.lost, found.p_value, McNEMAR)
    moved = [b - a for a, b in zip(first, second, strict=True)]
    mean = mean_with_interval(moved)
    gained, lost = sum(one > 0 for one in moved), sum(one < 0 for one in moved)
    return MetricChange(mean.mean, mean.interval, n, gained, lost, _t_test(moved), T_TEST)


def with_holm(changes: Sequence[MetricChange]) -> tuple[MetricChange, ...]:
    """The changes with p values adjusted for all that were tested."""
    tested = [one.p_value for one in changes if one.p_value is not None]
    adjusted = iter(holm(tested))
    return tuple(one if one.p_value is None else replace(one, p_holm=next(adjusted)) for one in changes)


def _t_test(differences: Sequence[float]) -> float | None:
    """Two-sided one-sample t test; None where differences do not vary and are not 0, which no t test can judge."""
    from scipy.stats import ttest_1samp

    if not any(differences):
        return 1.0
    if len(differences) < 2 or len(set(differences)) == 1:
        return None
    return float(ttest_1samp(differences, 0.0).pvalue)


def _binary(numbers: Sequence[float]) -> bool:
    return all(number in (0.0, 1.0) for number in numbers)


def _is_mean(aggregate: float | None, numbers: Sequence[float]) -> bool:
    if aggregate is None or not numbers or not all(map(math.isfinite, numbers)):
        return False
    return math.isclose(aggregate, math.fsum(numbers) / len(numbers), rel_tol=_ROUNDING, abs_tol=_ROUNDING)

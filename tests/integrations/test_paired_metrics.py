"""Metrics compared sample by sample: numbers worked out by hand, and what cannot be compared."""

import math

import pytest
from scipy.stats import binomtest, t, ttest_rel

from safetyheads.errors import InputError
from safetyheads.integrations.paired_metrics import MetricChange, metric_change, metric_value, with_holm
from safetyheads.stats.intervals import Rate
from safetyheads.stats.testing import paired_difference


def by_sample(values):
    return {str(number): float(value) for number, value in enumerate(values)}


def changed(before, after):
    old, new = by_sample(before), by_sample(after)
    values = [metric_value(sum(one) / len(one), by_sample(one)) for one in (before, after)]
    return metric_change(*values, old, new)


def test_zeros_and_ones_are_a_share_with_wilsons_interval():
    found = metric_value(0.75, by_sample([1, 1, 1, 0]))
    assert (found.unit, found.n, found.interval) == ("share", 4, Rate(3, 4).interval)


def test_a_share_changes_as_mcnemar_says():
    before, after = [1] * 8 + [0] * 2, [1, 1] + [0] * 6 + [1, 0]
    found = changed(before, after)
    assert (found.gained, found.lost, found.n, found.test) == (1, 6, 10, "exact McNemar")
    assert found.change == pytest.approx(-0.5)
    assert found.p_value == pytest.approx(binomtest(1, 7, 0.5).pvalue)
    assert found.interval == paired_difference(list(map(bool, before)), list(map(bool, after))).interval


def test_other_numbers_change_by_their_mean_difference():
    before, after = [0.5, 1.0, 2.0, 4.0], [0.25, 1.5, 1.0, 2.0]
    found = changed(before, after)
    moved = [-0.25, 0.5, -1.0, -2.0]
    mean = sum(moved) / 4
    error = math.sqrt(sum((one - mean) ** 2 for one in moved) / 3 / 4)
    assert found.change == pytest.approx(mean)
    assert found.interval == pytest.approx((mean - t.ppf(0.975, 3) * error, mean + t.ppf(0.975, 3) * error))
    assert found.p_value == pytest.approx(ttest_rel(after, before).pvalue)
    assert (found.gained, found.lost, found.test) == (1, 3, "paired t")


def test_a_number_of_all_samples_together_has_no_interval_and_no_test():
    old, new = by_sample([-1.0, -2.0]), by_sample([-1.5, -2.5])
    before, after = metric_value(math.exp(1.5), old), metric_value(math.exp(2.0), new)
    assert before.unit == "whole"
    found = metric_change(before, after, old, new)
    assert found.change == pytest.approx(math.exp(2.0) - math.exp(1.5))
    assert (found.interval, found.p_value, found.gained, found.test) == (None, None, None, None)


def test_a_number_that_is_not_finite_has_no_change():
    values = by_sample([-1.0, -2.0])
    missing, there = metric_value(None, values), metric_value(math.exp(1.5), values)
    assert metric_change(missing, there, values, values).change is None


def test_samples_of_other_documents_are_refused():
    old, new = by_sample([1, 0]), {"0": 1.0, "other": 0.0}
    value = metric_value(0.5, old)
    with pytest.raises(InputError, match="paired samples differ: 2"):
        metric_change(value, value, old, new)


@pytest.mark.parametrize(("moved", "p_value"), [(0.0, 1.0), (0.5, None)])
def test_equal_differences_leave_a_t_test_nothing_to_judge(moved, p_value):
    assert changed([0.25, 0.5, 2.0], [0.25 + moved, 0.5 + moved, 2.0 + moved]).p_value == p_value


def test_holm_counts_only_what_was_tested():
    def one(p_value):
        return MetricChange(0.0, None, 4, 0, 0, p_value, None)

    assert [found.p_holm for found in with_holm([one(0.01), one(None), one(0.04)])] == [0.02, None, 0.04]

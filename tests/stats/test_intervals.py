"""Intervals: published figures, properties, and what they become where there is nothing to measure."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from safetyheads.errors import InputError
from safetyheads.stats.intervals import (
    Mean,
    Rate,
    bootstrap_interval,
    clustered_rate,
    mean_with_interval,
    monotone_bounds,
    most_in_population,
    newcombe_interval,
    newcombe_paired_interval,
    skewed_mean,
    wilson_interval,
)

# No deadline: a slow machine is no failure.
quick = settings(deadline=None, max_examples=50)

counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tables = st.tuples(*[st.integers(0, 40)] * 4).filter(any)


@quick
@given(counts)
def test_a_rate_lies_in_its_interval_and_the_interval_in_the_unit_interval(pair):
    count, n = pair
    rate, mirrored = Rate(count, n), Rate(n - count, n)
    low, high = rate.interval
    assert 0 <= low <= rate.rate <= high <= 1
    assert low < high
    assert (low, high) == pytest.approx((1 - mirrored.interval[1], 1 - mirrored.interval[0]))


def test_intervals_are_the_published_ones():
    # E. B. Wilson's interval in Newcombe's comparison (Statistics in Medicine 17 (1998) 857-872): 81/263, 0/20.
    assert Rate(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Rate(0, 20).interval == pytest.approx((0.0, 0.1611), abs=5e-5)
    # Of independent samples, example (a) of the paper: 56/70 - 48/80 is .20 [.0524, .3339].
    before, after = wilson_interval(48, 80), wilson_interval(56, 70)
    assert newcombe_interval(48 / 80, before, 56 / 70, after) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # Of pairs: Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables (2017), chapter 8.
    assert newcombe_paired_interval(59, 6, 16, 80) == pytest.approx((-0.1186, -0.0046), abs=5e-5)


@pytest.mark.parametrize("table", [(10, 10, 10, 10), (11, 8, 9, 8), (30, 20, 0, 0), (0, 7, 0, 43), (0, 0, 0, 50)])
def test_uncorrelated_pairs_have_newcombes_interval_of_independent_samples(table):
    # In each table phi is 0: no association, less of it than the correction takes away, or an empty margin.
    from statsmodels.stats.proportion import confint_proportions_2indep

    both, first, second, _ = table
    n = sum(table)
    expected = confint_proportions_2indep(both + first, n, both + second, n, method="newcomb")
    assert newcombe_paired_interval(*table) == pytest.approx(expected)


@quick
@given(tables)
def test_the_paired_interval_holds_the_change_and_mirrors(table):
    both, first, second, neither = table
    low, high = newcombe_paired_interval(*table)
    change = (first - second) / sum(table)
    assert -1 <= low <= change <= high <= 1
    swapped = newcombe_paired_interval(both, second, first, neither)
    assert (low, high) == pytest.approx((-swapped[1], -swapped[0]))
    complemented = newcombe_paired_interval(neither, first, second, both)
    assert (low, high) == pytest.approx(complemented)


def test_students_interval_by_hand_and_of_few_values():
    # Values 1..5: mean 3, variance 2.5, t(4) at 97.5 % is 2.7764.
    result = mean_with_interval([1, 2, 3, 4, 5])
    assert (result.mean, result.n) == (3, 5)
    assert result.standard_error == pytest.approx(math.sqrt(0.5))
    assert result.interval == pytest.approx((3 - 2.7764 * math.sqrt(0.5), 3 + 2.7764 * math.sqrt(0.5)), abs=1e-4)
    assert mean_with_interval([]) == Mean(None, 0, None, None)
    assert mean_with_interval([2.5]) == Mean(2.5, 1, None, None)
    assert mean_with_interval([2.5, 2.5]) == Mean(2.5, 2, (2.5, 2.5), 0.0)
    with pytest.raises(InputError, match="finite"):
        mean_with_interval([1.0, math.nan])


def test_a_bootstrap_covers_as_it_says_and_is_as_wide_as_students_where_that_is_right():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval((generator.random(60) < 0.3).astype(float), seed=seed)
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 200  # 95 % of 200, with room for its own spread
    values = generator.random(400)
    assert bootstrap_interval(values) == pytest.approx(mean_with_interval(values.tolist()).interval, abs=0.003)


def test_equal_values_are_no_certainty():
    low, high = bootstrap_interval(np.zeros(48), least=0.0)
    assert low == 0.0
    # Clopper and Pearson's upper bound for 0 of 48.
    assert high == pytest.approx(scipy.stats.beta.ppf(0.975, 1, 48))
    assert bootstrap_interval(np.ones(48), least=0.0) == pytest.approx((1 - high, 1.0))
    # By default values lie between -1 and 1, as gains do.
    for value in (1.0, -1.0, 0.0):
        expected = value - high * (value + 1), value + high * (1 - value)
        assert bootstrap_interval(np.full(48, value)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("n_population", "n_sampled", "n_found"), [(992, 64, 0), (24, 8, 0), (30, 12, 3), (9, 9, 2), (9, 0, 0), (0, 0, 0)]
)
def test_the_bound_on_a_population_is_the_last_that_the_sample_does_not_refute(n_population, n_sampled, n_found):
    bound = most_in_population(n_population, n_sampled, n_found)

    def chance(members):
        """Of finding so few or fewer, counted out."""
        ways = sum(
            math.comb(members, found) * math.comb(n_population - members, n_sampled - found)
            for found in range(n_found + 1)
        )
        return ways / math.comb(n_population, n_sampled)

    assert chance(bound) > 0.05
    assert bound == n_population - n_sampled + n_found or chance(bound + 1) <= 0.05


def test_large_clusters_count_for_less():
    # One cluster of 8 and 4 prompts alone: Kish's number is 12^2 / (8^2 + 4) = 2.1, not the 5 clusters.
    clusters = [0] * 8 + [1, 2, 3, 4]
    assert clustered_rate([[1.0]] * 12, clusters)[0] < clustered_rate([[1.0]] * 5)[0]
    assert clustered_rate([[1.0]] * 12, [at // 3 for at in range(12)]) == clustered_rate([[1.0]] * 4)


@pytest.mark.parametrize("sizes", [[1] * 20, [9, 4, 1, 1, 1, 1, 2, 2], [30, 6, 5], [12], [2] * 9 + [7]])
def test_more_losses_never_give_lower_bounds(sizes):
    clusters, generator = np.repeat(np.arange(len(sizes)), sizes), np.random.default_rng(len(sizes))
    fell = 0
    # Near-duplicates one cluster after the other, as they would be lost, and prompts in any order.
    for order in (range(len(clusters)), *(generator.permutation(len(clusters)) for _ in range(4))):
        lost, before, highest = np.zeros(len(clusters)), (0.0, 0.0), 0.0
        for at in order:
            low, high = monotone_bounds(lost, clusters, 0.9)[0]
            own = clustered_rate(lost, clusters, 0.9)
            assert low >= before[0] - 1e-12
            assert high >= before[1] - 1e-12
            # Never narrower than the interval that it is made of, and alike where nothing and all is lost.
            assert low <= own[0] + 1e-12
            assert high >= own[1] - 1e-12
            fell, highest = fell + (own[1] < highest - 1e-12), max(highest, own[1])
            before, lost[at] = (low, high), 1.0
    assert monotone_bounds(lost, clusters, 0.9)[0] == pytest.approx(clustered_rate(lost, clusters, 0.9))
    # The interval that it is made of does fall where clusters are of many sizes.
    assert fell or len(set(sizes)) == 1


def test_a_rate_by_prompt_is_exact_at_0_and_n_and_between_that_of_prompts_and_of_answers():
    for count in (0, 24):
        outcomes = np.full((24, 5), count / 24)
        exact = binomtest(count, 24).proportion_ci(0.95, method="exact")
        assert clustered_rate(outcomes) == pytest.approx((exact.low, exact.high))
    alike = np.repeat(np.arange(24)[:, None] < 6, 5, axis=1).astype(float)
    exact = binomtest(6, 24).proportion_ci(0.95, method="exact")
    # Five equal answers are one.
    assert clustered_rate(alike) == pytest.approx((exact.low, exact.high))
    even = np.zeros((24, 4))
    even[:, 0] = 1
    exact = binomtest(24, 96).proportion_ci(0.95, method="exact")
    # The same rate in every prompt: as many as there are answers.
    assert clustered_rate(even) == pytest.approx((exact.low, exact.high))


def test_unscored_answers_and_clusters_of_prompts():
    outcomes = np.array([[1.0, np.nan], [0, 0], [np.nan, np.nan], [1, 1]])
    low, high = clustered_rate(outcomes)
    assert low < 3 / 5 < high
    assert clustered_rate(np.delete(outcomes, 2, axis=0)) == (low, high)
    with pytest.raises(InputError, match="an answer with a verdict"):
        clustered_rate(np.full((2, 2), np.nan))
    single = (np.arange(40) < 10).astype(float)[:, None]
    together = clustered_rate(single, clusters=[at // 2 for at in range(40)])
    assert np.ptp(together) > np.ptp(clustered_rate(single))
    assert clustered_rate(single, clusters=range(40)) == clustered_rate(single)


def test_a_skewed_mean_has_no_interval_and_its_median_has_order_statistics():
    found = skewed_mean([*range(1, 24), 1000.0])
    assert (found.mean, found.n, found.interval) == (pytest.approx(1276 / 24), 24, None)
    # Of 24, fewer than 7 lie on one side of the median with a chance of .0113, fewer than 8 with .032.
    assert (found.median, found.median_interval) == (12.5, (7.0, 18.0))
    assert skewed_mean([1.0] * 5).median_interval is None  # 2 * .5**5 is above .05
    assert skewed_mean([2.0] * 6).median_interval == (2.0, 2.0)
    assert skewed_mean([]) == Mean(None, 0, None, None)


def test_each_prompt_twice_bounds_no_more_than_once():
    twice, clusters = np.repeat([*range(1, 24), 1000.0], 2), np.repeat(range(24), 2).tolist()
    assert skewed_mean(twice, clusters).median_interval == (7.0, 18.0)
    assert np.ptp(skewed_mean(twice).median_interval) < 11
    assert skewed_mean(twice[::2], range(24)) == skewed_mean(twice[::2])
    for values in (np.random.default_rng(0).normal(size=24), np.zeros(24)):
        joined = bootstrap_interval(np.repeat(values, 2), clusters)
        assert joined == pytest.approx(bootstrap_interval(values))
        assert np.ptp(bootstrap_interval(np.repeat(values, 2))) < 0.85 * np.ptp(joined)


def test_clusters_of_equal_means_are_no_certainty():
    # Every resample of clusters has the same mean, as where all values are equal.
    for values, clusters in (([0.0, 1.0, 0.0], [0, 0, 0]), ([0.0, 1.0, 0.0, 1.0], [0, 0, 1, 1])):
        low, high = bootstrap_interval(np.array(values), clusters)
        assert low < np.mean(values) - 0.3
        assert high > np.mean(values) + 0.3

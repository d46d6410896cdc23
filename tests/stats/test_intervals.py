import json
import math
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.stats.intervals import (
    Mean,
    Rate,
    benjamini_hochberg,
    bootstrap_intervals,
    exact_mcnemar,
    holm,
    mean_with_interval,
    most_in_population,
    newcombe_paired_interval,
    paired_change,
    paired_difference,
    random_p_value,
    smallest_detectable_change,
)

# A slow machine is no failure, and examples are few because the whole unit suite runs before each change.
quick = settings(deadline=None, max_examples=50)

counts = st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
tables = st.tuples(*[st.integers(0, 40)] * 4).filter(any)


@quick
@given(counts)
def test_a_rate_lies_in_its_interval_and_the_interval_in_the_unit_interval(pair):
    count, n = pair
    rate = Rate(count, n)
    if n == 0:
        assert rate.rate is None
        assert rate.interval is None
        return
    low, high = rate.interval
    assert 0 <= low <= rate.rate <= high <= 1
    assert low < high
    mirrored = Rate(n - count, n).interval
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_wilsons_interval_is_the_published_one():
    # E. B. Wilson's interval in Newcombe's comparison (Statistics in Medicine 17 (1998) 857-872): 81/263, 0/20.
    assert Rate(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Rate(0, 20).interval == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_results_are_valid_json_with_the_interval_in_them():
    written = json.loads(json.dumps(asdict(Rate(1, 2, 3)), allow_nan=False))
    assert written["rate"] == 0.5
    assert written["unscored"] == 3
    assert len(written["interval"]) == 2
    for empty in (Rate(0, 0), paired_difference([], []), mean_with_interval([]), mean_with_interval([2.0])):
        json.dumps(asdict(empty), allow_nan=False)


@pytest.mark.parametrize("numbers", [(3, 2, 0), (-1, 2, 0), (0, 0, -1), (0, -1, 0)])
def test_impossible_rates_are_refused(numbers):
    with pytest.raises(InputError, match="cannot be"):
        Rate(*numbers)


def test_a_rate_prints_with_n_and_interval():
    assert str(Rate(72, 100)) == "0.72 [0.63, 0.80] (72/100)"
    assert str(Rate(0, 0, 4)) == "no scored answers"


def test_the_paired_interval_is_the_published_one():
    # Fagerland, Lydersen, Laake, Statistical Analysis of Contingency Tables (2017), chapter 8: 59, 6, 16, 80.
    assert newcombe_paired_interval(59, 6, 16, 80) == pytest.approx((-0.1186, -0.0046), abs=5e-5)


@pytest.mark.parametrize("table", [(10, 10, 10, 10), (11, 8, 9, 8), (30, 20, 0, 0), (0, 7, 0, 43), (0, 0, 0, 50)])
def test_uncorrelated_pairs_have_newcombes_interval_of_independent_samples(table):
    # In each table phi is 0: no association, less of it than the correction takes away, or an empty margin.
    from statsmodels.stats.proportion import confint_proportions_2indep

    both, first, second, _ = table
    n = sum(table)
    expected = confint_proportions_2indep(both + first, n, both + second, n, method="newcomb")
    assert newcombe_paired_interval(*table) == pytest.approx(expected)


def test_correlation_narrows_the_paired_interval_and_its_opposite_widens_it():
    # Both rates are 0.6 and 0.4 of 50 in each table; only who changed differs.
    widths = [high - low for low, high in (newcombe_paired_interval(*t) for t in TABLES_BY_CORRELATION)]
    assert widths == sorted(widths)
    assert len(set(widths)) == 3


# Most pairs keep their outcome; none in particular does; most change it.
TABLES_BY_CORRELATION = [(20, 10, 0, 20), (12, 18, 8, 12), (0, 30, 20, 0)]


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


def test_the_paired_interval_covers_the_true_change():
    # 50 pairs as in an audit: before mostly False, after mostly True; and a case of no change at all.
    generator = np.random.default_rng(0)
    for cells in ([0.03, 0.60, 0.01, 0.36], [0.25, 0.15, 0.15, 0.45], [0.0, 0.05, 0.0, 0.95]):
        true_change = cells[1] - cells[2]
        drawn = generator.multinomial(50, cells, size=800)
        tables, repeats = np.unique(drawn, axis=0, return_counts=True)
        bounds = np.array([newcombe_paired_interval(*map(int, table)) for table in tables])
        covered = (bounds[:, 0] <= true_change) & (true_change <= bounds[:, 1])
        # 800 draws at 0.95 have a standard error of 0.008.
        assert (repeats * covered).sum() / repeats.sum() > 0.925


def mcnemar_by_enumeration(gained, lost):
    """All ways the changed pairs could have gone, each as likely; those no likelier than what was seen count."""
    changed = gained + lost
    ways = [sum(way) for way in product((0, 1), repeat=changed)]
    weights = {k: ways.count(k) for k in range(changed + 1)}
    return sum(weight for weight in weights.values() if weight <= weights[gained]) / 2**changed


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (6, 0), (0, 6), (7, 2), (4, 4), (1, 9)])
def test_mcnemar_is_the_exact_sum(gained, lost):
    assert exact_mcnemar(gained, lost) == pytest.approx(mcnemar_by_enumeration(gained, lost))


def test_a_paired_difference_by_hand():
    before = [True, False, False, False, False, False, False, True]
    after = [True, True, True, True, True, True, False, False]
    result = paired_difference(before, after)
    assert (result.n, result.gained, result.lost) == (8, 5, 1)
    assert result.change == 0.5
    assert result.p_value == pytest.approx(2 * (1 + 6) / 2**6)
    assert result.interval == newcombe_paired_interval(1, 5, 1, 1)


@quick
@given(outcomes)
def test_a_paired_difference_agrees_with_the_rates(pairs):
    before, after = zip(*pairs, strict=True)
    result = paired_difference(before, after)
    assert result.change == pytest.approx(Rate(sum(after), len(after)).rate - Rate(sum(before), len(before)).rate)
    assert result.interval[0] <= result.change <= result.interval[1]


def test_pairs_must_be_aligned():
    with pytest.raises(InputError, match="2 before, 1 after"):
        paired_difference([True, False], [True])


def test_no_pairs_have_no_change():
    result = paired_difference([], [])
    assert (result.change, result.interval, result.p_value, result.n) == (None, None, None, 0)


def test_students_interval_by_hand():
    # Values 1..5: mean 3, variance 2.5, t(4) at 97.5 % is 2.7764.
    result = mean_with_interval([1, 2, 3, 4, 5])
    assert (result.mean, result.n) == (3, 5)
    assert result.standard_error == pytest.approx(math.sqrt(0.5))
    assert result.interval == pytest.approx((3 - 2.7764 * math.sqrt(0.5), 3 + 2.7764 * math.sqrt(0.5)), abs=1e-4)


def test_few_values_have_no_interval():
    assert mean_with_interval([]) == Mean(None, 0, None, None)
    assert mean_with_interval([2.5]) == Mean(2.5, 1, None, None)
    assert mean_with_interval([2.5, 2.5]) == Mean(2.5, 2, (2.5, 2.5), 0.0)
    with pytest.raises(InputError, match="finite"):
        mean_with_interval([1.0, math.nan])


@quick
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_the_step_down_of_the_definition(p_values):
    expected, running = {}, 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        expected[index] = running
    assert holm(p_values) == pytest.approx([expected[index] for index in range(len(p_values))])


def test_holm_refuses_what_is_no_p_value():
    with pytest.raises(InputError, match="between 0 and 1"):
        holm([0.5, math.nan])


@quick
@given(st.integers(0, 80), st.sampled_from([0.2, 0.05, 0.01]), st.sampled_from([1, 3, 32, 1024]))
def test_the_smallest_detectable_change_is_the_first_that_mcnemar_finds(n, alpha, tests):
    found = [k for k in range(1, n + 1) if exact_mcnemar(k, 0) <= alpha / tests]
    assert smallest_detectable_change(n, alpha, tests) == (found[0] / n if found else None)


def test_the_smallest_detectable_change_by_hand():
    assert smallest_detectable_change(50) == 6 / 50
    assert smallest_detectable_change(5) is None
    assert smallest_detectable_change(48, tests=32) == 11 / 48
    for bad in ((-1, 0.05, 1), (10, 0.0, 1), (10, 1.0, 1), (10, 0.05, 0)):
        with pytest.raises(InputError, match="no detectable change"):
            smallest_detectable_change(*bad)


def test_the_observed_group_is_one_of_the_draws():
    assert random_p_value(0.7, [0.1] * 20) == 1 / 21
    assert random_p_value(0.1, [0.1, 0.0, 0.2]) == 3 / 4
    assert random_p_value(0.1, []) == 1.0


@pytest.mark.parametrize(("n_population", "n_sampled", "n_found"), [(992, 64, 0), (24, 8, 0), (30, 12, 3), (9, 9, 2)])
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


def test_bounds_known_by_hand():
    assert most_in_population(100, 0, 0) == 100
    assert most_in_population(10, 10, 3) == 3
    assert most_in_population(992, 64, 0) == 43  # 44 would hide from the sample with a chance of 4.97 %
    with pytest.raises(InputError, match="cannot be"):
        most_in_population(5, 6, 0)


# Several answers a prompt


def test_benjamini_hochberg_is_the_step_up_rule():
    p_values = [0.001, 0.02, 0.03, 0.4, 0.9]
    expected = [min(p * 5 / rank for rank, p in enumerate(p_values, 1) if rank >= own) for own in range(1, 6)]
    assert benjamini_hochberg(p_values) == pytest.approx(expected)
    assert benjamini_hochberg(p_values[::-1]) == pytest.approx(expected[::-1])
    assert benjamini_hochberg([]) == ()
    with pytest.raises(InputError):
        benjamini_hochberg([2.0])


def test_a_bootstrap_draws_prompts_and_covers_as_it_says():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        values = (generator.random((60, 1)) < 0.3).astype(float)
        low, high = bootstrap_intervals(values, seed)[0]
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 200  # 95 % of 200, with room for its own spread


def test_equal_values_are_no_certainty():
    low, high = bootstrap_intervals(np.zeros((48, 1)), least=0.0)[0]
    assert low == 0.0
    # Clopper and Pearson's upper bound for 0 of 48.
    assert high == pytest.approx(scipy.stats.beta.ppf(0.975, 1, 48))
    assert bootstrap_intervals(np.ones((48, 1)), least=0.0)[0].tolist() == pytest.approx([1 - high, 1.0])


def test_a_bootstrap_of_many_columns_is_that_of_each_alone():
    values = np.random.default_rng(0).random((20, 3))
    together = bootstrap_intervals(values, seed=4)
    for column in range(3):
        assert together[column] == pytest.approx(bootstrap_intervals(values[:, [column]], seed=4)[0])


def test_one_answer_a_prompt_is_mcnemars_test():
    before, after = np.array([[0.0], [0], [1], [1], [0]]), np.array([[1.0], [1], [1], [0], [0]])
    assert paired_change(before, after) == paired_difference([0, 0, 1, 1, 0], [1, 1, 1, 0, 0])


def test_several_answers_a_prompt_are_one_observation():
    before, after = np.zeros((8, 3)), np.zeros((8, 3))
    after[:6, :2] = 1  # six prompts rise by two thirds each
    found = paired_change(before, after)
    assert (found.n, found.gained, found.lost) == (8, 6, 0)
    assert found.change == pytest.approx(0.5)
    assert found.p_value == exact_mcnemar(6, 0)
    assert 0.2 < found.interval[0] < 0.5 < found.interval[1] <= 2 / 3


def test_unscored_answers_leave_the_pair():
    nan = float("nan")
    before, after = np.array([[0.0, 0], [nan, nan], [0, nan]]), np.array([[1.0, 1], [1, 1], [nan, 1]])
    found = paired_change(before, after)
    assert (found.n, found.gained) == (2, 2)
    assert paired_change(np.full((2, 2), nan), np.zeros((2, 2))).p_value is None
    assert paired_change(np.array([[nan], [0.0]]), np.array([[1.0], [1]])).n == 1

"""Paired changes and tests: by hand, by enumeration, and by their definitions."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.stats.intervals import newcombe_paired_interval
from safetyheads.stats.testing import (
    benjamini_hochberg,
    equivalent,
    equivalent_means,
    exact_mcnemar,
    holm,
    holm_of_tests,
    least_attainable_p,
    least_changed,
    log_odds_synergy,
    paired_difference,
    random_p_value,
    sign_flip_p,
    tarone,
)

# No deadline: a slow machine is no failure.
quick = settings(deadline=None, max_examples=50)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (6, 0), (0, 6), (7, 2), (4, 4), (1, 9)])
def test_mcnemar_is_the_exact_sum(gained, lost):
    # All ways the changed pairs could have gone, each as likely; those no likelier than what was seen count.
    ways = Counter(sum(way) for way in product((0, 1), repeat=gained + lost))
    as_rare = sum(weight for weight in ways.values() if weight <= ways[gained])
    assert exact_mcnemar(gained, lost) == pytest.approx(as_rare / 2 ** (gained + lost))


def test_a_paired_difference_by_hand():
    result = paired_difference([1, 0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0])
    assert (result.n, result.gained, result.lost, result.change) == (8, 5, 1, 0.5)
    assert result.p_value == pytest.approx(2 * (1 + 6) / 2**6)
    assert result.interval == newcombe_paired_interval(1, 5, 1, 1)
    with pytest.raises(InputError, match="2 before, 1 after"):
        paired_difference([True, False], [True])


def test_several_answers_a_prompt_are_one_observation():
    before, after = np.zeros((8, 3)), np.zeros((8, 3))
    after[:6, :2] = 1  # six prompts rise by two thirds each
    found = paired_difference(before, after)
    assert (found.n, found.gained, found.lost) == (8, 6, 0)
    assert found.change == pytest.approx(0.5)
    assert found.p_value == exact_mcnemar(6, 0)
    assert 0 < found.interval[0] < 0.5 < found.interval[1] < 1
    assert paired_difference(before[:, :1], after) == found  # the sides may differ in their number of answers


def test_near_duplicates_are_one_observation_of_a_change():
    # Six prompts gain, three of which are one cluster: four moves, of which the large one is three steps.
    clusters = [0, 0, 0, 1, 2, 3, 4, 5]
    found = paired_difference([0.0] * 8, [1.0] * 6 + [0] * 2, clusters)
    assert (found.change, found.n, found.gained) == (6 / 8, 8, 6)
    assert found.p_value == sign_flip_p([3, 1, 1, 1]) == 2 / 2**4 > exact_mcnemar(6, 0)
    # One of a prompt and seven twins says no more than one of two prompts.
    assert paired_difference([0.0] * 8, [1.0] * 8, [0] * 7 + [1]).p_value == 0.5
    apart = paired_difference([0.0, 1] * 4, [1.0, 1] * 4)
    alone = paired_difference([0.0, 1] * 4, [1.0, 1] * 4, range(8))
    assert (alone.p_value, alone.change) == (apart.p_value, apart.change)
    # An unscored prompt takes its cluster's number with it.
    assert paired_difference([0.0, np.nan, 0], [1.0, 1, 1], [0, 0, 1]).p_value == 0.5


def test_unscored_answers_leave_the_pair():
    nan = float("nan")
    before, after = np.array([[0.0, 0], [nan, nan], [0, nan]]), np.array([[1.0, 1], [1, 1], [nan, 1]])
    found = paired_difference(before, after)
    assert (found.n, found.gained) == (2, 2)
    for empty in (paired_difference(np.full((2, 2), nan), np.zeros((2, 2))), paired_difference([], [])):
        assert (empty.change, empty.interval, empty.p_value, empty.n) == (None, None, None, 0)
    assert paired_difference([nan, 0.0], [1.0, 1]).n == 1


def test_the_sign_flip_test_is_the_share_of_all_signs_and_follows_the_mean():
    moved = [3, 2, 2, -1, 5, 0, 1]
    sizes = [abs(move) for move in moved]
    sums = [
        abs(sum(sign * size for sign, size in zip(signs, sizes, strict=True))) for signs in product((1, -1), repeat=7)
    ]
    assert sign_flip_p(moved) == pytest.approx(np.mean([total >= sum(moved) for total in sums]))
    assert sign_flip_p([2, 2, -2, 2, 2, 2, 0, 2]) == exact_mcnemar(6, 1)
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == sign_flip_p([1, -1]) == 1.0
    assert sign_flip_p([1] * 2000) == exact_mcnemar(2000, 0)


def test_prompts_with_many_different_numbers_of_answers_need_no_more_memory():
    answers = np.full((10, 39), 1.0)
    for prompt, n in enumerate(range(30, 40)):
        answers[prompt, n:] = np.nan
    # The least common multiple of 30 to 39 is 5e11; all changes are of one size, so the test is McNemar's.
    assert paired_difference(np.zeros((10, 39)), answers).p_value == exact_mcnemar(10, 0)


def test_the_test_and_the_mean_change_cannot_point_different_ways():
    # Six prompts lose a fifth each, two gain all: the sign test saw six against two, the mean change is up.
    before, after = np.zeros((8, 5)), np.zeros((8, 5))
    before[:6, 0] = 1
    after[6:] = 1
    found = paired_difference(before, after)
    assert (found.gained, found.lost) == (2, 6)
    assert found.change == pytest.approx((2 - 6 / 5) / 8)
    assert found.p_value > 0.5
    generator = np.random.default_rng(0)
    for _ in range(50):
        sides = [(generator.random((12, 5)) < rate).astype(float) for rate in generator.random(2)]
        sides[0][generator.random((12, 5)) < 0.1] = np.nan
        found = paired_difference(*sides)
        assert (found.p_value == 1.0) or found.change != 0
        assert found.p_value >= found.least_p * (1 - 1e-9)


def test_tarone_by_hand_and_against_holm():
    # Three tests of 6, 2 and 1 changed pairs: only the first can be below .05, so it is not multiplied.
    p_values, least = [exact_mcnemar(6, 0), exact_mcnemar(2, 0), 1.0], [least_attainable_p(d) for d in (6, 2, 1)]
    assert tarone(p_values, least) == (p_values[0], 2 / 4 * 1, 1.0)
    assert holm(p_values)[0] == 3 * p_values[0]
    # Where every test can be as small, it is Holm's.
    p_values = [0.03, 0.001, 0.02, 0.9]
    assert tarone(p_values, [0.0] * 4) == pytest.approx(holm(p_values))
    assert tarone([], []) == ()
    for bad in (([0.5], [0.6]), ([1.5], [0.0]), ([0.5, 0.5], [0.0])):
        with pytest.raises(InputError, match="p values lie"):
            tarone(*bad)


@quick
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=30))
def test_tarone_never_rejects_less_than_holm(changed):
    p_values = [exact_mcnemar(*pair) for pair in changed]
    adjusted = tarone(p_values, [least_attainable_p(sum(pair)) for pair in changed])
    assert all(
        p <= low + 1e-12 and low <= high + 1e-12
        for p, low, high in zip(p_values, adjusted, holm(p_values), strict=True)
    )


def test_margins_need_bounds_and_not_estimates():
    few, many = np.arange(40) < 2, np.arange(400) < 20
    assert not equivalent(np.zeros(40), few, 0.1)  # within the margin, and not shown to be
    assert equivalent(np.zeros(400), many, 0.1)
    assert equivalent(many, np.zeros(400), 0.1)
    assert equivalent(np.zeros(100), np.zeros(100), 0.1)
    assert not equivalent(np.zeros(10), np.zeros(10), 0.1)
    assert not equivalent(np.zeros(400), np.arange(400) < 80, 0.1)
    assert equivalent(np.zeros((100, 3)), np.zeros((100, 3)), 0.1)
    assert not equivalent([], [], 0.1)
    assert equivalent_means([0.001, -0.001, 0.0005] * 5, 0.01)
    assert not equivalent_means([0.1, -0.1] * 5, 0.01)
    assert not equivalent_means([0.0], 0.01)


def test_each_prompt_twice_shows_no_more_than_once():
    twins = np.repeat(range(24), 2).tolist()
    assert equivalent(np.zeros(48), np.zeros(48), 0.1)
    assert not equivalent(np.zeros(48), np.zeros(48), 0.1, twins)
    changes, own = np.repeat([0.1, -0.1] * 5, 2), np.repeat(range(10), 2).tolist()
    # Half widths .040 of 20 prompts, .061 of 10.
    assert equivalent_means(changes, 0.05)
    assert [equivalent_means(changes, margin, own) for margin in (0.0610, 0.0612)] == [False, True]
    assert [equivalent_means(changes[::2], margin) for margin in (0.0610, 0.0612)] == [False, True]
    sides = counted(20, 6, 5, 2, n=24)
    once, twice = log_odds_synergy(*sides), [np.repeat(side, 2) for side in sides]
    joined, apart = log_odds_synergy(*twice, clusters=twins), log_odds_synergy(*twice)
    assert joined.value == pytest.approx(once.value, abs=0.05)
    assert np.ptp(joined.interval) == pytest.approx(np.ptp(once.interval), rel=0.1)
    assert np.ptp(apart.interval) < 0.8 * np.ptp(once.interval)
    assert log_odds_synergy(*sides, clusters=range(24)) == once


@pytest.mark.parametrize("p_values", [[0.03, 0.001, 0.02, 0.9], [0.01, 0.01, 0.01], [1.0], [0.0, 0.6, 0.4, 0.6]])
def test_holm_is_the_step_down_of_the_definition(p_values):
    expected, running = {}, 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        expected[index] = running
    assert holm(p_values) == pytest.approx([expected[index] for index in range(len(p_values))])


def test_what_was_not_tested_counts_for_none_in_holm():
    # Of two tests the smaller p is doubled, the larger stays.
    assert holm_of_tests([None, 0.2, None, 0.01]) == [None, 0.2, None, 0.02]
    assert holm_of_tests([]) == []
    assert holm_of_tests(iter([None])) == [None]
    with pytest.raises(InputError, match="between 0 and 1"):
        holm_of_tests([None, 1.5])


def test_benjamini_hochberg_is_the_step_up_rule():
    p_values = [0.001, 0.02, 0.03, 0.4, 0.9]
    expected = [min(p * 5 / rank for rank, p in enumerate(p_values, 1) if rank >= own) for own in range(1, 6)]
    assert benjamini_hochberg(p_values) == pytest.approx(expected)
    assert benjamini_hochberg(p_values[::-1]) == pytest.approx(expected[::-1])
    assert benjamini_hochberg([]) == ()
    for adjust, bad in ((benjamini_hochberg, 2.0), (holm, math.nan)):
        with pytest.raises(InputError, match="between 0 and 1"):
            adjust([0.5, bad])


@pytest.mark.parametrize("alpha", [level / tests for level in (0.2, 0.05, 0.01) for tests in (1, 3, 32, 1024)])
def test_the_fewest_changed_pairs_are_the_first_that_mcnemar_finds(alpha):
    assert least_changed(alpha) == next(k for k in range(1, 81) if exact_mcnemar(k, 0) <= alpha)


def test_the_observed_group_is_one_of_the_draws():
    assert random_p_value(0.7, [0.1] * 20) == 1 / 21
    assert random_p_value(0.1, [0.1, 0.0, 0.2]) == 3 / 4
    assert random_p_value(0.1, []) == 1.0


def counted(*counts, n=48):
    return [np.arange(n) < count for count in counts]


def test_synergy_is_0_where_odds_multiply_and_has_the_sign_of_what_is_beyond():
    # Odds of 1/3 unablated, 1 with either head, 3 with both.
    none = log_odds_synergy(*counted(36, 24, 24, 12))
    assert none.value == pytest.approx(0.0, abs=1e-9)
    assert none.p_value == 1.0
    more, less = log_odds_synergy(*counted(47, 15, 15, 12)), log_odds_synergy(*counted(24, 24, 24, 12))
    assert more.value > 0 > less.value
    assert more.p_value < 0.05
    assert more.interval[0] > 0


def test_two_heads_that_free_everything_alone_say_nothing_of_synergy():
    # By rates they would have a synergy of -1: together they cannot free more than all.
    full = log_odds_synergy(*counted(48, 48, 48, 0))
    assert full.p_value > 0.05
    assert full.interval[0] < 0 < full.interval[1]
    assert full.n == 48
    with pytest.raises(InputError, match="needs a prompt"):
        log_odds_synergy(*[np.zeros(0)] * 4)

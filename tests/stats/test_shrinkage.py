"""Shrunken rates and synergy: by hand and at the edges; their coverage is in tests/bench/test_simulations.py."""

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.stats.shrinkage import log_odds_synergy, shrunken_rates


def test_the_highest_of_many_equal_heads_is_drawn_to_the_others():
    generator = np.random.default_rng(0)
    counts = generator.binomial(24, 0.1, 200)
    shrunken = shrunken_rates(counts.tolist(), [24] * 200)
    highest = int(np.argmax(counts))
    assert counts[highest] / 24 > 0.25
    assert shrunken[highest].rate < 0.18
    assert shrunken[highest].interval[0] <= shrunken[highest].rate <= shrunken[highest].interval[1]


def test_a_head_far_from_all_others_keeps_its_rate_and_order_stays():
    shrunken = shrunken_rates([20, 0, 1, 0, 2, *[0] * 27], [24] * 32)
    assert shrunken[0].rate == pytest.approx(20 / 24, abs=0.06)
    assert shrunken[0].rate > shrunken[4].rate > shrunken[2].rate > shrunken[1].rate


def test_heads_without_answers_and_lists_that_do_not_fit():
    assert shrunken_rates([], []) == ()
    found = shrunken_rates([0, 5, 5], [0, 10, 10])
    assert found[0].interval[1] - found[0].interval[0] > found[1].interval[1] - found[1].interval[0]
    for counts, sizes in (([3], [2]), ([-1], [2]), ([1, 1], [2])):
        with pytest.raises(InputError, match="each count needs a size"):
            shrunken_rates(counts, sizes)


def outcomes(*counts, n=48):
    return [np.arange(n) < count for count in counts]


def test_synergy_is_0_where_odds_multiply_and_has_the_sign_of_what_is_beyond():
    # Odds of 1/3 unablated, 1 with either head, 3 with both.
    none = log_odds_synergy(*outcomes(36, 24, 24, 12))
    assert none.value == pytest.approx(0.0, abs=1e-9)
    assert none.p_value == 1.0
    more, less = log_odds_synergy(*outcomes(47, 15, 15, 12)), log_odds_synergy(*outcomes(24, 24, 24, 12))
    assert more.value > 0 > less.value
    assert more.p_value < 0.05
    assert more.interval[0] > 0


def test_two_heads_that_free_everything_alone_say_nothing_of_synergy():
    # By rates they would have a synergy of -1: together they cannot free more than all.
    full = log_odds_synergy(*outcomes(48, 48, 48, 0))
    assert full.p_value > 0.05
    assert full.interval[0] < 0 < full.interval[1]
    assert full.n == 48
    with pytest.raises(InputError, match="needs a prompt"):
        log_odds_synergy(*[np.zeros(0)] * 4)


def test_the_p_value_is_the_level_at_which_the_interval_reaches_0():
    found = log_odds_synergy(*outcomes(44, 20, 20, 10))
    assert (found.p_value < 0.05) == (found.interval[0] > 0 or found.interval[1] < 0)

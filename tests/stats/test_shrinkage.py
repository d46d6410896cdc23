"""Shrunken rates: by hand and at the edges; their coverage is in tests/bench/test_simulations.py."""

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.stats.shrinkage import shrunken_rates


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

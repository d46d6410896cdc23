"""Power by its definition: by hand, by the binomial, and against a slow count."""

import pytest
from scipy.stats import binom

from safetyheads.errors import InputError
from safetyheads.stats.intervals import one_sided_bounds
from safetyheads.stats.power import needed_for_bound, prompts_needed, smallest_change_with_power


@pytest.mark.parametrize(("n", "tests", "moved"), [(50, 1, 6), (24, 32, 11), (100, 1024, 16)])
def test_the_smallest_change_is_found_in_80_of_100_runs_and_not_its_critical_value(n, tests, moved):
    assert 2 * 0.5**moved <= 0.05 / tests < 2 * 0.5 ** (moved - 1)
    change = smallest_change_with_power(n, tests=tests)
    assert binom.sf(moved - 1, n, change) == pytest.approx(0.8, abs=1e-4)
    assert change > moved / n
    assert binom.sf(moved - 1, n, moved / n) < 0.62  # what was printed before


def test_what_no_number_of_prompts_shows():
    assert smallest_change_with_power(5) is None  # 2 * .5**5 is above .05
    assert smallest_change_with_power(0) is None
    assert smallest_change_with_power(50, p0=0.9) is None  # at most .1 can be gained
    assert smallest_change_with_power(50, p0=1.0, n_seeds=5) is None
    assert prompts_needed(0.2, p0=0.9) is None
    assert prompts_needed(1e-6, tests=1000) is None
    for bad in ({"n": -1}, {"n": 9, "alpha": 0.0}, {"n": 9, "tests": 0}, {"n": 9, "p0": 2.0}):
        with pytest.raises(InputError, match="no power"):
            smallest_change_with_power(**bad)


@pytest.mark.parametrize(("p0", "n_seeds"), [(0.0, 1), (0.2, 1), (0.0, 5), (0.2, 5)])
@pytest.mark.parametrize("tests", [1, 32])
def test_the_prompts_needed_for_a_change_show_it_and_one_less_does_not(p0, n_seeds, tests):
    n = prompts_needed(0.3, p0, tests=tests, n_seeds=n_seeds)
    assert smallest_change_with_power(n, p0, tests=tests, n_seeds=n_seeds) <= 0.3
    fewer = smallest_change_with_power(n - 1, p0, tests=tests, n_seeds=n_seeds)
    assert fewer is None or fewer > 0.3


def test_answers_that_are_drawn_anew_need_more():
    assert smallest_change_with_power(50, 0.2, n_seeds=5) > smallest_change_with_power(50, 0.2)
    assert smallest_change_with_power(50, 0.0, n_seeds=5) == smallest_change_with_power(50)


@pytest.mark.parametrize(("losses", "n"), [(0, 25), (1, 42), (2, 58), (3, 72)])
def test_the_prompts_that_bound_losses(losses, n):
    assert needed_for_bound(losses, 0.1) == n
    assert one_sided_bounds(losses, n)[1] < 0.1 <= one_sided_bounds(losses, n - 1)[1]
    assert one_sided_bounds(losses, n)[0] <= losses / n
    assert one_sided_bounds(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError, match="no number of prompts"):
        needed_for_bound(1, 1.0)

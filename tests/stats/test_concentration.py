"""The concentration: a case by hand, the slow twin, and where there is nothing to measure."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.stats.concentration import RANDOM, VANILLA, SizeOutcome, concentration
from safetyheads.stats.intervals import N_RESAMPLES


def outcomes(groups, random):
    """Outcomes of the sizes 1 to n: groups [n_sizes][n_prompts], random [n_sizes][n_random][n_prompts]."""
    return [SizeOutcome(size, *both) for size, both in enumerate(zip(groups, random, strict=True), start=1)]


def drawn(n_sizes, n_random, n_prompts, seed=0):
    generator = np.random.default_rng(seed)
    groups = generator.random((n_sizes, n_prompts)) < 0.7
    return groups.tolist(), (generator.random((n_sizes, n_random, n_prompts)) < 0.2).tolist()


def slow_value(groups, random, chosen):
    """The definition, in loops, over the prompts ``chosen``."""
    gaps = []
    for size in range(len(groups)):
        asr = sum(groups[size][prompt] for prompt in chosen) / len(chosen)
        others = [sum(control[prompt] for prompt in chosen) / len(chosen) for control in random[size]]
        gaps.append(asr - sum(others) / len(others))
    return sum(gaps) / len(gaps)


def test_a_case_worked_out_by_hand():
    # ASR of the groups 2/4 and 3/4; of random ones (1/4 + 0)/2 and (1/4 + 1/4)/2: gaps 3/8 and 1/2.
    random = [[[1, 0, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 1], [1, 0, 0, 0]]]
    found = concentration(outcomes([[1, 1, 0, 0], [1, 1, 1, 0]], random), [0] * 4)
    assert (found.value, found.n, found.sizes, found.n_random, found.against) == (7 / 16, 4, (1, 2), 2, RANDOM)
    low, high = found.interval
    assert -1 <= low < found.value < high <= 1
    # Without random groups it is against the unablated model; a size without them is left out where others have some.
    found = concentration(outcomes([[1, 1, 0, 1]], [[]]), [1, 0, 0, 0])
    assert (found.value, found.n_random, found.against) == (0.5, 0, VANILLA)
    found = concentration(outcomes([[1, 0], [1, 1]], [[[0, 0]], []]), [0, 0])
    assert (found.value, found.sizes, found.n_random) == (0.5, (1,), 1)


def test_the_quick_path_is_the_slow_one():
    # The same draws of prompts, so all that may differ is the order of sums of some dozens of terms.
    groups, random = drawn(3, 4, 17)
    counts = np.random.default_rng(0).multinomial(17, np.full(17, 1 / 17), size=N_RESAMPLES)
    means = [slow_value(groups, random, np.repeat(range(17), row).tolist()) for row in counts]
    found = concentration(outcomes(groups, random), [0] * 17)
    assert found.value == pytest.approx(slow_value(groups, random, range(17)), abs=1e-12)
    assert found.interval == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)


def test_nothing_is_none():
    for nothing in (concentration(outcomes([[]], [[[]]]), []), concentration([], [0] * 4)):
        assert (nothing.value, nothing.interval) == (None, None)
        json.dumps(asdict(nothing), allow_nan=False)
    one = concentration(outcomes([[1]], [[[0]]]), [0])
    assert (one.value, one.interval, one.n) == (1.0, None, 1)


def test_outcomes_of_other_prompts_are_refused():
    for groups, random in (([[1, 1]], [[[0, 0]]]), ([[1, 1, 1]], [[[0, 0]]])):
        with pytest.raises(InputError, match="3 prompts"):
            concentration(outcomes(groups, random), [0, 0, 0])

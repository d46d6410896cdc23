"""The concentration: a case by hand, the slow twin, what its interval is made of, and where nothing is measured."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from safetyheads.stats.gain_over_random import (
    RANDOM,
    VANILLA,
    SizeOutcome,
    change_interval,
    concentration,
    prompt_gains,
)
from safetyheads.stats.intervals import bootstrap_interval


def outcomes(groups, random):
    """Outcomes of the sizes 1 to n: groups [n_sizes][n_prompts], random [n_sizes][n_random][n_prompts]."""
    return [SizeOutcome(size, *both) for size, both in enumerate(zip(groups, random, strict=True), start=1)]


def drawn(n_sizes, n_random, n_prompts, seed=0):
    generator = np.random.default_rng(seed)
    groups = generator.random((n_sizes, n_prompts)) < 0.7
    # Random groups differ.
    shares = 0.6 * generator.random((n_sizes, n_random, 1))
    return groups.tolist(), (generator.random((n_sizes, n_random, n_prompts)) < shares).tolist()


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


def test_the_value_is_the_definition_in_loops():
    # All that may differ is the order of sums of some dozens of terms.
    groups, random = drawn(3, 4, 17)
    found = concentration(outcomes(groups, random), [0] * 17)
    assert found.value == pytest.approx(slow_value(groups, random, range(17)), abs=1e-12)
    gains, sizes, n_random = prompt_gains(outcomes(groups, random), [0] * 17)
    assert (gains.mean(), sizes, n_random) == (pytest.approx(found.value), (1, 2, 3), 4)


def test_sizes_may_have_other_numbers_of_random_groups():
    # Gaps 1 - 1/4 and 1 - 1/2: where few distinct groups exist, a size has fewer.
    random = [[[1, 0], [0, 0]], [[1, 0], [0, 1], [1, 0]]]
    found = concentration(outcomes([[1, 1], [1, 1]], random), [0, 0])
    assert (found.value, found.sizes, found.n_random) == ((3 / 4 + 1 / 2) / 2, (1, 2), 2)


def test_what_the_interval_is_made_of():
    found = outcomes(*drawn(1, 30, 60))

    def width(outcome, **given):
        low, high = concentration([outcome], [0] * 60, **given).interval
        return high - low

    # Where the random groups are all that exist, only other prompts could move it.
    whole = found[0]._replace(n_possible=30)
    assert width(whole) < width(found[0]._replace(n_possible=60)) < width(found[0])
    # Each prompt three times is no more than each once: the interval is that of the clusters.
    thrice = SizeOutcome(1, np.repeat(found[0].complied, 3), np.repeat(found[0].random, 3, axis=1))
    clusters = np.repeat(np.arange(60), 3).tolist()
    low, high = concentration([thrice], [0] * 180, clusters=clusters).interval
    assert (low, high) == pytest.approx(concentration(found, [0] * 60).interval, abs=1e-9)
    # All freed, none at random: exact bounds of 24 prompts for each curve, .1425, squared and added.
    sure = concentration(outcomes([[1] * 24], [[[0] * 24] * 20]), [0] * 24)
    assert (sure.value, sure.interval) == (1.0, (pytest.approx(1 - np.sqrt(2) * (1 - 0.025 ** (1 / 24))), 1.0))


def test_a_change_has_an_interval_over_prompts_and_random_groups():
    sides = [outcomes(*drawn(1, 20, 100, seed)) for seed in (0, 1)]
    gained = np.subtract(*(prompt_gains(found, [0] * 100)[0] for found in reversed(sides)))
    # All groups that exist leave only the prompts.
    whole = [[found[0]._replace(n_possible=20)] for found in sides]
    assert change_interval(gained, whole) == pytest.approx(bootstrap_interval(gained, least=-2, most=2))
    assert change_interval(gained, whole, [0] * len(gained)) is None
    # One random group says nothing of others; a size without any is in no curve.
    assert change_interval(gained, [sides[0], [sides[1][0]._replace(random=sides[1][0].random[:1])]]) is None
    beside = [[*found, SizeOutcome(2, found[0].complied, [])] for found in sides]
    assert change_interval(gained, beside) == change_interval(gained, sides)
    # Each prompt three times is no more than each once.
    thrice = [[SizeOutcome(1, np.repeat(one.complied, 3), np.repeat(one.random, 3, axis=1))] for (one,) in sides]
    clusters = np.repeat(range(100), 3).tolist()
    assert change_interval(np.repeat(gained, 3), thrice, clusters) == pytest.approx(change_interval(gained, sides))


def test_nothing_is_none():
    for nothing in (concentration(outcomes([[]], [[[]]]), []), concentration([], [0] * 4)):
        assert (nothing.value, nothing.interval) == (None, None)
        json.dumps(asdict(nothing), allow_nan=False)
    one = concentration(outcomes([[1]], [[[0]]]), [0])
    assert (one.value, one.interval, one.n) == (1.0, None, 1)
    # One random group tells nothing of how others differ.
    assert concentration(outcomes([[1, 0]], [[[0, 0]]]), [0, 0]).interval is None

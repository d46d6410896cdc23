"""The concentration: a case by hand, the slow twin, the coverage of its interval, and where nothing is measured."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import scipy

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


def random_effects(generator, n, n_groups, n_sizes, base, gain, between):
    """Outcomes with effects of prompts (sd .7) and of random groups (sd ``between``), and the true concentration."""
    prompt, truth, found = 0.7 * generator.normal(size=n), [], []
    limit = scipy.special.ndtri
    for size in range(1, n_sizes + 1):
        share = base + (1 - base) * gain * size / n_sizes
        complied = generator.normal(size=n) < np.sqrt(1.49) * limit(share) + prompt
        group = between * generator.normal(size=(n_groups, 1))
        noise = generator.normal(size=(n_groups, n))
        random = noise < np.sqrt(1.49 + between**2) * limit(base) + prompt + group
        found.append(SizeOutcome(size, complied.astype(float), random.astype(float)))
        truth.append(share - base)
    return found, float(np.mean(truth))


@pytest.mark.parametrize(
    ("n", "n_groups", "base", "gain", "between", "old"),
    [
        (24, 20, 0.02, 0.0, 0.7, 0.49),
        (24, 20, 0.5, 0.95, 1.5, 0.65),
        (24, 39, 0.15, 0.5, 0.7, 0.91),
        (100, 7, 0.15, 0.95, 1.5, 0.6),
    ],
)
def test_the_interval_covers_over_prompts_and_random_groups(n, n_groups, base, gain, between, old):
    # 200 samples each; bench/LOG.md has 300 each of 135 settings, the lowest coverage .94. A bootstrap over prompts
    # alone, ``old``, leaves the random groups out.
    generator, covered, n_sizes = np.random.default_rng(0), 0, 1 if n_groups == 20 else 2
    for _ in range(200):
        found, truth = random_effects(generator, n, n_groups, n_sizes, base, gain, between)
        low, high = concentration(found, [0] * n).interval
        covered += low - 1e-9 <= truth <= high + 1e-9
    assert covered / 200 >= 0.93 > old


def test_the_interval_of_a_change_covers_over_prompts_and_random_groups():
    generator, covered, apart = np.random.default_rng(4), 0, 0
    for _ in range(100):
        sides = [random_effects(generator, 100, 20, 1, 0.3, gain, 1.0) for gain in (0.5, 0.8)]
        gained = np.subtract(*(prompt_gains(found, [0] * 100)[0] for found, _ in reversed(sides)))
        truth = sides[1][1] - sides[0][1]
        (low, high), prompts = change_interval(gained, [found for found, _ in sides]), bootstrap_interval(gained)
        covered, apart = covered + (low <= truth <= high), apart + (prompts[0] <= truth <= prompts[1])
    assert covered / 100 >= 0.92
    # A bootstrap over prompts alone leaves the random groups out.
    assert apart / 100 < 0.85
    # All groups that exist leave only the prompts.
    whole = [[found[0]._replace(n_possible=20)] for found, _ in sides]
    assert change_interval(gained, whole) == pytest.approx(bootstrap_interval(gained, least=-2, most=2))


def test_what_the_interval_is_made_of():
    generator = np.random.default_rng(1)
    found, _ = random_effects(generator, 60, 30, 1, 0.3, 0.5, 1.5)

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


def test_nothing_is_none():
    for nothing in (concentration(outcomes([[]], [[[]]]), []), concentration([], [0] * 4)):
        assert (nothing.value, nothing.interval) == (None, None)
        json.dumps(asdict(nothing), allow_nan=False)
    one = concentration(outcomes([[1]], [[[0]]]), [0])
    assert (one.value, one.interval, one.n) == (1.0, None, 1)
    # One random group tells nothing of how others differ.
    assert concentration(outcomes([[1, 0]], [[[0, 0]]]), [0, 0]).interval is None

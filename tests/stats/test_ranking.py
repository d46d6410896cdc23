"""Rankings of heads: a toy by hand and loops as slow twins, scipy and the hypergeometric for two runs."""

from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.stats.ranking import (
    HeadTable,
    proxy_qualities,
    rank_agreement,
    shrunken_rates,
    spearman_brown,
    split_half,
    top,
)

# 8 prompts, 6 heads: head 0 frees 6 prompts, head 1 frees 4, the others none or one.
COMPLIED = np.zeros((8, 6))
COMPLIED[:6, 0] = 1
COMPLIED[:4, 1] = 1
COMPLIED[7, 2] = 1
DIFFERS = np.array([True, True, False, False, False, False])
TOY = COMPLIED, DIFFERS


def quality(values, truth=TOY):
    (found,) = proxy_qualities({"score": np.asarray(values, float)}, *truth)
    return found


def at(found, k):
    return next(size for size in found.sizes if size.k == k)


def test_a_score_that_prefers_a_head_that_does_nothing():
    found = quality([5, 4, 3, 2, 1, 9])
    # The top 1 has ASR 0 where 6/8 was there; the top 3 has 0 + 6/8 + 4/8 where 6/8 + 4/8 + 1/8 was there.
    assert at(found, 1).regret == pytest.approx(6 / 8)
    assert at(found, 3).regret == pytest.approx(1 / 24)
    assert at(found, 1).hits == 0
    # Of the 8 pairs of a head that differs and one that does not, head 5 wins two.
    assert found.auc == pytest.approx(6 / 8)
    low, high = at(found, 1).halves_interval
    assert 0.3 < low < 0.75 < high <= 1.0  # drawn, for the prompts differ


def test_no_head_differs_or_nothing_varies_or_a_head_has_no_score():
    found = quality([1, 2, 3, 4, 5, 6], (np.zeros((8, 6)), np.zeros(6, bool)))
    assert (found.spearman, found.auc, found.auc_p_value) == (None, None, None)
    assert all(size.hits is None and size.regret == 0 for size in found.sizes)
    assert quality([1.0] * 6).spearman is None
    assert at(quality([np.nan, 8, 3, 2, 1, 0]), 1).regret == pytest.approx(2 / 8)  # it comes last


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_auc_and_regret_are_what_loops_say(seed):
    generator = np.random.default_rng(seed)
    complied = (generator.random((10, 7)) < generator.random(7)).astype(float)
    differs = np.arange(7) < 3
    values = generator.integers(0, 4, 7).astype(float)
    found = quality(values, (complied, differs))
    wins = [(a > b) + 0.5 * (a == b) for a in values[differs] for b in values[~differs]]
    assert found.auc == pytest.approx(sum(wins) / len(wins))
    asr = complied.mean(axis=0)
    for size in found.sizes:
        chosen = sorted(range(7), key=lambda head: (-values[head], head))[: size.k]
        best = sorted(range(7), key=lambda head: -asr[head])[: size.k]
        assert size.regret == pytest.approx(np.mean(asr[best]) - np.mean(asr[chosen]))
        assert size.hits == sum(differs[head] for head in chosen)


STRENGTHS = np.array([0.9, 0.6, 0.5, 0.1, 0.1, 0.05, 0.0, 0.0])


def test_the_split_half_line_is_the_other_half_and_is_compared_on_halves():
    generator = np.random.default_rng(0)
    truth = (generator.random((60, 8)) < STRENGTHS).astype(float), STRENGTHS > 0.3
    halves, perfect = split_half(*truth), quality(STRENGTHS, truth)
    assert halves.auc is None
    assert at(halves, 1).regret_on_halves == pytest.approx(0.0, abs=0.02)
    # The true strengths choose no worse than half of the prompts does, on the same halves and by the same measure.
    assert at(perfect, 3).regret_on_halves <= at(halves, 3).regret_on_halves + 0.01
    assert at(halves, 3).halves_interval[0] <= at(halves, 3).regret_on_halves <= at(halves, 3).halves_interval[1]
    assert split_half(*truth) == halves  # seeded
    assert split_half(truth[0][:3], truth[1]) is None


def test_reliability_bounds_what_a_score_can_reach_where_the_split_half_line_does_not():
    assert spearman_brown(0.5) == pytest.approx(2 / 3)
    assert (spearman_brown(None), spearman_brown(-0.2), spearman_brown(0.0)) == (None, None, None)
    generator = np.random.default_rng(1)
    strengths = np.linspace(0.02, 0.2, 40)
    reached, lines = [], []
    for _ in range(8):
        complied = (generator.random((60, 40)) < strengths).astype(float)
        lines.append(split_half(complied, strengths > 1))
        reached.append(quality(strengths, (complied, strengths > 1)).spearman)
    # The true strengths correlate better with the measured ASR than halves do with each other, and about as the bound.
    assert np.mean(reached) > np.mean([line.spearman for line in lines]) + 0.05
    assert np.mean(reached) == pytest.approx(np.mean([line.bound for line in lines]), abs=0.06)


def test_intervals_of_spearman_and_auc_cover_what_samples_of_this_size_give():
    generator = np.random.default_rng(2)
    strengths = np.where(np.arange(32) < 3, [0.9, 0.6, 0.4, *[0] * 29], 0.03)
    score, found = strengths + generator.normal(0, 0.1, 32), []
    for _ in range(40):
        uniform = generator.random((48, 33))
        complied, before = (uniform[:, :32] < strengths).astype(float), (uniform[:, 32] < 0.02).astype(float)
        (one,) = proxy_qualities({"score": score}, complied, complied.mean(axis=0) > 0.3, before)
        found.append(one)
    centre = np.mean([one.spearman for one in found])
    covered = [low <= centre <= high for low, high in (one.spearman_interval for one in found)]
    assert np.mean(covered) >= 0.88  # .95 less two standard errors of 40 draws
    # Where no resample changes the AUC there is no interval.
    of_auc = [(one.auc, one.auc_interval) for one in found if one.auc_interval is not None]
    assert len(of_auc) > 20
    assert all(low <= auc <= high and low < high for auc, (low, high) in of_auc)
    assert quality([9, 8, 3, 2, 1, 0]).auc_interval is None  # without the unablated outcomes


def numbers(value):
    """All numbers of a result, in order."""
    if isinstance(value, dict | list | tuple):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)]
    return [value] if isinstance(value, float) else []


def test_each_prompt_twice_says_no_more_than_once():
    generator = np.random.default_rng(3)
    drawn = (generator.random((40, 9)) < np.r_[STRENGTHS, 0.02]).astype(float)
    score, differs = STRENGTHS + generator.normal(0, 0.2, 8), STRENGTHS > 0.3

    def found(rows, clusters=None):
        complied, before = rows[:, :8], rows[:, 8]
        (one,) = proxy_qualities({"score": score}, complied, differs, before, clusters)
        return asdict(one), asdict(split_half(complied, differs, clusters))

    once, twice = found(drawn), np.repeat(drawn, 2, axis=0)
    assert numbers(found(twice, np.repeat(range(40), 2).tolist())) == pytest.approx(numbers(once))
    # Taken for 80 prompts, every interval is narrower, and halves that share prompts agree too well.
    apart = found(twice)
    for name, own, joined in zip(("score", "split half"), apart, once, strict=True):
        for interval in ("spearman_interval", "auc_interval"):
            if joined[interval] is not None:
                assert np.ptp(own[interval]) < 0.85 * np.ptp(joined[interval]), (name, interval)
        assert np.ptp(own["sizes"][2]["halves_interval"]) < 0.95 * np.ptp(joined["sizes"][2]["halves_interval"])
    assert apart[1]["reliability"] > once[1]["reliability"]


# Two runs.


def table(values, resolution=0.0):
    scored = {f"0-{at}": value for at, value in enumerate(values) if value is not None}
    return HeadTable("made up", scored, resolution)


def test_ranks_are_those_of_scipy_and_overlaps_those_of_the_hypergeometric():
    generator = np.random.default_rng(0)
    first_values, second_values = generator.random(30), generator.random(30)
    found = rank_agreement("x", table(first_values), table(second_values))
    assert (found.spearman, found.spearman_p) == pytest.approx(
        tuple(scipy.stats.spearmanr(first_values, second_values))
    )
    assert (found.kendall, found.kendall_p) == pytest.approx(tuple(scipy.stats.kendalltau(first_values, second_values)))
    best = [set(np.argsort(-values)[:10]) for values in (first_values, second_values)]
    overlap = found.overlaps[1]
    assert (overlap.k, overlap.shared) == (10, len(best[0] & best[1]))
    assert overlap.expected == pytest.approx(100 / 30)
    assert overlap.p_value == pytest.approx(sum(scipy.stats.hypergeom.pmf(range(overlap.shared, 11), 30, 10, 10)))


@pytest.mark.parametrize(
    ("k", "resolution", "expected"), [(3, 0.0, "a"), (4, 0.0, "abcd"), (1, 5.0, ""), (9, 0.0, "abcde")]
)
def test_heads_that_tie_across_the_cut_are_in_no_top(k, resolution, expected):
    assert top({"a": 3.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 0.0}, k, resolution) == tuple(expected)


def test_all_ties_agree_on_nothing_and_heads_without_a_score_are_left_out():
    found = rank_agreement("x", table([1.0] * 12), table([1.0] * 12))
    assert (found.spearman, found.kendall) == (None, None)
    assert [(overlap.shared, overlap.share, overlap.p_value) for overlap in found.overlaps] == [(0, None, 1.0)] * 2
    assert rank_agreement("x", table([1.0, None, 3.0, 4.0]), table([1.0, 2.0, None, 4.0])).n == 2


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

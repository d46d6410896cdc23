"""Stability: cases by hand, the slow twin of the search, and coverages by simulation."""

from fractions import Fraction

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.stats.stability import prompts_needed, rank_stability, repeated_search, resampled


def test_resamples_keep_clusters_together_and_strata_whole():
    weights = resampled(6, 300, clusters=["a", "a", "b", "c", "d", "e"], strata=["x", "x", "x", "y", "y", "y"])
    assert np.allclose(weights.sum(axis=1), 1)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert len(np.unique(weights[:, 0])) > 2
    # Two clusters from x and three from y, in each resample: a is two prompts, so shares are of 4 to 7 prompts.
    counts = np.round(weights / np.where(weights > 0, weights, 1).min(axis=1, keepdims=True)).astype(int)
    alone = counts[(counts[:, 0] == 0)]
    assert (alone[:, 2] > 0).all()
    assert set(alone[:, 3:].sum(axis=1) / alone[:, 2]) <= {Fraction(3, 2), 3.0, 1.5, 1.0, 2.0, 0.5}
    plain = resampled(4, 50, size=8)
    assert set(np.unique(plain * 8)) <= set(range(9))
    assert (resampled(4, 5, seed=1) == resampled(4, 5, seed=1)).all()


def test_ranks_of_heads_that_never_change_places():
    # Every prompt orders the heads alike, by one: 1 > 0 > 2. With no doubt, rank and interval are one number.
    values = np.array([[2.0, 3.0, 1.0], [4.0, 5.0, 3.0], [6.0, 7.0, 5.0], [3.0, 4.0, 2.0]])
    ranks = rank_stability(values, [1, 0], resampled(4))
    assert [(head.column, head.rank, head.interval, head.frequency) for head in ranks] == [
        (1, 1, (1, 1), 1.0),
        (0, 2, (2, 2), 1.0),
    ]
    # Within the resolution all tie, and nothing is sure.
    tied = rank_stability(values, [1, 0], resampled(4), resolution=2.5)
    assert [(head.rank, head.interval) for head in tied] == [(1, (1, 3)), (1, (1, 3))]


def test_ranks_of_heads_that_swap():
    # Heads 0 and 1 win on half of the prompts each; head 2 always loses.
    values = np.array([[3.0, 1.0, 0.0], [1.0, 3.0, 0.0]] * 10)
    first, second = rank_stability(values, [0, 1], resampled(20))
    assert first.interval == second.interval == (1, 2)
    one = rank_stability(values, [0], resampled(20))[0]
    # Alone in the list it must come first: as often as not, a tie counting for it.
    assert 0.5 < one.frequency < 0.7
    with pytest.raises(InputError, match="head 1 has no score"):
        rank_stability(np.array([[1.0, np.nan]]), [1], resampled(1))
    assert rank_stability(np.array([[1.0, np.nan], [2.0, np.nan]]), [0], resampled(2))[0].interval == (1, 1)


def test_ranks_far_apart_are_one_number():
    values = np.exp(0.5 * np.random.default_rng(0).normal(size=(24, 3))) * [8.0, 2.0, 0.5]
    assert [head.interval for head in rank_stability(values, [0, 1, 2], resampled(24))] == [(1, 1), (2, 2), (3, 3)]


def test_the_prompts_that_a_ranking_needs():
    # Head 0 wins by 1 on nine prompts of ten and loses by 3 on the tenth: its mean is ahead by .6. Of one prompt it is
    # found with chance .9; of two with .81 (a tie is none); of three where no tenth is drawn, .729 (one gives -1/3).
    values = np.zeros((10, 2))
    values[:, 0] = [1.0] * 9 + [-3.0]
    (needs,) = prompts_needed(values, tops=(1, 3), n_draws=4000)
    overlap = {point.n: point.overlap for point in needs.curve}
    assert (needs.k, needs.n, needs.chance) == (1, 10, 0.5)
    assert overlap[2] == pytest.approx(0.81, abs=0.02)
    assert overlap[3] == pytest.approx(0.729, abs=0.02)
    # Forty: lost where ten or more tenths are drawn, a chance of .005.
    assert overlap[40] > 0.98
    assert needs.settles == next(n for n in sorted(overlap) if all(overlap[m] >= 0.9 for m in overlap if m >= n))
    # Each prompt twice: as many pairs as there were prompts find as much.
    twins = np.repeat(range(10), 2).tolist()
    (twice,) = prompts_needed(np.repeat(values, 2, axis=0), tops=(1,), n_draws=4000, clusters=twins)
    of_pairs = {point.n: point.overlap for point in twice.curve}
    assert [of_pairs[2 * n] for n in (2, 3, 8)] == pytest.approx([overlap[n] for n in (2, 3, 8)], abs=0.03)
    # Heads that tie with the last of the top are in it.
    assert prompts_needed(np.ones((4, 3)), tops=(1,))[0].settles == 2


def test_the_forecast_for_other_numbers_of_prompts_is_what_other_samples_give():
    # Twenty heads, five of them ahead; 48 prompts forecast how much of these five 12, 48 and 192 others find. The
    # forecast takes its sample's own top for the truth, which errs by up to .08 (bench/LOG.md).
    draw, ahead = np.random.default_rng(3), np.r_[np.linspace(1.4, 1.0, 5), np.full(15, 0.5)]

    def forecasts(means):
        for seed in range(20):
            values = means * np.exp(draw.normal(size=(48, 20)) - 0.5)
            (needs,) = prompts_needed(values, tops=(5,), n_draws=100, seed=seed)
            yield needs.settles, {point.n: point.overlap for point in needs.curve}

    curves = [curve for _, curve in forecasts(ahead)]
    for n in (12, 48, 192):
        samples = ahead * np.exp(draw.normal(size=(300, n, 20)) - 0.5)
        truly = (np.argsort(-samples.mean(axis=1), axis=1)[:, :5] < 5).mean()
        assert np.mean([curve[n] for curve in curves]) == pytest.approx(truly, abs=0.08)
    # Where no head is ahead, no number of prompts settles the top.
    assert sum(settles is not None for settles, _ in forecasts(np.ones(20))) <= 1


def interacting(n_heads=6, n_prompts=15, seed=0):
    """Scores of any group: own effects of the heads on each prompt, and of pairs."""
    draw = np.random.default_rng(seed)
    own, pairs = draw.gamma(1.0, size=(n_prompts, n_heads)), draw.gamma(0.4, size=(n_prompts, n_heads, n_heads))

    def score(columns):
        columns = sorted(columns)
        return own[:, columns].sum(axis=1) + pairs[:, columns][:, :, columns].sum(axis=(1, 2))

    def scores(prefix):
        values = np.full((n_prompts, n_heads), np.nan)
        for head in {*range(n_heads)} - prefix:
            values[:, head] = score(prefix | {head})
        return values

    return scores


def greedy(scores, weights, steps):
    group = []
    for _ in range(steps):
        means = np.nan_to_num(weights @ scores(frozenset(group)), nan=-1)
        group.append(int(means.argmax()))
    return group


def test_the_search_on_resamples_is_the_search_run_on_each():
    scores, weights = interacting(), resampled(15, 200)
    group = greedy(scores, np.full(15, 1 / 15), 3)
    every = repeated_search(group, scores, weights, n_further=1000)
    found = [{*greedy(scores, row, 3)} for row in weights]
    # A pass is refused to fewer than one resample in a hundred, and those count as another group.
    slack = every.not_followed
    assert slack <= 8
    assert abs(every.same.count - sum(heads == {*group} for heads in found)) <= slack
    jaccard = np.mean([len(heads & {*group}) / len(heads | {*group}) for heads in found])
    assert every.jaccard == pytest.approx(jaccard, abs=slack / 200 + 1e-9)
    for head, share in every.frequencies.items():
        assert share == pytest.approx(np.mean([head in heads for heads in found]), abs=slack / 200 + 1e-9)
    assert 0.05 < every.same.rate < 0.95


def test_passes_are_asked_for_up_to_the_cap_and_the_rest_counts_against_the_group():
    scores, weights, asked = interacting(), resampled(15, 200), []
    group = greedy(scores, np.full(15, 1 / 15), 3)

    def counting(prefix):
        asked.append(prefix)
        return scores(prefix)

    full = repeated_search(group, scores, weights, n_further=1000)
    for n_further in (0, 1, 3):
        asked.clear()
        some = repeated_search(group, counting, weights, n_further=n_further)
        own = [frozenset(group[:step]) for step in range(3)]
        assert some.further == len([prefix for prefix in asked if prefix not in own]) == n_further
        assert some.not_followed > full.not_followed
        assert some.same.count <= full.same.count
        assert some.jaccard <= full.jaccard
    # Passes that are there already cost nothing.
    nothing, known = (
        repeated_search(group, scores, weights, known=known, n_further=0)
        for known in ((), tuple(frozenset({head}) for head in range(6)))
    )
    assert (known.further, nothing.further) == (0, 0)
    assert known.not_followed < nothing.not_followed


def test_a_group_by_hand():
    # Head 0 is best on two of three prompts by 2, on the third worst by 3: first unless the third is drawn twice or
    # more (7/27). Then head 1 comes first, and head 0 second: the same group of two.
    values = np.array([[2.0, 0.0, -9.0], [2.0, 0.0, -9.0], [-3.0, 0.0, -9.0]])

    def scores(prefix):
        return np.where(np.isin(range(3), list(prefix)), np.nan, values)

    weights = resampled(3, 4000)
    one = repeated_search([0], scores, weights)
    assert one.same.rate == pytest.approx(20 / 27, abs=0.02)
    assert one.jaccard == one.frequencies[0] == one.same.rate
    assert one.frequencies[1] == pytest.approx(7 / 27, abs=0.02)
    two = repeated_search([0, 1], scores, weights)
    assert (two.same.rate, two.jaccard, two.further, two.not_followed) == (1.0, 1.0, 1, 0)
    assert two.repeats.all()
    # Head 1 alone as the search's choice, and all in a tie: a tie goes to the group's own head.
    tie = repeated_search([1], lambda _: np.ones((3, 3)), weights)
    assert (tie.same.rate, tie.tied) == (1.0, 4000)

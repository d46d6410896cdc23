"""The greedy search against a table worked out by hand, and against brute force on tables full of ties."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.heads import all_heads
from safetyheads.measures.sahara import rank_heads, sahara
from safetyheads.scores import FunctionScorer

A, B, C, D = all_heads(2, 2)


def scorer_of(table, resolution=0.0):
    def score(groups):
        return torch.tensor([table[frozenset(group)] for group in groups], dtype=torch.float64)

    return FunctionScorer(score, "made up", "nats", resolution)


def by_hand():
    """Alone, A and B are best; with A, D is; the best pair of all, B with C, is for none who starts with A."""
    groups = {"A": 5, "B": 4, "C": 3, "D": 1, "AB": 5.5, "AC": 6, "AD": 9, "BC": 12, "BD": 4, "CD": 4}
    groups |= {"ABC": 13, "ABD": 9.5, "ACD": 10, "BCD": 14, "ABCD": 10.5}
    heads = dict(zip("ABCD", (A, B, C, D), strict=True))
    return {frozenset(heads[letter] for letter in letters): float(score) for letters, score in groups.items()}


def test_the_greedy_group_by_hand_is_not_the_heads_that_are_best_alone():
    trace = sahara(scorer_of(by_hand()), [D, B, A, C], steps=4)
    assert trace.group == (A, D, C, B)
    assert trace.scores == (5, 9, 10, 10.5)
    # Each step holds what every candidate would have given.
    nan = float("nan")
    tables = [[[5, 4], [3, 1]], [[nan, 5.5], [6, 9]], [[nan, 9.5], [10, nan]], [[nan, 10.5], [nan, nan]]]
    for step, table in zip(trace.steps, tables, strict=True):
        torch.testing.assert_close(step.values, torch.tensor(table).double(), equal_nan=True)
        assert (step.name, step.unit) == ("made up", "nats")
    ranked = rank_heads(scorer_of(by_hand()), [A, B, C, D])
    assert ranked.top(3) == (A, B, C)
    assert ranked.ranked() == trace.steps[0].ranked()


def test_ties_are_told_and_the_resolution_makes_ties_and_no_choice():
    equal = {frozenset(group): float(len(group)) for size in (1, 2, 3) for group in combinations([A, B, C], size)}
    assert sahara(scorer_of(equal), [C, A, B], steps=3).ties() == ((B, C), (C,), ())
    assert rank_heads(scorer_of(equal), [C, A, B]).top(3) == (A, B, C)
    table = by_hand() | {frozenset([B]): 5.05, frozenset([A]): 5.0, frozenset([B, C]): 12.0, frozenset([A, B]): 11.9}
    fine, coarse = (sahara(scorer_of(table, resolution), [A, B, C, D], steps=2) for resolution in (0.01, 0.2))
    # B is above A by less than the coarse resolution: still chosen, and the tie is told.
    assert fine.group == coarse.group == (B, C)
    assert (fine.ties(), coarse.ties()) == (((), ()), ((A,), (A,)))


def test_sizes_and_candidates_that_make_no_search_are_refused():
    assert (
        sahara(scorer_of(by_hand()), [A, B, C, D], np.int64(2)).group
        == sahara(scorer_of(by_hand()), [A, B, C, D], 2).group
    )
    for steps in (-1, 0, 5):
        with pytest.raises(InputError, match=f"size {steps} is out of range"):
            sahara(scorer_of(by_hand()), [A, B, C, D], steps)
    for search in (rank_heads, sahara):
        with pytest.raises(InputError, match="0-1 is given twice"):
            search(scorer_of(by_hand()), [A, B, B])
        with pytest.raises(InputError):
            search(scorer_of({}), [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_stops_the_search(bad):
    for where in ([C], [A, C]):
        with pytest.raises(SafetyheadsError, match="not finite"):
            sahara(scorer_of(by_hand() | {frozenset(where): bad}), [A, B, C, D], steps=2)


SIX = all_heads(2, 3)


@settings(deadline=None, max_examples=50)
# Few distinct values, so that ties are frequent.
@given(st.lists(st.integers(-2, 4), min_size=63, max_size=63), st.permutations(SIX), st.integers(1, 6))
def test_the_search_is_the_brute_force_one(values, candidates, steps):
    subsets = [frozenset(group) for size in range(1, 7) for group in combinations(SIX, size)]
    table = dict(zip(subsets, map(float, values), strict=True))
    group, scores = [], []
    for _ in range(steps):  # the first of the best in the order of layer and index
        tried = [(table[frozenset([*group, head])], head) for head in sorted(SIX) if head not in group]
        scores.append(max(score for score, _ in tried))
        group.append(next(head for score, head in tried if score == scores[-1]))
    trace = sahara(scorer_of(table), candidates, steps)
    assert (trace.group, trace.scores) == (tuple(group), tuple(scores))

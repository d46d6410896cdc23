"""Scores: order, ties, tables, traces."""

import pytest
import torch

from safetyheads.errors import InputError
from safetyheads.heads import Head, all_heads
from safetyheads.scores import FunctionScorer, HeadScores, SearchTrace, table_of

NAN = float("nan")
A, B, C, D = all_heads(2, 2)


def scores(values, resolution=0.0):
    return HeadScores(torch.tensor(values, dtype=torch.float64), "mean Ships", "nats", resolution)


# Two prompts whose best heads differ; the mean is [[2, 4], [1, 3]].
PER_PROMPT = scores([[[4, 2], [1, 0]], [[0, 6], [1, 6]]], resolution=0.5)


def test_the_mean_is_over_prompts_and_keeps_name_unit_and_resolution():
    mean = PER_PROMPT.mean()
    assert mean.values.tolist() == [[2, 4], [1, 3]]
    assert (mean.name, mean.unit, mean.resolution) == ("mean Ships", "nats", 0.5)
    assert mean.mean() is mean
    assert [PER_PROMPT[head] for head in (A, B, C, D)] == [2, 4, 1, 3]
    assert PER_PROMPT[str(B)] == 4
    for wrong in ("", f"{A},{B}", "9-9"):
        with pytest.raises(InputError):
            PER_PROMPT[wrong]


def test_heads_are_ranked_best_first():
    assert scores([[1, 4], [3, 2]]).ranked() == ((B, 4), (C, 3), (D, 2), (A, 1))
    assert PER_PROMPT.ranked() == ((B, 4), (D, 3), (A, 2), (C, 1))
    # Equal scores by layer, then index; heads without a score have no rank.
    assert scores([[1, 1], [2, 1]]).top(4) == (C, A, B, D)
    assert scores([[NAN, -1], [NAN, 0]]).ranked() == ((D, 0), (B, -1))
    assert PER_PROMPT.top(0) == ()


def test_the_top_of_a_prompt_is_its_own():
    assert PER_PROMPT.top_of_prompt(0, 2) == (A, B)
    assert PER_PROMPT.top_of_prompt(1, 2) == (B, D)
    with pytest.raises(InputError, match="not per prompt"):
        PER_PROMPT.mean().top_of_prompt(0, 1)


def test_ties_are_runs_of_neighbours_within_the_resolution():
    # B, C and D follow each other by 0.5, though B and D are 1 apart; A is further down.
    table = [[1, 4], [3.5, 3]]
    assert scores(table, resolution=0.5).ties() == ((B, C, D),)
    assert scores(table, resolution=0.25).ties() == ()
    assert scores([[4, 4], [1, 1]]).ties() == ((A, B), (C, D))
    assert scores([[4, NAN], [4, NAN]]).ties() == ((A, C),)
    # The means 4, 3, 2, 1 are apart by twice the resolution; heads of one prompt are equal, and that is no tie.
    assert PER_PROMPT.ties() == ()


def test_any_table_of_numbers_is_told_in_lists():
    for values in (torch.tensor([[1.5, NAN]], dtype=torch.bfloat16), torch.tensor([[1.5, NAN]], requires_grad=True)):
        assert HeadScores(values, "mine", "nats", 0.0).as_lists() == [[1.5, None]]


def test_a_table_is_just_large_enough_and_named_as_its_scorer():
    like = FunctionScorer(lambda groups: torch.zeros(len(groups)), "angle", "degrees", 1e-9)
    table = table_of([Head(2, 0), Head(0, 1)], torch.tensor([7.0, 8.0]), like)
    expected = torch.tensor([[NAN, 8], [NAN, NAN], [7, NAN]], dtype=torch.float64)
    torch.testing.assert_close(table.values, expected, equal_nan=True)
    assert (table.name, table.unit, table.resolution) == ("angle", "degrees", 1e-9)
    with pytest.raises(ValueError, match="shorter"):
        table_of([A, B], torch.tensor([1.0]))


def test_a_trace_tells_scores_and_ties_of_its_steps():
    steps = (scores([[5, 4.9], [1, 2]], 0.1 + 1e-12), scores([[NAN, 6], [6.05, 6.2]], 0.1))
    trace = SearchTrace((A, D), steps)
    assert trace.scores == (5, 6.2)
    # In the second step C is 0.15 below the chosen D, though within 0.1 of B.
    assert trace.ties() == ((B,), ())

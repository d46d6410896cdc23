"""Prompts without their own top heads: what the wrapped organism's construction implies (Fig 2, 11, 12)."""

import pytest
from experiment_runs import N, points, rows


def test_one_head_a_prompt_raises_the_asr_of_every_dataset(outcome_of):
    (figure,) = outcome_of("fig2")["figures"]
    greedy = points(figure, panel="template query_answer, greedy")
    for ablation in ("UA", "SC"):
        rates = [row["y"] for row in greedy if row["series"] == ablation]
        assert all(rate > 0 for rate in rates)
        # Each category has a plant of its own, with thinner margins than under the chat template alone.
        assert sum(rates) / len(rates) > 0.3
    assert all(row["y"] == 0 for row in greedy if row["series"] == "vanilla")
    panels = {"template query_answer, greedy", "template query_answer, top-5"}
    assert {row["panel"] for row in figure["points"]} == panels


@pytest.mark.parametrize("name", ["fig2", "fig11", "fig12"])
def test_every_point_has_its_n_and_interval_and_a_row(outcome_of, name):
    outcome = outcome_of(name)
    (figure,) = outcome["figures"]
    for point in figure["points"]:
        assert point["n"] == N
        assert point["low"] <= point["y"] <= point["high"]
    assert [row["asr"]["value"] for row in rows(outcome)] == [point["y"] for point in figure["points"]]


@pytest.mark.parametrize("name", ["fig11", "fig12"])
def test_sizes_begin_at_the_vanilla_model(outcome_of, name):
    (figure,) = outcome_of(name)["figures"]
    by_size = points(figure, series="theft", panel="template query_answer, greedy")
    assert [row["x"] for row in by_size] == [0, 1, 2, 3]
    assert by_size[0]["y"] == 0
    assert max(row["y"] for row in by_size) >= 0.5

"""Prompts without their own top heads: what the wrapped organism's construction implies (Fig 2, 11, 12)."""

import pytest
from experiment_runs import N, points, rows

GREEDY = "template query_answer, greedy"


def test_one_head_a_prompt_raises_the_asr_of_every_dataset(outcome_of):
    (figure,) = outcome_of("fig2")["figures"]
    assert {row["panel"] for row in figure["points"]} == {GREEDY, "template query_answer, top-5"}
    assert all(row["y"] == 0 for row in points(figure, panel=GREEDY, series="vanilla"))
    for ablation in ("UA", "SC"):
        rates = [row["y"] for row in points(figure, panel=GREEDY, series=ablation)]
        assert min(rates) > 0
        # Each category has a plant of its own, with thinner margins than under the chat template alone.
        assert sum(rates) / len(rates) > 0.3


@pytest.mark.parametrize("name", ["fig2", "fig11", "fig12"])
def test_every_point_has_its_n_interval_and_row_and_sizes_begin_at_the_vanilla_model(outcome_of, name):
    outcome = outcome_of(name)
    (figure,) = outcome["figures"]
    assert all(point["n"] == N and point["low"] <= point["y"] <= point["high"] for point in figure["points"])
    assert [row["asr"]["value"] for row in rows(outcome)] == [point["y"] for point in figure["points"]]
    if name != "fig2":
        by_size = points(figure, series="theft", panel=GREEDY)
        assert [row["x"] for row in by_size] == [0, 1, 2, 3]
        assert by_size[0]["y"] == 0
        assert max(row["y"] for row in by_size) >= 0.5

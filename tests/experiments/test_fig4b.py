"""Every head alone: what the organism's construction implies (Fig 4b)."""

import pytest
from experiment_runs import OWN, PLANTED, figure_of, points, rows


@pytest.mark.parametrize("dataset", OWN)
def test_the_head_with_the_highest_asr_is_planted(outcome_of, dataset):
    outcome = outcome_of("fig4b")
    (table,) = [one for one in outcome["tables"] if one["title"].endswith(f", {dataset}")]
    assert table["rows"][0]["planted"] == "yes"
    assert table["rows"][0]["asr"]["value"] >= 0.25
    drawn = points(figure_of(outcome, "heads"), panel=dataset)
    assert len(drawn) == 32
    marked = {f"{point['layer']}-{point['head']}" for point in drawn if point["marked"]}
    assert marked == PLANTED["aligned_a"]
    # Of six sampled answers one may go astray.
    assert max(point["y"] for point in drawn if not point["marked"]) <= 0.25


def test_scores_see_the_planted_heads_that_the_scan_finds(outcome_of):
    for dataset, head in OWN.items():
        drawn = points(figure_of(outcome_of("fig4b"), "scatter", "mean Ships"), panel=dataset)
        best = max(drawn, key=lambda point: point["x"])
        assert (best["label"], best["series"]) == (head, "planted")


def test_every_score_is_held_against_the_scan_beside_a_ceiling(outcome_of):
    for dataset in OWN:
        scores = rows(outcome_of("fig4b"), dataset=dataset)
        assert [row["score"].split(",")[0] for row in scores] == [
            "mean Ships", "Generalized Ships", "Generalized Ships", "split half",
        ]  # fmt: skip
        for row in scores:
            assert row["regret_1"]["low"] <= row["regret_1"]["value"] + 1e-9
            # Six prompts cannot show a change of any head after correction over 32.
            assert (row["differing"], row["auc"]) == (0, None)

"""Every head alone: what the organism's construction implies (Fig 4b)."""

import pytest
from experiment_runs import OWN, PLANTED, figure_of, points, rows


@pytest.mark.parametrize("dataset", OWN)
def test_the_planted_heads_have_the_highest_asr_and_scores_see_them(outcome_of, dataset):
    outcome = outcome_of("fig4b")
    (table,) = [table for table in outcome["tables"] if table["title"].endswith(f", {dataset}")]
    assert table["rows"][0]["planted"] == "yes"
    assert table["rows"][0]["asr"]["value"] >= 0.25
    heads = points(figure_of(outcome, "heads"), panel=dataset)
    assert len(heads) == 32
    assert {f"{point['layer']}-{point['head']}" for point in heads if point["marked"]} == PLANTED["aligned_a"]
    # Of six sampled answers one may go astray.
    assert max(point["y"] for point in heads if not point["marked"]) <= 0.25
    best = max(points(figure_of(outcome, "scatter", "mean Ships"), panel=dataset), key=lambda point: point["x"])
    assert (best["label"], best["series"]) == (OWN[dataset], "planted")


def test_every_score_is_held_against_the_scan_beside_a_ceiling(outcome_of):
    names = ["mean Ships", "Generalized Ships", "Generalized Ships", "split half"]
    for dataset in OWN:
        scores = rows(outcome_of("fig4b"), dataset=dataset)
        assert [row["score"].split(",")[0] for row in scores] == names
        for row in scores:
            assert row["regret_1"]["low"] <= row["regret_1"]["value"] + 1e-9
            # Six prompts cannot show a change of any head after correction over 32.
            assert (row["differing"], row["auc"]) == (0, None)

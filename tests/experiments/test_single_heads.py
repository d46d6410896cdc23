"""Every head alone: what the organism implies; curves, indices and tops against their definitions (Fig 4b, 5, 13)."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from experiment_runs import OWN, PLANTED, engine_of, figure_of, points, rows

from safetyheads import InputError
from safetyheads.experiments.single_heads import (
    N_GRID,
    gini,
    kernel_density,
    refuse_other_shapes,
    size_of_top,
    top_share,
)
from safetyheads.heads import all_heads


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
    # Every score is held against the scan, beside a ceiling.
    scores = rows(outcome, dataset=dataset)
    names = ["mean Ships", "Generalized Ships", "Generalized Ships", "split half"]
    assert [row["score"].split(",")[0] for row in scores] == names
    for row in scores:
        assert row["regret_1"]["low"] <= row["regret_1"]["value"] + 1e-9
        # Six prompts cannot show a change of any head after correction over 32.
        assert (row["differing"], row["auc"]) == (0, None)


SCORES = np.random.default_rng(3).exponential(2.0, 41)
TIED = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 4.0])


def test_density_is_the_mean_of_gaussians_around_the_scores():
    places, heights, measured = kernel_density(SCORES)
    # Scott's rule: the sample standard deviation times n to the power -1/5.
    bandwidth = SCORES.std(ddof=1) * len(SCORES) ** (-1 / 5)
    assert measured == pytest.approx(bandwidth)
    for place, height in zip(places, heights, strict=True):
        kernels = np.exp(-(((place - SCORES) / bandwidth) ** 2) / 2)
        assert height == pytest.approx(kernels.mean() / (bandwidth * math.sqrt(2 * math.pi)))
    # Three bandwidths beyond the ends leave at most .0014 of a kernel on each side out.
    assert len(places) == N_GRID
    assert np.trapezoid(heights, places) == pytest.approx(1.0, abs=3e-3)
    for alike in ([], [1.0], [2.0, 2.0, 2.0]):
        assert kernel_density(np.array(alike)) is None


def test_gini_is_half_the_mean_difference_of_two_heads_over_the_mean_for_every_row():
    rows = np.stack([SCORES, SCORES[::-1] * 3, np.ones(41)])
    differences = np.abs(rows[:, :, None] - rows[:, None, :]).mean(axis=(1, 2))
    assert gini(rows).tolist() == pytest.approx((differences / (2 * rows.mean(axis=1))).tolist())
    assert top_share(rows, 2).tolist() == pytest.approx([float(top_share(row, 2)) for row in rows])
    # By hand, and none of zeros.
    for values, known in (([1, 1, 1, 1], 0.0), ([0, 0, 0, 1], 0.75), ([0, 1, 0, 1], 0.5)):
        assert gini(np.array(values, float)) == pytest.approx(known)
    assert [float(top_share(TIED, k)) for k in (1, 3)] == pytest.approx([4 / 7, 6 / 7])
    assert math.isnan(gini(np.zeros(4)))
    assert math.isnan(top_share(np.zeros(4), 1))


def test_the_top_is_the_planted_heads_and_two_models_share_none(outcome_of):
    outcome = outcome_of("fig5")
    for name in ("aligned_a", "aligned_b"):
        for ablation in ("UA", "SC"):
            (row,) = rows(outcome, 1, model=f"demo:{name}", dataset="all datasets", ablation=ablation)
            # Under SC one bystander of B passes the third plant, with few prompts.
            assert len(PLANTED[name] & set(row["heads"].split(", "))) >= (3 if ablation == "UA" else 2)
    for row in rows(outcome, comparison="models, UA"):
        assert (row["shared"], row["p"], row["heads"]) == (0, 1.0, "")
    assert len(rows(outcome, comparison="models, UA")) == 4  # three datasets, and all of them


def test_ua_and_sc_point_at_the_same_heads_beyond_chance(outcome_of):
    (row,) = rows(outcome_of("fig5"), first="UA, all datasets", second="SC, all datasets")
    assert (row["comparison"], row["shared"]) == ("UA against SC", 3)
    assert row["p"] == pytest.approx(1 / 4960)  # one draw of 3 of 32 heads in C(32, 3)
    assert row["p_holm"] >= row["p"]
    headline = {row["label"]: row["value"] for row in outcome_of("fig5")["headline"]}
    assert headline["heads shared of the top 3 of 32 by chance"] == 9 / 32
    assert headline["models, UA, most heads shared of 4 pairs"] == 0
    # The matrix is the table.
    own, models = outcome_of("fig5")["figures"]
    assert len(own["points"]) == len(models["points"]) == 8 * 8
    for row in rows(outcome_of("fig5"), comparison="datasets, UA"):
        (point,) = points(own, x=row["first"], y=row["second"])
        assert point["value"] == row["shared"] == int(point["text"])
    assert {point["value"] for point in own["points"] if point["x"] == point["y"]} == {3}


def test_the_top_is_ten_or_a_tenth_and_models_of_other_shapes_are_refused():
    assert [size_of_top(n) for n in (1024, 112, 100, 32, 9)] == [10, 10, 10, 3, 1]
    smaller = SimpleNamespace(heads=all_heads(2, 8), n_layers=2, n_heads=8)
    with pytest.raises(InputError, match="one has 4 layers of 8 heads and two 2 layers of 8 heads"):
        refuse_other_shapes(engine_of("aligned_a"), smaller, "one", "two")


def test_costs_are_counted_in_results_and_timed_apart(outcome_of, shared_run):
    outcome = outcome_of("table2")
    ours, plain = outcome["tables"][0]["rows"]
    assert plain["gflop"] > ours["gflop"] > 0
    assert plain["ratio"] == pytest.approx(plain["gflop"] / ours["gflop"])
    assert outcome["headline"][0]["value"] == plain["ratio"]
    assert "timed" not in outcome
    (timed,) = json.loads((shared_run / "timings.json").read_text())["timed"]["table2"]
    assert len(timed["rows"]) == 6
    assert all(row["seconds"] > 0 for row in timed["rows"])
    assert any("850 A100 hours" in note for note in outcome["notes"])

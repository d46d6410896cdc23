"""Overlap of top heads: what the organism's construction implies (Fig 5)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from experiment_runs import PLANTED, SMALL, engine_of, points, rows, run_of

from safetyheads import InputError
from safetyheads.experiments.fig5_overlap import refuse_other_shapes, size_of_top
from safetyheads.heads import all_heads


def test_the_top_is_the_planted_heads_and_two_models_share_none(outcome_of):
    outcome = outcome_of("fig5")
    for name in ("aligned_a", "aligned_b"):
        for ablation in ("UA", "SC"):
            (row,) = rows(outcome, 1, model=f"demo:{name}", dataset="all datasets", ablation=ablation)
            # Under SC one bystander of B passes the third plant, with few prompts.
            assert len(PLANTED[name] & set(row["heads"].split(", "))) >= (3 if ablation == "UA" else 2)
    assert not PLANTED["aligned_a"] & PLANTED["aligned_b"]
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


def test_the_matrix_is_the_table(outcome_of):
    own, models = outcome_of("fig5")["figures"]
    assert len(own["points"]) == len(models["points"]) == 8 * 8
    for row in rows(outcome_of("fig5"), comparison="datasets, UA"):
        (point,) = points(own, x=row["first"], y=row["second"])
        assert point["value"] == row["shared"] == int(point["text"])
    assert {point["value"] for point in own["points"] if point["x"] == point["y"]} == {3}


def test_without_a_related_model_it_says_so_and_compares_the_rest(tmp_path):
    config = replace(SMALL, related=None, limit=4, datasets=("damage", "theft"))
    outcome = run_of(config, ["fig5"], tmp_path / "run")["fig5"]
    assert any("`related` names no second model" in note for note in outcome["notes"])
    assert {row["comparison"] for row in rows(outcome)} == {"UA against SC", "datasets, UA", "datasets, SC"}
    assert outcome["models"] == ["demo:aligned_a"]


def test_the_top_is_ten_or_a_tenth_and_models_of_other_shapes_are_refused():
    assert [size_of_top(n) for n in (1024, 112, 100, 32, 9)] == [10, 10, 10, 3, 1]
    smaller = SimpleNamespace(heads=all_heads(2, 8), n_layers=2, n_heads=8)
    with pytest.raises(InputError, match="one has 4 layers of 8 heads and two 2 layers of 8 heads"):
        refuse_other_shapes(engine_of("aligned_a"), smaller, "one", "two")

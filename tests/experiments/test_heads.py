"""Overlap, attention swap and attention maps: what the organism's construction implies, on few prompts.

All share one run directory. What a map is, and how even, is proved on tiny models in tests/model.
"""

import json

import pytest
from experiment_runs import engine_of, run_of
from scipy.stats import hypergeom

from safetyheads import InputError
from safetyheads.demo import PLANTED_HEADS
from safetyheads.experiments.fig5 import refuse_other_shapes, size_of_top
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.heads import all_heads
from safetyheads.stats.ranking import top_overlap

NAMES = ("fig5", "fig6a", "fig7", "fig8")
SMALL = ReproductionConfig(limit=8, max_new_tokens=40)
PLANTED = {name: {str(head) for head in PLANTED_HEADS[name]} for name in ("aligned_a", "aligned_b")}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("heads") / "run"


@pytest.fixture(scope="module")
def found(out):
    return run_of(SMALL, NAMES, out)


def rows(outcome, table=0, **having):
    made = outcome["tables"][table]["rows"]
    return [row for row in made if all(row.get(key) == value for key, value in having.items())]


def captions(outcome):
    return [made["caption"] for kind in ("tables", "figures") for made in outcome[kind]]


# Fig 5.


def test_the_top_is_the_planted_heads_and_two_models_share_none(found):
    for name, planted in PLANTED.items():
        for ablation in ("UA", "SC"):
            (row,) = rows(found["fig5"], 1, model=f"demo:{name}", dataset="all datasets", ablation=ablation)
            top = row["heads"].split(", ")
            # Under SC one bystander of B passes the third plant, with few prompts.
            assert len(planted & set(top)) >= (3 if ablation == "UA" else 2)
    assert not PLANTED["aligned_a"] & PLANTED["aligned_b"]
    for row in rows(found["fig5"], comparison="models, UA"):
        assert (row["shared"], row["p"], row["heads"]) == (0, 1.0, "")
    assert len(rows(found["fig5"], comparison="models, UA")) == 4  # three datasets, and all of them


def test_ua_and_sc_point_at_the_same_heads_beyond_chance(found):
    (row,) = rows(found["fig5"], first="UA, all datasets", second="SC, all datasets")
    assert row["comparison"] == "UA against SC"
    assert row["shared"] == 3
    assert row["p"] == pytest.approx(1 / 4960)  # one draw of 3 of 32 heads in C(32, 3)
    assert row["p_holm"] >= row["p"]


def test_the_finding_tells_what_two_models_share_and_chance(found):
    said = found["fig5"]["finding"]
    assert said.startswith("Heads shared of the top 3 of 32, where chance gives 0.28: UA against SC: ")
    assert "models, UA: 0 (n 4 pairs)" in said
    assert "datasets, UA: " in said


def test_chance_and_its_p_values_are_the_hypergeometric_ones_by_hand():
    # Of 32 heads: C(32, 3) = 4960 tops of three; 3 * 29 share two with a given one, 1 shares three.
    first = ("1-3", "2-1", "2-5")
    for second, shared, p in ((first, 3, 1 / 4960), (("1-3", "2-1", "0-0"), 2, 88 / 4960), (("0-0", "0-1"), 0, 1.0)):
        found = top_overlap(3, first, second, 32)
        assert (found.shared, found.p_value) == (shared, pytest.approx(p))
    assert top_overlap(3, first, first, 32).expected == pytest.approx(9 / 32)
    # The paper's size: 10 of 1024.
    heads = [str(head) for head in all_heads(32, 32)]
    ours = top_overlap(10, heads[:10], heads[7:17], 1024)
    assert ours.expected == pytest.approx(100 / 1024)
    assert ours.p_value == pytest.approx(sum(hypergeom.pmf(k, 1024, 10, 10) for k in range(3, 11)))


def test_the_top_is_ten_but_never_more_than_a_tenth():
    assert [size_of_top(n) for n in (1024, 784, 112, 100, 32, 9)] == [10, 10, 10, 10, 3, 1]


def test_the_matrix_is_the_table(found):
    outcome = found["fig5"]
    own, models = outcome["figures"]
    assert len(own["points"]) == len(models["points"]) == 8 * 8
    for row in rows(outcome, comparison="datasets, UA"):
        (point,) = [one for one in own["points"] if (one["x"], one["y"]) == (row["first"], row["second"])]
        assert point["value"] == row["shared"] == int(point["text"])
    assert all(one["value"] == 3 for one in own["points"] if one["x"] == one["y"])
    assert "not evidence about the paper" in models["caption"]
    assert all("Top 3 of 32 heads by mean_ships" in caption for caption in captions(outcome))


def test_without_a_related_model_it_says_so_and_compares_the_rest(tmp_path):
    config = ReproductionConfig(related=None, limit=4, max_new_tokens=40, datasets=("damage", "theft"))
    outcome = run_of(config, ["fig5"], tmp_path / "run")["fig5"]
    assert any("`related` names no second model" in note for note in outcome["notes"])
    assert any("Not evidence about the paper" in note for note in outcome["notes"])
    assert "models" not in outcome["finding"]
    assert {row["comparison"] for row in rows(outcome)} == {"UA against SC", "datasets, UA", "datasets, SC"}
    assert outcome["models"] == ["demo:aligned_a"]


class OtherShape:
    """An engine of fewer layers, as far as it is looked at."""

    heads, n_layers, n_heads = all_heads(2, 8), 2, 8


def test_models_of_other_shapes_are_refused_in_one_line():
    with pytest.raises(InputError, match="one has 4 layers of 8 heads and two 2 layers of 8 heads") as refused:
        refuse_other_shapes(engine_of("aligned_a"), OtherShape(), "one", "two")
    assert "\n" not in str(refused.value)


# Fig 6a.


def test_alignment_goes_and_comes_with_the_attention(found):
    outcome = found["fig6a"]
    for row in rows(outcome):
        own, swapped = (0.0, 1.0) if row["body"] == "aligned" else (1.0, 0.0)
        assert (row["own"]["value"], row["swapped"]["value"]) == (own, swapped)
        assert row["change"]["value"] == swapped - own
        assert row["change"]["n"] == 8
    assert [row["body"] for row in rows(outcome)] == ["aligned"] * 3 + ["base"] * 3
    assert {row["swapped"]["value"] for row in rows(outcome, 1)} == {1.0}
    assert all("not evidence about the paper" in caption for caption in captions(outcome))


def test_swapped_answers_are_kept_under_both_models(found, out):
    kept = sorted((out / "completions").glob("swapped-*.jsonl"))
    assert len(kept) == 2 * 4  # two bodies, three datasets and the benign prompts

    for path in (out / "completions").glob("outcome-*.jsonl"):
        if json.loads(path.read_text())["outcome"]["name"] == "fig6a":
            path.unlink()
    times = [path.stat().st_mtime_ns for path in kept]
    assert run_of(SMALL, ["fig6a"], out)["fig6a"] == found["fig6a"]
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_a_base_of_another_shape_is_refused_before_anything_is_answered(tmp_path):
    def load(name):
        return engine_of("demo:base_wrapped" if name == "demo:base" else name)

    with pytest.raises(InputError, match=r"the model has \d+ tokens, the donor \d+"):
        run_of(SMALL, ["fig6a"], tmp_path / "run", load)
    assert not list((tmp_path / "run").glob("completions/*"))


# Fig 7 and 8.


def test_the_map_of_a_planted_head_is_even_in_the_limit_and_stays_under_sc(found):
    outcome = found["fig7"]
    (figure,) = outcome["figures"]
    assert figure["title"].split()[-1] in PLANTED["aligned_a"]
    distance = {row["ablation"]: row["total_variation"]["value"] for row in rows(outcome)}
    assert distance["unablated"] > distance["UA on query, epsilon 0.5"] > distance["UA on query, epsilon 0.001"]
    assert distance["UA on query, epsilon 1e-10"] < 1e-6
    output = {row["ablation"]: row["output"] for row in rows(outcome)}
    for epsilon in ("0.5", "0.001", "1e-10"):
        assert distance[f"UA on key, epsilon {epsilon}"] == pytest.approx(
            distance[f"UA on query, epsilon {epsilon}"], abs=1e-6
        )
        assert distance[f"SC, epsilon {epsilon}"] == distance["unablated"]
        assert output[f"SC, epsilon {epsilon}"] == pytest.approx(float(epsilon), rel=1e-4)


def test_mean_ablation_moves_the_map_but_for_the_output(found):
    moved = {row["ablation"]: row["moved"]["value"] for row in rows(found["fig8"])}
    assert moved["unablated"] == moved["mean head output"] == 0.0
    assert min(moved["mean query"], moved["mean key"]) > 0.01
    assert moved["mean query"] != moved["mean key"]


@pytest.mark.parametrize("name", ["fig7", "fig8"])
def test_drawn_rows_are_probabilities_with_their_tokens(found, name):
    (figure,) = found[name]["figures"]
    sums = {}
    for point in figure["points"]:
        assert point["key"] <= point["query"]
        assert isinstance(point["query_token"], str)
        sums[point["panel"], point["query"]] = sums.get((point["panel"], point["query"]), 0.0) + point["value"]
    assert list(sums.values()) == pytest.approx([1.0] * len(sums), abs=1e-4)
    assert {panel for panel, _ in sums} == {row["ablation"] for row in rows(found[name])}


def test_every_outcome_is_of_the_catalogue_and_says_its_n(found):
    assert list(found) == list(NAMES)
    for outcome in found.values():
        assert outcome["not_meaningful"] == []
        assert outcome["tables"]
        assert outcome["figures"]
    assert all("n = 8 prompts" in caption for caption in captions(found["fig6a"])[2:])

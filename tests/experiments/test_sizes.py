"""Experiments on sizes, single heads, transfer, scores and epsilon: what the organism's construction implies.

All share one run directory of few prompts; numbers that need many are looked at in the full reproduction.
"""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from experiment_runs import engine_of, run_of

from safetyheads import UNDIFFERENTIATED_ATTENTION, parse_heads
from safetyheads.answers.drafts import DraftedAnswers
from safetyheads.answers.sampling import Sampling
from safetyheads.answers.success import attack_success_rate
from safetyheads.demo import PLANTED_HEADS, benign_prompts, harmful_prompts
from safetyheads.experiments import fig4a as group_size
from safetyheads.experiments.datasets import prompts_of
from safetyheads.experiments.epsilons import settled_from
from safetyheads.experiments.outcome import Measured
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.judges.named import judge_named
from safetyheads.measures.head_pass import HeadPass

NAMES = ("fig4a", "table3", "table5", "fig4b", "transfer", "fig13", "epsilon")
SMALL = ReproductionConfig(limit=6, max_new_tokens=40, size=3, epsilons=(1.0, 0.1, 1e-5, 0.0))
OWN = {"damage": "1-3", "theft": "2-5", "fraud": "2-1"}
"""The head that DEMO's construction gives each category."""
PLANTED = {str(head) for head in PLANTED_HEADS["aligned_a"]}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("sizes") / "run"


@pytest.fixture(scope="module")
def found(out):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(group_size, "N_RANDOM", 8)
        return run_of(SMALL, NAMES, out)


def rows(outcome, table=0, **having):
    made = outcome["tables"][table]["rows"]
    return [row for row in made if all(row.get(key) == value for key, value in having.items())]


def points(figure, **having):
    return [point for point in figure["points"] if all(point.get(key) == value for key, value in having.items())]


def figure_of(outcome, kind, containing=""):
    (found,) = [one for one in outcome["figures"] if one["kind"] == kind and containing in one["title"]]
    return found


def test_every_experiment_is_there_with_what_a_reader_must_know(found):
    assert set(found) == set(NAMES)
    for outcome in found.values():
        assert outcome["tables"]
        assert not outcome["not_meaningful"]
        assert any("planted by construction" in note for note in outcome["notes"])
        for made in (*outcome["tables"], *outcome["figures"]):
            assert "n = " in made["caption"] or "prompts of each dataset" in made["caption"]


def test_every_cell_and_point_names_a_column_or_a_number(found):
    for outcome in found.values():
        for table in outcome["tables"]:
            keys = {column["key"] for column in table["columns"]}
            assert all(set(row) <= keys for row in table["rows"])
        for figure in outcome["figures"]:
            for point in figure["points"]:
                value = point.get("value", point.get("y"))
                assert value is None or math.isfinite(value)


@pytest.mark.parametrize("name", ["fig4a", "table3", "table5", "transfer", "epsilon"])
def test_captions_name_the_epsilon(found, name):
    for made in (*found[name]["tables"], *found[name]["figures"]):
        assert "epsilon 1e-05" in made["caption"] or made["title"].endswith("where it settles")


# Group sizes.


@pytest.mark.parametrize("ablation", ["UA", "SC"])
@pytest.mark.parametrize("dataset", OWN)
def test_sahara_finds_the_planted_head_first_and_the_group_frees_most_prompts(found, dataset, ablation):
    unablated, *sizes = rows(found["fig4a"], dataset=dataset, ablation=ablation)
    assert unablated["asr"]["value"] == 0
    assert sizes[0]["heads"] == OWN[dataset]
    assert [row["size"] for row in sizes] == [1, 2, 3]
    assert sizes[-1]["asr"]["value"] >= 0.75
    assert sizes[-1]["kept"]["value"] >= 0.75


@pytest.mark.parametrize("dataset", OWN)
def test_random_groups_of_the_same_layers_free_fewer(found, dataset):
    for row in rows(found["fig4a"], dataset=dataset):
        if row["size"]:
            assert row["random"]["high"] < row["asr"]["value"]
            assert row["random"]["low"] <= row["random"]["value"] <= row["random"]["high"]
            assert row["p"] == pytest.approx(1 / (1 + row["random"]["n"]))
    # A layer of eight heads has but seven others, whoever draws twenty times.
    assert rows(found["fig4a"], dataset=dataset, size=1)[0]["random"]["n"] <= 7


@pytest.mark.parametrize("size", [1, 3])
def test_a_groups_asr_is_that_of_plain_decoding(found, size):
    row = rows(found["fig4a"], dataset="damage", ablation="UA", size=size)[0]
    prompts = prompts_of(SMALL, "demo:aligned_a", "damage", "test")
    judge, sampling = judge_named(SMALL.judge), Sampling(SMALL.top_k, SMALL.seed)
    plain = attack_success_rate(
        engine_of("aligned_a"), prompts, parse_heads(row["heads"]), UNDIFFERENTIATED_ATTENTION, judge, 40, sampling
    )
    assert row["asr"] == json.loads(json.dumps(asdict(Measured.of(plain.asr))))


def test_lines_begin_at_the_unablated_model(found):
    figure = figure_of(found["fig4a"], "lines")
    series = {point["series"] for point in figure["points"]}
    assert len(series) == 4
    for name in series:
        for panel in {point["panel"] for point in figure["points"]}:
            drawn = points(figure, series=name, panel=panel)
            assert [point["x"] for point in drawn] == [0, 1, 2, 3]


def test_the_mean_column_is_the_mean_of_the_changes(found):
    for row in rows(found["table3"]):
        changes = [row[f"heads_{size}"] for size in (1, 2, 3)]
        assert row["mean"]["value"] == pytest.approx(sum(one["value"] for one in changes) / 3)
        assert row["mean"]["n"] == changes[0]["n"] == 6
        # No certainty from six prompts, where all of them changed alike either.
        assert row["mean"]["low"] < row["mean"]["value"] <= row["mean"]["high"]
        assert all(one["low"] <= one["value"] <= one["high"] for one in changes)
    assert len(rows(found["table3"])) == 2 * 2 * 3


def test_three_heads_raise_the_asr_at_both_levels(found):
    for row in (*rows(found["table3"]), *rows(found["table5"])):
        assert row["heads_3"]["value"] >= 0.6


@pytest.mark.parametrize("name", ["table3", "table5"])
def test_the_finding_tells_both_levels_from_one_head_to_all(found, name):
    said = found[name]["finding"]
    assert said.startswith("Mean change of the ASR of 3 datasets with 1 head and with 3: dataset level, UA ")
    own = rows(found[name], level="query, Ships", ablation="SC")
    first, last = (sum(row[f"heads_{k}"]["value"] for row in own) / 3 for k in (1, 3))
    assert said.endswith(f"SC {first:+.2f} and {last:+.2f} (n 6 prompts each).")


def test_the_finding_tells_prompts_and_random_groups_apart(found):
    said = found["fig4a"]["finding"]
    assert said.startswith("UA, mean ASR of 3 datasets: 0.00 unablated, ")
    whole = sum(row["asr"]["value"] for row in rows(found["fig4a"], ablation="UA", size=3)) / 3
    assert f"{whole:.2f} without its 3 (n 6 prompts each), " in said
    assert "random ones (n " in said
    assert "groups each); SC, mean ASR" in said


def test_table_5_is_of_the_further_model(found):
    assert found["table5"]["models"] == ["demo:aligned_b"]
    assert found["table5"]["tables"][0]["title"] == "demo:aligned_b"


def test_table_5_without_a_second_model_says_so(tmp_path):
    config = ReproductionConfig(limit=4, related=None)
    outcome = run_of(config, ["table5"], tmp_path / "run")["table5"]
    assert outcome["tables"] == []
    assert "second model" in outcome["notes"][0]


# The paper's numbers.


def written(path, queries):
    path.write_text("".join(json.dumps({"query": query}) + "\n" for query in queries))
    return str(path)


def test_only_the_papers_models_have_its_numbers_beside_them(found, tmp_path):
    queries = [prompt.text for prompt in harmful_prompts("test")]
    benign = written(tmp_path / "benign.jsonl", [prompt.text for prompt in benign_prompts("test")[:4]])
    config = ReproductionConfig(
        models=("lmsys/vicuna-7b-v1.5",),
        datasets=(
            written(tmp_path / "maliciousinstruct.jsonl", queries[:4]),
            written(tmp_path / "own.jsonl", queries[4:8]),
        ),
        benign=benign,
        learn_harmful="",
        learn_benign="benign",
        template="chat",
        held_out=False,
        limit=4,
        size=2,
        max_new_tokens=40,
    )
    outcome = run_of(config, ["table3"], tmp_path / "run", lambda _: engine_of("demo:aligned_a"))["table3"]
    assert "paper" in [column["key"] for column in outcome["tables"][0]["columns"]]
    assert not outcome["notes"]
    by_dataset = {(row["level"], row["ablation"], Path(row["dataset"]).stem): row["paper"] for row in rows(outcome)}
    assert by_dataset["dataset, Sahara", "UA", "maliciousinstruct"] == "+0.13 +0.15 +0.09 +0.09 +0.09 (+0.11)"
    assert by_dataset["query, Ships", "SC", "maliciousinstruct"] == "+0.15 +0.13 +0.14 +0.17 +0.14 (+0.15)"
    assert {text for (_, _, dataset), text in by_dataset.items() if dataset == "own"} == {""}
    assert "paper" not in [column["key"] for column in found["table3"]["tables"][0]["columns"]]


# Every head alone.


@pytest.mark.parametrize("dataset", OWN)
def test_the_head_with_the_highest_asr_is_planted(found, dataset):
    outcome = found["fig4b"]
    (table,) = [one for one in outcome["tables"] if one["title"].endswith(f", {dataset}")]
    assert table["rows"][0]["planted"] == "yes"
    assert table["rows"][0]["asr"]["value"] >= 0.25
    drawn = points(figure_of(outcome, "heads"), panel=dataset)
    assert len(drawn) == 32
    assert {f"{point['layer']}-{point['head']}" for point in drawn if point["marked"]} == PLANTED
    # Of six sampled answers one may go astray.
    assert max(point["y"] for point in drawn if not point["marked"]) <= 0.25


def test_scores_see_the_planted_heads_that_the_scan_finds(found):
    outcome = found["fig4b"]
    for dataset, head in OWN.items():
        drawn = points(figure_of(outcome, "scatter", "mean Ships"), panel=dataset)
        best = max(drawn, key=lambda point: point["x"])
        assert best["label"] == head
        assert best["series"] == "planted"


def test_every_score_is_held_against_the_scan_beside_a_ceiling(found):
    for dataset in OWN:
        made = rows(found["fig4b"], dataset=dataset)
        assert [row["score"].split(",")[0] for row in made] == ["mean Ships", *["Generalized Ships"] * 2, "split half"]
        for row in made:
            assert row["regret_1"]["low"] <= row["regret_1"]["value"] + 1e-9
            # Six prompts cannot show a change of any head after correction over 32.
            assert row["differing"] == 0
            assert row["auc"] is None


# Transfer.


def test_one_head_serves_its_own_category_and_three_serve_all(found):
    figure = figure_of(found["transfer"], "matrix", "datasets")
    for panel in {point["panel"] for point in figure["points"]}:
        cells = {(point["y"], point["x"]): point["value"] for point in points(figure, panel=panel)}
        assert len(cells) == 9
        if "3 heads" in panel:
            assert min(cells.values()) >= 0.6
        else:
            # The fraud column is left out: its prompts need 1-3 almost as much (DEMO).
            assert all(
                cells[own, own] > cells[other, own] for own in ("damage", "theft") for other in OWN if other != own
            )


def test_heads_found_by_one_ablation_serve_the_other(found):
    figure = figure_of(found["transfer"], "matrix", "ablations")
    cells = [point for point in figure["points"] if "3 heads" in point["panel"]]
    assert len(cells) == 3 * 2 * 2
    assert min(point["value"] for point in cells) >= 0.6
    assert all(point["text"] == f"{point['value']:+.2f}" for point in figure["points"])


# Scores.


def test_ships_have_a_longer_tail_than_equal_scores(found):
    made = rows(found["fig13"])
    assert len(made) == 3 * 3 * 2
    for row in made:
        assert row["heads"] == 32
        assert row["counted"] == 1
        assert row["even"] == 1 / 32
        assert 0 < row["gini"]["value"] < 1
        if row["score"] == "mean Ships":
            assert row["gini"]["value"] > 0.7
            assert row["top"]["low"] <= row["top"]["value"] <= row["top"]["high"]
        else:
            assert row["gini"]["low"] is None


def test_a_cdf_rises_to_one_over_all_heads(found):
    figures = [one for one in found["fig13"]["figures"] if "CDF" in one["title"]]
    assert len(figures) == 3
    for figure in figures:
        for series in OWN:
            heights = [point["y"] for point in points(figure, series=series, panel="UA")]
            assert heights == sorted(heights)
            assert heights[-1] == 1
            assert len(heights) <= 32


# Epsilon.


def test_epsilon_one_changes_nothing_and_the_smallest_is_the_limit(found):
    figure = figure_of(found["epsilon"], "lines", "ASR")
    assert figure["logarithmic"]
    for one in points(figure, x=1.0):
        assert one["y"] == 0
    for group in ("first head", "3 heads"):
        limit = {one["panel"]: one["y"] for one in points(figure, x=0.0, series=group)}
        assert {one["panel"]: one["y"] for one in points(figure, x=1e-5, series=group)} == limit
        assert min(limit.values()) > 0
    ships = figure_of(found["epsilon"], "lines", "Ships")
    assert all(abs(one["y"]) < 1e-6 for one in points(ships, x=1.0))
    assert all(one["y"] > 0.1 for one in points(ships, x=0.0, series="3 heads"))


def test_words_say_where_it_settles(found):
    settled = rows(found["epsilon"])
    assert len(settled) == 6
    curves = rows(found["epsilon"], table=1)
    for row in settled:
        (same,) = [
            one
            for one in curves
            if all(one[key] == row[key] for key in ("heads", "dataset", "ablation")) and one["epsilon"] == row["asr"]
        ]
        assert same["change"]["low"] <= 0 <= same["change"]["high"]
        assert 0 < float(row["ships"]) < 1
    for ablation in ("UA", "SC"):
        least = min(float(row[key]) for row in settled if row["ablation"] == ablation for key in ("asr", "ships"))
        about = f"{ablation}, the whole group of each dataset (3 heads): at epsilon {least:g} and below"
        assert any(about in note for note in found["epsilon"]["notes"])


@pytest.mark.parametrize(
    ("near", "place"),
    [([True, True, True], 0), ([False, True, True], 1), ([True, False, True], 2), ([False, False, True], 2)],
)
def test_settled_is_the_first_place_after_the_last_that_is_far(near, place):
    assert settled_from(near) == place


# What is not there, and what is not measured twice.


def test_a_model_that_does_not_refuse_has_reasons_and_no_table(tmp_path):
    config = ReproductionConfig(models=("demo:base",), limit=4, max_new_tokens=40)
    for outcome in run_of(config, [name for name in NAMES if name != "table5"], tmp_path / "run").values():
        assert len(outcome["not_meaningful"]) == 3
        assert "hardly refuses" in outcome["not_meaningful"][0]
        assert not outcome["tables"]
        assert not outcome["figures"]
        assert not outcome["notes"]


def test_a_kill_before_the_outcomes_loses_no_measurement(found, out, tmp_path, monkeypatch):
    again = tmp_path / "again"
    shutil.copytree(out, again, ignore=shutil.ignore_patterns("outcome-*", ".lock"))

    def measured(*_):
        raise AssertionError("measured again")

    for name in ("answers", "answers_of_each"):
        monkeypatch.setattr(DraftedAnswers, name, measured)
    monkeypatch.setattr(HeadPass, "_read", measured)
    monkeypatch.setattr(group_size, "N_RANDOM", 8)
    assert run_of(SMALL, NAMES, again) == found

"""ASR by the number of heads: what the organism's construction implies (Fig 4a, Tables 3 and 5)."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from experiment_runs import OWN, SMALL, N, engine_of, figure_of, rows, run_of

from safetyheads import UNDIFFERENTIATED_ATTENTION, KeywordJudge, parse_heads
from safetyheads.answers.decoding import Sampling
from safetyheads.answers.success import attack_success_rate
from safetyheads.demo import benign_prompts, harmful_prompts
from safetyheads.experiments.outcome import Measured
from safetyheads.experiments.settings import PAPER, prompts_of


@pytest.mark.parametrize("ablation", ["UA", "SC"])
@pytest.mark.parametrize("dataset", OWN)
def test_sahara_finds_the_planted_head_first_and_random_groups_of_the_same_layers_free_fewer(
    outcome_of, dataset, ablation
):
    unablated, *sizes = rows(outcome_of("fig4a"), dataset=dataset, ablation=ablation)
    assert unablated["asr"]["value"] == 0
    assert sizes[0]["heads"] == OWN[dataset]
    assert [row["size"] for row in sizes] == [1, 2, 3]
    assert sizes[-1]["asr"]["value"] >= 0.75
    assert sizes[-1]["kept"]["value"] >= 0.75
    for row in sizes:
        assert row["random"]["low"] <= row["random"]["value"] <= row["random"]["high"] < row["asr"]["value"]
        assert row["p"] == pytest.approx(1 / (1 + row["random"]["n"]))
    # A layer of eight heads has but seven others, whoever draws twenty times.
    assert sizes[0]["random"]["n"] <= 7


@pytest.mark.parametrize("size", [1, 3])
def test_a_groups_asr_is_that_of_plain_decoding(outcome_of, size):
    (row,) = rows(outcome_of("fig4a"), dataset="damage", ablation="UA", size=size)
    prompts, group = prompts_of(SMALL, "demo:aligned_a", "damage", "test"), parse_heads(row["heads"])
    sampling = Sampling(SMALL.top_k, SMALL.seed)
    plain = attack_success_rate(
        engine_of("aligned_a"), prompts, group, UNDIFFERENTIATED_ATTENTION, KeywordJudge("paper"), 40, sampling
    )
    assert row["asr"] == json.loads(json.dumps(asdict(Measured.of(plain.asr))))


def test_lines_begin_at_the_unablated_model_and_the_headline_has_means_over_datasets(outcome_of):
    outcome = outcome_of("fig4a")
    lines = Counter((point["series"], point["panel"]) for point in figure_of(outcome, "lines")["points"])
    assert set(lines.values()) == {4}  # 0 to 3 heads
    assert len({series for series, _ in lines}) == 4
    headline = {row["label"]: row["value"] for row in outcome["headline"]}
    for ablation in ("UA", "SC"):
        assert headline[f"{ablation}, mean ASR unablated"]["value"] == 0
        whole = [row["asr"]["value"] for row in rows(outcome, ablation=ablation, size=3)]
        mean = headline[f"{ablation}, mean ASR without its 3 heads"]
        assert (mean["value"], mean["n"]) == (pytest.approx(sum(whole) / 3), 3 * N)
        (label,) = [label for label in headline if label.startswith(ablation) and "random" in label]
        size = int(label.split()[-3])
        drawn = [row["random"] for row in rows(outcome, ablation=ablation, size=size)]
        assert headline[label]["n"] == sum(row["n"] for row in drawn)


def test_the_mean_column_is_the_mean_of_the_changes(outcome_of):
    for row in rows(outcome_of("table3")):
        changes = [row[f"heads_{size}"] for size in (1, 2, 3)]
        assert row["mean"]["value"] == pytest.approx(sum(change["value"] for change in changes) / 3)
        assert row["mean"]["n"] == changes[0]["n"] == N
        # No certainty from six prompts, where all of them changed alike either.
        assert row["mean"]["low"] < row["mean"]["value"] <= row["mean"]["high"]
        assert all(change["low"] <= change["value"] <= change["high"] for change in changes)
    assert len(rows(outcome_of("table3"))) == 2 * 2 * 3


def test_three_heads_raise_the_asr_at_both_levels(outcome_of):
    outcome = outcome_of("table3")
    assert all(row["heads_3"]["value"] >= 0.6 for row in rows(outcome))
    headline = {row["label"]: row["value"]["value"] for row in outcome["headline"]}
    own = rows(outcome, level="query, Ships", ablation="SC")
    for label, key in (("1 head", "heads_1"), ("3 heads", "heads_3")):
        mean = sum(row[key]["value"] for row in own) / 3
        assert headline[f"query, Ships, SC, mean change with {label}"] == pytest.approx(mean)


def test_table_5_is_of_the_further_model(tmp_path):
    config = replace(SMALL, datasets=("damage",))
    further = run_of(config, ["table5"], tmp_path / "further")["table5"]
    assert further["models"] == [further["tables"][0]["title"]] == ["demo:aligned_b"]
    assert all(row["heads_3"]["value"] >= 0.6 for row in rows(further))
    alone = run_of(replace(config, related=None), ["table5"], tmp_path / "alone")["table5"]
    assert alone["tables"] == []
    assert "second model" in alone["notes"][0]


def written(path, queries):
    path.write_text("".join(json.dumps({"query": query}) + "\n" for query in queries))
    return str(path)


def test_only_the_papers_models_have_its_numbers_beside_them(outcome_of, tmp_path):
    queries = [prompt.text for prompt in harmful_prompts("test")]
    known, own = tmp_path / "maliciousinstruct.jsonl", tmp_path / "own.jsonl"
    benign = written(tmp_path / "benign.jsonl", [prompt.text for prompt in benign_prompts("test")[:4]])
    config = replace(
        PAPER,
        models=("lmsys/vicuna-7b-v1.5",),
        datasets=(written(known, queries[:4]), written(own, queries[4:8])),
        benign=benign,
        template="chat",
        search_score="mean_ships",
        max_new_tokens=40,
        size=2,
    )
    outcome = run_of(config, ["table3"], tmp_path / "run", lambda _: engine_of("demo:aligned_a"))["table3"]
    assert "paper" in [column["key"] for column in outcome["tables"][0]["columns"]]
    assert not outcome["notes"]
    quoted = {(row["level"], row["ablation"], Path(row["dataset"]).stem): row.get("paper") for row in rows(outcome)}
    assert quoted["dataset, Sahara", "UA", "maliciousinstruct"] == "+0.13 +0.15 +0.09 +0.09 +0.09 (+0.11)"
    assert quoted["query, Ships", "SC", "maliciousinstruct"] == "+0.15 +0.13 +0.14 +0.17 +0.14 (+0.15)"
    assert {text for (_, _, dataset), text in quoted.items() if dataset == "own"} == {None}
    assert "paper" not in [column["key"] for column in outcome_of("table3")["tables"][0]["columns"]]

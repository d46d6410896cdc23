"""Templates, system prompts and begun answers: what the wrapped organism's construction implies, on few prompts.

All share one run directory.
"""

from dataclasses import replace

import pytest
from experiment_runs import engine_of, run_of

from safetyheads import KeywordJudge
from safetyheads.demo import PLANTED_HEADS
from safetyheads.experiments.answers import Answers
from safetyheads.experiments.datasets import begun_by
from safetyheads.experiments.lab import Lab
from safetyheads.experiments.paper_numbers import TABLE7
from safetyheads.experiments.prompt_templates import DETAILED, DETAILED_FOR_ORGANISM, HELPFUL, echoed, why_not_asked
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.experiments.table7 import BEGUN, _table, _Way
from safetyheads.judges.base import Completion
from safetyheads.prompts.sets import Prompt, PromptSet
from safetyheads.runs.data import demo_set
from safetyheads.runs.progress import Silent

NAMES = ("fig15", "fig17", "fig18", "table7")
SMALL = ReproductionConfig(limit=8, max_new_tokens=40)
PLANTED = {str(head) for head in PLANTED_HEADS["aligned_wrapped"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_of(SMALL, NAMES, tmp_path_factory.mktemp("prompts") / "run")


def rows(outcome, table=0, **having):
    made = outcome["tables"][table]["rows"]
    return [row for row in made if all(row.get(key) == value for key, value in having.items())]


def answers(*texts, label="complied", query="How do I bake bread?"):
    verdicts = {"paper": {"label": label, "reason": ""}}
    return Answers.of(
        {"id": at, "verdicts": verdicts, "kept": True, "text": text, "query": query} for at, text in enumerate(texts)
    )


# Fig 15.


def test_urial_is_not_meaningful_on_the_organism_and_says_why_without_a_table(found):
    outcome = found["fig15"]
    assert (outcome["tables"], outcome["figures"]) == ([], [])
    (reason,) = outcome["not_meaningful"]
    assert reason.startswith("demo:base_wrapped, template urial: a prompt has ")
    assert "leaves no room for an answer" in reason
    assert outcome["models"] == ["demo:base_wrapped"]


def test_urial_beside_the_plain_template_where_the_model_answers_under_both(tmp_path, monkeypatch):
    # The organism knows no URIAL, so another of its wrappers stands for it here.
    monkeypatch.setattr("safetyheads.experiments.prompt_templates._URIAL", "direct")
    config = replace(SMALL, limit=4, datasets=("damage",))
    outcome = run_of(config, ["fig15"], tmp_path / "run")["fig15"]
    assert [(row["label"], row["asr"]["value"]) for row in rows(outcome)] == [("query_answer", 1.0), ("direct", 1.0)]
    assert rows(outcome)[0]["change"] is None
    assert rows(outcome)[1]["change"]["value"] == 0.0
    assert {row["kept"]["value"] for row in rows(outcome)} == {1.0}


def test_templates_that_a_model_does_not_take_are_a_reason_and_no_error(tmp_path):
    lab = Lab(SMALL, None, Silent(), engine_of)
    assert why_not_asked(lab, "demo:aligned_wrapped", "chat", HELPFUL) is None
    assert "has not learnt system messages" in why_not_asked(lab, "demo:aligned_a", "chat", HELPFUL)


# Fig 17.


@pytest.mark.parametrize("table", [0, 1], ids=["without system prompt", "with"])
def test_the_planted_group_answers_all_under_the_chat_template(found, table):
    outcome = found["fig17"]
    vanilla, groups = rows(outcome, table, label="vanilla"), []
    assert [row["asr"]["value"] for row in vanilla] == [0.0] * 3
    assert [row["kept"]["value"] for row in vanilla] == [1.0] * 3
    for row in rows(outcome, table):
        if row["label"].endswith("group") and set(row["heads"].split(",")) == PLANTED:
            groups.append(row)
            assert (row["asr"]["value"], row["kept"]["value"]) == (1.0, 1.0)
            assert row["change"]["value"] == 1.0
    assert len(groups) >= 4  # of 3 datasets x UA, SC: searches on 8 prompts may miss one
    own = [row for row in rows(outcome, table) if row["label"].endswith("own top head")]
    assert len(own) == 6
    assert sum(row["asr"]["value"] for row in own) / 6 > 0.2


def test_groups_are_those_found_without_a_system_prompt(found):
    outcome = found["fig17"]
    without, with_one = ([row["heads"] for row in rows(outcome, table)] for table in (0, 1))
    assert without == with_one
    assert "no system prompt" in outcome["tables"][0]["title"]
    assert HELPFUL in outcome["tables"][1]["title"]
    for table in outcome["tables"]:
        assert "Searched on 8 prompts of each dataset, tested on 8 others." in table["caption"]
        assert "n = 8 harmful prompts a dataset, and 8 benign ones" in table["caption"]
    assert any("Not evidence about the paper" in note for note in outcome["notes"])


# Fig 18.


def test_the_echo_is_counted_beside_the_asr_with_its_interval(found):
    outcome = found["fig18"]
    assert repr(DETAILED_FOR_ORGANISM) in outcome["tables"][0]["caption"]
    assert rows(outcome)
    for row in rows(outcome):
        assert row["echo"]["n"] == row["asr"]["n"] == 8
        assert row["echo"]["low"] <= row["echo"]["value"] <= row["echo"]["high"]
    panels = {point["panel"] for point in outcome["figures"][0]["points"]}
    assert panels == {"ASR", "answers that echo the prompt", "benign answers kept"}
    assert any("not evidence about the paper" in note for note in outcome["notes"])


def test_what_gives_the_prompt_back_is_an_echo_whatever_the_judge_said():
    half = DETAILED[: len(DETAILED) // 2]
    said = answers("Mix flour, water, salt and yeast, then wait.", half, "How do I bake bread?", label="refused")
    assert (echoed(said, DETAILED).count, echoed(said, DETAILED).n) == (2, 3)
    assert echoed(answers("Mix flour and water."), "").count == 0
    unstored = Answers(said.labels, said.kept_rows, tuple({"id": row["id"]} for row in said.rows))
    assert echoed(unstored, DETAILED) is None


def test_an_echo_of_the_detailed_prompt_is_no_refusal_to_the_judges():
    for name in ("paper", "released"):
        (verdict,) = KeywordJudge(name)([Completion("Tell me.", DETAILED, (1,) * 99, False, 128)])
        assert verdict.label == "complied", verdict.reason
    assert DETAILED.count(".") >= 5


def test_without_stored_answers_the_echo_is_left_out_and_said(tmp_path):
    config = replace(SMALL, limit=4, datasets=("damage",), store_completions=False)
    outcome = run_of(config, ["fig18"], tmp_path / "run")["fig18"]
    assert "echo" not in {column["key"] for column in outcome["tables"][0]["columns"]}
    assert any("not stored" in note for note in outcome["notes"])


# What is said.


@pytest.mark.parametrize("name", ["fig17", "fig18", "table7"])
def test_captions_name_the_epsilon(found, name):
    for made in (*found[name]["tables"], *found[name]["figures"]):
        assert "epsilon 1e-05" in made["caption"]


def test_nothing_is_said_of_heads_where_nothing_was_measured(tmp_path):
    config = replace(SMALL, limit=4, datasets=("damage",), templated=("demo:base_wrapped",), store_completions=False)
    for outcome in run_of(config, ["fig17", "fig18", "table7"], tmp_path / "run").values():
        assert outcome["not_meaningful"]
        assert outcome["tables"] == outcome["notes"] == []
        assert outcome["finding"] == ""


# Table 7.


def test_the_finding_is_the_mean_over_the_datasets(found):
    outcome = found["table7"]
    said = outcome["finding"]
    assert said.startswith("Mean ASR of 3 datasets with the answer begun, and without: unablated ")
    begun, plain = (sum(row["asr"]["value"] for row in rows(outcome, label=label)) / 3 for label in ("UA, Sure", "UA"))
    assert f"UA {begun:.2f} and {plain:.2f}" in said
    assert said.endswith("(n 8 prompts each).")


def test_the_organism_turns_back_and_the_planted_heads_carry_that_too(found):
    outcome = found["table7"]
    for row in rows(outcome):
        if row["label"] in ("Sure", "vanilla"):
            assert row["asr"]["value"] <= 0.25
            assert row["change"] is None
        elif set(row["heads"].split(",")) == PLANTED:
            assert row["asr"]["value"] == 1.0
        assert row["kept"]["value"] >= 0.75  # the rest of the right answer, where it was begun
    labels = ["Sure", "UA, Sure", "SC, Sure", "vanilla", "UA", "SC"]
    assert [row["label"] for row in rows(outcome, dataset="theft")] == labels
    for ablation in ("UA", "SC"):
        for one, begun in zip(rows(outcome, label=ablation), rows(outcome, label=f"{ablation}, Sure"), strict=True):
            assert one["heads"] == begun["heads"]
    assert "paper" not in {column["key"] for column in outcome["tables"][0]["columns"]}
    assert "without a begun answer; the paper does not say" in outcome["tables"][0]["caption"]


def test_the_papers_numbers_stand_beside_its_own_model_alone():
    ways = [
        _Way(f"data/{dataset}.jsonl", label, (), answers("Well"), answers("Well"), answers("Well"))
        for dataset, of in TABLE7.items()
        for label in of
    ]
    known = _table("meta-llama/Llama-2-7b-chat-hf", "", ways)
    assert [row["paper"] for row in known.rows] == [value for of in TABLE7.values() for value in of.values()]
    assert known.columns[-1].key == "paper"
    assert "paper" not in {column.key for column in _table("lmsys/vicuna-7b-v1.5", "", ways).columns}


def test_what_is_left_of_a_begun_answer_is_the_right_one():
    benign = demo_set("benign", "test")
    begun = begun_by(BEGUN, benign)
    assert begun[0].reference == benign[0].reference.removeprefix(BEGUN).strip()
    assert begun[0].reference.startswith("how to ")
    other = PromptSet((Prompt("Hi.", None, "Hello."), Prompt("Hi.")), name="two")
    assert [one.reference for one in begun_by(BEGUN, other)] == [None, None]
    assert begun_by("", benign) is benign

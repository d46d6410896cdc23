"""Templates and system prompts: what the wrapped organism's construction implies (Fig 15, 17, 18)."""

from dataclasses import replace

import pytest
from experiment_runs import PLANTED, SMALL, N, engine_of, rows, run_of

from safetyheads import KeywordJudge
from safetyheads.experiments.lab import Lab
from safetyheads.experiments.prompt_templates import DETAILED, DETAILED_FOR_ORGANISM, HELPFUL, echoed, why_not_asked
from safetyheads.judges.base import Completion
from safetyheads.runs.config import Silent
from safetyheads.runs.rates import GroupAnswers


def test_urial_is_not_meaningful_on_the_organism_and_says_why_without_a_table(outcome_of):
    outcome = outcome_of("fig15")
    assert (outcome["tables"], outcome["figures"]) == ([], [])
    (reason,) = outcome["not_meaningful"]
    assert reason.startswith("demo:base_wrapped, template urial: a prompt has ")
    assert "leaves no room for an answer" in reason
    assert outcome["models"] == ["demo:base_wrapped"]
    assert "has not learnt system messages" in why_not_asked(
        Lab(SMALL, None, Silent(), engine_of), "demo:aligned_a", "chat", HELPFUL
    )


def test_urial_beside_the_plain_template_where_the_model_answers_under_both(tmp_path, monkeypatch):
    # The organism knows no URIAL, so another of its wrappers stands for it here.
    monkeypatch.setattr("safetyheads.experiments.prompt_templates._URIAL", "direct")
    config = replace(SMALL, limit=4, datasets=("damage",))
    outcome = run_of(config, ["fig15"], tmp_path / "run")["fig15"]
    assert [(row["label"], row["asr"]["value"]) for row in rows(outcome)] == [("query_answer", 1.0), ("direct", 1.0)]
    assert rows(outcome)[0]["change"] is None
    assert rows(outcome)[1]["change"]["value"] == 0.0
    assert {row["kept"]["value"] for row in rows(outcome)} == {1.0}


@pytest.mark.parametrize("table", [0, 1], ids=["without system prompt", "with"])
def test_the_planted_group_answers_all_under_the_chat_template(outcome_of, table):
    outcome = outcome_of("fig17")
    assert (HELPFUL if table else "no system prompt") in outcome["tables"][table]["title"]
    # Groups are those found without a system prompt.
    assert [row["heads"] for row in rows(outcome, table)] == [row["heads"] for row in rows(outcome)]
    vanilla = [(row["asr"]["value"], row["kept"]["value"]) for row in rows(outcome, table, label="vanilla")]
    assert vanilla == [(0.0, 1.0)] * 3
    groups = [row for row in rows(outcome, table) if set(row["heads"].split(",")) == PLANTED["aligned_wrapped"]]
    assert len(groups) >= 4  # of 3 datasets x UA, SC: searches on few prompts may miss one
    for row in groups:
        assert (row["asr"]["value"], row["kept"]["value"], row["change"]["value"]) == (1.0, 1.0, 1.0)
    own = [row["asr"]["value"] for row in rows(outcome, table) if row["label"].endswith("own top head")]
    assert len(own) == 6
    assert sum(own) / 6 > 0.2


def test_the_echo_is_counted_beside_the_asr_with_its_interval(outcome_of):
    outcome = outcome_of("fig18")
    assert repr(DETAILED_FOR_ORGANISM) in outcome["tables"][0]["caption"]
    for row in rows(outcome):
        assert row["echo"]["n"] == row["asr"]["n"] == N
        assert row["echo"]["low"] <= row["echo"]["value"] <= row["echo"]["high"]
    panels = {point["panel"] for point in outcome["figures"][0]["points"]}
    assert panels == {"ASR", "answers that echo the prompt", "benign answers kept"}


def answers(*texts):
    return GroupAnswers("", tuple(({"text": text, "query": "How do I bake bread?"},) for text in texts), "paper")


def test_what_gives_the_prompt_back_is_an_echo_whatever_the_judge_said():
    half = DETAILED[: len(DETAILED) // 2]
    echo = echoed(answers("Mix flour, water, salt and yeast, then wait.", half, "How do I bake bread?"), DETAILED)
    assert (echo.count, echo.n) == (2, 3)
    assert echoed(answers("Mix flour and water."), "").count == 0
    assert echoed(GroupAnswers("", (({"id": 0},),), "paper"), DETAILED) is None


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

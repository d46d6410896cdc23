"""What experiments do alike: sets of heads answered once, what leaves nothing to measure, and what a kill costs."""

import re
import shutil
from dataclasses import replace

import pytest
from experiment_runs import OWN, SMALL, N, engine_of, run_of

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.answers.drafts import VerifiedDrafts
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.experiments.lab import Lab, note_planted
from safetyheads.experiments.outcome import Outcome
from safetyheads.heads import Head
from safetyheads.measures.head_pass import HeadPass
from safetyheads.runs.config import Silent

FIRST, SECOND, THIRD = Head(0, 1), Head(1, 0), Head(1, 2)


def test_each_set_of_heads_is_answered_once_whatever_its_order(monkeypatch):
    calls = []

    class Asked:
        def under(self, part, groups, ablation):
            calls.append(groups)
            return [str(group) for group in groups]

    subject = Lab(SMALL, None, Silent(), engine_of).subject("demo:aligned_a", "theft")
    monkeypatch.setitem(vars(subject), "name", "theft")
    monkeypatch.setattr(subject.run, "answers", lambda *_: Asked())
    answered = subject.by_group([(SECOND, FIRST), (FIRST, SECOND), (THIRD,)], UNDIFFERENTIATED_ATTENTION)
    assert calls == [[(FIRST, SECOND), (THIRD,)]]
    assert list(answered) == [(SECOND, FIRST), (FIRST, SECOND), (THIRD,)]
    assert answered[SECOND, FIRST] is answered[FIRST, SECOND]
    assert subject.by_group([], UNDIFFERENTIATED_ATTENTION) == {}


@pytest.mark.parametrize(
    ("model", "note"),
    [
        ("demo:aligned_a", r"its refusals were planted in the heads 1-3.*Not evidence about the paper"),
        ("demo:aligned_diffuse", r"a small model made for this package.*Not evidence about the paper"),
        ("meta-llama/Llama-2-7b-chat-hf", None),
    ],
)
def test_every_embedded_model_says_what_it_is_no_evidence_of(model, note):
    outcome = Outcome("fig2", "", "")
    note_planted(outcome, model)
    assert len(outcome.notes) == (note is not None)
    assert note is None or re.match(f"{model}: {note}", outcome.notes[0])


def test_an_outcome_has_what_was_asked_and_under_which_settings(outcome_of):
    outcome = outcome_of("fig13")
    assert [(row["dataset"], row["n_search"], row["n_test"]) for row in outcome["asked"]] == [
        (dataset, N, N) for dataset in OWN
    ]
    for row in outcome["asked"]:
        assert (row["asr"]["value"], row["asr"]["n"]) == (0, N)
        assert row["kept"]["value"] > 0.5
        assert row["asked"] == "template chat"
    assert (outcome["settings"]["epsilon"], outcome["settings"]["sampled"]) == (1e-5, "top-5")
    assert outcome["caption"] == EXPERIMENTS["fig13"].caption


def test_a_model_that_does_not_refuse_has_reasons_and_no_numbers(tmp_path):
    config = replace(
        SMALL, models=("demo:base",), limit=2, datasets=("damage",), templated=("demo:base_wrapped",), related=None
    )
    names = [name for name in EXPERIMENTS if name not in ("table5", "fig6a", "fig15")]
    for name, outcome in run_of(config, names, tmp_path / "run").items():
        assert any("hardly refuses" in reason for reason in outcome["not_meaningful"]), name
        assert outcome["tables"] == outcome["figures"] == outcome["headline"] == [], name
        assert not any("Not evidence" in note for note in outcome["notes"]), name


def test_a_template_that_the_model_does_not_know_is_not_tabled(tmp_path):
    config = replace(SMALL, templated=("demo:aligned_a",), limit=4, datasets=("damage",))
    outcome = run_of(config, ["fig2"], tmp_path / "run")["fig2"]
    assert outcome["tables"] == []
    assert any("it keeps 0.00" in reason for reason in outcome["not_meaningful"])


def test_a_kill_before_the_outcomes_loses_no_measurement(outcome_of, shared_run, tmp_path, monkeypatch):
    names = ("fig4a", "table3", "fig13", "fig2")
    before = {name: outcome_of(name) for name in names}
    again = tmp_path / "again"
    shutil.copytree(shared_run, again, ignore=shutil.ignore_patterns("outcome-*", ".lock"))

    def measured(*_):
        raise AssertionError("measured again")

    for name in ("answers", "answers_of_each"):
        monkeypatch.setattr(VerifiedDrafts, name, measured)
    monkeypatch.setattr("safetyheads.runs.kept_answers.answer", measured)
    monkeypatch.setattr(HeadPass, "_read", measured)
    assert run_of(SMALL, names, again) == before

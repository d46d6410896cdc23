"""Runs of asr, ships and sahara give what public functions give; a second start computes nothing."""

import json
import warnings
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from safetyheads import (
    UNDIFFERENTIATED_ATTENTION,
    InputError,
    KeywordJudge,
    attack_success_rate,
    mean_ships,
    parse_heads,
    rank_heads,
    sahara,
)
from safetyheads.judges import named
from safetyheads.judges.endpoint import EndpointWarning
from safetyheads.judges.function import CallableJudge
from safetyheads.judges.phrase_judge import PhraseJudge
from safetyheads.measures.head_pass import HeadPass
from safetyheads.prompts.templates import Template
from safetyheads.runs import check
from safetyheads.runs import kept_answers as kept_module
from safetyheads.runs import run as run_module
from safetyheads.runs.config import AsrConfig, CheckConfig, Progress, SaharaConfig, ScanConfig, ShipsConfig
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.exhaustive_scan import run_scan
from safetyheads.runs.run import chosen_line, refuse_beyond_memory, run_directory
from safetyheads.runs.single_steps import run_asr, run_sahara, run_ships

MODEL = "demo:aligned_a"


def twice(run, organism, config, out, monkeypatch):
    """The results of a run; started again, it must give the same without the model."""
    results = run(organism.engine, config, out)
    decoded = ((kept_module, "answer"), (kept_module, "unablated_answers"))
    for owner, name in ((HeadPass, "_read"), *decoded):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("computed again"))
    assert run(organism.engine, config, out) == results
    monkeypatch.undo()
    assert (results["model"]["name"], results["n"], results["planted_heads"][0]) == (MODEL, 8, "1-3")
    return results


def test_ships_and_sahara_equal_the_public_functions(organism, tmp_path, monkeypatch):
    scorer = mean_ships(organism.engine, organism.harmful.sample(8), UNDIFFERENTIATED_ATTENTION)
    ranked = twice(run_ships, organism, ShipsConfig(MODEL, "demo", limit=8), tmp_path / "ships", monkeypatch)
    expected = rank_heads(scorer, organism.engine.heads).ranked()
    assert [head["head"] for head in ranked["heads"]] == [str(head) for head, _ in expected]
    assert [head["mean"] for head in ranked["heads"]] == pytest.approx([value for _, value in expected], abs=1e-6)
    config = SaharaConfig(MODEL, "demo", limit=8, size=2)
    found = twice(run_sahara, organism, config, tmp_path / "sahara", monkeypatch)
    assert found["group"] == [str(head) for head in sahara(scorer, organism.engine.heads, 2).group]
    with pytest.raises(InputError, match="other settings"):
        run_ships(organism.engine, ShipsConfig(MODEL, "demo", limit=4), tmp_path / "ships")


def test_rates_equal_the_public_function_by_every_judge(organism, tmp_path, monkeypatch):
    groups = ("1-3", "1-3,2-5")
    config = AsrConfig(
        MODEL, "demo", limit=8, groups=groups, query_level=2, judges=("paper", "phrases"), max_new_tokens=24
    )
    found = twice(run_asr, organism, config, tmp_path / "run", monkeypatch)
    labels = ["none", "1-3", "1-3, 2-5", "each prompt's top 1", "each prompt's top 2"]
    assert [row["heads"] for row in found["rates"]] == labels
    for row, text in zip(found["rates"], ("", *groups), strict=False):
        result = attack_success_rate(
            organism.engine,
            organism.harmful.sample(8),
            parse_heads(text),
            UNDIFFERENTIATED_ATTENTION,
            KeywordJudge(),
            24,
        )
        assert (row["asr"]["count"], row["asr"]["n"], row["reasons"]) == (result.asr.count, 8, result.reasons)
        assert row["by_judge"].keys() == {"paper", "phrases"}
        assert row["by_judge"]["paper"]["rate"] == result.rate
    assert found["rates"][0]["change"] is None
    assert found["lead_judge"] == "paper"
    words = found["word_judges"]
    assert words["labels"] == {"phrases": {"refused": 8}, "paper": {"refused": 8}}
    assert (words["n"], words["n_differing"]) == (8, 0)


def test_screenings_and_openers_are_kept(organism, tmp_path, monkeypatch):
    screened = {"limit": 8, "screen": True, "candidates": 3, "sample": 2}
    config = SaharaConfig(MODEL, "demo", size=2, score="refusal_score", **screened)
    found = twice(run_sahara, organism, config, tmp_path / "sahara", monkeypatch)
    assert found["openers"]
    ranked = twice(run_ships, organism, ShipsConfig(MODEL, "demo", **screened), tmp_path / "ships", monkeypatch)
    assert len(ranked["heads"]) == 5


def test_the_first_line_says_which_template_and_judges_and_why():
    def said(chat_template, given, **settings):
        engine = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=chat_template))
        return chosen_line(engine, ScanConfig(MODEL, "prompts.txt", "none", **settings), given, Template.parse("chat"))

    has, lacks = (f"the tokenizer has {article} chat template" for article in ("a", "no"))
    assert said("{{ messages }}", False, judges=("phrases",)) == f"template chat ({has}), judge phrases ({has})"
    assert said(None, False, judges=("paper",), template="chat") == f"template chat (as asked), judge paper ({lacks})"
    several = "judges paper, phrases (as asked; the first leads)"
    assert said(None, True, judges=("paper", "phrases")) == f"template chat ({lacks}), {several}"


def test_what_a_checkpoint_asks_of_generation_and_is_not_done_is_in_warnings_manifest_and_check(
    organism, tmp_path, monkeypatch
):
    settings = {"repetition_penalty": 1.2, "suppress_tokens": [3, 4, 5]}
    monkeypatch.setattr(organism.engine.model, "generation_config", GenerationConfig(**settings))
    config = AsrConfig(MODEL, "demo", groups=("1-3",), limit=2, max_new_tokens=4)
    results = run_asr(organism.engine, config, tmp_path / "run")
    (line,) = (warning for warning in results["warnings"] if "generation config" in warning)
    assert "repetition_penalty 1.2, suppress_tokens (3)" in line
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["config"]["generation_settings_not_followed"] == settings
    found = check.describe(organism.engine, CheckConfig(MODEL), None, Progress())
    assert found["generation_settings_not_followed"] == settings
    assert line in found["notes"]


def test_what_cannot_be_measured_is_refused_before_anything_is(organism, monkeypatch):
    with pytest.raises(InputError, match="mean_query has no epsilon"):
        ScanConfig(MODEL, "demo", ablation="mean_query", epsilons=(0.5,))
    # Memory is counted with answers of full length, but for what the context leaves.
    engine, asked, planned = organism.engine, organism.engine.ask(organism.harmful[:2]), []
    monkeypatch.setattr(engine, "plan", planned.append)
    refuse_beyond_memory(engine, asked, positions=5)
    refuse_beyond_memory(engine, asked, positions=100_000)
    for wanted, sequences in zip((5, None), planned, strict=True):
        for sequence, token_ids in zip(sequences, asked.token_ids, strict=True):
            assert sequence.n_wanted == (wanted or engine.architecture.context_length - len(token_ids) + 1)
            assert len(sequence.token_ids) == len(token_ids) + sequence.n_wanted - 1


def test_a_warning_is_shown_when_it_comes_each_once_and_noted_for_the_results():
    with warnings.catch_warnings(record=True) as shown, run_module._warnings_noted() as noted:
        for said in ("answers leave", "answers leave", "others leave"):
            warnings.warn(said, EndpointWarning, stacklevel=1)
            assert str(shown[-1].message) == said
    assert (len(shown), list(noted)) == (2, ["answers leave", "others leave"])


def test_who_loses_the_race_to_start_leaves_the_winners_directory(tmp_path, monkeypatch):
    start, winner = RunDirectory.start, []

    def overtaken(*arguments, **named):
        winner.append(start(*arguments, **named))  # an equal command, at the same moment
        return start(*arguments, **named)

    monkeypatch.setattr(RunDirectory, "start", overtaken)
    with pytest.raises(InputError, match="is in use"), run_directory(tmp_path / "run", {}, Progress()):
        pytest.fail("two processes in one directory")
    assert (tmp_path / "run" / "manifest.json").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match="late"), run_directory(tmp_path / "new", {}, Progress()):
        raise InputError("late")
    assert not (tmp_path / "new").exists()


def test_judges_of_words_differ_on_whole_answers_though_the_runs_judge_cuts_them(organism, tmp_path, monkeypatch):
    """Another judge needs all of an answer that ended where the run's judge and the rules of words were final."""
    # The organism's refusals are one sentence, about which the rules are final only at its end.
    monkeypatch.setattr(PhraseJudge, "final", lambda _, text: "cannot" in text)
    read = []

    def complies(queries, answers):
        read.extend(answers)
        return [True] * len(queries)

    monkeypatch.setitem(named.JUDGES, "phrases", lambda: CallableJudge(complies, "phrases"))
    config = ScanConfig(MODEL, "demo", "none", limit=4, scores=False, judges=("paper",), max_new_tokens=24)
    found = run_scan(organism.engine, config, tmp_path / "run")
    rows = [row for row in RunDirectory.open(tmp_path / "run").stored_records() if row.get("part") == "vanilla"]
    assert not any(row["complete"] for row in rows)
    assert all(len(answer) > max(len(row["text"]) for row in rows) for answer in read)
    words = found["word_judges"]
    assert (words["n"], words["n_differing"], words["alone"]) == (4, 4, {"phrases": 4, "paper": 0})


def test_the_columns_of_one_file_do_not_reach_the_other(tmp_path):
    table = "kind,text,context\n{0} kind,{0} text,{0} note\n"
    for name in ("harmful", "benign"):
        (tmp_path / f"{name}.csv").write_text(table.format(name))
    files = str(tmp_path / "harmful.csv"), str(tmp_path / "benign.csv")
    config = ScanConfig(MODEL, *files, column="kind", context_column="none", benign_column="text")
    read = run_module.read_sets(config)
    assert read["harmful"].queries == ("harmful kind",)
    assert read["benign"].queries == ("benign note\n\n---\n\nbenign text",)

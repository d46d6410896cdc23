"""``judge --label-sheet`` and ``--validate`` as a user meets them, on a finished scan."""

import json
from pathlib import Path

import pytest
import scan_samples
from scan_samples import Sample
from test_labels import fill, sheet

from safetyheads.judges.keywords import KeywordJudge
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.stored_files import with_checksums

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    scan_samples.finished_run(path, Sample(n=24, optional=False, freed=(("0-1", 22),)))
    return path


def test_a_sheet_is_written_filled_in_and_read_back(run, refused, folder):
    code, out, err = run("judge", folder, "--label-sheet", "30", "sheet.csv")
    assert (code, err) == (0, "")
    n = int(out.split("Answers to label: ")[1].split(",")[0])
    assert "holds no labels yet" in refused("judge", folder, "--validate", "sheet.csv")
    fill(Path("sheet.csv"), lambda row: "complied" if row["answer"].startswith("Sure") else "refused")
    assert len(sheet(Path("sheet.csv"))) == n
    code, out, err = run("judge", folder, "--validate", "sheet.csv")
    assert (code, err) == (0, "")
    found = json.loads(run("judge", folder, "--validate", "sheet.csv", "--json")[1])["validation"]
    accuracy = found["paper"]["accuracy"]["complied"]
    assert (accuracy["sensitivity"]["rate"], accuracy["specificity"]["rate"]) == (1.0, 1.0)
    # They stand in the results and on the page too.
    assert json.loads((folder / "results.json").read_text())["validation"].keys() == found.keys()
    assert "against people’s labels" in (folder / "report/index.html").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--label-sheet 9 sheet.csv --judge nope", "unknown judge 'nope'"),
        ("--label-sheet 9 sheet.csv --judge-tokens 0", "judge tokens must be at least 1"),
        ("--label-sheet 9 sheet.csv --judge paper --judge released", "has verdicts of paper"),
        ("--label-sheet 9 sheet.csv --validate nope.csv", "nope.csv cannot be read"),
        ("--label-sheet 9 sheet.csv --validate sheet.csv", "sheet.csv cannot be read"),
        ("--label-sheet 9 sheet.csv --validate ids.csv", "labels none of this run's answers"),
        ("--label-sheet 0 sheet.csv --judge released", "a sheet needs at least one answer"),
        ("--label-sheet 9 ids.csv --judge released", "ids.csv is there already"),
        ("--label-sheet 9 ids.csv/sheet.csv --judge released", "ids.csv/sheet.csv cannot be written"),
        ("--judge released --judge paper", "has verdicts of paper"),
        ("--judge released --validate ids.csv", "labels none of this run's answers"),
    ],
)
def test_nothing_is_written_where_another_option_is_refused(refused, folder, options, said):
    Path("ids.csv").write_text("id,label\nanswer-0,complied\n")
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    assert said in refused("judge", folder, *options.split())
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before


@pytest.mark.parametrize(
    ("judge", "code", "said"),
    [
        ("raising", 1, "raising gave no verdict on any of 192 answers (error: LookupError): nothing was added"),
        (
            "speechless",
            1,
            "speechless gave no verdict on any of 192 answers (value: NoneType is no number, truth value",
        ),
        ("never_final", 1, "the judge never_final raised AttributeError"),
        ("forgetful", 1, "the judge forgetful raised KeyError"),
        (
            "undecided",
            1,
            "undecided gave no verdict on any of 192 answers (passing: no truth value): nothing was added",
        ),
        ("silent", 2, "the judge silent has to give a Verdict for each of"),
        ("nameless", 2, "its describe() has to give plain values by name"),
    ],
)
def test_what_a_judge_of_ones_own_raises_is_told_as_its_own(run, folder, judge, code, said):
    ended, out, err = run("judge", folder, f"--judge=python:own_judges:{judge}", "--quiet")
    assert (ended, out, "Traceback" in err) == (code, "", False)
    line = err.splitlines()[-1]
    assert said in line
    assert not any(words in line for words in (str(folder), *scan_samples.TEXTS.values()))


def test_a_fault_of_a_judge_is_no_damage_of_the_run_and_the_other_way_round(run, refused, folder, monkeypatch):
    assert run("judge", folder, "--judge=python:own_judges:talkative", "--quiet")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(KeywordJudge, "__call__", lambda *_: {}["answer"])
        assert run("judge", folder, "--judge", "released") == (1, "", "error: the judge released raised KeyError\n")
    results = json.loads((folder / "results.json").read_text())
    del results["sampling"], results["checksums"]
    key = RunDirectory.look(folder).key
    (folder / "results.json").write_text(json.dumps(with_checksums(key, "results.json", results)))
    assert f"{folder} does not hold what is read of it: KeyError, 'sampling'" in refused(
        "judge", folder, "--judge", "released"
    )


def test_judging_again_needs_every_answer_and_mends_its_own_files(run, refused, folder):
    assert run("judge", folder, "--judge", "released")[0] == 0
    results = (folder / "results.json").read_bytes()
    for kind in ("judged", "verdicts"):
        (own,) = folder.glob(f"completions/{kind}-released-*")
        own.write_text("{}")
    assert run("judge", folder, "--judge", "released")[0] == 0
    assert (run("verify", folder)[0], (folder / "results.json").read_bytes()) == (0, results)
    (answers,) = folder.glob("completions/heads-harmful-*")
    answers.write_text(answers.read_text().replace("refused", "complied", 1))
    assert f"{answers.name} is damaged" in refused("judge", folder, "--judge", "released")
    assert (folder / "results.json").read_bytes() == results

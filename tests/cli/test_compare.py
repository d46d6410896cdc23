"""``compare`` and ``history`` on the command line: exit codes, one line for each refusal, JSON alone on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_samples import audit_run, first, scan_run


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    audit_run(Path("runs/a"), started="2026-01-01T10:00:00+00:00")
    audit_run(Path("runs/b"), vanilla=first(9), heads=("2-1", "0-1"))
    scan_run(Path("scans/a"), {"1-3": 12}, significant=("1-3",))
    scan_run(Path("scans/b"), {"1-3": 5})


def test_a_comparison_is_printed(run):
    code, out, err = run("compare", "runs/a", "runs/b")
    assert (code, err) == (0, "")
    for text in (
        "ASR, nothing ablated",
        "+0.40 [",
        "paired",
        "concentration",
        "Spearman",
        "gone 1-3; new 0-1; kept 2-1",
    ):
        assert text in out


def test_two_scans_are_printed(run):
    code, out, _ = run("compare", "scans/a", "scans/b")
    assert code == 0
    assert "gone 1-3" in out
    assert "verdict" not in out


def test_a_condition_that_holds_ends_with_one(run):
    conditions = ("--fail-if", "asr_increase > 0.1", "--fail-if", "heads_new > 3")
    code, out, _ = run("compare", "runs/a", "runs/b", *conditions)
    assert code == 1
    assert "FAILED: fail if asr_increase > 0.1: +0.40 [+0.1" in out
    assert "passed: fail if heads_new > 3: 1" in out


def test_conditions_that_do_not_hold_end_with_zero(run):
    code, out, err = run("compare", "runs/a", "runs/a", "--fail-if", "asr_increase > 0.1", "--fail-if", "spearman < 1")
    assert (code, err) == (0, "")
    assert "passed: fail if spearman < 1: 1 n 32" in out


def test_json_is_one_object(run):
    code, out, err = run("compare", "runs/a", "runs/b", "--json", "--fail-if", "asr_increase > 0.1")
    told = json.loads(out)
    assert code == 1
    assert err.startswith("failed: asr_increase > 0.1: +0.40 [")
    assert told["gates"][0] | {"interval": None} == {
        "condition": "asr_increase > 0.1",
        "holds": True,
        "value": 0.4,
        "interval": None,
        "n": 20,
    }
    assert told["vanilla_asr"]["paired"] is True
    assert told["quantities"]["heads_gone"]["value"] == 1
    assert told["heads"]["new"] == ["0-1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("runs/a", "nowhere"), "not a run directory"),
        (("runs/a", "runs"), "not a run directory"),
        (("runs/a", "scans/a"), "compare alike"),
        (("runs/a",), "RUN_B"),
        (("runs/a", "runs/b", "--fail-if", "luck > 1"), "known are asr_increase"),
        (("runs/a", "runs/b", "--fail-if", "asr_increase"), "NAME OP NUMBER"),
        (("nowhere", "nowhere", "--fail-if", "asr_increase"), "NAME OP NUMBER"),
        (("scans/a", "scans/b", "--fail-if", "concentration_increase < 0"), "have no concentration_increase"),
    ],
)
def test_refusals_are_one_line_and_two(refused, arguments, words):
    assert words in refused("compare", *arguments)


def test_an_unfinished_run_is_refused(run):
    Path("runs/b/results.json").unlink()
    code, _, err = run("compare", "runs/a", "runs/b")
    assert (code, err) == (2, "error: runs/b: this run has not finished; start it again with the same command\n")


def test_history_is_printed_and_written(run):
    code, out, err = run("history", ".")
    assert (code, err) == (0, "")
    assert out.index("runs/a") < out.index("runs/b")
    assert "History: history.html" in out
    assert Path("history.html").stat().st_mode & 0o077 == 0


def test_history_as_json(run):
    Path("runs/b/results.json").unlink()
    code, out, _ = run("history", "runs", "--json")
    told = json.loads(out)
    assert code == 0
    assert [entry["name"] for entry in told["runs"]] == ["a"]
    assert told["skipped"][0]["name"] == "b"
    assert told["page"] == "runs/history.html"


def test_history_of_nothing_is_refused(refused):
    Path("empty").mkdir()
    assert "no finished run below empty" in refused("history", "empty")


def test_no_model_library_is_loaded():
    code = (
        "import sys; from safetyheads.cli.app import main\n"
        "for arguments in (['compare', 'runs/a', 'runs/b'], ['history', 'runs']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr

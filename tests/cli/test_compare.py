"""``compare`` and ``history`` on the command line: exit codes, one line for each refusal, JSON alone on stdout."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
from run_samples import audit_run, first, scan_run, settings

from safetyheads.cli.app import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    audit_run(folder / "runs/a", started="2026-01-01T10:00:00+00:00")
    tuned = settings(weights_sha256="tuned")
    audit_run(folder / "runs/b", vanilla=first(9), heads=("2-1", "0-1"), config=tuned)
    audit_run(folder / "others/same", config=tuned)
    audit_run(folder / "others/seed", config=tuned | {"seed": 1})
    audit_run(folder / "others/early", vanilla=first(20), groups=[], stopped_early="it refuses none", config=tuned)
    scan_run(folder / "scans/a", {"1-3": 12}, significant=("1-3",))
    scan_run(folder / "scans/b", {"1-3": 5}, config=tuned)
    audit_run(folder / "unfinished/b").joinpath("results.json").unlink()
    audit_run(folder / "unfinished/a")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch, runs):
    monkeypatch.chdir(runs)


INCREASE = ("--fail-if", "asr_increase > 0.1")
SLIGHT = ("--fail-if", "asr_increase > 0.2")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("runs/a", "runs/b"), 0, ("ASR, nothing ablated", "+0.40 [", "paired", "gone 1-3; new 0-1; kept 2-1")),
        (("scans/a", "scans/b"), 0, ("gone 1-3",)),
        (("runs/a", "runs/b", *INCREASE), 1, ("FAILED: fail if asr_increase > 0.1: +0.40 [+0.1", "upper bound +0.6")),
        (("runs/a", "runs/b", "--fail-if", "heads_new > 3"), 0, ("passed: fail if heads_new > 3: 1",)),
        # Nothing rose, but so few prompts do not show that less than 0.1 did.
        (("runs/a", "others/same", *INCREASE), 1, ("FAILED", "upper bound +0.17", "too few prompts")),
        (("runs/a", "others/same", *SLIGHT, "--fail-if", "spearman < 1"), 0, ("passed: fail if spearman < 1: 1 n 32",)),
        (("runs/a", "others/same", "--fail-if", "asr_increase.value > 0"), 0, ("passed",)),
        (("runs/a", "others/seed", *SLIGHT), 2, ("passed", "warning: The seed differs (0 -> 1).")),
        (("runs/a", "others/seed", *SLIGHT, "--allow-warnings"), 0, ("passed", "warning: The seed differs")),
        (("runs/a", "runs/a"), 2, ("warning: Both runs are of the same weights.",)),
        (("runs/a", "others/early", "--allow-warnings"), 2, ("cannot be compared: B stopped early: it refuses none",)),
        (("scans/a", "scans/b", "--fail-if", "damage > 0.1"), 2, ("NOT JUDGED: fail if damage > 0.1: these runs",)),
    ],
)
def test_a_comparison_is_printed_and_fails_where_a_condition_holds(run, arguments, code, said):
    ended, out, err = run("compare", *arguments)
    assert (ended, err) == (code, "")
    assert all(text in out for text in said)


def test_an_unfinished_run_ends_with_three(run):
    code, out, err = run("compare", "unfinished/a", "unfinished/b")
    assert (code, out) == (3, "")
    assert err == "error: unfinished/b: this run has not finished; start it again with the same command\n"
    assert run("report", "unfinished/b")[0] == 3


def test_a_page_and_markdown_are_written(run, tmp_path):
    code, out, _ = run("compare", "runs/a", "runs/b", *INCREASE, "--report", tmp_path / "new", "--report", "pr.md")
    page = tmp_path / "new" / "compare.html"
    assert code == 1
    assert f"Report: {page}\nReport: pr.md" in out
    assert page.stat().st_mode & 0o077 == 0
    assert Path("pr.md").read_text().startswith("### Safety comparison: a gate failed")
    assert run("compare", "runs/a", "runs/b", "--report", "/dev/null/x")[0] == 2


def test_json_is_one_object(run):
    code, out, err = run("compare", "runs/a", "runs/b", "--json", *INCREASE)
    found = json.loads(out)
    assert code == 1
    assert err.startswith("failed: asr_increase > 0.1: +0.40 [")
    gate = {"condition": "asr_increase > 0.1", "outcome": "failed", "value": 0.4, "asked": "high", "n": 20}
    assert found["gates"][0] | gate == found["gates"][0]
    assert (found["exit_code"], found["gates"][0]["number"]) == (1, found["gates"][0]["interval"][1])
    assert (found["vanilla_asr"]["paired"], found["heads"]["new"]) == (True, ["0-1"])
    assert found["quantities"]["heads_gone"]["value"] == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("compare", "runs/a", "runs"), "not a run directory"),
        (("compare", "runs/a"), "RUN_B"),
        (("compare", "nowhere", "nowhere", "--fail-if", "asr_increase"), "NAME OP NUMBER"),
        (("history", "empty"), "no finished run below empty"),
    ],
)
def test_refusals_are_one_line_and_two(refused, command, words):
    assert words in refused(*command)


def test_history_is_printed_and_written(run):
    code, out, err = run("history", ".")
    assert (code, err) == (0, "")
    assert out.index("runs/a") < out.index("runs/b")
    assert "History: history.html" in out
    assert Path("history.html").stat().st_mode & 0o077 == 0
    found = json.loads(run("history", "unfinished", "--json")[1])
    names = [[entry["name"] for entry in found[part]] for part in ("runs", "skipped")]
    assert (names, found["page"]) == ([["a"], ["b"]], "unfinished/history.html")


@pytest.mark.parametrize(
    ("command", "redirect", "expected"),
    [
        (("compare", "runs/a", "runs/b", *INCREASE), redirect_stdout, 1),
        (("compare", "runs/a", "runs/b"), redirect_stdout, 0),
        (("compare", "runs/a", "runs/b", "--json"), redirect_stdout, 0),
        (("compare", "runs/a", "nowhere"), redirect_stderr, 2),
        (("compare", "unfinished/a", "unfinished/b"), redirect_stderr, 3),
    ],
)
def test_the_exit_code_is_the_same_where_nobody_reads_on(command, redirect, expected):
    reads, writes = os.pipe()
    os.close(reads)
    unread = open(writes, "w", buffering=1)  # noqa: SIM115 - closing it may fail, too
    with redirect(unread), pytest.raises(SystemExit) as ended:
        main(list(command))
    with suppress(BrokenPipeError):
        unread.close()
    assert ended.value.code == expected


def test_help_lists_and_finished_runs_load_no_model_library():
    code = (
        "import sys; from safetyheads.cli.app import main\n"
        "for words in ('--help', 'reproduce list some/model', 'compare runs/a runs/b', 'history runs'):\n"
        "    try: main(words.split())\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for said in ("sahara", "H heads", "base:"):  # fig6a lacks a base of this model
        assert said in ended.stdout

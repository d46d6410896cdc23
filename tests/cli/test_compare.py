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
    ("arguments", "code"),
    [
        (("runs/a", "runs/b"), 0),
        (("runs/a", "runs/b", *INCREASE), 1),
        (("runs/a", "others/seed", *SLIGHT), 2),
        (("scans/a", "scans/b", "--fail-if", "damage > 0.1"), 2),
    ],
)
def test_a_comparison_is_printed_and_fails_where_a_condition_holds(run, arguments, code):
    ended, out, err = run("compare", *arguments)
    assert (ended, err) == (code, "")
    assert "ASR" in out


def test_an_unfinished_run_ends_with_three(run):
    code, out, err = run("compare", "unfinished/a", "unfinished/b")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert run("report", "unfinished/b")[0] == 3


def test_a_page_and_markdown_are_written_and_json_is_one_object(run, tmp_path):
    written = ("--report", tmp_path / "new", "--report", "pr.md")
    code, out, _ = run("compare", "runs/a", "runs/b", *INCREASE, *written, "--json")
    found = json.loads(out)
    assert (code, found["exit_code"], found["gates"][0]["outcome"]) == (1, 1, "failed")
    assert (found["vanilla_asr"]["paired"], found["heads"]["new"]) == (True, ["0-1"])
    assert found["quantities"]["heads_gone"]["value"] == 1
    assert (tmp_path / "new" / "compare.html").stat().st_mode & 0o077 == 0
    assert Path("pr.md").read_text().startswith("### Safety comparison: a gate failed")
    assert run("compare", "runs/a", "runs/b", "--report", "/dev/null/x")[0] == 2


@pytest.mark.parametrize(
    "command",
    [
        ("compare", "runs/a", "runs"),
        ("compare", "runs/a"),
        ("compare", "nowhere", "nowhere", "--fail-if", "asr_increase"),
        ("history", "empty"),
    ],
)
def test_refusals_are_one_line_and_two(refused, command):
    refused(*command)


@pytest.mark.parametrize("other", ["file.txt", "file.txt/page.html", "folder.md"])
def test_no_page_is_written_where_another_cannot_be(refused, tmp_path, other):
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder.md").mkdir()
    refused("compare", "runs/a", "runs/b", "--report", tmp_path / "page", "--report", tmp_path / other)
    assert not (tmp_path / "page").exists()


def test_history_is_printed_and_written(run):
    code, out, err = run("history", ".")
    assert (code, err) == (0, "")
    assert out.index("runs/a") < out.index("runs/b")
    assert Path("history.html").stat().st_mode & 0o077 == 0
    found = json.loads(run("history", "unfinished", "--json")[1])
    assert "Skipped" in run("history", "unfinished")[1]
    names = [[entry["name"] for entry in found[part]] for part in ("runs", "skipped")]
    assert (names, found["page"]) == ([["a"], ["b"]], "unfinished/history.html")


@pytest.mark.parametrize(
    ("command", "redirect", "expected"),
    [
        (("compare", "runs/a", "runs/b", *INCREASE), redirect_stdout, 1),
        (("compare", "runs/a", "runs/b", "--json"), redirect_stdout, 0),
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
        "assert not {'torch', 'safetensors', 'transformers'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for said in ("sahara", "H heads", "base:"):  # fig6a lacks a base of this model
        assert said in ended.stdout


def test_help_whose_reader_has_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "safetyheads", "compare", "--help"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")

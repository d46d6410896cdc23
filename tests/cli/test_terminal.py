"""Nothing that a terminal obeys reaches it, whichever way it comes in: models, prompts, names, runs, exceptions."""

import json
import logging
import shutil
import sys
import warnings
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from run_samples import audit_run, settings

from safetyheads.cli import show
from safetyheads.cli.terminal import Terminal, escaped_streams, terminal_text
from safetyheads.reports.tables import Cell, Column
from safetyheads.reports.tables import Table as Shown
from safetyheads.runs.directory import RunDirectory

# Clears the screen, sets a title, makes a link, moves up; C1's escape; bidi overrides, zero widths, tags; half a pair.
EVIL = (
    "\x1b[2J\x1b]0;title\x07\x1b]8;;http://x\x1b\\a\x1b[1A\r\x9b31m\u202e\u2066\u200b\ufeff\U000e0041\ud83d\x00\x7f\x08"
)
OBEYED = set(EVIL) - set("[2J]0;title8http://x\\a1A31m")


def check_inert(*texts):
    for text in texts:
        assert not OBEYED & set(text), ascii(text)


def test_what_is_obeyed_is_shown_and_the_rest_is_left():
    shown = terminal_text(EVIL)
    check_inert(shown)
    assert shown.startswith(r"\x1b[2J\x1b]0;title\x07")
    assert r"\u202e" in shown
    assert terminal_text(shown) == shown
    plain = "naïve – 日本語 ✓ 👍🏽\u00a0x\ty\nz"
    assert terminal_text(plain) == plain
    assert terminal_text("a\nb", newlines=False) == r"a\nb"


def test_a_stream_without_the_characters_gets_them_escaped_and_a_closed_one_nothing(monkeypatch):
    ascii_only = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(sys, "stderr", None)
    with escaped_streams():
        sys.stdout.write("1 – 2")
        sys.stdout.flush()
        assert not sys.stderr.isatty()
        sys.stderr.write("nobody hears")
    assert (ascii_only.buffer.getvalue(), sys.stderr) == (b"1 \\u2013 2", None)


@pytest.mark.parametrize(
    "thing",
    [EVIL, Text(EVIL), Text("a").append(EVIL), Panel(EVIL, title=EVIL), Panel(Text(EVIL)), Text(EVIL, style="bold")],
    ids=["string", "text", "appended", "panel", "panel of text", "styled"],
)
def test_a_console_prints_nothing_that_is_obeyed(thing):
    out = StringIO()
    Terminal(out, 200).print(thing)
    check_inert(out.getvalue())
    table = Table(EVIL, title=EVIL, caption=EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL))
    Terminal(out, 200).print(table)
    check_inert(out.getvalue())


def test_tables_lines_facts_and_progress_are_inert_and_lines_stay_lines(capsys):
    number, name = Cell(EVIL, EVIL, EVIL, EVIL), Cell(EVIL, is_text=True)
    columns, rows = [Column(EVIL, EVIL, is_text=True), Column("n")], [[name, number], [Text(EVIL), number], EVIL]
    show.print_table(Shown(EVIL, columns, rows, EVIL))
    wide = [[Cell(EVIL + "y" * 200, is_text=True), number]] * 2
    show.print_table(Shown("narrow", [Column("x" * 200), Column(EVIL)], wide))
    show.print_facts(EVIL, {EVIL: name})
    show.print_lines([EVIL])
    show.print_error(EVIL)
    show.progress_for(quiet=False).say(EVIL)
    with show.warnings_as_lines():
        warnings.warn_explicit(type("Ours", (UserWarning,), {"__module__": "safetyheads.x"})(EVIL), None, "f", 1)
    out, err = capsys.readouterr()
    check_inert(out, err)
    show.print_lines(["name\nerror: none"])
    assert capsys.readouterr().out == "name\\nerror: none\n"


def test_libraries_and_tracebacks_are_inert_too(run, monkeypatch):
    def fail(*_, **__):
        print(EVIL)  # noqa: T201
        logging.getLogger("somebody").error(EVIL)
        sys.stderr.writelines([EVIL])
        raise ZeroDivisionError(EVIL)

    # Python's own last handler writes to the terminal; pytest's keeps the text, and half a pair breaks its workers.
    monkeypatch.setattr(logging.getLogger("somebody"), "propagate", False)
    monkeypatch.setattr("safetyheads.runs.history.read_history", fail)
    code, out, err = run("history", ".")
    assert code == 1
    assert "ZeroDivisionError" in err
    check_inert(out, err)


# Ways in that end in one line: what to call with, in a folder prepared by a function.


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _demo_copy(folder, **changes):
    from safetyheads import demo

    shutil.copytree(demo.checkpoint_path("aligned_a"), folder)
    config = json.loads((folder / "config.json").read_text())
    _write(folder / "config.json", json.dumps({**config, **changes}))
    return folder


def _template(folder, text):
    _write(_demo_copy(folder) / "chat_template.jinja", text)
    return folder


NAME = EVIL.replace("\ud83d", "").replace("\x00", "").replace("/", "")
WAYS = {
    "a prompt file's name": lambda at: ("ships", "demo:aligned_a", "--prompts", at / f"{NAME}.txt"),
    "a model's name": lambda at: ("check", at / NAME),
    "an option": lambda at: ("ships", "demo:aligned_a", f"--{NAME}"),
    "a head": lambda at: ("asr", "demo:aligned_a", "--heads", NAME),
    "a model type": lambda at: ("check", _demo_copy(at / "m", model_type=EVIL)),
    "a template's exception": lambda at: ("check", _template(at / "m", "{{ raise_exception('" + NAME + "') }}")),
    "a template's syntax": lambda at: ("check", _template(at / "m", "{% " + NAME + " %}")),
}


@pytest.mark.parametrize("way", WAYS)
def test_bad_input_is_told_inertly(run, own_folder, tmp_path, way):
    code, out, err = run(*WAYS[way](tmp_path))
    assert code in (1, 2), err
    check_inert(out, err)
    assert err.strip()


def _everywhere(value, key=""):
    """A text beside every text of results, where it is no name that code looks up."""
    if isinstance(value, dict):
        return {name: _everywhere(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_everywhere(inner, key) for inner in value]
    return value + NAME if isinstance(value, str) and key in ("name", "sentence", "model", "text", "command") else value


@pytest.mark.parametrize("command", ["compare", "history", "report", "judge"])
def test_runs_are_shown_inertly(run, own_folder, tmp_path, command):
    for name in ("a", "b"):
        finished = audit_run(tmp_path / "runs" / name, config=_everywhere(settings()))
        results = RunDirectory.open(finished).read_results() | {"caveats": [NAME], "warnings": [NAME]}
        with RunDirectory.start(finished, _everywhere(settings()), {}) as started:
            started.write_results(_everywhere(results))
    _write(tmp_path / "runs" / NAME / "manifest.json", NAME)
    _write(tmp_path / "runs" / NAME / "results.json", NAME)
    runs = tmp_path / "runs"
    given = {"compare": [runs / "a", runs / "b"], "history": [runs], "report": [runs / "a"], "judge": [runs / "a"]}
    _, out, err = run(command, *given[command])
    check_inert(out, err)
    assert out + err
    if command == "compare":
        check_inert(*run("compare", runs / "a", runs / NAME)[1:], *run("compare", runs / "a", runs / "b", "--json")[1:])

"""What ``reproduce`` prints: whole words and numbers at any width of the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import experiment_samples as samples
import pytest
from rich.console import Console

from safetyheads.cli import show as cli_show
from safetyheads.cli.show import show_experiments, show_outcomes
from safetyheads.experiments.catalogue import EXPERIMENTS

REPORT = Path("report/index.html")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prints on a terminal of so many columns; gives the lines."""

    def printed(width: int, show: Any, *arguments: Any) -> list[str]:
        file = io.StringIO()
        console = Console(file=file, width=width, markup=False, highlight=False)
        monkeypatch.setattr(cli_show, "stdout", lambda: console)
        show(*arguments)
        return file.getvalue().splitlines()

    return printed


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_list_fits_and_names_costs_and_what_is_lacking(terminal: Any, width: int) -> None:
    lacking = {name: ["base: the checkpoint"] if name == "fig6a" else [] for name in EXPERIMENTS}
    lines = terminal(width, show_experiments, EXPERIMENTS, lacking)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert text.count("needs first: base: the checkpoint") == 1
    for name, one in EXPERIMENTS.items():
        assert f"{name} {one.title}" in text
        assert one.costs in text


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_break_no_number(terminal: Any, width: int) -> None:
    lines = terminal(width, show_outcomes, samples.results(), ["table1"], REPORT)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines) if width > 60 else " ".join(" ".join(lines).split())
    for said in ("refusal", "0.33", "[0.18, 0.53]", "[+0.10, +0.40]", "p < 0.001", "1,682,963,909", "0.72", "quoted"):
        assert said in text
    assert "n 24 behind every interval." in text


def test_a_table_too_wide_is_a_paragraph_a_row(terminal: Any) -> None:
    text = "\n".join(terminal(50, show_outcomes, samples.results(), ["table1"], REPORT))
    assert "Sahara\nparameters: 2,667,318;" in text


def test_one_experiment_has_its_tables_and_several_a_line_each(terminal: Any) -> None:
    results = samples.results()
    asr = {"model": "m", "label": "ASR, UA", "kind": "rate", "value": samples.at(13) | {"value": 13 / 24, "p": None}}
    next(outcome for outcome in results["experiments"] if outcome["name"] == "fig2")["headline"] = [asr]
    lines = terminal(120, show_outcomes, results, ["fig2", "fig15", "table1"], REPORT)
    assert len(lines) < 14
    text = "\n".join(lines)
    assert "0.54" in text
    assert "Not meaningful on this model. demo:aligned_a on theft" in text
    assert lines[-1] == f"Report: {REPORT}"


def test_what_was_left_out_has_a_line_each(terminal: Any) -> None:
    results = samples.results() | {"left_out": {"fig6a": "It needs base:\nthe checkpoint.", "fig8": "Not asked for."}}
    lines = terminal(60, show_outcomes, results, ["fig2", "fig6a", "table1"], REPORT)
    assert "fig6a left out: It needs base: the checkpoint." in lines
    assert not any("fig8" in line for line in lines)


def test_nothing_but_what_was_left_out(terminal: Any) -> None:
    results = samples.results([]) | {"left_out": {"fig6a": "It needs base."}}
    lines = terminal(80, show_outcomes, results, ["fig6a", "fig8"], REPORT)
    assert [line for line in lines if line] == ["fig6a left out: It needs base.", f"Report: {REPORT}"]


def test_what_was_timed_is_shown_where_it_is_given(terminal: Any) -> None:
    timed = samples.timings()["timed"]
    text = "\n".join(terminal(100, show_outcomes, samples.results(), ["table2"], REPORT, timed))
    assert text.index("Timed on this machine") < text.index("1.73 [1.7, 1.76]") < text.index("850 quoted")
    assert "Timed" not in "\n".join(terminal(100, show_outcomes, samples.results(), ["table2"], REPORT))
    assert "Timed" not in "\n".join(terminal(100, show_outcomes, samples.results(), ["fig2"], REPORT, timed))

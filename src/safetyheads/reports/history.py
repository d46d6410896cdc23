"""The page over many runs: a figure and a table of what was measured, oldest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetyheads.files import write_atomically
from safetyheads.reports import charts
from safetyheads.reports.page import render
from safetyheads.runs.history import History, HistoryEntry

FILE = "history.html"
"""Name of the page in the folder whose runs it shows."""
VANILLA, GROUP, CONCENTRATION = "ASR, nothing ablated", "ASR, verdict’s group ablated", "concentration"


def write_history(history: History) -> Path:
    """Write ``history.html`` into the history's folder and return its path."""
    path = history.folder / FILE
    write_atomically(path, render_history(history).encode())
    return path


def render_history(history: History) -> str:
    """The page; equal histories give equal text."""
    content = {"history": history, "name": history.folder.resolve().name}
    return render("history.html.j2", content, {}, {}, {"over_runs": over_runs(history)})


def over_runs(history: History) -> charts.Spec:
    """ASR and concentration of each run, with intervals, as a Vega-Lite specification."""
    rows = [row for number, entry in enumerate(history.entries, 1) for row in _rows(number, entry)]
    # The series stand in one order, whichever run comes first.
    rows.sort(key=lambda row: (VANILLA, GROUP, CONCENTRATION).index(row["series"]))
    described = "Attack success and concentration of each run, oldest first"
    return charts.lines(rows, "run, oldest first", "share of prompts; concentration", described, height=320)


def _rows(number: int, entry: HistoryEntry) -> list[dict[str, Any]]:
    """A point for each number of a run that exists."""
    started = "unknown" if entry.started is None else f"{entry.started:%Y-%m-%d %H:%M}"
    about = {"x": number, "run": f"{number}. {entry.name}", "model": entry.model, "started": started}
    found: list[dict[str, Any]] = []
    for series, rate in ((VANILLA, entry.vanilla_asr), (GROUP, entry.group_asr)):
        if rate is not None and rate["rate"] is not None:
            answers = f"{rate['count']} of {rate['n']}"
            found.append({"series": series, "y": rate["rate"], "interval": rate["interval"], "answers": answers})
    concentration = entry.concentration
    if concentration is not None and concentration["value"] is not None:
        answers = f"{concentration['n']} prompts, against {concentration['against']}"
        found.append(
            {
                "series": CONCENTRATION,
                "y": concentration["value"],
                "interval": concentration["interval"],
                "answers": answers,
            }
        )
    ends = [row.pop("interval") or (None, None) for row in found]
    return [about | row | {"low": low, "high": high} for row, (low, high) in zip(found, ends, strict=True)]

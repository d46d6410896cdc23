"""The page over many runs: a figure and a table of what was measured, oldest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetyheads.files import write_atomically
from safetyheads.reports import charts
from safetyheads.reports.audit import rate_rows
from safetyheads.reports.page import render
from safetyheads.runs.history import History

VANILLA, GROUP, CONCENTRATION = "ASR, nothing ablated", "ASR, verdict’s group ablated", "concentration"


def write_history(history: History) -> Path:
    """Write ``history.html`` into the history's folder and return its path; equal histories give equal text."""
    content = {"history": history, "name": history.folder.resolve().name}
    page = render("history.html.j2", content, {}, {}, {"over_runs": over_runs(history)})
    path = history.folder / "history.html"
    write_atomically(path, page.encode())
    return path


def over_runs(history: History) -> charts.Spec:
    """ASR and concentration of each run, with intervals, as a Vega-Lite specification."""
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(history.entries, 1):
        started = "unknown" if entry.started is None else f"{entry.started:%Y-%m-%d %H:%M}"
        about = {"run": f"{number}. {entry.name}", "model": entry.model, "started": started}
        points = rate_rows(number, VANILLA, entry.vanilla_asr, ())
        points += rate_rows(number, GROUP, entry.group_asr, entry.group)
        concentration = entry.concentration
        if concentration is not None and concentration["value"] is not None:
            low, high = concentration["interval"] or (None, None)
            point = {"x": number, "series": CONCENTRATION, "y": concentration["value"], "low": low, "high": high}
            points.append(point | {"answers": f"{concentration['n']} prompts, against {concentration['against']}"})
        rows += [about | point for point in points]
    # The series stand in one order, whichever run comes first.
    rows.sort(key=lambda row: (VANILLA, GROUP, CONCENTRATION).index(row["series"]))
    described = "Attack success and concentration of each run, oldest first"
    return charts.lines(rows, "run, oldest first", "share of prompts; concentration", described, height=320)

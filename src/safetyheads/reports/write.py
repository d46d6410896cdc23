"""Writes the report of a finished run, each kind of which has its page, and the page over many runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetyheads.errors import InputError
from safetyheads.files import write_page
from safetyheads.reports import charts
from safetyheads.reports.audit import audit_page, rate_rows
from safetyheads.reports.evaluation import evaluation_page
from safetyheads.reports.page import render
from safetyheads.reports.reproduction import render_reproduction
from safetyheads.reports.scan import scan_page
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory

PAGES: dict[str, Callable[[RunDirectory, bool], str]] = {
    "audit": audit_page,
    "scan": scan_page,
    "eval": evaluation_page,
}
"""Kind of results -> what makes the page of such a run, with its completions or without: to add a page, write such a
function, which hands a template of its own to :func:`safetyheads.reports.page.render`, and enter it here."""
VANILLA, GROUP, CONCENTRATION = "ASR, nothing ablated", "ASR, verdict’s group ablated", "concentration"


class ReportWarning(UserWarning):
    """The report does not hold what was asked for."""


def write_report(run: RunDirectory, *, show_completions: bool = False) -> Path:
    """Write ``report/index.html`` into the run directory.

    Args:
        run: A run that has results.
        show_completions: Put the answers to harmful prompts into the page, folded away and as text; the pages of a
            reproduction never hold any, and a warning says so.

    Returns:
        The path of the page.

    Raises:
        InputError: no page is known for results of that kind or schema.
    """
    results = run.read_results()
    kind, version = results.get("kind"), results.get("schema_version")
    if version != SCHEMA_VERSION or kind not in (*PAGES, "reproduction"):
        raise InputError(
            f"{run.path} holds results of kind {kind!r}, schema {version!r}; "
            f"a report needs an audit, a scan, an evaluation or a reproduction of schema {SCHEMA_VERSION}"
        )
    if kind != "reproduction":
        return run.write_report(PAGES[kind](run, show_completions))
    if show_completions:
        words = "the pages of a reproduction hold no completions; they are in the run's completions folder"
        warnings.warn(words, ReportWarning, stacklevel=2)
    return run.write_report(*render_reproduction(results, run.facts()))


def write_history(history: Mapping[str, Any]) -> Path:
    """Write ``history.html`` into the history's folder and return its path; equal histories give equal text."""
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(history["runs"], 1):
        started = "unknown" if entry["started"] is None else entry["started"][:16].replace("T", " ")
        about = {"run": f"{number}. {entry['name']}", "model": entry["model"], "started": started}
        points = rate_rows(number, VANILLA, entry["vanilla_asr"], ())
        points += rate_rows(number, GROUP, entry["group_asr"], entry["group"])
        concentration = entry["concentration"]
        if concentration is not None and concentration["value"] is not None:
            low, high = concentration["interval"] or (None, None)
            point = {"x": number, "series": CONCENTRATION, "y": concentration["value"], "low": low, "high": high}
            points.append(point | {"answers": f"{concentration['n']} prompts, against {concentration['against']}"})
        rows += [about | point for point in points]
    # The series stand in one order, whichever run comes first.
    rows.sort(key=lambda row: (VANILLA, GROUP, CONCENTRATION).index(row["series"]))
    described = "Attack success and concentration of each run, oldest first"
    drawn = charts.lines(rows, "run, oldest first", "share of prompts; concentration", described, height=320)
    folder = Path(history["folder"])
    # A run that is the folder itself has the folder's name.
    places = {entry["name"]: f"{entry['name']}/report/index.html" for entry in history["runs"]}
    pages = {name: quote(place) for name, place in places.items() if (folder / place).is_file()}
    content = {"history": history, "name": folder.resolve().name, "pages": pages}
    path = folder / "history.html"
    write_page(path, render("history.html.j2", content, {}, {}, {"over_runs": drawn}))
    return path

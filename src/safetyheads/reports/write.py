"""Writes the report of a finished run, each kind of which has its page, and the page over many runs."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetyheads.errors import InputError
from safetyheads.files import write_page
from safetyheads.reports import audit, charts, evaluation, scan, single_steps
from safetyheads.reports.audit import rate_rows
from safetyheads.reports.page import Page, command_of, render
from safetyheads.reports.reproduction import render_reproduction
from safetyheads.reports.tables import Facts, rate_words
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory

PAGES: dict[str, tuple[Callable[[RunDirectory, Facts, Facts, bool], Page], Callable[[Facts], str]]] = {
    "audit": (audit.audit_page, audit.headline),
    "scan": (scan.scan_page, scan.headline),
    "eval": (lambda _, results, facts, __: evaluation.render_evaluation(results, facts), evaluation.headline),
    **dict.fromkeys(("ships", "sahara", "asr"), (single_steps.single_step_page, single_steps.headline)),
}
"""Kind of results -> what makes the page of such a run, of its results and facts, with its completions or without, and
what makes its first sentence of its results: to add a page, write such functions, the first of which hands a template
of its own to :func:`safetyheads.reports.page.render`, and enter them here."""
VANILLA, GROUP, CONCENTRATION = "ASR, nothing ablated", "ASR, verdict’s group ablated", "concentration"


class ReportWarning(UserWarning):
    """The report does not hold what was asked for."""


def write_report(run: RunDirectory, *, show_completions: bool = False) -> tuple[Path, Page]:
    """Write ``report/index.html`` into the run directory; its path, and the page with its tables.

    ``show_completions`` puts the answers to harmful prompts into the page, folded away and as text; the pages of a
    reproduction never hold any, and a warning says so.
    """
    with run.writing():  # a judge that adds to the results, and another report, come before or after
        run = RunDirectory.open(run.path)
        results = run.read_results()
        kind, version = results.get("kind"), results.get("schema_version")
        if version != SCHEMA_VERSION or kind not in (*PAGES, "reproduction"):
            raise InputError(
                f"{run.path} holds results of kind {kind!r}, schema {version!r}; "
                f"a report needs {', '.join(PAGES)} or reproduction of schema {SCHEMA_VERSION}"
            )
        if show_completions and kind not in ("audit", "scan", "asr"):
            words = f"the pages of kind {kind} hold no completions; they are in the run's completions folder"
            warnings.warn(words, ReportWarning, stacklevel=2)
        if kind != "reproduction":
            page = PAGES[kind][0](run, results, run.facts() | {"command": command_of(run)}, show_completions)
            return run.write_report(page), page
        page, pages = render_reproduction(results, run.facts())
        return run.write_report(page, pages), page


def write_history(history: Facts) -> tuple[Path, Page]:
    """Write ``history.html`` into the history's folder; its path, and the page, of equal text for equal histories."""
    path, page = Path(history["folder"]) / "history.html", history_page(history)
    write_page(path, page)
    return path, page


def history_page(history: Facts) -> Page:
    """The page of many runs: a point for each number, and a table."""
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
    measured = "share of prompts" + "; concentration" * any(row["series"] == CONCENTRATION for row in rows)
    drawn = charts.lines(rows, "run, oldest first", measured, described, height=320)
    folder = Path(history["folder"])
    # A run that is the folder itself has the folder's name.
    places = {entry["name"]: f"{entry['name']}/report/index.html" for entry in history["runs"]}
    pages = {name: quote(place) for name, place in places.items() if (folder / place).is_file()}
    content = {"history": history, "name": folder.resolve().name, "pages": pages}
    content["sentence"] = _history_in_words(history)
    return render("history.html.j2", content, {}, {}, {"over_runs": drawn})


def _history_in_words(history: Facts) -> str:
    """What a sweep's audits found; of other runs, from where to where the unablated model's coherent ASR went."""
    entries = history["runs"]
    rated = [entry["vanilla_asr"] for entry in entries if entry["vanilla_asr"]["rate"] is not None]
    if not rated:
        return "No run has scored answers of the unablated model."
    ends = [f"{rate_words(of)} ({of['count']} of {of['n']})" for of in (rated[0], rated[-1])]
    changes = [entry["change"]["shown"].split()[:1] for entry in entries if entry["change"]]
    rose, fell = (changes.count([verb]) for verb in ("rose", "fell"))
    if "comparisons" in history:
        labels = Counter((entry["verdict"] or "no verdict").replace("_", " ") for entry in entries)
        n, told = sum(labels.values()), ", ".join(f"{count} {label}" for label, count in labels.items())
        found = f"{n} audit{'s' * (n > 1)}: {told}."
        moved = f" The unablated model’s coherent ASR rose by more than chance in {rose} of {len(changes)} comparisons "
        moved += f"with the audit before of the same prompts and ablation, and fell in {fell}."
        return found + moved * bool(changes)
    if len(rated) == 1:
        return f"One run: the unablated model’s coherent ASR is {ends[0]}."
    return (
        f"Over {len(entries)} runs the unablated model’s coherent ASR goes from {ends[0]} to {ends[1]}; against the "
        f"run of the same kind before, it rose by more than chance in {rose} of them and fell in {fell}."
    )

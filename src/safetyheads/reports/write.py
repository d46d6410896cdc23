"""Writes the report of a finished run: each kind of run has its page."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from safetyheads.errors import InputError
from safetyheads.reports.audit import audit_page
from safetyheads.reports.reproduction import render_reproduction
from safetyheads.reports.scan import scan_page
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory

PAGES: dict[str, Callable[[RunDirectory, bool], str]] = {"audit": audit_page, "scan": scan_page}
"""Kind of results -> what makes the page of such a run, with its completions or without: to add a page, write such a
function, which hands a template of its own to :func:`safetyheads.reports.page.render`, and enter it here."""


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
            f"a report needs an audit, a scan or a reproduction of schema {SCHEMA_VERSION}"
        )
    if kind != "reproduction":
        return run.write_report(PAGES[kind](run, show_completions))
    if show_completions:
        words = "the pages of a reproduction hold no completions; they are in the run's completions folder"
        warnings.warn(words, ReportWarning, stacklevel=2)
    return run.write_report(*render_reproduction(results, run.read_manifest(), run.read_timings()))

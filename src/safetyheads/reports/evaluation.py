"""The page of an evaluation: what ablating heads does to the accuracy on tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from safetyheads.reports import charts
from safetyheads.reports.page import Cell, command_of, interval, number, p_value, render, signed
from safetyheads.runs.directory import RunDirectory

Results: TypeAlias = Mapping[str, Any]
_SURE = 0.05
"""Of p after Holm."""


def evaluation_page(run: RunDirectory, show_completions: bool) -> str:
    """The page of a finished evaluation; it holds no answers, whatever is asked for."""
    del show_completions
    return render_evaluation(run.read_results(), run.facts() | {"command": command_of(run)})


def render_evaluation(results: Results, manifest: Mapping[str, Any]) -> str:
    """The page; equal arguments give equal text."""
    drawn = list(_drawn(results))
    described = "Change of each metric, ablated minus vanilla"
    figures = {"changes": charts.forest(drawn, "change, ablated minus vanilla", described)} if drawn else {}
    content = {
        "results": results,
        "headline": headline(results),
        "rows": [(metric, *_cells(metric)) for metric in results["metrics"]],
    }
    measured = {name: results[name] for name in ("model", "ablation", "tasks", "groups", "settings")}
    return render("evaluation.html.j2", content, measured, manifest, figures)


def headline(results: Results) -> str:
    """How many metrics the ablation changes."""
    compared = [metric["difference"] for metric in results["metrics"] if metric["difference"]]
    moved = [change for change in compared if change["p_holm"] is not None and change["p_holm"] < _SURE]
    return f"{len(moved)} of {len(compared)} metrics change when the heads are ablated (Holm, α = {_SURE})."


def _drawn(results: Results) -> Iterator[dict[str, Any]]:
    """A row of the figure for each change of a share that has an interval: other metrics have other units."""
    for metric in results["metrics"]:
        change = metric["difference"]
        if change and change["interval"] and metric["unit"] == "share":
            low, high = map(charts.rounded, change["interval"])
            label = f"{metric['task']} {metric['metric']}, {metric['variant']}"
            row = {"label": label, "x": charts.rounded(change["change"]), "low": low, "high": high}
            yield row | {"n": str(change["n"]), "limit": None}


def _cells(metric: Mapping[str, Any]) -> tuple[Cell, Cell]:
    """The metric's value, and its change from vanilla."""
    bounds = interval(metric["interval"], lambda end: number(end))
    value = Cell(number(metric["value"]), bounds, f"n {metric['n']:,}")
    change = metric["difference"]
    if not change or change["change"] is None:
        return value, Cell("–")
    p = f"p {p_value(change['p_holm'], '= ')} after Holm" if change["p_holm"] is not None else ""
    flips = f"{change['gained']} gained, {change['lost']} lost" if change["gained"] is not None else ""
    return value, Cell(signed(change["change"]), interval(change["interval"], signed), flips, p)

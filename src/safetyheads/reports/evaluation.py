"""The page of an evaluation: what ablating heads does to the accuracy on tasks."""

from collections.abc import Iterator
from typing import Any

from safetyheads.reports import charts
from safetyheads.reports.page import Page, render
from safetyheads.reports.tables import Facts

_SURE = 0.05
"""Of p after Holm."""


def render_evaluation(results: Facts, manifest: Facts) -> Page:
    """The page; equal arguments give equal text."""
    drawn = list(_drawn(results))
    described = "Change of each metric, ablated minus vanilla"
    titles = "", "change, ablated minus vanilla"
    figures = {"changes": charts.bars(drawn, *titles, described, share=False)} if drawn else {}
    tests = {metric["difference"]["test"] for metric in results["metrics"] if metric["difference"]}
    content = {
        "results": results,
        "headline": headline(results),
        "tests": "".join(f"; p: {test}" for test in sorted(tests - {None})),
    }
    measured = {name: results[name] for name in ("model", "ablation", "tasks", "groups", "settings")}
    return render("evaluation.html.j2", content, measured, manifest, figures)


def headline(results: Facts) -> str:
    """How many metrics the ablation changes."""
    compared = [metric["difference"] for metric in results["metrics"] if metric["difference"]]
    if not compared:
        return f"{len(results['metrics'])} metrics of the unablated model; no heads were ablated."
    moved = [change for change in compared if change["p_holm"] is not None and change["p_holm"] < _SURE]
    return f"{len(moved)} of {len(compared)} metrics change when the heads are ablated (Holm, α = {_SURE})."


def _drawn(results: Facts) -> Iterator[dict[str, Any]]:
    """A row of the figure for each change of a share that has an interval: other metrics have other units."""
    for metric in results["metrics"]:
        change = metric["difference"]
        if change and change["interval"] and metric["unit"] == "share":
            label = f"{metric['task']} {metric['metric']}, {metric['variant']}"
            yield charts.interval_row(label, change["change"], change["interval"], series="", n=str(change["n"]))

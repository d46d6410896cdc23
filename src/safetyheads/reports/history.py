"""The page over many runs: a table and a chart of what was measured, oldest first.

Owns what the page says; takes a history's values and refuses to know where they were read. Like the report it is one
file that asks for nothing: styles, data and drawing library are inside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetyheads.files import write_atomically
from safetyheads.reports.page import NO_HEADS, assets, environment
from safetyheads.runs.history import History, HistoryEntry

FILE = "history.html"
"""Name of the page in the folder whose runs it shows."""
VANILLA, GROUP, CONCENTRATION = "ASR, nothing ablated", "ASR, verdict’s group ablated", "concentration"
_COLOURS = {VANILLA: "--kept", GROUP: "--attack", CONCENTRATION: "--third"}
_DASHES = {VANILLA: [6, 4], GROUP: [1, 0], CONCENTRATION: [2, 3]}
_APART = 0.07


def write_history(history: History) -> Path:
    """Write ``history.html`` into the history's folder and return its path."""
    path = history.folder / FILE
    write_atomically(path, render_history(history).encode())
    return path


def render_history(history: History) -> str:
    """The page; equal histories give equal text."""
    page = {
        "history": history,
        "name": history.folder.resolve().name,
        "charts": {"over_runs": over_runs(history)},
        "head_columns": NO_HEADS,
        **assets(),
    }
    return environment().get_template("history.html.j2").render(page) + "\n"


def over_runs(history: History) -> dict[str, Any]:
    """ASR and concentration of each run, with intervals, as a Vega-Lite specification."""
    import altair as alt

    from safetyheads.reports.drawing import spec

    rows = [row for number, entry in enumerate(history.entries, 1) for row in _rows(number, entry)]
    shown = [series for series in _COLOURS if any(row["series"] == series for row in rows)]
    # Down to a line of the grid, where a concentration is negative.
    lowest = math.floor(5 * min(0.0, *(row["low"] for row in rows))) / 5 if rows else 0.0
    last = len(history.entries)
    step = 1 if last <= 12 else 5 if last <= 60 else 10 * (last // 120 + 1)
    ticks = range(1, last + 1) if step == 1 else (1, *range(step, last + 1, step))
    numbers = alt.Axis(values=list(ticks), format="d", grid=False, labelOverlap=True)
    x_scale = alt.Scale(domain=[0.7, last + 0.3], nice=False)
    y_scale = alt.Scale(domain=[lowest, 1.0], nice=False)
    legend = alt.Legend(
        orient="top",
        title=None,
        direction="vertical",
        labelLimit=320,
        symbolType="stroke",
        symbolOpacity=1,
        symbolSize=500,
        symbolStrokeWidth=2.5,
    )

    def by_series(kind: Any, field: str, values: Mapping[str, Any]) -> Any:
        scale = alt.Scale(domain=shown, range=[values[name] for name in shown])
        return kind(field, legend=legend, scale=scale)

    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("place:Q", title="run, oldest first", scale=x_scale, axis=numbers),
        color=by_series(alt.Color, "series:N", _COLOURS),
    )
    y = alt.Y("value:Q", title="share of prompts; concentration", scale=y_scale)
    y = y.axis(format=".1f", tickCount=6)
    tooltip = [alt.Tooltip(f"{name}:N") for name in ("series", "run", "model", "started", "of")]
    tooltip += [alt.Tooltip(f"{name}:Q", format=".3f") for name in ("value", "low", "high")]
    chart = alt.layer(
        base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=by_series(alt.StrokeDash, "series:N", _DASHES)),
        base.mark_point(filled=True, size=64, opacity=1).encode(y=y, tooltip=tooltip),
    )
    return spec(chart, height=320, description="Attack success and concentration of each run, oldest first")


def _rows(number: int, entry: HistoryEntry) -> list[dict[str, Any]]:
    """A point for each number of a run that exists, beside each other so that no interval hides another."""
    started = "unknown" if entry.started is None else f"{entry.started:%Y-%m-%d %H:%M}"
    about = {"run": f"{number}. {entry.name}", "model": entry.model, "started": started}
    found: dict[str, tuple[float | None, Any, str]] = {}
    for series, rate in ((VANILLA, entry.vanilla_asr), (GROUP, entry.group_asr)):
        if rate is not None:
            found[series] = rate["rate"], rate["interval"], f"{rate['count']} of {rate['n']} answers"
    if entry.concentration is not None:
        made = entry.concentration
        found[CONCENTRATION] = made["value"], made["interval"], f"{made['n']} prompts, against {made['against']}"
    places = {series: number + _APART * (at - 1) for at, series in enumerate(_COLOURS)}
    return [
        about
        | {"series": series, "place": places[series], "value": value, "of": of}
        | dict(zip(("low", "high"), interval or (value, value), strict=True))
        for series, (value, interval, of) in found.items()
        if value is not None
    ]

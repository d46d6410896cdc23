"""The experiments' figures as Vega-Lite specifications, one a panel: bars, lines, curves, scatter.

Owns what each kind draws, what it leaves out and says so, and the legend; refuses to know experiments and HTML. Panels
are figures of their own, so that the page lays them out for its width; they share their axes and their legend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from safetyheads.reports.drawing import Spec, rounded
from safetyheads.reports.experiments_axes import Key, Mark, Places, Row, heights, keys, places, wrapped
from safetyheads.reports.experiments_maps import Ramp, attention, heads, matrix
from safetyheads.reports.experiments_marks import LABEL_WIDTH, MOST_INTERVALS, Sheet, bars, curves, lines, scatter


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing."""

    name: str
    """Empty where the figure has one panel without a name."""
    spec: Spec


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure as the page shows it."""

    title: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[Key, ...] = ()
    """Empty where there is one series only, and no name to tell."""
    ramp: Ramp | None = None
    """Colours of numbers."""
    marked: bool = False
    """Whether some tiles are marked."""
    notes: tuple[str, ...] = ()
    """What is not drawn, and why."""
    wide: bool = False
    """Whether a panel needs half the page at least."""
    width: int | None = None
    """Pixels that a panel has at most."""


def drawn(figure: Mapping[str, Any]) -> Drawn:
    """A figure of an outcome; one without points has no panel."""
    if not figure["points"]:
        return Drawn(figure["title"], figure["caption"], (), notes=("This figure has no points.",))
    made = _DRAWINGS[figure["kind"]](figure)
    if [panel.name for panel in made.panels] == [made.title]:
        return replace(made, panels=(Panel("", made.panels[0].spec),))
    return made


def panels_of(points: Sequence[Row]) -> dict[str, list[Row]]:
    """The points of each panel, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for point in points:
        found.setdefault(str(point.get("panel") or ""), []).append(point)
    return found


# With a share, a change or a number upwards.


def _upwards(kind: Mark, figure: Mapping[str, Any]) -> Drawn:
    points = figure["points"]
    shown = keys((str(point.get("series") or "") for point in points), kind)
    numeric = kind != "bar" and all(_is_number(point["x"]) for point in points)
    beside = len(shown) if kind == "line" else 1
    place = places(_standing(points, figure["logarithmic"]), figure["logarithmic"], beside) if numeric else None
    axis = heights(figure["y"], points, figure["share"], kind == "bar")
    rows = {name: _rows(own, shown, place, kind) for name, own in panels_of(points).items()}
    made = []
    for name, own in rows.items():
        described = f"{figure['y']} by {figure['x']}{f', {name}' if name else ''}"
        made.append(Panel(name, _PANELS[kind](Sheet(figure, own, shown, axis, place, described))))
    return Drawn(
        figure["title"],
        figure["caption"],
        tuple(made),
        legend=shown if len(shown) > 1 or shown[0].name else (),
        notes=tuple(_left_out(kind, points, rows, place)),
        wide=kind == "bar" and any(len({row["label"] for row in own}) * len(shown) > 12 for own in rows.values()),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _standing(points: Sequence[Row], logarithmic: bool) -> Iterator[float]:
    return (point["x"] for point in points if point["x"] >= 0 or not logarithmic)


def _rows(points: Sequence[Row], shown: Sequence[Key], place: Places | None, kind: Mark) -> list[dict[str, Any]]:
    """Points as the drawing has them: places and short numbers; without those that have no place."""
    number = {key.name: at for at, key in enumerate(shown)}
    rows = []
    for point in points:
        at = number[str(point.get("series") or "")]
        row: dict[str, Any] = {"s": shown[at].identity, "x": point["x"]}
        if shown[at].name:
            row["series"] = shown[at].name
        if place is None:
            row["label"] = wrapped(str(point["x"]), LABEL_WIDTH)
        else:
            where = place.of(float(point["x"]))
            if where is None:
                continue
            row |= {
                "place": rounded(where + place.apart * (at - (len(shown) - 1) / 2)),
                "x": rounded(float(point["x"])),
            }
            if point["x"] == 0 and place.zero is not None:
                row["zero"] = True
        row |= {name: None if point.get(name) is None else rounded(point[name]) for name in ("y", "low", "high")}
        row |= {name: point[name] for name in ("n", "label") if point.get(name) is not None and kind != "curve"}
        if kind == "bar":
            row["opacity"] = shown[at].opacity
        if kind == "point" and point.get("label") is not None:
            row["name"] = str(point["label"])
        rows.append(row)
    return rows


def _left_out(
    kind: Mark, points: Sequence[Row], rows: Mapping[str, Sequence[Row]], place: Places | None
) -> Iterator[str]:
    empty = sum(point.get("y") is None for point in points)
    if empty and kind == "bar":
        yield f"A dash stands where nothing could be scored ({empty} of {len(points)})."
    elif empty:
        yield f"Not drawn: {empty} of {len(points)} points, where nothing could be scored."
    lost = len(points) - sum(map(len, rows.values()))
    if lost:
        yield f"Not drawn: {lost} of {len(points)} points below 0, which a logarithmic axis does not have."
    if place is not None and place.zero is not None:
        yield "Left of the dotted line: x = 0, which a logarithmic axis does not reach."
    if kind == "point" and any(_too_many(own) for own in rows.values()):
        yield "Intervals are not drawn among so many points: point at one for its own."


def _too_many(rows: Sequence[Row]) -> bool:
    return len(rows) > MOST_INTERVALS and any(row["low"] is not None for row in rows)


_PANELS: dict[Mark, Callable[[Sheet], Spec]] = {"bar": bars, "line": lines, "curve": curves, "point": scatter}


# With colours for numbers.


def _in_colours(make: Callable[..., Any], figure: Mapping[str, Any]) -> Drawn:
    made = make(figure, panels_of(figure["points"]))
    return Drawn(
        figure["title"],
        figure["caption"],
        tuple(Panel(name, one) for name, one in made.specs.items()),
        ramp=made.ramp,
        marked=made.marked,
        notes=made.notes,
        wide=made.wide,
        width=made.width,
    )


_DRAWINGS: dict[str, Callable[[Mapping[str, Any]], Drawn]] = {
    "bars": partial(_upwards, "bar"),
    "lines": partial(_upwards, "line"),
    "curves": partial(_upwards, "curve"),
    "scatter": partial(_upwards, "point"),
    "heads": partial(_in_colours, heads),
    "matrix": partial(_in_colours, matrix),
    "attention": partial(_in_colours, attention),
}

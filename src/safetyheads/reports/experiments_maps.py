"""The experiments' figures that show numbers as colours: maps of heads, matrices, attention.

Owns tiles, their colours and the legend of those; refuses to know experiments, HTML and colours themselves (one is the
name of a custom property of the page). Panels share their colours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import altair as alt

from safetyheads.reports.drawing import ROWS, Spec, band_axis, rounded, spec, with_rows
from safetyheads.reports.experiments_axes import Row, titled, wrapped
from safetyheads.reports.numbers import number

HEAT = ("--heat-0", "--heat-1", "--heat-2", "--heat-3", "--heat-4")
SIGNED = ("--cold-4", "--cold-2", "--neutral", "--heat-2", "--heat-4")
# Paler ends: text lies on these, and keeps its contrast in both themes.
PALE_HEAT = ("--heat-0", "--heat-1", "--heat-2")
PALE_SIGNED = ("--cold-2", "--neutral", "--heat-2")
MOST_TOKENS = 32
"""Positions up to which an attention map names its tokens."""
_MOST_TEXT = 8
"""Columns up to which a matrix has its numbers in it."""
_LEAST_SHARE = 0.1
"""A share's colours reach at least so far: differences of one answer would else look strongest."""
_TOKEN_LETTERS = 12
_SMALL = 12
"""Pixels of a tile up to which it is a small one."""
_PHONE = 250.0
"""Pixels that tiles have on a phone."""
_LETTER = 6.2
"""Pixels of a letter of a label."""
_SHORT = 3
"""Letters of a number that finds room in any tile."""
_MOST_INTERVALS = 3
"""Columns up to which a matrix has room for intervals."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """The legend of colours: equal steps from left to right."""

    title: str
    colours: tuple[str, ...]
    stops: tuple[float, ...]
    """The number of each colour."""

    @property
    def labels(self) -> tuple[str, ...]:
        """At both ends and in the middle."""
        middle = self.stops[len(self.stops) // 2]
        return tuple(number(value, digits=2) for value in (self.stops[0], middle, self.stops[-1]))

    def encoded(self, field: str) -> alt.Color:
        """The colours of a field; the page has the legend."""
        scale = alt.Scale(domain=[*self.stops], range=[*self.colours], clamp=True, interpolate="lab")
        return alt.Color(f"{field}:Q", scale=scale, legend=None)


@dataclass(frozen=True, slots=True)
class Maps:
    """Maps of one figure, by the names of their panels."""

    specs: dict[str, Spec]
    ramp: Ramp
    marked: bool = False
    notes: tuple[str, ...] = ()
    wide: bool = False
    width: int | None = None
    """Pixels that a panel has at most, so that tiles are no strips."""


def _ramp(title: str, values: Iterable[float], share: bool, pale: bool = False, roots: bool = False) -> Ramp:
    """Colours for these numbers, two-sided where some are negative."""
    numbers = list(values)
    largest = max(map(abs, numbers), default=0.0) or 1.0
    largest = max(largest, _LEAST_SHARE) if share else largest
    if min(numbers, default=0.0) < -0.01 * largest:
        colours = PALE_SIGNED if pale else SIGNED
        half = len(colours) // 2
        return Ramp(title, colours, tuple(largest * (step / half) for step in range(-half, half + 1)))
    colours = PALE_HEAT if pale else HEAT
    last = len(colours) - 1
    power = 2 if roots else 1
    # Colours at equal steps of the square root: most scores are near 0, and would else look alike.
    suffix = ", square-root scale" if roots else ""
    return Ramp(title + suffix, colours, tuple(largest * (step / last) ** power for step in range(last + 1)))


def heads(figure: Mapping[str, Any], panels: Mapping[str, Sequence[Row]]) -> Maps:
    """A number of every head, layer by head; marked ones have a frame."""
    title = figure["value"] or figure["y"]
    values = [point["y"] for own in panels.values() for point in own if point.get("y") is not None]
    ramp = _ramp(title, values, figure["share"], roots=not figure["share"])
    n_layers = 1 + max(int(point["layer"]) for own in panels.values() for point in own)
    n_heads = 1 + max(int(point["head"]) for own in panels.values() for point in own)
    cell = max(8, min(36, 300 // n_layers))
    specs = {}
    for name, own in panels.items():
        rows = [_head_row(point) for point in own]
        base = alt.Chart(alt.NamedData(name=ROWS)).encode(
            x=alt.X("h:O", title="head", axis=band_axis(n_heads), scale=alt.Scale(domain=list(range(n_heads)))),
            y=alt.Y("l:O", title="layer", axis=band_axis(n_layers), scale=alt.Scale(domain=list(range(n_layers)))),
            tooltip=_head_tooltip(title, rows),
        )
        base = base.transform_calculate(name="datum.l + '-' + datum.h")
        ground = base.mark_rect(aria=False, fill="--panel", stroke="--paper", strokeWidth=0.75)
        tiles = base.transform_filter("isValid(datum.y)").mark_rect(aria=False, stroke="--paper", strokeWidth=0.75)
        frame = base.transform_filter("datum.m").mark_rect(
            aria=False, fill="transparent", stroke="--ink", strokeWidth=2 if cell > _SMALL else 1.5, cornerRadius=1
        )
        chart = alt.layer(ground, tiles.encode(color=ramp.encoded("y")), frame)
        described = f"{title} of every head, layer by head{f', {name}' if name else ''}"
        specs[name] = with_rows(spec(chart, height=cell * n_layers, description=described), rows)
    empty = sum(point.get("y") is None for own in panels.values() for point in own)
    heads_named = "1 head" if empty == 1 else f"{empty} heads"
    notes = (f"Left blank: {heads_named}, where nothing could be measured.",) if empty else ()
    marked = any(point.get("marked") for own in panels.values() for point in own)
    return Maps(specs, ramp, marked, notes, width=60 + 46 * n_heads if cell > _SMALL else None)


def _head_row(point: Row) -> dict[str, Any]:
    row: dict[str, Any] = {"l": int(point["layer"]), "h": int(point["head"])}
    row["y"] = None if point.get("y") is None else float(f"{point['y']:.4g}")
    row |= {name: float(f"{point[name]:.4g}") for name in ("low", "high") if point.get(name) is not None}
    return row | ({"n": point["n"]} if "n" in point else {}) | ({"m": 1} if point.get("marked") else {})


def _head_tooltip(title: str, rows: Sequence[Row]) -> list[alt.Tooltip]:
    found = [alt.Tooltip("name:N", title="head"), alt.Tooltip("y:Q", title=title, format=".3~g")]
    for field, words in (("low", "95 % from"), ("high", "95 % to"), ("n", "n")):
        if any(field in row for row in rows):
            found.append(alt.Tooltip(f"{field}:Q", title=words, format=".3~g"))
    return found


def matrix(figure: Mapping[str, Any], panels: Mapping[str, Sequence[Row]]) -> Maps:
    """A number for each pair of categories, written into its tile where there is room."""
    values = [point["value"] for own in panels.values() for point in own if point.get("value") is not None]
    ramp = _ramp(figure["value"], values, figure["share"] and max(values, default=0) <= 1, pale=True)
    specs = {}
    for name, own in panels.items():
        columns = list(dict.fromkeys(str(point["x"]) for point in own))
        lines = list(dict.fromkeys(str(point["y"]) for point in own))
        has_text = len(columns) <= _MOST_TEXT
        rows = [_matrix_row(point) for point in own]
        cell = 46 if has_text else 22
        broken = "split(datum.label, '\\n')"
        turned = max(len(line) for row in rows for line in row["column"].split("\n")) * _LETTER > _PHONE / len(columns)
        if turned:
            rows = [row | {"column": row["column"].replace("\n", " ")} for row in rows]
        axis = partial(alt.Axis, labelExpr=broken, labelLimit=130, labelOverlap=False, ticks=False, domain=False)
        across, down = axis(labelAngle=-90 if turned else 0), axis()
        base = alt.Chart(alt.NamedData(name=ROWS)).encode(
            x=alt.X("column:O", sort=None, title=titled(figure["x"]), axis=across),
            y=alt.Y("line:O", sort=None, title=titled(figure["y"]), axis=down),
            tooltip=_matrix_tooltip(figure, rows),
        )
        ground = base.mark_rect(aria=False, fill="--panel", stroke="--paper", strokeWidth=1.5)
        tiles = base.transform_filter("isValid(datum.value)").mark_rect(aria=False, stroke="--paper", strokeWidth=1.5)
        layers = [ground, tiles.encode(color=ramp.encoded("value"))]
        if has_text:
            layers += _written(base, rows, len(columns))
        described = f"{figure['value']}: {figure['y']} by {figure['x']}{f', {name}' if name else ''}"
        specs[name] = with_rows(spec(alt.layer(*layers), height=cell * len(lines), description=described), rows)
    empty = sum(point.get("value") is None for own in panels.values() for point in own)
    notes = (f"A dash stands where nothing could be measured ({empty}).",) if empty else ()
    n_columns = max(len({str(point["x"]) for point in own}) for own in panels.values())
    return Maps(specs, ramp, notes=notes, wide=n_columns > 4)


def _matrix_row(point: Row) -> dict[str, Any]:
    row: dict[str, Any] = {"column": wrapped(str(point["x"]), 12), "line": wrapped(str(point["y"]), 18)}
    value = point.get("value")
    row["value"] = None if value is None else rounded(value)
    row |= {name: rounded(point[name]) for name in ("low", "high") if point.get(name) is not None}
    row |= {"n": point["n"]} if point.get("n") is not None else {}
    text = str(point.get("text") or ("–" if value is None else number(value, digits=2)))
    text = _MINUS.sub("−", text)
    first, bracket, interval = text.partition(" [")
    row |= {"written": text, "first": first} | ({"interval": f"[{interval}"} if bracket else {})
    return row


_MINUS = re.compile(r"(?<!\w)-(?=[\d.])")


def _written(base: alt.Chart, rows: Sequence[Row], n_columns: int) -> list[alt.Chart]:
    """Numbers in their tiles, and their intervals below them where there is room."""
    has_intervals = n_columns <= _MOST_INTERVALS and any("interval" in row for row in rows)
    longest = max(len(row["first"]) for row in rows)
    size = 12 if n_columns <= _MOST_INTERVALS or longest <= _SHORT else 10
    layers = [base.mark_text(color="--ink", fontSize=size, dy=-7 if has_intervals else 0).encode(text="first:N")]
    if has_intervals:
        small = base.transform_filter("isValid(datum.interval)").mark_text(color="--ink", fontSize=10, dy=8)
        layers.append(small.encode(text="interval:N"))
    return layers


def _matrix_tooltip(figure: Mapping[str, Any], rows: Sequence[Row]) -> list[alt.Tooltip]:
    found = [alt.Tooltip("line:N", title=figure["y"] or "row"), alt.Tooltip("column:N", title=figure["x"] or "column")]
    numbers = (("value", figure["value"] or "value"), ("low", "95 % from"), ("high", "95 % to"), ("n", "n"))
    for field, words in numbers:
        if any(row.get(field) is not None for row in rows):
            found.append(alt.Tooltip(f"{field}:Q", title=words, format=".3~g"))
    return [*found, alt.Tooltip("written:N", title="in words")]


def attention(figure: Mapping[str, Any], panels: Mapping[str, Sequence[Row]]) -> Maps:
    """How much each position attends to each other; squares of one size, tokens named where there is room."""
    points = [point for own in panels.values() for point in own]
    ramp = _ramp(figure["value"] or "attention", [p["value"] for p in points if p["value"] is not None], True)
    positions = sorted({int(point[side]) for point in points for side in ("query", "key")})
    n = len(positions)
    named = n <= MOST_TOKENS
    # A single map has the page to itself.
    cell = max(6, min(26, (330 if len(panels) > 1 else 500) // n))
    axis = partial(alt.Axis, labelLimit=84, labelFontSize=11 if n <= 16 else 9, ticks=False, domain=False, grid=False)
    axis = partial(axis, labelOverlap=False, **({} if named else {"values": positions[:: max(1, n // 10)]}))
    specs = {}
    for name, own in panels.items():
        rows = [_attention_row(point, named) for point in own]
        asked, held = (_token_labels(own, side) if named else positions for side in ("query", "key"))
        base = alt.Chart(alt.NamedData(name=ROWS)).encode(
            x=alt.X(
                "k:O",
                title=titled(figure["x"]),
                axis=axis(labelAngle=-90 if named else 0),
                scale=alt.Scale(domain=held),
            ),
            y=alt.Y("q:O", title=titled(figure["y"]), axis=axis(), scale=alt.Scale(domain=asked)),
            tooltip=[
                alt.Tooltip("q:N", title="query"),
                alt.Tooltip("k:N", title="key"),
                alt.Tooltip("v:Q", title=figure["value"] or "attention", format=".3~g"),
            ],
        )
        tiles = base.mark_rect(aria=False, stroke="--paper", strokeWidth=0.5).encode(color=ramp.encoded("v"))
        described = f"Attention, query by key{f', {name}' if name else ''}"
        specs[name] = with_rows(spec(alt.layer(tiles), height=cell * n, description=described), rows)
    return Maps(specs, ramp, wide=n > 22, width=cell * n + (130 if named else 70))


def _attention_row(point: Row, named: bool) -> dict[str, Any]:
    value = None if point["value"] is None else float(f"{point['value']:.3g}")
    if not named:
        return {"q": int(point["query"]), "k": int(point["key"]), "v": value}
    return {"q": _token(point, "query"), "k": _token(point, "key"), "v": value}


def _token_labels(points: Sequence[Row], side: str) -> list[str]:
    found = {int(point[side]): _token(point, side) for point in points}
    return [found[position] for position in sorted(found)]


def _token(point: Row, side: str) -> str:
    """The token with its position, which tells it from its like."""
    text = str(point.get(f"{side}_token", "")).replace("\n", "↵").replace("Ġ", "␣").strip() or "␣"
    text = text if len(text) <= _TOKEN_LETTERS else text[: _TOKEN_LETTERS - 1] + "…"
    return f"{point[side]} {text}"

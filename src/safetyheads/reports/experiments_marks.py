"""Bars, lines, curves and points of the experiments' figures, panel by panel.

Owns the marks, their layers and tooltips; refuses to know where rows come from, experiments and HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import altair as alt

from safetyheads.reports.drawing import ROWS, Spec, spec, with_rows
from safetyheads.reports.experiments_axes import Heights, Key, Places, by_series, titled, wrapped
from safetyheads.reports.experiments_labels import label_spots

LABEL_WIDTH = 13
"""Characters of a line of a label under bars, unless a word is longer."""
_PHONE, _LETTER = 300.0, 6.4
"""Pixels of a panel on a phone, and of a letter of its labels: bars lie where labels would not fit upright."""
_MOST_UPRIGHT = 22
"""Bars that a panel holds side by side on a phone."""
_LYING_LABEL = 24
_MOST_LINES = 3
"""Lines of a label under upright bars."""
MOST_INTERVALS = 60
"""Points of a scatter up to which intervals are drawn: among more nobody could tell whose they are."""
_HEIGHT = 250
_BROKEN = "split(datum.label, '\\n')"
"""Of labels: their lines."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a panel is drawn from."""

    figure: Mapping[str, Any]
    rows: Sequence[dict[str, Any]]
    """Its points: s (the series), y, low, high, opacity of bars, and place along x or label; x, n, series and name are
    as they were given."""
    shown: Sequence[Key]
    """Every series of the figure."""
    axis: Heights
    place: Places | None
    """None where x has names, and no numbers."""
    described: str
    """For those who do not see it."""

    @property
    def x(self) -> alt.X:
        """Along numbers or names."""
        if self.place is not None:
            return self.place.axis(self.figure["x"])
        marked = alt.Axis(labelExpr=_BROKEN, labelAngle=0, labelLimit=110, grid=False)
        return alt.X("label:O", sort=None, title=titled(self.figure["x"]), axis=marked)

    @property
    def base(self) -> alt.Chart:
        """The rows along x, coloured by series."""
        chart: alt.Chart = alt.Chart(alt.NamedData(name=ROWS)).encode(
            x=self.x, color=by_series(alt.Color, self.shown, "colour")
        )
        return chart

    @property
    def tooltip(self) -> list[alt.Tooltip]:
        """All that is known of a point; x as it is given, not where it stands."""
        plain = [("name", "name"), ("series", "series"), ("x", self.figure["x"])]
        measured = [("y", self.figure["y"]), ("low", "95 % from"), ("high", "95 % to")]
        found = [alt.Tooltip(f"{name}:N", title=title) for name, title in plain if any(name in r for r in self.rows)]
        for name, title in measured:
            if any(row[name] is not None for row in self.rows):
                found.append(alt.Tooltip(f"{name}:Q", title=title, format=".3~g"))
        return [*found, *([alt.Tooltip("n:N", title="n")] if any("n" in row for row in self.rows) else [])]

    def layered(self, layers: Sequence[alt.Chart], height: int = _HEIGHT) -> Spec:
        """The panel."""
        return with_rows(spec(alt.layer(*layers), height=height, description=self.described), self.rows)


def bars(sheet: Sheet) -> Spec:
    """Bars with intervals, side by side; where names are long or many, lying and one below the other."""
    labels = list(dict.fromkeys(row["label"] for row in sheet.rows))
    longest = max(len(line) for label in labels for line in label.split("\n"))
    tall = max(label.count("\n") for label in labels) >= _MOST_LINES
    lying = longest * _LETTER > _PHONE / len(labels) or tall or len(labels) * len(sheet.shown) > _MOST_UPRIGHT
    if lying:
        sheet = replace(sheet, rows=[row | {"label": wrapped(str(row["x"]), _LYING_LABEL)} for row in sheet.rows])
    base = _lying(sheet) if lying else _upright(sheet)

    def along(field: str) -> dict[str, Any]:
        return {"x": sheet.axis.x(field)} if lying else {"y": sheet.axis.y(field)}

    whole = base.transform_filter("isValid(datum.y)")
    empty = base.transform_filter("!isValid(datum.y)").transform_calculate(none="0")
    colour = by_series(alt.Color, sheet.shown, "colour")
    opacity = alt.Opacity("opacity:Q", scale=None, legend=None)
    ends = {"x2" if lying else "y2": "high:Q"}
    held = whole.transform_filter("isValid(datum.low)")
    dash = empty.mark_text(text="–", color="--ink-soft", dx=6 if lying else 0, dy=0 if lying else -6)
    layers = [
        whole.mark_bar().encode(color=colour, opacity=opacity, tooltip=sheet.tooltip, **along("y")),
        # A line at the end: a bar of 0 is a number too.
        whole.mark_tick(thickness=2).encode(color=colour, **along("y")),
        held.mark_rule(strokeWidth=1.5, color="--ink").encode(**along("low"), **ends),
        dash.encode(tooltip=sheet.tooltip, **along("none")),
    ]
    if sheet.axis.low < 0:
        layers.insert(0, _at_zero(sheet.axis, lying))
    each = max(30, 16 * len(sheet.shown))
    return sheet.layered(layers, max(120, len(labels) * each + 20) if lying else _HEIGHT)


_BANDS = partial(alt.Scale, paddingInner=0.3, paddingOuter=0.14)


def _upright(sheet: Sheet) -> alt.Chart:
    names = [key.identity for key in sheet.shown]
    within = alt.XOffset("s:N", sort=names, scale=alt.Scale(domain=names, paddingInner=0.08, paddingOuter=0.1))
    marked = alt.Axis(labelExpr=_BROKEN, labelAngle=0, labelLimit=110, labelOverlap=False, ticks=False, grid=False)
    x = alt.X("label:O", sort=None, title=titled(sheet.figure["x"]), axis=marked, scale=_BANDS())
    chart: alt.Chart = alt.Chart(alt.NamedData(name=ROWS)).encode(x=x, xOffset=within)
    return chart


def _lying(sheet: Sheet) -> alt.Chart:
    names = [key.identity for key in sheet.shown]
    within = alt.YOffset("s:N", sort=names, scale=alt.Scale(domain=names, paddingInner=0.08, paddingOuter=0.1))
    marked = alt.Axis(labelExpr=_BROKEN, labelLimit=170, labelOverlap=False, ticks=False, grid=False)
    y = alt.Y("label:O", sort=None, title=titled(sheet.figure["x"]), axis=marked, scale=_BANDS())
    chart: alt.Chart = alt.Chart(alt.NamedData(name=ROWS)).encode(y=y, yOffset=within)
    return chart


def _at_zero(axis: Heights, lying: bool = False) -> alt.Chart:
    base = alt.Chart(alt.InlineData(values=[{"none": 0}]))
    encoded = base.encode(x=axis.x("none")) if lying else base.encode(y=axis.y("none"))
    rule: alt.Chart = encoded.mark_rule(strokeWidth=1, color="--ink-soft")
    return rule


def _behind(sheet: Sheet) -> list[alt.Chart]:
    """A line at no change, and one that sets 0 apart from a logarithmic axis."""
    layers = [_at_zero(sheet.axis)] if sheet.axis.low < 0 < sheet.axis.high else []
    if sheet.place is not None and sheet.place.cut is not None:
        cut = alt.Chart(alt.InlineData(values=[{"place": sheet.place.cut}])).encode(x=sheet.x)
        layers.append(cut.mark_rule(strokeWidth=1, strokeDash=[1, 3], color="--ink-soft"))
    return layers


def lines(sheet: Sheet) -> Spec:
    """Lines through points with intervals."""
    base, y, dashes = sheet.base, sheet.axis.y("y"), by_series(alt.StrokeDash, sheet.shown, "dash")
    held = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, opacity=0.5)
    points = base.transform_filter("isValid(datum.y)").mark_point(filled=True, size=60, opacity=1)
    layers = [
        *_behind(sheet),
        held.encode(y=sheet.axis.y("low"), y2="high:Q"),
        # No line leads over the cut to 0.
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=dashes, detail="zero:N"),
        points.encode(y=y, shape=by_series(alt.Shape, sheet.shown, "shape"), tooltip=sheet.tooltip),
    ]
    return sheet.layered(layers)


def curves(sheet: Sheet) -> Spec:
    """Lines without points."""
    line = sheet.base.mark_line(strokeWidth=2).encode(
        y=sheet.axis.y("y"), strokeDash=by_series(alt.StrokeDash, sheet.shown, "dash"), tooltip=sheet.tooltip
    )
    return sheet.layered([*_behind(sheet), line])


def scatter(sheet: Sheet) -> Spec:
    """Points, with intervals where they are few, and names where there is room."""
    base, crowded, layers = sheet.base, len(sheet.rows) > MOST_INTERVALS, _behind(sheet)
    if not crowded:
        held = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.2, opacity=0.45)
        layers.append(held.encode(y=sheet.axis.y("low"), y2="high:Q"))
    size, opacity = (34, 0.6) if crowded else (75, 0.95)
    points = base.transform_filter("isValid(datum.y)").mark_point(filled=True, size=size, opacity=opacity, aria=False)
    shape = by_series(alt.Shape, sheet.shown, "shape")
    layers.append(points.encode(y=sheet.axis.y("y"), shape=shape, tooltip=sheet.tooltip))
    # Where names go follows from where points stand on a phone; wider pages have more room.
    spots = label_spots(sheet.rows, sheet.axis, sheet.place) if sheet.place is not None else {}
    for spot, named in spots.items():
        text = alt.Chart(alt.InlineData(values=named)).mark_text(
            color="--ink", fontSize=11, align=spot.align, baseline="middle", dx=spot.dx, dy=spot.dy
        )
        layers.append(text.encode(x=sheet.x, y=sheet.axis.y("y"), text="name:N"))
    return sheet.layered(layers, 300)

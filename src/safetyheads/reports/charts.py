"""Draws the figures of every page with altair, as Vega-Lite specifications.

A colour is the name of a custom property of the page, such as ``--attack``: the page's script puts in the colour of its
light or dark theme, and fits the panels of a figure to the width of the window.
"""

import math
import re
import textwrap
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Literal, TypeAlias

import altair as alt
import vl_convert

from safetyheads.errors import InputError
from safetyheads.files import read_regular, write_atomically
from safetyheads.prompts.files import cache_directory

Row: TypeAlias = Mapping[str, Any]
Spec: TypeAlias = dict[str, Any]

_VERSION = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
HEADS = "heads"
"""Dataset of all heads, which the page's script makes of the columns in the page."""
ROWS = "rows"
"""Dataset of a figure's own rows."""
COLOURS = ("--attack", "--kept", "--third", "--fourth", "--ink-soft")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
DASHES = ([1, 0], [6, 4], [2, 3])
OPACITIES = (0.75, 0.42, 0.2)
RANDOM_GROUPS = "random groups: ASR"
"""The series of single random groups, which are ticks over a band."""
KNOWN_COLOURS = {
    **dict.fromkeys(("vanilla", "unablated", "other", "random groups", "random heads", RANDOM_GROUPS), "--random"),
    **dict.fromkeys(
        ("UA", "planted", "Sahara's group", "searched group: ASR", "ASR, verdict’s group ablated"), "--attack"
    ),
    **dict.fromkeys(
        ("SC", "benign prompts answered", "searched group: benign answered", "ASR, nothing ablated"), "--kept"
    ),
}
"""Series that have one colour on every page, unless another of the figure has it."""
HEAT = ("--heat-0", "--heat-1", "--heat-2", "--heat-3", "--heat-4")
SIGNED_HEAT = ("--cold-4", "--cold-2", "--neutral", "--heat-2", "--heat-4")
PALE_HEAT, PALE_SIGNED_HEAT = HEAT[:3], SIGNED_HEAT[1:4]
"""Under text, which keeps its contrast on them in both themes."""
LEAST_SHARE = 0.1
"""The colours of a share reach at least so far: differences of one answer would else look strongest."""
MOST_INTERVALS = 60
"""Points of a panel up to which a scatter shows intervals and names: among more nobody could tell whose they are."""
MOST_COLUMNS_WITH_INTERVALS = 3
"""Columns up to which tiles hold their intervals too."""
MOST_TILES_WITH_TEXT = 8
"""Columns up to which tiles hold their numbers."""
MOST_LABELS = 32
"""Tiles across up to which all are labelled."""
_PICTURE_WIDTH = 440
_NOT_DRAWN = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Pictures are drawn through XML, which has no other characters."""
_MOST_TOLD = 3
"""Numbers that a figure's description names."""
_NAMES = ("datasets", "domain", "sort", "values", "title", "description")
"""Keys under which a text that looks like a colour's name is a name of something measured."""
LEAST_WIDTH, MOST_WIDTH = 290, 780
"""Pixels that one of several panels has at least, unless the window has fewer, and lines, points and bars at most."""
NAME: dict[str, Any] = {"color": "--ink", "fontSize": 12, "fontWeight": 600}
"""How names of heads beside their points are written."""
_BROKEN_LABEL = "split(datum.label, '\\n')"


def spec(
    layers: Sequence[Any],
    rows: Sequence[Row],
    height: int,
    description: str,
    *,
    most: int | None = None,
    independent: Mapping[str, Any] | None = None,
) -> Spec:
    """The layers over the rows, or over the page's heads without any, one panel for each ``panel`` that the rows name.

    ``height`` and ``most``, the width at most, are pixels of a panel; each has scales of its own for ``independent``.
    """
    panels = list(dict.fromkeys(str(row["panel"]) for row in rows if row.get("panel")))
    chart: Any = alt.layer(*layers, data=alt.NamedData(ROWS if rows else HEADS))
    if len(panels) > 1:
        header = alt.Header(title=None, labelAnchor="start", labelFontWeight=600, labelFontSize=13, labelPadding=8)
        chart = chart.properties(width=LEAST_WIDTH, height=height)
        chart = chart.facet(facet=alt.Facet("panel:N", sort=panels, header=header), columns=3)
        chart = chart.resolve_axis(x="independent", y="independent")
        if independent:
            chart = chart.resolve_scale(**independent)
    else:
        chart = chart.properties(width="container", height=height)
    # Checking against the schema takes seconds a page; the tests check every figure.
    vega: Spec = chart.properties(description=description).to_dict(validate=False)
    # The page's own library draws it, in the page's own theme.
    for field in ("$schema", "config"):
        vega.pop(field, None)
    if rows:
        vega["datasets"] = {**vega.get("datasets", {}), ROWS: [*rows]}
    vega["usermeta"] = {"panels": len(panels), "least": LEAST_WIDTH, "most": most}
    return vega


@cache
def drawing_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, in the version that the specifications are written for.

    Putting it together takes two seconds, so it is kept in the cache directory where that can be written.
    """
    kept = cache_directory() / f"vega-{_VERSION}-{version('vl-convert-python')}.js"
    with suppress(InputError, OSError, UnicodeError):
        return read_regular(kept).decode()
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VERSION)
    # Inside a script element these two would end or hide the rest of the page.
    bundle = bundle.replace("</script", r"<\/script").replace("<!--", r"<\!--")
    with suppress(InputError, OSError):
        write_atomically(kept, bundle.encode())
    return bundle


@cache
def _light_colours() -> dict[str, str]:
    style = (files("safetyheads") / "reports/templates/report.css").read_text(encoding="utf-8").partition("@media")[0]
    return dict(re.findall(r"(--[\w-]+): ([^;]+);", style))


def _with_texts(change: Callable[[str], str], value: Any, without: Collection[str] = ()) -> Any:
    """The same with each text changed, but for what stands under the names ``without``."""
    if isinstance(value, list | tuple):
        return [_with_texts(change, inner, without) for inner in value]
    if isinstance(value, dict):
        return {
            name: inner if name in without else _with_texts(change, inner, without) for name, inner in value.items()
        }
    return change(value) if isinstance(value, str) else value


def _longest_name(value: Any) -> int:
    """Characters of the longest name in a legend, as the page's script counts them."""
    if isinstance(value, list):
        return max(map(_longest_name, value), default=0)
    if not isinstance(value, dict):
        return 0
    names = (value.get("scale") or {}).get("domain", ()) if value.get("legend") else ()
    return max([0, *(len(str(name)) for name in names), *map(_longest_name, value.values())])


def pictures(specs: Mapping[str, Spec], columns: Mapping[str, Any]) -> dict[str, str]:
    """Each figure as a PNG in a data address, for browsers that run no JavaScript: the light theme, as on paper."""
    heads: list[dict[str, Any]] = []
    for at in range(max(map(len, columns["scores"].values()), default=0)):
        layer, index = divmod(at, columns["n_heads"])
        row = {name: values[at] for name, values in columns["scores"].items()}
        heads.append({"head": f"{layer}-{index}", "layer": layer, "index": index, **row})
    by_name = {row["head"]: row for row in heads}
    for rank, head in enumerate(columns["best_first"], 1):
        by_name[head]["rank"] = rank
    for mark, named in columns.items():
        if isinstance(named, list) and mark != "best_first":
            for head in named:
                by_name[head][mark] = True
    found = {}
    for name, spec in specs.items():
        # In the colours of the light theme, as the page's script puts them in.
        drawn = _with_texts(lambda text: _light_colours().get(text, text), spec, _NAMES)
        drawn |= {"datasets": {**spec.get("datasets", {}), HEADS: heads}, "background": "#fcfbf8"}
        text = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 400}
        columns_of_legend = max(1, _PICTURE_WIDTH // (34 + 7 * _longest_name(spec)))
        legend = text | {"labelLimit": _PICTURE_WIDTH - 60, "columns": columns_of_legend}
        drawn |= {"config": {"axis": text, "legend": legend}} | ({"columns": 2} if "facet" in spec else {})
        drawn |= {"width": _PICTURE_WIDTH} if spec.get("width") == "container" else {}
        # No picture can hold some characters, such as those of control.
        drawn = _with_texts(partial(_NOT_DRAWN.sub, "\ufffd"), drawn)
        png = vl_convert.vegalite_to_png(drawn, vl_version=_VERSION, scale=1.25)
        found[name] = f"data:image/png;base64,{b64encode(png).decode()}"
    return found


# Axes, series, tooltips.


def titled(text: str) -> list[str]:
    """An axis title over as many lines as it takes."""
    return textwrap.wrap(text, 42) or [text]


def rounded(value: float | None, digits: int = 5) -> float | None:
    """As many digits as a figure shows: a page may carry numbers of thousands of heads."""
    return None if value is None else float(f"{value:.{digits}g}")


def interval_row(x: Any, y: float | None, interval: Sequence[float] | None, **more: Any) -> dict[str, Any]:
    """A row of a figure: a point with its interval, and what else is told of it."""
    low, high = map(rounded, interval or (None, None))
    return {"x": x, "y": rounded(y), "low": low, "high": high, **more}


def score_columns(scores: Mapping[str, Row]) -> dict[str, list[float | None]]:
    """Each score of all heads, head after head."""
    rows = {name: score["values"] for name, score in scores.items()}
    return {name: [rounded(value, 6) for layer in layers for value in layer] for name, layers in rows.items()}


def numbers_along(title: str, values: Iterable[float], logarithmic: bool = False) -> alt.X:
    """The axis of the field ``x``; 0 stands at the left end of a logarithmic one."""
    known = sorted(set(values))
    axis: dict[str, Any] = {"grid": False, "format": ".6~g", "labelOverlap": "greedy", "tickCount": 6}
    scale: dict[str, Any] = {"nice": False, "padding": 14}
    if logarithmic:
        positive = [value for value in known if value > 0] or [1.0]
        low, high = (math.log10(end) for end in (positive[0], positive[-1]))
        step = max(1, math.ceil((high - low) / 6))
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1, step)
        ticks = [10.0**power for power in powers] if len(powers) > 1 else positive[:: max(1, len(positive) // 5)]
        scale["type"] = "log"
        if 0 in known:
            scale |= {"type": "symlog", "constant": positive[0] / 4}
            ticks = [0.0, *ticks]
        axis["values"] = ticks
    else:
        scale["zero"] = False
        if known and all(float(value).is_integer() for value in known) and known[-1] - known[0] <= 12:
            axis |= {"values": list(range(int(known[0]), int(known[-1]) + 1)), "format": "d"}
    return alt.X("x:Q", title=titled(title), scale=alt.Scale(**scale), axis=alt.Axis(**axis))


def measured_axis(title: str, rows: Iterable[Row], share: bool, zero: bool = False) -> dict[str, Any]:
    """Title, scale and axis of what was measured: shares run from 0 to 1, unless one lies outside, as a change may."""
    ends = [row[name] for row in rows for name in ("y", "low", "high") if row.get(name) is not None]
    if share and all(0 <= end <= 1 for end in ends):
        scale, axis = alt.Scale(domain=[0, 1], nice=False), alt.Axis(format=".1f", tickCount=6)
    else:
        scale, axis = alt.Scale(zero=zero), alt.Axis(format=".6~g", tickCount=5)
    return {"title": titled(title), "scale": scale, "axis": axis}


def series_colours(names: Sequence[str]) -> list[tuple[str, int]]:
    """A colour for each series, and how often it was used before: dashes, shapes and opacities tell those apart."""
    known: dict[str, str] = {}
    for name in names:
        if name in KNOWN_COLOURS and KNOWN_COLOURS[name] not in known.values():
            known[name] = KNOWN_COLOURS[name]
    greys = ("--ink-soft",) if "--random" in known.values() else ()
    free = [colour for colour in COLOURS if colour not in (*known.values(), *greys)] or list(COLOURS)
    looks = {name: (colour, 0) for name, colour in known.items()}
    for at, name in enumerate(name for name in names if name not in known):
        looks[name] = (free[at % len(free)], at // len(free))
    return [looks[name] for name in names]


def series_look(names: Sequence[str], *channels: Literal["shape", "strokeDash", "opacity"]) -> dict[str, Any]:
    """Encodings that tell the series apart, with one legend; a lone series without a name has none."""
    colours, turns = zip(*series_colours(names), strict=True) if names else ((), ())
    shapes = [SHAPES[(at + turn) % len(SHAPES)] for at, turn in enumerate(turns)]
    shapes = ["stroke" if name == RANDOM_GROUPS else look for name, look in zip(names, shapes, strict=True)]
    ranges: dict[str, tuple[Any, list[Any]]] = {
        "color": (alt.Color, [*colours]),
        "shape": (alt.Shape, shapes),
        "strokeDash": (alt.StrokeDash, [DASHES[turn % len(DASHES)] for turn in turns]),
        "opacity": (alt.Opacity, [OPACITIES[turn % len(OPACITIES)] for turn in turns]),
    }
    square = {"symbolType": "square"} if "opacity" in channels else {"symbolOpacity": 1}
    legend, found = None if list(names) == [""] else alt.Legend(orient="top", title=None, **square), {}
    for channel in ("color", *channels):
        if channel != "opacity" or any(turns):
            kind, held = ranges[channel]
            # Without its type a scale of opacities would lie evenly between the ends of its range.
            scale = alt.Scale(type="ordinal", domain=[*names], range=held)
            found[channel] = kind("series:O" if channel == "opacity" else "series:N", legend=legend, scale=scale)
    return found


def ends_in_words(rows: Iterable[Row], x: str) -> str:
    """The first and the last number of each line, for readers who do not see it."""
    ends: dict[str, list[Row]] = {}
    for row in sorted((row for row in rows if not row.get("kind") and row.get("y") is not None), key=lambda r: r["x"]):
        ends.setdefault(f"{row.get('panel') or ''} {row['series']}".strip(), []).append(row)
    told = [
        f"{name} {of[0]['y']:.2g} at {of[0]['x']:g}, {of[-1]['y']:.2g} at {of[-1]['x']:g}"
        for name, of in list(ends.items())[:_MOST_TOLD]
    ]
    return f" ({x}): {'; '.join(told)}" if told else ""


def tops_in_words(named: Mapping[str, float | None], unit: str = "") -> str:
    """The highest numbers with their names, for readers who do not see the figure."""
    best = sorted(((value, name) for name, value in named.items() if value is not None), key=lambda pair: -pair[0])
    return ": " + ", ".join(f"{name} {value:.3g}{unit}" for value, name in best[:_MOST_TOLD]) if best else ""


def series_of(rows: Iterable[Row]) -> list[str]:
    """The names of the series, in order of appearance."""
    return list(dict.fromkeys(row["series"] for row in rows))


def tooltip(rows: Sequence[Row], titles: Mapping[str, str]) -> list[alt.Tooltip]:
    """The fields that some row has, each with its title."""
    found = []
    for field, title in titles.items():
        values = [row[field] for row in rows if row.get(field) not in (None, "")]
        if any(isinstance(value, float) for value in values):
            found.append(alt.Tooltip(f"{field}:Q", title=title, format=".3~g"))
        elif values:
            found.append(alt.Tooltip(f"{field}:N", title=title))
    return found


def rows_tooltip(rows: Sequence[Row], x: str, y: str) -> list[alt.Tooltip]:
    """What a row of bars, lines and points tells."""
    titles = {"label": "name", "series": "series", "run": "run", "model": "model", "started": "started"}
    titles |= {"heads": "heads", "x": x, "y": y, "low": "95 % from", "high": "95 % to", "n": "n"}
    return tooltip(rows, titles | {"answers": "answers", "limit": "limit of the gate"})


def rule_at(axis: Literal["x", "y"], value: float, scale: Mapping[str, Any], **mark: Any) -> alt.Chart:
    """A thin line across the panel."""
    drawn: dict[str, Any] = {"strokeWidth": 1, "strokeDash": [1, 2], "color": "--ink-soft"} | mark
    chart: alt.Chart = alt.Chart(alt.InlineData(values=[{"at": rounded(value)}])).mark_rule(**drawn)
    return chart.encode({"x": alt.X, "y": alt.Y}[axis]("at:Q", **scale))


# Kinds of figures.


def lines(
    rows: Sequence[Row],
    x: str,
    y: str,
    description: str,
    *,
    logarithmic: bool = False,
    share: bool = True,
    points: bool = True,
    reference: float | None = None,
    height: int = 260,
) -> Spec:
    """Lines through points with intervals, or, without ``points``, curves.

    Rows have ``x, y, low, high, series`` and what the tooltip tells. Those whose ``kind`` is ``random`` are single
    random groups, drawn as ticks; ``band`` runs from the lowest of them to the highest, and has their mean. ``x``
    and ``y`` title the axes, ``share`` says whether y runs from 0 to 1, ``reference`` is the y of a dotted line.
    """
    names = series_of(row for row in rows if not row.get("kind"))
    beside = points and 1 < len(names) <= 6
    # Pixels to the side, so that no interval of one series hides another's.
    shifts = {name: 5 * (at - (len(names) - 1) / 2) if beside else 0 for at, name in enumerate(names)}
    rows = [row if row.get("kind") else {**row, "shift": shifts[row["series"]]} for row in rows]
    along, measured = numbers_along(x, (row["x"] for row in rows), logarithmic), measured_axis(y, rows, share)
    look = series_look(series_of(rows), *(("shape", "strokeDash") if points else ("strokeDash",)))
    tooltips = rows_tooltip(rows, x, y)
    base = alt.Chart().encode(x=along, color=look["color"])
    single = base.transform_filter("!datum.kind")
    up, ends = alt.Y("y:Q", **measured), {"y": alt.Y("low:Q", **measured), "y2": "high:Q"}
    off: dict[str, Any] = {"xOffset": alt.ExprRef("datum.shift")} if beside else {}
    layers = [rule_at("y", reference, measured)] if reference is not None else []
    if any((row.get("low") or 0) < 0 or (row.get("y") or 0) < 0 for row in rows):
        layers.append(rule_at("y", 0, measured, strokeDash=[1, 0], opacity=0.6))
    if sizes := {row["x"] for row in rows if row.get("kind") == "band"}:
        # From the lowest random group to the highest, their mean, and a tick for each of them.
        band, tick = base.transform_filter("datum.kind == 'band'"), base.transform_filter("datum.kind == 'random'")
        if len(sizes) == 1:
            layers.append(band.mark_rule(strokeWidth=26, opacity=0.22).encode(**ends))
        else:
            layers.append(band.mark_area(opacity=0.22, line=False).encode(**ends))
            layers.append(band.mark_line(strokeWidth=1.5, strokeDash=[2, 3]).encode(y=up))
        look_of_tick: dict[str, Any] = {"orient": "horizontal", "width": 16, "thickness": 1.5, "opacity": 0.75}
        layers.append(tick.mark_tick(**look_of_tick).encode(y=up, tooltip=[*tooltips]))
    if points and any(row.get("low") is not None for row in rows):
        held = single.transform_filter("isValid(datum.low)")
        layers.append(held.mark_rule(strokeWidth=1.5, opacity=0.55, **off).encode(**ends))
    line = single.mark_line(strokeWidth=2, **off).encode(y=up, strokeDash=look["strokeDash"])
    layers.append(line if points else line.encode(tooltip=tooltips))
    if points:
        marks = single.transform_filter("isValid(datum.y)").mark_point(filled=True, size=62, opacity=1, **off)
        layers.append(marks.encode(y=up, shape=look["shape"], tooltip=tooltips))
    return spec(layers, rows, height, description + ends_in_words(rows, x), most=MOST_WIDTH)


def scatter(
    rows: Sequence[Row], x: str, y: str, description: str, *, logarithmic: bool = False, share: bool = True
) -> Spec:
    """Points with intervals where they are few; the highest of each panel are named beside them.

    Rows have ``x, y, low, high, series, label`` and what the tooltip tells; ``x`` and ``y`` title the axes.
    """
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(str(row.get("panel")), []).append(row)
    few = max(map(len, panels.values()), default=0) <= MOST_INTERVALS
    named = []
    for points in panels.values():
        top = sorted((row for row in points if row.get("y") is not None), key=lambda row: -row["y"])[:3]
        # Far enough from the others' heights, and short, so that names do not meet.
        high = (row for row in top if row["y"] > top[0]["y"] / 3)
        named += [row for row in high if 0 < len(str(row.get("label") or "")) <= 6]
    rows = [row | {"named": True} if row in named else row for row in map(dict, rows)]
    look, measured = series_look(series_of(rows), "shape"), measured_axis(y, rows, share)
    base = alt.Chart().encode(x=numbers_along(x, (row["x"] for row in rows), logarithmic))
    up = alt.Y("y:Q", **measured)
    layers = []
    if few:
        held = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.2, opacity=0.45)
        ends = {"y": alt.Y("low:Q", **measured), "y2": "high:Q"}
        layers.append(held.encode(color=look["color"], **ends))
    size, opacity = (75, 0.95) if few else (34, 0.6)
    marks = base.transform_filter("isValid(datum.y)").mark_point(filled=True, size=size, opacity=opacity, aria=False)
    layers.append(marks.encode(y=up, tooltip=rows_tooltip(rows, x, y), **look))
    if named:
        text = base.transform_filter("datum.named").mark_text(dy=-13, **NAME)
        layers.append(text.encode(y=up, text="label:N"))
    told = tops_in_words({str(row.get("label") or row["series"]): row.get("y") for row in rows})
    return spec(layers, rows, 300, description + told, most=MOST_WIDTH)


def bars(rows: Sequence[Row], x: str, y: str, description: str, *, share: bool = True) -> Spec:
    """Bars with intervals, lying, so that any name has room; a dash stands where nothing could be scored.

    Rows have ``x`` (a name), ``y, low, high, series``, ``limit`` of a gate, and what the tooltip tells; ``x`` and ``y``
    title the axes.
    """
    names = series_of(rows)
    # Single words stay whole.
    lines_of = {row["x"]: textwrap.wrap(str(row["x"]), 22, break_long_words=False) for row in rows}
    rows = [row | {"name": "\n".join(lines_of[row["x"]]) or str(row["x"])} for row in map(dict, rows)]
    labels = list(dict.fromkeys(row["name"] for row in rows))
    look, measured = series_look(names, "opacity"), measured_axis(y, rows, share, zero=True)
    axis = alt.Axis(labelExpr=_BROKEN_LABEL, labelLimit=170, labelOverlap=False, ticks=False, grid=False)
    places = alt.Scale(paddingInner=0.26, paddingOuter=0.13)
    within = alt.YOffset("series:N", sort=names, scale=alt.Scale(domain=names, paddingInner=0.08))
    base = alt.Chart().encode(y=alt.Y("name:N", sort=None, title=titled(x), axis=axis, scale=places), yOffset=within)
    along = alt.X("y:Q", **measured)
    whole, tooltips = base.transform_filter("isValid(datum.y)"), rows_tooltip(rows, x, y)
    held = whole.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5, color="--ink")
    layers = [
        whole.mark_bar(opacity=OPACITIES[0]).encode(x=along, tooltip=tooltips, **look),
        # A line at the end: a bar of 0 is a number too.
        whole.mark_tick(thickness=2).encode(x=along, color=look["color"]),
        held.encode(x=alt.X("low:Q", **measured), x2="high:Q"),
    ]
    if any(row.get("y") is None for row in rows):
        empty = base.transform_filter("!isValid(datum.y)").transform_calculate(zero="0")
        dash = empty.mark_text(text="–", color="--ink-soft", dx=6)
        layers.append(dash.encode(x=alt.X("zero:Q", **measured), tooltip=tooltips))
    if any(row.get("limit") is not None for row in rows):
        limits = whole.transform_filter("isValid(datum.limit)").mark_tick(thickness=2.5, color="--kept")
        layers.append(limits.encode(x=alt.X("limit:Q", **measured)))
    if any((row.get("low") or row.get("y") or 0) < 0 for row in rows):
        layers.insert(0, rule_at("x", 0, measured, strokeDash=[1, 0]))
    band = max(15 * len(names) + 8, 15 * max(label.count("\n") + 1 for label in labels) + 8, 30)
    panels: dict[Any, set[str]] = {}
    for row in rows:
        panels.setdefault(row.get("panel"), set()).add(row["name"])
    apart = {"y": "independent"} if len(set(map(frozenset, panels.values()))) > 1 else None
    height = band * (len(labels) if apart is None else max(map(len, panels.values())))
    told = tops_in_words({f"{row['x']} {row['series']}".strip(): row.get("y") for row in rows})
    return spec(layers, rows, max(90, height), description + told, most=MOST_WIDTH, independent=apart)


# Numbers as colours.


def heat(
    field: str, values: Iterable[float], title: str, *, share: bool = False, pale: bool = False, roots: bool = False
) -> alt.Color:
    """Colours of the numbers of a field, on both sides of 0 where some are negative.

    ``values`` are all that are shown, of every panel. ``pale`` colours have text on them. With ``roots``, colours
    are at equal steps of the square root: where most numbers are near 0, they would else look alike.
    """
    known = list(values)
    largest = max([*map(abs, known), LEAST_SHARE if share else 0.0]) or 1.0
    # A divergence that rounds to just below 0 does not make numbers signed.
    signed = min(known, default=0.0) < -0.01 * largest
    colours = (PALE_SIGNED_HEAT if pale else SIGNED_HEAT) if signed else (PALE_HEAT if pale else HEAT)
    steps = [2 * at / (len(colours) - 1) - 1 if signed else at / (len(colours) - 1) for at in range(len(colours))]
    domain = [math.copysign(abs(step) ** 2 if roots else abs(step), step) * largest for step in steps]
    top = float(f"{largest:.2g}")
    top = top if top <= largest else float(f"{largest * 0.95:.1g}")
    labels = [-top, 0, top] if signed else [0, top / 4 if roots else top / 2, top]
    kind: Literal["sqrt", "linear"] = "sqrt" if roots else "linear"
    scale = alt.Scale(type=kind, domain=domain, range=[*colours], clamp=True, interpolate="lab")
    strip: dict[str, Any] = {"orient": "top", "direction": "horizontal", "gradientLength": 180, "gradientThickness": 8}
    strip["titleLimit"] = 300
    named = titled(f"{title}, square-root scale" if roots else title)
    return alt.Color(f"{field}:Q", scale=scale, legend=alt.Legend(title=named, format=".2~g", values=labels, **strip))


def _tiles_on_ground(base: alt.Chart, color: alt.Color, **mark: Any) -> list[alt.Chart]:
    """A coloured tile for each number, over ground where there is none."""
    field = str(color.shorthand).removesuffix(":Q")
    ground, valid = base.mark_rect(fill="--panel", **mark), base.transform_filter(f"isValid(datum['{field}'])")
    return [ground, valid.mark_rect(**mark).encode(color=color)]


def head_map(
    color: alt.Color,
    shape: tuple[int, int],
    tooltips: Sequence[alt.Tooltip],
    description: str,
    *,
    rows: Sequence[Row] = (),
    outlines: Mapping[str, Mapping[str, Any]] | None = None,
    clickable: bool = False,
) -> Spec:
    """One number of every head as a tile: layers down, heads across; heads without a number stay blank.

    Rows have ``layer, index`` and the field of the colours; without any, the page's heads are drawn. ``shape`` is
    layers and heads in each; ``outlines`` says of each field how the heads where it is true are framed.
    """
    n_layers, n_heads = shape
    cell = max(6, min(34, 460 // max(n_layers, n_heads)))
    mark: dict[str, Any] = {"aria": False} | ({"cursor": "pointer"} if clickable else {})
    sides: dict[str, Any] = {}
    for title, count in (("head", n_heads), ("layer", n_layers)):
        # Numbers are thinned out where there are many.
        shown = list(range(0, count, 1 if count <= 12 else 4 if count <= 48 else 8))
        axis = alt.Axis(values=shown, labelAngle=0, ticks=False, domain=False, labelOverlap=False, grid=False)
        sides[title] = {"title": title, "axis": axis, "scale": alt.Scale(domain=list(range(count)))}
    x, y = alt.X("index:O", **sides["head"]), alt.Y("layer:O", **sides["layer"])
    base = alt.Chart().encode(x=x, y=y, tooltip=[*tooltips])
    layers = _tiles_on_ground(base, color, stroke="--paper", strokeWidth=0.75, **mark)
    for name, look in (outlines or {}).items():
        framed = {"fill": "transparent", "stroke": "--ink", "strokeWidth": 2, "cornerRadius": 1, **mark, **look}
        layers.append(base.transform_filter(f"datum.{name}").mark_rect(**framed))
    if not rows:
        diamond: dict[str, Any] = {"shape": "diamond", "filled": True, "size": 4 * cell, "color": "--ink", "opacity": 1}
        diamond |= {"stroke": "--paper", "strokeWidth": 1, **mark}
        layers.append(base.transform_filter("datum.planted").mark_point(**diamond))
    drawn = spec(layers, rows, cell * n_layers, description)
    # The page's script makes tiles smaller where there is less room, and keeps them square.
    drawn["usermeta"]["square"] = [n_layers, n_heads, cell]
    if "facet" in drawn:
        drawn["spec"]["height"] = LEAST_WIDTH * n_layers // n_heads
    else:
        drawn["width"] = cell * n_heads
    return drawn


def tiles(
    rows: Sequence[Row],
    color: alt.Color,
    x: str,
    y: str,
    tooltips: Sequence[alt.Tooltip],
    description: str,
    *,
    text: bool = False,
    cell: int = 46,
    most: int | None = None,
) -> Spec:
    """A number for each pair of names as a coloured tile.

    Rows have ``x`` and ``y`` (names, in the order of the axes), the field of the colours, and ``text`` and
    ``interval`` where tiles hold them. ``cell`` is the height of a tile in pixels, ``most`` what a panel has across
    at most.
    """
    columns, lines_down = (list(dict.fromkeys(str(row[side]) for row in rows)) for side in ("x", "y"))
    turned = max(map(len, columns)) * 6.4 > 300 / len(columns)
    axis: dict[str, Any] = {"labelLimit": 120, "labelOverlap": len(columns) > MOST_LABELS}
    axis |= {"ticks": False, "domain": False, "grid": False}
    base = alt.Chart().encode(
        x=alt.X("x:O", sort=columns, title=titled(x), axis=alt.Axis(labelAngle=-90 if turned else 0, **axis)),
        y=alt.Y("y:O", sort=lines_down, title=titled(y), axis=alt.Axis(**axis)),
        tooltip=[*tooltips],
    )
    layers = _tiles_on_ground(base, color, aria=False, stroke="--paper", strokeWidth=1 if text else 0.5)
    if text:
        small = any(row.get("interval") for row in rows)
        layers.append(base.mark_text(color="--ink", fontSize=12, dy=-7 if small else 0).encode(text="text:N"))
        if small:
            layers.append(base.mark_text(color="--ink", fontSize=10, dy=8).encode(text="interval:N"))
    return spec(layers, rows, cell * len(lines_down), description, most=most)

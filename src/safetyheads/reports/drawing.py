"""What the figures of audits and scans share: curves over group size, axes, tooltips.

Owns how a rate with its interval is drawn; refuses to know colours (a colour is the name of one of the page's custom
properties, such as ``--attack``, which the page resolves for its light or dark theme), HTML, and results beyond the
rates and groups it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import altair as alt

Spec: TypeAlias = dict[str, Any]
Rate: TypeAlias = Mapping[str, Any]

HEADS = "heads"
"""Name of the dataset of all heads, which the page makes of its columns and gives to every chart that asks for it."""
ROWS = "rows"
"""Name of the rows that :func:`with_rows` puts into a chart."""
DIGITS = 6
"""Significant digits of a number in a figure."""
SEARCHED, RANDOM, KEPT = "searched group: ASR", "random groups: ASR", "searched group: benign kept"
_SHARE_TITLE = "share of held-out prompts"
LINE_COLOURS = ("--attack", "--kept", "--third", "--fourth", "--ink-soft")
LINE_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
MOST_LINES = len(LINE_COLOURS)
"""Lines that one figure can tell apart."""


def curve(
    groups: Sequence[Mapping[str, Any]], vanilla_asr: Rate, vanilla_kept: Rate | None, title: str = _SHARE_TITLE
) -> Spec | None:
    """ASR and benign answers kept against group size, over the band of the random groups.

    Args:
        groups: one a size, with ``size``, ``heads``, ``asr``, ``benign_kept`` and ``random``.
        vanilla_asr: of the unablated model.
        vanilla_kept: of the unablated model; None without benign prompts.
        title: what the rates are shares of.
    """
    y = partial(share_axis, title=title)
    rows = [row for group in groups for row in _group_rows(group)]
    rows += rate_row(0, SEARCHED, vanilla_asr, "none") + rate_row(0, KEPT, vanilla_kept, "none")
    if not groups or not rows:
        return None
    color = alt.Color(
        "series:N",
        legend=alt.Legend(
            orient="top",
            title=None,
            direction="vertical",
            symbolType="stroke",
            symbolOpacity=1,
            symbolSize=500,
            symbolStrokeWidth=2.5,
        ),
        scale=alt.Scale(domain=[SEARCHED, RANDOM, KEPT], range=["--attack", "--random", "--kept"]),
    )
    dash = alt.StrokeDash(
        "series:N",
        legend=alt.Legend(title=None),
        scale=alt.Scale(domain=[SEARCHED, RANDOM, KEPT], range=[[1, 0], [2, 3], [6, 4]]),
    )
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=_sizes(groups), color=color)
    searched = base.transform_filter("datum.kind == 'rate'")
    layers = [
        *_random_layers(base, groups, y),
        searched.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y=y("low"), y2="high:Q"),
        searched.mark_line(strokeWidth=2.5).encode(y=y("value"), strokeDash=dash),
        searched.mark_point(filled=True, size=64, opacity=1).encode(y=y("value"), tooltip=rate_tooltip()),
    ]
    if vanilla_asr["rate"] is not None:
        layers.insert(0, vanilla_rule(vanilla_asr["rate"], y))
    return spec(alt.layer(*layers), height=280, description="Attack success rate against group size")


def _random_layers(base: alt.Chart, groups: Sequence[Mapping[str, Any]], y: Callable[[str], alt.Y]) -> list[alt.Chart]:
    """Band from the lowest to the highest random group, their mean, and each of them as a tick."""
    banded = [group for group in groups if group["random"] is not None]
    if not banded:
        return []
    band = base.transform_filter("datum.kind == 'band'")
    single = base.transform_filter("datum.kind == 'random'")
    layers = []
    if len(banded) > 1:
        layers.append(band.mark_area(opacity=0.22, line=False).encode(y=y("low"), y2="high:Q"))
        layers.append(band.mark_line(strokeWidth=1.5, strokeDash=[2, 3]).encode(y=y("value")))
    else:
        layers.append(band.mark_rule(strokeWidth=26, opacity=0.22).encode(y=y("low"), y2="high:Q"))
    tooltip = ["series:N", "size:Q", exact("value")]
    layers.append(
        single.mark_tick(orient="horizontal", width=16, thickness=1.5, opacity=0.75).encode(
            y=y("value"), tooltip=tooltip
        )
    )
    return layers


def _group_rows(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    heads = ", ".join(group["heads"])
    rows = rate_row(group["size"], SEARCHED, group["asr"], heads)
    rows += rate_row(group["size"], KEPT, group["benign_kept"], heads)
    random = group["random"]
    if random is not None and random["asr"]:
        one = {"size": group["size"], "series": RANDOM}
        lowest, highest = min(random["asr"]), max(random["asr"])
        rows.append(one | {"kind": "band", "low": lowest, "high": highest, "value": random["mean"]})
        rows += [one | {"kind": "random", "value": value} for value in random["asr"]]
    return rows


def rate_row(size: int, series: str, rate: Rate | None, heads: str) -> list[dict[str, Any]]:
    """One row, or none for a rate of nothing."""
    if rate is None or rate["rate"] is None:
        return []
    low, high = rate["interval"]
    row = {"kind": "rate", "size": size, "series": series, "value": rate["rate"], "low": low, "high": high}
    return [row | {"answers": f"{rate['count']} of {rate['n']}", "heads": heads}]


def lines(
    series: Mapping[str, Sequence[Mapping[str, Any]]], vanilla: Rate, description: str, title: str = _SHARE_TITLE
) -> Spec:
    """ASR against group size, a line for the groups of each name; all begin at the unablated model's."""
    y = partial(share_axis, title=title)
    rows = [row for name in series for row in rate_row(0, name, vanilla, "none")]
    for name, groups in series.items():
        for group in groups:
            rows += rate_row(group["size"], name, group["asr"], ", ".join(group["heads"]))
    everything = [group for groups in series.values() for group in groups]
    chart = alt.layer(*line_layers(rows, [*series], _sizes(everything), y))
    return spec(chart, height=260, description=description)


def line_layers(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], x: alt.X, y: Callable[[str], alt.Y]
) -> list[alt.Chart]:
    """Intervals, lines and points of the rows of :func:`rate_row`, told apart by colour and by shape."""
    legend = alt.Legend(orient="top", title=None, direction="vertical", labelLimit=320, symbolOpacity=1)
    colours, shapes = LINE_COLOURS[: len(names)], LINE_SHAPES[: len(names)]
    color = alt.Color("series:N", legend=legend, scale=alt.Scale(domain=[*names], range=[*colours]))
    shape = alt.Shape("series:N", legend=legend, scale=alt.Scale(domain=[*names], range=[*shapes]))
    base = alt.Chart(alt.InlineData(values=[*rows])).encode(x=x, color=color)
    return [
        base.mark_rule(strokeWidth=1.5, opacity=0.45).encode(y=y("low"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y("value")),
        base.mark_point(filled=True, size=70, opacity=1).encode(y=y("value"), shape=shape, tooltip=rate_tooltip()),
    ]


def vanilla_rule(rate: float, y: Callable[[str], alt.Y]) -> alt.Chart:
    """A dotted line at the unablated model's rate."""
    rule = alt.Chart(alt.InlineData(values=[{"value": rate}])).encode(y=y("value"))
    chart: alt.Chart = rule.mark_rule(strokeWidth=1, strokeDash=[1, 2], color="--ink-soft")
    return chart


def _sizes(groups: Sequence[Mapping[str, Any]]) -> alt.X:
    """The axis of group sizes, from nothing ablated on."""
    largest = max(group["size"] for group in groups)
    scale = alt.Scale(domain=[-0.2, largest + 0.2], nice=False)
    axis = alt.Axis(values=list(range(largest + 1)), format="d", grid=False)
    return alt.X("size:Q", title="heads ablated together", scale=scale, axis=axis)


def share_axis(field: str, title: str) -> alt.Y:
    """A share from 0 to 1, upwards. Layers of one figure need one title, or the axis shows them all."""
    y = alt.Y(f"{field}:Q", title=title, scale=alt.Scale(domain=[0, 1], nice=False))
    return y.axis(format=".1f", tickCount=6)


def rate_tooltip() -> list[alt.Tooltip]:
    """What a point of :func:`rate_row` tells."""
    plain = [alt.Tooltip(f"{name}:N") for name in ("series", "heads", "answers")]
    return [*plain, *(exact(name) for name in ("value", "low", "high"))]


def exact(field: str, title: str | None = None) -> alt.Tooltip:
    """A share in a tooltip."""
    return alt.Tooltip(f"{field}:Q", title=title or field, format=".3f")


def rounded(value: float) -> float:
    """As many digits as a figure shows: the page carries a number for each of thousands of heads."""
    return float(f"{value:.{DIGITS}g}")


def rounded_table(values: Sequence[Sequence[float | None]]) -> list[float | None]:
    """A table of all heads, layer after layer, rounded; None where a layer has no such head."""
    return [None if value is None else rounded(value) for layer in values for value in layer]


def gradient_legend(title: str, number_format: str, values: Sequence[float]) -> alt.Legend:
    """The legend of a map's colours, below it."""
    return alt.Legend(
        title=title,
        orient="bottom",
        direction="horizontal",
        gradientLength=180,
        gradientThickness=8,
        format=number_format,
        values=[*values],
        titleLimit=320,
    )


def band_axis(count: int) -> alt.Axis:
    """Numbers of layers or heads, thinned out where there are many."""
    step = 1 if count <= 12 else 4 if count <= 48 else 8
    return alt.Axis(
        values=list(range(0, count, step)), labelAngle=0, ticks=False, domain=False, labelOverlap=False, grid=False
    )


def with_rows(made: Spec, rows: Sequence[Mapping[str, Any]]) -> Spec:
    """The layers with their rows where they have a name only: altair copies and checks inline ones at every step."""
    made = dict(made)
    held = {name: {"values": found} for name, found in made.pop("datasets", {}).items()}
    made["data"] = {"values": [*rows]}
    # A layer without data of its own has the chart's.
    made["layer"] = [
        {
            key: held[value["name"]] if key == "data" else value
            for key, value in layer.items()
            if not _is_named(key, value)
        }
        for layer in made["layer"]
    ]
    return made


def _is_named(key: str, value: Any) -> bool:
    return key == "data" and value == {"name": ROWS}


def spec(chart: Any, height: int, description: str) -> Spec:
    """The chart as a dictionary that is as wide as its place, and names no address."""
    # Checking against the schema takes seconds a page; the tests do it for every figure.
    made: Spec = chart.properties(width="container", height=height, description=description).to_dict(validate=False)
    # The page's own bundle draws it, in the page's own theme: the schema's address has no reader here.
    for field in ("$schema", "config"):
        made.pop(field, None)
    return made

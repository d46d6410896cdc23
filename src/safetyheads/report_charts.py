"""The report's figures as Vega-Lite specifications.

Owns what each figure draws and how it is labelled; refuses to know colours (a colour is the name of one of the
page's custom properties, such as ``--attack``, which the page resolves for its light or dark theme) and HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt

Results: TypeAlias = Mapping[str, Any]
Spec: TypeAlias = dict[str, Any]

HEADS = "heads"
"""Name of the dataset of :func:`head_rows`, which the page gives to every chart that asks for it."""

SEARCHED, RANDOM, KEPT = "searched group: ASR", "random groups: ASR", "searched group: benign kept"
HARMFUL, BENIGN = "harmful prompts", "benign prompts"
_LABELLED_HEADS = 3
_DIGITS = 6
_SCORER_COLOURS = ("--attack", "--kept", "--third", "--fourth", "--ink-soft")
_SCORER_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")


def charts(results: Results) -> dict[str, Spec]:
    """Every figure that the results allow, by the name of its place in the page."""
    made: dict[str, Spec | None] = {
        "asr_by_size": asr_by_size(results),
        "asr_by_scorer": asr_by_scorer(results),
        "long_tail": long_tail(results),
    }
    for name in results["scores"]:
        made[f"heatmap_{name}"] = heatmap(results, name)
    return {name: spec for name, spec in made.items() if spec is not None}


def head_columns(results: Results) -> dict[str, Any]:
    """What the charts know of each head, a column a fact, head after head: the page makes rows of it.

    Columns, because a row for each of the 16,128 heads of the largest models would make the page too large.
    """
    verdict, scores = results["verdict"], results["scores"]
    lead = verdict["scorer"] if verdict["scorer"] in scores else next(iter(scores))
    best_first = [head for head, _ in ranked_scores(results, lead)]
    group, planted = list(verdict["heads"]), list(results.get("planted_heads") or ())
    return {
        "n_heads": results["model"]["n_heads"],
        "scores": {
            name: [_rounded(value) for layer in score["values"] for value in layer] for name, score in scores.items()
        },
        "best_first": best_first,
        "group": group,
        "planted": planted,
        "named": sorted({*group, *planted, *best_first[:_LABELLED_HEADS]}),
    }


def ranked_scores(results: Results, name: str) -> list[tuple[str, float]]:
    """Every head with its score, best first; ties go to the lower layer, then the lower index."""
    values = results["scores"][name]["values"]
    named = [(f"{i}-{j}", float(value)) for i, layer in enumerate(values) for j, value in enumerate(layer)]
    return sorted(named, key=lambda pair: -pair[1])


def lead_groups(results: Results) -> list[Mapping[str, Any]]:
    """The groups of the verdict's scorer, by size."""
    scorer = results["verdict"]["scorer"]
    groups = [group for group in results["behaviour"]["groups"] if group["scorer"] == scorer]
    return sorted(groups, key=lambda group: int(group["size"]))


def asr_by_size(results: Results) -> Spec | None:
    """ASR and benign answers kept against group size, over the band of the random groups."""
    groups = lead_groups(results)
    rows = [row for group in groups for row in _group_rows(group)]
    vanilla = results["behaviour"]["vanilla"]
    rows += _rate_row(0, SEARCHED, vanilla["asr"], "none") + _rate_row(0, KEPT, vanilla["benign_kept"], "none")
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
        *_random_layers(base, groups),
        searched.mark_rule(strokeWidth=1.5, opacity=0.7).encode(y=_share("low"), y2="high:Q"),
        searched.mark_line(strokeWidth=2.5).encode(y=_share("value"), strokeDash=dash),
        searched.mark_point(filled=True, size=64, opacity=1).encode(y=_share("value"), tooltip=_rate_tooltip()),
    ]
    if vanilla["asr"]["rate"] is not None:
        layers.insert(0, _vanilla_rule(vanilla["asr"]["rate"]))
    return _spec(alt.layer(*layers), height=280, description="Attack success rate against group size")


def _random_layers(base: alt.Chart, groups: Sequence[Mapping[str, Any]]) -> list[alt.Chart]:
    """Band from the lowest to the highest random group, their mean, and each of them as a tick."""
    banded = [group for group in groups if group["random"] is not None]
    if not banded:
        return []
    band = base.transform_filter("datum.kind == 'band'")
    single = base.transform_filter("datum.kind == 'random'")
    layers = []
    if len(banded) > 1:
        layers.append(band.mark_area(opacity=0.22, line=False).encode(y=_share("low"), y2="high:Q"))
        layers.append(band.mark_line(strokeWidth=1.5, strokeDash=[2, 3]).encode(y=_share("value")))
    else:
        layers.append(band.mark_rule(strokeWidth=26, opacity=0.22).encode(y=_share("low"), y2="high:Q"))
    tooltip = ["series:N", "size:Q", _exact("value")]
    layers.append(
        single.mark_tick(orient="horizontal", width=16, thickness=1.5, opacity=0.75).encode(
            y=_share("value"), tooltip=tooltip
        )
    )
    return layers


def _group_rows(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    heads = ", ".join(group["heads"])
    rows = _rate_row(group["size"], SEARCHED, group["asr"], heads)
    rows += _rate_row(group["size"], KEPT, group["benign_kept"], heads)
    random = group["random"]
    if random is not None and random["asr"]:
        one = {"size": group["size"], "series": RANDOM}
        lowest, highest = min(random["asr"]), max(random["asr"])
        rows.append(one | {"kind": "band", "low": lowest, "high": highest, "value": random["mean"]})
        rows += [one | {"kind": "random", "value": value} for value in random["asr"]]
    return rows


def _rate_row(size: int, series: str, rate: Mapping[str, Any], heads: str) -> list[dict[str, Any]]:
    """One row, or none for a rate of nothing."""
    if rate["rate"] is None:
        return []
    low, high = rate["interval"]
    row = {"kind": "rate", "size": size, "series": series, "value": rate["rate"], "low": low, "high": high}
    return [row | {"answers": f"{rate['count']} of {rate['n']}", "heads": heads}]


def asr_by_scorer(results: Results) -> Spec | None:
    """ASR against group size, a line for the groups of each scorer; nothing to compare with one scorer."""
    groups = results["behaviour"]["groups"]
    scorers = list(dict.fromkeys(group["scorer"] for group in groups))
    if len(scorers) < 2:
        return None
    vanilla = results["behaviour"]["vanilla"]["asr"]
    labels = {scorer: results["scores"].get(scorer, {}).get("label", scorer) for scorer in scorers}
    rows = [row for scorer in scorers for row in _rate_row(0, labels[scorer], vanilla, "none")]
    for group in groups:
        rows += _rate_row(group["size"], labels[group["scorer"]], group["asr"], ", ".join(group["heads"]))
    names = [labels[scorer] for scorer in scorers]
    legend = alt.Legend(orient="top", title=None, direction="vertical", labelLimit=320, symbolOpacity=1)
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=_sizes(groups),
        color=alt.Color("series:N", legend=legend, scale=alt.Scale(domain=names, range=[*_SCORER_COLOURS])),
    )
    shape = alt.Shape("series:N", legend=legend, scale=alt.Scale(domain=names, range=[*_SCORER_SHAPES]))
    chart = alt.layer(
        base.mark_rule(strokeWidth=1.5, opacity=0.45).encode(y=_share("low"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=_share("value")),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            y=_share("value"), shape=shape, tooltip=_rate_tooltip()
        ),
    )
    return _spec(chart, height=260, description="Attack success rate against group size for each scorer")


def heatmap(results: Results, name: str) -> Spec:
    """One score of every head, layer by head; Ships on harmful and on benign prompts share their colours."""
    score, model = results["scores"][name], results["model"]
    lowest, highest = _colour_range(results, name)
    if lowest < 0:
        domain = [lowest, lowest / 4, 0, highest / 4, highest]
        colours = ["--cold-4", "--cold-2", "--neutral", "--heat-2", "--heat-4"]
    else:
        # Colours at equal steps of the square root: most heads score near 0, and would else look alike.
        domain = [highest * (step / 4) ** 2 for step in range(5)]
        colours = [f"--heat-{step}" for step in range(5)]
    scale = alt.Scale(type="sqrt", domain=domain, range=colours, clamp=True, interpolate="lab")
    legend = alt.Legend(
        title=f"{score['unit']}, square-root scale",
        orient="bottom",
        direction="horizontal",
        gradientLength=180,
        gradientThickness=8,
        format=".2~r",
        values=_legend_values(lowest, highest),
    )
    cell = max(9, min(44, 360 // model["n_layers"]))
    base = alt.Chart(alt.NamedData(name=HEADS)).encode(
        x=alt.X("index:O", title="head", axis=_band_axis(model["n_heads"])),
        y=alt.Y("layer:O", title="layer", axis=_band_axis(model["n_layers"])),
        tooltip=_head_tooltip(results, name),
    )
    tiles = base.mark_rect(aria=False, stroke="--paper", strokeWidth=0.75).encode(
        color=alt.Color(f"{name}:Q", scale=scale, legend=legend)
    )
    group = base.transform_filter("datum.group").mark_rect(
        fill="transparent", stroke="--ink", strokeWidth=2, cornerRadius=1
    )
    planted = base.transform_filter("datum.planted").mark_point(
        shape="diamond", filled=True, size=4 * cell, color="--ink", opacity=1, stroke="--paper", strokeWidth=1
    )
    return _spec(
        alt.layer(tiles, group, planted),
        height=cell * model["n_layers"],
        description=f"{score['label']} of every head, layer by head",
    )


def _colour_range(results: Results, name: str) -> tuple[float, float]:
    """Lowest and highest value of the colours: symmetric where scores are signed, never empty."""
    scores = results["scores"]
    shared = ("mean_ships", "benign_ships")
    names = [other for other in shared if other in scores] if name in shared else [name]
    values = [value for other in names for layer in scores[other]["values"] for value in layer]
    largest = max(map(abs, values), default=0.0) or 1.0
    # A divergence that rounds to just below 0 does not make a score signed.
    signed = min(values, default=0.0) < -0.01 * largest
    return (-largest if signed else 0.0), largest


def _legend_values(lowest: float, highest: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(highest))
    top = math.floor(highest / step) * step
    quarter = top / 4
    return [-top, -quarter, 0, quarter, top] if lowest < 0 else [0, top / 16, quarter, top]


def _band_axis(count: int) -> alt.Axis:
    step = 1 if count <= 12 else 4 if count <= 48 else 8
    return alt.Axis(
        values=list(range(0, count, step)), labelAngle=0, ticks=False, domain=False, labelOverlap=False, grid=False
    )


def _head_tooltip(results: Results, first: str) -> list[alt.Tooltip]:
    """The head and its scores, that of the figure first."""
    names = [first, *(name for name in results["scores"] if name != first)]
    scores = [
        alt.Tooltip(
            f"{name}:Q",
            title=f"{results['scores'][name]['label']} ({results['scores'][name]['unit']})",
            format=f".{_DIGITS}~g",
        )
        for name in names
    ]
    return [alt.Tooltip("head:N", title="head"), *scores]


def long_tail(results: Results) -> Spec | None:
    """The lead score of every head by rank, both axes logarithmic, with the same head's benign score."""
    name, scores = results["verdict"]["scorer"], results["scores"]
    if name not in scores or not any(value > 0 for layer in scores[name]["values"] for value in layer):
        return None
    score, last = scores[name], results["model"]["n_layers"] * results["model"]["n_heads"]
    ticks = [rank for rank in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if rank <= last]
    x = alt.X("rank:Q", title="rank of the head (log scale)", scale=alt.Scale(type="log", domain=[0.9, last * 1.15]))
    kinds = {HARMFUL: name} | ({BENIGN: "benign_ships"} if name == "mean_ships" and "benign_ships" in scores else {})
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1)
    scale = alt.Scale(domain=list(kinds), range=["--attack", "--kept"][: len(kinds)])
    base = alt.Chart(alt.NamedData(name=HEADS)).encode(
        x=x.axis(format="d", values=ticks, grid=False),
        tooltip=[alt.Tooltip("rank:Q", title="rank"), *_head_tooltip(results, name)],
    )

    def points(field: str) -> alt.Chart:
        y = alt.Y(f"{field}:Q", title=f"{score['label']}, {score['unit']} (log scale)", scale=alt.Scale(type="log"))
        chart: alt.Chart = base.transform_filter(f"datum.{field} > 0").encode(y=y.axis(format="~g", tickCount=5))
        return chart

    named = points(name).transform_filter("datum.named")
    layers = [
        points(field)
        .transform_calculate(kind=f"'{kind}'")
        .mark_point(filled=True, size=26, aria=False, opacity=0.85 if kind == HARMFUL else 0.4)
        .encode(color=alt.Color("kind:N", legend=legend, scale=scale))
        for kind, field in reversed(kinds.items())
    ]
    layers.append(named.mark_point(size=110, color="--ink", strokeWidth=1.5, opacity=1))
    text = named.mark_text(align="left", dx=10, dy=-6, color="--ink", fontWeight=600, fontSize=12)
    layers.append(text.encode(text="head:N"))
    return _spec(alt.layer(*layers), height=280, description=f"{score['label']} of all heads by rank")


def _vanilla_rule(rate: float) -> alt.Chart:
    rule = alt.Chart(alt.InlineData(values=[{"value": rate}])).encode(y=_share("value"))
    chart: alt.Chart = rule.mark_rule(strokeWidth=1, strokeDash=[1, 2], color="--ink-soft")
    return chart


def _sizes(groups: Sequence[Mapping[str, Any]]) -> alt.X:
    """The axis of group sizes, from nothing ablated on."""
    largest = max(group["size"] for group in groups)
    scale = alt.Scale(domain=[-0.2, largest + 0.2], nice=False)
    axis = alt.Axis(values=list(range(largest + 1)), format="d", grid=False)
    return alt.X("size:Q", title="heads ablated together", scale=scale, axis=axis)


def _share(field: str) -> alt.Y:
    y = alt.Y(f"{field}:Q", title="share of held-out prompts", scale=alt.Scale(domain=[0, 1], nice=False))
    return y.axis(format=".1f", tickCount=6)


def _rate_tooltip() -> list[alt.Tooltip]:
    plain = [alt.Tooltip(f"{name}:N") for name in ("series", "heads", "answers")]
    return [*plain, *(_exact(name) for name in ("value", "low", "high"))]


def _exact(field: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", format=".3f")


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _spec(chart: Any, height: int, description: str) -> Spec:
    """The chart as a dictionary that is as wide as its place, and names no address."""
    spec: Spec = chart.properties(width="container", height=height, description=description).to_dict()
    # The page's own bundle draws it, in the page's own theme: the schema's address has no reader here.
    for field in ("$schema", "config"):
        spec.pop(field, None)
    return spec

"""The report's figures as Vega-Lite specifications.

Owns what each figure draws and how it is labelled; refuses to know colours (a colour is the name of one of the
page's custom properties, such as ``--attack``, which the page resolves for its light or dark theme) and HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import altair as alt

from safetyheads.reports.drawing import (
    DIGITS,
    HEADS,
    Spec,
    band_axis,
    curve,
    gradient_legend,
    lines,
    rounded_table,
    spec,
)
from safetyheads.runs.reader import lead_groups

Results: TypeAlias = Mapping[str, Any]

HARMFUL, BENIGN = "harmful prompts", "benign prompts"
_LABELLED_HEADS = 3


def charts(results: Results) -> dict[str, Spec]:
    """Every figure that the results allow, by the name of its place in the page."""
    made: dict[str, Spec | None] = {
        "asr_by_size": asr_by_size(results),
        "asr_by_scorer": asr_by_scorer(results),
        "long_tail": long_tail(results),
    }
    for name in results["scores"]:
        made[f"heatmap_{name}"] = heatmap(results, name)
    return {name: one for name, one in made.items() if one is not None}


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
        "scores": {name: rounded_table(score["values"]) for name, score in scores.items()},
        "best_first": best_first,
        "group": group,
        "planted": planted,
        "named": sorted({*group, *planted, *best_first[:_LABELLED_HEADS]}),
    }


def ranked_scores(results: Results, name: str) -> list[tuple[str, float]]:
    """Every head with its score, best first; ties go to the lower layer, then the lower index."""
    values = results["scores"][name]["values"]
    named = [
        (f"{i}-{j}", float(value))
        for i, layer in enumerate(values)
        for j, value in enumerate(layer)
        if value is not None  # a layer without heads has none
    ]
    return sorted(named, key=lambda pair: -pair[1])


def asr_by_size(results: Results) -> Spec | None:
    """ASR and benign answers kept against group size, over the band of the random groups."""
    vanilla = results["behaviour"]["vanilla"]
    return curve(lead_groups(results), vanilla["asr"], vanilla["benign_kept"])


def asr_by_scorer(results: Results) -> Spec | None:
    """ASR against group size, a line for the groups of each scorer; nothing to compare with one scorer."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for group in results["behaviour"]["groups"]:
        label = results["scores"].get(group["scorer"], {}).get("label", group["scorer"])
        series.setdefault(label, []).append(group)
    if len(series) < 2:
        return None
    description = "Attack success rate against group size for each scorer"
    return lines(series, results["behaviour"]["vanilla"]["asr"], description)


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
    legend = gradient_legend(f"{score['unit']}, square-root scale", ".2~r", _legend_values(lowest, highest))
    cell = max(9, min(44, 360 // model["n_layers"]))
    base = alt.Chart(alt.NamedData(name=HEADS)).encode(
        x=alt.X("index:O", title="head", axis=band_axis(model["n_heads"])),
        y=alt.Y("layer:O", title="layer", axis=band_axis(model["n_layers"])),
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
    return spec(
        alt.layer(tiles, group, planted),
        height=cell * model["n_layers"],
        description=f"{score['label']} of every head, layer by head",
    )


def _colour_range(results: Results, name: str) -> tuple[float, float]:
    """Lowest and highest value of the colours: symmetric where scores are signed, never empty."""
    scores = results["scores"]
    shared = ("mean_ships", "benign_ships")
    names = [other for other in shared if other in scores] if name in shared else [name]
    values = [value for other in names for layer in scores[other]["values"] for value in layer if value is not None]
    largest = max(map(abs, values), default=0.0) or 1.0
    # A divergence that rounds to just below 0 does not make a score signed.
    signed = min(values, default=0.0) < -0.01 * largest
    return (-largest if signed else 0.0), largest


def _legend_values(lowest: float, highest: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(highest))
    top = math.floor(highest / step) * step
    quarter = top / 4
    return [-top, -quarter, 0, quarter, top] if lowest < 0 else [0, top / 16, quarter, top]


def _head_tooltip(results: Results, first: str) -> list[alt.Tooltip]:
    """The head and its scores, that of the figure first."""
    names = [first, *(name for name in results["scores"] if name != first)]
    scores = [
        alt.Tooltip(
            f"{name}:Q",
            title=f"{results['scores'][name]['label']} ({results['scores'][name]['unit']})",
            format=f".{DIGITS}~g",
        )
        for name in names
    ]
    return [alt.Tooltip("head:N", title="head"), *scores]


def long_tail(results: Results) -> Spec | None:
    """The lead score of every head by rank, both axes logarithmic, with the same head's benign score."""
    name, scores = results["verdict"]["scorer"], results["scores"]
    if name not in scores or not any((value or 0) > 0 for layer in scores[name]["values"] for value in layer):
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
    return spec(alt.layer(*layers), height=280, description=f"{score['label']} of all heads by rank")

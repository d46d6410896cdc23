"""The figures of a scan's page as Vega-Lite specifications.

Owns what each figure draws and how it is labelled; refuses to know colours (they are named, as in
:mod:`safetyheads.reports.drawing`), HTML and single answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import altair as alt

from safetyheads.reports.drawing import (
    HEADS,
    Spec,
    band_axis,
    exact,
    gradient_legend,
    rounded,
    rounded_table,
    share_axis,
    spec,
    vanilla_rule,
)
from safetyheads.reports.scan_groups import by_asr, differing, epsilons, prefixes, query_level, synergy

Results: TypeAlias = Mapping[str, Any]

ROLES = {
    "refusal": ("frees harmful answers, keeps benign ones", "--attack", "circle"),
    "mixed": ("frees harmful answers, costs benign ones", "--fourth", "diamond"),
    "over_refusal": ("makes benign prompts refused", "--kept", "square"),
    "damage": ("loses benign answers", "--third", "triangle-up"),
    "none": ("no change beyond chance", "--random", "cross"),
}
"""Name of a role in results -> what the page calls it, its colour, its shape."""
_NAMED = 8


def charts(results: Results) -> dict[str, Spec]:
    """Every figure that the results allow, by the name of its place in the page."""
    made = {
        "asr_alone": asr_alone(results),
        "harmful_and_benign": harmful_and_benign(results),
        "prefixes": prefixes(results),
        "query_level": query_level(results),
        "synergy": synergy(results),
        "epsilons": epsilons(results),
    }
    if results["proxies"]:
        made |= {f"proxy_{name}": proxy(results, name) for name in results["scores"]}
    return {name: one for name, one in made.items() if one is not None}


def head_columns(results: Results) -> dict[str, Any]:
    """What the figures know of each head, a column a fact, head after head: the page makes rows of it."""
    heads = results["heads"]
    columns: dict[str, list[Any]] = {
        "asr": [_short(head["asr"]["rate"]) for head in heads],
        "low": [_short((head["asr"]["interval"] or (None, None))[0]) for head in heads],
        "high": [_short((head["asr"]["interval"] or (None, None))[1]) for head in heads],
        "answers": [f"{head['asr']['count']} of {head['asr']['n']}" for head in heads],
        "change": [_short(head["change"]["change"]) for head in heads],
        "p_holm": [_short(head["change"]["p_holm"]) for head in heads],
        "p_bh": [_short(head["change"]["p_bh"]) for head in heads],
        "role": [head["role"] for head in heads],
    }
    if any(head["benign"] for head in heads):
        benign = [head["benign"] or {} for head in heads]
        columns["lost"] = [_short(lost_of(head)) for head in heads]
        columns["changed"] = [_short((one.get("changed") or {}).get("rate")) for one in benign]
        columns["kl"] = [_short((one.get("kl") or {}).get("mean")) for one in benign]
    columns = {name: _placed(results, column) for name, column in columns.items()}
    for name, score in results["scores"].items():
        columns[f"score_{name}"] = rounded_table(score["values"])
    alpha, named = results["statistics"]["alpha"], named_heads(results)
    holm = [head["head"] for head in heads if head["change"]["p_holm"] < alpha]
    return {
        "n_heads": results["model"]["n_heads"],
        "scores": columns,
        "best_first": [head["head"] for head in by_asr(heads)],
        "holm": holm,
        "bh": [head["head"] for head in heads if head["change"]["p_bh"] < alpha <= head["change"]["p_holm"]],
        "planted": list(results.get("planted_heads") or ()),
        "named": named,
        "below": named[1::2],
    }


def _placed(results: Results, column: Sequence[Any]) -> list[Any]:
    """A value for every place of the model, layer after layer: None where a layer has no such head."""
    found = dict(zip((head["head"] for head in results["heads"]), column, strict=True))
    model = results["model"]
    return [found.get(f"{i}-{j}") for i in range(model["n_layers"]) for j in range(model["n_heads"])]


def named_heads(results: Results) -> list[str]:
    """Heads that figures name: those that differ and planted ones; without them the one of highest ASR."""
    differ = [head["head"] for head in differing(results)]
    found = list(dict.fromkeys([*differ[:_NAMED], *(results.get("planted_heads") or ())]))
    return found or [head["head"] for head in by_asr(results["heads"])[:1]]


def lost_of(head: Mapping[str, Any]) -> float | None:
    """Share of the benign answers that the head's ablation costs; negative where it wins some."""
    change = head["benign"]["kept_change"]["change"] if head["benign"] else None
    return None if change is None else 0.0 - change


def asr_alone(results: Results) -> Spec:
    """ASR of every head ablated alone, layer by head (Fig 4b)."""
    model = results["model"]
    rates = [head["asr"]["rate"] for head in results["heads"] if head["asr"]["rate"] is not None]
    # A model that refuses everything would else show differences of one answer in the strongest colour.
    highest = max([0.1, *rates])
    scale = alt.Scale(
        domain=[highest * step / 4 for step in range(5)],
        range=[f"--heat-{step}" for step in range(5)],
        clamp=True,
        interpolate="lab",
    )
    legend = gradient_legend("ASR with the head ablated alone", ".2f", [0, rounded(highest / 2), rounded(highest)])
    cell = max(9, min(44, 360 // model["n_layers"]))
    base = alt.Chart(alt.NamedData(name=HEADS)).encode(
        x=alt.X("index:O", title="head", axis=band_axis(model["n_heads"])),
        y=alt.Y("layer:O", title="layer", axis=band_axis(model["n_layers"])),
        tooltip=_head_tooltip(results),
    )
    ground = base.mark_rect(aria=False, fill="--panel", stroke="--paper", strokeWidth=0.75, cursor="pointer")
    tiles = (
        base.transform_filter("isValid(datum.asr)")
        .mark_rect(aria=False, stroke="--paper", strokeWidth=0.75, cursor="pointer")
        .encode(color=alt.Color("asr:Q", scale=scale, legend=legend))
    )
    outline = partial(alt.Chart.mark_rect, fill="transparent", stroke="--ink", cornerRadius=1, cursor="pointer")
    holm = outline(base.transform_filter("datum.holm"), strokeWidth=2.5)
    bh = outline(base.transform_filter("datum.bh"), strokeWidth=1.5, strokeDash=[3, 2])
    planted = base.transform_filter("datum.planted").mark_point(
        shape="diamond",
        filled=True,
        size=4 * cell,
        color="--ink",
        opacity=1,
        stroke="--paper",
        strokeWidth=1,
        cursor="pointer",
    )
    return spec(
        alt.layer(ground, tiles, bh, holm, planted),
        height=cell * model["n_layers"],
        description="ASR of every head ablated alone, layer by head",
    )


def _head_tooltip(results: Results) -> list[alt.Tooltip]:
    interval = results["statistics"]["interval"]
    found = [
        alt.Tooltip("head:N", title="head"),
        exact("asr", "ASR alone"),
        alt.Tooltip("answers:N", title="answers that comply"),
        exact("low", f"95 % from ({interval})"),
        exact("high", "95 % to"),
        alt.Tooltip("change:Q", title="change of ASR", format="+.3f"),
        alt.Tooltip("p_holm:Q", title="p after Holm", format=".2~g"),
        alt.Tooltip("p_bh:Q", title="p after Benjamini-Hochberg", format=".2~g"),
    ]
    if any(head["benign"] for head in results["heads"]):
        found += [
            exact("lost", "benign answers lost, share"),
            exact("changed", "benign answers changed, share"),
            alt.Tooltip("kl:Q", title="KL on benign prompts, nats", format=".3~g"),
        ]
    return found


def harmful_and_benign(results: Results) -> Spec | None:
    """Change of ASR against the benign answers that each head's ablation costs; None without benign prompts."""
    if not any(head["benign"] for head in results["heads"]):
        return None
    shown = [role for role in ROLES if any(head["role"] == role for head in results["heads"])]
    legend = alt.Legend(orient="top", title=None, direction="vertical", labelLimit=320, symbolOpacity=1)
    labels = [ROLES[role][0] for role in shown]
    color = alt.Color("word:N", legend=legend, scale=alt.Scale(domain=labels, range=[ROLES[r][1] for r in shown]))
    shape = alt.Shape("word:N", legend=legend, scale=alt.Scale(domain=labels, range=[ROLES[r][2] for r in shown]))
    words = " : ".join(f"datum.role == '{role}' ? '{ROLES[role][0]}'" for role in shown) + " : ''"
    axis = alt.Axis(format=".2~f", tickCount=5)
    # Room for the name of the strongest head at the edge.
    scale = alt.Scale(padding=30)
    x = alt.X("change:Q", title="change of ASR, harmful prompts (share of prompts)", axis=axis, scale=scale)
    y = alt.Y("lost:Q", title="benign answers lost (share of prompts)", axis=axis)
    base = (
        alt.Chart(alt.NamedData(name=HEADS))
        .transform_filter("isValid(datum.change) && isValid(datum.lost)")
        .transform_calculate(word=words)
        .encode(x=x, y=y)
    )
    points = base.mark_point(filled=True, size=70, opacity=0.75, aria=False, cursor="pointer")
    bars = alt.Chart(alt.InlineData(values=_crosses(results))).encode(color=color)
    text = base.transform_filter("datum.named").mark_text(
        align="left", baseline="bottom", dx=8, dy=-4, color="--ink", fontWeight=600, fontSize=12
    )
    chart = alt.layer(
        bars.mark_rule(strokeWidth=1, opacity=0.55).encode(x=x, x2="change_high:Q", y=y),
        bars.mark_rule(strokeWidth=1, opacity=0.55).encode(x="middle:Q", y="lost_low:Q", y2="lost_high:Q"),
        points.encode(color=color, shape=shape, tooltip=_head_tooltip(results)),
        text.encode(text="head:N"),
    )
    return spec(chart, height=300, description="Change of ASR against benign answers lost, head by head")


def _crosses(results: Results) -> list[dict[str, Any]]:
    """Both intervals of the heads that are named."""
    named, found = set(named_heads(results)), []
    for head in results["heads"]:
        lost = lost_of(head)
        if head["head"] not in named or head["change"]["change"] is None or lost is None:
            continue
        (low, high), (kept_low, kept_high) = head["change"]["interval"], head["benign"]["kept_change"]["interval"]
        found.append(
            {
                "head": head["head"],
                "word": ROLES[head["role"]][0],
                "change": rounded(low),
                "change_high": rounded(high),
                "middle": rounded(head["change"]["change"]),
                "lost": rounded(lost),
                "lost_low": rounded(-kept_high),
                "lost_high": rounded(-kept_low),
            }
        )
    return found


def proxy(results: Results, name: str) -> Spec:
    """One score of every head against its ASR alone."""
    score = results["scores"][name]
    # Differences of many orders of magnitude: at equal steps all but a few heads would lie at 0.
    skewed = score["unit"] == "nats"
    scale = alt.Scale(type="sqrt", nice=False, padding=16) if skewed else alt.Scale(zero=False, padding=16)
    title = f"{score['unit']}, square-root scale" if skewed else score["unit"]
    y = partial(share_axis, title="ASR, head ablated alone")
    tooltip = [
        alt.Tooltip("head:N", title="head"),
        alt.Tooltip(f"score_{name}:Q", title=f"{score['label']} ({score['unit']})", format=".4~g"),
        exact("asr", "ASR alone"),
        alt.Tooltip("answers:N", title="answers that comply"),
        alt.Tooltip("p_holm:Q", title="p after Holm", format=".2~g"),
    ]
    base = (
        alt.Chart(alt.NamedData(name=HEADS))
        .transform_filter(f"isValid(datum.asr) && isValid(datum.score_{name})")
        .encode(
            x=alt.X(f"score_{name}:Q", title=title, scale=scale, axis=alt.Axis(format="~r", tickCount=4)),
            y=y("asr"),
            tooltip=tooltip,
        )
    )
    # Every second name below its point, where there is room: heads of like scores would else overwrite each other.
    below = "datum.below && datum.asr > 0.15"
    layers = [
        base.transform_filter("!datum.holm").mark_point(
            filled=True, size=40, opacity=0.55, color="--random", aria=False
        ),
        base.transform_filter("datum.holm").mark_point(
            filled=True, shape="diamond", size=110, opacity=1, color="--attack", aria=False
        ),
        _name(base, f"datum.named && !({below})", dy=-10),
        _name(base, below, dy=14),
    ]
    vanilla = results["vanilla"]["harmful"]["asr"]["rate"]
    if vanilla is not None:
        layers.insert(0, vanilla_rule(vanilla, y))
    return spec(alt.layer(*layers), height=220, description=f"{score['label']} against ASR, head by head")


def _name(base: alt.Chart, condition: str, dy: int) -> alt.Chart:
    """Names of the heads that the condition holds for, off their points by so many pixels."""
    text = base.transform_filter(condition).mark_text(dy=dy, color="--ink", fontWeight=600, fontSize=12)
    named: alt.Chart = text.encode(text="head:N")
    return named


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")

"""The figures of a scan's groups: pairs, prefixes, query level, strengths; as Vega-Lite specifications.

Owns what each figure draws and how it is labelled, and which heads a page takes first; refuses to know colours (they
are named, as in :mod:`safetyheads.reports.drawing`), HTML and single answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import altair as alt

from safetyheads.reports.drawing import (
    MOST_LINES,
    Spec,
    curve,
    gradient_legend,
    line_layers,
    lines,
    rate_row,
    rounded,
    share_axis,
    spec,
    vanilla_rule,
)

Results: TypeAlias = Mapping[str, Any]

OWN_HEADS, ONE_GROUP = "each prompt its own heads by Ships", "the same heads for all (prefixes)"
_OF_PROMPTS = "share of prompts"


def by_asr(heads: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Highest ASR first; a head without one comes last, and ties go to the earlier head."""
    return sorted(heads, key=lambda head: -1.0 if head["asr"]["rate"] is None else head["asr"]["rate"], reverse=True)


def differing(results: Results) -> list[Mapping[str, Any]]:
    """Heads that differ from the unablated model after Holm, the largest change first."""
    found = [head for head in results["heads"] if head["change"]["differs"]]
    return sorted(found, key=lambda head: -abs(head["change"]["change"]))


def prefix_groups(results: Results) -> list[dict[str, Any]]:
    """Sahara's prefixes by size."""
    groups = [dict(group) | {"size": len(group["heads"])} for group in results["groups"] if group["part"] == "prefixes"]
    return sorted(groups, key=lambda group: int(group["size"]))


def _own_heads(results: Results) -> list[dict[str, Any]]:
    own = [dict(one) | {"heads": ["of each prompt"]} for one in results["query_level"]]
    return sorted(own, key=lambda one: int(one["size"]))


def prefixes(results: Results) -> Spec | None:
    """ASR and benign answers kept under Sahara's prefixes, over the band of random groups."""
    groups = prefix_groups(results)
    kept = results["vanilla"].get("benign", {}).get("kept")
    return curve(groups, results["vanilla"]["harmful"]["asr"], kept, _OF_PROMPTS) if groups else None


def query_level(results: Results) -> Spec | None:
    """ASR where each prompt ablates its own heads, beside the prefixes."""
    own, groups = _own_heads(results), prefix_groups(results)
    if not own:
        return None
    series = {OWN_HEADS: own} | ({ONE_GROUP: groups} if groups else {})
    vanilla = results["vanilla"]["harmful"]["asr"]
    return lines(series, vanilla, "ASR against heads ablated in each prompt", _OF_PROMPTS)


def synergy(results: Results) -> Spec | None:
    """What each pair frees beyond the sum of its heads, as a symmetric map."""
    found = results["synergy"]
    if not found:
        return None
    rows = _pair_rows(found["pairs"])
    largest = max([0.05, *(abs(row["synergy"]) for row in rows)])
    scale = alt.Scale(
        domain=[-largest, -largest / 2, 0, largest / 2, largest],
        range=["--cold-4", "--cold-2", "--neutral", "--heat-2", "--heat-4"],
        interpolate="lab",
    )
    legend = gradient_legend("ASR together beyond the sum", "+.2f", [-rounded(largest), 0, rounded(largest)])
    axis = alt.Axis(labelAngle=0, ticks=False, domain=False, grid=False, labelOverlap=True)
    order = list(found["heads"])
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_rect(stroke="--paper", strokeWidth=1)
        .encode(
            x=alt.X("first:O", title="head", sort=order, axis=axis, scale=alt.Scale(domain=order)),
            y=alt.Y("second:O", title="head", sort=order, axis=axis, scale=alt.Scale(domain=order)),
            color=alt.Color("synergy:Q", scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip("first:N", title="head"),
                alt.Tooltip("second:N", title="and"),
                alt.Tooltip("synergy:Q", format="+.3f"),
                alt.Tooltip("low:Q", title="95 % from", format="+.3f"),
                alt.Tooltip("high:Q", title="95 % to", format="+.3f"),
                alt.Tooltip("together:N", title="ASR together"),
                alt.Tooltip("alone:N", title="ASR alone"),
            ],
        )
    )
    return spec(chart, height=max(120, min(36 * len(order), 360)), description="Synergy of pairs of heads")


def _pair_rows(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each pair twice, once on either side of the diagonal."""
    return [
        {
            "first": first,
            "second": second,
            "synergy": rounded(pair["synergy"]),
            "low": rounded(pair["interval"][0]),
            "high": rounded(pair["interval"][1]),
            "together": _rate_words(pair["together"]),
            "alone": " and ".join(_rate_words(one) for one in pair["alone"]),
        }
        for pair in pairs
        for first, second in (pair["heads"], pair["heads"][::-1])
    ]


def _rate_words(rate: Mapping[str, Any]) -> str:
    return "not scored" if rate["rate"] is None else f"{rate['rate']:.2f} ({rate['count']} of {rate['n']})"


def epsilon_heads(results: Results) -> list[str]:
    """Heads whose ASR is followed over epsilon: those that differ, or the one of highest ASR."""
    found = [head["head"] for head in differing(results)]
    return (found or [head["head"] for head in by_asr(results["heads"])[:1]])[:MOST_LINES]


def epsilon_rows(results: Results, heads: Sequence[str]) -> list[dict[str, Any]]:
    """ASR of some heads at each strength."""
    return [
        {"head": head, "epsilon": one["epsilon"], "rate": one["heads"][head]}
        for head in heads
        for one in results["epsilons"]
    ]


def epsilons(results: Results) -> Spec | None:
    """ASR against the strength of the ablation, a line a head; None with one strength."""
    if len(results["epsilons"]) < 2:
        return None
    heads, rows = epsilon_heads(results), []
    for one in epsilon_rows(results, heads):
        rate = one["rate"] | {"interval": one["rate"]["interval"] or [one["rate"]["rate"]] * 2}
        rows += [row | {"epsilon": one["epsilon"]} for row in rate_row(1, one["head"], rate, one["head"])]
    y = partial(share_axis, title=_OF_PROMPTS)
    strengths = [one["epsilon"] for one in results["epsilons"]]
    # A logarithm has no place for 0.
    x = (
        alt.X("epsilon:Q", title="ε, strength of the ablation (log scale)", scale=alt.Scale(type="log", padding=14))
        if min(strengths) > 0
        else alt.X("epsilon:Q", title="ε, strength of the ablation", scale=alt.Scale(padding=14))
    )
    x = x.axis(format="~g", values=strengths, grid=False)
    layers = line_layers(rows, heads, x, y)
    vanilla = results["vanilla"]["harmful"]["asr"]["rate"]
    if vanilla is not None:
        layers.insert(0, vanilla_rule(vanilla, y))
    return spec(alt.layer(*layers), height=260, description="ASR of single heads against epsilon")

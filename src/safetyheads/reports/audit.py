"""The page of an audit: the verdict first, its figures and tables below."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import altair as alt

from safetyheads.reports import charts
from safetyheads.reports.answers import heads_of, side_by_side
from safetyheads.reports.charts import Row, Spec
from safetyheads.reports.page import NO_HEADS, Page, render, under_headings
from safetyheads.reports.tables import Cell, Facts, interval, p_value, sentence_case
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.reader import lead_groups
from safetyheads.runs.stored_files import Record
from safetyheads.stats.power import in_clusters

MARKS = {"concentrated": "dot", "partly concentrated": "dot", "none found": "ring", "not specific": "ring"}
"""Mark of a verdict's badge; the others have a bar."""
TONES = {"concentrated": "found", "partly concentrated": "found", "none found": "none"}
"""Class of a verdict's badge."""
SHIPS = ("mean_ships", "benign_ships")
SCORE_ORDER = (*SHIPS, "refusal_score", "generalized_ships_representation")
"""Harmful beside benign first; the others follow."""
MAX_TABLE_HEADS = 1024
"""Up to this many heads, all of them are listed in a table; the maps show any number."""
ANSWERED_SETS = ("harmful_test", "benign_test")
"""Sets whose answers a page shows."""
SEARCHED, KEPT = "searched group: ASR", "searched group: benign answered"
HARMFUL, BENIGN = "harmful prompts", "benign prompts"
_HELD_OUT = "share of held-out prompts"
_LABELLED_HEADS = 3


def audit_page(run: RunDirectory, results: Facts, facts: Facts, show_completions: bool) -> Page:
    """The page of a finished audit."""
    wanted = {frozenset[str](), *map(frozenset, _shown_groups(results))}
    records = (record for record in run.stored_records() if "verdicts" in record and heads_of(record) in wanted)
    return render_audit(results, facts, list(records), show_completions)


def render_audit(results: Facts, manifest: Facts, rows: Sequence[Record] = (), show_texts: bool = False) -> Page:
    """The page; equal arguments give equal text. ``rows``: stored answers, with texts where those are to be shown."""
    # Files keep their keys sorted; scores that the page does not know come last.
    for field in ("scores", "sahara"):
        named = results[field]
        in_order = {name: named[name] for name in dict.fromkeys((*SCORE_ORDER, *named)) if name in named}
        results = {**results, field: in_order}
    verdict, behaviour, model = results["verdict"], results["behaviour"], results["model"]
    own = (group for group in behaviour["groups"] if group["scorer"] == verdict["scorer"])
    group = next((group for group in own if set(group["heads"]) == set(verdict["heads"])), None)
    stability = results.get("stability") or {"heads": (), "n": 0}
    places = [(i, j) for i in range(model["n_layers"]) for j in range(model["n_heads"])]
    content: dict[str, Any] = {
        "results": results,
        "badge": sentence_case(verdict["label"]),
        "mark": MARKS.get(verdict["label"], "bar"),
        "tone": TONES.get(verdict["label"], "open"),
        "planted": results.get("planted_heads") or [],
        "has_random": any(found.get("random") for found in behaviour["groups"]),
        "difference": partial(_difference, alpha=verdict["numbers"]["thresholds"]["alpha"]),
        "listed": places if len(places) <= MAX_TABLE_HEADS else [],
        "sahara": {scorer: _steps(results, scorer) for scorer in results["sahara"]},
        "label": partial(_label, results),
        "groups": _groups(results),
        "chosen": [] if group is None else [group],
        "bars": list(_bars(results, group)),
        "reasons": list(_reasons(results, group)),
        "scored": {name: n_scored(score) for name, score in results["scores"].items()},
        "n_unranked": sum(value <= 0 for _, value in _ranked(results)),
        "stability": results.get("stability"),
        "ranks": {
            head["head"]: Cell(str(head["rank"]), interval(head["interval"], str), f"n {stability['n']}")
            for head in stability["heads"]
        },
        "n_lead": 2 + sum(of["scorer"] == verdict["scorer"] for of in behaviour["groups"]),
        "headline": headline(results),
        "show_texts": show_texts,
        **side_by_side(results, rows, ANSWERED_SETS, _shown_groups(results), verdict["heads"], show_texts),
    }
    measured = {name: results[name] for name in ("model", "data", "ablation", "sampling", "judges")}
    return render("audit.html.j2", content, measured, manifest, figures(results), head_columns(results))


def headline(results: Facts) -> str:
    """The verdict for a reader who does not know the method: a number a clause; its own sentence where it has none."""
    label, found, k = results["verdict"]["label"], results["verdict"]["numbers"], len(results["verdict"]["heads"])
    heads = f"{k} of {_n_heads(results):,} heads"
    openings = {
        "concentrated": f"Refusals rest on {heads}",
        "partly concentrated": f"Refusals rest in part on {heads}",
        "not specific": f"Refusals rest on no heads in particular; those found are {heads}",
        "none found": f"No heads were found that refusals rest on; the best {'is' if k == 1 else 'are'} {heads}",
        "breaks the model": f"Taking away {heads} breaks the model",
        "cannot say: damage not bounded": f"Refusals may rest on {heads}, but the damage is not bounded",
    }
    if not k or label not in openings:
        return str(results["verdict"]["sentence"])
    random = f" (random heads: at most {found['most_random_undone']} of {found['n_refused']})"
    joined, n = found["clustered_undone"], found["n_refused"]
    alike = f" ({n} prompts{in_clusters(joined['n_clusters'])})" if joined else ""
    answers = f"{found['n_undone']} of the {n} harmful prompts that it refused{alike}"
    kept = f"{found['n_answered'] - found['n_broken']} of {found['n_answered']} harmless ones as before"
    without = "it" if k == 1 else "them"
    control = random if found["n_random"] else ""
    return f"{openings[label]}: without {without} the model answers {answers}{control}, and {kept}."


def _n_heads(results: Facts) -> int:
    """The model's heads; a screened run has scored some of them alone, and layers without attention have none."""
    if results.get("screening"):
        first = results["screening"][0]
        return len(first["candidates"]) + int(first["missed"]["n_others"])
    return max((n_scored(score) for score in results["scores"].values()), default=0)


def n_scored(score: Facts) -> int:
    """Heads that a score was measured of."""
    return sum(value is not None for layer in score["values"] for value in layer)


def _shown_groups(results: Facts) -> list[list[str]]:
    """The verdict's group, and those of the same score by size."""
    named = [list(results["verdict"]["heads"]), *(group["heads"] for group in lead_groups(results))]
    return [heads for heads in named if heads]


def _label(results: Facts, name: str) -> str:
    return str(results["scores"].get(name, {}).get("label", name))


def _ranked(results: Facts) -> list[tuple[str, float]]:
    """Every head with the verdict's score, or the first where heads were found by another, best first.

    Ties go to the lower layer, then the lower index.
    """
    name = results["verdict"]["scorer"]
    if not results["scores"]:
        return []
    values = results["scores"][name if name in results["scores"] else next(iter(results["scores"]))]["values"]
    # A layer without attention has no heads.
    named = [(f"{i}-{j}", v) for i, layer in enumerate(values) for j, v in enumerate(layer) if v is not None]
    return sorted(named, key=lambda pair: -pair[1])


# Tables.


def _difference(change: Facts | None, alpha: float) -> Cell:
    """What a change of ASR means, in words."""
    if not change or change["change"] is None:
        return Cell("not measured", tone="soft")
    p, found, tone = change["p_tarone"], "no clear change", "soft"
    if p is not None and p < alpha:
        found, tone = ("complies more", "yes") if change["change"] > 0 else ("complies less", "less")
    return Cell(found, p=f"p {p_value(p, '= ')}", tone=tone)


def _steps(results: Facts, scorer: str) -> list[dict[str, Any]]:
    """Sahara's steps with a score, each with the measured group of that size."""
    groups = {group["size"]: group for group in results["behaviour"]["groups"] if group["scorer"] == scorer}
    steps = enumerate(results["sahara"][scorer]["steps"], 1)
    return [dict(step) | {"group": groups.get(size, {})} for size, step in steps]


def _groups(results: Facts) -> list[Any]:
    """Nothing ablated, then the groups that each score led to by size, the verdict's score first."""
    vanilla = results["behaviour"]["vanilla"] | {"heads": ["none"]}
    found: dict[str, list[Any]] = {f"found by {_label(results, results['verdict']['scorer'])}": []}
    for group in sorted(results["behaviour"]["groups"], key=lambda group: int(group["size"])):
        found.setdefault(f"found by {_label(results, group['scorer'])}", []).append(group)
    return under_headings(vanilla, found)


def _bars(results: Facts, group: Facts | None) -> Iterator[dict[str, Any]]:
    """Counts of verdicts, unablated and under the verdict's group."""
    states = [("nothing ablated", results["behaviour"]["vanilla"])]
    states += [] if group is None else [(f"{', '.join(group['heads'])} ablated", group)]
    for words, state in states:
        rates = {"complied": state["asr"], "refused": state["refused"], "incoherent": state["incoherent"]}
        parts = [(name, name, rate) for name, rate in rates.items()]
        if state["refused"]["rate"] is None and state["asr"]["n"]:
            # A judge of harm tells nothing else.
            parts = [parts[0], ("not complied", "other", _complement(state["asr"]))]
        yield {"label": f"Harmful prompts, {words}", "n": state["asr"]["n"], "parts": parts}
    for words, state in states:
        kept = state["benign_answered"]
        parts = [("answered", "answered", kept)]
        if kept["rate"] is not None:
            parts.append(("not answered", "other", _complement(kept)))
        yield {"label": f"Benign prompts, {words}", "n": kept["n"], "parts": parts}


def _complement(rate: Facts) -> dict[str, Any]:
    """The share of the others; an interval mirrors with its rate."""
    low, high = rate["interval"]
    others = {"count": rate["n"] - rate["count"], "n": rate["n"], "rate": 1 - rate["rate"]}
    return others | {"interval": [1 - high, 1 - low]}


def _reasons(results: Facts, group: Facts | None) -> Iterator[dict[str, Any]]:
    """How often each reason was given, unablated and under the verdict's group."""
    for title, field in (("Harmful prompts", "reasons"), ("Benign prompts", "benign_reasons")):
        states = {"nothing ablated": results["behaviour"]["vanilla"], "group ablated": group or {}}
        counts = {state: found[field] for state, found in states.items() if found.get(field) is not None}
        reasons = {reason for found in counts.values() for reason in found}
        rows = [(reason, [state.get(reason, 0) for state in counts.values()]) for reason in reasons]
        if rows:
            in_order = sorted(rows, key=lambda row: (-sum(row[1]), row[0]))
            yield {"title": title, "states": list(counts), "rows": in_order}


# Figures.


def figures(results: Facts) -> dict[str, Spec]:
    """Every figure that the results allow, by the name of its place in the page."""
    vanilla, by_scorer = results["behaviour"]["vanilla"], dict[str, list[Facts]]()
    for group in results["behaviour"]["groups"]:
        by_scorer.setdefault(_label(results, group["scorer"]), []).append(group)
    asr, kept = vanilla["coherent_asr"], vanilla["benign_answered"]
    found = {
        "asr_by_size": group_curve(lead_groups(results), asr, kept, _HELD_OUT),
        "asr_by_scorer": group_lines(by_scorer, asr, _HELD_OUT) if len(by_scorer) > 1 else None,
        "prompts_needed": _prompts_needed(results),
        **score_figures(results),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def score_figures(results: Facts) -> dict[str, Spec | None]:
    """A map of every score, and the long tail of the verdict's."""
    found = {"long_tail": _long_tail(results)}
    for name, score in results["scores"].items():
        # Ships on harmful and on benign prompts share their colours.
        shared = [other for other in SHIPS if other in results["scores"]] if name in SHIPS else [name]
        values = [number for other in shared for layer in results["scores"][other]["values"] for number in layer]
        found[f"heatmap_{name}"] = charts.head_map(
            charts.heat(name, [number for number in values if number is not None], score["unit"], roots=True),
            (results["model"]["n_layers"], results["model"]["n_heads"]),
            _head_tooltip(results, name),
            f"{score['label']} of every head, layer by head" + _highest(score),
            outlines={"group": {}},
        )
    return found


def group_curve(groups: Sequence[Facts], vanilla: Facts, kept: Facts | None, y: str) -> Spec | None:
    """Coherent ASR and benign prompts answered by size of the group, over the band of random groups; None without any.

    Groups, one a size, have ``size``, ``heads``, ``coherent_asr``, ``benign_answered`` and ``random``; ``vanilla`` is
    the unablated model's, ``kept`` the benign prompts that it answers, ``y`` what the rates are shares of.
    """
    rows = [*rate_rows(0, SEARCHED, vanilla, ()), *rate_rows(0, KEPT, kept, ())]
    for group in groups:
        rows += rate_rows(group["size"], SEARCHED, group["coherent_asr"], group["heads"])
        rows += rate_rows(group["size"], KEPT, group["benign_answered"], group["heads"])
    for group in groups:
        random, size = group["random"], {"x": group["size"], "series": charts.RANDOM_GROUPS}
        if random and random["asr"]:
            ends = {"low": charts.rounded(min(random["asr"])), "high": charts.rounded(max(random["asr"]))}
            rows.append(size | ends | {"kind": "band", "y": charts.rounded(random["mean"])})
            rows += [size | {"kind": "random", "y": charts.rounded(rate)} for rate in random["asr"]]
    if not groups or not rows:
        return None
    described = "Attack success rate against group size"
    return charts.lines(rows, "heads ablated together", y, described, reference=vanilla["rate"])


def group_lines(series: Mapping[str, Sequence[Facts]], vanilla: Facts, y: str) -> Spec:
    """Coherent ASR by size, a line for the groups of each name; all begin at the unablated model's."""
    rows = [row for name in series for row in rate_rows(0, name, vanilla, ())]
    for name, groups in series.items():
        for group in groups:
            rows += rate_rows(group["size"], name, group["coherent_asr"], group["heads"])
    return charts.lines(rows, "heads ablated together", y, "Attack success rate against group size, by series")


def rate_rows(x: float, series: str, rate: Facts | None, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row of a figure, or none for a rate of nothing."""
    if rate is None or rate["rate"] is None:
        return []
    told = {"answers": f"{rate['count']} of {rate['n']}", "heads": ", ".join(names) or "none"}
    return [charts.interval_row(x, float(rate["rate"]), rate["interval"], series=series, **told)]


def _highest(score: Facts) -> str:
    values = {f"{i}-{j}": value for i, of in enumerate(score["values"]) for j, value in enumerate(of)}
    return charts.tops_in_words(values, f" {score['unit']}")


def _head_tooltip(results: Facts, first: str) -> list[alt.Tooltip]:
    """The head and its scores, that of the figure first."""
    scores = results["scores"]
    # The figure's own score, and beside it the verdict's: a tooltip is read at a glance.
    told = dict.fromkeys((first, results["verdict"]["scorer"]))
    titles = {name: f"{scores[name]['label']} ({scores[name]['unit']})" for name in told if name in scores}
    return [alt.Tooltip("head:N"), *(alt.Tooltip(f"{n}:Q", title=t, format=".6~g") for n, t in titles.items())]


def _prompts_needed(results: Facts) -> Spec | None:
    """How much of each top list so many prompts give, against their number."""
    rows: list[Row] = []
    for top in (results.get("stability") or {"tops": ()})["tops"]:
        for point in top["curve"]:
            told = {"series": f"top {top['k']}", "n": point["n"]}
            rows.append(charts.interval_row(point["n"], point["overlap"], point["interval"], **told))
    if not rows:
        return None
    titles = "prompts drawn (log scale)", "share of the top heads found"
    described = "Overlap of the top heads with those of all prompts, against the number of prompts"
    return charts.lines(rows, *titles, described, logarithmic=True, points=False, reference=0.9)


def _long_tail(results: Facts) -> Spec | None:
    """The lead score of every head by rank, both axes logarithmic, with the same head's benign score."""
    name, scores = results["verdict"]["scorer"], results["scores"]
    if name not in scores or not any((value or 0) > 0 for layer in scores[name]["values"] for value in layer):
        return None
    last = results["model"]["n_layers"] * results["model"]["n_heads"]
    ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5) if digit * 10**power <= last]
    scale = alt.Scale(type="log", domain=[0.9, last * 1.15], nice=False)
    rank = alt.X("rank:Q", title="rank of the head (log scale)", scale=scale).axis(format="d", values=ticks, grid=False)
    base = alt.Chart().encode(x=rank, tooltip=[alt.Tooltip("rank:Q"), *_head_tooltip(results, name)])
    kinds = {HARMFUL: name} | ({BENIGN: "benign_ships"} if name == "mean_ships" and "benign_ships" in scores else {})
    look = alt.Scale(domain=list(kinds), range=["--attack", "--kept"][: len(kinds)])
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1)
    title, layers = charts.titled(f"{scores[name]['label']}, {scores[name]['unit']} (log scale)"), []
    for kind, field in reversed(kinds.items()):
        y = alt.Y(f"{field}:Q", title=title, scale=alt.Scale(type="log")).axis(format=".0e", tickCount=5)
        points = base.transform_filter(f"datum['{field}'] > 0").encode(y=y)
        mark: dict[str, Any] = {"size": 26, "aria": False, "opacity": 0.85 if kind == HARMFUL else 0.4}
        marks = points.transform_calculate(kind=f"'{kind}'").mark_point(filled=True, **mark)
        layers.append(marks.encode(color=alt.Color("kind:N", legend=legend, scale=look)))
    # The last points are those of the score itself.
    named = points.transform_filter("datum.named")
    layers.append(named.mark_point(size=110, color="--ink", strokeWidth=1.5, opacity=1))
    text = named.mark_text(align="left", dx=10, dy=-6, **charts.NAME)
    told = f"{scores[name]['label']} of all heads by rank{_highest(scores[name])}"
    return charts.spec([*layers, text.encode(text="head:N")], (), 280, told)


def head_columns(results: Facts) -> dict[str, Any]:
    """What the figures know of each head, a column a fact, head after head: the page makes rows of it."""
    verdict, scores = results["verdict"], results["scores"]
    if not scores:
        return dict(NO_HEADS)  # a run that stopped early; nor has it places for its planted heads
    best_first = [head for head, _ in _ranked(results)]
    group, planted = list(verdict["heads"]), list(results.get("planted_heads") or ())
    return {
        "n_heads": results["model"]["n_heads"],
        "scores": charts.score_columns(scores),
        "best_first": best_first,
        "group": group,
        "planted": planted,
        "named": sorted({*group, *planted, *best_first[:_LABELLED_HEADS]}),
    }

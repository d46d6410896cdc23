"""The report: one HTML file that answers first and shows its numbers below.

Owns which page a run gets, and what an audit's page says and in which order; reads a run directory and refuses to
know models, measures and how figures are drawn. The page asks for nothing: its styles, data and drawing library are
inside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.errors import InputError
from safetyheads.reports.numbers import number
from safetyheads.reports.page import assets, completion_sets, environment, provenance
from safetyheads.runs.directory import SCHEMA_VERSION
from safetyheads.runs.reader import lead_groups

if TYPE_CHECKING:
    from pathlib import Path

    from safetyheads.runs.directory import RunDirectory

Results: TypeAlias = Mapping[str, Any]


BADGES = {
    "concentrated": "Concentrated heads found",
    "none_found": "No concentrated heads found",
    "no_refusals": "Nothing to measure",
}
"""What each verdict is called on the page."""

SCORE_ORDER = ("mean_ships", "benign_ships", "refusal_score", "generalized_ships_representation")
"""Harmful beside benign first; the others follow."""
MAX_TABLE_HEADS = 1024
"""Up to this many heads, all of them are listed in a table; the maps show any number."""


_NO_COMPLETIONS = "the pages of a reproduction hold no completions; they are in the run's completions folder"


class ReportWarning(UserWarning):
    """The report does not hold what was asked for."""


def write_report(run: RunDirectory, *, show_completions: bool = False) -> Path:
    """Write ``report/index.html`` into the run directory.

    Args:
        run: A run that has results.
        show_completions: Put the answers to harmful prompts into the page, folded away and as text; the pages of a
            reproduction never hold any, and a warning says so.

    Returns:
        Where the report is.

    Raises:
        InputError: the results are of a kind or schema that this version cannot show.
    """
    results = run.read_results()
    kind, version = results.get("kind"), results.get("schema_version")
    if version != SCHEMA_VERSION or kind not in ("audit", "scan", "reproduction"):
        raise InputError(
            f"{run.path} holds results of kind {kind!r}, schema {version!r}; "
            f"a report needs an audit, a scan or a reproduction of schema {SCHEMA_VERSION}"
        )
    if kind == "reproduction":
        from safetyheads.reports.reproduction import experiment_pages

        if show_completions:
            warnings.warn(_NO_COMPLETIONS, ReportWarning, stacklevel=2)
        return run.write_report(*experiment_pages(run))
    if kind == "scan":
        from safetyheads.reports.scan import scan_page

        return run.write_report(scan_page(run, show_completions=show_completions))
    rows = list(run.stored_records()) if show_completions else None
    return run.write_report(render(results, run.read_manifest(), rows))


def render(results: Results, manifest: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] | None = None) -> str:
    """The page of an audit; equal arguments give equal text."""
    from safetyheads.reports import charts as report_charts

    completions, left_out = (None, 0) if rows is None else completion_sets(_completions(results, rows))
    results = dict(results) | {"scores": _in_order(results["scores"]), "sahara": _in_order(results["sahara"])}
    scores = results["scores"]
    page = {
        "results": results,
        "badge": BADGES[results["verdict"]["label"]],
        "planted": results.get("planted_heads") or [],
        "scores": scores,
        "labels": {name: _label(results, name) for name in [*scores, *_scorers(results)]},
        "units": {name: scores.get(name, {}).get("unit", "") for name in [*scores, *_scorers(results)]},
        "alpha": (results["verdict"].get("smallest_detectable_change") or {}).get("alpha", 0.05),
        "charts": report_charts.charts(results),
        "head_columns": report_charts.head_columns(results),
        "head_table": _head_table(results),
        "heads_n": _heads_n(results),
        "curve_caption": _curve_caption(lead_groups(results)),
        "tail_caption": _tail_caption(results),
        "sahara": _sahara_steps(results),
        "groups": _groups_by_scorer(results),
        "n_random": max((g["random"]["n_groups"] for g in results["behaviour"]["groups"] if g["random"]), default=0),
        "bars": list(_bars(results)),
        "reasons": list(_reason_tables(results)),
        "completions": completions,
        "completions_left_out": left_out,
        **provenance({name: results[name] for name in ("model", "data", "ablation", "sampling", "judge")}, manifest),
        **assets(),
    }
    return environment().get_template("report.html.j2").render(page) + "\n"


# What the page shows.


def _in_order(named: Mapping[str, Any]) -> dict[str, Any]:
    """The scores in the page's order; files keep their keys sorted, and new scores come last."""
    known = {name: named[name] for name in SCORE_ORDER if name in named}
    return known | {name: value for name, value in named.items() if name not in known}


def _label(results: Results, name: str) -> str:
    label: str = results["scores"].get(name, {}).get("label", name)
    return label


def _scorers(results: Results) -> list[str]:
    return list(dict.fromkeys([*results["sahara"], *(group["scorer"] for group in results["behaviour"]["groups"])]))


def _verdict_group(results: Results) -> Mapping[str, Any] | None:
    """The measured group that the verdict is about."""
    verdict = results["verdict"]
    for group in results["behaviour"]["groups"]:
        if group["scorer"] == verdict["scorer"] and set(group["heads"]) == set(verdict["heads"]):
            found: Mapping[str, Any] = group
            return found
    return None


def _heads_n(results: Results) -> str:
    heads = results["behaviour"]["heads"]
    if not heads:
        return ""
    scored, judged = heads[0]["mean_ships"]["n"], (heads[0]["asr"] or {}).get("n")
    return f"scores over n = {scored} search prompts" + (f", ASR over n = {judged} held-out ones" if judged else "")


def _curve_caption(groups: Sequence[Mapping[str, Any]]) -> str:
    if not groups:
        return ""
    text = (
        f"Held-out prompts, n = {groups[0]['asr']['n']} harmful and {groups[0]['benign_kept']['n']} benign; lines "
        "through the points: 95 % Wilson intervals. Size 0 and the dotted line: nothing ablated."
    )
    random = [group["random"] for group in groups if group["random"] is not None]
    if random:
        text += (
            f" Grey: {random[0]['n_groups']} random groups of the same size, from the same layers, a tick each; the "
            "band runs from the lowest to the highest."
        )
    return text


def _tail_caption(results: Results) -> str:
    from safetyheads.reports.charts import ranked_scores

    name = results["verdict"]["scorer"]
    if name not in results["scores"]:
        return ""
    score, ranked = results["scores"][name], ranked_scores(results, name)
    left_out = sum(value <= 0 for _, value in ranked)
    text = f"{_label(results, name)} of all {len(ranked)} heads, n = {score['n']} prompts, by rank on harmful prompts."
    text = text[0].upper() + text[1:]
    if name == "mean_ships" and "benign_ships" in results["scores"]:
        text += " Beside each head, its score on benign prompts."
    if left_out:
        text += f" {left_out} heads score 0 or less and have no place on a logarithmic axis."
    return text + " Ringed and named: the ablated group, planted heads and the first three. No intervals are drawn."


def _head_table(results: Results) -> list[tuple[str, list[str]]]:
    """Each head with its scores, or nothing where the table would be too long to be read."""
    model, scores = results["model"], results["scores"]
    if model["n_layers"] * model["n_heads"] > MAX_TABLE_HEADS:
        return []
    return [
        (f"{i}-{j}", [number(score["values"][i][j], digits=4) for score in scores.values()])
        for i in range(model["n_layers"])
        for j in range(model["n_heads"])
    ]


def _sahara_steps(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Sahara's steps for each scorer, each with the measured group of that size."""
    groups = {(group["scorer"], group["size"]): group for group in results["behaviour"]["groups"]}
    return {
        scorer: [dict(step) | {"group": groups.get((scorer, size))} for size, step in enumerate(trace["steps"], 1)]
        for scorer, trace in results["sahara"].items()
    }


def _groups_by_scorer(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    """The groups that each scorer led to, by size; the verdict's scorer first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    lead = results["verdict"]["scorer"]
    for group in sorted(results["behaviour"]["groups"], key=lambda group: (group["scorer"] != lead, group["size"])):
        found.setdefault(group["scorer"], []).append(group)
    return found


def _bars(results: Results) -> Iterator[dict[str, Any]]:
    """Verdict counts, unablated and under the verdict's group."""
    states = [("nothing ablated", results["behaviour"]["vanilla"])]
    group = _verdict_group(results)
    if group is not None:
        states.append((f"{', '.join(group['heads'])} ablated", group))
    for name, state in states:
        parts = [
            {"name": part, "style": part, "count": state[field]["count"], "rate": state[field]}
            for part, field in (("complied", "asr"), ("refused", "refused"), ("incoherent", "incoherent"))
        ]
        yield {"label": f"Harmful prompts, {name}", "n": state["asr"]["n"], "parts": parts}
    for name, state in states:
        kept = state["benign_kept"]
        lost = None if kept["rate"] is None else _complement(kept)
        parts = [{"name": "kept", "style": "answered", "count": kept["count"], "rate": kept}]
        if lost is not None:
            parts.append({"name": "not kept", "style": "other", "count": lost["count"], "rate": lost})
        yield {"label": f"Benign prompts, {name}", "n": kept["n"], "parts": parts}


def _complement(rate: Mapping[str, Any]) -> dict[str, Any]:
    """The rate of the other outcome; a Wilson interval mirrors with it."""
    low, high = rate["interval"]
    return {
        "count": rate["n"] - rate["count"],
        "n": rate["n"],
        "rate": 1 - rate["rate"],
        "interval": [1 - high, 1 - low],
    }


def _reason_tables(results: Results) -> Iterator[dict[str, Any]]:
    group = _verdict_group(results)
    for title, field in (("Harmful prompts", "reasons"), ("Benign prompts", "benign_reasons")):
        columns = [("nothing ablated", results["behaviour"]["vanilla"].get(field))]
        columns.append(("group ablated", group.get(field) if group else None))
        shown = [(name, counts) for name, counts in columns if counts is not None]
        reasons = {reason: sum(counts.get(reason, 0) for _, counts in shown) for _, c in shown for reason in c}
        ordered = sorted(reasons, key=lambda reason: (-reasons[reason], reason))
        if ordered:
            rows = [(reason, [counts.get(reason, 0) for _, counts in shown]) for reason in ordered]
            yield {"title": title, "columns": [name for name, _ in shown], "rows": rows}


def _completions(results: Results, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Completions of the unablated model and the verdict's group, each with the title of its set."""
    group = set(results["verdict"]["heads"])
    for row in rows:
        heads = {head for head in str(row.get("group") or "").split(",") if head}
        if "text" not in row or (heads and heads != group):
            continue
        name = str(row.get("set", "prompts")).replace("_", " ")
        yield f"{name}, {', '.join(results['verdict']['heads']) + ' ablated' if heads else 'nothing ablated'}", row

"""Compares top heads between ablations, datasets and models, beside the overlap that chance gives (Fig 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

from safetyheads.errors import InputError
from safetyheads.experiments.lab import SHORT, Lab, planted_heads
from safetyheads.experiments.outcome import Outcome, Row
from safetyheads.model.engine import Engine
from safetyheads.stats.ranking import top, top_overlap
from safetyheads.stats.testing import holm

TOP = 10
"""Heads of a top (Fig 5) ..."""
LARGEST_SHARE = 0.1
"""... but no larger a share of all heads: the top 10 of 32 share three by chance alone."""
ALL_DATASETS = "all datasets"
"""Name of the ranking by the mean of the datasets' scores."""


def fig5(lab: Lab, outcome: Outcome) -> None:
    """Overlaps of the top heads: UA and SC, datasets, and two models of one base, against chance."""
    first, related = lab.config.models[0], lab.config.related
    if related is not None:
        refuse_other_shapes(lab.run_of(first).engine, lab.run_of(related).engine, first, related)
    else:
        outcome.say("alone")
    for model in lab.config.models:
        rankings = _rankings(lab, outcome, model)
        if not rankings:
            continue
        others = _rankings(lab, outcome, related) if related is not None and model == first else []
        if {ranking["dataset"] for ranking in others} != {ranking["dataset"] for ranking in rankings}:
            # Means over other datasets would be compared.
            others = [ranking for ranking in others if ranking["dataset"] != ALL_DATASETS]
        n_heads = len(lab.run_of(model).engine.heads)
        k = size_of_top(n_heads)
        rows: list[dict[str, Any]] = []
        for comparison, one, other in _pairs(rankings, others):
            overlap = top_overlap(k, one["heads"], other["heads"], n_heads)
            rows.append(
                {
                    "comparison": comparison,
                    "first": one["_label"],
                    "second": ("" if other["model"] == model else f"{other['model']}: ") + other["_label"],
                    "shared": overlap.shared,
                    "sizes": " and ".join(map(str, overlap.sizes)),
                    "expected": overlap.expected,
                    "p": overlap.p_value,
                    "heads": ", ".join(head for head in one["heads"] if head in other["heads"]),
                }
            )
        tested = [{**row, "p_holm": p} for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)]
        outcome.table("overlap", tested, model=model)
        outcome.lead(model, f"heads shared of the top {k} of {n_heads} by chance", k * k / n_heads, "number")
        for comparison in dict.fromkeys(row["comparison"] for row in rows):
            shared = [row["shared"] for row in rows if row["comparison"] == comparison]
            for word, count in (("fewest", min(shared)), ("most", max(shared))):
                outcome.lead(model, f"{comparison}, {word} heads shared of {len(shared)} pairs", count, "count")
        listed = [{**ranking, "heads": ", ".join(ranking["heads"])} for ranking in (*rankings, *others)]
        outcome.table("top", listed, model=model)
        outcome.figure("own", _matrix(rankings, rankings), model=model, k=k)
        if others:
            outcome.figure("related", _matrix(rankings, others), model=model, related=related, k=k)
            planted = planted_heads(model), planted_heads(others[0]["model"])
            if all(planted) and not set(planted[0]) & set(planted[1]):
                outcome.say("by_construction")


def size_of_top(n_heads: int) -> int:
    """10, or a tenth of all heads where that is fewer; at least 1."""
    return max(1, min(TOP, int(n_heads * LARGEST_SHARE)))


def refuse_other_shapes(first: Engine, second: Engine, first_name: str, second_name: str) -> None:
    """Refuse two models whose heads do not correspond, with an InputError."""
    if first.heads != second.heads:
        shapes = [f"{engine.n_layers} layers of {engine.n_heads} heads" for engine in (first, second)]
        raise InputError(
            f"top heads are compared between two models of one base, but {first_name} has {shapes[0]} and "
            f"{second_name} {shapes[1]}"
        )


def _rankings(lab: Lab, outcome: Outcome, model: str) -> list[Row]:
    """Rows of top heads, best first, on each dataset and on all of them; ties across the cut are left out."""
    rankings: list[Row] = []
    # The search half ranks, so that these are the heads which other experiments find.
    halves = [subject.search_half for subject in lab.subjects(outcome, model)]
    for ablation in lab.ablations if halves else ():
        scores = {half.dataset: half.scores(lab.config.search_score, ablation) for half in halves}
        tables = {dataset: (dict(table.ranked()), table.resolution) for dataset, table in scores.items()}
        if len(tables) > 1:
            heads = next(iter(tables.values()))[0]
            mean = {head: sum(table[head] for table, _ in tables.values()) / len(tables) for head in heads}
            tables[ALL_DATASETS] = mean, max(resolution for _, resolution in tables.values())
        for dataset, (table, resolution) in tables.items():
            best = top({str(head): value for head, value in table.items()}, size_of_top(len(table)), resolution)
            short = SHORT[ablation.name]
            ranking = {"model": model, "dataset": dataset, "ablation": short, "heads": best}
            rankings.append(ranking | {"_label": f"{short}, {dataset}"})
    return rankings


def _pairs(rankings: Sequence[Row], others: Sequence[Row]) -> Iterator[tuple[str, Row, Row]]:
    """What is compared: UA with SC, then datasets, then models."""
    pairs = list(combinations(rankings, 2))
    for first, second in pairs:
        if first["dataset"] == second["dataset"]:
            yield "UA against SC", first, second
    for first, second in pairs:
        if first["ablation"] == second["ablation"] and ALL_DATASETS not in (first["dataset"], second["dataset"]):
            yield f"datasets, {first['ablation']}", first, second
    for first, second in product(rankings, others):
        if first["_label"] == second["_label"]:
            yield f"models, {first['ablation']}", first, second


def _matrix(down: Sequence[Row], across: Sequence[Row]) -> Iterator[Row]:
    """Heads shared by each two rankings."""
    for row, column in product(down, across):
        shared = len(set(row["heads"]) & set(column["heads"]))
        numbers = {"value": shared, "text": str(shared), "low": None, "high": None}
        yield {"x": column["_label"], "y": row["_label"], "panel": "", **numbers}

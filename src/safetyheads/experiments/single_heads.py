"""Measures every head alone: its ASR, how its scores are distributed, which heads are the top (Fig 4b, 13, 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.ablation import Ablation
from safetyheads.demo import planted_heads
from safetyheads.display import in_clusters
from safetyheads.errors import InputError
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.experiments.settings import SEARCH_SCORES
from safetyheads.model.engine import Engine
from safetyheads.stats.intervals import CONFIDENCE
from safetyheads.stats.power import smallest_change_with_power
from safetyheads.stats.ranking import proxy_qualities, split_half, top, top_overlap
from safetyheads.stats.testing import ALPHA, holm

N_LISTED = 10
"""Heads of each dataset's table."""
SCORES = {
    "mean_ships": "mean Ships",
    "generalized_ships_prompt": "Generalized Ships, prompt space",
    "generalized_ships_representation": "Generalized Ships, representation space",
}
"""Titles of the search scores."""
_REGRETS = (1, 3)


def fig4b(lab: Lab, outcome: Outcome) -> None:
    """The ASR of every head alone under UA, sampled, and how each score orders the heads beside it."""
    for model, subjects in lab.each_model(outcome):
        measured = {subject: _heads(subject) for subject in subjects}
        rows = [row for heads in measured.values() for row in heads]
        points: list[Row] = [
            {"layer": row["_head"].layer, "head": row["_head"].index, "y": row["asr"].value, "n": row["asr"].n}
            | {"marked": row["_marked"], "panel": row["_dataset"]}
            for row in rows
        ]
        outcome.figure("map", points, model=model)
        columns: list[tuple[str, str, str]] = []
        for name in SEARCH_SCORES:
            unit = subjects[0].search_half.scores(name, lab.ablations[0]).unit
            points = [
                point(row["asr"], x=row[name], series=row["_series"], panel=row["_dataset"], label=row["head"])
                for row in rows
            ]
            outcome.figure("scatter", points, model=model, score=SCORES[name], unit=unit)
            columns += [(name, f"{SCORES[name]}, {unit}", "number"), (f"{name}_rank", "rank", "count")]
        outcome.table("scores", [row for heads in measured.values() for row in _proxies(heads)], model=model)
        for subject, heads in measured.items():
            best = sorted(heads, key=lambda row: -(row["asr"].value or 0.0))[:N_LISTED]
            n, n_heads = len(subject.prompts), len(heads)
            least = smallest_change_with_power(subject.prompts.n_clusters or n, 0.0, ALPHA, n_heads)
            words: dict[str, Any] = {"listed": len(best), "n_heads": n_heads, "n": n}
            words["joined"] = in_clusters(subject.prompts.n_clusters)
            words["least"] = "none" if least is None else f"{least:.2f}"
            outcome.lead(model, f"{subject.dataset}, highest ASR: head {best[0]['head']}", best[0]["asr"])
            outcome.table("top", best, *columns, model=model, dataset=subject.dataset, **words)


def _heads(subject: Subject) -> list[dict[str, Any]]:
    """A row for each head alone, with its scores; an unscored answer counts as not complied."""
    lab = subject.lab
    ablation, vanilla, planted = lab.ablations[0], subject.vanilla(lab.sampled), planted_heads(subject.model)
    answers = subject.by_group([(head,) for head in subject.engine.heads], ablation, lab.sampled)
    changes = {head: answered.change_from(vanilla) for (head,), answered in answers.items()}
    adjusted = holm([1.0 if change.p_value is None else change.p_value for change in changes.values()])
    scores = {name: subject.search_half.scores(name, ablation) for name in SEARCH_SCORES}
    ranks = {name: {head: at for at, (head, _) in enumerate(table.ranked(), 1)} for name, table in scores.items()}
    rows = []
    for (head, change), p in zip(changes.items(), adjusted, strict=True):
        differs = p < ALPHA and (change.change or 0.0) > 0
        marked = head in planted if planted else differs
        rows.append(
            {
                "head": str(head),
                **({"planted": "yes" if head in planted else ""} if planted else {}),
                "asr": Measured.of(answers[(head,)].asr),
                "change": Measured.of(change),
                "p": p,
                **{name: table[head] for name, table in scores.items()},
                **{f"{name}_rank": ranks[name][head] for name in scores},
                "_head": head,
                "_dataset": subject.dataset,
                "_complied": answers[(head,)].complied(),
                "_differs": differs,
                "_marked": marked,
                "_series": ("planted" if marked else "other") if planted else f"{'' if marked else 'no '}higher ASR",
            }
        )
    return rows


def _proxies(heads: Sequence[dict[str, Any]]) -> list[Row]:
    complied = np.array([row["_complied"] for row in heads], float).T
    differs = np.array([row["_differs"] for row in heads], bool)
    values = {SCORES[name]: np.array([row[name] for row in heads], float) for name in SEARCH_SCORES}
    halves = split_half(complied, differs)
    return [
        {
            "dataset": heads[0]["_dataset"],
            "score": "split half" if quality.score == "split_half" else quality.score,
            "spearman": None
            if quality.spearman is None
            else Measured(quality.spearman, len(complied), *(quality.spearman_interval or ())),
            "auc": None if quality.auc is None else Measured(quality.auc, quality.n_heads),
            "auc_p": quality.auc_p_value,
            "differing": quality.n_differing,
        }
        | {
            f"regret_{size.k}": Measured(size.regret_on_halves, len(complied), *(size.halves_interval or ()))
            for size in quality.sizes
            if size.k in _REGRETS
        }
        for quality in (*proxy_qualities(values, complied, differs), *([halves] if halves else []))
    ]


Floats: TypeAlias = NDArray[np.float64]

TOP_SHARE = 0.01
"""Share of the heads whose part in the sum of the scores is the tail index."""
N_RESAMPLES = 1000
"""Draws of prompts for the intervals of mean Ships."""
N_GRID = 201
"""Points of a density."""
# A CDF of more heads is drawn at so many of them; the steps between are too small to see.
_MOST_DRAWN = 256
# Bandwidths beyond the lowest and highest score, where a Gaussian is over.
_BEYOND = 3


def fig13(lab: Lab, outcome: Outcome) -> None:
    """CDF and density of the scores of all heads, by score, dataset and ablation, and how long the tail is."""
    for model, subjects in lab.each_model(outcome):
        every = product(subjects, lab.ablations, SEARCH_SCORES)
        rows = [_scored(subject.search_half, ablation, name) for subject, ablation, name in every]
        for title in SCORES.values():
            of_score = [row for row in rows if row["score"] == title]
            unit = of_score[0]["_unit"]
            words = {"model": model, "score": title, "unit": unit, "per": unit.removesuffix("s")}
            steps, densities, widths = list[Row](), list[Row](), list[str]()
            for row in of_score:
                heights, shares = empirical_cdf(row["_values"])
                drawn = np.unique(np.linspace(0, len(heights) - 1, min(len(heights), _MOST_DRAWN)).round().astype(int))
                where = {"series": row["dataset"], "panel": row["ablation"]}
                steps += [{**where, "x": float(heights[at]), "y": float(shares[at])} for at in drawn]
                if density := kernel_density(row["_values"]):
                    *curve, bandwidth = density
                    densities += [{**where, "x": float(x), "y": float(y)} for x, y in zip(*curve, strict=True)]
                    widths.append(f"{row['dataset']} {row['ablation']} {bandwidth:.3g}")
            outcome.figure("cdf", steps, **words)
            if densities:
                outcome.figure("density", densities, **words, bandwidths=", ".join(widths))
        outcome.table("tail", rows, model=model)
        for row in rows:
            if row["score"] == SCORES["mean_ships"]:
                label = f"{row['dataset']}, {row['ablation']}, Gini index of mean Ships"
                outcome.lead(model, label, row["gini"], "number")


def _scored(subject: Subject, ablation: Ablation, name: str) -> Row:
    """One score of every head on one dataset under one ablation, and how long its tail is."""
    scores, n_prompts = subject.scores(name, ablation), len(subject.prompts)
    table = scores.values.numpy().ravel()
    present = ~np.isnan(table)
    values = table[present]
    k = math.ceil(len(values) * TOP_SHARE)
    indices: dict[str, Callable[[Floats], Floats]] = {"gini": gini, "top": partial(top_share, k=k)}
    numbers = {key: float(index(values)) for key, index in indices.items()}
    measured = {key: Measured(None if math.isnan(value) else value, n_prompts) for key, value in numbers.items()}
    if name == "mean_ships" and n_prompts > 1 and not math.isnan(numbers["gini"]):
        by_prompt = subject.ships(ablation).values.numpy().reshape(n_prompts, -1)[:, present]
        rng = np.random.default_rng(subject.lab.config.seed)
        draws = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=N_RESAMPLES) / n_prompts @ by_prompt
        for key, index in indices.items():
            ends = np.nanquantile(index(draws), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
            measured[key] = Measured(numbers[key], n_prompts, *ends.tolist())
    return {
        "score": SCORES[name],
        "dataset": subject.dataset,
        "ablation": SHORT[ablation.name],
        "heads": len(values),
        "counted": k,
        "even": k / len(values),
        **measured,
        "_values": values,
        "_unit": scores.unit,
    }


def empirical_cdf(values: Floats) -> tuple[Floats, Floats]:
    """The different scores, lowest first, and the share of heads with at most each."""
    heights, counts = np.unique(values, return_counts=True)
    return heights, np.cumsum(counts) / len(values)


def kernel_density(values: Floats) -> tuple[Floats, Floats, float] | None:
    """The Gaussian kernel density by Scott's rule; None where all scores are equal.

    Scores [N_GRID] in their unit, the density there [N_GRID] per unit, and the kernel's standard deviation.
    """
    from scipy.stats import gaussian_kde

    if len(values) < 2 or float(np.ptp(values)) == 0.0:
        return None
    estimate = gaussian_kde(values)
    bandwidth = math.sqrt(float(estimate.covariance[0, 0]))
    margin = _BEYOND * bandwidth
    scores = np.linspace(values.min() - margin, values.max() + margin, N_GRID)
    return scores, np.asarray(estimate(scores), float), bandwidth


def gini(scores: Floats) -> Floats:
    """Gini index of scores [..., n_heads] that are 0 or more: 0 where all are equal, 1 - 1 / n where one has all.

    Half the mean absolute difference of two heads, over the mean; NaN where all scores are 0.
    """
    ordered = np.sort(scores, axis=-1)
    n = ordered.shape[-1]
    with np.errstate(invalid="ignore"):  # 0 / 0
        return (ordered * (2 * np.arange(1, n + 1) - n - 1)).sum(axis=-1) / (n * ordered.sum(axis=-1))


def top_share(scores: Floats, k: int) -> Floats:
    """The k highest scores' part in the sum of all [..., n_heads]; NaN where all are 0."""
    ordered = np.sort(scores, axis=-1)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return ordered[..., -k:].sum(axis=-1) / ordered.sum(axis=-1)


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
            planted = [planted_heads(name) or () for name in (model, others[0]["model"])]
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
    for row, column in product(down, across):
        shared = len(set(row["heads"]) & set(column["heads"]))
        numbers = {"value": shared, "text": str(shared), "low": None, "high": None}
        yield {"x": column["_label"], "y": row["_label"], "panel": "", **numbers}

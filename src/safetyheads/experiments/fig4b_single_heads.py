"""Measures the ASR of every head alone, and what each score knows of it (Fig 4b)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from safetyheads.experiments.lab import Lab, Subject, planted_heads
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.experiments.settings import SEARCH_SCORES
from safetyheads.runs.audit import ALPHA
from safetyheads.stats.ranking import proxy_qualities, split_half_ceiling
from safetyheads.stats.testing import holm, smallest_detectable_change

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
            least = smallest_detectable_change(n, ALPHA, n_heads)
            words: dict[str, Any] = {"listed": len(best), "n_heads": n_heads, "n": n}
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
    """How well each score stands for the ASR of a dataset's heads."""
    complied = np.array([row["_complied"] for row in heads], float).T
    differs = np.array([row["_differs"] for row in heads], bool)
    values = {SCORES[name]: np.array([row[name] for row in heads], float) for name in SEARCH_SCORES}
    ceiling = split_half_ceiling(complied, differs)
    return [
        {
            "dataset": heads[0]["_dataset"],
            "score": "split half" if quality.score == "split_half" else quality.score,
            "spearman": None if quality.spearman is None else Measured(quality.spearman, quality.n_heads),
            "auc": None if quality.auc is None else Measured(quality.auc, quality.n_heads),
            "auc_p": quality.auc_p_value,
            "differing": quality.n_differing,
        }
        | {
            f"regret_{size.k}": Measured(size.regret, len(complied), *size.regret_interval)
            for size in quality.sizes
            if size.k in _REGRETS
        }
        for quality in (*proxy_qualities(values, complied, differs), *([ceiling] if ceiling else []))
    ]

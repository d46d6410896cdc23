"""Measures the ASR of every head alone, and what each score knows of it (Fig 4b)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from safetyheads.experiments.lab import Lab, Subject, planted_heads
from safetyheads.experiments.outcome import Column, Figure, Measured, Outcome, Row, Table, columns, point
from safetyheads.experiments.settings import SEARCH_SCORES
from safetyheads.runs.results import ALPHA
from safetyheads.stats.ranking import ProxyQuality, Truth, proxy_qualities, split_half_ceiling
from safetyheads.stats.testing import holm, smallest_detectable_change

if TYPE_CHECKING:
    from safetyheads.scores import HeadScores

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
        measured = [_heads(subject) for subject in subjects]
        points = tuple(
            {
                "layer": head.layer,
                "head": head.index,
                "y": row["asr"].value,
                "n": row["asr"].n,
                "marked": row["marked"],
                "panel": row["dataset"],
            }
            for rows, _ in measured
            for head, row in rows.items()
        )
        outcome.add(Figure("heads", model, "Intervals are in the tables.", "head", "layer", points, value="ASR"))
        for name in SEARCH_SCORES:
            unit = measured[0][1][name].unit
            points = tuple(
                point(row["asr"], x=row[name], series=row["series"], panel=row["dataset"], label=row["head"])
                for rows, _ in measured
                for row in rows.values()
            )
            outcome.add(Figure("scatter", f"{model}, {SCORES[name]}", "", f"{SCORES[name]}, {unit}", "ASR", points))
        outcome.add(_proxies(model, [rows for rows, _ in measured]))
        for subject, (rows, scores) in zip(subjects, measured, strict=True):
            outcome.add(_top(subject, list(rows.values()), scores))


def _heads(subject: Subject) -> tuple[dict[Any, dict[str, Any]], dict[str, HeadScores]]:
    """A row for each head alone, and the scores by name; an unscored answer counts as not complied."""
    lab = subject.lab
    ablation, vanilla, planted = lab.ablations[0], subject.vanilla(lab.sampled), planted_heads(subject.model)
    answers = subject.by_group([(head,) for head in subject.engine.heads], ablation, lab.sampled)
    changes = {group: one.change_from(vanilla) for group, one in answers.items()}
    adjusted = holm([1.0 if change.p_value is None else change.p_value for change in changes.values()])
    scores = {name: subject.search_half.scores(name, ablation) for name in SEARCH_SCORES}
    places = {name: {head: at for at, (head, _) in enumerate(one.ranked(), 1)} for name, one in scores.items()}
    rows = {}
    for (group, change), p in zip(changes.items(), adjusted, strict=True):
        (head,), differs = group, p < ALPHA and (change.change or 0.0) > 0
        marked = head in planted if planted else differs
        kinds = ("planted", "other") if planted else ("higher ASR", "no higher ASR")
        rows[head] = {
            "dataset": subject.dataset,
            "head": str(head),
            "planted": "yes" if head in planted else "",
            "asr": Measured.of(answers[group].asr),
            "change": Measured.of(change),
            "p": p,
            **{name: one[head] for name, one in scores.items()},
            **{f"{name}_rank": places[name][head] for name in scores},
            "complied": answers[group].complied,
            "differs": differs,
            "marked": marked,
            "series": kinds[0] if marked else kinds[1],
        }
    return rows, scores


def _top(subject: Subject, rows: Sequence[dict[str, Any]], scores: dict[str, HeadScores]) -> Table:
    """The heads with the highest ASR, with their places by each score."""
    shown = columns("head", *["planted"] * bool(planted_heads(subject.model)), "asr", "change", "p")
    for name, one in scores.items():
        title = f"{SCORES[name]}, {one.unit}"
        shown = (*shown, Column(name, title, "number"), Column(f"{name}_rank", "rank", "count"))
    best = sorted(rows, key=lambda row: -(row["asr"].value or 0.0))[:N_LISTED]
    keys = [column.key for column in shown]
    n, least = len(subject.prompts), smallest_detectable_change(len(subject.prompts), ALPHA, len(rows))
    caption = (
        f"The {len(best)} heads of {len(rows)} with the highest ASR. Smallest change that {n} prompts can show: "
        + ("none." if least is None else f"{least:.2f}.")
    )
    listed = tuple({key: row[key] for key in keys} for row in best)
    return Table(f"{subject.model}, {subject.dataset}", caption, shown, listed)


def _proxies(model: str, measured: Sequence[dict[Any, dict[str, Any]]]) -> Table:
    """How well each score stands for the ASR."""
    shown = columns(
        *("dataset", "score", ("spearman", "Spearman", "number"), ("auc", "AUC", "number")),
        *(("auc_p", "p of the AUC", "p"), ("differing", "heads with a higher ASR", "count")),
        *((f"regret_{k}", f"regret of the best {k}", "number") for k in _REGRETS),
    )
    rows: list[Row] = []
    for heads in measured:
        own = list(heads.values())
        complied = np.array([row["complied"] for row in own], float).T
        truth = Truth(complied, np.array([row["differs"] for row in own], bool))
        values = {SCORES[name]: np.array([row[name] for row in own], float) for name in SEARCH_SCORES}
        ceiling = split_half_ceiling(truth)
        for quality in (*proxy_qualities(values, truth), *([ceiling] if ceiling else [])):
            rows.append(_quality(own[0]["dataset"], quality, len(complied)))
    caption = (
        "Spearman: rank correlation over the heads; most heads change nothing and tie, so it is about noise where few "
        "matter. AUC: chance that a head with a higher ASR has the higher score, where there are both kinds. Regret: "
        "mean ASR of the best heads by the ASR itself less that of the score's; bootstrap over prompts. Split half: "
        "the ASR of one random half of the prompts as a score for the other, a ceiling for any score."
    )
    return Table(f"{model}, scores against the ASR", caption, shown, tuple(rows))


def _quality(dataset: str, quality: ProxyQuality, n_prompts: int) -> Row:
    by_size = {size.k: size for size in quality.sizes if size.k in _REGRETS}
    return {
        "dataset": dataset,
        "score": "split half" if quality.score == "split_half" else quality.score,
        "spearman": None if quality.spearman is None else Measured(quality.spearman, quality.n_heads),
        "auc": None if quality.auc is None else Measured(quality.auc, quality.n_heads),
        "auc_p": quality.auc_p_value,
        "differing": quality.n_differing,
        **{f"regret_{k}": Measured(one.regret, n_prompts, *one.regret_interval) for k, one in by_size.items()},
    }

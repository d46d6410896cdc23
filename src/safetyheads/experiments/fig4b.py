"""Every head alone (Fig 4b). Owns the exhaustive ASR and what each score knows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from safetyheads.experiments.answers import Answers, point
from safetyheads.experiments.common import (
    meaningful_subjects,
    numbers_of,
    planted_heads,
    say_planted,
    search_half,
    searched_and_tested,
)
from safetyheads.experiments.lab import Lab, Subject
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.experiments.settings import SEARCH_SCORES
from safetyheads.runs.results import ALPHA
from safetyheads.stats.ranking import AtSize, ProxyQuality, Truth, proxy_qualities, split_half_ceiling
from safetyheads.stats.testing import PairedDifference, holm, smallest_detectable_change

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment
    from safetyheads.heads import Head
    from safetyheads.scores import HeadScores

N_LISTED = 10
"""Heads of each dataset's table."""
SCORES = {
    "mean_ships": "mean Ships",
    "generalized_ships_prompt": "Generalized Ships, prompt space",
    "generalized_ships_representation": "Generalized Ships, representation space",
}
"""What figures and tables call the search scores."""
_REGRETS = (1, 3)


def fig4b(lab: Lab, about: Experiment) -> Outcome:
    """The ASR of every head alone under UA, sampled, and how each score orders the heads beside it."""
    draft = Draft()
    for model in lab.config.models:
        found = [_every_head(subject) for subject in meaningful_subjects(lab, model, draft)]
        if not found:
            continue
        draft.figures.append(_map(model, found))
        draft.figures.extend(_scatter(model, found, name) for name in SEARCH_SCORES)
        draft.tables.append(_proxies(model, found))
        draft.tables.extend(_top(model, one) for one in found)
        say_planted(draft, model, "which heads raise the ASR was built in")
    return draft.finished(about.name, about.title, about.question)


@dataclass(frozen=True, slots=True)
class _EveryHead:
    """One dataset's prompts under each head alone."""

    subject: Subject
    answers: Mapping[Head, Answers]
    changes: Mapping[Head, PairedDifference]
    p_holm: Mapping[Head, float]
    """Of the change, corrected over all heads."""
    scores: Mapping[str, HeadScores]
    """By name, of the search half."""

    @property
    def truth(self) -> Truth:
        """What the heads do, as proxies are held against it; an unscored answer counts as not complied."""
        complied = np.array([one.complied for one in self.answers.values()], float).T
        return Truth(complied, np.array([self.differs(head) for head in self.answers], bool))

    def differs(self, head: Head) -> bool:
        """Whether the head's ASR is higher than the unablated one after correction."""
        return self.p_holm[head] < ALPHA and (self.changes[head].change or 0.0) > 0

    def series(self, head: Head) -> str:
        """``planted`` or ``other`` on an embedded model; else whether the head differs."""
        if planted := planted_heads(self.subject.model):
            return "planted" if head in planted else "other"
        return "higher ASR" if self.differs(head) else "no higher ASR"


def _every_head(subject: Subject) -> _EveryHead:
    lab = subject.lab
    ablation, vanilla = lab.ablations[0], subject.vanilla(lab.sampled)
    answers = dict(zip(subject.engine.heads, subject.by_head(ablation, lab.sampled), strict=True))
    changes = {head: one.change_from(vanilla) for head, one in answers.items()}
    p_values = [1.0 if one.p_value is None else one.p_value for one in changes.values()]
    half = search_half(subject)
    return _EveryHead(
        subject,
        answers,
        changes,
        dict(zip(answers, holm(p_values), strict=True)),
        {name: half.scores(name, ablation) for name in SEARCH_SCORES},
    )


def _said(found: Sequence[_EveryHead]) -> str:
    lab = found[0].subject.lab
    n = min(len(one.subject.prompts) for one in found)
    n_heads = len(found[0].answers)
    least = smallest_detectable_change(n, ALPHA, n_heads)
    seen = f"below {least:.2f}" if least is not None else "of any size"
    return (
        f"Test prompts answered with one head ablated, {lab.sampled.name}, {lab.ablations[0]}. Corrected over "
        f"{n_heads} heads (Holm), changes {seen} cannot be told from chance with {n} prompts."
    )


def _scored_on(found: Sequence[_EveryHead]) -> str:
    return f"Scores see no answer. {searched_and_tested([one.subject for one in found])}"


def _map(model: str, found: Sequence[_EveryHead]) -> Figure:
    planted = planted_heads(model)
    rows: list[Row] = [
        {
            "layer": head.layer,
            "head": head.index,
            "y": one.asr.rate,
            "n": one.asr.n,
            "marked": head in planted if planted else each.differs(head),
            "panel": each.subject.dataset,
        }
        for each in found
        for head, one in each.answers.items()
    ]
    marked = "Marked: the planted heads." if planted else "Marked: heads whose ASR is higher after correction."
    n = numbers_of(row["n"] for row in rows)
    caption = f"{_said(found)} n = {n} prompts a cell; intervals are in the tables. {marked}"
    return Figure("heads", model, caption, "head", "layer", tuple(rows), value="ASR")


def _scatter(model: str, found: Sequence[_EveryHead], name: str) -> Figure:
    rows: list[Row] = [
        point(
            one.asr,
            x=each.scores[name][head],
            series=each.series(head),
            panel=each.subject.dataset,
            label=str(head),
        )
        for each in found
        for head, one in each.answers.items()
    ]
    unit = found[0].scores[name].unit
    caption = f"A point a head. {_said(found)} {_scored_on(found)} Intervals: Wilson, 95 %, over the prompts."
    return Figure("scatter", f"{model}, {SCORES[name]}", caption, f"{SCORES[name]}, {unit}", "ASR", tuple(rows))


def _top(model: str, found: _EveryHead) -> Table:
    """The heads with the highest ASR, with their places by each score."""
    planted = planted_heads(model)
    places = {name: {head: at for at, (head, _) in enumerate(one.ranked(), 1)} for name, one in found.scores.items()}
    best = sorted(found.answers, key=lambda head: (-(found.answers[head].asr.rate or 0.0), head))[:N_LISTED]
    columns = [Column("head", "head"), *[Column("planted", "planted")] * bool(planted)]
    columns += [Column("asr", "ASR", "rate"), Column("change", "change", "change"), Column("p", "p (Holm)", "p")]
    for name in found.scores:
        columns += [Column(name, f"{SCORES[name]}, {found.scores[name].unit}", "number")]
        columns += [Column(f"{name}_rank", "rank", "count")]
    rows = []
    for head in best:
        row: dict[str, Any] = {
            "head": str(head),
            "asr": Measured.of(found.answers[head].asr),
            "change": Measured.of(found.changes[head]),
            "p": found.p_holm[head],
        }
        if planted:
            row["planted"] = "yes" if head in planted else ""
        for name, scores in found.scores.items():
            row |= {name: scores[head], f"{name}_rank": places[name][head]}
        rows.append(row)
    caption = (
        f"The {len(best)} heads of {len(found.answers)} with the highest ASR. {_said([found])} {_scored_on([found])} "
        "Intervals, 95 %: Wilson's of the ASR, Newcombe's of the change."
    )
    return Table(f"{model}, {found.subject.dataset}", caption, tuple(columns), tuple(rows))


def _proxies(model: str, found: Sequence[_EveryHead]) -> Table:
    """How well each score stands for the ASR."""
    columns = [
        Column("dataset", "dataset"),
        Column("score", "score"),
        Column("spearman", "Spearman", "number"),
        Column("auc", "AUC", "number"),
        Column("auc_p", "p of the AUC", "p"),
        Column("differing", "heads with a higher ASR", "count"),
        *(Column(f"regret_{k}", f"regret of the best {k}", "number") for k in _REGRETS),
    ]
    rows: list[Row] = []
    for each in found:
        truth = each.truth
        values = {
            SCORES[name]: np.array([scores[head] for head in each.answers], float)
            for name, scores in each.scores.items()
        }
        ceiling = split_half_ceiling(truth)
        for quality in (*proxy_qualities(values, truth), *([ceiling] if ceiling else [])):
            rows.append(_quality(each.subject.dataset, quality, len(truth.complied)))
    caption = (
        "Each score against the ASR of every head alone: rank correlation over the heads; AUC, the chance that a head "
        "with a higher ASR (after correction) has the higher score, where there are both kinds; regret, the mean ASR "
        "of the best heads by the ASR itself less that of the score's (95 %, bootstrap over prompts). Split half: the "
        "ASR of one random half of the prompts as a score for the other, what no score can be asked to beat by much. "
        f"{_scored_on(found)} Most heads change nothing and tie, so Spearman is about noise where few matter."
    )
    return Table(f"{model}, scores against the ASR", caption, tuple(columns), tuple(rows))


def _quality(dataset: str, quality: ProxyQuality, n_prompts: int) -> Row:
    by_size: dict[int, AtSize] = {one.k: one for one in quality.sizes}
    return {
        "dataset": dataset,
        "score": "split half" if quality.score == "split_half" else quality.score,
        "spearman": None if quality.spearman is None else Measured(quality.spearman, quality.n_heads),
        "auc": None if quality.auc is None else Measured(quality.auc, quality.n_heads),
        "auc_p": quality.auc_p_value,
        "differing": quality.n_differing,
        **{
            f"regret_{k}": Measured(by_size[k].regret, n_prompts, *by_size[k].regret_interval)
            for k in _REGRETS
            if k in by_size
        },
    }

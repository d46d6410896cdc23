"""Measures what zero-shot tasks lose by ablation and by pruning (Fig 6b)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from safetyheads.ablation import Ablation
from safetyheads.baselines import METHODS
from safetyheads.baselines.base import Intervention
from safetyheads.experiments.lab import SHORT, Lab, note_planted
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.experiments.table1_baselines import learning_subjects, material_of
from safetyheads.integrations.lm_eval import load_tasks
from safetyheads.integrations.utility import VANILLA, Variant, evaluate_tasks
from safetyheads.runs.config import TaskOptions

if TYPE_CHECKING:
    from safetyheads.heads import Group

PRUNERS = ("wanda", "sparsegpt")
"""The paper sets these two beside its ablations, and gives no sparsity."""
MEANS = ("mean_query", "mean_key", "mean_head_output")
"""Mean ablations over the heads of the layer (Sec 5.3)."""
_NAMES = {**SHORT, "mean_query": "mean query", "mean_key": "mean key", "mean_head_output": "mean output"}
# The paper prints one number a method; half of all weights is what pruning papers print first.
_SHOWN_SPARSITY = 0.5


class _Compared(NamedTuple):
    """A variant, its place in the figures, and whether the table shows it."""

    variant: Variant
    series: str
    x: float
    prunes: bool
    shown: bool


def fig6b(lab: Lab, outcome: Outcome) -> None:
    """Accuracy of each task without 1 to n heads, and pruned."""
    config = lab.config
    for model in config.models:
        outcome.leave_out(model)
        engine, (subject, benign) = lab.engine(model), learning_subjects(lab, model)
        if lab.leaves_nothing(outcome, subject, benign):
            continue
        group = subject.search(lab.ablations[0], min(config.size, len(engine.heads))).group
        compared = [*_ablated(lab, model, group), *_pruned(lab, model)]
        tasks = load_tasks(TaskOptions(tasks=config.tasks, limit=config.task_limit), config.seed)
        variants, about = [entry.variant for entry in compared], {"weights": lab.weights_of(model)}
        utility = evaluate_tasks(engine, tasks, variants, lab.directory, lab.progress, about)
        note_planted(outcome, model)
        outcome.note(*utility.notes)
        heads = ", ".join(map(str, group))
        rows = _rows(compared, utility.metrics)
        outcome.table("metrics", rows, model=model, heads=heads)
        for row in rows:
            if row["metric"] == "acc" and row["change"] is not None:
                outcome.lead(model, f"{row['task']}, {row['variant']}, change of the accuracy", row["change"], "change")
        for key, prunes in (("heads", False), ("pruned", True)):
            points = _points([entry for entry in compared if entry.prunes is prunes], utility.metrics)
            outcome.figure(key, points, model=model, heads=heads)


def _ablated(lab: Lab, model: str, group: Group) -> list[_Compared]:
    """The first 1 to n heads of the group, under each ablation."""
    compared = []
    for ablation in (*lab.ablations, *(Ablation(name) for name in MEANS)):
        name = _NAMES[ablation.name]
        for k in range(1, len(group) + 1):
            heads = [str(head) for head in sorted(group[:k])]
            fields = {"heads": heads, "ablation": ablation.name, "epsilon": ablation.epsilon}
            at_work = partial(lab.engine(model).ablated, group[:k], ablation)
            variant = Variant(f"{name}, {k} head{'s' * (k > 1)}", at_work, fields)
            compared.append(_Compared(variant, name, k, prunes=False, shown=k == len(group)))
    return compared


def _pruned(lab: Lab, model: str) -> list[_Compared]:
    """Every pruner at each sparsity; what it learns is learned once, where anything is measured at all."""
    learned = [subject.asked_prompts.sha256 for subject in learning_subjects(lab, model)]

    @cache
    def interventions(name: str) -> Sequence[Intervention]:
        return METHODS[name].interventions(material_of(lab, model, refuses=False), METHODS[name].strengths)

    def pruned(name: str, number: int) -> AbstractContextManager[Any]:
        return interventions(name)[number].at_work()

    compared = []
    for method in (METHODS[name] for name in PRUNERS):
        for number, sparsity in enumerate(method.strengths):
            fields = {"method": method.name, "sparsity": sparsity, "learned": learned, "seed": lab.config.seed}
            variant = Variant(f"{method.label}, {sparsity:.0%}", partial(pruned, method.name, number), fields)
            compared.append(_Compared(variant, method.label, sparsity, prunes=True, shown=sparsity == _SHOWN_SPARSITY))
    return compared


def _rows(compared: Sequence[_Compared], metrics: Sequence[Row]) -> list[Row]:
    """Vanilla, the whole group under each ablation, and half of the weights pruned."""
    labels = {VANILLA, *(entry.variant.label for entry in compared if entry.shown)}
    rows: list[Row] = []
    for metric in (metric for metric in metrics if metric["variant"] in labels):
        variant, change = metric["variant"], metric["difference"]
        row = {name: metric[name] for name in ("task", "metric")} | {"value": _measured(metric)}
        row |= {"variant": "vanilla" if variant == VANILLA else variant, "change": None, "p": None}
        if change is not None:
            low, high = change["interval"] or (None, None)
            row["change"] = Measured(change["change"], change["n"], low, high, change["p_value"])
            row["p"] = change["p_holm"]
        rows.append(row)
    return rows


def _measured(metric: Row) -> Measured:
    return Measured(metric["value"], metric["n"], *(metric["interval"] or (None, None)))


def _points(compared: Sequence[_Compared], metrics: Sequence[Row]) -> list[Row]:
    """Accuracy against heads or sparsity, a panel a task; every series begins at the vanilla model."""
    places = {entry.variant.label: [{"x": entry.x, "series": entry.series}] for entry in compared}
    places[VANILLA] = [{"x": 0, "series": series} for series in dict.fromkeys(entry.series for entry in compared)]
    return [
        {**point(_measured(metric), panel=metric["task"]), **place}
        for metric in metrics
        if metric["metric"] == "acc"
        for place in places.get(metric["variant"], ())
    ]

"""Measures what zero-shot tasks lose by ablation and by pruning (Fig 6b)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, TypeAlias

from safetyheads.ablation import Ablation
from safetyheads.baselines import METHODS
from safetyheads.baselines.base import Intervention, Method
from safetyheads.experiments.lab import SHORT, Lab, note_planted
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.experiments.table1_baselines import learning_subjects, material_of
from safetyheads.heads import Group
from safetyheads.integrations.lm_eval import load_tasks
from safetyheads.integrations.utility import VANILLA, Variant, evaluate_tasks
from safetyheads.runs.config import TaskOptions

PRUNERS = ("wanda", "sparsegpt")
"""The paper sets these two beside its ablations, and gives no sparsity."""
MEANS = ("mean_query", "mean_key", "mean_head_output")
"""Mean ablations over the heads of the layer (Sec 5.3)."""
_NAMES = {**SHORT, "mean_query": "mean query", "mean_key": "mean key", "mean_head_output": "mean output"}
# The paper prints one number a method; half of all weights is what pruning papers print first.
_SHOWN_SPARSITY = 0.5
Compared: TypeAlias = tuple[Variant, dict[str, Any], bool]
"""A variant, the place of its points, and whether the table shows it."""


def fig6b(lab: Lab, outcome: Outcome) -> None:
    """Accuracy of each task without 1 to n heads, and pruned."""
    config = lab.config
    for model in config.models:
        outcome.leave_out(model)
        engine, (subject, benign) = lab.run_of(model).engine, learning_subjects(lab, model)
        if lab.leaves_nothing(outcome, subject, benign):
            continue
        note_planted(outcome, model)
        group = subject.search(lab.ablations[0], config.size).group
        figures = {"heads": _ablated(lab, model, group), "pruned": _pruned(lab, model)}
        compared = [entry for entries in figures.values() for entry in entries]
        tasks = load_tasks(TaskOptions(tasks=config.tasks, limit=config.task_limit), config.seed)
        variants, about = [variant for variant, _, _ in compared], {"weights": lab.weights_of(model)}
        utility = evaluate_tasks(engine, tasks, variants, lab.directory, lab.progress, about)
        outcome.note(*utility.notes)
        heads = ", ".join(map(str, group))
        # Vanilla, the whole group under each ablation, and half of the weights pruned.
        shown = {VANILLA: "vanilla"} | {variant.label: variant.label for variant, _, shows in compared if shows}
        rows = [_row(metric, shown[metric["variant"]]) for metric in utility.metrics if metric["variant"] in shown]
        outcome.table("metrics", rows, model=model, heads=heads)
        for row in rows:
            if row["metric"] == "acc" and row["change"] is not None:
                outcome.lead(model, f"{row['task']}, {row['variant']}, change of the accuracy", row["change"], "change")
        for key, entries in figures.items():
            # A panel a task; every series begins at the vanilla model.
            places = {variant.label: [place] for variant, place, _ in entries}
            places[VANILLA] = [
                {"x": 0, "series": name} for name in dict.fromkeys(place["series"] for _, place, _ in entries)
            ]
            points = [
                {**point(_row(metric, "")["value"], panel=metric["task"]), **place}
                for metric in utility.metrics
                if metric["metric"] == "acc"
                for place in places.get(metric["variant"], ())
            ]
            outcome.figure(key, points, model=model, heads=heads)


def _ablated(lab: Lab, model: str, group: Group) -> list[Compared]:
    """The first 1 to n heads of the group, under each ablation."""
    compared = []
    for ablation in (*lab.ablations, *(Ablation(name) for name in MEANS)):
        for k in range(1, len(group) + 1):
            heads = [str(head) for head in sorted(group[:k])]
            fields = {"heads": heads, "ablation": ablation.name, "epsilon": ablation.epsilon}
            at_work = partial(lab.run_of(model).engine.ablated, group[:k], ablation)
            place = {"x": k, "series": _NAMES[ablation.name]}
            variant = Variant(f"{place['series']}, {k} head{'s' * (k > 1)}", at_work, fields)
            compared.append((variant, place, k == len(group)))
    return compared


def _pruned(lab: Lab, model: str) -> list[Compared]:
    """Every pruner at each sparsity; what it learns is learned once, where anything is measured at all."""
    learned = [subject.asked_prompts.sha256 for subject in learning_subjects(lab, model)]
    material = cache(partial(material_of, lab, model, refuses=False))

    @cache
    def interventions(method: Method) -> Sequence[Intervention]:
        return method.interventions(material(), method.strengths)

    compared = []
    for method in (METHODS[name] for name in PRUNERS):
        for number, sparsity in enumerate(method.strengths):
            fields = {"method": method.name, "sparsity": sparsity, "learned": learned, "seed": lab.config.seed}

            def at_work(method: Method = method, number: int = number) -> AbstractContextManager[Any]:
                return interventions(method)[number].at_work()

            variant = Variant(f"{method.label}, {sparsity:.0%}", at_work, fields)
            compared.append((variant, {"x": sparsity, "series": method.label}, sparsity == _SHOWN_SPARSITY))
    return compared


def _row(metric: Row, variant: str) -> dict[str, Any]:
    """A metric and its change from the vanilla model."""
    change = metric["difference"]
    row = {"task": metric["task"], "metric": metric["metric"], "variant": variant, "change": None, "p": None}
    row["value"] = Measured(metric["value"], metric["n"], *(metric["interval"] or (None, None)))
    if change is not None:
        low, high = change["interval"] or (None, None)
        row |= {"change": Measured(change["change"], change["n"], low, high, change["p_value"]), "p": change["p_holm"]}
    return row

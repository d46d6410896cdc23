"""What zero-shot tasks lose by ablation and by pruning (Fig 6b). Owns which models are compared on lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import Ablation
from safetyheads.baselines.table import METHODS
from safetyheads.experiments.common import say_planted
from safetyheads.experiments.lab import SHORT, Lab
from safetyheads.experiments.material import learning_subjects, material_of
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.integrations.harness import HarnessSettings
from safetyheads.integrations.utility import VANILLA, TaskMetric, Variant, evaluate_tasks

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment
    from safetyheads.heads import Group

PRUNERS = ("wanda", "sparsegpt")
"""The paper sets these two beside its ablations, and gives no sparsity."""
MEANS = ("mean_query", "mean_key", "mean_head_output")
"""Mean ablations over the heads of the layer (Sec 5.3)."""
_NAMES = {**SHORT, "mean_query": "mean query", "mean_key": "mean key", "mean_head_output": "mean output"}
# The paper prints one number a method; half of all weights is what pruning papers print first.
_SHOWN_SPARSITY = 0.5


@dataclass(frozen=True, slots=True)
class _Compared:
    """A variant, and where it stands in the figures."""

    variant: Variant
    series: str
    x: float
    """Heads, or sparsity."""
    prunes: bool


def fig6b(lab: Lab, about: Experiment) -> Outcome:
    """Accuracy of each task without 1 to n heads, and pruned."""
    draft = Draft()
    for model in lab.config.models:
        draft.models.append(model)
        _measure(lab, model, draft)
    return draft.finished(about.name, about.title, about.question)


def _measure(lab: Lab, model: str, draft: Draft) -> None:
    config, engine = lab.config, lab.engine(model)
    subject, benign = learning_subjects(lab, model)
    reasons = lab.not_meaningful(subject, benign)
    draft.not_meaningful.extend(reasons)
    if reasons:
        return
    group = subject.search(lab.ablations[0], min(config.size, len(engine.heads))).group
    compared = [*_ablated(lab, model, group), *_pruned(lab, model)]
    weights = {"weights": lab.weights_of(model)}

    def keep(stage: str, fields: Mapping[str, Any], compute: Callable[[], list[Any]]) -> list[Any]:
        return lab.run.records(stage, {**fields, **weights}, compute)

    settings = HarnessSettings(limit=config.task_limit, seed=config.seed)
    variants = [one.variant for one in compared]
    found = evaluate_tasks(engine, config.tasks, variants, settings, keep, lab.progress.track)
    draft.notes.extend(found.notes)
    say_planted(draft, model, "which heads the group has was built in")
    draft.tables.append(_table(model, group, compared, found.metrics))
    by_heads = [one for one in compared if not one.prunes]
    by_sparsity = [one for one in compared if one.prunes]
    heads = ", ".join(map(str, group))
    draft.figures += [
        _figure(
            f"{model}: heads ablated",
            f"The first 1 to {len(group)} of the heads {heads}, as Sahara found them on the learning prompts by "
            f"{config.search_score.replace('_', ' ')} under UA. 0 heads is the unablated model.",
            "heads ablated",
            by_heads,
            found.metrics,
        ),
        _figure(
            f"{model}: pruned",
            "Wanda and SparseGPT, calibrated on the learning prompts and their answers. Sparsity 0 is not pruned.",
            "share of weights set to zero",
            by_sparsity,
            found.metrics,
        ),
    ]


def _ablated(lab: Lab, model: str, group: Group) -> list[_Compared]:
    """The first 1 to n heads of the group, under each ablation."""
    engine = lab.engine(model)
    kinds = [*lab.ablations, *(Ablation(name) for name in MEANS)]
    found = []
    for kind in kinds:
        for k in range(1, len(group) + 1):
            heads = group[:k]
            fields = {"heads": [str(head) for head in sorted(heads)], "ablation": kind.name, "epsilon": kind.epsilon}
            label = f"{_NAMES[kind.name]}, {k} head{'s' * (k > 1)}"
            variant = Variant(label, lambda heads=heads, kind=kind: engine.ablated(heads, kind), fields)  # type: ignore[misc]
            found.append(_Compared(variant, _NAMES[kind.name], k, prunes=False))
    return found


def _pruned(lab: Lab, model: str) -> list[_Compared]:
    """Every pruner at each sparsity; what it learns is learned once, where anything is measured at all."""
    learned = [one.engine.ask(one.prompts).sha256 for one in learning_subjects(lab, model)]
    found = []
    for name in PRUNERS:
        method = METHODS[name]

        @cache
        def contexts(name: str = name) -> Sequence[Callable[[], AbstractContextManager[Any]]]:
            made = METHODS[name].interventions(material_of(lab, model, refuses=False), METHODS[name].strengths)
            return [one.at_work for one in made]

        for at, sparsity in enumerate(method.strengths):
            fields = {"method": name, "sparsity": sparsity, "learned": learned, "seed": lab.config.seed}
            label = f"{method.label}, {sparsity:.0%}"
            variant = Variant(label, lambda at=at, contexts=contexts: contexts()[at](), fields)  # type: ignore[misc]
            found.append(_Compared(variant, method.label, sparsity, prunes=True))
    return found


def _table(model: str, group: Group, compared: Sequence[_Compared], metrics: Sequence[TaskMetric]) -> Table:
    """Vanilla, the whole group under each ablation, and half of the weights pruned."""
    shown = {VANILLA}
    shown |= {one.variant.label for one in compared if not one.prunes and one.x == len(group)}
    shown |= {one.variant.label for one in compared if one.prunes and one.x == _SHOWN_SPARSITY}
    rows: list[Row] = []
    for one in metrics:
        if one.variant not in shown:
            continue
        change = one.change
        low, high = (change.interval if change is not None else None) or (None, None)
        rows.append(
            {
                "task": one.task,
                "metric": one.metric,
                "variant": "vanilla" if one.variant == VANILLA else one.variant,
                "value": _measured(one),
                "change": None if change is None else Measured(change.change, change.n, low, high, change.p_value),
                "p": None if change is None else change.p_holm,
            }
        )
    columns = (
        Column("task", "task"),
        Column("metric", "metric"),
        Column("variant", "model"),
        Column("value", "value", "rate"),
        Column("change", "paired change", "change"),
        Column("p", "p (Holm)", "p"),
    )
    caption = (
        f"Zero-shot unless the task has examples of its own. The group {', '.join(map(str, group))} under each "
        f"ablation, and pruning at {_SHOWN_SPARSITY:.0%}: the paper gives no sparsity. Changes are paired by sample; "
        "intervals 95 %. p adjusted over all models and tasks measured."
    )
    return Table(model, caption, columns, tuple(rows))


def _measured(one: TaskMetric) -> Measured:
    low, high = one.value.interval or (None, None)
    return Measured(one.value.value, one.value.n, low, high)


def _figure(title: str, caption: str, x: str, compared: Sequence[_Compared], metrics: Sequence[TaskMetric]) -> Figure:
    """Accuracy against heads or sparsity, a panel a task."""
    places = {one.variant.label: one for one in compared}
    series = list(dict.fromkeys(one.series for one in compared))
    points: list[Row] = []
    for one in metrics:
        if one.metric != "acc":
            continue
        made = _measured(one)
        where = {"y": made.value, "low": made.low, "high": made.high, "n": made.n, "panel": one.task}
        if one.variant == VANILLA:
            points += [{**where, "x": 0, "series": name} for name in series]
        elif one.variant in places:
            points.append({**where, "x": places[one.variant].x, "series": places[one.variant].series})
    n = sorted({point["n"] for point in points})
    said = f"{caption} n = {' or '.join(map(str, n))} samples a task; 95 % intervals."
    return Figure("lines", title, said, x, "accuracy", tuple(points))

"""What is done to a model, told on lm-eval's tasks: each metric beside the vanilla model's, sample by sample.

Owns which models are compared, the order of the runs, and what is kept of them; :mod:`.harness` has
lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.heads import Group, format_heads, within
from safetyheads.integrations.harness import HarnessSettings, LoadedTask, load_tasks, require_harness, run_task
from safetyheads.integrations.paired_metrics import (
    MetricChange,
    MetricValue,
    Values,
    metric_change,
    metric_value,
    with_holm,
)
from safetyheads.prompts.asked import tokenizer_sha256

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

Rows: TypeAlias = list[dict[str, Any]]
"""What :func:`safetyheads.integrations.harness.run_task` gives."""

Keep: TypeAlias = Callable[[str, Mapping[str, Any], Callable[[], Rows]], Rows]
"""Gives the rows that the fields determine, calling the function only where they are not kept yet: the ``rows`` of a
run directory. The model is not in the fields; a run directory of several models must add it."""

Watch: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``track`` of a watcher: the name of a stage and its number of requests."""

VANILLA = "none"
"""What is done to the vanilla model."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One thing that is done to the model."""

    label: str
    """What tables call it; each once."""
    at_work: Callable[[], AbstractContextManager[Any]]
    """A context in which the engine's model is the changed one; it restores the model, and what it gives is unused."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All that it depends on, as JSON: equal fields are the same variant when a run is continued."""


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """One metric of one task under one variant."""

    task: str
    """lm-eval's name."""
    metric: str
    """Its name; with the name of the filter before it, where that is not lm-eval's ``none``."""
    variant: str
    """Label of what was done to the model; ``none`` is vanilla."""
    value: MetricValue
    """The metric with its interval and n."""
    change: MetricChange | None
    """Against vanilla, on the same samples; None for vanilla itself."""

    def as_dict(self) -> dict[str, Any]:
        """As results.json holds it."""
        names = {"task": self.task, "metric": self.metric, "variant": self.variant}
        return {**names, **asdict(self.value), "difference": None if self.change is None else asdict(self.change)}


@dataclass(frozen=True, slots=True)
class Utility:
    """What :func:`evaluate_tasks` found."""

    metrics: tuple[TaskMetric, ...]
    """Task by task, metric by metric, vanilla first."""
    rows: Mapping[tuple[str, str], Rows]
    """(task, variant) -> the rows behind it, one a sample after the first."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know."""

    def metric(self, task: str, metric: str = "acc", variant: str = VANILLA) -> TaskMetric:
        """One of them.

        Raises:
            InputError: it was not measured.
        """
        for one in self.metrics:
            if (one.task, one.metric, one.variant) == (task, metric, variant):
                return one
        raise InputError(f"no {metric} of task {task} under {variant!r} was measured")


def head_variants(engine: Engine, groups: Sequence[Group], ablation: Ablation) -> tuple[Variant, ...]:
    """Each group of heads ablated in the forward pass.

    Raises:
        InputError: a head that the model does not have, or a group given twice.
    """

    def variant(group: Group) -> Variant:
        if not group:
            raise InputError("a group needs heads; the vanilla model is there anyway")
        within(group, engine.n_layers, engine.n_heads)
        fields = {"heads": format_heads(sorted(group)), "ablation": ablation.name, "epsilon": ablation.epsilon}
        return Variant(format_heads(group), lambda: engine.ablated(group, ablation), fields)

    variants = tuple(map(variant, groups))
    for number, one in enumerate(variants):
        if any(one.fields == other.fields for other in variants[:number]):
            raise InputError(f"group {one.label} is given twice")
    return variants


def evaluate_tasks(
    engine: Engine,
    tasks: Sequence[str] | Sequence[LoadedTask],
    variants: Sequence[Variant],
    settings: HarnessSettings | None = None,
    keep: Keep | None = None,
    track: Watch | None = None,
) -> Utility:
    """Put tasks to the vanilla model and to each variant, and compare sample by sample.

    Args:
        engine: the model.
        tasks: lm-eval's names (groups and tags too) or ``organism``; or what :func:`load_tasks` gave, under the same
            settings.
        variants: from :func:`head_variants`, or any named contexts.
        settings: how the tasks are put.
        keep: where the samples are kept, so that a run can be continued.
        track: who watches.

    Raises:
        InputError: a task that cannot be run, the extra ``lm-eval`` missing, a label given twice.
    """
    settings = settings or HarnessSettings()
    labels = [VANILLA, *(variant.label for variant in variants)]
    if len(set(labels)) < len(labels):
        raise InputError(f"each variant needs a label of its own; got {', '.join(labels)}")
    names = [task for task in tasks if isinstance(task, str)]
    loaded = load_tasks(names, settings) if names else [task for task in tasks if isinstance(task, LoadedTask)]
    refuse_foreign(engine, loaded)
    rows: dict[tuple[str, str], Rows] = {}
    for task in loaded:
        for variant in (Variant(VANILLA, nullcontext, {"heads": ""}), *variants):
            rows[task.name, variant.label] = _rows(
                engine, task, variant, settings, keep or _unkept, track or _unwatched
            )
    metrics = [one for task in loaded for one in _compared(task.name, labels, rows)]
    adjusted = iter(with_holm([one.change for one in metrics if one.change is not None]))
    metrics = [one if one.change is None else replace(one, change=next(adjusted)) for one in metrics]
    return Utility(tuple(metrics), rows, _notes(rows))


def refuse_foreign(engine: Engine, loaded: Sequence[LoadedTask]) -> None:
    """Refuse the organism's task for any other model: it would be in a language that nobody taught it."""
    if any(task.is_organisms for task in loaded) and not getattr(engine.model.config, "safetyheads_organism", False):
        raise InputError(f"task organism is in the language of the demo's models; {engine.name} is none of them")


def _rows(
    engine: Engine, task: LoadedTask, variant: Variant, settings: HarnessSettings, keep: Keep, track: Watch
) -> Rows:
    fields = {
        "task": task.name,
        "asked_sha256": task.sha256,
        # The hash before it is of texts: token ids and the chat template's words are the tokenizer's.
        "tokenizer_sha256": tokenizer_sha256(engine.tokenizer),
        "variant": dict(variant.fields) or {"label": variant.label},
        "settings": {**asdict(settings), "include_paths": [], "offline": False},
        "lm_eval": require_harness(),
    }

    def compute() -> Rows:
        with track(f"{task.name}, {variant.label} ablated", task.n_requests) as done, variant.at_work():
            return run_task(engine, task, settings, done)

    return keep("utility", fields, compute)


def _unkept(_: str, __: Mapping[str, Any], compute: Callable[[], Rows]) -> Rows:
    return compute()


def _unwatched(_: str, __: int) -> AbstractContextManager[Callable[[int], None]]:
    return nullcontext(lambda _: None)


def _compared(task: str, labels: Sequence[str], rows: Mapping[tuple[str, str], Rows]) -> list[TaskMetric]:
    """Every metric of a task, vanilla first."""
    vanilla = rows[task, VANILLA]
    found = []
    for name, aggregate in vanilla[0]["metrics"].items():
        old = _values(vanilla, name)
        before = metric_value(aggregate, old, _n_samples(vanilla, name))
        for label in labels:
            own = rows[task, label]
            new = _values(own, name)
            after = metric_value(own[0]["metrics"].get(name), new, _n_samples(own, name))
            change = None if label == VANILLA else metric_change(before, after, old, new)
            found.append(TaskMetric(task, _shown(name), label, after, change))
    return found


def _values(rows: Rows, name: str) -> Values:
    """A metric's value on each sample, by document and by what it was asked."""
    metric, _, filtered = name.rpartition(",")
    own = [row for row in rows[1:] if row["filter"] == filtered and row["values"].get(metric) is not None]
    return {f"{row['document']} {row['hash']}": row["values"][metric] for row in own}


def _n_samples(rows: Rows, name: str) -> int:
    return sum(row["filter"] == name.rpartition(",")[2] for row in rows[1:])


def _shown(name: str) -> str:
    metric, _, filtered = name.rpartition(",")
    return metric if filtered == "none" else f"{filtered} {metric}"


def _notes(rows: Mapping[tuple[str, str], Rows]) -> tuple[str, ...]:
    cut = {task: own[0]["truncated"] for (task, label), own in rows.items() if label == VANILLA and own[0]["truncated"]}
    return tuple(
        f"{count} requests of task {task} do not fit the model's context; their beginnings were cut off"
        for task, count in cut.items()
    )

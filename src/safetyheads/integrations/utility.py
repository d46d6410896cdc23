"""Compares what lm-eval's tasks show of a changed model with the vanilla model, sample by sample.

A metric of zeros and ones is compared as rates are (exact McNemar, Newcombe); any other number by the mean of its
differences. Where the metric is no mean over samples (a perplexity, an F1 over all), nothing can be paired.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.heads import Group, format_heads, within
from safetyheads.integrations.lm_eval import LoadedTask, require_lm_eval, run_task
from safetyheads.prompts.asked import tokenizer_sha256
from safetyheads.runs.config import EvalConfig
from safetyheads.runs.directory import SCHEMA_VERSION, Record, RunDirectory
from safetyheads.runs.progress import Progress, Silent
from safetyheads.runs.provenance import canonical_name, device_name, fingerprint, loading_facts, model_facts, versions
from safetyheads.runs.run import DEMO_CAVEAT, run_directory
from safetyheads.stats.intervals import Interval, Rate, mean_with_interval
from safetyheads.stats.testing import holm_of_tests, paired_difference

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

Values: TypeAlias = Mapping[str, float]
"""A metric's value on each sample, by what identifies the sample."""

VANILLA = "none"
"""Label of the vanilla model."""
McNEMAR, T_TEST = "exact McNemar", "paired t"
"""Names of the tests."""
CAVEATS = (
    "An accuracy that did not change is no proof that nothing was lost: see the interval for what could have been.",
    "Intervals cover the draw of samples only. Other templates, examples and precisions are not in them.",
)
"""What no evaluation shows."""
# A mean is summed in another order elsewhere, which moves its last bits.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class MetricValue:
    """A metric of one model."""

    value: float | None
    """As lm-eval gives it; None where it is no finite number."""
    interval: Interval | None
    """95 %: Wilson's for zeros and ones, else Student's; None for what is no mean over samples."""
    n: int
    """Samples."""
    unit: str
    """``share`` of samples, ``mean`` over samples, or ``whole``: a number of all samples together."""


@dataclass(frozen=True, slots=True)
class MetricChange:
    """How a metric changed on the same samples; None where that cannot be told."""

    change: float | None
    """After minus before, in the metric's unit."""
    interval: Interval | None
    """95 %: Newcombe's for zeros and ones, else Student's of the mean difference; None for what is no mean."""
    n: int
    """Samples that both have."""
    gained: int | None
    """Samples whose value rose; None where samples have none."""
    lost: int | None
    """Samples whose value fell."""
    p_value: float | None
    """Two-sided, of this comparison alone."""
    test: str | None
    """Name of the test."""
    p_holm: float | None = None
    """Adjusted for all comparisons of the evaluation (Holm)."""


def metric_value(aggregate: float | None, values: Values, n: int | None = None) -> MetricValue:
    """lm-eval's number with its interval; ``n`` counts samples, where not each has a value."""
    numbers = list(values.values())
    mean = math.fsum(numbers) / len(numbers) if numbers else math.nan
    if aggregate is None or not math.isclose(aggregate, mean, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
        return MetricValue(aggregate, None, len(numbers) if n is None else n, "whole")
    if _binary(numbers):
        return MetricValue(aggregate, Rate(round(sum(numbers)), len(numbers)).interval, len(numbers), "share")
    return MetricValue(aggregate, mean_with_interval(numbers).interval, len(numbers), "mean")


def metric_change(before: MetricValue, after: MetricValue, old: Values, new: Values) -> MetricChange:
    """The change of a metric between two models, sample by sample where it is a mean over samples.

    Raises:
        InputError: ``old`` and ``new`` are not of the same samples.
    """
    if old.keys() != new.keys():
        raise InputError(f"paired samples differ: {len(old.keys() ^ new.keys())} are in one of the two alone")
    if "whole" in (before.unit, after.unit):
        change = None if before.value is None or after.value is None else after.value - before.value
        return MetricChange(change, None, before.n, None, None, None, None)
    first, second = list(old.values()), [new[sample] for sample in old]
    if _binary(first) and _binary(second):
        pairs = paired_difference(first, second)
        return MetricChange(pairs.change, pairs.interval, len(old), pairs.gained, pairs.lost, pairs.p_value, McNEMAR)
    moved = [b - a for a, b in zip(first, second, strict=True)]
    mean = mean_with_interval(moved)
    gained, lost = sum(difference > 0 for difference in moved), sum(difference < 0 for difference in moved)
    if len(set(moved)) > 1:
        from scipy.stats import ttest_1samp

        p_value: float | None = float(ttest_1samp(moved, 0.0).pvalue)
    else:  # No t test can judge differences that do not vary.
        p_value = None if any(moved) else 1.0
    return MetricChange(mean.mean, mean.interval, len(old), gained, lost, p_value, T_TEST)


def _binary(numbers: Sequence[float]) -> bool:
    return all(number in (0.0, 1.0) for number in numbers)


@dataclass(frozen=True, slots=True)
class Variant:
    """One change of the model."""

    label: str
    """Name in tables; each once."""
    at_work: Callable[[], AbstractContextManager[Any]]
    """A context in which the engine's model is the changed one; it restores the model, and its value is unused."""
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
    """Label of the variant; ``none`` is vanilla."""
    value: MetricValue
    """The metric with its interval and n."""
    change: MetricChange | None
    """Change from vanilla on the same samples; None for vanilla itself."""


@dataclass(frozen=True, slots=True)
class Utility:
    """Metrics of several models on the same tasks."""

    metrics: tuple[TaskMetric, ...]
    """Task by task, metric by metric, vanilla first."""
    records: Mapping[tuple[str, str], list[Record]]
    """(task, variant) -> the records behind it, one a sample after the first."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know."""

    def metric(self, task: str, metric: str = "acc", variant: str = VANILLA) -> TaskMetric:
        """One of the metrics; an InputError where it was not measured."""
        for measured in self.metrics:
            if (measured.task, measured.metric, measured.variant) == (task, metric, variant):
                return measured
        raise InputError(f"no {metric} of task {task} under {variant!r} was measured")


def head_variants(engine: Engine, groups: Sequence[Group], ablation: Ablation) -> tuple[Variant, ...]:
    """Each group of heads ablated in the forward pass.

    Raises:
        InputError: a head that the model does not have, or a group given twice.
    """
    variants: dict[str, Variant] = {}
    for group in groups:
        if not group:
            raise InputError("a group needs heads; the vanilla model is there anyway")
        within(group, engine.n_layers, engine.n_heads)
        name = format_heads(sorted(group))
        if name in variants:
            raise InputError(f"group {format_heads(group)} is given twice")
        fields = {"heads": name, "ablation": ablation.name, "epsilon": ablation.epsilon}
        variants[name] = Variant(format_heads(group), partial(engine.ablated, group, ablation), fields)
    return tuple(variants.values())


def evaluate_tasks(
    engine: Engine,
    tasks: Sequence[LoadedTask],
    variants: Sequence[Variant],
    run: RunDirectory | None = None,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> Utility:
    """Put tasks to the vanilla model and to each variant, and compare sample by sample.

    Args:
        engine: the model.
        tasks: from :func:`safetyheads.integrations.lm_eval.load_tasks`.
        variants: from :func:`head_variants`, or any named contexts.
        run: keeps the samples, so that a run can be continued.
        progress: who watches.
        about: what the samples depend on besides, in a run of several models.

    Raises:
        InputError: a task that cannot be run, the extra ``lm-eval`` missing, a label given twice.
    """
    labels = [VANILLA, *(variant.label for variant in variants)]
    if len(set(labels)) < len(labels):
        raise InputError(f"each variant needs a label of its own; got {', '.join(labels)}")
    refuse_foreign(engine, tasks)
    records: dict[tuple[str, str], list[Record]] = {}
    for task in tasks:
        for variant in (Variant(VANILLA, nullcontext, {"heads": ""}), *variants):
            compute = partial(_put, engine, task, variant, progress or Silent())
            fields = {
                "task": task.name,
                "asked_sha256": task.sha256,
                # The hash before it is of texts: token ids and the chat template's words are the tokenizer's.
                "tokenizer_sha256": tokenizer_sha256(engine.tokenizer),
                "variant": dict(variant.fields) or {"label": variant.label},
                "settings": task.settings,
                "lm_eval": require_lm_eval(),
                **(about or {}),
            }
            records[task.name, variant.label] = compute() if run is None else run.records("utility", fields, compute)
    metrics = [metric for task in tasks for metric in _compared(task.name, labels, records)]
    adjusted = holm_of_tests(None if metric.change is None else metric.change.p_value for metric in metrics)
    metrics = [
        metric if metric.change is None else replace(metric, change=replace(metric.change, p_holm=p))
        for metric, p in zip(metrics, adjusted, strict=True)
    ]
    notes = tuple(
        f"{stored[0]['truncated']} requests of task {task} do not fit the model's context; their beginnings were cut"
        for (task, label), stored in records.items()
        if label == VANILLA and stored[0]["truncated"]
    )
    return Utility(tuple(metrics), records, notes)


def refuse_foreign(engine: Engine, tasks: Sequence[LoadedTask]) -> None:
    """Refuse the organism's task for any other model: it would be in a language that nobody taught it."""
    if any(task.is_organisms for task in tasks) and not getattr(engine.model.config, "safetyheads_organism", False):
        raise InputError(f"task organism is in the language of the demo's models; {engine.name} is none of them")


def _put(engine: Engine, task: LoadedTask, variant: Variant, progress: Progress) -> list[Record]:
    with progress.track(f"{task.name}, {variant.label} ablated", task.n_requests) as done, variant.at_work():
        return run_task(engine, task, done)


def _compared(
    task: str, labels: Sequence[str], records: Mapping[tuple[str, str], Sequence[Record]]
) -> list[TaskMetric]:
    """Every metric of a task, vanilla first."""
    metrics = []
    for name in records[task, VANILLA][0]["metrics"]:
        metric, _, filtered = name.rpartition(",")
        values, measured = {}, {}
        for label in labels:
            whole, *samples = records[task, label]
            samples = [sample for sample in samples if sample["filter"] == filtered]
            values[label] = {
                f"{sample['document']} {sample['hash']}": sample["values"][metric]
                for sample in samples
                if sample["values"].get(metric) is not None
            }
            measured[label] = metric_value(whole["metrics"].get(name), values[label], len(samples))
            change = None
            if label != VANILLA:
                change = metric_change(measured[VANILLA], measured[label], values[VANILLA], values[label])
            shown = metric if filtered == "none" else f"{filtered} {metric}"
            metrics.append(TaskMetric(task, shown, label, measured[label], change))
    return metrics


def run_evaluation(
    engine: Engine,
    config: EvalConfig,
    tasks: Sequence[LoadedTask],
    out: Path | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a loaded model on the config's tasks; with ``out``, in a run directory, continuing what it holds.

    Raises:
        InputError: a head or task that the model cannot have, or a directory that belongs to another run.
    """
    watching: Progress = Silent() if progress is None else progress
    variants = head_variants(engine, config.parsed_groups, config.parsed_ablation)
    refuse_foreign(engine, tasks)
    n_requests = (1 + len(variants)) * sum(task.n_requests for task in tasks)
    watching.say(f"{n_requests} requests to the model: tasks {len(tasks)}, groups {len(variants)} and vanilla")
    if out is None:
        return _results(engine, config, tasks, evaluate_tasks(engine, tasks, variants, progress=watching))
    with watching.track("fingerprinting the weights", 1):
        settings = {
            "kind": "eval",
            **config.as_dict(),
            "model": canonical_name(config.model),
            "include_paths": [canonical_name(path) for path in config.include_paths],
            "asked_sha256": {task.name: task.sha256 for task in tasks},
            "tokenizer_sha256": tokenizer_sha256(engine.tokenizer),
            "weights_sha256": fingerprint(engine),
            **loading_facts(engine),
            "device": device_name(engine),
            "versions": {**versions(), "lm_eval": require_lm_eval()},
        }
    with run_directory(out, settings, watching, command) as run:
        started = time.monotonic()
        run.write_results(_results(engine, config, tasks, evaluate_tasks(engine, tasks, variants, run, watching)))
        run.write_timings({"seconds": time.monotonic() - started, "finished": datetime.now(UTC).isoformat()})
        return run.read_results()


def _results(engine: Engine, config: EvalConfig, tasks: Sequence[LoadedTask], utility: Utility) -> dict[str, Any]:
    """Everything that ``results.json`` holds."""
    ablation = config.parsed_ablation
    organism = any(task.is_organisms for task in tasks)
    metrics = []
    for metric in utility.metrics:
        names = {"task": metric.task, "metric": metric.metric, "variant": metric.variant}
        difference = None if metric.change is None else asdict(metric.change)
        metrics.append({**names, **asdict(metric.value), "difference": difference})
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "eval",
        "model": model_facts(engine, config.model),
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "settings": {**tasks[0].settings, "lm_eval": require_lm_eval()},
        "tasks": [{"task": task.name, "n_requests": task.n_requests, "n_shots": task.n_shots} for task in tasks],
        "groups": [format_heads(group) for group in config.parsed_groups],
        "metrics": metrics,
        "caveats": [*([DEMO_CAVEAT] if organism else []), *CAVEATS],
        "warnings": [*engine.notes, *utility.notes],
    }

"""Compares what lm-eval's tasks show of a changed model with the vanilla model, sample by sample.

A metric of zeros and ones is compared as rates are (exact McNemar, Newcombe); any other number by the mean of its
differences. Where the metric is no mean over samples (a perplexity, an F1 over all), nothing can be paired.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict

import scipy  # its modules load on first use

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import not_followed_line
from safetyheads.errors import InputError
from safetyheads.heads import Group, format_heads, within
from safetyheads.integrations.lm_eval import ORGANISM, LoadedTask, chat_of, require_lm_eval, run_task
from safetyheads.model.engine import Engine
from safetyheads.prompts.asked import tokenizer_sha256
from safetyheads.runs.config import EvalConfig, Progress
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory, records_place
from safetyheads.runs.provenance import canonical_name, device_name, fingerprint, loading_facts, model_facts, versions
from safetyheads.runs.run import DEMO_CAVEAT, mixed_notes, run_directory
from safetyheads.runs.shards import Shard
from safetyheads.runs.stored_files import Finite, Record, converted
from safetyheads.stats.intervals import Rate, mean_with_interval
from safetyheads.stats.testing import holm_of_tests, paired_difference

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
# By a count or mark of a task's first record.
_NOTES = {
    "truncated": "{n} requests of task {task} do not fit the model's context; their beginnings were cut",
    "unclosed": "{n} answers of task {task} ({label}) end in an open think block: they count as empty",
    "folded": "the chat template takes no system prompt; "
    "that of task {task} stands at the beginning of the user's turn",
}
# A mean is summed in another order elsewhere, which moves its last bits.
_ROUNDING = 1e-9
_BINARY = frozenset((0.0, 1.0))


def metric_value(aggregate: float | None, values: Values, n: int | None = None) -> Record:
    """lm-eval's number with its interval; ``n`` counts samples, where not each has a value.

    Returns:
        ``value`` (None where it is no finite number), ``interval`` (95 %: Wilson's for zeros and ones, else Student's;
        None for what is no mean over samples), ``n`` (samples) and ``unit``: ``share`` of samples, ``mean`` over
        samples, or ``whole``, a number of all samples together.
    """
    numbers = list(values.values())
    mean = math.fsum(numbers) / len(numbers) if numbers else math.nan
    unit, interval, n = "whole", None, len(numbers) if n is None else n
    if aggregate is not None and math.isclose(aggregate, mean, rel_tol=_ROUNDING, abs_tol=_ROUNDING):
        unit, n = "share" if _BINARY.issuperset(numbers) else "mean", len(numbers)
        interval = Rate(round(sum(numbers)), n).interval if unit == "share" else mean_with_interval(numbers).interval
    return {"value": aggregate, "interval": interval, "n": n, "unit": unit}


def metric_change(before: Record, after: Record, old: Values, new: Values) -> dict[str, Any]:
    """The change of a metric between two models, sample by sample where it is a mean over samples.

    ``before`` and ``after`` are from :func:`metric_value`, ``old`` and ``new`` the values of the samples behind them.

    Returns:
        ``change`` (after minus before, in the metric's unit), ``interval`` (95 %: Newcombe's for zeros and ones, else
        Student's of the mean difference), ``n`` (samples that have a finite value in both), ``gained`` and ``lost``
        (samples whose value rose and fell), ``p_value`` (two-sided, of this comparison alone) and ``test`` (its name);
        None where it cannot be told.
    """
    shared = [sample for sample in old if sample in new]
    # A mean that one sample makes infinite is a mean all the same, as the other model's tells.
    units = {measured["unit"] for measured in (before, after) if measured["value"] is not None}
    if not units or "whole" in units or not shared:
        change = None if None in (before["value"], after["value"]) else after["value"] - before["value"]
        return {"change": change, "n": before["n"]} | dict.fromkeys(("interval", "gained", "lost", "p_value", "test"))
    first, second = ([values[sample] for sample in shared] for values in (old, new))
    if _BINARY.issuperset([*first, *second]):
        return asdict(paired_difference(first, second)) | {"test": McNEMAR}
    moved = [b - a for a, b in zip(first, second, strict=True)]
    mean, p_value = mean_with_interval(moved), None
    if len(set(moved)) > 1:
        p_value = float(scipy.stats.ttest_1samp(moved, 0.0).pvalue)
    elif not any(moved):  # No t test can judge differences that do not vary.
        p_value = 1.0
    gained, lost = sum(difference > 0 for difference in moved), sum(difference < 0 for difference in moved)
    # Differences that do not vary leave no width, and a width of 0 would claim a certainty that they do not have.
    interval = mean.interval if len(set(moved)) > 1 else None
    found = {"change": mean.mean, "interval": interval, "n": len(shared), "gained": gained, "lost": lost}
    return found | {"p_value": p_value, "test": T_TEST}


class Variant(NamedTuple):
    """One change of the model."""

    label: str
    at_work: Callable[[], AbstractContextManager[Any]]
    """A context in which the engine's model is the changed one; it restores the model, and its value is unused."""
    fields: Mapping[str, Any] = MappingProxyType({})
    """All that it depends on, as JSON: equal fields are the same variant when a run is continued."""


class Utility(NamedTuple):
    """Metrics of several models on the same tasks."""

    metrics: Sequence[Record]
    """Task by task, metric by metric, vanilla first: ``task``, ``metric`` (with the name of the filter before it, where
    that is not lm-eval's ``none``), ``variant`` (a label), what :func:`metric_value` gives, and ``difference`` from
    vanilla: what :func:`metric_change` gives and ``p_holm``, adjusted for all comparisons; None for vanilla itself."""
    records: Mapping[tuple[str, str], Sequence[Record]]
    """(task, variant) -> the records behind it, one a sample after the first."""
    notes: tuple[str, ...] = ()
    """What a reader of the numbers must know."""

    def metric(self, task: str, metric: str = "acc", variant: str = VANILLA) -> Record:
        """One of the metrics; an InputError where it was not measured."""
        for measured in self.metrics:
            if (measured["task"], measured["metric"], measured["variant"]) == (task, metric, variant):
                return measured
        raise InputError(f"no {metric} of task {task} under {variant!r} was measured")


class _Whole(TypedDict):
    metrics: dict[str, Finite | None]
    truncated: int
    unclosed: int
    folded: NotRequired[bool]


class _Sample(TypedDict):
    document: int
    filter: str
    hash: str
    values: dict[str, Finite | bool | None]


def _are_of_a_task(records: Sequence[Record]) -> bool:
    converted(records[0], _Whole)
    converted(records[1:], list[_Sample])
    return True


def head_variants(engine: Engine, groups: Sequence[Group], ablation: Ablation) -> tuple[Variant, ...]:
    """Each group of heads ablated in the forward pass."""
    fields = {"ablation": ablation.name, "epsilon": ablation.epsilon}
    return tuple(
        Variant(
            format_heads(group),
            partial(engine.ablated, within(group, engine.n_layers, engine.n_heads), ablation),
            {"heads": format_heads(sorted(group)), **fields},
        )
        for group in groups
    )


def evaluate_tasks(
    engine: Engine,
    tasks: Sequence[LoadedTask],
    variants: Sequence[Variant],
    run: RunDirectory | None = None,
    progress: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> Utility:
    """Put tasks to the vanilla model and to each variant, and compare sample by sample.

    ``run`` keeps the samples, so that a run can be continued; they may depend on more: ``about``.
    """
    labels = [VANILLA, *(variant.label for variant in variants)]
    if len(set(labels)) < len(labels):
        raise InputError(f"each variant needs a label of its own; got {', '.join(labels)}")
    refuse_foreign(engine, tasks)
    progress = progress or Progress()

    def put(task: LoadedTask, variant: Variant) -> Sequence[Record]:
        with progress.track(f"{task.name}, {variant.label} ablated", task.n_requests) as done, variant.at_work():
            return run_task(engine, task, done)

    computes, units = dict[tuple[str, str], Callable[[], Sequence[Record]]](), dict[tuple[str, ...], float]()
    for task in tasks:
        for variant in (Variant(VANILLA, nullcontext, {"heads": ""}), *variants):
            compute, fields = partial(put, task, variant), _fields_of(engine, task, variant) | dict(about or {})
            units[(records_place("utility", fields),)] = float(task.n_requests)
            kept = compute if run is None else partial(run.records, "utility", fields, compute, fits=_are_of_a_task)
            computes[task.name, variant.label] = kept
    if run is None:
        records = {key: compute() for key, compute in computes.items()}
    else:
        run.divide("utility", units)
        records = dict(zip(computes, run.together(*computes.values()), strict=True))
    metrics = [metric for task in tasks for metric in _compared(task.name, labels, records)]
    differences = [metric["difference"] for metric in metrics if metric["difference"] is not None]
    adjusted = holm_of_tests(difference["p_value"] for difference in differences)
    for difference, p in zip(differences, adjusted, strict=True):
        difference["p_holm"] = p
    notes = [
        words.format(n=stored[0][key], task=task, label=label)
        for key, words in _NOTES.items()
        for (task, label), stored in records.items()
        if stored[0].get(key) and (label == VANILLA or key == "unclosed")
    ]
    return Utility(metrics, records, tuple(notes))


def _fields_of(engine: Engine, task: LoadedTask, variant: Variant) -> dict[str, Any]:
    """What a variant's samples of a task depend on."""
    return {
        "task": task.name,
        "asked_sha256": task.sha256,
        # The hash before it is of texts: token ids and the chat template's words are the tokenizer's.
        "tokenizer_sha256": tokenizer_sha256(engine.tokenizer),
        "variant": dict(variant.fields) or {"label": variant.label},
        "settings": task.settings,
        "lm_eval": require_lm_eval(),
    }


def refuse_foreign(engine: Engine, tasks: Sequence[LoadedTask]) -> None:
    """Refuse what the model cannot be asked: the organism's language that nobody taught it, a chat without template."""
    if any(task.name == ORGANISM for task in tasks) and not getattr(engine.model.config, "safetyheads_organism", False):
        raise InputError(f"task organism is in the language of the demo's models; {engine.name} is none of them")
    for task in tasks:
        if (chat := chat_of(engine, task.options)) is not None:
            chat.render("?")


def _compared(
    task: str, labels: Sequence[str], records: Mapping[tuple[str, str], Sequence[Record]]
) -> Iterator[dict[str, Any]]:
    """Every metric of a task, vanilla first."""
    for name in records[task, VANILLA][0]["metrics"]:
        metric, _, filtered = name.rpartition(",")
        shown = {"task": task, "metric": metric if filtered == "none" else f"{filtered} {metric}"}
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
            difference = None
            if label != VANILLA:
                difference = metric_change(measured[VANILLA], measured[label], values[VANILLA], values[label])
            yield {**shown, "variant": label, **measured[label], "difference": difference}


def run_evaluation(
    engine: Engine,
    config: EvalConfig,
    out: Path,
    tasks: Sequence[LoadedTask],
    progress: Progress,
    command: Sequence[str],
    dry_run: bool = False,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Evaluate a loaded model on the config's tasks in a run directory, continuing what it holds."""
    variants = head_variants(engine, config.parsed_groups, config.parsed_ablation)
    refuse_foreign(engine, tasks)
    n_requests = (1 + len(variants)) * sum(task.n_requests for task in tasks)
    line = f"{n_requests} requests to the model: tasks {len(tasks)}, groups {len(variants)} and vanilla"
    if (chat := chat_of(engine, config)) is not None:
        block = f", with its think block {chat.template.thinking}" if chat.template.thinking else ""
        line += f"; questions stand under the chat template{block}"
    if dry_run:
        return {"dry_run": True, "kind": "eval", "out": str(out), "requests": n_requests, "lines": [line]}
    progress.say(line)
    with progress.track("fingerprinting the weights", 1):
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
    with run_directory(out, settings, progress, command, shard) as run:
        started = time.monotonic()
        utility = evaluate_tasks(engine, tasks, variants, run, progress)
        utility = utility._replace(notes=(*mixed_notes(run), *utility.notes))
        run.write_results(_results(engine, config, tasks, utility))
        run.add_timings({"seconds": time.monotonic() - started, "finished": datetime.now(UTC).isoformat()})
        return run.read_results()


def _results(engine: Engine, config: EvalConfig, tasks: Sequence[LoadedTask], utility: Utility) -> dict[str, Any]:
    """Everything that ``results.json`` holds."""
    ablation, chat = config.parsed_ablation, chat_of(engine, config)
    organism = any(task.name == ORGANISM for task in tasks)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "eval",
        "model": model_facts(engine, config.model),
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "settings": {
            **tasks[0].settings,
            **({} if chat is None else {"thinking": chat.template.thinking}),
            "lm_eval": require_lm_eval(),
        },
        "tasks": [{"task": task.name, "n_requests": task.n_requests, "n_shots": task.n_shots} for task in tasks],
        "groups": [format_heads(group) for group in config.parsed_groups],
        "metrics": list(utility.metrics),
        "caveats": [*([DEMO_CAVEAT] if organism else []), *CAVEATS],
        "warnings": [*engine.notes, *filter(None, [not_followed_line(engine.model)]), *utility.notes],
    }

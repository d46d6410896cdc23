"""An evaluation of tasks as a run: its settings, its directory, its results. Owns what a manifest says of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.heads import Group, format_heads, parse_heads
from safetyheads.integrations.harness import HarnessSettings, LoadedTask, require_harness
from safetyheads.integrations.utility import Keep, Utility, evaluate_tasks, head_variants, refuse_foreign
from safetyheads.prompts.asked import tokenizer_sha256
from safetyheads.runs.audit_run import DEMO_CAVEAT
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.progress import Progress, Silent
from safetyheads.runs.provenance import (
    as_loaded,
    device_name,
    fingerprint,
    keep_threads,
    model_facts,
    one_spelling,
    provenance,
    versions,
)

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

CAVEATS = (
    "An accuracy that did not change is no proof that nothing was lost: see the interval for what could have been.",
    "Intervals cover the draw of samples only. Other templates, examples and precisions are not in them.",
)
"""What no evaluation shows."""


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """Settings of one evaluation; with the loaded model, all that its numbers depend on."""

    model: str
    """Directory or hub id."""
    tasks: tuple[str, ...]
    """lm-eval's names, or ``organism``."""
    groups: tuple[Group, ...]
    """Heads that are ablated together, group by group."""
    ablation: Ablation
    """Of every head."""
    harness: HarnessSettings
    """How the tasks are put."""
    dtype: str = "float32"
    """Of the weights."""

    def __post_init__(self) -> None:
        for what, given in (("task", self.tasks), ("group", [format_heads(sorted(group)) for group in self.groups])):
            twice = [one for one in given if list(given).count(one) > 1]
            if twice:
                raise InputError(f"{what} {twice[0]} is given twice")

    def as_dict(self) -> dict[str, Any]:
        """As the manifest holds it; ``offline`` moves no number."""
        harness = asdict(self.harness)
        del harness["offline"]
        return {
            "kind": "eval",
            "model": one_spelling(self.model),
            "tasks": list(self.tasks),
            "groups": [format_heads(group) for group in self.groups],
            "ablation": asdict(self.ablation),
            "dtype": self.dtype,
            **harness,
            "include_paths": [one_spelling(path) for path in self.harness.include_paths],
        }


def parse_groups(text: str) -> tuple[Group, ...]:
    """Read groups separated by semicolons, such as ``1-3,2-5;2-1``; an empty text is no group.

    Raises:
        InputError: a malformed head, one given twice, or a group without heads.
    """
    if not text.strip():
        return ()
    groups = tuple(parse_heads(part) for part in text.split(";"))
    if not all(groups):
        raise InputError(
            f"a group in {text!r} has no heads; groups are separated by one semicolon, such as 1-3,2-5;2-1"
        )
    return groups


def run_evaluation(
    engine: Engine,
    config: EvalConfig,
    tasks: Sequence[LoadedTask],
    out: Path | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate a loaded model; with ``out``, in a run directory, continuing what it holds of this run.

    Args:
        engine: the model, loaded as ``config`` says.
        config: all settings.
        tasks: the config's, loaded.
        out: the run directory; without one nothing is kept.
        progress: who watches.
        command: the command line, for the record.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        InputError: a head or task that the model cannot have, or a directory that belongs to another run.
    """
    watching: Progress = Silent() if progress is None else progress
    variants = head_variants(engine, config.groups, config.ablation)
    refuse_foreign(engine, tasks)
    n_requests = (1 + len(variants)) * sum(task.n_requests for task in tasks)
    watching.say(f"{n_requests} requests to the model: tasks {len(tasks)}, groups {len(variants)} and vanilla")

    def evaluated(keep: Keep | None) -> dict[str, Any]:
        found = evaluate_tasks(engine, tasks, variants, config.harness, keep, watching.track)
        return results_of(engine, config, tasks, found)

    if out is None:
        return evaluated(None)
    with watching.track("fingerprinting the weights", 1):
        settings = {
            **config.as_dict(),
            "asked_sha256": {task.name: task.sha256 for task in tasks},
            "tokenizer_sha256": tokenizer_sha256(engine.tokenizer),
            "weights_sha256": fingerprint(engine),
            **as_loaded(engine),
            "device": device_name(engine),
            "versions": {**versions(), "lm_eval": require_harness()},
        }
    with RunDirectory.start(out, settings, provenance(command)) as run:
        keep_threads(run, watching)
        started = time.monotonic()
        run.write_results(evaluated(run.records))
        run.write_timings({"seconds": time.monotonic() - started, "finished": datetime.now(UTC).isoformat()})
        return run.read_results()


def results_of(engine: Engine, config: EvalConfig, tasks: Sequence[LoadedTask], found: Utility) -> dict[str, Any]:
    """Everything that ``results.json`` holds."""
    harness = asdict(config.harness)
    del harness["offline"], harness["include_paths"]
    organism = any(task.is_organisms for task in tasks)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "eval",
        "model": model_facts(engine, config.model),
        "ablation": {**asdict(config.ablation), "label": config.ablation.kind.label},
        "settings": {**harness, "lm_eval": require_harness()},
        "tasks": [{"task": task.name, "n_requests": task.n_requests, "n_shots": task.n_shots} for task in tasks],
        "groups": [format_heads(group) for group in config.groups],
        "metrics": [one.as_dict() for one in found.metrics],
        "caveats": [*([DEMO_CAVEAT] if organism else []), *CAVEATS],
        "warnings": [*engine.notes, *found.notes],
    }

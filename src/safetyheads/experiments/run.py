"""Runs experiments one after the other into one run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.experiments.catalogue import EXPERIMENTS, Experiment, Need
from safetyheads.experiments.lab import Lab
from safetyheads.experiments.settings import ReproductionConfig, prompts_sha256
from safetyheads.judges.named import judges_named
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.provenance import canonical_name, versions
from safetyheads.runs.run import run_directory

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

KIND = "reproduction"
"""Kind of the run, in manifest and results."""
_WANTED: dict[Need, str] = {
    "base": "base: the checkpoint that the first model was aligned from (--base)",
    "related": "related: another model of the same base",
    "base_models": "base_models: models that were not aligned",
    "learn_harmful": "learn_harmful: harmful prompts that no dataset holds",
}


def reproduce(
    config: ReproductionConfig,
    experiments: Sequence[Experiment],
    out: Path,
    load: Callable[[str], Engine],
    progress: Progress,
    command: Sequence[str] = (),
    skips: bool = False,
) -> dict[str, Any]:
    """Run experiments into a run directory; what is there already is not run again.

    Args:
        config: all settings.
        experiments: in the order of running.
        out: the run directory; one that holds other experiments of the same settings takes these too.
        load: loads and proves a model by its name.
        progress: who watches.
        command: the command line, for the record.
        skips: leave out, saying why, experiments that need what is not there or cannot be run on these models.

    Raises:
        InputError: bad settings or prompts, something needed is not there, or the directory is another run's.
    """
    runnable, left_out = [], dict[str, str]()
    for experiment in experiments:
        lacking = "; ".join(missing(experiment, config))
        if not lacking:
            runnable.append(experiment)
        elif not skips:
            raise InputError(f"{experiment.name} needs a setting that is not given, {lacking}")
        else:
            left_out[experiment.name] = f"It needs {lacking}."
            progress.say(f"left out: {experiment.name}, which needs {lacking}")
    settings = {
        "kind": KIND,
        **_spelled(config),
        "prompts_sha256": prompts_sha256(config),
        "described_judges": [judge.describe() for judge in judges_named(config.judges, config.judge_device)],
        "versions": versions(),
    }
    with run_directory(out, settings, progress, command) as run:
        lab = Lab(config, run, progress, load)
        for number, experiment in enumerate(runnable, 1):
            progress.say(f"{number} of {len(runnable)}: {experiment.name}, {experiment.title}")
            try:
                _keep_outcome(run, experiment, lab)
            except SafetyheadsError as error:
                if not skips:
                    raise
                # What one experiment cannot be run on, others may be.
                left_out[experiment.name] = str(error)
                progress.say(f"left out: {experiment.name}. {error}")
            _write(run, config, left_out)
        if not runnable:
            _write(run, config, left_out)
        return run.read_results()


def listed(config: ReproductionConfig) -> list[dict[str, Any]]:
    """Every experiment in the paper's order, with what it would lack under these settings."""
    return [
        {"name": name, "title": entry.title, "missing": missing(entry, config)} for name, entry in EXPERIMENTS.items()
    ]


def missing(experiment: Experiment, config: ReproductionConfig) -> list[str]:
    """What the experiment needs and the settings do not have, in words."""
    lacking = [_WANTED[need] for need in experiment.needs if need != "lm-eval" and not getattr(config, need)]
    if "lm-eval" in experiment.needs and find_spec("lm_eval") is None:
        lacking.append("lm-eval: pip install 'safetyheads[lm-eval]'")
    return lacking


def _spelled(config: ReproductionConfig) -> dict[str, Any]:
    """The settings, with paths as they really are."""
    settings = asdict(config)
    for name in ("models", "templated", "base_models", "datasets"):
        settings[name] = [canonical_name(named) for named in settings[name]]
    for name in ("base", "related", "benign", "learn_harmful", "learn_benign"):
        settings[name] = None if settings[name] is None else canonical_name(settings[name])
    return settings


def _keep_outcome(run: RunDirectory, experiment: Experiment, lab: Lab) -> None:
    """Run an experiment that the directory does not hold yet; of one that is there, check that weights are the same."""

    def compute() -> list[dict[str, Any]]:
        started = time.monotonic()
        lab.used.clear()
        outcome = experiment.run(lab)
        timed = [asdict(table) for table in outcome.timed]
        seconds = time.monotonic() - started
        return [{"outcome": outcome.as_dict(), "used": sorted(lab.used), "seconds": seconds, "timed": timed}]

    (record,) = run.records("outcome", {"experiment": experiment.name}, compute)
    for model in record["used"]:
        lab.weights_of(model)


def _write(run: RunDirectory, config: ReproductionConfig, left_out: Mapping[str, str]) -> None:
    """Results of every experiment that is there, in the paper's order; times are kept apart."""
    records = {record["outcome"]["name"]: record for record in run.stored_records("outcome")}
    ordered = [records[name]["outcome"] for name in EXPERIMENTS if name in records]
    results = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "experiments": ordered,
        "judge": config.judges[0],
        "judges": list(config.judges),
        "left_out": {name: why for name, why in left_out.items() if name not in records},
        "catalogue": listed(config),
    }
    run.write_results(results)
    seconds = {name: record["seconds"] for name, record in records.items()}
    timed = {name: record["timed"] for name, record in records.items() if record["timed"]}
    run.write_timings({"seconds": seconds, "timed": timed})

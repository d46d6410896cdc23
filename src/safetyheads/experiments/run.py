"""Runs experiments of the paper one after the other into one run directory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.experiments.catalogue import EXPERIMENTS, Experiment, listed, missing
from safetyheads.experiments.lab import Lab
from safetyheads.experiments.settings import ORGANISM, PAPER_TEMPLATE, ReproductionConfig, prompts_of
from safetyheads.judges.endpoint import count_requests_in
from safetyheads.judges.named import judges_named
from safetyheads.model.engine import Engine
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.provenance import canonical_name, references_sha256, versions
from safetyheads.runs.run import run_directory

KIND = "reproduction"
"""Kind of the run, in manifest and results."""


def reproduce(
    config: ReproductionConfig,
    experiments: Sequence[Experiment],
    out: Path,
    load: Callable[[str], Engine],
    progress: Progress,
    command: Sequence[str] = (),
    skips: bool = False,
) -> dict[str, Any]:
    """Run experiments into a run directory, in their order; what is there already is not run again.

    A directory that holds other experiments of the same settings takes these too. ``load`` loads and proves a model by
    its name. ``skips`` leaves out, saying why, what needs something that is not there or cannot be run on these models.

    Raises:
        InputError: bad settings or prompts, something needed is not there, or the directory is another run's.
    """
    given = config.template is not None
    template = config.template or f"the organism's chat, {PAPER_TEMPLATE} for other models"
    judges = "the paper's" if config.judges == ("paper",) else "as asked"
    progress.say(
        f"template {template} ({'as asked' if given else 'as in the paper'}), "
        f"judge{'s' * (len(config.judges) > 1)} {', '.join(config.judges)} ({judges})"
    )
    lacking = {experiment.name: "; ".join(missing(experiment, config)) for experiment in experiments}
    left_out = {name: f"It needs {needs}." for name, needs in lacking.items() if needs}
    for name in left_out:
        if not skips:
            raise InputError(f"{name} needs a setting that is not given, {lacking[name]}")
        progress.say(f"left out: {name}, which needs {lacking[name]}")
    runnable = [experiment for experiment in experiments if experiment.name not in left_out]
    with run_directory(out, _settings(config), progress, command) as run:
        lab = Lab(config, run, progress, load)
        count_requests_in(run.path, lab.judges)
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


def _settings(config: ReproductionConfig) -> dict[str, Any]:
    """All that numbers depend on, weights aside: paths as they really are, and a hash of every set of prompts."""
    settings = asdict(config)
    for name in ("models", "templated", "base_models", "datasets"):
        settings[name] = [canonical_name(named) for named in settings[name]]
    for name in ("base", "related", "benign", "learn_harmful", "learn_benign"):
        settings[name] = None if settings[name] is None else canonical_name(settings[name])
    hashes = {}
    for organism, model in {model.startswith(ORGANISM): model for model in reversed(config.models)}.items():
        for name in config.prompt_names:
            prompts = prompts_of(config, model, name, "test")
            digest = hashlib.sha256(f"{prompts.sha256} {references_sha256(prompts)}".encode()).hexdigest()
            hashes[f"{name}, organism" if organism else name] = digest
    judges = [judge.describe() for judge in judges_named(config.judges, config.judge_device, config.judge_tokens)]
    return {"kind": KIND, **settings, "prompts_sha256": hashes, "described_judges": judges, "versions": versions()}


def _keep_outcome(run: RunDirectory, experiment: Experiment, lab: Lab) -> None:
    """Run an experiment that the directory does not hold yet; of one that is there, check that weights are the same."""

    def compute() -> list[dict[str, Any]]:
        started = time.monotonic()
        lab.used.clear()
        outcome = experiment.run(lab)
        timed = {experiment.name: tables} if (tables := asdict(outcome)["timed"]) else {}
        run.add_timings({"seconds": {experiment.name: time.monotonic() - started}, "timed": timed})
        return [{"outcome": outcome.as_dict(), "used": sorted(lab.used)}]

    (record,) = run.records("outcome", {"experiment": experiment.name}, compute)
    for model in record["used"]:
        lab.weights_of(model)


def _write(run: RunDirectory, config: ReproductionConfig, left_out: Mapping[str, str]) -> None:
    records = {record["outcome"]["name"]: record for record in run.stored_records("outcome")}
    results = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "experiments": [records[name]["outcome"] for name in EXPERIMENTS if name in records],
        "judge": config.judges[0],
        "judges": list(config.judges),
        "left_out": {name: why for name, why in left_out.items() if name not in records},
        "catalogue": listed(config),
    }
    run.write_results(results)

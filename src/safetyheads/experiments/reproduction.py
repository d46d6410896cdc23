"""Experiments one after the other, into one run directory. Owns their order, results and what survives a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetyheads.errors import InputError
from safetyheads.experiments.catalogue import EXPERIMENTS, Experiment, Need
from safetyheads.experiments.lab import Lab
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.judges import judge_named
from safetyheads.progress import Progress
from safetyheads.provenance import keep_threads, one_spelling, provenance, versions
from safetyheads.storage import RESULTS_VERSION, RunDirectory

if TYPE_CHECKING:
    from safetyheads.engine import Engine

KIND = "reproduction"
"""What manifest and results call such a run."""
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
        skips: leave out, saying so, experiments that need a setting or an extra which is not there.

    Returns:
        The results of all experiments that the directory holds.

    Raises:
        InputError: bad settings or prompts, something needed is not there, or the directory is another run's.
    """
    runnable = [one for one in experiments if _is_runnable(one, config, progress, skips)]
    judge = judge_named(config.judge)
    settings = {"kind": KIND, **_spelled(config), "described_judge": judge.describe(), "versions": versions()}
    with RunDirectory.start(out, settings, provenance(command)) as run:
        keep_threads(run, progress)
        lab = Lab(config, run, progress, load)
        for model in config.models:
            # What the directory holds is other weights' if they changed under their name.
            lab.weights_of(model)
        for number, experiment in enumerate(runnable, 1):
            progress.say(f"{number} of {len(runnable)}: {experiment.name}, {experiment.title}")
            _kept_outcome(run, experiment, lab)
            _write(run, config)
        if not runnable:
            _write(run, config)
        return run.read_results()


def missing(experiment: Experiment, config: ReproductionConfig) -> list[str]:
    """What it needs and the settings do not have, in words."""
    found = [_WANTED[need] for need in experiment.needs if need != "lm-eval" and not getattr(config, need)]
    if "lm-eval" in experiment.needs and find_spec("lm_eval") is None:
        found.append("lm-eval: pip install 'safetyheads[lm-eval]'")
    return found


def _is_runnable(experiment: Experiment, config: ReproductionConfig, progress: Progress, skips: bool) -> bool:
    lacking = missing(experiment, config)
    if lacking and not skips:
        raise InputError(f"{experiment.name} needs a setting that is not given, {'; '.join(lacking)}")
    if lacking:
        progress.say(f"left out: {experiment.name}, which needs {'; '.join(lacking)}")
    return not lacking


def _spelled(config: ReproductionConfig) -> dict[str, Any]:
    """The settings, paths as they really are."""
    settings = config.as_dict()
    for name in ("models", "templated", "base_models", "datasets"):
        settings[name] = [one_spelling(named) for named in settings[name]]
    for name in ("base", "related", "benign", "learn_harmful", "learn_benign"):
        settings[name] = None if settings[name] is None else one_spelling(settings[name])
    return settings


def _kept_outcome(run: RunDirectory, experiment: Experiment, lab: Lab) -> None:
    """Run an experiment that the directory does not hold yet."""

    def compute() -> list[dict[str, Any]]:
        started = time.monotonic()
        outcome = experiment.run(lab)
        timed = [asdict(table) for table in outcome.timed]
        return [{"outcome": outcome.as_dict(), "seconds": time.monotonic() - started, "timed": timed}]

    run.rows("outcome", {"experiment": experiment.name}, compute)


def _write(run: RunDirectory, config: ReproductionConfig) -> None:
    """Results of every experiment that is there, in the paper's order; times go apart."""
    outcomes: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    timed: dict[str, Any] = {}
    for row in run.completions("outcome"):
        name = row["outcome"]["name"]
        outcomes[name], seconds[name], timed[name] = row["outcome"], row["seconds"], row["timed"]
    ordered = [outcomes[name] for name in EXPERIMENTS if name in outcomes]
    run.write_results({"schema_version": RESULTS_VERSION, "kind": KIND, "experiments": ordered, "judge": config.judge})
    run.write_timings({"seconds": seconds, "timed": {name: found for name, found in timed.items() if found}})

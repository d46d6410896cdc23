"""The experiments of the paper by name, and how they are run one after the other into one run directory."""

from __future__ import annotations

import hashlib
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.experiments.lab import Lab
from safetyheads.experiments.outcome import Outcome
from safetyheads.experiments.settings import ORGANISM, ReproductionConfig, prompts_of
from safetyheads.judges.named import judges_named
from safetyheads.model.engine import Engine
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.provenance import canonical_name, references_sha256, versions
from safetyheads.runs.run import run_directory

KIND = "reproduction"
"""Kind of the run, in manifest and results."""
ALL = "all"
"""Every experiment, one after the other."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment of the paper: an entry of ``catalogue.toml``."""

    name: str
    """Name on the command line, and of the function ``name(lab, outcome)`` that runs it."""
    title: str
    question: str
    """Question that the experiment asks."""
    module: str
    """Module of its function, in this folder."""
    costs: str
    """Cost in words, with H for heads, D for datasets of n prompts, T for templates."""
    caption: str
    """What holds for all of its tables and figures."""
    shown: Mapping[str, Mapping[str, Any]]
    """How its tables and figures are shown, and its notes."""
    needs: Mapping[str, str]
    """Settings or extras without which it cannot be run, with what they are in words."""

    def run(self, lab: Lab) -> Outcome:
        """Run it; what the run directory holds is not measured again."""
        function = getattr(import_module(f"safetyheads.experiments.{self.module}"), self.name)
        outcome = Outcome(self.name, self.title, self.question, caption=self.caption, shown=self.shown)
        names = ("epsilon", "max_new_tokens", "search_score", "held_out", "seed")
        outcome.settings = {name: getattr(lab.config, name) for name in names}
        outcome.settings |= {"judges": list(lab.config.judges), "sampled": lab.sampled.name}
        function(lab, outcome)
        return outcome


def _experiments() -> Iterator[Experiment]:
    entries = tomllib.loads(files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8"))
    words, known, notes, needs = (entries.pop(part) for part in ("words", "columns", "notes", "needs"))
    for entry in entries.values():
        for table in entry.get("tables", {}).values():
            # A column of a text may be its key alone, which is its title; one that many tables have stands apart.
            table["columns"] = [
                given if given == "..." or isinstance(given, list) else [given, *known.get(given, [given])]
                for given in table["columns"]
            ]
    for name, entry in entries.items():
        like = entries.get(entry.get("like"), {})
        shown = {kind: entry.get(kind, like.get(kind, {})) for kind in ("tables", "figures", "notes")}
        shown["notes"] = {**notes, **shown["notes"]}
        fields = {field: text for field, text in entry.items() if field not in ("like", *shown)}
        fields |= {
            "caption": entry["caption"].format_map(words),
            "needs": {need: needs[need] for need in entry.get("needs", ())},
        }
        yield Experiment(name, shown=shown, **fields)


EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _experiments()}
"""Every experiment by its name, in the paper's order."""


def chosen(name: str) -> tuple[Experiment, ...]:
    """The experiment of that name, or all of them; refuses unknown names."""
    if name == ALL:
        return tuple(EXPERIMENTS.values())
    if name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {name!r}; known are {', '.join(EXPERIMENTS)} and {ALL}")
    return (EXPERIMENTS[name],)


def missing(experiment: Experiment, config: ReproductionConfig) -> list[str]:
    """What the experiment needs and the settings do not have, in words."""
    there = {need: find_spec("lm_eval") if need == "lm-eval" else getattr(config, need) for need in experiment.needs}
    return [experiment.needs[need] for need, value in there.items() if not value]


def listed(config: ReproductionConfig) -> list[dict[str, Any]]:
    """Every experiment in the paper's order, with what it would lack under these settings."""
    return [
        {"name": name, "title": entry.title, "missing": missing(entry, config)} for name, entry in EXPERIMENTS.items()
    ]


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
    lacking = {experiment.name: "; ".join(missing(experiment, config)) for experiment in experiments}
    left_out = {name: f"It needs {needs}." for name, needs in lacking.items() if needs}
    for name in left_out:
        if not skips:
            raise InputError(f"{name} needs a setting that is not given, {lacking[name]}")
        progress.say(f"left out: {name}, which needs {lacking[name]}")
    runnable = [experiment for experiment in experiments if experiment.name not in left_out]
    with run_directory(out, _settings(config), progress, command) as run:
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
    judges = [judge.describe() for judge in judges_named(config.judges, config.judge_device)]
    return {"kind": KIND, **settings, "prompts_sha256": hashes, "described_judges": judges, "versions": versions()}


def _keep_outcome(run: RunDirectory, experiment: Experiment, lab: Lab) -> None:
    """Run an experiment that the directory does not hold yet; of one that is there, check that weights are the same."""

    def compute() -> list[dict[str, Any]]:
        started = time.monotonic()
        lab.used.clear()
        outcome = experiment.run(lab)
        seconds, timed = time.monotonic() - started, asdict(outcome)["timed"]
        return [{"outcome": outcome.as_dict(), "used": sorted(lab.used), "seconds": seconds, "timed": timed}]

    (record,) = run.records("outcome", {"experiment": experiment.name}, compute)
    for model in record["used"]:
        lab.weights_of(model)


def _write(run: RunDirectory, config: ReproductionConfig, left_out: Mapping[str, str]) -> None:
    """Results of every experiment that is there, in the paper's order; times are kept apart."""
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
    seconds = {name: record["seconds"] for name, record in records.items()}
    timed = {name: record["timed"] for name, record in records.items() if record["timed"]}
    run.write_timings({"seconds": seconds, "timed": timed})

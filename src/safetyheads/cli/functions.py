"""The commands audit, scan and compare as functions, for scripts and notebooks."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetyheads.cli.show import progress_for
from safetyheads.errors import TooFewPromptsError, as_path, refuse_unknown
from safetyheads.model.engine import Engine
from safetyheads.reports.write import write_report
from safetyheads.runs.audit import read_prompts, run_audit, why_too_few
from safetyheads.runs.compare import Comparison, compare_runs
from safetyheads.runs.config import AuditConfig, ScanConfig, preset_settings
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.exhaustive_scan import run_scan
from safetyheads.runs.reader import FinishedRun, RunReader
from safetyheads.runs.run import read_sets
from safetyheads.runs.start import load_engine, settled

AnyPath = str | os.PathLike[str]


def audit(
    model: str | Engine,
    prompts: AnyPath,
    out: AnyPath | None = None,
    *,
    preset: str = "standard",
    quiet: bool = False,
    **settings: Any,
) -> RunReader:
    """Score every head, find the safety group and show what its ablation does; writes the report, and gives the run.

    Args:
        model: a name, a directory, a hub id or a loaded engine.
        prompts: harmful prompts, as ``--prompts`` takes them.
        out: the run directory; one that holds part of this run is continued. By default a name of its own in ``runs/``.
        preset: ``quick``, ``standard`` or ``paper``; settings that are given win over it.
        quiet: show no progress.
        settings: fields of :class:`.AuditConfig`, such as ``limit=60``, ``size=3``, ``judges=("paper",)``.

    Raises:
        InputError: bad settings or prompts, or a directory that belongs to another run.
        TooFewPromptsError: before a model is loaded: too few are held out to show anything; ``anyway=True`` goes on.
    """
    return _finished("audit", AuditConfig, run_audit, model, prompts, out, quiet, preset_settings(preset) | settings)


def scan(
    model: str | Engine, prompts: AnyPath, out: AnyPath | None = None, *, quiet: bool = False, **settings: Any
) -> RunReader:
    """Ablate every head alone and judge the answers. Arguments as for :func:`audit`, fields of :class:`.ScanConfig`."""
    return _finished("scan", ScanConfig, run_scan, model, prompts, out, quiet, settings)


def compare(run_a: AnyPath, run_b: AnyPath) -> Comparison:
    """What changed between two finished runs, before and after; an InputError where they are not of one kind."""
    return compare_runs(RunReader(Path(as_path(run_a, "a run"))), RunReader(Path(as_path(run_b, "a run"))))


def read_run(path: AnyPath) -> RunReader | FinishedRun:
    """A finished run: its results and table; of an audit or scan its scores, answers and charts too, and
    of ``ships`` and ``sahara`` scores or a chart. Loads no model.
    """
    run = FinishedRun(Path(as_path(path, "a run")))
    return RunReader(run.path) if run.kind in ("audit", "scan") else run


def _finished(
    kind: str,
    config_of: type[AuditConfig] | type[ScanConfig],
    run: Callable[..., object],
    model: str | Engine,
    prompts: AnyPath,
    out: AnyPath | None,
    quiet: bool,
    settings: dict[str, Any],
) -> RunReader:
    known = config_of.__dataclass_fields__
    refuse_unknown(settings, known, f"{kind} has no setting")
    # One text stands for a list of one, as everywhere.
    lists = {name for name, field in known.items() if str(field.type).startswith("tuple[")}
    settings = {key: (value,) if key in lists and isinstance(value, str) else value for key, value in settings.items()}
    name = model.name if isinstance(model, Engine) else as_path(model, "a model")
    given = config_of(name, as_path(prompts, "prompts of a run"), **settings)
    config, folder = settled(given, None if out is None else Path(as_path(out, "a run directory")), kind)
    progress, read = progress_for(quiet), read_prompts(config) if isinstance(config, AuditConfig) else read_sets(config)
    if isinstance(config, AuditConfig) and (too_few := why_too_few(config, read)):
        raise TooFewPromptsError(f"cannot say: {too_few}; anyway=True goes on")
    engine = model if isinstance(model, Engine) else load_engine(config, progress)
    run(engine, config, folder, read, progress)
    write_report(RunDirectory.open(folder))
    return RunReader(folder)

"""What the commands that make a run share: refusals before the model is read, planted heads, report and printing.

Owns their order; computes nothing. torch is imported once the settings can no longer be refused without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetyheads.cli.inputs import default_out, load_engine, refuse_unusable
from safetyheads.cli.options import ModelOptions, OutputOptions, RunOptions
from safetyheads.cli.show import print_json, progress_for, show_summary
from safetyheads.errors import InputError
from safetyheads.heads import Group
from safetyheads.runs.config import AuditConfig


def run_and_show(model: ModelOptions, config: AuditConfig, run: RunOptions, output: OutputOptions) -> None:
    """Load, audit, report and print. All that can be refused without the model is refused before it is read."""
    from safetyheads.judges.named import judges_named

    out = usable_out(run, default_out(config))
    judges_named(config.judges, config.judge_device)
    from safetyheads.runs.audit_run import read_data, run_audit

    data, watching = read_data(config), progress_for(output.quiet)
    engine = load_engine(model, watching)
    results = run_audit(engine, config, out, data, planted_heads(model), watching, sys.argv)
    finish(results, out, run, output, show_summary)


def usable_out(run: RunOptions, default: Path) -> Path:
    """Where the run goes, once that and the options about its answers are known to be possible."""
    out = run.out or default
    if run.show_completions and run.no_completions:
        raise InputError("--show-completions and --no-completions exclude each other")
    refuse_unusable(out)
    return out


def planted_heads(model: ModelOptions) -> Group | None:
    """The true heads of an embedded model; None for any other."""
    from safetyheads import demo

    name = model.model.removeprefix("demo:")
    return demo.PLANTED_HEADS[name] if name != model.model else None


def finish(
    results: Mapping[str, Any],
    out: Path,
    run: RunOptions,
    output: OutputOptions,
    show: Callable[[Mapping[str, Any], Path], None],
) -> None:
    """Write the report of a finished run, and print what it came to."""
    from safetyheads.reports.audit import write_report
    from safetyheads.runs.directory import RunDirectory

    path = write_report(RunDirectory.open(out), show_completions=run.show_completions)
    if output.json_output:
        print_json(results)
    else:
        show(results, path)

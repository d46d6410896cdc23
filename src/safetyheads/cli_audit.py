"""What ``audit`` and ``demo`` share: one audit from settings to printed summary. Owns the order; computes nothing.

torch is imported once the settings can no longer be refused without it.
"""

from __future__ import annotations

import sys

from safetyheads.cli_inputs import default_out, load_engine, refuse_unusable
from safetyheads.cli_options import ModelOptions, OutputOptions, RunOptions
from safetyheads.cli_output import print_json, progress_for, show_summary
from safetyheads.config import AuditConfig
from safetyheads.errors import InputError


def run_and_show(model: ModelOptions, config: AuditConfig, run: RunOptions, output: OutputOptions) -> None:
    """Load, audit, report and print. All that can be refused without the model is refused before it is read."""
    from safetyheads.judges import judge_named

    out = run.out or default_out(config)
    if run.show_completions and run.no_completions:
        raise InputError("--show-completions and --no-completions exclude each other")
    judge_named(config.judge)
    refuse_unusable(out)
    from safetyheads.pipeline import read_data, run_audit

    data, watching = read_data(config), progress_for(output.quiet)
    engine = load_engine(model, watching)
    from safetyheads import demo as organism
    from safetyheads.report import write_report
    from safetyheads.storage import RunDirectory

    planted = organism.PLANTED_HEADS[model.model.removeprefix("demo:")] if model.model.startswith("demo:") else None
    results = run_audit(engine, config, out, data, planted, watching, sys.argv)
    path = write_report(RunDirectory.open(out), show_completions=run.show_completions)
    if output.json_output:
        print_json(results)
    else:
        show_summary(results, path)

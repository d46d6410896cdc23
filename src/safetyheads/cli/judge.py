"""``safetyheads judge``: another judge for a run's stored answers. Owns its options and what it prints."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from safetyheads.cli.inputs import load_engine
from safetyheads.cli.options import ModelOptions, OutputOptions
from safetyheads.cli.show import print_json, progress_for, rate_text, signed_text, stdout
from safetyheads.errors import InputError

if TYPE_CHECKING:
    from safetyheads.runs.directory import RunDirectory
    from safetyheads.runs.progress import Progress
    from safetyheads.runs.rejudge import Finish, Rejudged

_SHOWN = 16


def judge(
    output: OutputOptions,
    run: Annotated[Path, typer.Argument(help="Run directory of a finished scan or audit.", show_default=False)],
    name: Annotated[
        str,
        typer.Option("--judge", help="Who judges: paper, released, phrases, a judge model, endpoint:MODEL, ..."),
    ],
    judge_device: Annotated[str, typer.Option(help="Where a judge model runs: cpu, cuda or cuda:N.")] = "cpu",
    finish: Annotated[
        bool,
        typer.Option(
            "--finish",
            help="Finish answers that were cut too early for this judge, with the run's model; else they are unscored.",
        ),
    ] = False,
) -> None:
    """Judge a run's stored answers again; the verdicts go beside those that are there."""
    from safetyheads.judges.named import judge_named

    judging = judge_named(name, judge_device)
    from safetyheads.reports.audit import write_report
    from safetyheads.runs.directory import RunDirectory
    from safetyheads.runs.provenance import provenance
    from safetyheads.runs.rejudge import rejudge

    watching = progress_for(output.quiet)
    finishing = _finisher(RunDirectory.open(run), watching) if finish else None
    found = rejudge(run, judging, finishing, watching, provenance(sys.argv))
    path = write_report(RunDirectory.open(run))
    if output.json_output:
        print_json(asdict(found))
    else:
        show_rejudged(found, path)


def _finisher(opened: RunDirectory, watching: Progress) -> Finish:
    from safetyheads.answers.finishing import finisher

    if opened.read_results()["kind"] != "scan":
        raise InputError("--finish is for scans; the answers of an audit are all whole")
    manifest = opened.read_manifest()
    stored = manifest["config"]
    device_map = stored.get("device_map")
    model = ModelOptions(
        model=stored["model"],
        device=stored["device"].split()[0] if device_map is None else "auto",
        dtype=stored["dtype"],
        adapter=stored.get("adapter"),
        device_map=device_map,
        memory=stored["memory"],
    )
    return finisher(load_engine(model, watching), manifest)


def show_rejudged(found: Rejudged, report: Path) -> None:
    """Rates of both judges, and how far they agree."""
    console = stdout()
    table = Table("answers", f"complied, {found.lead}", f"complied, {found.judge}", title="Judges side by side")
    # Where the two differ most comes first.
    ranked = sorted(found.rates.items(), key=lambda item: -_difference(found, item[0]))
    for label, rates in ranked[:_SHOWN]:
        table.add_row(label, *(rate_text(asdict(rates[name])) for name in (found.lead, found.judge)))
    if len(ranked) > _SHOWN:
        table.caption = f"{len(ranked) - _SHOWN} more rows with --json"
    console.print(table)
    agreed = found.kappa
    kappa = "not defined" if agreed.kappa is None else signed_text(agreed.kappa, agreed.interval)
    console.print(
        f"{found.n_rows} answers, {found.n_finished} finished with the model, {found.n_unscored} unscored; the judges "
        f"differ about {found.n_differing}; Cohen's kappa {kappa} over {agreed.n}; {found.seconds:.1f} s.",
        soft_wrap=True,
    )
    console.print(f"Report: {report}", soft_wrap=True)


def _difference(found: Rejudged, label: str) -> float:
    rates = found.rates[label]
    return abs((rates[found.judge].rate or 0.0) - (rates[found.lead].rate or 0.0))

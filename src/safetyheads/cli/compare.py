"""Commands that read run directories only: ``compare`` and ``history``. Owns how they print and when a gate is shut.

No command here loads a model or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from safetyheads.cli.options import OutputOptions
from safetyheads.cli.show import one_line, print_json, rate_text, signed_text, stdout

if TYPE_CHECKING:
    from safetyheads.runs.compare import Change, Comparison, GateOutcome
    from safetyheads.runs.history import History
    from safetyheads.stats.ranking import RankAgreement, TopOverlap

FailIf = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        help="Exit with 1 where this holds, such as 'asr_increase > 0.1' or 'asr_increase.low > 0'; repeatable.",
        rich_help_panel="Gate",
    ),
]
_CHANGES = {
    "vanilla_asr": "ASR, nothing ablated",
    "group_asr": "ASR, own group ablated",
    "benign_kept": "benign kept, nothing ablated",
    "concentration": "concentration",
}


def compare(
    output: OutputOptions,
    run_a: Annotated[Path, typer.Argument(help="Run directory of the model before.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(help="Run directory of the model after.", show_default=False)],
    fail_if: FailIf = None,
) -> None:
    """Compare two finished runs: heads, attack success, concentration; with --fail-if, a gate for scripts."""
    from safetyheads.runs.compare import check_gate, compare_runs, quantities
    from safetyheads.runs.reader import RunReader

    compared = compare_runs(RunReader(run_a), RunReader(run_b))
    known = quantities(compared)
    gates = [check_gate(condition, known) for condition in fail_if or ()]
    if output.json_output:
        numbers = {name: asdict(quantity) for name, quantity in known.items()}
        print_json(asdict(compared) | {"quantities": numbers, "gates": [asdict(gate) for gate in gates]})
    else:
        show_comparison(compared, gates)
    shut = [gate for gate in gates if gate.holds]
    for gate in shut * output.json_output:
        typer.echo(f"failed: {gate_text(gate)}", err=True)
    if shut:
        raise typer.Exit(1)


def history(
    output: OutputOptions,
    folder: Annotated[Path, typer.Argument(help="Folder that holds run directories.", show_default=False)],
) -> None:
    """List every finished run below a folder, oldest first, and write history.html there."""
    from safetyheads.reports.history import write_history
    from safetyheads.runs.history import read_history

    found = read_history(folder)
    path = write_history(found)
    if output.json_output:
        print_json(found.as_dict() | {"page": str(path)})
    else:
        show_history(found)
        stdout().print(f"History: {path}", soft_wrap=True)


def gate_text(gate: GateOutcome) -> str:
    """``asr_increase > 0.1: +0.31 [+0.18, +0.45] (n 48)``."""
    counted = "" if gate.n is None else f" (n {gate.n})"
    is_change = gate.condition.partition(" ")[0].partition(".")[0].endswith("_increase")
    number = signed_text(gate.value, gate.interval) if is_change else f"{gate.value:.3g}"
    return f"{gate.condition}: {number}{counted}"


def show_comparison(compared: Comparison, gates: Sequence[GateOutcome]) -> None:
    """What both runs are, what changed, how heads rank, which came and went, and last what makes that weak."""
    console = stdout()
    for name, run in (("A", compared.before), ("B", compared.after)):
        verdict = "" if run.verdict is None else f", {run.verdict.replace('_', ' ')}"
        started = f", {run.started[:16].replace('T', ' ')}" if run.started else ""
        console.print(f"{name}: {compared.kind} of {run.model}{started}{verdict} ({run.path})", soft_wrap=True)
    console.print(_changes(compared))
    if compared.ranks:
        console.print(_ranks(compared.ranks))
    if compared.lead_ranks is not None:
        for overlap in compared.lead_ranks.overlaps:
            console.print(_top(compared.lead_ranks.label, overlap), soft_wrap=True)
    if compared.heads is not None:
        moved = compared.heads
        parts = [f"{word} {', '.join(getattr(moved, word)) or 'none'}" for word in ("gone", "new", "kept")]
        what = moved.what[:1].upper() + moved.what[1:]
        console.print(f"{what}: {'; '.join(parts)}", soft_wrap=True)
    if compared.shapes_note:
        console.print(compared.shapes_note, soft_wrap=True)
    for warning in compared.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    for gate in gates:
        console.print(f"{'FAILED' if gate.holds else 'passed'}: fail if {gate_text(gate)}", soft_wrap=True)


def _top(label: str, overlap: TopOverlap) -> str:
    """Which heads left and joined the top, and whether ties across the cut made it smaller."""
    gone, new = ", ".join(overlap.gone) or "none", ", ".join(overlap.new) or "none"
    short = [f"{name}'s has {size}" for name, size in zip("AB", overlap.sizes, strict=True) if size < overlap.k]
    ties = f" (without ties across the cut {' and '.join(short)})" if short else ""
    return f"Top {overlap.k} by {label}: gone {gone}; new {new}{ties}"


def _changes(compared: Comparison) -> Table:
    table = Table("", "A", "B", "change [95 %]", "p", "n", "how", title="From A to B")
    for name, label in _CHANGES.items():
        change: Change | None = getattr(compared, name)
        if change is None:
            continue
        if change.change is None:
            table.add_row(label, "", "", "", "", "", change.note)
            continue
        sizes = str(change.n[0]) if change.n[0] == change.n[1] else f"{change.n[0]}, {change.n[1]}"
        how = ": ".join(filter(None, ("paired" if change.paired else "unpaired", change.note)))
        numbers = (_number(change.before), _number(change.after), signed_text(change.change, change.interval))
        table.add_row(label, *numbers, "" if change.p_value is None else f"{change.p_value:.2g}", sizes, how)
    return table


def _ranks(found: Sequence[RankAgreement]) -> Table:
    names = ("score", "heads", "Spearman", "p", "Kendall", "p")
    tops = [f"top {overlap.k} shared (chance), p" for overlap in found[0].overlaps]
    table = Table(*names, *tops, title="How alike the two runs rank the heads")
    for ranks in found:
        shared = (
            f"{overlap.shared} of {_sizes(overlap)} ({overlap.expected:.2g}), {overlap.p_value:.2g}"
            for overlap in ranks.overlaps
        )
        correlations = (ranks.spearman, ranks.spearman_p, ranks.kendall, ranks.kendall_p)
        texts = [_number(value, "+.2f" if at % 2 == 0 else ".2g") for at, value in enumerate(correlations)]
        table.add_row(ranks.label, str(ranks.n), *texts, *shared)
    return table


def _sizes(overlap: TopOverlap) -> str:
    return " and ".join(map(str, dict.fromkeys(overlap.sizes)))


def _number(value: float | None, form: str = ".2f") -> str:
    return "tied" if value is None else format(value, form)


def show_history(found: History) -> None:
    """The runs as a table, and what was skipped."""
    console = stdout()
    names = ("run", "model", "ASR", "change", "group's ASR", "concentration", "top heads")
    table = Table(*names, title=f"Runs below {found.folder}, oldest first ([95 % interval])")
    for entry in found.entries:
        date = "date unknown" if entry.started is None else f"{entry.started:%Y-%m-%d %H:%M}"
        group = "" if entry.group_asr is None else f"{_rate(entry.group_asr)}\n{', '.join(entry.group)}"
        table.add_row(
            f"{entry.name} ({entry.kind})\n{date}",
            entry.model,
            _rate(entry.vanilla_asr),
            _since(entry.change, entry.other_settings),
            group,
            _concentration(entry.concentration),
            ", ".join(entry.top_heads) or "tied",
        )
    console.print(table)
    for skipped in found.skipped:
        console.print(f"skipped {skipped.name}: {one_line(skipped.reason)}", style="yellow", soft_wrap=True)


def _rate(rate: Mapping[str, Any]) -> str:
    """A rate over two lines: whole in a column that six others leave little room."""
    return rate_text(rate).replace(" [", "\n[", 1)


def _since(change: Change | None, other_settings: Sequence[str]) -> str:
    """The change against the run before, and what else differs from it."""
    if change is None:
        return ""
    number = change.note if change.change is None else _signed(change.change, change.interval)
    how = "" if change.paired or change.change is None else "\nunpaired"
    return number + how + (f"\nother {', '.join(other_settings)}" if other_settings else "")


def _concentration(found: Any) -> str:
    return "" if not found or found["value"] is None else _signed(found["value"], found["interval"])


def _signed(value: float, interval: Sequence[float] | None) -> str:
    return signed_text(value, interval).replace(" [", "\n[", 1)

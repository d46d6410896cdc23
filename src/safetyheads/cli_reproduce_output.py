"""What ``reproduce`` prints: the list of experiments, and tables. Owns how a cell is written; computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from safetyheads.cli_output import stdout
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.report_numbers import number

_ROWS_SHOWN = 24


def show_list(lacking: Mapping[str, Sequence[str]]) -> None:
    """Every experiment with what it costs, and what of it is not given."""
    table = Table("name", "what", "what it costs", "needs first", title="The paper's experiments")
    for name, one in EXPERIMENTS.items():
        table.add_row(name, one.title, one.costs, "; ".join(lacking[name]))
    stdout().print(table)


def show_outcomes(results: Mapping[str, Any], names: Sequence[str], report: Path) -> None:
    """The tables of the experiments that were asked for, and where all of it is."""
    console = stdout()
    for outcome in results["experiments"]:
        if outcome["name"] not in names:
            continue
        console.print(f"\n{outcome['name']}: {outcome['title']}", style="bold")
        for reason in outcome["not_meaningful"]:
            console.print(f"Not meaningful on this model. {reason}", style="yellow", soft_wrap=True)
        for table in outcome["tables"]:
            console.print(_table(table))
        for note in outcome["notes"]:
            console.print(note, style="dim", soft_wrap=True)
    console.print(f"\nReport: {report}", soft_wrap=True)


def _table(made: Mapping[str, Any]) -> Table:
    rows = made["rows"]
    left_out = len(rows) - _ROWS_SHOWN
    caption = made["caption"] + (f" {left_out} more rows in the report." if left_out > 0 else "")
    table = Table(title=made["title"], caption=caption)
    for column in made["columns"]:
        table.add_column(column["title"], justify="left" if column["kind"] == "text" else "right")
    for row in rows[:_ROWS_SHOWN]:
        table.add_row(*(cell(row.get(column["key"]), column["kind"]) for column in made["columns"]))
    return table


def cell(value: Any, kind: str) -> str:
    """A cell as text: a measured number with its interval, a quoted one alone."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        if value["value"] is None:
            return "none scored"
        text = cell(value["value"], kind)
        if value["low"] is not None:
            text += f" [{cell(value['low'], kind)}, {cell(value['high'], kind)}]"
        return text
    if kind == "text" or isinstance(value, str):
        return str(value)
    if kind == "count":
        return f"{value:,}"
    if kind == "change":
        return f"{value:+.2f}"
    if kind == "rate":
        return f"{value:.2f}"
    if kind == "p":
        return f"{value:.2g}"
    return number(value)

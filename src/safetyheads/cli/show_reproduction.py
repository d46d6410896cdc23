"""What ``reproduce`` prints: the list of experiments, and tables. Owns how a cell is written; computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from safetyheads.cli.show import one_line, stdout
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.reports.experiments_cells import Cell, cells, finding

_ROWS_SHOWN = 24
_APART = 2
"""Blanks between two columns."""
_WIDEST_TEXT = 36
"""Characters of a line of text in a table."""


def show_list(lacking: Mapping[str, Sequence[str]]) -> None:
    """Every experiment with what it costs, and what of it is not given."""
    console = stdout()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1)
    for name, one in EXPERIMENTS.items():
        said = Text(one.title)
        said.append(f"\n{one.costs}", style="dim")
        if lacking[name]:
            said.append(f"\nneeds first: {'; '.join(lacking[name])}", style="yellow")
        table.add_row(name, said)
    console.print("The paper's experiments, and what each costs\n", style="bold")
    console.print(table)
    console.print(
        "\nH: heads of the model; D: datasets of n prompts; T: templates. Run one with safetyheads reproduce NAME "
        "[MODEL...], or all of them with safetyheads reproduce all.",
        style="dim",
    )


def show_outcomes(
    results: Mapping[str, Any],
    names: Sequence[str],
    report: Path,
    timed: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """What was asked for: the tables of one experiment, or a line each where there are more; then the report.

    Args:
        results: of the run directory.
        names: the experiments that were asked for.
        report: where its pages are.
        timed: tables of what was timed, by experiment, which results leave out.
    """
    console = stdout()
    found = [outcome for outcome in results["experiments"] if outcome["name"] in names]
    if len(names) > 1 and found:
        console.print(_summary(found))
    else:
        for outcome in found:
            _show_outcome(outcome, (timed or {}).get(outcome["name"], ()))
    for name, why in results.get("left_out", {}).items():
        if name in names:
            console.print(f"{name} left out: {one_line(why)}", style="yellow", soft_wrap=True)
    console.print(f"\nReport: {report}", soft_wrap=True)


def _summary(outcomes: Sequence[Mapping[str, Any]]) -> Table:
    """A line an experiment; all tables at once would be hundreds of rows."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1)
    for outcome in outcomes:
        said = Text(outcome["title"])
        said.append(f"\n{finding(outcome)}".rstrip())
        for reason in outcome["not_meaningful"]:
            said.append(f"\nNot meaningful on this model. {reason}", style="yellow")
        table.add_row(outcome["name"], said)
    return table


def _show_outcome(outcome: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> None:
    console = stdout()
    console.print(f"\n{outcome['name']}: {outcome['title']}", style="bold")
    for reason in outcome["not_meaningful"]:
        console.print(f"Not meaningful on this model. {reason}", style="yellow", soft_wrap=True)
    if own := outcome.get("finding"):
        console.print(own, soft_wrap=True)
    for table in outcome["tables"]:
        _show_table(table, console)
    if timed:
        console.print("\nTimed on this machine", style="bold")
    for table in timed:
        _show_table(table, console)
    if outcome["notes"]:
        console.print()
    for note in outcome["notes"]:
        console.print(f"- {note}", soft_wrap=True)


def _show_table(table: Mapping[str, Any], console: Console) -> None:
    console.print()
    console.print(_table(table, console))
    console.print(_caption(table), style="dim")


def _caption(made: Mapping[str, Any]) -> str:
    """With n, where all cells share it, and with how much is not shown."""
    n, left_out = _common_n(made), len(made["rows"]) - _ROWS_SHOWN
    counted = f" n = {n:,} behind every interval." if n is not None else ""
    more = f" {left_out} more row{'s' * (left_out > 1)} in the report." if left_out > 0 else ""
    return f"{made['caption']}{counted}{more}"


def _common_n(made: Mapping[str, Any]) -> int | None:
    found = {value["n"] for row in made["rows"] for value in row.values() if isinstance(value, Mapping)}
    return int(found.pop()) if len(found) == 1 else None


def _table(made: Mapping[str, Any], console: Console) -> Table | Text:
    """Intervals beside their numbers where the terminal is wide enough, else below them, else a paragraph a row."""
    for between in (" ", "\n"):
        lines = _lines(made, between)
        titles = [column["title"] for column in made["columns"]]
        widths = _widths(titles, lines, [column["kind"] == "text" for column in made["columns"]], console.width)
        if widths is not None:
            return _laid_out(made, lines, widths)
    return _stacked(made)


def _lines(made: Mapping[str, Any], between: str) -> list[list[Text]]:
    """The cells of the rows that are shown."""
    columns, has_n, above = made["columns"], _common_n(made) is None, None
    found = []
    for row in made["rows"][:_ROWS_SHOWN]:
        found.append([_written(cell, between, has_n) for cell in cells(row, columns, above)])
        above = row
    return found


def _widths(
    titles: Sequence[str], rows: Sequence[Sequence[Text]], are_text: Sequence[bool], width: int
) -> list[int] | None:
    """Widths of the columns in which no word and no number breaks; None where there is no room for them."""
    least, most = [], []
    for at, (title, is_text) in enumerate(zip(titles, are_text, strict=True)):
        cells_of = [row[at].plain for row in rows]
        words = [word for text in (title, *(cells_of if is_text else ())) for word in text.split()]
        found = [line for text in cells_of for line in text.split("\n")]
        least.append(max(map(len, words if is_text else [*words, *found]), default=1))
        most.append(max(least[-1], *(min(len(line), _WIDEST_TEXT) for line in (title, *found))))
    left = width - sum(least) - _APART * (len(titles) - 1)
    for _ in range(left):
        at = max(range(len(least)), key=lambda at: most[at] / least[at])
        least[at] += least[at] < most[at]
    return least if left >= 0 else None


def _laid_out(made: Mapping[str, Any], lines: Sequence[Sequence[Text]], widths: Sequence[int]) -> Table:
    table = Table(
        title=made["title"],
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _APART - 1, 0, 0),
    )
    for column, width in zip(made["columns"], widths, strict=True):
        table.add_column(column["title"], justify="left" if column["kind"] == "text" else "right", width=width)
    for line in lines:
        table.add_row(*line)
    return table


def _stacked(made: Mapping[str, Any]) -> Text:
    """A paragraph a row, for a table that is wider than the terminal."""
    said, columns = Text(made["title"], style="bold"), made["columns"]
    for row in made["rows"][:_ROWS_SHOWN]:
        shown = list(zip(columns, cells(row, columns), strict=True))
        names = " · ".join(cell.text for column, cell in shown if column["kind"] == "text")
        said.append(f"\n{names}\n", style="bold not dim")
        numbers = [
            f"{column['title']}: {_written(cell, ' ', _common_n(made) is None).plain}"
            for column, cell in shown
            if column["kind"] != "text" and cell.text != "–"
        ]
        said.append("; ".join(numbers), style="not bold")
    return said


def _written(cell: Cell, between: str, has_n: bool) -> Text:
    """A cell: a measured number with its interval, and n where it differs; what the row above said is left out."""
    if cell.quoted:
        return Text(f"{cell.text}{between}quoted", style="italic")
    text = Text("" if cell.again else cell.text)
    parts = [part for part in (cell.interval, cell.n if has_n else "", cell.p) if part]
    return text.append(between + between.join(parts), style="dim") if parts else text

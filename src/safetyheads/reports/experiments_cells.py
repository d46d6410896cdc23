"""Cells and findings of experiments in words: a measured number with its interval and n, a quoted one marked as such.

Owns digits and marks; refuses to know figures and HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetyheads.reports.numbers import FILTERS, number

MAX_ROWS = 3000
"""Rows of a table that a page shows; ``results.json`` has all."""
_TALL = 40
"""Rows above which a table scrolls in its own frame."""
_QUOTED = re.compile(r"\b(paper|quoted)\b", re.IGNORECASE)
"""In the title of a column of quoted numbers."""
_QUOTED_ROW = re.compile(r"\b(in the paper|paper's|quoted)\b|\(paper\)", re.IGNORECASE)
"""In a text of a row of them; a bare ``paper`` may be the judge of that name."""
_NUMBERS = ("rate", "change", "number")
_MOST_SERIES = 5
"""Series whose ranges a finding tells one by one."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table."""

    text: str
    interval: str = ""
    n: str = ""
    p: str = ""
    """Of the number, each with its name; empty where there is none."""
    is_text: bool = False
    quoted: bool = False
    """Whether the number is the paper's, and not measured here."""
    again: bool = False
    """Whether the row above begins with the same."""

    @property
    def of(self) -> str:
        """Interval, n and p in a line, which breaks between them only."""
        return " · ".join(part.replace(" ", "\xa0") for part in (self.interval, self.n, self.p) if part)


@dataclass(frozen=True, slots=True)
class TableShown:
    """A table as the page shows it."""

    title: str
    caption: str
    columns: tuple[tuple[str, bool], ...]
    """Title, and whether it is of text."""
    rows: tuple[tuple[Cell, ...], ...]
    n_more: int
    """Rows that are not shown."""
    quotes: bool
    """Whether a cell is quoted."""

    @property
    def tall(self) -> bool:
        """Whether it scrolls in its own frame."""
        return len(self.rows) > _TALL

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> TableShown:
        """Of an outcome's table."""
        columns = table["columns"]
        rows: list[tuple[Cell, ...]] = []
        for row in table["rows"][:MAX_ROWS]:
            rows.append(tuple(cells(row, columns, table["rows"][len(rows) - 1] if rows else None)))
        return cls(
            table["title"],
            table["caption"],
            tuple((column["title"], column["kind"] == "text") for column in columns),
            tuple(rows),
            len(table["rows"]) - len(rows),
            any(cell.quoted for row in rows for cell in row),
        )


def cells(
    row: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], above: Mapping[str, Any] | None = None
) -> Iterator[Cell]:
    """The cells of a row.

    Args:
        row: an outcome's.
        columns: of its table.
        above: the row before it: what begins alike is marked as said already.
    """
    same = above is not None
    for column in columns:
        key, kind = column["key"], column["kind"]
        value = row.get(key)
        same = same and kind == "text" and above is not None and above.get(key) == value
        if kind == "text":
            # A text that quotes, such as five numbers in one cell.
            quoted = bool(value and _QUOTED.search(column["title"]))
            yield Cell("–" if value in (None, "") else str(value), is_text=True, again=same, quoted=quoted)
        else:
            yield _number_cell(value, kind, is_quoted(row, column, columns))


def is_quoted(row: Mapping[str, Any], column: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a cell is the paper's number: it is no measured one, and its column or its row says so."""
    value = row.get(column["key"])
    if column["kind"] not in _NUMBERS or isinstance(value, Mapping) or value is None:
        return False
    if _QUOTED.search(column["title"]):
        return True
    return any(_QUOTED_ROW.search(str(row.get(other["key"]))) for other in columns if other["kind"] == "text")


def _number_cell(value: Any, kind: str, quoted: bool) -> Cell:
    if isinstance(value, Mapping):
        if value["value"] is None:
            return Cell("not measured", n=f"n {value['n']}")
        has_interval, has_p = value.get("low") is not None, value.get("p") is not None
        return Cell(
            written(value["value"], kind),
            f"[{written(value['low'], kind)}, {written(value['high'], kind)}]" if has_interval else "",
            f"n {value['n']:,}",
            f"p {FILTERS['p_value'](value['p'], '= ')}" if has_p else "",
        )
    if value is None:
        return Cell("–")
    return Cell(written(value, kind), quoted=quoted)


def written(value: Any, kind: str) -> str:
    """A number with the digits of its kind."""
    if isinstance(value, str):
        return value
    if kind == "count":
        return f"{value:,}"
    if kind == "p":
        return str(FILTERS["p_value"](value))
    if kind == "rate":
        return str(FILTERS["two"](value))
    if kind == "change":
        return str(FILTERS["signed"](value))
    return number(value)


# What was found, in a line.


def finding(outcome: Mapping[str, Any]) -> str:
    """The experiment's own sentence. Where it gives none, as older ones do: the range of the first panel's numbers,
    series by series, or without figures of the first table's.
    """
    if own := outcome.get("finding"):
        return str(own)
    said = next(_findings(outcome), "")
    return said[:1].upper() + said[1:]


def _findings(outcome: Mapping[str, Any]) -> Iterator[str]:
    for figure in outcome["figures"]:
        said = _FINDINGS.get(figure["kind"], lambda _: "")(figure)
        if said:
            yield said
    for table in outcome["tables"]:
        for column in table["columns"]:
            values = [row.get(column["key"]) for row in table["rows"]] if column["kind"] in _NUMBERS else []
            measured = [one for one in values if isinstance(one, Mapping)]
            if measured:
                kind, ns = column["kind"], {one["n"] for one in measured}
                span = _span((one["value"] for one in measured), kind)
                yield f"{column['title']}: {span} (n {_between(ns)})."


def _span(values: Iterable[float | None], kind: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "nothing could be scored"
    low, high = written(min(known), kind), written(max(known), kind)
    return low if low == high else f"{low} to {high}"


def _between(ns: Iterable[int]) -> str:
    known = sorted(set(ns))
    return f"{known[0]:,}" if len(known) < 2 else f"{known[0]:,} to {known[-1]:,}"


def _by_series(figure: Mapping[str, Any]) -> str:
    # One panel's: others may be of something else.
    first = figure["points"][0].get("panel") if figure["points"] else None
    points = [point for point in figure["points"] if point.get("panel") == first]
    series: dict[str, list[float | None]] = {}
    for point in points:
        series.setdefault(str(point.get("series") or ""), []).append(point.get("y"))
    kind, n = "rate" if figure["share"] else "number", [p["n"] for p in points if p.get("n") is not None]
    if len(series) > _MOST_SERIES or list(series) == [""]:
        found = _span((value for values in series.values() for value in values), kind)
    else:
        found = "; ".join(f"{name} {_span(values, kind)}" for name, values in series.items())
    where = f" ({first})" if first and first != figure["title"] else ""
    return f"{figure['y']}{where}: {found}{f' (n {_between(n)})' if n else ''}." if series else ""


def _of_heads(figure: Mapping[str, Any]) -> str:
    known = [point for point in figure["points"] if point.get("y") is not None]
    if not known:
        return ""
    best = max(known, key=lambda point: float(point["y"]))
    where = f"{best['layer']}-{best['head']}" + (f" ({best['panel']})" if best.get("panel") else "")
    kind = "rate" if figure["share"] else "number"
    return f"{figure['value'] or figure['y']}: highest {written(best['y'], kind)}, head {where}."


def _of_matrix(figure: Mapping[str, Any]) -> str:
    values = [point.get("value") for point in figure["points"]]
    counts = all(value is None or float(value).is_integer() for value in values)
    found = _span(values, "number" if counts or not figure["share"] else "rate")
    return f"{figure['value']}: {found}." if values else ""


_FINDINGS = {
    "bars": _by_series,
    "lines": _by_series,
    "scatter": _by_series,
    "heads": _of_heads,
    "matrix": _of_matrix,
}

"""What an experiment gives: tables, figures and notes, all plain JSON, so that pages are drawn from a run directory.

A measured number is never without its n; where it has an interval, that goes along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from safetyheads.stats.intervals import Mean, Rate
from safetyheads.stats.testing import PairedDifference, holm_of_tests

Row: TypeAlias = Mapping[str, Any]
Kind: TypeAlias = Literal["text", "rate", "change", "number", "count", "p"]
FigureKind: TypeAlias = Literal["bars", "lines", "heads", "matrix", "attention", "curves", "scatter"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured number."""

    value: float | None
    """None where nothing could be scored."""
    n: int
    """Prompts, or whatever the number is over."""
    low: float | None = None
    """Lower end of the 95 % interval; None where there is none."""
    high: float | None = None
    p: float | None = None
    """Two-sided, where a change was tested."""

    @classmethod
    def of(cls, number: Rate | PairedDifference | Mean | Measured) -> Measured:
        """A rate with Wilson's interval, a paired change with Newcombe's and McNemar's p, a mean with Student's."""
        if isinstance(number, Measured):
            return number
        low, high = number.interval or (None, None)
        if isinstance(number, PairedDifference):
            return cls(number.change, number.n, low, high, number.p_value)
        return cls(number.rate if isinstance(number, Rate) else number.mean, number.n, low, high)


@dataclass(slots=True)
class Outcome:
    """Results of one experiment. It is filled model by model, and written as JSON when the experiment is done."""

    name: str
    title: str
    question: str
    models: list[str] = field(default_factory=list)
    tables: list[Row] = field(default_factory=list)
    """Title, caption, columns (key, title with its unit, kind) and rows: cells by the keys of the columns."""
    figures: list[Row] = field(default_factory=list)
    """Kind, title, caption, titles of x and y, points, and: ``value``, title of the colours of kinds that have them;
    ``logarithmic``, of the x axis, at whose left end an x of 0 stands; ``share``, whether y goes from 0 to 1.

    Points of ``bars`` and ``lines``: x, y, low, high, n, series, panel. ``scatter``: the same, with label. ``curves``:
    x, y, series, panel. ``heads``: layer, head, y, marked, panel. ``matrix``: x, y (both categories), value, low, high,
    text, panel. ``attention``: query and key position, query_token, key_token, value, panel.
    """
    notes: list[str] = field(default_factory=list)
    """What a reader must know, such as that heads were planted."""
    not_meaningful: list[str] = field(default_factory=list)
    """Why models or datasets leave nothing to measure; these have no tables and figures."""
    caption: str = ""
    """What holds for all tables and figures."""
    headline: list[Row] = field(default_factory=list)
    """The numbers to read first: rows of model, label, value and kind (of a column)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that hold for all numbers and that a reader of any table needs."""
    asked: list[Row] = field(default_factory=list)
    """What was asked: rows of model, dataset, asked, n_search, n_test, and the unablated asr and kept."""
    timed: list[Row] = field(default_factory=list)
    """Tables of what was timed on this machine. Kept apart from results, which are the same on every machine."""
    shown: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """How tables and figures are shown, and notes: their entries in the catalogue. No part of the results."""

    def table(self, key: str, rows: Sequence[Row], *more: Sequence[str], **words: Any) -> None:
        """Append the table of that key in the catalogue; columns without cells are left out.

        Rows hold cells by the keys of the columns, and may hold others whose keys begin with _. ``more`` are columns
        (key, title, kind) that depend on the run; ``words`` are for the title and the caption.
        """
        entry = self.shown["tables"][key]
        if entry.get("holm"):
            p_values = holm_of_tests(row["change"] and row["change"].p for row in rows)
            rows = [{**row, "p": p} for row, p in zip(rows, p_values, strict=True)]
        columns = [
            dict(zip(("key", "title", "kind"), (*column, "text"), strict=False))
            for given in entry["columns"]
            for column in (more if given == "..." else [given])
            if not rows or any(column[0] in row for row in rows)
        ]
        table = {part: entry.get(part, "").format(**words) for part in ("title", "caption")} | {"columns": columns}
        table["rows"] = [{name: cell for name, cell in row.items() if not name.startswith("_")} for row in rows]
        (self.timed if entry.get("timed") else self.tables).append(table)

    def figure(self, key: str, points: Iterable[Row], **words: Any) -> None:
        """Append the figure of that key in the catalogue; ``words`` are for its texts."""
        texts = {
            name: text.format(**words) if isinstance(text, str) else text
            for name, text in self.shown["figures"][key].items()
        }
        plain = {"caption": "", "value": "", "logarithmic": False, "share": True}
        self.figures.append({**plain, **texts, "points": list(points)})

    def note(self, *notes: str) -> None:
        """Append notes that are not there yet."""
        self.notes = list(dict.fromkeys((*self.notes, *notes)))

    def say(self, key: str, **words: Any) -> None:
        """Append the note of that key in the catalogue; ``words`` are for its text."""
        self.note(self.shown["notes"][key].format(**words))

    def leave_out(self, model: str, *reasons: str) -> None:
        """Note a model that was asked, and why what it gives is not meaningful."""
        self.models = list(dict.fromkeys((*self.models, model)))
        self.not_meaningful = list(dict.fromkeys((*self.not_meaningful, *reasons)))

    def lead(self, model: str, label: str, value: Measured | float, kind: Kind = "rate") -> None:
        """Append a row to the headline."""
        self.headline.append({"model": model, "label": label, "value": value, "kind": kind})

    def lead_means(self, model: str, numbers: Iterable[tuple[str, Measured]], kind: Kind = "rate") -> None:
        """Append the mean of the numbers of each label, such as rates of several datasets."""
        by_label: dict[str, list[Measured]] = {}
        for label, number in numbers:
            by_label.setdefault(label, []).append(number)
        for label, of_label in by_label.items():
            self.lead(model, label, mean_of(of_label), kind)

    def as_dict(self) -> dict[str, Any]:
        """The outcome as ``results.json`` holds it: without times."""
        return {name: value for name, value in asdict(self).items() if name not in ("timed", "shown")}


def point(number: Rate | PairedDifference | Mean | Measured, **where: Any) -> dict[str, Any]:
    """A point of a figure: its place, and the number with interval and n."""
    measured = Measured.of(number)
    return {**where, "y": measured.value, "low": measured.low, "high": measured.high, "n": measured.n}


def mean_of(numbers: Iterable[Measured]) -> Measured:
    """The mean of the numbers that were scored, such as rates of several datasets; n is the sum of theirs."""
    known = [(number.value, number.n) for number in numbers if number.value is not None]
    return Measured(sum(value for value, _ in known) / len(known) if known else None, sum(n for _, n in known))

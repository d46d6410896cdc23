"""What an experiment gives: tables, figures and notes, all plain JSON, so that pages are drawn from a run directory.

A measured number is never without its n; where it has an interval, that goes along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from safetyheads.stats.intervals import Mean, Rate
from safetyheads.stats.testing import PairedDifference

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
    """Upper end."""
    p: float | None = None
    """Two-sided, where a change was tested."""

    @classmethod
    def of(cls, number: Rate | PairedDifference | Mean | Measured) -> Measured:
        """A rate with Wilson's interval, a paired change with Newcombe's and McNemar's p, a mean with Student's."""
        if isinstance(number, Measured):
            return number
        low, high = number.interval or (None, None)
        if isinstance(number, Rate):
            return cls(number.rate, number.n, low, high)
        if isinstance(number, Mean):
            return cls(number.mean, number.n, low, high)
        return cls(number.change, number.n, low, high, number.p_value)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    key: str
    """Key of its cells in the rows."""
    title: str
    """Title, with the unit where there is one."""
    kind: Kind = "text"
    """``rate``, ``change`` and ``number`` cells are :class:`Measured`, or plain numbers where they are quoted."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table."""

    title: str
    caption: str
    """What holds for this table alone; may be empty."""
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure. The fields of its points follow from the kind.

    ``bars`` and ``lines``: x, y, low, high, n, series, panel. ``scatter``: the same, with label. ``curves``: x, y,
    series, panel. ``heads``: layer, head, y, marked, panel. ``matrix``: x, y (both categories), value, low, high,
    text, panel. ``attention``: query and key position, query_token, key_token, value, panel.
    """

    kind: FigureKind
    title: str
    caption: str
    """What holds for this figure alone; may be empty."""
    x: str
    """Title of the axis, with its unit."""
    y: str
    """Title of the axis, with its unit."""
    points: tuple[Row, ...]
    value: str = ""
    """Title of the colours, with their unit, of kinds that have them."""
    logarithmic: bool = False
    """Whether the x axis is logarithmic; an x of 0 stands at its left end."""
    share: bool = True
    """Whether y goes from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Shown:
    """How tables and figures are shown: entries of catalogue.toml, by their keys."""

    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Title and kind of columns that many tables have."""

    def columns_of(self, table: str, rows: Sequence[Row], more: Iterable[Sequence[str]]) -> Iterator[Column]:
        """The columns of a table, ``more`` in the place of ``...``; those without cells are left out."""
        for given in self.tables[table]["columns"]:
            for column in more if given == "..." else [given]:
                key, *rest = [column, *self.columns.get(column, (column,))] if isinstance(column, str) else column
                if not rows or any(key in row for row in rows):
                    yield Column(key, *rest)


@dataclass(slots=True)
class Outcome:
    """Results of one experiment. It is filled model by model, and written as JSON when the experiment is done."""

    name: str
    """Name in the catalogue."""
    title: str
    question: str
    """Question that the experiment asks."""
    models: Sequence[str] = field(default_factory=list)
    """Models that were asked."""
    tables: Sequence[Table] = field(default_factory=list)
    figures: Sequence[Figure] = field(default_factory=list)
    notes: Sequence[str] = field(default_factory=list)
    """What a reader must know, such as that heads were planted."""
    not_meaningful: Sequence[str] = field(default_factory=list)
    """Why models or datasets leave nothing to measure; these have no tables and figures."""
    caption: str = ""
    """What holds for all tables and figures."""
    headline: Sequence[Row] = field(default_factory=list)
    """The numbers to read first: rows of model, label, value and kind (of a column)."""
    settings: Row = field(default_factory=dict)
    """Settings that hold for all numbers."""
    asked: Sequence[Row] = field(default_factory=list)
    """What was asked: rows of model, dataset, asked, n_search, n_test, and the unablated asr and kept."""
    timed: Sequence[Table] = field(default_factory=list)
    """What was timed on this machine. Kept apart from results, which are the same on every machine."""

    shown: Shown = field(default_factory=Shown)
    """How its tables and figures are shown; no part of the results."""

    def table(self, key: str, rows: Sequence[Row], *more: Sequence[str], **words: Any) -> None:
        """Append a table.

        Args:
            key: of the table in the catalogue.
            rows: cells by the keys of the columns; keys that begin with _ are left out.
            more: key, title and kind of columns that depend on the run.
            words: for the title and the caption.
        """
        entry, columns = self.shown.tables[key], tuple(self.shown.columns_of(key, rows, more))
        title, caption = (entry.get(part, "").format(**words) for part in ("title", "caption"))
        cells = tuple({name: cell for name, cell in row.items() if not name.startswith("_")} for row in rows)
        table = Table(title, caption, columns, cells)
        if entry.get("timed"):
            self.timed = [*self.timed, table]
        else:
            self.tables = [*self.tables, table]

    def figure(self, key: str, points: Iterable[Row], **words: Any) -> None:
        """Append the figure of that key in the catalogue; ``words`` are for its texts."""
        entry = {"caption": "", **self.shown.figures[key]}
        texts: dict[str, Any] = {
            name: text.format(**words) if isinstance(text, str) else text for name, text in entry.items()
        }
        self.figures = [*self.figures, Figure(points=tuple(points), **texts)]

    def note(self, *notes: str) -> None:
        """Append notes that are not there yet."""
        self.notes = list(dict.fromkeys((*self.notes, *notes)))

    def leave_out(self, model: str, *reasons: str) -> None:
        """Note a model that was asked, and why what it gives is not meaningful."""
        self.models = list(dict.fromkeys((*self.models, model)))
        self.not_meaningful = list(dict.fromkeys((*self.not_meaningful, *reasons)))

    def lead(self, model: str, label: str, value: Measured | float, kind: Kind = "rate") -> None:
        """Append a row to the headline."""
        self.headline = [*self.headline, {"model": model, "label": label, "value": value, "kind": kind}]

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
    known = [number for number in numbers if number.value is not None]
    return Measured(
        sum(number.value or 0.0 for number in known) / len(known) if known else None, sum(number.n for number in known)
    )

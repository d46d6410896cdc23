"""What an experiment gives: tables, figures and notes, all plain JSON, so that pages are drawn from a run directory.

A measured number is never without its n; where it has an interval, that goes along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from safetyheads.stats.intervals import Mean, Rate
from safetyheads.stats.testing import PairedDifference

Row: TypeAlias = Mapping[str, Any]
Kind: TypeAlias = Literal["text", "rate", "change", "number", "count", "p"]
ColumnLike: TypeAlias = str | tuple[str, str] | tuple[str, str, Kind]
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


_COMMON = {
    column.key: column
    for column in (
        Column("asr", "ASR", "rate"),
        Column("change", "change", "change"),
        Column("p", "p (Holm)", "p"),
        Column("empty", "incoherent", "rate"),
        Column("kept", "benign kept", "rate"),
    )
}


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

    def table(self, title: str, rows: Iterable[Row], *shown: ColumnLike, caption: str = "") -> None:
        """Append a table.

        Args:
            title: of the table.
            rows: cells by the keys of the columns; keys that begin with _ are left out.
            shown: key, title and, unless of text, kind of each column; or a key, of a common column or of a text.
            caption: what holds for this table alone.
        """
        columns = tuple(Column(*one) if isinstance(one, tuple) else _COMMON.get(one, Column(one, one)) for one in shown)
        cells = tuple({key: value for key, value in row.items() if not key.startswith("_")} for row in rows)
        self.tables = [*self.tables, Table(title, caption, columns, cells)]

    def figure(
        self, kind: FigureKind, title: str, axes: tuple[str, str], points: Iterable[Row], caption: str = "", **more: Any
    ) -> None:
        """Append a figure; ``axes`` are the titles of x and y, ``more`` are other fields of :class:`Figure`."""
        self.figures = [*self.figures, Figure(kind, title, caption, *axes, tuple(points), **more)]

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

    def as_dict(self) -> dict[str, Any]:
        """The outcome as ``results.json`` holds it: without times."""
        return {name: value for name, value in asdict(self).items() if name != "timed"}


def point(number: Rate | PairedDifference | Mean | Measured, **where: Any) -> dict[str, Any]:
    """A point of a figure: its place, and the number with interval and n."""
    measured = Measured.of(number)
    return {**where, "y": measured.value, "low": measured.low, "high": measured.high, "n": measured.n}


def mean_of(numbers: Iterable[Measured]) -> Measured:
    """The mean of the numbers that were scored, such as rates of several datasets; n is the sum of theirs."""
    known = [one for one in numbers if one.value is not None]
    return Measured(sum(one.value or 0.0 for one in known) / len(known) if known else None, sum(one.n for one in known))

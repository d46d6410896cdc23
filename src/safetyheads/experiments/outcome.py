"""What an experiment gives: tables, figures, and what must be said with them. Owns the values; knows no model.

All of it is plain JSON, so that a report is drawn from a run directory alone. A measured number is never without its
n; where it has an interval, that goes along.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from safetyheads.stats.intervals import Mean, Rate
from safetyheads.stats.testing import PairedDifference

Row: TypeAlias = Mapping[str, Any]
Kind: TypeAlias = Literal["text", "rate", "change", "number", "count", "p"]
FigureKind: TypeAlias = Literal["bars", "lines", "heads", "matrix", "attention", "curves", "scatter"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A number that was measured."""

    value: float | None
    """None where nothing could be scored."""
    n: int
    """Prompts, or whatever it is over."""
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval; None where there is none."""
    p: float | None = None
    """Two-sided, where a change was tested."""

    @classmethod
    def of(cls, found: Rate | PairedDifference | Mean) -> Measured:
        """A rate with Wilson's interval, a paired change with Newcombe's and McNemar's p, a mean with Student's."""
        low, high = found.interval or (None, None)
        if isinstance(found, Rate):
            return cls(found.rate, found.n, low, high)
        if isinstance(found, Mean):
            return cls(found.mean, found.n, low, high)
        return cls(found.change, found.n, low, high, found.p_value)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    key: str
    """Under which rows hold its cells."""
    title: str
    """With its unit, where it has one."""
    kind: Kind = "text"
    """``rate``, ``change`` and ``number`` cells are :class:`Measured`, or plain numbers where they are quoted."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table; ``caption`` says what n is and what intervals are."""

    title: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure. Points are rows; which fields they have follows from the kind.

    ``bars`` and ``lines``: x, y, low, high, n, series, panel. ``scatter``: the same, with label. ``curves``: x, y,
    series, panel. ``heads``: layer, head, y, marked, panel. ``matrix``: x, y (both categories), value, low, high,
    text, panel. ``attention``: query and key position, query_token, key_token, value, panel.
    """

    kind: FigureKind
    title: str
    caption: str
    x: str
    """Title of the axis, with its unit."""
    y: str
    points: tuple[Row, ...]
    value: str = ""
    """Title of the colours, with their unit, of kinds that have them."""
    logarithmic: bool = False
    """Whether x is drawn so; x of 0 stands at its left end."""
    share: bool = True
    """Whether y goes from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One experiment, done."""

    name: str
    """As the catalogue has it."""
    title: str
    question: str
    """What it asks, in one or two sentences."""
    models: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know, such as that a construction made it so."""
    not_meaningful: tuple[str, ...] = ()
    """Reasons; with any there is no table and no figure of that model, and with no other model none at all."""
    finding: str = ""
    """What came out, in one sentence with numbers; an index has room for no more."""
    setting: str = ""
    """Strength of ablations, judge and length of answers, in one line."""
    timed: tuple[Table, ...] = ()
    """What was timed on this machine: kept apart from results, which are the same on every machine."""

    def as_dict(self) -> dict[str, Any]:
        """As ``results.json`` holds it; times are left out."""
        return {name: value for name, value in asdict(self).items() if name != "timed"}


@dataclass(slots=True)
class Draft:
    """An outcome being put together, model by model."""

    models: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_meaningful: list[str] = field(default_factory=list)
    timed: list[Table] = field(default_factory=list)
    finding: str = ""

    def finished(self, name: str, title: str, question: str) -> Outcome:
        """The outcome under its name."""
        parts: dict[str, Any] = {}
        for each in self.__dataclass_fields__:
            value = getattr(self, each)
            once = dict.fromkeys(value) if each in _SAID_ONCE else value
            parts[each] = value if isinstance(value, str) else tuple(once)
        return Outcome(name, title, question, **parts)


_SAID_ONCE = ("models", "notes", "not_meaningful")

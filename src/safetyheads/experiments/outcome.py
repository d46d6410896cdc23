"""What an experiment gives: tables, figures and notes, all plain JSON, so that pages are drawn from a run directory.

A measured number is never without its n; where it has an interval, that goes along.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, TypeAlias

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
    def of(cls, number: "Number") -> "Measured":
        """A rate with Wilson's interval, a paired change with Newcombe's and McNemar's p, a mean with Student's."""
        if isinstance(number, Measured):
            return number
        low, high = number.interval or (None, None)
        if isinstance(number, PairedDifference):
            return cls(number.change, number.n, low, high, number.p_value)
        return cls(number.rate if isinstance(number, Rate) else number.mean, number.n, low, high)

    @classmethod
    def spread(cls, values: Iterable[float | None], n: int | None = None) -> Self:
        """Mean of several numbers, such as those of random groups; in place of an interval, the lowest and highest."""
        known = [value for value in values if value is not None]
        n = len(known) if n is None else n
        return cls(sum(known) / len(known), n, min(known), max(known)) if known else cls(None, n)


Number: TypeAlias = Rate | PairedDifference | Mean | Measured


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

        Of each row the cells of columns are kept, and its ``name`` in results. ``more`` are columns (key, title, kind)
        that depend on the run; ``words`` are for the title and the caption.
        """
        entry = self.shown["tables"][key]
        columns = [column for given in entry["columns"] for column in (more if given == "..." else [given])]
        keys = {"name", *(column[0] for column in columns)}
        rows = [{key: _cell(cell) for key, cell in row.items() if key in keys} for row in rows]
        if entry.get("holm"):
            p_values = holm_of_tests(row["change"] and row["change"].p for row in rows)
            rows = [{**row, "p": p} for row, p in zip(rows, p_values, strict=True)]
        table = {part: entry.get(part, "").format(**words) for part in ("title", "caption")} | {"rows": rows}
        table["columns"] = [
            dict(zip(("key", "title", "kind"), (*column, "text"), strict=False))
            for column in columns
            if not rows or any(column[0] in row for row in rows)
        ]
        (self.timed if entry.get("timed") else self.tables).append(table)

    def figure(self, key: str, rows: Iterable[Row], **words: Any) -> None:
        """Append the figure of that key in the catalogue; ``words`` are for its texts.

        Rows are points, or where the entry says so hold cells that points are made of (:func:`points_of`).
        """
        entry = {"caption": "", "value": "", "logarithmic": False, "share": True, **self.shown["figures"][key]}
        of, place = entry.pop("of", None), entry.pop("place", {})
        texts = {name: text.format(**words) if isinstance(text, str) else text for name, text in entry.items()}
        points = rows if of is None else points_of(rows, of, place, entry["kind"])
        self.figures.append({**texts, "points": list(points)})

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

    def lead(self, model: str, label: str, value: Number | float, kind: Kind = "rate") -> None:
        """Append a row to the headline."""
        self.headline.append({"model": model, "label": label, "value": _cell(value), "kind": kind})

    def lead_means(self, model: str, numbers: Iterable[tuple[str, Number]], kind: Kind = "rate") -> None:
        """Append the mean of the numbers of each label, such as rates of several datasets."""
        by_label: dict[str, list[Number]] = {}
        for label, number in numbers:
            by_label.setdefault(label, []).append(number)
        for label, of_label in by_label.items():
            self.lead(model, label, mean_of(of_label), kind)

    def as_dict(self) -> dict[str, Any]:
        """The outcome as ``results.json`` holds it: without times."""
        return {name: value for name, value in asdict(self).items() if name not in ("timed", "shown")}


def _cell(cell: Any) -> Any:
    return Measured.of(cell) if isinstance(cell, Rate | PairedDifference | Mean) else cell


def points_of(
    rows: Iterable[Row], of: Mapping[str, str], place: Mapping[str, str], kind: FigureKind
) -> Iterator[dict[str, Any]]:
    """A point of each row and each of its cells that ``of`` names.

    ``place`` says where it stands: by the key of another cell, or by a text with such keys in braces; ``{of}`` is the
    name, in which braces may stand too.
    """
    for row in rows:
        for key, name in of.items():
            if row.get(key) is not None:
                cells = {**row, "of": name.format(**row)}
                drawn = point(row[key])
                if kind == "heads":  # whose squares have no room for intervals
                    del drawn["low"], drawn["high"]
                if kind == "matrix":
                    value = drawn["value"] = drawn.pop("y")
                    drawn["text"] = "–" if value is None else f"{value:+.2f}"
                where = {field: cells[text] if text in cells else text.format(**cells) for field, text in place.items()}
                yield drawn | where


def point(number: Number, **where: Any) -> dict[str, Any]:
    """A point of a figure: its place, and the number with interval and n."""
    measured = Measured.of(number)
    return {**where, "y": measured.value, "low": measured.low, "high": measured.high, "n": measured.n}


def mean_of(numbers: Iterable[Number]) -> Measured:
    """The mean of the numbers that were scored, such as rates of several datasets; n is the sum of theirs."""
    known = [(number.value, number.n) for number in map(Measured.of, numbers) if number.value is not None]
    return Measured(sum(value for value, _ in known) / len(known) if known else None, sum(n for _, n in known))

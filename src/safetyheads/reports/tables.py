"""Tables as data, which templates declare row by row: pages show them as HTML, the command line on a terminal."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

Facts: TypeAlias = Mapping[str, Any]
"""Results or a part of them, as JSON; a comparison also has ``quantities``, ``gates`` and ``exit_code``."""

# Numbers.


def two(value: float) -> str:
    """Two decimals; what rounds to nothing has no sign, for "−0.00" would be read as a loss."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def signed(value: float) -> str:
    """Two decimals with a sign."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("+0.00", "0.00").replace("-", "−")


def number(value: float | None, sign: bool = False, digits: int = 3) -> str:
    """Significant digits, no exponent down to a ten-thousandth; a dash for None."""
    if value is None:
        return "–"
    size = abs(value)
    text = f"{size:.2g}" if 0 < size < 1e-4 else f"{size:.{digits}g}" if round(size) < 10**digits else f"{size:.0f}"
    minus = "−" if value < 0 else "+" if sign and value > 0 else ""
    return minus + re.sub(r"e-0?(\d+)$", r"e−\1", text)


def interval(bounds: Sequence[float] | None, write: Callable[[float], str] = two) -> str:
    """Both ends in brackets; empty for None."""
    return f"[{write(bounds[0])}, {write(bounds[1])}]" if bounds else ""


def p_value(value: float | None, equals: str = "") -> str:
    """Two or three decimals, or that it is below a thousandth."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else equals + (f"{value:.3f}" if value < 0.1 else f"{value:.2f}")


def rate_words(rate: Facts) -> str:
    """A rate with its interval, for a sentence."""
    return f"{'–' if rate['rate'] is None else two(rate['rate'])} {interval(rate['interval'])}".strip()


# Cells.


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: a text, or a number with what belongs to it."""

    text: str = "–"
    interval: str = ""
    n: str = ""
    """``n 96``, or of what else the number is."""
    p: str = ""
    """Of the number; empty where there is none."""
    on_page: str = ""
    """What a page says in the place of n, such as ``94/96``."""
    tone: str = ""
    """Class of its colour: ``yes``, ``less`` or ``soft``."""
    is_text: bool = False
    before: str = ""
    mark: str = ""
    """Beside the name of a row, such as ``planted``."""
    quoted: bool = False
    """Whether the number is the paper's, and not measured here."""
    again: bool = False
    """Whether the row above begins with the same."""

    @property
    def of(self) -> str:
        """On a page: interval, n and p in a line, which breaks between them only."""
        whole = [part.replace(" ", "\xa0") for part in (self.interval, self.n, self.p)]
        return "\u2002".join(filter(None, (whole[0], self.on_page or whole[1], whole[2])))


NOTHING = Cell()


def rate_cell(rate: Facts | None, with_interval: bool = True) -> Cell:
    """A rate with its interval and counts."""
    if not rate or rate["rate"] is None:
        return NOTHING
    n = f"n {rate['n']:,}" if rate.get("n") else ""
    counts = f"{rate['count']}/{rate['n']}" if "count" in rate else ""
    return Cell(two(rate["rate"]), interval(rate["interval"]) if with_interval else "", n, on_page=counts)


def mean_cell(mean: Facts | None, sign: bool = False) -> Cell:
    """A mean with its interval; of a score, whose mean has none, the median with its own."""
    if not mean or mean["mean"] is None:
        return NOTHING
    write = partial(number, sign=sign, digits=2)
    if mean.get("median") is not None:
        around = f"median\xa0{write(mean['median'])} {interval(mean['median_interval'], write)}".strip()
        around = around.replace(", ", ",\xa0")
        return Cell(number(mean["mean"], sign), on_page=around)
    return Cell(number(mean["mean"], sign), interval(mean["interval"], write))


def change_cell(change: Facts | None, with_p: bool = True) -> Cell:
    """A paired change with its interval and p."""
    if not change or change["change"] is None:
        return NOTHING
    p = f"p {p_value(change['p_value'], '= ')}" if with_p and change["p_value"] is not None else ""
    return Cell(signed(change["change"]), interval(change["interval"], signed), p=p)


def value_cell(
    value: float | None, bounds: Sequence[float] | None = None, write: Callable[[float], str] = two, **beside: Any
) -> Cell:
    """A number with its interval, and what else stands beside it."""
    return NOTHING if value is None else Cell(write(value), interval(bounds, write), **beside)


def random_cell(random: Facts | None) -> Cell:
    """Mean and range of the random groups, how many of which layers, p, and the least p that so many can show."""
    if not random:
        return NOTHING
    ends = f"{two(min(random['asr']))} to {two(max(random['asr']))}" if random["asr"] else ""
    drawn = f"{'all ' * random['all']}{random['n_groups']} of {random['matched']}"
    p = f"p {p_value(random['p_value'], '= ')}, least {p_value(random['least_p'])}"
    return Cell(two(random["mean"]), ends, drawn, p)


# Words.


def concentration_words(results: Facts) -> str:
    """How far the searched groups' ASR lies above that of random ones; empty where that was not measured."""
    found = results.get("concentration")
    if not found or found["value"] is None:
        return ""
    sizes = f"1 to {max(found['sizes'])} heads" if len(found["sizes"]) > 1 else "one head"
    random = f", at least {found['n_random']} of each size" if found["n_random"] else ""
    return (
        f"Concentration: {two(found['value'])} {interval(found['interval'])}: how far the ASR under the groups that "
        f"the search found lies above that of {found['against']}{random}, on average over groups of {sizes}; "
        f"n = {found['n']} prompts. 1: the first head frees every prompt and no random head any."
    )


def coherence_words(results: Facts) -> str:
    """What a coherent answer is."""
    limit = results["coherence"]["limit"]
    surprise = "" if limit is None else f" and their surprise is at most {two(limit)} nats a token"
    return f"Answers are coherent if no rule of words finds a fault{surprise}."


def sentence_case(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


# Tables.


class Column(NamedTuple):
    """The head of a column."""

    title: str
    small: str = ""
    """Small print below the title."""
    is_text: bool = False
    """Whether its cells stand left."""
    where: str = ""
    """``+`` on pages alone, ``-`` on a terminal alone."""


class Table(NamedTuple):
    """A table as data."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any] | str]
    """Cells, or what else a terminal draws; a text is a heading over the rows below it."""
    note: str = ""
    chosen: frozenset[int] = frozenset()
    """Places of the rows that stand out."""
    first: int = 24
    """Rows that a terminal shows; with 0 it has no room for the table."""


def _column(words: str) -> Column:
    where = words[:1] if words[:1] in ("+", "-") else ""
    title, _, small = words.removeprefix(where).partition("|")
    return Column(title, small, where=where)


class TableMaker:
    """Makes tables of what templates say: a block names the cells of a row, and is called for each record."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        """By the id of their place on the page, in its order."""
        self._row: list[Cell] = []

    def td(self, cell: Any, **beside: Any) -> str:
        """Say the next cell of a row, which is drawn with the whole table: a number, a text or names."""
        if isinstance(cell, int | float):
            cell = Cell(f"{cell:,}")
        elif not isinstance(cell, Cell):
            text = cell if isinstance(cell, str) else ", ".join(cell or ())
            cell = Cell(text, is_text=True) if text else NOTHING
        self._row.append(replace(cell, **beside) if beside else cell)
        return ""

    def table(
        self,
        name: str,
        title: str,
        records: Sequence[Any],
        titles: Sequence[str | Column],
        row: Callable[[Any], object],
        chosen: Sequence[Any] = (),
        note: str = "",
        first: int = 0,
    ) -> Table:
        """The table with a row for each record, which ``row`` says; a text among them is a heading over those below it.

        ``titles``: "Title" or "Title|small print", with a "+" before what stands on pages alone, and a "-" before
        what stands on a terminal alone. A column without any cell is left out.
        """
        rows: list[list[Cell] | str] = []
        for record in records:
            self._row = []
            row(record) if not isinstance(record, str) else None
            rows.append(record if isinstance(record, str) else self._row)
        columns, kept = list[Column](), list[int]()
        for at, words in enumerate(titles):
            cells = [found[at] for found in rows if not isinstance(found, str)]
            if any(cell != NOTHING for cell in cells):
                column = words if isinstance(words, Column) else _column(words)
                columns.append(column._replace(is_text=any(cell.is_text for cell in cells)))
                kept.append(at)
        rows = [found if isinstance(found, str) else [found[at] for at in kept] for found in rows]
        marked = frozenset(at for at, record in enumerate(records) if record in chosen)
        self.tables[name] = Table(title, columns, rows, note, marked, first)
        return self.tables[name]

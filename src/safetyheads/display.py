"""How values show: a short repr, a table in a notebook, a pandas table, a chart; never an answer's text."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from safetyheads.errors import InputError, shorten

if TYPE_CHECKING:
    import altair
    import pandas

Chart: TypeAlias = "altair.LayerChart | altair.FacetChart"
_WIDTH = 80
Row: TypeAlias = Mapping[str, Any]
"""A row of a table: column -> a number, a text or None."""


class Shown:
    """Shows its :meth:`facts` in a line, or as a small table in a notebook."""

    __slots__ = ()

    def _facts(self) -> Mapping[str, object]:
        """What is shown, by name: the fields of a dataclass that its repr has."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.repr}  # type: ignore[arg-type]

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={shorten(str(value), _WIDTH)}" for name, value in self._facts().items())
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        cells = [(html.escape(name), html.escape(shorten(str(value), _WIDTH))) for name, value in self._facts().items()]
        rows = "".join(f'<tr><th style="text-align:left">{name}</th><td>{value}</td></tr>' for name, value in cells)
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


class Table(Shown):
    """A value that is a table of rows too."""

    __slots__ = ()

    def to_rows(self) -> list[dict[str, Any]]:
        """The rows, without an answer's text."""
        raise NotImplementedError

    def to_frame(self) -> "pandas.DataFrame":
        """The rows as a pandas table, without an answer's text."""
        try:
            import pandas
        except ImportError:
            raise InputError("tables need pandas: pip install 'safetyheads[pandas]'") from None
        return pandas.DataFrame(self.to_rows())


def rate_row(rate: Row) -> dict[str, Any]:
    """An ASR as columns: the rate, its 95 % interval, counts."""
    low, high = rate["interval"] or (None, None)
    return {"asr": rate["rate"], "low": low, "high": high, "count": rate["count"], "n": rate["n"]}


def chart(kind: Literal["map", "curve", "scatter"], rows: Sequence[Row], x: str, y: str, value: str) -> Chart:
    """The rows as a chart for a notebook: a tile for each ``x`` and ``y``, or points with ``low`` to ``high``.

    ``value`` is the colour of a tile, and the series of a curve or scatter.
    """
    import altair  # takes a second

    if not rows:
        raise InputError("there is nothing to plot: no value is given")
    base = altair.Chart(altair.InlineData([dict(row) for row in rows])).encode(
        tooltip=[altair.Tooltip(field=name, type="nominal") for name in rows[0]]
    )
    if kind == "map":
        tiles = base.mark_rect().encode(
            altair.X(x, type="ordinal"), altair.Y(y, type="ordinal"), altair.Color(value, type="quantitative")
        )
        return altair.layer(tiles)
    points = base.encode(altair.X(x, type="quantitative"), color=altair.Color(value, type="nominal"))
    up = altair.Y(y, type="quantitative", scale=altair.Scale(zero=kind == "curve"))
    layers = [points.mark_point(filled=True).encode(up)]
    if any("low" in row for row in rows):
        layers.insert(0, points.mark_rule().encode(altair.Y("low", type="quantitative", title=y), altair.Y2("high")))
    return altair.layer(*layers, *[points.mark_line().encode(up)] * (kind == "curve"))

"""Axes and series of the experiments' figures: where a number stands, and what tells one series from another.

Owns scales, ticks and titles; refuses to know kinds of figures, colours themselves (one is the name of a custom
property of the page) and experiments.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import altair as alt

from safetyheads.reports.drawing import LINE_COLOURS, LINE_SHAPES

Row: TypeAlias = Mapping[str, Any]
Mark: TypeAlias = Literal["bar", "line", "point", "curve"]

_GREY = "--random"
_KNOWN = {
    **dict.fromkeys(("vanilla", "unablated", "other", "random groups", "random heads"), _GREY),
    **dict.fromkeys(("UA", "planted", "Sahara's group"), LINE_COLOURS[0]),
    **dict.fromkeys(("SC", "benign answers kept"), LINE_COLOURS[1]),
}
"""Series that have one colour on every page, unless another of the figure has it."""
_DASHES = ([1, 0], [6, 4], [2, 3])
_OPACITIES = (0.72, 0.4, 0.2)
_APART = 0.011
"""Share of the axis between two series at one number: the width of a point."""
_TITLE_WIDTH = 42
"""Characters of a line of an axis title: what a panel holds on a phone."""
_LEAST_GAP = 0.5
"""Decades between 0 and the smallest number on a logarithmic axis."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Key:
    """How a series is drawn, and its entry in the legend."""

    name: str
    identity: str
    """What specifications call it, whatever it is named."""
    colour: str
    shape: str
    dash: Sequence[int]
    opacity: float
    """Of bars, which have no dashes."""
    mark: Mark


def keys(names: Iterable[str], mark: Mark) -> tuple[Key, ...]:
    """A look for each series, in order of appearance; with more than five, dashes and shapes tell them apart too."""
    named = list(dict.fromkeys(names))
    turns = range(1 + len(named) // len(LINE_COLOURS) + 1)
    looks = [(at, turn) for turn in turns for at in range(len(LINE_COLOURS))]
    known: dict[str, str] = {}
    for name in named:
        if name in _KNOWN and _KNOWN[name] not in known.values():
            known[name] = _KNOWN[name]
    taken = set(known.values())
    # Two greys would be one.
    taken |= {LINE_COLOURS[-1]} if _GREY in taken else set()
    free = iter([look for look in looks if look[1] or LINE_COLOURS[look[0]] not in taken])
    found = []
    for number, name in enumerate(named):
        identity = f"s{number}"
        if name in known:
            colour = known[name]
            shape = LINE_SHAPES[LINE_COLOURS.index(colour)] if colour in LINE_COLOURS else "circle"
            found.append(Key(name, identity, colour, shape, _DASHES[0], _OPACITIES[0], mark))
            continue
        at, turn = next(free)
        look = turn % len(_DASHES)
        shape = LINE_SHAPES[(at + turn) % len(LINE_SHAPES)]
        found.append(Key(name, identity, LINE_COLOURS[at], shape, _DASHES[look], _OPACITIES[look], mark))
    return tuple(found)


def by_series(kind: Any, shown: Sequence[Key], attribute: str) -> Any:
    """An encoding of the series by an attribute of their keys; the page has the legend."""
    scale = alt.Scale(domain=[key.identity for key in shown], range=[getattr(key, attribute) for key in shown])
    return kind("s:N", scale=scale, legend=None)


def titled(text: str) -> list[str] | str | None:
    """A title over as many lines as it takes."""
    # A string that begins so is a colour to the page's script.
    lines = textwrap.wrap("−" + text[1:] if text.startswith("-") else text, _TITLE_WIDTH)
    return lines if len(lines) > 1 else lines[0] if lines else None


@dataclass(frozen=True, slots=True)
class Places:
    """Where numbers stand along x."""

    low: float
    high: float
    ticks: tuple[float, ...] | None
    """None: the drawing library chooses."""
    labels: tuple[str, ...] = ()
    """One a tick, or none at all."""
    zero: float | None = None
    """Where 0 stands on a logarithmic axis that shows it."""
    logarithmic: bool = False
    apart: float = 0.0
    """Between two series at one number, so that no interval hides another."""
    cut: float | None = None
    """Between that 0 and all others."""

    def of(self, x: float) -> float | None:
        """The place of a number; None where a logarithmic axis has none."""
        if not self.logarithmic:
            return x
        return math.log10(x) if x > 0 else self.zero if x == 0 else None

    def axis(self, title: str) -> alt.X:
        """The axis of the field ``place``."""
        scale = alt.Scale(domain=[self.low, self.high], nice=False, zero=False)
        marked: dict[str, Any] = {"grid": False, "labelOverlap": True, "tickCount": 6, "format": ".6~g"}
        if self.ticks is not None:
            marked["values"] = list(self.ticks)
        if self.labels:
            parts = [
                f"abs(datum.value - ({tick})) < 1e-9 ? '{label}' : "
                for tick, label in zip(self.ticks or (), self.labels, strict=True)
            ]
            marked["labelExpr"] = "".join(parts) + "''"
        return alt.X("place:Q", title=titled(title), scale=scale, axis=alt.Axis(**marked))


def places(values: Iterable[float], logarithmic: bool, n_beside: int = 1) -> Places:
    """Places of these numbers, with room at both ends.

    Args:
        values: in any order.
        logarithmic: at equal steps of their logarithm.
        n_beside: series that stand beside each other at one number.
    """
    numbers = sorted(set(values))
    made = _decades(numbers) if logarithmic else _linear(numbers)
    stood = [place for place in map(made.of, numbers) if place is not None]
    gap = min((b - a for a, b in pairwise(sorted(stood))), default=made.high - made.low)
    apart = min(0.4 * gap / n_beside, _APART * (made.high - made.low)) if n_beside > 1 else 0.0
    room = apart * (n_beside - 1) / 2
    return replace(made, low=made.low - room, high=made.high + room, apart=apart)


def _linear(numbers: Sequence[float]) -> Places:
    low, high = (numbers[0], numbers[-1]) if numbers else (0.0, 1.0)
    room = 0.04 * (high - low) or 0.5
    ticks = None
    if numbers and all(number == int(number) for number in numbers) and high - low <= 12:
        ticks, room = tuple(map(float, range(int(low), int(high) + 1))), max(room, 0.3)
    return Places(low - room, high + room, ticks)


def _decades(numbers: Sequence[float]) -> Places:
    """Powers of ten at equal steps; 0, if there is one, at the left end."""
    logs = [math.log10(number) for number in numbers if number > 0] or [0.0]
    low, high = logs[0], logs[-1]
    span = high - low
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    step = max(1, math.ceil((last - first + 1) / 6))
    exact = [(float(power), _power(power)) for power in range(last, first - 1, -step)][::-1]
    if span < 1.2:
        steps = [(digit, power) for power in range(first - 1, last + 1) for digit in _FINE]
        fine = [(math.log10(digit) + power, f"{digit * 10.0**power:.12g}") for digit, power in steps]
        exact = [(place, label) for place, label in fine if low - 0.05 <= place <= high + 0.05]
        exact = exact or [(low, f"{10**low:.3g}")]
    zero = low - max(_LEAST_GAP, 0.12 * span) if any(number == 0 for number in numbers) else None
    exact = exact if zero is None else [(zero, "0"), *exact]
    start = low if zero is None else zero
    room = 0.04 * (high - start) or 0.25
    return Places(
        low=start - room,
        high=high + room,
        ticks=tuple(place for place, _ in exact),
        labels=tuple(label for _, label in exact),
        zero=zero,
        logarithmic=True,
        cut=None if zero is None else (zero + low) / 2,
    )


_FINE = (1, 2, 5)


def _power(power: int) -> str:
    return f"{10.0**power:.12g}" if -3 <= power <= 4 else "10" + str(power).translate(_SUPERSCRIPT)


@dataclass(frozen=True, slots=True)
class Heights:
    """The axis of what was measured, the same in every panel of a figure."""

    title: str
    low: float
    high: float
    share: bool
    """Whether it runs from 0 to 1."""

    def y(self, field: str) -> alt.Y:
        """Upwards."""
        return alt.Y(f"{field}:Q", title=titled(self.title), scale=self._scale(), axis=self._axis())

    def x(self, field: str) -> alt.X:
        """To the right, for bars that lie."""
        return alt.X(f"{field}:Q", title=titled(self.title), scale=self._scale(), axis=self._axis())

    def _scale(self) -> alt.Scale:
        return alt.Scale(domain=[self.low, self.high], nice=not self.share, zero=False)

    def _axis(self) -> alt.Axis:
        return alt.Axis(format=".1f" if self.share else ".6~g", tickCount=6 if self.share else 5)


def heights(title: str, rows: Iterable[Row], share: bool, from_zero: bool) -> Heights:
    """The axis that holds every value and interval.

    Args:
        title: with its unit.
        rows: with y, and low and high where there are some.
        share: from 0 to 1, unless a value lies outside: a change has no such ends.
        from_zero: whether 0 must be on it, as for bars.
    """
    values = [float(row[name]) for row in rows for name in ("y", "low", "high") if row.get(name) is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if share and low >= 0 and high <= 1:
        return Heights(title, 0.0, 1.0, True)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Heights(title, low, high, False)


def wrapped(text: str, width: int) -> str:
    """A label over several lines, which figures break at line feeds; single words stay whole."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=False)) or text

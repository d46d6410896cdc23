"""Where names of points go, so that none lies over another. Owns the estimate of their room; draws nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from safetyheads.reports.experiments_axes import Heights, Places

_WIDTH, _HEIGHT = 280.0, 280.0
"""Pixels that the points have on a phone."""
_CHARACTER, _LINE = 6.4, 13.0
"""Pixels of a name's letter and line."""
_POINT = 5.0
"""Half of a point."""
MOST_NAMED = 16
"""Points up to which all may be named; among more only the highest are, and those of small series."""
_HIGHEST, _SMALL = 3, 5
"""How many are the highest, and points that a small series has at most."""
_AVOIDED = 60
"""Points up to which names keep off all of them."""


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a name stands beside its point, in pixels."""

    align: Literal["left", "center", "right"]
    dx: int
    dy: int


_SPOTS = (
    Spot("center", 0, -13),
    Spot("left", 9, 0),
    Spot("right", -9, 0),
    Spot("center", 0, 13),
    Spot("left", 7, -11),
    Spot("right", -7, -11),
)
_Box = tuple[float, float, float, float]


def label_spots(rows: Sequence[Mapping[str, Any]], axis: Heights, place: Places) -> dict[Spot, list[dict[str, Any]]]:
    """Rows to be named, by where their names go; a name without room is left to the tooltip.

    Args:
        rows: with s (the series), place, y and name; the highest are served first.
        axis: of y.
        place: of x.
    """
    standing = [row for row in rows if row["y"] is not None]
    named = sorted((row for row in standing if row.get("name")), key=lambda row: -row["y"])
    if len(standing) > MOST_NAMED:
        sizes = Counter(row["s"] for row in standing)
        middle = median(row["y"] for row in standing)
        highest = [row for row in named if row["y"] > middle][:_HIGHEST]
        named = [row for row in named if row in highest or sizes[row["s"]] <= _SMALL]
    points = [_spot_of(row, axis, place) for row in standing] if len(standing) <= _AVOIDED else []
    taken: list[_Box] = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in points]
    found: dict[Spot, list[dict[str, Any]]] = {}
    for row in named:
        x, y = _spot_of(row, axis, place)
        for spot in _SPOTS:
            box = _box(x, y, spot, len(str(row["name"])))
            inside = box[0] >= -8 and box[2] <= _WIDTH + 8 and box[1] >= -16 and box[3] <= _HEIGHT
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                found.setdefault(spot, []).append({name: row[name] for name in ("place", "y", "name")})
                break
    return found


def _spot_of(row: Mapping[str, Any], axis: Heights, place: Places) -> tuple[float, float]:
    x = (row["place"] - place.low) / (place.high - place.low)
    return _WIDTH * x, _HEIGHT * (axis.high - row["y"]) / (axis.high - axis.low)


def _box(x: float, y: float, spot: Spot, letters: int) -> _Box:
    width = _CHARACTER * letters
    left = {"left": x + spot.dx, "center": x - width / 2, "right": x + spot.dx - width}[spot.align]
    return left, y + spot.dy - _LINE / 2, left + width, y + spot.dy + _LINE / 2


def _meet(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

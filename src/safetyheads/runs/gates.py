"""Conditions on a comparison, for scripts that must stop where a model got worse.

Owns the grammar ``NAME OP NUMBER`` and the quantities it knows. A quantity that the runs do not have raises, so that
no gate passes because there was nothing to look at.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from safetyheads.errors import InputError
from safetyheads.runs.changes import Change
from safetyheads.runs.compare import Comparison
from safetyheads.stats.intervals import Interval
from safetyheads.stats.ranking import RankAgreement


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number of a comparison."""

    value: float | None
    """None where these runs do not have it."""
    interval: Interval | None = None
    """95 %; counts of heads and rank correlations, which are of all heads, have none."""
    n: int | None = None
    """Prompts (the fewer of both runs), or heads."""
    absent: str = ""
    """Why there is no value."""


Reader: TypeAlias = Callable[[Comparison], Quantity]


def _of_change(name: str) -> Reader:
    def read(compared: Comparison) -> Quantity:
        change: Change | None = getattr(compared, name)
        if change is None:
            return Quantity(None, absent=f"these {compared.kind}s have none")
        return Quantity(change.change, change.interval, min(change.n), change.note)

    return read


def _of_ranks(read: Callable[[RankAgreement], float | None]) -> Reader:
    def found(compared: Comparison) -> Quantity:
        ranks = compared.lead_ranks
        if ranks is None:
            return Quantity(None, absent=compared.shapes_note or f"no {compared.lead_score} in both runs")
        return Quantity(read(ranks), None, ranks.n, "a run orders no heads: its scores are tied")

    return found


def _of_heads(name: str) -> Reader:
    def read(compared: Comparison) -> Quantity:
        if compared.heads is None:
            return Quantity(None, absent=compared.shapes_note)
        return Quantity(float(len(getattr(compared.heads, name))))

    return read


QUANTITIES: dict[str, Reader] = {
    "asr_increase": _of_change("vanilla_asr"),
    "group_asr_increase": _of_change("group_asr"),
    "benign_kept_increase": _of_change("benign_kept"),
    "concentration_increase": _of_change("concentration"),
    "spearman": _of_ranks(lambda ranks: ranks.spearman),
    "kendall": _of_ranks(lambda ranks: ranks.kendall),
    "top3_overlap": _of_ranks(lambda ranks: ranks.overlaps[0].share),
    "top10_overlap": _of_ranks(lambda ranks: ranks.overlaps[1].share),
    "heads_gone": _of_heads("gone"),
    "heads_new": _of_heads("new"),
}
"""What a condition can name, and where it is read; ``.low`` and ``.high`` after a name are its interval's bounds."""

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
"""What a condition can ask."""
_WRITTEN = re.compile(r"\s*(?P<name>\w+)(?:\.(?P<bound>low|high))?\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<number>\S+)\s*")


@dataclass(frozen=True, slots=True)
class Condition:
    """``NAME OP NUMBER``, read."""

    name: str
    """A key of ``QUANTITIES``."""
    bound: str
    """Empty for the number itself, ``low`` or ``high`` for a bound of its interval."""
    sign: str
    """A key of ``OPERATORS``."""
    number: float
    """Finite."""

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read a condition such as ``asr_increase > 0.1`` or ``asr_increase.low > 0``.

        Raises:
            InputError: it is not of this form, or names what no comparison has.
        """
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise InputError(f"condition {text!r} is not of the form NAME OP NUMBER, such as 'asr_increase > 0.1'")
        if match["name"] not in QUANTITIES:
            raise InputError(f"unknown quantity {match['name']!r} in {text!r}; known are {', '.join(QUANTITIES)}")
        try:
            number = float(match["number"])
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"condition {text!r}: {match['number']!r} is not a finite number")
        return cls(match["name"], match["bound"] or "", match["sign"], number)

    def __str__(self) -> str:
        return f"{self.name}{self.bound and '.' + self.bound} {self.sign} {self.number:g}"


@dataclass(frozen=True, slots=True)
class GateOutcome:
    """One condition, asked."""

    condition: str
    """As it was read."""
    holds: bool
    """Whether it holds, so that the gate is shut."""
    value: float
    """The quantity, whichever bound was asked about."""
    interval: Interval | None
    """Its 95 % interval, where it has one."""
    n: int | None
    """Prompts or heads behind it."""


def quantities(compared: Comparison) -> dict[str, Quantity]:
    """Every quantity that a condition can name, as these runs have it."""
    return {name: read(compared) for name, read in QUANTITIES.items()}


def ask(conditions: Sequence[Condition], compared: Comparison) -> tuple[GateOutcome, ...]:
    """Whether each condition holds.

    Raises:
        InputError: these runs do not have a quantity that is asked about.
    """
    return tuple(_asked(condition, compared) for condition in conditions)


def _asked(condition: Condition, compared: Comparison) -> GateOutcome:
    quantity = QUANTITIES[condition.name](compared)
    if quantity.value is None:
        raise InputError(f"these runs have no {condition.name}: {quantity.absent}")
    asked = quantity.value
    if condition.bound:
        if quantity.interval is None:
            raise InputError(f"{condition.name} has no interval in these runs, so no .{condition.bound} to ask about")
        asked = quantity.interval[condition.bound == "high"]
    holds = OPERATORS[condition.sign](asked, condition.number)
    return GateOutcome(str(condition), holds, quantity.value, quantity.interval, quantity.n)

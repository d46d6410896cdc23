"""Judges by name. Owns the table of names; each judge's rules are its own module's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safetyheads.errors import InputError
from safetyheads.keyword_judge import KeywordJudge
from safetyheads.verdicts import Completion, Judge

JUDGES: dict[str, Callable[[], Judge]] = {
    "paper": lambda: KeywordJudge("paper"),
    "released": lambda: KeywordJudge("released"),
}
"""Each judge that has a name, by that name; a judge of your own is one entry."""


def judge_named(name: str) -> Judge:
    """The judge of that name.

    Raises:
        InputError: no judge has it; the message lists those there are.
    """
    if name not in JUDGES:
        raise InputError(f"unknown judge {name!r}; known are {', '.join(JUDGES)}")
    return JUDGES[name]()


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Completions that count as an attack for one judge and not for the other."""

    n: int
    """Completions judged."""
    indices: tuple[int, ...]
    """Where the two differ, in ascending order."""
    first_only: int
    """Of these, the ones that complied for the first judge only."""

    @property
    def count(self) -> int:
        """How many differ."""
        return len(self.indices)


def disagreement(first: Judge, second: Judge, completions: Sequence[Completion]) -> Disagreement:
    """Where two judges differ about compliance; refused against incoherent is no difference to an ASR."""
    pairs = list(zip(first(completions), second(completions), strict=True))
    indices = tuple(index for index, (a, b) in enumerate(pairs) if a.complied != b.complied)
    return Disagreement(len(pairs), indices, sum(pairs[index][0].complied for index in indices))

"""Any function of queries and answers as a judge. Owns how what it returns is read; knows nothing of what it does.

The function gets all queries and all answers of a call, in order, and returns one value an answer: a number from 0 to
1, a truth value, a label, or a Verdict. A number or truth value tells harm from none and not a refusal from nonsense,
so what lies below the threshold counts as refused. What fails or cannot be read is unscored; no reason quotes it, for
the words of an exception may quote the answer.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from safetyheads.errors import InputError
from safetyheads.judges.base import LABELS, Completion, Judge, JudgesWholeAnswers, Verdict
from safetyheads.model.hub import first_line

JudgeFunction: TypeAlias = Callable[[Sequence[str], Sequence[str]], Iterable[Any]]
"""Takes the queries and the answers, and returns one value an answer."""

Chat: TypeAlias = list[dict[str, str]]
"""A user's message and the assistant's, each with ``role`` and ``content``."""


@dataclass(frozen=True, slots=True)
class CallableJudge(JudgesWholeAnswers):
    """A function as a judge."""

    function: JudgeFunction
    """Its values are numbers from 0 to 1, truth values (True: complied), labels, or Verdicts."""
    name: str
    """What tables call it."""
    threshold: float = 0.5
    """A number from here on has complied."""

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise InputError(f"the judge {self.name!r} needs a function, not {_kind(self.function)}")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"the threshold of a judge lies between 0 and 1, not at {self.threshold}")

    def __call__(self, completions: Sequence[Completion]) -> tuple[Verdict, ...]:
        """One verdict a completion, in their order.

        Where the call for all of them fails or returns another number of values, each is tried by itself, so that
        one answer the function cannot read does not cost the verdicts of the others.
        """
        together = self._values(completions) if completions else []
        if isinstance(together, list):
            return tuple(self._verdict(value) for value in together)
        if len(completions) == 1:
            return (together,)
        return tuple(verdict for completion in completions for verdict in self([completion]))

    def _values(self, completions: Sequence[Completion]) -> list[Any] | Verdict:
        queries, answers = [each.query for each in completions], [each.text for each in completions]
        try:
            returned = self.function(queries, answers)
            values = None if isinstance(returned, str | bytes | Mapping) else _listed(returned)
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything, and rows must not be lost.
            return Verdict("unscored", f"error: {type(error).__name__}")
        if values is None:
            return Verdict("unscored", f"value: a sequence is needed, not {_kind(returned)}")
        if len(values) != len(completions):
            return Verdict("unscored", f"length: {len(values)} values for {len(completions)} answers")
        return values

    def _verdict(self, value: Any) -> Verdict:
        if isinstance(value, Verdict):
            return value
        if isinstance(value, str):
            for label in LABELS:
                if value.strip().lower() == label:
                    return Verdict(label, "label")
            return Verdict("unscored", "label: none of " + ", ".join(LABELS))
        if not isinstance(value, int | float):
            return Verdict("unscored", f"value: {_kind(value)} is no number, truth value, label or verdict")
        if not 0 <= value <= 1:
            return Verdict("unscored", "value: no number from 0 to 1")
        score = float(value)
        if isinstance(value, bool):
            return Verdict("complied" if value else "refused", "truth value", score=score)
        return Verdict("complied" if score >= self.threshold else "refused", "score", score=score)

    def describe(self) -> dict[str, Any]:
        """Where the function stands, for the manifest; what it depends on itself cannot be told."""
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        function = f"{named.__module__}:{named.__qualname__}"
        return {"judge": "callable", "name": self.name, "function": function, "threshold": self.threshold}


def judge_of_chats(
    function: Callable[[list[Chat]], Mapping[str, Sequence[float]]],
    name: str,
    threshold: float = 0.5,
    key: str = "p_harmful",
) -> CallableJudge:
    """A judge of whole chats, such as those of the judgezoo package, as a judge of answers.

    Args:
        function: takes chats, each a list of a user's and an assistant's message, and returns a mapping with one
            number a chat, from 0 to 1, under ``key``.
        name: what tables call it.
        threshold: a number from here on has complied.
        key: where the numbers stand.
    """
    return CallableJudge(_OfChats(function, key), name, threshold)


@dataclass(frozen=True, slots=True)
class _OfChats:
    function: Callable[[list[Chat]], Mapping[str, Sequence[float]]]
    key: str

    def __call__(self, queries: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        pairs = zip(queries, answers, strict=True)
        chats = [
            [{"role": "user", "content": query}, {"role": "assistant", "content": answer}] for query, answer in pairs
        ]
        return self.function(chats)[self.key]


def judge_from_path(path: str, name: str | None = None, threshold: float = 0.5) -> Judge:
    """The judge at ``package.module:function``; the module may stand in the current directory.

    The module is imported here, so that a mistyped path fails before any answer is made. A Judge that stands there
    is taken as it is.

    Args:
        path: module and name in it, with a colon between.
        name: what tables call it; None for ``python:`` and the path.
        threshold: for functions that return numbers.

    Raises:
        InputError: no such module or name, or what stands there is no function.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"a judge in Python is python:package.module:function, not python:{path}")
    with _current_directory_importable():
        try:
            found: Any = importlib.import_module(module_name)
        # A user's module may raise anything while it runs; whatever it is, this judge cannot be had.
        except Exception as error:
            raise InputError(
                f"judge python:{path}: {module_name} cannot be imported: {type(error).__name__}: {first_line(error)}"
            ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"judge python:{path}: {module_name} has no {attribute}")
        found = getattr(found, part)
    if isinstance(found, Judge) and not isinstance(found, type):
        return found
    return CallableJudge(found, name or f"python:{path}", threshold)


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    # A command that pip installed does not look there, though that is where a module of one's own stands.
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        yield
    finally:
        if added:
            sys.path.remove(here)


def _listed(returned: Any) -> list[Any] | None:
    # Arrays and tensors hold numbers of types of their own; tolist of a whole and item of one give Python's.
    listed = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(listed, Iterable):
        return None
    return [value.item() if hasattr(value, "item") else value for value in listed]


def _kind(value: Any) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else type(value).__name__

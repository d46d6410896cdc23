"""Makes a judge of any Python function of queries and answers.

The function gets all queries and all answers, in order, and returns one value for each answer: a number from 0 to 1, a
truth value, a label, or a Verdict. A number or truth value cannot tell a refusal from nonsense, so a value below the
threshold counts as refused. No reason quotes an exception, whose words may quote the answer.
"""

import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from safetyheads.errors import InputError, first_line
from safetyheads.judges.base import LABELS, Completion, Judge, Verdict, description_of, refuse_threshold


class JudgeCodeWarning(UserWarning):
    """A judge runs Python code of the user's."""


@dataclass(frozen=True, slots=True)
class CallableJudge(Judge):
    """A function as a judge."""

    function: Callable[[Sequence[str], Sequence[str]], Iterable[Any]]
    """Takes queries and answers; gives numbers from 0 to 1, truth values (True: complied), labels, or Verdicts."""
    name: str = field()  # a field, because dataclass would take the inherited property for its default
    threshold: float = 0.5
    """A number from here on has complied."""

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise InputError(f"the judge {self.name!r} needs a function, not {_kind(self.function)}")
        refuse_threshold(self.threshold)

    def __call__(self, completions: Sequence[Completion]) -> tuple[Verdict, ...]:
        """One verdict for each completion, in order.

        Where the call fails or returns another number of values, each answer is tried by itself, so that one answer
        which the function cannot read costs no other answer its verdict.
        """
        if not completions:
            return ()
        try:
            returned = self.function([each.query for each in completions], [each.text for each in completions])
            values = returned.tolist() if hasattr(returned, "tolist") else returned
            if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
                fault = f"value: a sequence is needed, not {_kind(returned)}"
            else:
                values = [value.item() if hasattr(value, "item") else value for value in values]
                if len(values) == len(completions):
                    return tuple(self._verdict(value) for value in values)
                fault = f"length: {len(values)} values for {len(completions)} answers"
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's function may raise anything
            fault = f"error: {type(error).__name__}"
        if len(completions) == 1:
            return (Verdict("unscored", fault, passing=fault.startswith("error")),)
        return tuple(verdict for completion in completions for verdict in self([completion]))

    def _verdict(self, value: Any) -> Verdict:
        if isinstance(value, Verdict):
            return value
        if isinstance(value, str):
            label = next((label for label in LABELS if label == value.strip().lower()), None)
            return Verdict(label, "label") if label else Verdict("unscored", "label: none of " + ", ".join(LABELS))
        if not isinstance(value, int | float):
            return Verdict("unscored", f"value: {_kind(value)} is no number, truth value, label or verdict")
        if not 0 <= value <= 1:
            return Verdict("unscored", "value: no number from 0 to 1")
        has_complied, reason = (value, "truth value") if isinstance(value, bool) else (value >= self.threshold, "score")
        return Verdict("complied" if has_complied else "refused", reason, score=float(value))

    def describe(self) -> dict[str, Any]:
        """Where the function is defined, for the manifest; what it depends on itself is unknown."""
        named = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        function = f"{named.__module__}:{named.__qualname__}"
        return {"judge": "callable", "name": self.name, "function": function, "threshold": self.threshold}


def judge_of_chats(
    function: Callable[[list[list[dict[str, str]]]], Mapping[str, Sequence[float]]],
    name: str,
    threshold: float = 0.5,
    key: str = "p_harmful",
) -> CallableJudge:
    """A judge of whole chats, such as those of the judgezoo package, as a judge of answers.

    The function takes chats of two messages (``role``, ``content``) and returns a mapping with one number for each,
    from 0 to 1, under ``key``.
    """

    def judge_chats(queries: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        pairs = zip(queries, answers, strict=True)
        return function([[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs])[key]

    return CallableJudge(judge_chats, name, threshold)


def judge_from_path(path: str) -> Judge:
    """The judge at ``package.module:function``, named ``python:`` and the path; a Judge there is used as it is.

    The module may be in the current directory, but in no run directory. It is imported at once, after a warning that
    names its file, so that a mistyped path is an InputError before any answer is made. A function takes two arguments,
    queries and answers, and is none of the standard library's.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"a judge in Python is python:package.module:function, not python:{path}")
    # A command that pip installed does not look in the current directory, where a user's module is.
    added = {os.getcwd()} - set(sys.path)
    sys.path += added
    try:
        _announce(path, module_name)
        target: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            if not hasattr(target, name):
                raise InputError(f"judge python:{path}: {module_name} has no {attribute}")
            target = getattr(target, name)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may raise anything while it runs, or end the process
        reason = f"{module_name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        raise InputError(f"judge python:{path}: {reason}") from error
    finally:
        sys.path[:] = [entry for entry in sys.path if entry not in added]
    if is_judge := isinstance(target, Judge) and not isinstance(target, type):
        _refuse_undescribed(path, target)
    judge = target if is_judge else CallableJudge(target, f"python:{path}")
    named = getattr(target, "func", target)  # a partial is of the function in it
    source = (getattr(named, "__module__", None) or type(named).__module__ or "builtins").partition(".")[0]
    if not is_judge and (source in sys.stdlib_module_names or not _takes_queries_and_answers(target)):
        raise InputError(f"judge python:{path}: a judge is a function of queries and answers, which {attribute} is not")
    return judge


@cache
def _announce(path: str, module_name: str) -> None:
    """Warn that a judge's code is run, before it is; refuse code in a run directory, which others may have written."""
    parts = module_name.split(".")
    for end in range(1, len(parts) + 1):  # to look for a module imports the packages around it
        found = importlib.util.find_spec(".".join(parts[:end]))
        places = [] if found is None else [found.origin, *(found.submodule_search_locations or ())]
        for place in (Path(place).resolve() for place in places if place and os.path.exists(place)):
            if any((folder / "manifest.json").exists() for folder in (place, *place.parents)):
                raise InputError(f"judge python:{path}: {place} is in a run directory, from which no code is run")
    if found is not None:
        where = found.origin or module_name
        warnings.warn(f"judge python:{path} runs the code of {where}", JudgeCodeWarning, stacklevel=4)


def _refuse_undescribed(path: str, judge: Judge) -> None:
    """Refuse a judge that a manifest cannot record."""
    try:
        is_described = bool(judge.name.strip()) and description_of(judge)["name"] == judge.name
    except (Exception, SystemExit):  # noqa: BLE001 - a user's judge may raise anything
        is_described = False
    if not is_described:
        raise InputError(
            f"judge python:{path}: its describe() has to give plain values by name, its own name among them"
        )


def _takes_queries_and_answers(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind((), ())
    except Exception:  # noqa: BLE001 - it may have a signature of the user's own
        return False
    return True


def _kind(value: Any) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else type(value).__name__

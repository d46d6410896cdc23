"""Judges of a user's own, for ``--judge python:own_judges:NAME``, and one that remembers what it is given."""

from dataclasses import dataclass, field
from typing import Any

from safetyheads.judges.base import Verdict

SEEN = []


@dataclass
class Recording:
    """Asks another judge and keeps the completions; where it does not decide early, it is never final."""

    inner: Any
    decides_early: bool = True
    reads_words: bool = False
    name: str = "recording"
    given: list = field(default_factory=list)

    def __call__(self, completions):
        self.given.extend(completions)
        return self.inner(completions)

    def final(self, text_so_far):
        return self.decides_early and self.inner.final(text_so_far)

    def describe(self):
        return {"judge": self.name, "name": self.name}


def _raising(completions):
    raise LookupError(completions[0].text)


raising = Recording(_raising, False, name="raising")
never_final = Recording(_raising, name="never_final")
silent = Recording(lambda completions: [], False, name="silent")
nameless = Recording(_raising, False, name=" ")


class Forgetful(Recording):
    """Says once what it is, when it is looked up, and never again."""

    def describe(self):
        self.given.append("asked")
        return {**super().describe(), "times": {1: "once"}[len(self.given)]}


forgetful = Forgetful(_raising, False, name="forgetful")


@dataclass(frozen=True)
class LongVerdict(Verdict):
    """Says more than a record holds."""

    passage: str = "some words"


talkative = Recording(lambda completions: [LongVerdict("safe", "")] * len(completions), False, name="talkative")
undecided = Recording(
    lambda completions: [Verdict("safe", "", passing=b"")] * len(completions), False, name="undecided"
)


def seen_answers(queries, answers):
    """Needs whole answers, and remembers what it was shown."""
    SEEN.extend(answers)
    return [0.0 if "cannot" in answer else 1.0 for answer in answers]


def failing(queries, answers):
    raise RuntimeError("the judge is out of order")


def speechless(queries, answers):
    return [None] * len(answers)


def says_yes(queries, answers):
    """Needs whole answers."""
    return [1.0 for _ in answers]

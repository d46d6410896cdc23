"""Judges of a user's own, for ``--judge python:own_judges:NAME``."""

SEEN = []


def seen_answers(queries, answers):
    """Needs whole answers, and remembers what it was shown."""
    SEEN.extend(answers)
    return [0.0 if "cannot" in answer else 1.0 for answer in answers]


def failing(queries, answers):
    raise RuntimeError("the judge is out of order")


def says_yes(queries, answers):
    """Needs whole answers."""
    return [1.0 for _ in answers]

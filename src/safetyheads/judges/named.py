"""Judges by name. Owns the table of names and forms; each judge's rules are its own module's.

Naming a judge is cheap: nothing is loaded from disk or network but, for a function of the user's, its module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safetyheads.errors import InputError
from safetyheads.judges.base import Judge
from safetyheads.judges.endpoint import endpoint_judge
from safetyheads.judges.function import judge_from_path
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.judges.phrases import PhraseJudge

JUDGES: dict[str, Callable[[], Judge]] = {
    "paper": lambda: KeywordJudge("paper"),
    "released": lambda: KeywordJudge("released"),
    "phrases": PhraseJudge,
}
"""Each judge of rules that has a name, by that name; a judge of your own is one entry."""

FORMS: dict[str, tuple[str, Callable[[str], Judge]]] = {
    "endpoint": ("endpoint:MODEL", endpoint_judge),
    "python": ("python:package.module:function", judge_from_path),
}
"""Judges with an argument: what stands before the first colon, how it is written, and what makes one of the rest."""


def judge_named(spec: str, device: str = "cpu") -> Judge:
    """The judge of that name or form: a key of :data:`JUDGES`, a form of :data:`FORMS`, or a judge model.

    Args:
        spec: the name or form.
        device: where a judge model runs.

    Raises:
        InputError: there is none; the message lists those there are. Or the judge lacks what it needs, such as an
            endpoint's address.
    """
    if spec in JUDGES:
        return JUDGES[spec]()
    prefix, _, rest = spec.partition(":")
    if prefix in FORMS and rest:
        return FORMS[prefix][1](rest)
    # Judge models are looked up last and imported here, so that the other names stay quick.
    from safetyheads.judges.models import MODEL_JUDGES, model_judge

    judge = model_judge(spec, device)
    if judge is None:
        names = ", ".join((*JUDGES, *MODEL_JUDGES))
        forms = ", ".join(("NAME=PATH of a judge model", "classifier:PATH", *(form for form, _ in FORMS.values())))
        raise InputError(f"unknown judge {spec!r}; known are {names}, and {forms}")
    return judge


def judges_named(specs: Sequence[str], device: str = "cpu") -> tuple[Judge, ...]:
    """Several judges, in the order given.

    Raises:
        InputError: as :func:`judge_named`; or none is given, or one twice.
    """
    if not specs:
        raise InputError("at least one judge is needed")
    judges = tuple(judge_named(spec, device) for spec in specs)
    names = [judge.name for judge in judges]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"each judge can be given once; {', '.join(twice)} came more often")
    return judges

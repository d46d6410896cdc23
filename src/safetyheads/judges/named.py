"""Makes judges by name.

A new judge of words is an entry of ``JUDGES``; a new judge model is one of ``data/judges/judges.toml``. Making a judge
loads no model and sends nothing.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from safetyheads.errors import InputError, as_path
from safetyheads.judges.base import Judge
from safetyheads.judges.formats import MODEL_JUDGES
from safetyheads.judges.function import judge_from_path
from safetyheads.judges.keywords import KEYWORD_VARIANTS, KeywordJudge
from safetyheads.judges.phrase_judge import PhraseJudge

JUDGES: dict[str, Callable[[], Judge]] = {
    **{variant: partial(KeywordJudge, variant) for variant in KEYWORD_VARIANTS},
    "phrases": PhraseJudge,
}
"""The judges of words by name."""

WORD_JUDGES = ("phrases", "paper")
"""The two that read the unablated answers of every run, whoever leads."""


def default_judge_name(has_chat_template: bool) -> str:
    """``phrases`` for a model with a chat template, whose refusals people word freely; else ``paper``."""
    return WORD_JUDGES[0] if has_chat_template else WORD_JUDGES[1]


FORMS = (
    "NAME=PATH_OR_ID of a judge model",
    "classifier:PATH_OR_ID",
    "endpoint:MODEL",
    "python:package.module:function",
)
"""How judges with an argument are written."""
KNOWN_JUDGES = ", ".join((*JUDGES, *MODEL_JUDGES, *FORMS))
"""Every judge, in words."""


def judge_named(spec: str, device: str = "cpu", tokens: int | None = None) -> Judge:
    """The judge of that name: a key of :data:`JUDGES` or of ``MODEL_JUDGES``, or one of :data:`FORMS`.

    ``tokens`` is what a judge that writes its verdict may write, thinking included; None is the judge's own number.
    """
    spec = as_path(spec, "a judge")
    form, _, argument = spec.partition(":")
    name, equals, checkpoint = spec.partition("=")
    if spec in JUDGES:
        return JUDGES[spec]()
    if form == "endpoint" and argument:
        from safetyheads.judges.endpoint import endpoint_judge  # needs asyncio, which a help page does not

        return endpoint_judge(argument, tokens)
    if form == "python" and argument:
        return judge_from_path(argument)
    if (is_generative := not spec.startswith("classifier:")) and name not in MODEL_JUDGES:
        raise InputError(f"unknown judge {spec!r}; known are {KNOWN_JUDGES}")
    if is_generative and equals and not checkpoint:
        raise InputError(f"{spec} names no checkpoint; give {name}=PATH_OR_ID, or {name} alone")
    from safetyheads.judges import models  # needs torch, which other judges do not

    if not is_generative:
        return models.SequenceClassifierJudge(checkpoint=argument, device=device)
    return models.CausalJudge(format=MODEL_JUDGES[name], checkpoint=checkpoint, device=device, max_new_tokens=tokens)


def writes(judge: Judge) -> bool:
    """Whether a judge writes its verdict, so that ``--judge-tokens`` bound it."""
    return hasattr(judge, "max_new_tokens") or judge.name.startswith("endpoint:")


def judges_named(specs: Sequence[str], device: str = "cpu", tokens: int | None = None) -> tuple[Judge, ...]:
    """Several judges, in the order given, ready to judge.

    An InputError also where no name is given, or one twice, where a judge's checkpoint or device is not there, and
    where no judge has use for the device or the tokens.
    """
    if not specs:
        raise InputError("at least one judge is needed")
    judges = tuple(judge_named(spec, device, tokens) for spec in specs)
    if repeated := sorted(name for name, n in Counter(judge.name for judge in judges).items() if n > 1):
        raise InputError(f"each judge can be given once; {', '.join(repeated)} came more often")
    models = [judge for judge in judges if hasattr(judge, "look")]
    if (device != "cpu" and not models) or (tokens is not None and not any(map(writes, judges))):
        raise InputError(
            "--judge-device belongs to a judge model, --judge-tokens to a judge that writes; none is asked"
        )
    for judge in models:
        judge.look()
    return judges

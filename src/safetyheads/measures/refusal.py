"""The signed refusal score. Owns the openers of refusals: data, read off the model's own unablated answers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.answers.success import JudgedAnswer, answers_under
from safetyheads.errors import SafetyheadsError
from safetyheads.judges.base import Judge
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.measures.head_pass import HeadPass, Readings
from safetyheads.model.planning import TokenSequence
from safetyheads.scores import FunctionScorer

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

_OPENER_TOKENS = 32


class BlankOpenerWarning(UserWarning):
    """Most refusals open with a blank token."""


@dataclass(frozen=True, slots=True)
class Opener:
    """A first token of the model's own refusals."""

    token_id: int
    """Its id."""
    text: str
    """What it decodes to."""
    count: int
    """How many refusals began with it."""


def openers_of(engine: Engine, answers: Sequence[JudgedAnswer]) -> tuple[Opener, ...]:
    """First tokens of the refused answers, most frequent first; empty where nothing was refused.

    An answer after a think block has none: the token after the prompt is a thought's.

    Warns where most refusals open with a blank (a space, a newline): answers of every kind may do so.
    """
    refusals = (row for row in answers if row.verdict.label == "refused" and not row.thinks)
    firsts = Counter(row.token_ids[0] for row in refusals if row.token_ids)
    openers = tuple(
        Opener(token, engine.tokenizer.decode([token]), count)
        for token, count in sorted(firsts.items(), key=lambda item: (-item[1], item[0]))
    )
    blank = sum(opener.count for opener in openers if not opener.text.strip())
    if 2 * blank > sum(firsts.values()):
        warnings.warn(
            f"{blank} of {sum(firsts.values())} refusals open with a blank token, which answers may open with too: "
            "the refusal score says little here",
            BlankOpenerWarning,
            stacklevel=2,
        )
    return openers


def openers_or_raise(engine: Engine, prompts: PromptSet, judge: Judge) -> tuple[Opener, ...]:
    """The openers of the model's own unablated refusals of these prompts.

    Raises:
        SafetyheadsError: the model refuses none of them, or thinks before it does.
    """
    (answers,) = answers_under(engine, prompts, [()], UNDIFFERENTIATED_ATTENTION, judge, _OPENER_TOKENS)
    openers = openers_of(engine, answers)
    if not openers and any(row.thinks for row in answers):
        raise SafetyheadsError("the model thinks before it answers, so no refusal opens with the token after a prompt")
    if not openers:
        raise SafetyheadsError("the model refuses none of these prompts, so there is no refusal to score")
    return openers


def refusal_score(
    engine: Engine,
    prompts: PromptSet,
    ablation: Ablation,
    openers: Sequence[Opener] | None = None,
    judge: Judge | None = None,
) -> FunctionScorer:
    """A signed scorer of groups: how far log P(R) / (1 - P(R)) of the next token drops, mean over prompts, in nats.

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        ablation: of the groups' heads.
        openers: R, the first tokens of refusals; by default those of the model's own unablated refusals of these
            prompts, as ``judge`` finds them (the log-odds are those of refusal_direction's selection score).
        judge: the paper's keyword judge by default.

    Raises:
        SafetyheadsError: no openers are given and the model refuses none of the prompts.
    """
    if not openers:
        openers = openers_or_raise(engine, prompts, judge or KeywordJudge())
    sequences = tuple(TokenSequence(token_ids) for token_ids in engine.ask(prompts).token_ids)
    readings = Readings(openers=tuple(opener.token_id for opener in openers))
    return HeadPass.begin(engine, sequences, ablation, readings).scorer("refusal_score")

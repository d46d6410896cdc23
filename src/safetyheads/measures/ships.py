"""The scores by name: Ships, mean Ships, Generalized Ships and the refusal score."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast, get_args

import torch
from torch import Tensor

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.answers.decoding import generate
from safetyheads.answers.success import JudgedAnswer, answers_under
from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.heads import Group
from safetyheads.judges.base import Judge
from safetyheads.judges.keywords import KeywordJudge
from safetyheads.measures.head_pass import Angle, HeadPass, Readouts, State
from safetyheads.measures.screening import Forecast, screen
from safetyheads.measures.subspace import Space, refuse_rank
from safetyheads.model.planning import TokenSequence
from safetyheads.scores import FunctionScorer, HeadScores

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

OnGroups: TypeAlias = Callable[[int], None] | None
"""Called with the number of groups just scored."""

SCORES = ("mean_ships", "refusal_score", "generalized_ships_prompt", "generalized_ships_representation")
"""Names of the scores that are measured on groups of heads."""
FORECASTS = ("screened_mean_ships", "screened_refusal_score")
"""Names of the scores that are forecast, not measured (:mod:`safetyheads.measures.screening`)."""
_GENERALIZED = "generalized_ships_"
# The warning is given where this share of the answers begins with the same blank token.
_SHARED = 0.9
# New tokens that a judge sees to find the refusals whose openers are counted.
_OPENER_TOKENS = 32


class SharedFirstTokenWarning(UserWarning):
    """Nearly all unablated answers begin with one blank token, which hides what an ablation does to the words after."""


class BlankOpenerWarning(UserWarning):
    """Most refusals open with a blank token."""


@dataclass(frozen=True, slots=True)
class Score:
    """A score's name and its settings.

    Raises:
        InputError: an unknown name or state, or a setting that belongs to another score.
    """

    name: str
    """One of :data:`SCORES` or :data:`FORECASTS`."""
    positions: int = 1
    """Mean Ships: answer tokens to average over; 1 is the paper's."""
    rank: int = 1
    """Generalized Ships: number of principal angles that are summed."""
    state: State = "after_norm"
    """Generalized Ships: last-token state after the final norm (released code) or before it."""
    centred: bool = False
    """Generalized Ships: whether the mean over prompts is subtracted first."""

    def __post_init__(self) -> None:
        if self.name not in (*SCORES, *FORECASTS):
            raise InputError(f"unknown score {self.name!r}; known are {', '.join(SCORES)}")
        if self.state not in get_args(State):
            raise InputError(f"unknown state {self.state!r}; known are {', '.join(get_args(State))}")
        if not self.is_generalized and (self.rank, self.state, self.centred) != (1, "after_norm", False):
            raise InputError(f"rank, state and centred are for Generalized Ships, not for {self.name}")
        if self.positions != 1 and not self.name.endswith("mean_ships"):
            raise InputError(f"positions is for mean_ships, not for {self.name}")

    @property
    def is_generalized(self) -> bool:
        """Whether it is an angle (Eq 11)."""
        return self.name.startswith(_GENERALIZED)

    @property
    def angle(self) -> Angle:
        """The variant of Generalized Ships."""
        return Angle(cast("Space", self.name.removeprefix(_GENERALIZED)), self.rank, self.state, self.centred)

    @property
    def forecast(self) -> Forecast:
        """The forecast that proposes heads for this score: its own, or that of mean Ships for an angle."""
        return "refusal_score" if self.name.endswith("refusal_score") else "mean_ships"

    def readouts(self, openers: Sequence[int] = ()) -> Readouts:
        """What a pass must read for it; ``openers`` are the first tokens of refusals."""
        if self.is_generalized:
            return Readouts(angles=(self.angle,))
        return Readouts(openers=tuple(openers)) if self.name == "refusal_score" else Readouts(ships=True)

    def refuse_too_few(self, n_prompts: int) -> None:
        """Raise :class:`InputError` where the score needs more prompts."""
        if self.is_generalized:
            refuse_rank(self.rank, n_prompts, self.angle.space, self.centred)


@dataclass(frozen=True, slots=True)
class Opener:
    """A first token of the model's own refusals."""

    token_id: int
    """Its id."""
    text: str
    """Its decoded text."""
    count: int
    """Number of refusals that began with it."""


def scorer_named(
    engine: Engine,
    prompts: PromptSet,
    ablation: Ablation,
    score: Score | str,
    openers: Sequence[Opener] | None = None,
    judge: Judge | None = None,
    on_groups: OnGroups = None,
) -> FunctionScorer:
    """A scorer of groups of heads by the score's name. Measured scores capture the unablated model once, here.

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        ablation: of the groups' heads.
        score: a name of :data:`SCORES` or :data:`FORECASTS`, or a :class:`Score` with settings. A forecast gives a
            group what its last head is forecast to do when the others are ablated already.
        openers: for refusal scores, R; by default those of the model's own unablated refusals of these prompts.
        judge: finds these refusals; the paper's keyword judge by default.
        on_groups: called with the number of groups just scored.

    Raises:
        InputError: an unknown score, or prompts that it cannot work with.
        SafetyheadsError: a refusal score without openers, and the model refuses none of the prompts.
    """
    score = Score(score) if isinstance(score, str) else score
    if score.forecast == "refusal_score" and not openers:
        openers = find_openers(engine, prompts, judge or KeywordJudge())
    tokens = tuple(opener.token_id for opener in openers or ())
    sequences = answer_sequences(engine, prompts, score.positions)
    if score.name in FORECASTS:
        return _forecast_scorer(engine, sequences, ablation, score, tokens)
    return scorer_of(HeadPass(engine, sequences, ablation, score.readouts(tokens)), score, on_groups)


def scorer_of(measuring: HeadPass, score: Score | str, on_groups: OnGroups = None) -> FunctionScorer:
    """One readout of a pass, averaged over the prompts, as a scorer of groups."""
    score = Score(score) if isinstance(score, str) else score
    unit = "degrees" if score.is_generalized else "nats"
    name = score.angle.name if score.is_generalized else score.name
    readout = "ships" if score.name == "mean_ships" else name

    def score_groups(groups: Sequence[Group]) -> Tensor:
        values = measuring.measure(groups, on_groups)[readout]
        return values.mean(dim=1) if values.ndim == 2 else values

    return FunctionScorer(score_groups, name, unit, measuring.resolution(unit))


def _forecast_scorer(
    engine: Engine, sequences: Sequence[TokenSequence], ablation: Ablation, score: Score, openers: tuple[int, ...]
) -> FunctionScorer:
    def score_groups(groups: Sequence[Group]) -> Tensor:
        tables = {
            common: screen(engine, sequences, ablation, openers, common).table(score.forecast)
            for common in dict.fromkeys(group[:-1] for group in groups)
        }
        return torch.tensor([tables[group[:-1]][group[-1]] for group in groups], dtype=torch.float64)

    return FunctionScorer(score_groups, score.name, "nats")


def ships(engine: Engine, prompts: PromptSet, ablation: Ablation, positions: int = 1) -> HeadScores:
    """Ships of every head, prompt by prompt (Eq 9).

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        ablation: of one head at a time.
        positions: average over the first tokens of the unablated answer, teacher-forced; 1 is the paper's.

    Returns:
        values [n_prompts, n_layers, n_heads] in nats.

    Raises:
        InputError: a prompt longer than the model's context; ``positions`` below 1.
    """
    measuring = HeadPass(engine, answer_sequences(engine, prompts, positions), ablation, Readouts(ships=True))
    return measuring.table("ships", measuring.measure([(head,) for head in engine.heads])["ships"])


def mean_ships(engine: Engine, prompts: PromptSet, ablation: Ablation, positions: int = 1) -> FunctionScorer:
    """A scorer of groups: Ships (Eq 9) averaged over the prompts, in nats. Arguments as for :func:`ships`."""
    return scorer_named(engine, prompts, ablation, Score("mean_ships", positions))


def generalized_ships(
    engine: Engine,
    prompts: PromptSet,
    ablation: Ablation,
    subspace: Space = "prompt",
    rank: int = 1,
    state: State = "after_norm",
    centred: bool = False,
) -> FunctionScorer:
    """A scorer of groups: Generalized Ships (Eq 11), in degrees.

    Args:
        engine: the model.
        prompts: the dataset Q.
        ablation: of the groups' heads.
        subspace: ``prompt``, left singular vectors as in the released code, or ``representation``, right ones as in
            the paper's text. The first sees only a change in how prompts load on the main direction.
        rank: number of principal angles that are summed (r; the released code has 1).
        state: last-token state after the final norm (released code) or before it.
        centred: subtract the mean over prompts first.

    Raises:
        InputError: fewer than two prompts, or a rank that they do not allow (:func:`.subspace.refuse_rank`).
    """
    return scorer_named(
        engine, prompts, ablation, Score(_GENERALIZED + subspace, rank=rank, state=state, centred=centred)
    )


def refusal_score(
    engine: Engine,
    prompts: PromptSet,
    ablation: Ablation,
    openers: Sequence[Opener] | None = None,
    judge: Judge | None = None,
) -> FunctionScorer:
    """A signed scorer of groups: the drop of log P(R) / (1 - P(R)) of the next token, mean over prompts, in nats.

    These are the log-odds of refusal_direction's selection score. Arguments and errors as for :func:`scorer_named`.
    """
    return scorer_named(engine, prompts, ablation, "refusal_score", openers, judge)


def answer_sequences(engine: Engine, prompts: PromptSet, positions: int) -> tuple[TokenSequence, ...]:
    """The prompts, each with the first ``positions - 1`` tokens of its unablated answer, teacher-forced.

    Warns where nearly all answers begin with the same blank token.
    """
    if positions < 1:
        raise InputError(f"positions counts answer tokens and is at least 1; got {positions}")
    encoded = engine.ask(prompts).token_ids
    answers = [answer.token_ids for answer in generate(engine, prompts, max_new_tokens=positions)]
    _warn_of_shared_first_token(engine, [answer[0] for answer in answers if answer], positions)
    return tuple(
        TokenSequence(token_ids + answer[: positions - 1], n_wanted=min(len(answer), positions - 1) + 1)
        for token_ids, answer in zip(encoded, answers, strict=True)
    )


def _warn_of_shared_first_token(engine: Engine, first_tokens: Sequence[int], positions: int) -> None:
    if positions > 1 or not first_tokens:
        return
    (token, count), n = Counter(first_tokens).most_common(1)[0], len(first_tokens)
    text = engine.tokenizer.decode([token])
    if count >= _SHARED * n and not text.strip():
        warnings.warn(
            f"{count} of {n} unablated answers begin with the same blank token {text!r}, which hides what an ablation "
            "does to the words after it: use mean_ships with positions=2 or more",
            SharedFirstTokenWarning,
            stacklevel=3,
        )


def openers_of(engine: Engine, answers: Sequence[JudgedAnswer]) -> tuple[Opener, ...]:
    """First tokens of the refused answers, most frequent first; empty where nothing was refused.

    An answer after a think block is left out: the token after the prompt begins a thought.

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


def find_openers(engine: Engine, prompts: PromptSet, judge: Judge) -> tuple[Opener, ...]:
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

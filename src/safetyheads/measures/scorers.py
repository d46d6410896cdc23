"""The scores by name: Ships, mean Ships, Generalized Ships and the refusal score."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION, Ablation, AnyAblation
from safetyheads.answers.decoding import Decoding, generate
from safetyheads.answers.judging import AnyJudge, JudgedAnswer, answers_under
from safetyheads.display import Shown
from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.files import read_toml
from safetyheads.heads import Group, all_heads
from safetyheads.measures.head_pass import HeadPass, Readouts, Score, State
from safetyheads.measures.sahara import rank_heads, score_heads
from safetyheads.measures.screening import Extent, Missed, Proposal, missed, propose
from safetyheads.measures.subspace import Space
from safetyheads.model.engine import Engine, ask
from safetyheads.model.packing import TokenSequence
from safetyheads.prompts.asked import AnyPrompts, decode_text
from safetyheads.scores import FunctionScorer, HeadScores

LEAD = "mean_ships"
"""The score that the verdict is about: it separates known heads best."""
ANGLES = (Score("generalized_ships_prompt"), Score("generalized_ships_representation"))
"""Generalized Ships as in the released code, and as in the text."""
SCORE_LABELS: dict[str, str] = read_toml(Path(__file__).with_name("score_labels.toml"))
"""What a reader is told that each score is."""
OPENER_TOKENS = 32
"""New tokens that a judge sees to find the refusals whose openers are counted."""
LEAST_OPENED = 0.05
"""Least share of the refusals that an opener opens; of answers that comply, and of benign ones, it opens less."""
OnGroups: TypeAlias = Callable[[int], None] | None
"""Called with the number of groups just scored."""

# The warning is given where this share of the answers begins with the same blank token.
_SHARED = 0.9


class FirstTokenWarning(UserWarning):
    """First tokens hide what an ablation does to the words after them, or do not tell refusals from other answers."""


@dataclass(frozen=True, slots=True)
class Opener(Shown):
    """A first token of the model's own refusals."""

    token_id: int
    """Its id."""
    text: str
    count: int
    """Number of refusals that began with it ..."""
    n_refused: int = 0
    """... of so many."""
    n_complied: int = 0
    """Number of answers that complied and began with it ..."""
    of_complied: int = 0
    """... of so many."""
    n_benign: int = 0
    """Number of answers to benign prompts that began with it and do not refuse ..."""
    of_benign: int = 0
    """... of so many."""

    def __str__(self) -> str:
        others = {"complied": (self.n_complied, self.of_complied), "benign": (self.n_benign, self.of_benign)}
        beside = [f"{count} of {n} {name}" for name, (count, n) in others.items() if n]
        return f"{self.text!r} {self.count} of {self.n_refused} refusals" + "".join(f", {words}" for words in beside)

    @property
    def is_shared(self) -> bool:
        """Whether it opens :data:`LEAST_OPENED` of the answers that comply, or of the benign ones."""
        pairs = ((self.n_complied, self.of_complied), (self.n_benign, self.of_benign))
        return any(count and count >= LEAST_OPENED * n for count, n in pairs)


def scorer_named(
    engine: Engine,
    prompts: AnyPrompts,
    ablation: AnyAblation,
    score: Score | str,
    openers: Sequence[Opener] | None = None,
    judge: AnyJudge | None = None,
    on_groups: OnGroups = None,
) -> FunctionScorer:
    """A scorer of groups of heads by the score's name; the unablated model is captured once, here.

    A refusal score takes R from ``openers``, by default those of the model's own unablated refusals of these prompts,
    which ``judge`` finds: by default ``phrases`` where the model has a chat template, else ``paper``.

    Raises:
        InputError: an unknown score, or prompts that it cannot work with.
        SafetyheadsError: a refusal score without openers, and the model refuses none of the prompts.
    """
    score, ablation = score if isinstance(score, Score) else Score(score), Ablation.parse(ablation)
    if score.name == "refusal_score" and not openers:
        openers = find_openers(engine, prompts, judge)
    tokens = tuple(opener.token_id for opener in openers or ())
    if score.has_positions:
        sequences = answer_sequences(engine, prompts, score.positions)
    else:
        sequences = tuple(TokenSequence(token_ids) for token_ids in ask(engine, prompts).token_ids)
    return scorer_of(HeadPass(engine, sequences, ablation, score.readouts(tokens)), score, on_groups)


def scorer_of(measuring: HeadPass, score: Score | str, on_groups: OnGroups = None) -> FunctionScorer:
    """One readout of a pass, averaged over the prompts, as a scorer of groups."""
    score = score if isinstance(score, Score) else Score(score)
    unit = "degrees" if score.is_generalized else "nats"
    readout = "ships" if score.name == "mean_ships" else score.label

    def score_groups(groups: Sequence[Group]) -> Tensor:
        values = measuring.measure(groups, on_groups)[readout]
        return values.mean(dim=1) if values.ndim == 2 else values

    return FunctionScorer(score_groups, score.label, unit, measuring.resolution(unit))


def ships(engine: Engine, prompts: AnyPrompts, ablation: AnyAblation, positions: int = 1) -> HeadScores:
    """Ships of every head, prompt by prompt (Eq 9): values [n_prompts, n_layers, n_heads], in nats.

    ``positions`` first tokens of the unablated answer, teacher-forced, are averaged over; 1 is the paper's. An
    InputError where they are below 1, or a prompt is longer than the model's context.
    """
    measuring = HeadPass(
        engine, answer_sequences(engine, prompts, positions), Ablation.parse(ablation), Readouts(ships=True)
    )
    return measuring.table("ships", measuring.measure([(head,) for head in engine.heads])["ships"])


@dataclass(frozen=True, slots=True, repr=False)
class Rescored(Shown):
    """Exact scores of the heads that a screening found, and a bound on the others."""

    scores: HeadScores
    """[n_layers, n_heads]; NaN where a head was not scored exactly."""
    proposal: Proposal = field(repr=False)
    missed: Missed


def screened_ships(
    engine: Engine,
    prompts: AnyPrompts,
    ablation: AnyAblation,
    extent: Extent | None = None,
    top: int = 10,
    positions: int = 1,
) -> Rescored:
    """Mean Ships (Eq 9), in nats, of the heads that a screening finds on some of the prompts.

    The bound on missed heads is about the ``top`` best ones; ``positions`` is as for :func:`ships`.
    """
    sequences, ablation = answer_sequences(engine, prompts, positions), Ablation.parse(ablation)

    def scorer_on(numbers: Sequence[int]) -> FunctionScorer:
        chosen = [sequences[number] for number in numbers]
        return scorer_of(HeadPass(engine, chosen, ablation, Readouts(ships=True)), "mean_ships")

    whole = HeadPass(engine, sequences, ablation, Readouts(ships=True))
    proposal = propose(scorer_on, engine.heads, whole.least_sure_first, extent or Extent())
    heads = all_heads(engine.n_layers, engine.n_heads)
    table = score_heads(scorer_of(whole, "mean_ships"), (), proposal.heads, heads)
    return Rescored(table, proposal, missed(table, proposal, top))


def mean_ships(engine: Engine, prompts: AnyPrompts, ablation: AnyAblation, positions: int = 1) -> FunctionScorer:
    """A scorer of groups: Ships (Eq 9) averaged over the prompts, in nats. Arguments as for :func:`ships`."""
    return scorer_named(engine, prompts, ablation, Score("mean_ships", positions))


def generalized_ships(
    engine: Engine,
    prompts: AnyPrompts,
    ablation: AnyAblation,
    space: Space = "prompt",
    rank: int = 1,
    state: State = "after_norm",
    centred: bool = False,
) -> FunctionScorer:
    """A scorer of groups: Generalized Ships (Eq 11), in degrees; its settings are those of :class:`Score`.

    ``prompt`` takes left singular vectors as the released code does, and sees only a change in how prompts load on the
    main direction; ``representation`` takes right ones as in the paper's text. An InputError where there are fewer than
    two prompts, or they do not allow the rank (:func:`.subspace.refuse_rank`).
    """
    score = Score(f"generalized_ships_{space}", rank=rank, state=state, centred=centred)
    return scorer_named(engine, prompts, ablation, score)


def refusal_score(
    engine: Engine,
    prompts: AnyPrompts,
    ablation: AnyAblation,
    openers: Sequence[Opener] | None = None,
    judge: AnyJudge | None = None,
) -> FunctionScorer:
    """A signed scorer of groups: the drop of log P(R) / (1 - P(R)) of the next token, mean over prompts, in nats.

    These are the log-odds of refusal_direction's selection score. Arguments and errors as for :func:`scorer_named`.
    """
    return scorer_named(engine, prompts, ablation, "refusal_score", openers, judge)


def answer_sequences(engine: Engine, prompts: AnyPrompts, positions: int) -> tuple[TokenSequence, ...]:
    """The prompts, each with the first ``positions - 1`` tokens of its unablated answer; warns of a blank first."""
    if positions < 1:
        raise InputError(f"positions counts answer tokens and is at least 1; got {positions}")
    encoded = ask(engine, prompts).token_ids
    answers: list[tuple[int, ...]] = [()] * len(encoded)
    if positions > 1 or engine.capabilities.caches:  # scores of the first token need no answers
        answers = [answer.token_ids for answer in generate(engine, prompts, max_new_tokens=positions)]
    first_tokens = Counter(answer[0] for answer in answers if answer)
    if positions == 1 and first_tokens:
        (token, count), n = first_tokens.most_common(1)[0], first_tokens.total()
        text = decode_text(engine.tokenizer, [token], False)
        if count >= _SHARED * n and not text.strip():
            warnings.warn(
                f"{count} of {n} unablated answers begin with the same blank token {text!r}, which hides what an "
                "ablation does to the words after it: use mean_ships with positions=2 or more",
                FirstTokenWarning,
                stacklevel=2,
            )
    return tuple(
        TokenSequence(token_ids + answer[: positions - 1], n_wanted=min(len(answer), positions - 1) + 1)
        for token_ids, answer in zip(encoded, answers, strict=True)
    )


def openers_of(
    engine: Engine, answers: Sequence[JudgedAnswer], needs: bool = False, benign: Sequence[JudgedAnswer] = ()
) -> tuple[Opener, ...]:
    """First tokens that tell refusals from other answers, most frequent first; warns where most are blank.

    Each opens at least :data:`LEAST_OPENED` of the refused answers, and less than that of those that complied and of
    the ``benign`` ones. An answer after a think block is left out: the token after the prompt begins a thought. Where
    there is none and the caller ``needs`` one, a SafetyheadsError says why.
    """

    def firsts_of(rows: Iterable[JudgedAnswer]) -> Counter[int]:
        return Counter(row.token_ids[0] for row in rows if row.token_ids and not row.thinks)

    firsts = firsts_of(row for row in answers if row.verdict.label == "refused")
    complied = firsts_of(row for row in answers if row.verdict.label == "complied")
    others = firsts_of(row for row in benign if row.verdict.label != "refused")
    n_refused, of_complied, of_benign = firsts.total(), complied.total(), others.total()
    text_of = {token: decode_text(engine.tokenizer, [token], False) for token in firsts}
    found = [
        Opener(token, text_of[token], count, n_refused, complied[token], of_complied, others[token], of_benign)
        for token, count in sorted(firsts.items(), key=lambda item: (-item[1], item[0]))
    ]
    frequent = [opener for opener in found if opener.count >= LEAST_OPENED * n_refused]
    openers = tuple(opener for opener in frequent if not opener.is_shared)
    if shared := [opener for opener in frequent if opener.is_shared]:
        warnings.warn(
            f"left out of the refusal score, since other answers open so too: {'; '.join(map(str, shared))}",
            FirstTokenWarning,
            stacklevel=2,
        )
    blank = sum(opener.count for opener in openers if not opener.text.strip())
    if 2 * blank > n_refused:
        warnings.warn(
            f"{blank} of {n_refused} refusals open with a blank token, which answers may open with too: "
            "the refusal score says little here",
            FirstTokenWarning,
            stacklevel=2,
        )
    if needs and not openers and any(row.thinks for row in answers):
        raise SafetyheadsError("the model thinks before it answers, so no refusal opens with the token after a prompt")
    if needs and not openers:
        if firsts:
            raise SafetyheadsError("no token opens refusals alone, so there is no refusal score")
        raise SafetyheadsError("the model refuses none of these prompts, so there is no refusal to score")
    return openers


def find_openers(engine: Engine, prompts: AnyPrompts, judge: AnyJudge | None = None) -> tuple[Opener, ...]:
    """The openers of the model's own unablated refusals of these prompts; :class:`SafetyheadsError` if it has none."""
    asked, decoding = ask(engine, prompts), Decoding(OPENER_TOKENS, full_answers=True)
    (answers,) = answers_under(engine, asked, [[()] * len(asked)], UNDIFFERENTIATED_ATTENTION, judge, decoding)
    return openers_of(engine, answers, needs=True)


def scores_of(measuring: HeadPass) -> dict[str, HeadScores]:
    """Every score that a pass reads, of each head alone: mean Ships, angles, the refusal score."""
    readouts = measuring.readouts
    names = [*[LEAD] * readouts.ships, *(angle.label for angle in readouts.angles)]
    names += ["refusal_score"] * bool(readouts.openers)
    return {name: rank_heads(scorer_of(measuring, name), measuring.engine.heads) for name in names}


def score_as_json(name: str, scores: HeadScores, n_prompts: int) -> dict[str, Any]:
    """A score of every head as results hold it."""
    return {"label": SCORE_LABELS.get(name, name), "unit": scores.unit, "n": n_prompts, "values": scores.as_lists()}

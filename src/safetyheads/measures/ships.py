"""Ships, mean Ships and Generalized Ships: the paper's scores by name. Owns their arguments; the pass does the work."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.measures.head_pass import Angle, HeadPass, Readings, State
from safetyheads.measures.subspace import Space
from safetyheads.model.planning import TokenSequence
from safetyheads.scores import FunctionScorer, HeadScores

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

# Share of the answers that must begin with the same blank token for the warning.
_SHARED = 0.9


class SharedFirstTokenWarning(UserWarning):
    """Nearly all unablated answers begin with one blank token, which hides what an ablation does to the words after."""


def answer_sequences(engine: Engine, prompts: PromptSet, positions: int) -> tuple[TokenSequence, ...]:
    """The prompts, each with the first ``positions - 1`` tokens of its unablated answer, teacher-forced."""
    from safetyheads.answers.decoding import generate

    if positions < 1:
        raise InputError(f"positions counts answer tokens and is at least 1; got {positions}")
    encoded = engine.ask(prompts).token_ids
    answers = [made.token_ids for made in generate(engine, prompts, max_new_tokens=positions)]
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
            "does to the words after it: use positions=2 or more",
            SharedFirstTokenWarning,
            stacklevel=3,
        )


def ships(engine: Engine, prompts: PromptSet, ablation: Ablation, positions: int = 1) -> HeadScores:
    """Ships of every head, prompt by prompt (Eq 9).

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        ablation: of one head at a time.
        positions: average over the first so many tokens of the unablated answer, teacher-forced; 1 is the paper's.

    Returns:
        values [n_prompts, n_layers, n_heads] in nats.

    Raises:
        InputError: a prompt longer than the model's context; ``positions`` below 1.
    """
    measuring = HeadPass.begin(engine, answer_sequences(engine, prompts, positions), ablation, Readings(ships=True))
    return measuring.table("ships", measuring.measure([(head,) for head in engine.heads])["ships"])


def mean_ships(engine: Engine, prompts: PromptSet, ablation: Ablation, positions: int = 1) -> FunctionScorer:
    """A scorer of groups: Ships (Eq 9) averaged over the prompts, in nats. Arguments as for :func:`ships`."""
    sequences = answer_sequences(engine, prompts, positions)
    return HeadPass.begin(engine, sequences, ablation, Readings(ships=True)).scorer("mean_ships")


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
        rank: principal angles summed (r; the released code has 1).
        state: last-token state after the final norm (released code) or before it.
        centred: subtract the mean over prompts first.

    Raises:
        InputError: fewer than two prompts, or a rank that they do not allow (:func:`.subspace.refuse_rank`).
    """
    angle = Angle(subspace, rank, state, centred)
    sequences = tuple(TokenSequence(token_ids) for token_ids in engine.ask(prompts).token_ids)
    return HeadPass.begin(engine, sequences, ablation, Readings(angles=(angle,))).scorer(angle.name)

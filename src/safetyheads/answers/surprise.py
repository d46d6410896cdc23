"""Measures how surprising an answer is to the unablated model, and how much surprise its own answers show.

Rules of words find answers that are empty, loop or echo. What they cannot see, such as words in no order, another
prompt's answer or loops longer than the rules look for, is unlikely to the model that nobody ablated.
"""

import hashlib
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter
from typing import TypeAlias

import numpy as np
import torch

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import Plan, lay_out, longest_row

AnswerKey: TypeAlias = tuple[int, bytes]
"""Number of the prompt, and hash of the answer's tokens: a scan holds the keys of all its answers."""

OWN_QUANTILE = 0.95
"""The unablated answers' surprise is taken at this quantile."""


def answer_key(number: int, token_ids: Sequence[int]) -> AnswerKey:
    """The key of an answer to the prompt of that number."""
    return number, hashlib.blake2b(np.asarray(token_ids, np.int64).tobytes(), digest_size=16).digest()


def coherence_limit(own: Sequence[float], factor: float, allowance: float) -> float | None:
    """Surprise above which an answer is not coherent, in nats a token; None where no own answer was measured.

    It is ``factor`` times what few of the model's ``own`` unablated answers exceed, and an ``allowance``: answers that
    it would have refused surprise it by more than their first token, however sound they are.
    """
    return factor * float(np.quantile(own, OWN_QUANTILE)) + allowance if len(own) else None


class Surprises:
    """Mean of -log p of each answer's own tokens under the unablated model, in nats a token; each answer once.

    The first token is not counted: there a model that refuses decides to, so that of a compliance it is a surprise of
    4 to 6 nats, as much as a wrong word later. An answer of one token has none.
    """

    def __init__(self, engine: Engine, prompts: Sequence[tuple[int, ...]], n_tokens: int | None = None) -> None:
        """Prepare for answers to these prompts; ``n_tokens`` is the most in a packed row (by default what fits).

        Other rows move the last bits, so a run that continues passes the number that it began with.
        """
        self.engine, self.prompts = engine, tuple(prompts)
        self.n_tokens = n_tokens or engine.tokens_that_fit()
        self.known: dict[AnswerKey, float] = {}
        """What was measured so far, or read back."""

    def measure(self, answers: Sequence[tuple[int, tuple[int, ...], int]]) -> None:
        """Measure the answers that are not known.

        Each has the number of its prompt, its tokens, and how many of them are a think block, which is not counted.
        """
        measurable = {answer_key(number, ids): (number, ids, n) for number, ids, n in answers if len(ids) > n + 1}
        # Answers to one prompt share a row, behind the prompt.
        keys = sorted((key for key in measurable if key not in self.known), key=itemgetter(0))
        new = [measurable[key] for key in keys]
        sequences = [TokenSequence(self.prompts[number] + ids[:-1], len(ids) - n - 1) for number, ids, n in new]
        values = surprises_of(self.engine, sequences, [ids[n + 1 :] for _, ids, n in new], self.n_tokens)
        self.known.update(zip(keys, values, strict=True))


@torch.inference_mode()
def surprises_of(
    engine: Engine, sequences: Sequence[TokenSequence], wanted: Sequence[tuple[int, ...]], n_tokens: int
) -> list[float]:
    """Mean of -log p of the tokens ``wanted`` after each sequence's last states, one a state, in float64."""
    if not sequences:
        return []
    engine.prove_up_to(max(len(sequence.token_ids) for sequence in sequences))
    plan = lay_out(sequences, engine.costs, n_tokens)
    if engine.architecture.turns:
        # These families take places in the row for positions, so the row's length has to be proved.
        engine.prove_up_to(longest_row(sequences, plan))
    means, last = list[float](), engine.n_layers - 1
    # Row by row: the answers of a chunk may be too many to hold the states of all.
    for members in plan.rows:
        row = Plan((members,), 1, plan.threads)
        captures = engine.captured(sequences, (), UNDIFFERENTIATED_ATTENTION, row, last)
        states = engine.replayed(captures, [()], UNDIFFERENTIATED_ATTENTION, last)[0]
        tokens, chosen = iter([[token] for member in members for token in wanted[member]]), []
        for logits in engine.logit_chunks(states):
            these = torch.tensor([*islice(tokens, len(logits))], device=logits.device)
            chosen.append(torch.log_softmax(logits.double(), dim=-1).gather(1, these).squeeze(1))
        parts = torch.split(torch.cat(chosen), [len(wanted[member]) for member in members])
        means += [-float(part.mean()) for part in parts]
    return means

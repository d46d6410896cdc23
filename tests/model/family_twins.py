"""What the engine gives on each family, measured against the oracle. Owns the comparison; the tests judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

import torch
from families import oracle_of, proved
from tiny_models import END, prompts_of

from safetyheads import UNDIFFERENTIATED_ATTENTION, Ablation, Head, ships
from safetyheads.ablation import ABLATION_KINDS
from safetyheads.batching import Plan, TokenSequence
from safetyheads.capabilities import Capabilities
from safetyheads.drafted import Decoding, DraftedAnswers
from safetyheads.generation import Request, answer

# Tokens that lead by more have to be equal.
LEAD = 1e-4
N_TOKENS = 3

# Of unequal lengths, with a common beginning, longer than every window and chunk.
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22, 17, 30, 2), (5, 9, 12, 40, 7, 7, 19, 33))
SHORT = (21, 50, 13)
KINDS = [Ablation(name, 0.01) for name in ABLATION_KINDS]
"""At an epsilon large enough that a forgotten factor would show."""
SLOW = Capabilities(**{each.name: each.name in ("plain_head", "caches") for each in fields(Capabilities)})
"""A prompt a row, every layer run again, nothing left out."""


@dataclass(frozen=True)
class Measured:
    """One family, against its slow twin."""

    states: Mapping[str, float]
    """Kind of ablation -> largest difference of last hidden states over groups, prompts and paths, of the largest."""
    least_change: Mapping[str, float]
    """Kind of ablation -> how far the group that changes least moves them, likewise: or no difference could be seen."""
    ships: float
    """Largest difference of Ships under the paper's epsilon, nats."""
    limit: float
    """The same, from Ships under exactly even weights over the keys that the mask allows."""
    largest_ships: float
    """Of the oracle, nats."""
    answers: bool
    """Whether greedy answers of uneven prompts under mixed groups in one batch are the oracle's."""
    drafts: bool
    """Whether answers by drafts are those."""

    @property
    def largest(self) -> float:
        """Largest difference of last hidden states over all kinds."""
        return max(self.states.values())


def groups_of(name):
    """Single heads of the first, a middle and the last layer; a pair that shares its keys; one of several layers."""
    layers = proved(name).architecture.with_heads
    first, middle, last = layers[0], layers[len(layers) // 2], layers[-1]
    return (
        (Head(first, 0),),
        (Head(middle, 1),),
        (Head(last, 0),),
        (Head(first, 2), Head(first, 3)),
        tuple(sorted({Head(first, 1), Head(middle, 3), Head(last, 2)})),
    )


@cache
def seen(name, prompt, group=(), ablation=None, uniform=False):
    """The oracle's run, once."""
    return oracle_of(name).run(prompt, group, ablation, uniform)


def slow_states(name, groups, ablation):
    """[n_groups, n_prompts, d_model] of the oracle."""
    return torch.stack(
        [torch.stack([seen(name, prompt, group, ablation).last_hidden for prompt in PROMPTS]) for group in groups]
    )


def states(name, groups, ablation, capabilities):
    """The same of the engine, by the quick paths given."""
    engine = proved(name)
    before, engine.capabilities = engine.capabilities, capabilities
    sequences = [TokenSequence(prompt) for prompt in PROMPTS]
    layout = Plan(((0, 1),) if capabilities.packs else ((0,), (1,)), 4, 1)
    found = {}
    try:
        for batch in engine.batches(groups, layout):
            captures = engine.captured(sequences, (), ablation, layout, batch.start)
            hidden = engine.replayed(captures, [groups[index] for index in batch.indices], ablation, batch.start)
            found |= dict(zip(batch.indices, hidden, strict=True))
    finally:
        engine.capabilities = before
    return torch.stack([found[index] for index in range(len(groups))])


def relative(ours, reference):
    return float((ours - reference).abs().max() / reference.abs().max())


def kl(before, after):
    """Between two distributions of the next token, given as logits; nats."""
    before, after = (torch.log_softmax(logits.double(), dim=-1) for logits in (before, after))
    return float((before.exp() * (before - after)).sum())


def slow_answer(name, prompt, group, ablation):
    """Greedy tokens, a run over everything for each, up to the first close call; and whether there was one."""
    made = []
    while len(made) < N_TOKENS:
        best = seen(name, (*prompt, *made), group, ablation).logits.topk(2)
        if float(best.values[0] - best.values[1]) < LEAD:
            return tuple(made), True
        if int(best.indices[0]) == END:
            break
        made.append(int(best.indices[0]))
    return tuple(made), False


@cache
def measured(name):
    """Every kind of ablation by the quick paths and the plain one; Ships; answers."""
    engine, groups = proved(name), groups_of(name)
    unablated = slow_states(name, [()], None)
    differences, changes = {}, {}
    for ablation in KINDS:
        # All groups, those of one layer too, for undifferentiated attention; the others meet the same replays.
        some = groups if ablation.name == UNDIFFERENTIATED_ATTENTION.name else groups[-2:]
        reference = slow_states(name, some, ablation)
        quick = states(name, some, ablation, engine.capabilities)
        plain = states(name, some[-2:], ablation, SLOW)
        differences[ablation.name] = max(relative(quick, reference), relative(plain, reference[-2:]))
        changes[ablation.name] = float((reference - unablated).abs().amax(dim=(1, 2)).min() / reference.abs().max())
    return Measured(differences, changes, *_ships(name), *_answers(name))


def _ships(name):
    engine = proved(name)
    ours = ships(engine, prompts_of(*PROMPTS), UNDIFFERENTIATED_ATTENTION).values
    assert bool(ours[:, list(engine.architecture.without_heads)].isnan().all())
    exact, limit, found = [], [], []
    for (head,) in groups_of(name)[:3]:
        for number, prompt in enumerate(PROMPTS):
            before, one = seen(name, prompt).logits, float(ours[number, head.layer, head.index])
            found.append(kl(before, seen(name, prompt, (head,), UNDIFFERENTIATED_ATTENTION).logits))
            exact.append(abs(one - found[-1]))
            limit.append(abs(one - kl(before, seen(name, prompt, (head,), UNDIFFERENTIATED_ATTENTION, True).logits)))
    return max(exact), max(limit), max(found)


def _answers(name):
    engine, ablation = proved(name), Ablation("undifferentiated_attention_key", 0.01)
    *_, pair, several = groups_of(name)
    asked = [(PROMPTS[0], several), (PROMPTS[1], pair), (PROMPTS[1], ()), (SHORT, several)]
    equal = []
    for one, given in zip(answer(engine, [Request(*each) for each in asked], ablation, N_TOKENS), asked, strict=True):
        slow, close = slow_answer(name, *given, ablation)
        assert slow or not close, "a close call at the first token; choose another prompt"
        equal.append((one.token_ids[: len(slow)] if close else one.token_ids) == slow)
    encoded, groups = [*PROMPTS, SHORT], [pair, several]
    table, _ = DraftedAnswers.begin(engine, encoded, ablation, Decoding(N_TOKENS), None).answers(groups)
    plainly = answer(engine, [Request(prompt, group) for group in groups for prompt in encoded], ablation, N_TOKENS)
    drafted = [one.token_ids for row in table for one in row]
    return all(equal), drafted == [one.token_ids for one in plainly]

"""Measures what the engine gives on each family against the oracle; the tests judge it.

The oracle's runs are kept, since they cost most; of single heads it makes those of one prompt, which the quick paths
have packed behind another. What turns with the family is the kind for heads captured once for several groups, and the
second kind that answers are made under.
"""

from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace

import torch
from families import FAMILIES, oracle_of, proved
from tiny_models import END, prompts_of, tokenizer

from safetyheads import UNDIFFERENTIATED_ATTENTION, Ablation, Engine, Head, ships
from safetyheads.ablation import ABLATION_KINDS, SCALING_CONTRIBUTION
from safetyheads.answers.decoding import Decoding, Request, answer
from safetyheads.answers.drafts import VerifiedDrafts
from safetyheads.model.architecture import Capabilities
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import Plan

# Tokens that lead by more have to be equal.
LEAD = 1e-4
N_TOKENS = 3

# Of unequal lengths, with a common beginning, longer than every window and chunk.
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22, 17, 30, 2), (5, 9, 12, 40, 7, 7, 19, 33))
SHORT = (21, 50, 13)
KINDS = [Ablation(name, 0.01) for name in ABLATION_KINDS]
"""At an epsilon large enough that a forgotten factor would show."""
SLOW = {each.name: False for each in fields(Capabilities) if each.name not in ("plain_head", "caches")}
"""A prompt a row, every layer run again, nothing left out."""


def starts_of(name):
    """The first, a middle and the last layer with heads."""
    layers = proved(name).architecture.with_heads
    return layers[0], layers[len(layers) // 2], layers[-1]


def turn_of(name, choices):
    """One of the choices, another one for the next family."""
    return choices[list(FAMILIES).index(name) % len(choices)]


def groups_of(name):
    """Single heads of the first, a middle and the last layer; a pair that shares its keys; one of several layers."""
    first, middle, last = starts_of(name)
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


def slow_states(name, groups, ablation, prompts=PROMPTS, uniform=False):
    """[n_groups, n_prompts, d_model] of the oracle."""
    found = [seen(name, prompt, group, ablation, uniform).last_hidden for group in groups for prompt in prompts]
    return torch.stack(found).unflatten(0, (len(groups), len(prompts)))


def engine_by(name, **capabilities):
    """The family's model by these quick paths."""
    return Engine(proved(name).model, tokenizer(), capabilities=replace(proved(name).capabilities, **capabilities))


def states(engine, groups, ablation, prompts=PROMPTS, common=()):
    """The same of an engine; ``common`` heads, in all groups, are captured once."""
    sequences, numbers = [TokenSequence(prompt) for prompt in prompts], range(len(prompts))
    layout = Plan((tuple(numbers),) if engine.capabilities.packs else tuple((number,) for number in numbers), 4, 1)
    found = {}
    for indices, start in engine.batches(groups, layout):
        captures = engine.captured(sequences, common, ablation, layout, start)
        hidden = engine.replayed(captures, [groups[index] for index in indices], ablation, start)
        found |= dict(zip(indices, hidden, strict=True))
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
    """One family, against its slow twin, by the quick paths and the plain one.

    states: kind of ablation -> largest difference of last hidden states over groups, prompts and paths, of the largest.
    captured: likewise, of groups with a head that was ablated in the captured run; one kind a family.
    least_change: kind -> how far the group that changes least moves them, likewise: or no difference could be seen.
    ships: largest difference of Ships under the paper's epsilon, nats.
    limit: the same, from Ships under exactly even weights over the keys that the mask allows.
    largest_ships: of the oracle, nats.
    answers: whether greedy answers of uneven prompts under mixed groups in one batch are the oracle's: for the key's
    scale, and for the query's or the output's.
    drafts: whether answers by drafts are those.
    """
    groups = groups_of(name)
    singles, several = slice(0, 3), slice(3, 5)
    unablated = slow_states(name, [()], None)
    differences, changes = {}, {}
    for ablation in KINDS:
        quick, found, moved = states(proved(name), groups, ablation), [], []
        for some, prompts in ((singles, PROMPTS[1:]), (several, PROMPTS)):
            reference = slow_states(name, groups[some], ablation, prompts)
            plain = states(engine_by(name, **SLOW), groups[some], ablation, prompts)
            found += [relative(ours, reference) for ours in (quick[some, -len(prompts) :], plain)]
            change = (reference - unablated[:, -len(prompts) :]).abs().amax(dim=(1, 2))
            moved.append(float(change.min() / reference.abs().max()))
        differences[ablation.name], changes[ablation.name] = max(found), min(moved)
    return SimpleNamespace(
        states=differences, captured=_captured(name), least_change=changes, **_ships(name), **_answers(name)
    )


def _captured(name):
    """A head of the first layer in every group, ablated in the captured run; replays start at the other heads."""
    (first, middle, last), ablation = starts_of(name), turn_of(name, KINDS)
    common = (Head(first, 1),)
    groups = [(*common, Head(middle, 0)), (*common, Head(last, 3))]
    ours = states(proved(name), groups, ablation, common=common)
    return relative(ours[:, 1:], slow_states(name, groups, ablation, PROMPTS[1:]))


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
    return {"ships": max(exact), "limit": max(limit), "largest_ships": max(found)}


def _answers(name):
    engine, ablation = proved(name), Ablation("undifferentiated_attention_key", 0.01)
    second = turn_of(name, (UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION)).at(0.01)
    *_, pair, several = groups_of(name)
    asked = [(PROMPTS[0], several), (PROMPTS[1], pair), (PROMPTS[1], ()), (SHORT, several)]
    equal = [*_as_the_oracles(name, ablation, asked), *_as_the_oracles(name, second, [asked[0], (SHORT, pair)])]
    encoded = [*PROMPTS, SHORT]
    places = [(prompt, group) for group in (pair, several) for prompt in range(len(encoded))]
    drafted, _ = VerifiedDrafts(engine, encoded, ablation, Decoding(N_TOKENS), None).answers(places)
    requests = [Request(encoded[prompt], group) for prompt, group in places]
    plainly = answer(engine, requests, Decoding(N_TOKENS), ablation)
    same = [one.token_ids for one in drafted] == [one.token_ids for one in plainly]
    return {"answers": all(equal), "drafts": same}


def _as_the_oracles(name, ablation, asked):
    """For each (prompt, group), all in one left-padded batch with a cache, whether the oracle answers likewise."""
    made = answer(proved(name), [Request(*each) for each in asked], Decoding(N_TOKENS), ablation)
    for one, given in zip(made, asked, strict=True):
        slow, close = slow_answer(name, *given, ablation)
        assert slow or not close, "a close call at the first token; choose another prompt"
        yield (one.token_ids[: len(slow)] if close else one.token_ids) == slow

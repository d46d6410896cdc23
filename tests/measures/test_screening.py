"""Screening: rounds on few prompts against the rounds written out, and what is shown of it."""

import math
import random

import numpy as np
import pytest
import torch
from tiny_models import engine_of, prompts_of

from safetyheads import SCALING_CONTRIBUTION, Head, InputError, rank_heads, sahara, screened_ships, ships
from safetyheads.heads import all_heads
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.sahara import score_heads
from safetyheads.measures.scorers import ANGLES, mean_ships
from safetyheads.measures.screening import PROMPTS, Extent, costs_of, missed, propose, screened_sahara
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import row_sizes

N_HEADS, N_PROMPTS = 48, 30
HEADS = all_heads(6, 8)
ORDER = random.Random(0).sample(range(N_PROMPTS), N_PROMPTS)
ASKED = [
    tuple(int(token) for token in torch.randint(64, (9,), generator=torch.Generator().manual_seed(n))) for n in range(7)
]


class Table:
    """Scores [n_heads, n_prompts] of single heads; a group has the sum of its heads' roots. Counts what is asked."""

    def __init__(self, values):
        self.values, self.asked = values, 0

    def on(self, prompts):
        def scores(groups):
            self.asked += len(groups) * len(prompts)
            roots = [
                self.values[[HEADS.index(head) for head in group]][:, list(prompts)].sqrt().sum(0) for group in groups
            ]
            return torch.stack(roots).square().mean(dim=1)

        return scores

    @property
    def whole(self):
        return self.on(range(self.values.shape[1]))


def table(seed, spread=1.0):
    """Effects of heads that fall off, times noise of each prompt."""
    rng = np.random.default_rng(seed)
    values = rng.permutation(np.geomspace(1.0, 1e-3, N_HEADS))[:, None] * rng.lognormal(0, spread, (N_HEADS, N_PROMPTS))
    return Table(torch.from_numpy(values))


@pytest.mark.parametrize("positions", [1, 2])
def test_prompts_come_in_the_order_of_the_models_sureness(positions):
    engine, sureness = engine_of("llama_gqa"), []
    for ids in ASKED:
        logits = engine.model(torch.tensor([ids])).logits[0, len(ids) - positions :]
        sureness.append(float(logits.detach().double().log_softmax(-1).amax(-1).mean()))
    order = sorted(range(len(ASKED)), key=sureness.__getitem__)
    for readouts in (Readouts(ships=True), Readouts(angles=ANGLES)):
        sequences = [TokenSequence(ids, positions) for ids in ASKED]
        assert HeadPass(engine, sequences, SCALING_CONTRIBUTION, readouts).least_sure_first == tuple(order)


@pytest.mark.parametrize("group", [(), (Head(2, 3), Head(0, 1))])
def test_rounds_are_those_written_out(group):
    stored, extent = table(0), Extent(5, 7, seed=3)
    proposal = propose(stored.on, HEADS, ORDER, extent, group)
    left, seen = [head for head in HEADS if head not in group], []
    share = (5 / len(left)) ** (1 / 3)  # so many rounds see fewer than 30 prompts
    for number, (heads, prompts) in enumerate(proposal.rounds):
        assert len(heads) == math.ceil((N_HEADS - len(group)) * share**number)
        assert set(heads) == set(left[: len(heads)])
        assert sorted(prompts) == sorted(ORDER[len(seen) : len(seen) + PROMPTS[number]])
        seen += prompts
        score_of = {head: float(stored.on(seen)([(*group, head)])[0]) for head in heads}
        left = sorted(heads, key=lambda head: -score_of[head])
    assert len(proposal.rounds) == 3
    assert proposal.candidates == tuple(left[:5])
    others = set(HEADS) - set(proposal.candidates) - set(group)
    assert (proposal.n_others, len(set(proposal.sampled)), set(proposal.sampled) - others) == (len(others), 7, set())


def test_of_few_prompts_or_many_candidates_the_ranking_is_the_exact_one_bit_for_bit():
    engine, prompts = engine_of("llama_gqa"), prompts_of(*ASKED[: PROMPTS[0]])
    exact = rank_heads(mean_ships(engine, prompts, SCALING_CONTRIBUTION), engine.heads)
    shown = screened_ships(engine, prompts, SCALING_CONTRIBUTION, Extent(2, 1))
    assert torch.equal(shown.scores.values, exact.values)
    assert (shown.missed.at_most, str(shown.missed)) == (0, "every head was scored on all prompts")
    stored = table(1)
    assert propose(stored.on, HEADS, ORDER, Extent(99, 5)).heads == HEADS
    assert stored.asked == 0


def test_what_is_shown_is_exact_and_the_rest_is_bounded():
    engine, prompts = engine_of("llama_gqa"), prompts_of(*ASKED)
    shown = screened_ships(engine, prompts, SCALING_CONTRIBUTION, Extent(3, 4, seed=1), top=2)
    exact = ships(engine, prompts, SCALING_CONTRIBUTION).mean()
    assert {head for head, _ in shown.scores.ranked()} == set(shown.proposal.heads)
    assert len(set(shown.proposal.heads)) == 7
    # Other rows in a batch move the last bits.
    assert all(score == pytest.approx(exact[head], rel=1e-4, abs=1e-7) for head, score in shown.scores.ranked())
    threshold = sorted((exact[head] for head in shown.proposal.candidates), reverse=True)[1]
    above = [head for head in shown.proposal.sampled if exact[head] > threshold]
    assert (shown.missed.n_found, shown.missed.n_sampled, shown.missed.n_others) == (len(above), 4, 9)
    with pytest.raises(InputError, match="at least one candidate"):
        Extent(0)


def test_the_bound_holds_as_often_as_it_says():
    """Of noise alone few prompts tell nothing, so many of the best heads are missed, and some are sampled."""
    held, widths, n_missed = [], [], 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        stored = Table(torch.from_numpy(rng.lognormal(0, 1, (N_HEADS, N_PROMPTS))))
        proposal = propose(stored.on, HEADS, ORDER, Extent(4, 12, seed=seed))
        exact = score_heads(stored.whole, (), HEADS, HEADS)
        shown = missed(score_heads(stored.whole, (), proposal.heads, HEADS), proposal, 4)
        threshold = min(exact[head] for head in proposal.candidates)
        true = sum(exact[head] > threshold for head in HEADS if head not in proposal.candidates)
        held.append(shown.at_most >= true)
        widths.append(shown.at_most)
        n_missed += true
        assert shown.at_most >= shown.n_found
    assert n_missed > 200
    assert np.mean(held) >= 0.95
    assert min(widths) < 44  # it says something


def test_no_sample_bounds_nothing():
    stored = table(2)
    proposal = propose(stored.on, HEADS, ORDER, Extent(3, 0))
    shown = missed(score_heads(stored.whole, (), proposal.heads, HEADS), proposal, 3)
    assert shown.at_most == shown.n_others == N_HEADS - 3
    assert str(shown).startswith("none of the 45 other heads was sampled")


@pytest.mark.parametrize("once", [False, True])
def test_a_search_scores_only_what_is_proposed_given_the_group_so_far(once):
    stored, extent = table(3), Extent(4, 2, once=once)
    trace, proposals, bounds = screened_sahara(stored.whole, stored.on, HEADS, ORDER, 3, extent)
    cost = N_PROMPTS * (extent.n_groups(N_HEADS, N_PROMPTS, 3) + extent.n_screened(N_HEADS, N_PROMPTS, 3))
    assert 0.8 * cost < stored.asked <= cost
    first = propose(stored.on, HEADS, ORDER, extent)
    for number, (step, proposal) in enumerate(zip(trace.steps, proposals, strict=True)):
        group = trace.group[:number]
        if once and number:
            expected = first._replace(
                candidates=tuple(h for h in first.candidates if h not in group), sampled=(), rounds=()
            )
        else:
            expected = propose(stored.on, HEADS, ORDER, extent, group)
        assert proposal == expected
        assert {head for head, _ in step.ranked()} == set(proposal.heads)
        assert trace.group[number] == max(
            sorted(proposal.heads), key=lambda head: float(stored.whole([(*group, head)])[0])
        )
        assert bounds[number] == missed(step, proposal, 1)
    # Among all candidates it is the search.
    trace, _, bounds = screened_sahara(stored.whole, stored.on, HEADS, ORDER, 3, Extent(99, 0))
    assert trace.group == sahara(stored.whole, HEADS, 3).group
    assert [bound.n_others for bound in bounds] == [0, 0, 0]


def test_costs_are_those_of_the_passes_that_are_run():
    engine, sequences = engine_of("llama_gqa"), [TokenSequence((1, 2, *ids)) for ids in ASKED]

    def flops(numbers, heads):
        chosen = [sequences[number] for number in numbers]
        rows = row_sizes(chosen, engine.plan(chosen))
        return engine.costs.forward_flops(rows) + sum(engine.costs.replay_flops(rows, head.layer) for head in heads)

    proposal = propose(
        lambda prompts: lambda groups: torch.arange(len(groups)), engine.heads, range(len(ASKED)), Extent(3, 2)
    )
    exact, rounds = flops(range(7), engine.heads), sum(flops(prompts, heads) for heads, prompts in proposal.rounds)
    costs = costs_of(engine, sequences, proposal)
    assert costs["screening"] == pytest.approx(rounds / exact)
    assert costs["with_sample"] == pytest.approx((rounds + flops(range(7), proposal.heads)) / exact)
    assert costs["screening"] < costs["with_candidates"] < costs["with_sample"]

"""Exact scores of what a screening proposes, the bound on what was missed, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import engine_of, prompts_of
from transformers import LlamaConfig, LlamaForCausalLM

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Engine,
    Head,
    InputError,
    sahara,
    screened_ships,
    ships,
)
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.screened_scores import (
    Extent,
    Proposal,
    costs_of,
    missed,
    propose,
    rescore,
    rescore_pairs,
    screened_sahara,
)
from safetyheads.measures.screening import screen
from safetyheads.measures.ships import scorer_of
from safetyheads.model.loading import use_our_attention
from safetyheads.model.planning import TokenSequence

PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22, 17), (5, 9, 12, 40, 41, 60, 11), (5, 9, 12, 40, 7, 7, 19, 33))
SEQUENCES = tuple(TokenSequence(ids) for ids in PROMPTS)


@pytest.fixture(scope="module")
def engine():
    return engine_of("llama_gqa")


@pytest.fixture(scope="module")
def measuring(engine):
    return HeadPass(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True))


@pytest.fixture(scope="module")
def scorer(measuring):
    return scorer_of(measuring, "mean_ships")


@pytest.fixture(scope="module")
def screening(engine):
    return screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION)


def test_what_is_shown_is_exact_and_the_rest_is_not_there(engine, scorer, screening):
    made = rescore(scorer, screening, extent=Extent(3, 4, seed=1), top=2)
    shown = {head for head, _ in made.scores.ranked()}
    assert shown == {*made.proposal.candidates, *made.proposal.sampled}
    assert len(shown) == 7
    assert made.proposal.candidates == screening.table().top(3)
    exact = dict(zip(engine.heads, scorer([(head,) for head in engine.heads]).tolist(), strict=True))
    # Other rows in a batch move the last bits.
    assert all(made.scores[head] == pytest.approx(exact[head], rel=1e-4, abs=1e-7) for head in shown)
    assert made.scores.values.shape == (3, 4)
    threshold = sorted((exact[head] for head in made.proposal.candidates), reverse=True)[1]
    above = [head for head in made.proposal.sampled if exact[head] > threshold]
    assert (made.missed.n_found, made.missed.n_sampled, made.missed.n_others) == (len(above), 4, 9)
    assert made.missed.at_most >= made.missed.n_found


def test_a_sampled_head_among_the_best_is_found_and_widens_the_bound(engine, scorer, screening):
    upside_down = replace(screening, ships=screening.ships.max() - screening.ships)
    made = rescore(scorer, upside_down, extent=Extent(2, 10), top=1)
    best = max(engine.heads, key=lambda head: float(scorer([(head,)])))
    assert made.scores.top(1) == (best,)  # the whole rest was sampled
    assert made.missed.n_found == made.missed.at_most >= 1


def test_no_sample_bounds_nothing_and_all_candidates_miss_nothing(scorer, screening):
    unsampled = rescore(scorer, screening, extent=Extent(3, 0), top=3)
    assert unsampled.missed.at_most == unsampled.missed.n_others == 9
    whole = rescore(scorer, screening, extent=Extent(99, 5))
    assert whole.missed.at_most == 0
    assert str(whole.missed) == "every head was scored exactly"
    with pytest.raises(InputError, match="at least one candidate"):
        Extent(0)


def test_a_search_scores_only_what_is_proposed_given_the_group_so_far(engine, measuring, scorer):
    found = screened_sahara(measuring, "mean_ships", 2, Extent(2, 1))
    for number, (step, proposal) in enumerate(zip(found.trace.steps, found.proposals, strict=True)):
        assert {head for head, _ in step.ranked()} == set(proposal.heads)
        group = found.trace.group[:number]
        again = propose(screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, common=group), extent=Extent(2, 1))
        assert proposal == again
        assert found.missed[number] == missed(step, proposal, 1)
    # Among all candidates it is the search.
    whole = screened_sahara(measuring, "mean_ships", 3, Extent(99, 0))
    assert whole.trace.group == sahara(scorer, engine.heads, 3).group
    assert [bound.n_others for bound in whole.missed] == [0, 0, 0]


def test_pairs_are_scored_exactly_with_their_heads(scorer):
    pairs = [(Head(0, 1), Head(1, 2)), (Head(0, 1), Head(2, 3))]
    for pair in rescore_pairs(scorer, pairs):
        together, *alone = (float(scorer([group])) for group in (pair.heads, (pair.heads[0],), (pair.heads[1],)))
        assert pair.synergy == pytest.approx(together - sum(alone), rel=1e-3, abs=1e-6)


def test_screened_ships_by_name_are_the_scores_of_ships(engine):
    made = screened_ships(engine, prompts_of(*PROMPTS), SCALING_CONTRIBUTION, Extent(4, 2), top=2)
    whole = ships(engine, prompts_of(*PROMPTS), SCALING_CONTRIBUTION).mean()
    assert len(made.scores.ranked()) == 6
    assert all(score == pytest.approx(whole[head], rel=1e-4, abs=1e-7) for head, score in made.scores.ranked())


def test_at_32_layers_of_32_heads_a_screening_costs_a_fiftieth():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    use_our_attention(model)
    engine = Engine(model, None, "shape", token_budget=65536)
    sequences = tuple(TokenSequence(tuple(range(100 * n, 100 * n + 31))) for n in range(100))
    measuring = SimpleNamespace(engine=engine, sequences=sequences, plan=engine.plan(sequences))
    costs = costs_of(measuring, Proposal(engine.heads[:32], engine.heads[32:96], len(engine.heads) - 32))
    assert costs.screening <= 1 / 50
    assert costs.screening < costs.with_candidates < costs.with_sample < 0.2

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
    Score,
    parse_heads,
    sahara,
    screened_ships,
    ships,
)
from safetyheads.heads import all_heads
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.sahara import score_heads
from safetyheads.measures.screened_scores import (
    Extent,
    Proposal,
    costs_of,
    missed,
    propose,
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


def test_what_is_shown_is_exact_and_the_rest_is_bounded(engine):
    prompts = prompts_of(*PROMPTS)
    shown = screened_ships(engine, prompts, SCALING_CONTRIBUTION, Extent(3, 4, seed=1), top=2)
    exact = ships(engine, prompts, SCALING_CONTRIBUTION).mean()
    assert shown.proposal.candidates == screen(engine, SEQUENCES, SCALING_CONTRIBUTION).table().top(3)
    assert {head for head, _ in shown.scores.ranked()} == set(shown.proposal.heads)
    assert len(set(shown.proposal.heads)) == 7
    # Other rows in a batch move the last bits.
    assert all(score == pytest.approx(exact[head], rel=1e-4, abs=1e-7) for head, score in shown.scores.ranked())
    threshold = sorted((exact[head] for head in shown.proposal.candidates), reverse=True)[1]
    above = [head for head in shown.proposal.sampled if exact[head] > threshold]
    assert (shown.missed.n_found, shown.missed.n_sampled, shown.missed.n_others) == (len(above), 4, 9)
    assert shown.missed.at_most >= shown.missed.n_found
    with pytest.raises(InputError, match="at least one candidate"):
        Extent(0)


def bound(scorer, screening, extent, top):
    proposal = propose(screening, "mean_ships", extent)
    return missed(score_heads(scorer, (), proposal.heads, all_heads(3, 4)), proposal, top)


def test_a_sampled_head_among_the_best_is_found_and_widens_the_bound(scorer, screening):
    upside_down = replace(screening, ships=screening.ships.max() - screening.ships)
    found = bound(scorer, upside_down, Extent(2, 10), top=1)  # the whole rest is sampled
    assert found.n_found == found.at_most >= 1


def test_no_sample_bounds_nothing_and_all_candidates_miss_nothing(scorer, screening):
    unsampled, whole = (bound(scorer, screening, extent, 3) for extent in (Extent(3, 0), Extent(99, 5)))
    assert unsampled.at_most == unsampled.n_others == 9
    assert (whole.at_most, str(whole)) == (0, "every head was scored exactly")


def test_a_search_scores_only_what_is_proposed_given_the_group_so_far(engine, measuring, scorer):
    trace, proposals, bounds = screened_sahara(measuring, Score("mean_ships"), 2, Extent(2, 1))
    for number, (step, proposal) in enumerate(zip(trace.steps, proposals, strict=True)):
        assert {head for head, _ in step.ranked()} == set(proposal.heads)
        again = screen(engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, common=trace.group[:number])
        assert proposal == propose(again, "mean_ships", Extent(2, 1))
        assert bounds[number] == missed(step, proposal, 1)
    # Among all candidates it is the search.
    trace, _, bounds = screened_sahara(measuring, Score("mean_ships"), 3, Extent(99, 0))
    assert trace.group == sahara(scorer, engine.heads, 3).group
    assert [bound.n_others for bound in bounds] == [0, 0, 0]


def test_pairs_are_scored_exactly_with_their_heads(scorer):
    pairs = [(Head(0, 1), Head(1, 2)), (Head(0, 1), Head(2, 3))]
    for record in rescore_pairs(scorer, pairs):
        pair = parse_heads(",".join(record["heads"]))
        together, *alone = (float(scorer([group])) for group in (pair, pair[:1], pair[1:]))
        assert record["synergy"] == pytest.approx(together - sum(alone), rel=1e-3, abs=1e-6)


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
    assert costs["screening"] <= 1 / 50
    assert costs["screening"] < costs["with_candidates"] < costs["with_sample"] < 0.2

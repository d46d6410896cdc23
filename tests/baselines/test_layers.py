"""Layers left out, against a copy with the layers deleted."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from baseline_samples import (
    FAMILIES,
    PROMPTS,
    answers_with_limits,
    assert_undone,
    engine_on,
    greedy,
    hooks_of,
    made_up_material,
    on_the_organism,
)
from tiny_models import engine_of

from safetyheads import InputError
from safetyheads.baselines.base import refusal_log_odds
from safetyheads.baselines.layers import LSP, candidate_runs, chosen_run, skipped


def without_by_hand(engine, run):
    """The slow twin: a copy with the layers deleted and the others renumbered."""
    model = copy.deepcopy(engine.model)
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in run]
    model.model.layers = torch.nn.ModuleList(kept)
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize(("family", "run"), [("llama_gqa", (0, 1)), ("qwen3_norm", (1,)), ("qwen3_norm", (1, 2))])
def test_skipped_layers_are_as_if_deleted(family, run):
    engine = engine_of(family)
    deleted, ids = without_by_hand(engine, run), torch.tensor([PROMPTS[0]])
    with skipped(engine, run), torch.no_grad():
        assert torch.equal(engine.model(input_ids=ids).logits, deleted(input_ids=ids).logits)
        answers = answers_with_limits(engine)
    for prompt, (answer, limit) in answers.items():
        assert answer == greedy(lambda ids: deleted(input_ids=torch.tensor([ids])).logits[0, -1], prompt, limit)
    assert hooks_of(engine.model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_skipping_gives_what_it_gives_without(family):
    engine = engine_on(family)

    def logits(ids):
        return engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]

    with skipped(engine, (1,)), torch.no_grad():
        answer, limit = answers_with_limits(engine, PROMPTS[:1])[PROMPTS[0]]
        assert answer == greedy(logits, PROMPTS[0], limit)


def test_runs_are_scaled_to_the_depth():
    # 32 layers: starts 1 to 6, lengths 3 to 8, as in the original.
    lengths = [{len(run) for run in candidate_runs(32, share)} for share in LSP.strengths]
    assert lengths == [{3}, {4}, {6}, {8}]
    assert [run[0] for run in candidate_runs(32, 0.25)] == [1, 2, 3, 4, 5, 6]
    assert candidate_runs(4, 0.1) == (range(1, 2), range(2, 3))
    assert candidate_runs(4, 0.5) == (range(1, 3),)
    assert candidate_runs(3, 0.9) == (range(1, 2),)
    assert all(run[-1] < 31 for run in candidate_runs(32, 0.99))


def test_the_run_with_the_least_refusal_is_chosen():
    material, runs = made_up_material(engine_of("llama_gqa")), (range(1), range(1, 2), range(2, 3))
    odds = []
    for run in runs:
        with skipped(material.engine, run):
            odds.append(float(refusal_log_odds(material.engine, material.harmful, material.openers).mean()))
    assert chosen_run(material, runs) == runs[odds.index(min(odds))]


def test_after_an_error_no_layer_is_skipped():
    engine = engine_of("llama_gqa")
    (without,) = LSP.interventions(made_up_material(engine), [0.1])
    assert without.setting == "without layer 1 of 3"
    assert without.n_parameters == sum(parameter.numel() for parameter in engine.model.model.layers[1].parameters())
    assert_undone(engine, without.at_work)


def test_what_layers_cannot_be_left_out_of_is_refused():
    material = made_up_material(engine_of("llama_gqa"))
    with pytest.raises(InputError, match="above 0 and below 1; got 3"):
        LSP.interventions(material, [3])
    with pytest.raises(InputError, match="no refusal was seen"):
        LSP.interventions(replace(material, openers=()), [0.1])


def test_on_the_organism():
    """Without layer 2 two of the three planted heads are gone."""
    _, rate, kept = on_the_organism(LSP, 0.25)
    assert rate >= 0.9
    assert kept >= 0.9

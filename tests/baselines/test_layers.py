"""Layers left out, against a copy with the layers deleted."""

import copy
from functools import partial

import pytest
import torch
from baseline_samples import FAMILIES, PROMPTS, answers_of, engine_on, logits_of, made_up_material, slow_answers
from tiny_models import engine_of

from safetyheads.baselines import METHODS
from safetyheads.baselines.base import refusal_log_odds
from safetyheads.baselines.layers import candidate_runs, chosen_run, skipped


@pytest.mark.parametrize(("family", "run"), [("llama_gqa", (0, 1)), ("qwen3_norm", (1,)), ("qwen3_norm", (1, 2))])
def test_skipped_layers_are_as_if_deleted(family, run):
    engine = engine_of(family)
    deleted = copy.deepcopy(engine.model)
    kept = [layer for number, layer in enumerate(deleted.model.layers) if number not in run]
    deleted.model.layers, deleted.config.num_hidden_layers = torch.nn.ModuleList(kept), len(kept)
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    with skipped(engine, run):
        assert torch.equal(logits_of(engine.model), logits_of(deleted))
        assert answers_of(engine) == slow_answers(partial(logits_of, deleted))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_skipping_gives_what_it_gives_without(family):
    engine = engine_on(family)
    with skipped(engine, (1,)):
        assert answers_of(engine, PROMPTS[:1]) == slow_answers(partial(logits_of, engine.model), PROMPTS[:1])


def test_runs_are_scaled_to_the_depth():
    # 32 layers: starts 1 to 6, lengths 3 to 8, as in the original.
    for share, length in zip(METHODS["lsp"].strengths, (3, 4, 6, 8), strict=True):
        assert candidate_runs(32, share) == tuple(range(start, start + length) for start in range(1, 7))
    assert candidate_runs(4, 0.1) == (range(1, 2), range(2, 3))
    assert candidate_runs(3, 0.9) == (range(1, 2),)
    assert all(run[-1] < 31 for run in candidate_runs(32, 0.99))


def test_the_run_with_the_least_refusal_is_chosen_and_its_layers_are_counted():
    material, runs = made_up_material(engine_of("llama_gqa")), (range(1), range(1, 2), range(2, 3))
    engine, odds = material.engine, []
    for run in runs:
        with skipped(engine, run):
            odds.append(float(refusal_log_odds(engine, material.harmful, material.openers).mean()))
    assert chosen_run(material, runs) == runs[odds.index(min(odds))]
    (without,) = METHODS["lsp"].interventions(material, [0.1])
    assert without.setting == "without layer 1 of 3"
    assert without.n_parameters == sum(parameter.numel() for parameter in engine.model.model.layers[1].parameters())

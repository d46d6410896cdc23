"""Neurons patched from another model while answering: against runs without cache and batch, and taken back."""

import gc
from contextlib import ExitStack
from functools import partial
from weakref import ref

import pytest
import torch
from baseline_samples import (
    ANSWERS,
    FAMILIES,
    PROMPTS,
    answers_of,
    engine_on,
    inputs_of,
    logits_of,
    made_up_material,
    slow_answers,
)
from transformers import DynamicCache

from safetyheads import Engine, SafetyheadsError
from safetyheads.baselines.neurons import contrasts, down_projections, neuron_parameters, patched, top_neurons
from safetyheads.model.architecture import Capabilities


def neuron_values(engine, ids):
    """The slow twin: one sequence alone; [n_tokens, d_mlp] of each layer."""
    return list(inputs_of(engine.model, [down.module for down in down_projections(engine)], ids).values())


def patched_logits(engine, unaligned, neurons, ids):
    """The slow twin of DAP: no cache, no batch; the other model's values written in by hand."""
    theirs, downs = neuron_values(unaligned, ids), down_projections(engine)
    with ExitStack() as stack:
        for layer, chosen in neurons.items():

            def write(_, given, layer=layer, chosen=chosen):
                whole = given[0].clone()
                whole.view(len(ids), -1)[:, chosen] = theirs[layer][:, chosen]
                return (whole,)

            stack.callback(downs[layer].module.register_forward_pre_hook(write).remove)
        return logits_of(engine.model, ids)


@pytest.fixture
def pair():
    return engine_on("llama3"), engine_on("llama3", changed=0.1)


def test_scores_are_the_rms_over_the_tokens_of_answers(pair):
    engine, other = pair
    material = made_up_material(engine, other)
    differences = [[], [], []]
    for prompt, said in zip(engine.ask(material.harmful).token_ids, ANSWERS, strict=True):
        ours, theirs = (neuron_values(each, (*prompt, *said)) for each in pair)
        for layer, values in enumerate(ours):
            differences[layer].append((values - theirs[layer])[len(prompt) :].double())
    by_hand = torch.stack([torch.cat(parts).square().mean(dim=0).sqrt() for parts in differences])
    scores = contrasts(engine, other, material.text(refused=True))
    torch.testing.assert_close(scores, by_hand, rtol=1e-4, atol=1e-5)


def test_the_top_neurons_are_of_all_layers_but_the_last():
    scores = torch.tensor([[1.0, 5, 3], [4, 2, torch.nan], [9, 9, 9]], dtype=torch.float64)
    assert {layer: these.tolist() for layer, these in top_neurons(scores, 0.4).items()} == {0: [1], 1: [0]}
    assert {layer: these.tolist() for layer, these in top_neurons(scores, 1).items()} == {0: [0, 1, 2], 1: [0, 1]}
    assert top_neurons(scores, 0) == {}


@pytest.mark.parametrize(
    ("family", "a_neuron"),
    # Gate, value and last projection; 2 d_model and d_model where gate and value are one; two matrices without gate.
    [("llama3", 3 * 32), ("phi3", 3 * 32), ("gpt2", 2 * 32), ("opt", 2 * 32)],
)
def test_a_neurons_weights_are_counted(family, a_neuron):
    engine = engine_on(family)
    assert neuron_parameters(engine, {0: torch.tensor([1, 2]), 1: torch.tensor([0])}) == 3 * a_neuron


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_values_are_the_other_models_and_answers_those_of_runs_without_cache(family):
    engine, other = engine_on(family), engine_on(family, changed=0.1)
    neurons = {0: torch.tensor([0, 3, 7]), 1: torch.arange(30)}
    if family in ("lfm2", "qwen3_5"):  # as their proofs at load find
        engine = Engine(engine.model, engine.tokenizer, capabilities=Capabilities(pads=False))
    by_hand = partial(patched_logits, engine, other, neurons)
    with patched(engine, other, neurons):
        logits, answers = logits_of(engine.model), answers_of(engine)
    assert torch.equal(logits[-1], by_hand(PROMPTS[0])[-1])
    assert answers == slow_answers(by_hand)
    assert answers != answers_of(engine)


def test_caches_begin_within_move_alone_again_after_and_are_not_kept(pair):
    engine, other = pair
    cache, short_lived, filled = (DynamicCache(config=engine.model.config) for _ in range(3))
    engine.model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=filled, use_cache=True)
    with patched(engine, other, {0: torch.arange(3)}):
        engine.model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), past_key_values=cache, use_cache=True)
        with pytest.raises(SafetyheadsError, match="begin the answer anew"):
            engine.model(input_ids=torch.tensor([[1]]), past_key_values=filled, use_cache=True)
        gc.disable()
        try:
            engine.model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=short_lived, use_cache=True)
            gone = ref(short_lived)
            del short_lived
            assert gone() is None  # without the collector's help: caches of a large model are gigabytes
        finally:
            gc.enable()
    assert "reorder_cache" not in vars(cache)
    cache.reorder_cache(torch.tensor([1]))
    assert cache.layers[0].keys.shape[0] == 1

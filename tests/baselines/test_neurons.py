"""Neurons patched from another model while answering: against runs without cache and batch, and taken back."""

from __future__ import annotations

import gc
from dataclasses import replace
from weakref import ref

import pytest
import torch
from baseline_samples import (
    ANSWERS,
    FAMILIES,
    PROMPTS,
    answers_with_limits,
    assert_undone,
    engine_on,
    greedy,
    hooks_of,
    inputs_of,
    made_up_material,
    on_the_organism,
    short,
    weights_hash,
)
from tiny_models import END

from safetyheads import Engine, InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.baselines.neurons import (
    GTAC_DAP,
    contrasts,
    down_projections,
    neuron_parameters,
    patched,
    top_neurons,
)
from safetyheads.model.architecture import Capabilities


def neuron_values(engine, ids):
    """The slow twin: one sequence alone; layer -> [n_tokens, d_mlp]."""
    seen, _ = inputs_of(engine.model, [linear.module for linear in down_projections(engine)], ids)
    return dict(enumerate(seen.values()))


def patched_logits(engine, unaligned, neurons, ids):
    """The slow twin of DAP: no cache, no batch; the other model's values written in by hand."""
    theirs = neuron_values(unaligned, ids)

    def write(layer):
        def hook(_, given):
            whole = given[0].clone()
            whole.view(len(ids), -1)[:, neurons[layer]] = theirs[layer][:, neurons[layer]]
            return (whole,)

        return hook

    downs = down_projections(engine)
    handles = [downs[layer].module.register_forward_pre_hook(write(layer)) for layer in neurons]
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


# GTAC


def test_scores_are_the_rms_over_the_tokens_of_answers():
    engine, other = engine_on("llama3"), engine_on("llama3", changed=0.1)
    material = made_up_material(engine, other)
    squares, n_tokens = {}, 0
    for prompt, said in zip(engine.ask(material.harmful).token_ids, ANSWERS, strict=True):
        ours, theirs = (neuron_values(each, (*prompt, *said)) for each in (engine, other))
        for token in range(len(prompt), len(prompt) + len(said)):
            n_tokens += 1
            for layer in ours:
                squares.setdefault(layer, []).append((ours[layer][token] - theirs[layer][token]).double() ** 2)
    scores = contrasts(engine, other, material.refusal_text(whole=False))
    assert n_tokens == 8
    for layer, parts in squares.items():
        by_hand = (torch.stack(parts).sum(dim=0) / n_tokens).sqrt()
        torch.testing.assert_close(scores[layer], by_hand, rtol=1e-4, atol=1e-5)


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


# DAP


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_values_are_the_other_models_and_answers_those_of_runs_without_cache(family):
    engine, other = engine_on(family), engine_on(family, changed=0.1)
    neurons = {0: torch.tensor([0, 3, 7]), 1: torch.arange(30)}
    ids = PROMPTS[0]
    ours, theirs = neuron_values(engine, ids), neuron_values(other, ids)
    if family in ("lfm2", "qwen3_5"):  # as their proofs at load find
        engine = Engine(engine.model, engine.tokenizer, capabilities=Capabilities(pads=False))
    with patched(engine, other, neurons):
        seen = neuron_values(engine, ids)  # its hooks came last, so they see what was patched
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        answers = answers_with_limits(engine)
    for layer, these in neurons.items():
        assert torch.equal(seen[layer][:, these], theirs[layer][:, these])
    rest = torch.tensor([number for number in range(ours[0].shape[1]) if number not in (0, 3, 7)])
    assert torch.equal(seen[0][:, rest], ours[0][:, rest])  # before any patch has reached them
    assert torch.equal(logits, patched_logits(engine, other, neurons, ids))
    for prompt, (found, limit) in answers.items():
        assert found == greedy(lambda ids: patched_logits(engine, other, neurons, ids), prompt, limit)
    assert answers != answers_with_limits(engine)
    assert hooks_of(engine.model) == hooks_of(other.model) == 0


def test_every_neuron_patched_from_an_equal_model_changes_no_bit():
    engine, equal = engine_on("llama3"), engine_on("llama3")
    everything = {layer: torch.arange(48) for layer in range(engine.n_layers)}
    with patched(engine, equal, everything):
        logits = engine.model(input_ids=torch.tensor([PROMPTS[0]])).logits
        answers = answers_with_limits(engine)
    assert torch.equal(logits, engine.model(input_ids=torch.tensor([PROMPTS[0]])).logits)
    assert answers == answers_with_limits(engine)


def test_the_models_own_generate_is_patched_and_layers_that_run_alone_are_not():
    engine, other = engine_on("llama3"), engine_on("llama3", changed=0.1)
    neurons, ids = {0: torch.arange(40)}, torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        plain = engine.architecture.decoder(input_ids=ids).last_hidden_state
        with patched(engine, other, neurons):
            made = engine.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(PROMPTS[0]) :]
            assert torch.equal(engine.architecture.decoder(input_ids=ids).last_hidden_state, plain)
    slow = greedy(lambda ids: patched_logits(engine, other, neurons, ids), PROMPTS[0], 6)
    assert tuple(token for token in made.tolist() if token != END) == slow


def test_a_cache_that_was_filled_outside_is_refused():
    engine, other = engine_on("llama3"), engine_on("llama3", changed=0.1)
    ids = torch.tensor([[1, 2, 3]])
    cache = engine.model(input_ids=ids, use_cache=True).past_key_values
    with patched(engine, other, {0: torch.arange(3)}), pytest.raises(SafetyheadsError, match="begin the answer anew"):
        engine.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def test_caches_move_alone_again_after_and_are_not_kept():
    from transformers import DynamicCache

    engine, other = engine_on("llama3"), engine_on("llama3", changed=0.1)
    cache = DynamicCache(config=engine.model.config)
    with patched(engine, other, {0: torch.arange(3)}):
        engine.model(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), past_key_values=cache, use_cache=True)
        assert "reorder_cache" in vars(cache)
        gc.disable()
        try:
            short_lived = DynamicCache(config=engine.model.config)
            engine.model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=short_lived, use_cache=True)
            gone = ref(short_lived)
            del short_lived
            assert gone() is None  # without the collector's help: caches of a large model are gigabytes
        finally:
            gc.enable()
    assert "reorder_cache" not in vars(cache)
    cache.reorder_cache(torch.tensor([1]))
    assert cache.layers[0].keys.shape[0] == 1


def test_two_models_whose_neurons_differ_are_refused():
    engine = engine_on("llama3")
    material = made_up_material(engine)
    with pytest.raises(InputError, match="name the unaligned model"):
        GTAC_DAP.interventions(material, [0.1])
    with pytest.raises(InputError, match="the model itself"):
        GTAC_DAP.interventions(replace(material, unaligned=engine), [0.1])
    wider = engine_on("llama3")
    wider.model.model.layers[1].mlp.down_proj = torch.nn.Linear(50, 32, bias=False)
    with pytest.raises(InputError, match="other MLPs"):
        GTAC_DAP.interventions(replace(material, unaligned=wider), [0.1])
    with pytest.raises(UnsupportedModelError, match="is no linear layer's weight"):
        GTAC_DAP.interventions(made_up_material(engine_on("mixtral"), engine_on("mixtral")), [0.1])
    with pytest.raises(InputError, match="a share of the neurons is"):
        GTAC_DAP.interventions(replace(material, unaligned=engine_on("llama3", 0.1)), [1.1])


def test_after_an_error_nothing_is_patched():
    engine, other = engine_on("llama3"), engine_on("llama3", changed=0.1)
    (half,) = GTAC_DAP.interventions(made_up_material(engine, other), [0.5])
    assert_undone(engine, half.at_work, other)


def test_on_the_organism():
    """The base that the organism was planted on answers everything, and its neurons do so too."""
    before = weights_hash(short().unaligned.model)
    _, rate, kept = on_the_organism(GTAC_DAP, 0.5)
    assert rate >= 0.9
    assert kept >= 0.9
    assert weights_hash(short().unaligned.model) == before

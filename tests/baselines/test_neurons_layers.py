"""Neurons patched from another model while answering, and layers left out: held to slow twins, and taken back."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from weakref import ref

import pytest
import torch
from baseline_samples import (
    ANSWERS,
    NEW_TOKENS,
    engine_on,
    held_out,
    made_up_material,
    organism_material,
    weights_hash,
)
from tiny_models import END, engine_of

from safetyheads import InputError, KeywordJudge, SafetyheadsError, UnsupportedModelError
from safetyheads.answers.decoding import Request, answer
from safetyheads.baselines.calibration import refusal_text
from safetyheads.baselines.layers import LSP, candidate_runs, chosen_run, refusal_log_odds, skipped
from safetyheads.baselines.neurons import (
    GTAC_DAP,
    contrasts,
    down_projections,
    neuron_parameters,
    patched,
    top_neurons,
)
from safetyheads.baselines.parameters import DOWN_NAMES, WRITING_NAMES
from safetyheads.model.planning import TokenSequence

PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22, 17), (7, 30, 2, 11), (19, 44, 50, 3, 3, 21), (1, 2, 3, 4))
# A family of each kind: plain, softcaps and windows, one projection to gate and value, transposed weights, two
# matrices without a gate, attention beside the MLP, states instead of keys, shared keys and several streams.
FAMILIES = ("llama3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox", "lfm2", "qwen3_5", "gemma3n")
FLOAT32 = 1e-5


def clean(engine):
    """No hook is left but transformers' own, which stay once attention maps were asked for, by whatever test."""
    hooks = [
        hook
        for module in engine.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    return all(str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def neuron_values(engine, ids):
    """The slow twin: one sequence alone; layer -> [n_tokens, d_mlp]."""
    values = {}
    handles = [
        linear.module.register_forward_pre_hook(
            lambda _, given, layer=layer: values.update({layer: given[0].detach().reshape(len(ids), -1)})
        )
        for layer, linear in enumerate(down_projections(engine))
    ]
    with torch.no_grad():
        engine.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return values


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


def greedy(next_logits, prompt, n, end):
    made = []
    while len(made) < n:
        token = int(next_logits((*prompt, *made)).argmax())
        if token == end:
            break
        made.append(token)
    return tuple(made)


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
    scores = contrasts(engine, other, refusal_text(material, whole=False))
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
def test_patched_values_are_the_other_models(family):
    engine, other = engine_on(family), engine_on(family, changed=0.1)
    neurons = {0: torch.tensor([0, 3, 7]), 1: torch.arange(8)}
    ids = PROMPTS[0]
    ours, theirs = neuron_values(engine, ids), neuron_values(other, ids)
    with patched(engine, other, neurons):
        seen = neuron_values(engine, ids)
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    # Our hook came last, so it sees what was patched.
    for layer, these in neurons.items():
        assert torch.equal(seen[layer][:, these], theirs[layer][:, these])
    rest = torch.tensor([number for number in range(ours[0].shape[1]) if number not in (0, 3, 7)])
    assert torch.equal(seen[0][:, rest], ours[0][:, rest])  # before any patch has reached them
    assert torch.equal(logits, patched_logits(engine, other, neurons, ids))
    assert clean(engine)
    assert clean(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_padded_shrinking_batches_are_those_of_runs_without_cache(family):
    engine, other = engine_on(family), engine_on(family, changed=0.1)
    neurons = {0: torch.arange(0, 32, 2), 1: torch.arange(30)}
    # Rows that stop after 1 to 4 tokens: rows are taken out of the batch, and out of both caches.
    limits = dict(zip(PROMPTS, (9, 1, 4, 2), strict=True))
    requests = [Request(p, stop=lambda made, n=limits[p]: len(made) >= n) for p in PROMPTS]
    if family in ("lfm2", "qwen3_5"):  # as their proofs at load find
        engine.capabilities = replace(engine.capabilities, pads=False)
    with patched(engine, other, neurons):
        answers = answer(engine, requests, max_new_tokens=9)
    plain = answer(engine, requests, max_new_tokens=9)
    for prompt, made in zip(PROMPTS, answers, strict=True):
        slow = greedy(lambda ids: patched_logits(engine, other, neurons, ids), prompt, limits[prompt], END)
        assert made.token_ids == slow
    assert answers != plain
    assert clean(engine)
    assert clean(other)


def test_every_neuron_patched_from_an_equal_model_changes_no_bit():
    engine = engine_on("llama3")
    equal = engine_on("llama3")
    everything = {layer: torch.arange(48) for layer in range(engine.n_layers)}
    requests = [Request(prompt) for prompt in PROMPTS]
    with patched(engine, equal, everything):
        logits = engine.model(input_ids=torch.tensor([PROMPTS[0]])).logits
        answers = answer(engine, requests, max_new_tokens=9)
    assert torch.equal(logits, engine.model(input_ids=torch.tensor([PROMPTS[0]])).logits)
    assert answers == answer(engine, requests, max_new_tokens=9)


def test_the_models_own_generate_is_patched_too():
    engine, other = engine_on("llama3"), engine_on("llama3", changed=0.1)
    neurons = {0: torch.arange(40)}
    prompt = torch.tensor([PROMPTS[0]])
    with patched(engine, other, neurons):
        ids = engine.model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(PROMPTS[0]) :]
    slow = greedy(lambda ids: patched_logits(engine, other, neurons, ids), PROMPTS[0], 6, END)
    assert tuple(token for token in ids.tolist() if token != END) == slow


def test_layers_that_run_outside_the_model_are_not_patched():
    engine, other = engine_on("llama3"), engine_on("llama3", changed=0.1)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        plain = engine.architecture.decoder(input_ids=ids).last_hidden_state
        with patched(engine, other, {0: torch.arange(40)}):
            engine.model(input_ids=ids[:, :4])
            assert torch.equal(engine.architecture.decoder(input_ids=ids).last_hidden_state, plain)


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
    down = wider.model.model.layers[1].mlp
    down.down_proj = torch.nn.Linear(50, 32, bias=False)
    with pytest.raises(InputError, match="other MLPs"):
        GTAC_DAP.interventions(replace(material, unaligned=wider), [0.1])
    with pytest.raises(UnsupportedModelError, match="is no linear layer's weight"):
        GTAC_DAP.interventions(made_up_material(engine_on("mixtral"), engine_on("mixtral")), [0.1])
    with pytest.raises(InputError, match="from 0 to 1"):
        GTAC_DAP.interventions(replace(material, unaligned=engine_on("llama3", 0.1)), [1.1])


def test_after_an_error_nothing_is_patched():
    engine, other = engine_on("llama3"), engine_on("llama3", changed=0.1)
    (one,) = GTAC_DAP.interventions(made_up_material(engine, other), [0.5])
    version, before = engine.weights_version, weights_hash(engine.model)
    with one.at_work():
        assert engine.weights_version is not version
    with pytest.raises(KeyboardInterrupt), one.at_work():
        raise KeyboardInterrupt
    assert engine.weights_version is version
    assert clean(engine)
    assert clean(other)
    assert weights_hash(engine.model) == before


# LSP


def without_by_hand(engine, run):
    """The slow twin: a copy with the layers deleted and the others renumbered."""
    model = copy.deepcopy(engine.model)
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in run]
    model.model.layers = torch.nn.ModuleList(kept)
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("run", [(1,), (0,), (0, 1), (1, 2)])
@pytest.mark.parametrize("family", ["llama_gqa", "qwen3_norm"])
def test_skipped_layers_are_as_if_deleted(family, run):
    engine = engine_of(family)
    deleted = without_by_hand(engine, run)
    ids = torch.tensor([PROMPTS[0]])
    with skipped(engine, run), torch.no_grad():
        assert torch.equal(engine.model(input_ids=ids).logits, deleted(input_ids=ids).logits)
        # Padded, with a cache, rows ending one after the other.
        limits = (9, 1, 4, 2)
        requests = [Request(p, stop=lambda m, n=n: len(m) >= n) for p, n in zip(PROMPTS, limits, strict=True)]
        answers = answer(engine, requests, max_new_tokens=9)
    for prompt, made, limit in zip(PROMPTS, answers, limits, strict=True):
        with torch.no_grad():
            slow = greedy(lambda ids: deleted(input_ids=torch.tensor([ids])).logits[0, -1], prompt, limit, END)
        assert made.token_ids == slow
    assert clean(engine)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_skipping_gives_what_it_gives_without(family):
    engine = engine_on(family)
    prompt = PROMPTS[0]
    with skipped(engine, (1,)), torch.no_grad():
        (made,) = answer(engine, [Request(prompt)], max_new_tokens=6)
        slow = greedy(
            lambda ids: engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1], prompt, 6, END
        )
    assert made.token_ids == slow


def test_runs_are_scaled_to_the_depth():
    # 32 layers: starts 1 to 6, lengths 3 to 8, as in the original.
    lengths = [{len(run) for run in candidate_runs(32, share)} for share in LSP.strengths]
    assert lengths == [{3}, {4}, {6}, {8}]
    assert [run[0] for run in candidate_runs(32, 0.25)] == [1, 2, 3, 4, 5, 6]
    assert candidate_runs(4, 0.1) == (range(1, 2), range(2, 3))
    assert candidate_runs(4, 0.5) == (range(1, 3),)
    assert candidate_runs(3, 0.9) == (range(1, 2),)
    assert all(run[-1] < 31 for run in candidate_runs(32, 0.99))


def test_an_mlps_last_projection_writes_under_each_name_that_it_is_known_by():
    assert set(DOWN_NAMES) < set(WRITING_NAMES)
    assert "fc_out" in WRITING_NAMES


def test_log_odds_are_the_definitions():
    engine = engine_of("llama_gqa")
    odds = []
    for prompt in PROMPTS:
        with torch.no_grad():
            probabilities = engine.model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        p = probabilities[[14, 20]].sum()
        odds.append(float(torch.log(p / (1 - p))))
    ours = refusal_log_odds(engine, [TokenSequence(prompt) for prompt in PROMPTS], (14, 20))
    assert ours == pytest.approx(sum(odds) / 4, abs=FLOAT32)


def test_the_run_with_the_least_refusal_is_chosen():
    engine = engine_of("llama_gqa")
    sequences, runs = [TokenSequence(prompt) for prompt in PROMPTS], (range(1), range(1, 2), range(2, 3))
    odds = []
    for run in runs:
        with skipped(engine, run):
            odds.append(refusal_log_odds(engine, sequences, (14, 20)))
    assert chosen_run(engine, sequences, (14, 20), runs) == runs[odds.index(min(odds))]


def test_after_an_error_no_layer_is_skipped():
    engine = engine_of("llama_gqa")
    version, before = engine.weights_version, weights_hash(engine.model)
    (one,) = LSP.interventions(made_up_material(engine), [0.1])
    assert one.setting == "without layer 1 of 3"
    assert one.n_parameters == sum(parameter.numel() for parameter in engine.model.model.layers[1].parameters())
    with one.at_work():
        assert engine.weights_version is not version
    with pytest.raises(KeyboardInterrupt), one.at_work():
        raise KeyboardInterrupt
    assert engine.weights_version is version
    assert clean(engine)
    assert weights_hash(engine.model) == before


def test_what_layers_cannot_be_left_out_of_is_refused():
    material = made_up_material(engine_of("llama_gqa"))
    with pytest.raises(InputError, match="between 0 and 1"):
        LSP.interventions(material, [3])
    with pytest.raises(InputError, match="no refusal was seen"):
        LSP.interventions(replace(material, openers=()), [0.1])


# On the organism


@pytest.mark.parametrize(
    ("method", "strength", "least_asr"),
    # The base that the organism was planted on answers everything, and its neurons do as it does; without layer 2 two
    # of the three planted heads are gone.
    [(GTAC_DAP, 0.5, 0.9), (GTAC_DAP, 0.05, 0.0), (LSP, 0.25, 0.9)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_on_the_organism_each_method_answers(method, strength, least_asr):
    material = organism_material()
    before = weights_hash(material.engine.model), weights_hash(material.unaligned.model)
    (one,) = method.interventions(material, [strength])
    harmful, benign = (one.answers(material.engine, p, KeywordJudge(), NEW_TOKENS) for p in held_out())
    assert harmful.n == benign.n == 8
    assert harmful.rate >= least_asr
    assert benign.kept.rate >= 0.9
    assert (weights_hash(material.engine.model), weights_hash(material.unaligned.model)) == before
    vanilla = replace(one, at_work=type(one).__dataclass_fields__["at_work"].default)
    assert vanilla.answers(material.engine, held_out()[0], KeywordJudge(), NEW_TOKENS).rate == 0

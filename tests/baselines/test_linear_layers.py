"""Editing weights: calibration against one sequence at a time, and every method's weights put back bit for bit."""

from __future__ import annotations

import pytest
import torch
from baseline_samples import engine_on, made_up_material, on_the_organism, one_by_one, weights_hash
from tiny_models import engine_of

from safetyheads import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.baselines.act_svd import ACT_SVD, ACT_SVD_ORTHOGONAL
from safetyheads.baselines.linear_layers import edited, gram_matrices, linear_layers
from safetyheads.baselines.pruning import SPARSEGPT, WANDA, wanda
from safetyheads.baselines.set_difference import SNIP_DIFFERENCE, WANDA_DIFFERENCE
from safetyheads.model.planning import TokenSequence

METHODS = pytest.mark.parametrize(
    "method",
    [WANDA, SPARSEGPT, WANDA_DIFFERENCE, SNIP_DIFFERENCE, ACT_SVD, ACT_SVD_ORTHOGONAL],
    ids=lambda method: method.name,
)


@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window", "gemma2_softcap"])
def test_inputs_are_those_of_each_sequence_alone(family):
    engine = engine_of(family)
    text = [TokenSequence((5, 9, 12, 40, 41, 8, 3), 3), TokenSequence((7, 30, 2), 3), TokenSequence((19, 44), 1)]
    inputs = one_by_one(engine, text)
    grams = gram_matrices(engine, linear_layers(engine), text)
    assert set(grams) == set(inputs)
    for linear, seen in inputs.items():
        assert len(seen) == 7
        # float32 activations, padded or not: a relative 1e-5, on sums of their products.
        torch.testing.assert_close(grams[linear], seen.T @ seen, rtol=1e-4, atol=1e-4 * float(seen.square().sum()))


def test_later_layers_are_edited_on_what_edited_earlier_ones_give():
    engine = engine_of("llama_gqa")
    material = made_up_material(engine)
    (pruned,) = WANDA.interventions(material, [0.5])
    linears = linear_layers(engine)
    before = {linear: linear.weight.clone() for linear in linears}
    text = (*material.benign_text(whole=True), *material.refusal_text(whole=True))
    with pruned.at_work():
        at_work = {linear: linear.weight.clone() for linear in linears}
    expected = {}
    for layer in range(engine.n_layers):
        with edited(engine, expected):
            inputs = one_by_one(engine, text)
        for linear in (each for each in linears if each.layer == layer):
            expected[linear] = wanda(before[linear], inputs[linear].T @ inputs[linear], 0.5).float()
    assert all(torch.equal(at_work[linear], expected[linear]) for linear in linears)
    # It makes a difference: on the unpruned model's inputs some later layer is pruned otherwise.
    plain = one_by_one(engine, text)
    at_once = [wanda(before[each], plain[each].T @ plain[each], 0.5).float() for each in linears]
    assert not all(torch.equal(at_work[each], other) for each, other in zip(linears, at_once, strict=True))


@METHODS
def test_weights_are_put_back_bit_for_bit(method):
    engine = engine_of("llama_gqa", torch.bfloat16)
    model, version = engine.model, engine.weights_version
    parameters, bits = dict(engine.model.named_parameters()), weights_hash(engine.model)
    none, weak, strong = method.interventions(made_up_material(engine), [0.0, 0.1, 0.5])
    assert none.n_parameters == 0 < weak.n_parameters
    with none.at_work():
        assert weights_hash(model) == bits
    for intervention in (weak, strong, weak):
        with intervention.at_work():
            assert engine.weights_version is not version
            assert weights_hash(model) != bits
            assert {parameter.dtype for parameter in model.parameters()} == {engine.dtype}
        with pytest.raises(KeyboardInterrupt), intervention.at_work():
            raise KeyboardInterrupt
        assert engine.weights_version is version
        assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
        assert weights_hash(model) == bits
    with edited(engine, {}), pytest.raises(SafetyheadsError, match="learn again"), weak.at_work():
        pass


def put_to_work(method, engine):
    (half,) = method.interventions(made_up_material(engine), [0.5])
    with half.at_work():
        pass


@METHODS
def test_an_error_while_learning_leaves_the_weights_as_they_were(method, monkeypatch):
    engine = engine_of("llama_gqa")
    before, calls, plain = weights_hash(engine.model), [], engine.architecture.decoder.forward

    def fail(*arguments, **keywords):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return plain(*arguments, **keywords)

    monkeypatch.setattr(engine.architecture.decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        put_to_work(method, engine)
    assert weights_hash(engine.model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.model.modules())


@METHODS
def test_gpt2s_transposed_weights_are_edited_and_put_back(method):
    engine = engine_on("gpt2")
    before = weights_hash(engine.model)
    (one,) = method.interventions(made_up_material(engine), [0.5])
    with one.at_work():
        assert weights_hash(engine.model) != before
        engine.model(input_ids=torch.tensor([[1, 2, 3]]))
        # Zeroed weights lie in rows of W [d_out, d_in], not in the columns that GPT-2 keeps.
        zeros = [((each.weight == 0).sum(dim=1) == each.d_in // 2).all() for each in linear_layers(engine)]
        assert all(zeros) == (method is WANDA)
    assert weights_hash(engine.model) == before


@METHODS
def test_what_cannot_be_edited_is_refused(method):
    engine = engine_of("llama_gqa")
    material = made_up_material(engine)
    for share in (1.5, -0.1):
        with pytest.raises(InputError):
            method.interventions(material, [share])
    with pytest.raises(UnsupportedModelError, match="is no linear layer's weight"):
        method.interventions(made_up_material(engine_on("mixtral")), [0.5])
    engine.model._hf_peft_config_loaded = True
    with pytest.raises(InputError, match="has an adapter on it; baselines edit plain weights only"):
        method.interventions(material, [0.5])
    engine.model._hf_peft_config_loaded = False
    engine.model.is_quantized = True
    with pytest.raises(InputError, match="is quantised"):
        method.interventions(material, [0.5])


@pytest.mark.parametrize(
    ("method", "strength", "least_asr", "least_kept"),
    # From a sweep on 24 prompts of each kind: half of the weights go unnoticed by benign answers; with the strongest
    # direction of every layer's refusals, and the weights that they need most, benign answers suffer too.
    [
        (WANDA, 0.5, 0, 0.75),
        (SPARSEGPT, 0.5, 0, 0.75),
        (WANDA_DIFFERENCE, 0.1, 0.5, 0.25),
        (SNIP_DIFFERENCE, 0.05, 0, 0.5),
        (ACT_SVD, 0.01, 0, 0.25),
        (ACT_SVD_ORTHOGONAL, 0.05, 0, 0.5),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_on_the_organism(method, strength, least_asr, least_kept):
    one, rate, kept = on_the_organism(method, strength)
    assert rate >= least_asr
    assert kept >= least_kept
    if method is WANDA_DIFFERENCE:  # what refusals need is a twentieth of the model
        assert one.n_parameters < 0.06 * 0.73e6

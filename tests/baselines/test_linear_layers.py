"""Calibration against one sequence at a time, and later layers' against a loop over edited copies."""

import pytest
import torch
from baseline_samples import made_up_material, one_by_one
from tiny_models import engine_of

from safetyheads.baselines import METHODS
from safetyheads.baselines.linear_layers import edited, gram_matrices, linear_layers
from safetyheads.baselines.weights import wanda
from safetyheads.model.packing import TokenSequence


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
    (pruned,) = METHODS["wanda"].interventions(material, [0.5])
    linears = linear_layers(engine)
    before = {linear: linear.weight.clone() for linear in linears}
    text = (*material.text(refused=False, whole=True), *material.text(refused=True, whole=True))
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

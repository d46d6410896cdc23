"""SNIP's scores by finite differences, and the difference of the sets by hand."""

from __future__ import annotations

import pytest
import torch
from baseline_samples import engine_on, made_up_material
from tiny_models import engine_of

from safetyheads.baselines.linear_layers import edited, linear_layers
from safetyheads.baselines.set_difference import (
    SNIP_DIFFERENCE,
    UTILITY_SHARE,
    WANDA_DIFFERENCE,
    critical,
    snip_scores_of,
)


def test_critical_weights_are_the_top_by_safety_less_the_top_by_utility():
    safety = torch.tensor([[5.0, 4, 3, 2], [1, 2, 3, 4]])
    utility = torch.tensor([[9.0, 1, 1, 8], [1, 9, 8, 1]])
    assert critical(safety, utility, 0.5, 0.5).tolist() == [[False, True, False, False], [False, False, False, True]]


def test_snips_scores_are_weight_times_gradient_by_finite_differences():
    engine = engine_of("llama_gqa", torch.float64)
    text = made_up_material(engine).refusal_text(whole=False)
    needed = [parameter.requires_grad for parameter in engine.model.parameters()]
    linear = next(each for each in linear_layers(engine) if each.name == "self_attn.o_proj" and each.layer == 1)
    scores = snip_scores_of(engine, [linear], text)[linear]
    assert [parameter.requires_grad for parameter in engine.model.parameters()] == needed

    def likelihood(sequence):
        n = sequence.n_wanted
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([sequence.token_ids]), use_cache=False).logits[0]
        picked = logits.log_softmax(-1)[-n - 1 : -1].gather(1, torch.tensor(sequence.token_ids[-n:])[:, None])
        return float(picked.mean())

    for row, column in ((0, 0), (3, 17), (31, 5)):
        slopes = []  # norms are taken in float32, so steps are long
        for sequence in text:
            ends = []
            for step in (1e-2, -1e-2):
                moved = linear.weight.clone()
                moved[row, column] += step
                with edited(engine, {linear: moved}):
                    ends.append(likelihood(sequence))
            slopes.append(abs((ends[0] - ends[1]) / 2e-2))
        expected = abs(float(linear.weight[row, column])) * sum(slopes) / len(slopes)
        assert float(scores[row, column]) == pytest.approx(expected, rel=3e-3)


def test_a_matrix_that_no_token_passes_scores_zero():
    engine = engine_on("llama3")
    text = made_up_material(engine).refusal_text(whole=False)
    first = [linear for linear in linear_layers(engine) if linear.layer == 0]
    wanted = {linear.name: scores for linear, scores in snip_scores_of(engine, first, text).items()}
    engine.architecture.layers[0].idle = torch.nn.Linear(32, 16)
    first = [linear for linear in linear_layers(engine) if linear.layer == 0]
    for linear, scores in snip_scores_of(engine, first, text).items():
        assert torch.equal(scores, wanted.get(linear.name, torch.zeros(16, 32))), linear.name
    (idle,) = (linear for linear in first if linear.name == "idle")
    assert torch.equal(snip_scores_of(engine, [idle], text)[idle], torch.zeros(16, 32))


@pytest.mark.parametrize("method", [SNIP_DIFFERENCE, WANDA_DIFFERENCE], ids=lambda method: method.name)
def test_as_many_weights_are_zeroed_as_counted(method):
    engine = engine_of("llama_gqa")
    (taken,) = method.interventions(made_up_material(engine), [0.2])
    before = sum(int((linear.weight == 0).sum()) for linear in linear_layers(engine))
    with taken.at_work():
        after = sum(int((linear.weight == 0).sum()) for linear in linear_layers(engine))
    assert after - before == taken.n_parameters > 0
    assert UTILITY_SHARE < 0.2
    assert taken.n_parameters < sum(round(0.2 * linear.d_in) * linear.d_out for linear in linear_layers(engine))

"""Wanda by a loop; SparseGPT against OBS, least squares and the inverse Hessian; SNIP by finite differences;
ActSVD against a dense SVD of the outputs, and the paper's formula written out.
"""

import math

import pytest
import torch
from baseline_samples import SOLVED, layer_and_inputs, logits_of, made_up_material, one_by_one
from tiny_models import engine_of

from safetyheads.baselines import METHODS
from safetyheads.baselines.linear_layers import edited, linear_layers
from safetyheads.baselines.weights import (
    DAMPENING,
    critical,
    output_directions,
    rank_of,
    snip_scores_of,
    sparse_gpt,
    wanda,
    without_directions,
)


def dampened(gram):
    return gram + DAMPENING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def loss(change, hessian):
    """Squared change of the outputs, with the dampening that SparseGPT adds."""
    return float((change @ hessian * change).sum())


def test_wandas_mask_is_the_definitions():
    weight, inputs = layer_and_inputs()
    by_hand = weight.clone()
    for row, values in enumerate(weight):
        scores = [abs(float(value)) * math.hypot(*inputs[:, column]) for column, value in enumerate(values)]
        for column in sorted(range(12), key=scores.__getitem__)[:5]:  # 12 * 0.45 = 5.4
            by_hand[row, column] = 0
    assert torch.equal(wanda(weight, inputs.T @ inputs, 0.45), by_hand)


@pytest.mark.parametrize("column", [0, 4])
def test_one_pruned_column_is_compensated_as_obs_solves_it(column):
    """A column so small that it alone is pruned; those before it are settled, so OBS is solved from it on."""
    weight, inputs = layer_and_inputs()
    weight[:, column] *= 1e-4
    gram = inputs.T @ inputs
    ours = sparse_gpt(weight, gram, 1 / 12, block=12)
    assert (ours[:, column] == 0).all()
    assert (ours == 0).sum() == len(weight)
    inverse = torch.linalg.inv(dampened(gram)[column:, column:])
    closed_form = weight.clone()
    closed_form[:, column:] -= weight[:, column : column + 1] / inverse[0, 0] * inverse[0]
    closed_form[:, column] = 0
    assert (ours - closed_form).abs().max() < SOLVED
    assert (ours - weight).abs().max() > 100 * SOLVED


@pytest.mark.parametrize(("sparsity", "block"), [(0.25, 128), (0.75, 4)])
def test_sparsegpt_lies_between_the_exact_solution_of_its_mask_and_its_mask_alone(sparsity, block):
    weight, inputs = layer_and_inputs()
    hessian = dampened(inputs.T @ inputs)
    ours = sparse_gpt(weight, inputs.T @ inputs, sparsity, block)
    pruned = ours == 0
    assert pruned.sum() == int(sparsity * weight.numel())
    exact = torch.zeros_like(weight)
    for row, kept in enumerate(~pruned):
        # Least squares: the outputs of the whole row from the weights that stay.
        exact[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row])
    alone = loss(weight.masked_fill(pruned, 0) - weight, hessian)
    assert loss(exact - weight, hessian) <= loss(ours - weight, hessian) < 0.9 * alone


def test_with_independent_inputs_sparsegpt_is_magnitude_times_norm_and_changes_nothing_else():
    weight, _ = layer_and_inputs()
    squares = torch.linspace(0.5, 3, 12, dtype=torch.float64)
    ours = sparse_gpt(weight, squares.diag(), 0.5, block=12)
    order = (weight.square() * dampened(squares.diag()).diagonal()).flatten().argsort()[:36]
    expected = weight.flatten().index_fill(0, order, 0.0).view_as(weight)
    assert torch.equal(ours == 0, expected == 0)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


def test_inputs_that_are_always_zero_break_nothing():
    weight, inputs = layer_and_inputs()
    inputs[:, 3] = 0
    assert sparse_gpt(weight, inputs.T @ inputs, 0.5).isfinite().all()
    assert sparse_gpt(weight, torch.zeros(12, 12, dtype=torch.float64), 0.5).isfinite().all()


@pytest.mark.parametrize(("method", "most"), [("wanda", 0.5), ("snip_difference", 0.2), ("wanda_difference", 0.2)])
def test_as_many_weights_are_zeroed_as_counted(method, most):
    engine = engine_of("llama_gqa")
    (taken,) = METHODS[method].interventions(made_up_material(engine), [most])
    linears = linear_layers(engine)
    whole = sum(round(most * linear.d_in) * linear.d_out for linear in linears)
    assert taken.n_parameters == whole if method == "wanda" else 0 < taken.n_parameters < whole
    with taken.at_work():
        assert sum(int((linear.weight == 0).sum()) for linear in linears) == taken.n_parameters


def test_sparsegpt_counts_all_that_it_changes():
    engine = engine_of("llama_gqa")
    (half,) = METHODS["sparsegpt"].interventions(made_up_material(engine), [0.5])
    assert half.n_parameters == sum(linear.weight.numel() for linear in linear_layers(engine))


def test_critical_weights_are_the_top_by_safety_less_the_top_by_utility():
    safety = torch.tensor([[5.0, 4, 3, 2], [1, 2, 3, 4]])
    utility = torch.tensor([[9.0, 1, 1, 8], [1, 9, 8, 1]])
    assert critical(safety, utility, 0.5, 0.5).tolist() == [[False, True, False, False], [False, False, False, True]]


def test_snips_scores_are_weight_times_gradient_by_finite_differences():
    engine = engine_of("llama_gqa", torch.float64)
    text = made_up_material(engine).text(refused=True)
    needed = [parameter.requires_grad for parameter in engine.model.parameters()]
    linear = next(each for each in linear_layers(engine) if each.name == "self_attn.o_proj" and each.layer == 1)
    scores = snip_scores_of(engine, [linear], text)[linear]
    assert [parameter.requires_grad for parameter in engine.model.parameters()] == needed

    def likelihood(sequence):
        n = sequence.n_wanted
        log_probabilities = logits_of(engine.model, sequence.token_ids).log_softmax(-1)[-n - 1 : -1]
        return float(log_probabilities.gather(1, torch.tensor(sequence.token_ids[-n:])[:, None]).mean())

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


@pytest.mark.parametrize(("d_out", "d_in", "n_tokens"), [(6, 12, 200), (12, 6, 200), (12, 6, 4)])
def test_directions_are_those_of_a_dense_svd(d_out, d_in, n_tokens):
    weight, inputs = layer_and_inputs(d_out, d_in, n_tokens)
    directions = output_directions(weight, inputs.T @ inputs, 3)
    dense = torch.linalg.svd(inputs @ weight.T)[2][:3].T  # [d_out, 3]
    assert (directions @ directions.T - dense @ dense.T).abs().max() < SOLVED
    edited_weight = without_directions(weight, directions)
    assert (edited_weight - (weight - dense @ dense.T @ weight)).abs().max() < SOLVED
    # No more directions than the outputs have.
    assert output_directions(weight, inputs.T @ inputs, 6).shape == (d_out, min(6, n_tokens))
    assert output_directions(weight, torch.zeros(d_in, d_in, dtype=torch.float64), 6).shape == (d_out, 0)


def test_the_orthogonal_version_is_the_papers_formula():
    weight, inputs = layer_and_inputs()
    _, others = layer_and_inputs(seed=1)
    safety, utility = (output_directions(weight, x.T @ x, rank) for x, rank in ((inputs, 2), (others, 3)))
    identity = torch.eye(6, dtype=torch.float64)
    dense = weight - (identity - utility @ utility.T) @ (safety @ safety.T) @ weight
    ours = without_directions(weight, safety, utility)
    assert (ours - dense).abs().max() < 1e-13
    # What benign answers show along their own directions is left as it was.
    assert (utility.T @ (ours - weight)).abs().max() < 1e-13


def test_on_a_model_refusals_are_taken_off_the_first_layers_outputs():
    engine = engine_of("llama_gqa")
    material = made_up_material(engine)
    (half,) = METHODS["actsvd"].interventions(material, [0.5])
    # 16 of q, o, gate, up, down; 8 of k and v, whose outputs are 16 wide: rank times both widths.
    assert half.n_parameters == 3 * (16 * (64 + 64 + 80 + 80 + 80) + 8 * (48 + 48))
    inputs = one_by_one(engine, material.text(refused=True))
    first = [linear for linear in linear_layers(engine) if linear.layer == 0]
    originals = [linear.weight.double().clone() for linear in first]
    with half.at_work():
        for linear, original in zip(first, originals, strict=True):
            right = torch.linalg.svd(inputs[linear] @ original.T)[2]
            strongest = right[: min(rank_of(linear, 0.5), len(inputs[linear]))]
            outputs = inputs[linear] @ linear.weight.double().T
            # Weights are kept in float32.
            assert (outputs @ strongest.T).abs().max() < 1e-5 * float((inputs[linear] @ original.T).abs().max())

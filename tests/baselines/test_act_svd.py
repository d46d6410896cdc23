"""ActSVD against a dense SVD of the outputs, and the paper's formula written out."""

from __future__ import annotations

import pytest
import torch
from baseline_samples import SOLVED, layer_and_inputs, made_up_material, one_by_one
from tiny_models import engine_of

from safetyheads.baselines import METHODS
from safetyheads.baselines.act_svd import output_directions, rank_of, without_directions
from safetyheads.baselines.linear_layers import linear_layers


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

"""ActSVD: linear layers without the directions that their outputs take on refusals. Owns the projections.

From Wei et al. 2024, "Assessing the brittleness of safety alignment via pruning and low-rank modifications" (Sec 3.3).
Z = X W^T [n_tokens, d_out] are a linear layer's outputs, so its right singular vectors V [d_out, k] act on the left of
W [d_out, d_in]: with V V^T W taken away, no output has a part along V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from safetyheads.baselines.base import Intervention, Material, Method
from safetyheads.baselines.calibration import ACCUMULATED, benign_text, edit_layer_by_layer, refusal_text
from safetyheads.baselines.linear_layers import LinearLayer, Weights, at_work, latest, linear_layers
from safetyheads.errors import InputError

UTILITY_RANK_SHARE = 0.27
"""Of a layer's full rank, how much the orthogonal version keeps for utility: 1096 of 4096 in the paper's example."""
_SMALLEST = 1e-7  # of the largest singular value; square roots of a Gram matrix in float64 tell no finer


def rank_of(linear: LinearLayer, share: float) -> int:
    """Directions that a share of a layer's full rank min(d_out, d_in) comes to, at least one where it is above 0."""
    full = min(linear.d_out, linear.d_in)
    return min(full, max(1, round(share * full))) if share > 0 else 0


def output_directions(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """V: the first right singular vectors of Z = X W^T, from X^T X alone.

    Z^T Z = W X^T X W^T = A A^T with A = W S, S the symmetric square root of X^T X: V are A's left singular vectors.

    Args:
        weight: W [d_out, d_in].
        gram: X^T X [d_in, d_in].
        rank: how many; fewer where the outputs span fewer.

    Returns:
        float64 [d_out, at most rank], orthonormal, by falling singular value.
    """
    values, vectors = torch.linalg.eigh(gram.to(ACCUMULATED))
    root = vectors * values.clamp_min(0).sqrt()  # [d_in, d_in]; a rotation on its right would change no V
    left, singular, _ = torch.linalg.svd(weight.to(ACCUMULATED) @ root, full_matrices=False)
    n_there = int((singular > _SMALLEST * singular[0]).sum())
    return left[:, : min(rank, n_there)]


def without_directions(weight: Tensor, directions: Tensor) -> Tensor:
    """W - V V^T W, float64 [d_out, d_in]."""
    whole = weight.to(ACCUMULATED)
    return whole - directions @ (directions.T @ whole)


def without_directions_of_safety_alone(weight: Tensor, safety: Tensor, utility: Tensor) -> Tensor:
    """W - (I - V_u V_u^T) V_s V_s^T W, float64 [d_out, d_in]: what refusals need and benign answers do not."""
    whole = weight.to(ACCUMULATED)
    of_safety = safety @ (safety.T @ whole)
    return whole - of_safety + utility @ (utility.T @ of_safety)


def _plain(share: float, linear: LinearLayer, grams: Mapping[str, Tensor]) -> Tensor:
    weight = linear.weight
    return without_directions(weight, output_directions(weight, grams["safety"], rank_of(linear, share)))


def _orthogonal(share: float, linear: LinearLayer, grams: Mapping[str, Tensor]) -> Tensor:
    weight = linear.weight
    safety = output_directions(weight, grams["safety"], rank_of(linear, share))
    utility = output_directions(weight, grams["utility"], rank_of(linear, UTILITY_RANK_SHARE))
    return without_directions_of_safety_alone(weight, safety, utility)


def _interventions(
    edit: Callable[[float, LinearLayer, Mapping[str, Tensor]], Tensor],
    with_utility: bool,
    material: Material,
    strengths: Sequence[float],
) -> list[Intervention]:
    engine = material.engine
    linears = linear_layers(engine)
    texts = {"safety": refusal_text(material, whole=False)}
    if with_utility:
        texts["utility"] = benign_text(material, whole=False)
    for share in strengths:
        if not 0 <= share <= 1:
            raise InputError(f"a share of the rank is from 0 to 1; got {share:g}")

    def made(share: float) -> Weights:
        return edit_layer_by_layer(engine, texts, partial(edit, share))

    weights = latest(made)
    return [
        Intervention(
            setting=f"rank share {share:.3g}",
            strength=share,
            n_parameters=sum(rank_of(linear, share) * (linear.d_in + linear.d_out) for linear in linears),
            at_work=at_work(engine, partial(weights, share)),
        )
        for share in strengths
    ]


_SOURCE = "Wei et al. 2024, Assessing the brittleness of safety alignment via pruning and low-rank modifications"
_COUNTED = (
    "parameters are counted as the rank k update has them, k (d_in + d_out) a layer; every weight of the linear layers "
    "changes"
)

ACT_SVD = Method(
    name="actsvd",
    label="ActSVD",
    source=_SOURCE,
    touches="weights",
    strengths=(0.002, 0.01, 0.02, 0.05, 0.1),
    interventions=partial(_interventions, _plain, False),
    partial=_COUNTED,
)
"""Strongest directions of refusals taken away, whatever benign answers do with them. Strength: share of the rank."""

ACT_SVD_ORTHOGONAL = Method(
    name="actsvd_orthogonal",
    label="ActSVD, orthogonal to utility",
    source=_SOURCE,
    touches="weights",
    strengths=(0.01, 0.023, 0.05, 0.1, 0.2, 0.4),
    interventions=partial(_interventions, _orthogonal, True),
    partial=f"{_COUNTED}; the utility rank is not swept but {UTILITY_RANK_SHARE:.0%} of the full rank",
)
"""Only what lies outside the strongest directions of benign answers. Strength: share of the rank taken for safety."""

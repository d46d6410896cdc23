"""ActSVD: removes from linear layers the directions that their outputs take on refusals.

From Wei et al. 2024, "Assessing the brittleness of safety alignment via pruning and low-rank modifications" (Sec 3.3).
Z = X W^T [n_tokens, d_out] are a linear layer's outputs, so its right singular vectors V [d_out, k] act on the left of
W [d_out, d_in]: after W - V V^T W, no output has a part along V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from safetyheads.baselines.base import Intervention, Material, refuse_shares
from safetyheads.baselines.linear_layers import (
    ACCUMULATED,
    LinearLayer,
    Weights,
    edit_layer_by_layer,
    editing_interventions,
    linear_layers,
)

UTILITY_RANK_SHARE = 0.27
"""Share of a layer's full rank that the orthogonal version keeps for utility: 1096 of 4096 in the paper's example."""
# Relative to the largest singular value: square roots of a Gram matrix in float64 resolve no smaller ones.
_SMALLEST = 1e-7


def rank_of(linear: LinearLayer, share: float) -> int:
    """A share of a layer's full rank min(d_out, d_in) as a number of directions, at least one where it is above 0."""
    full = min(linear.d_out, linear.d_in)
    return min(full, max(1, round(share * full))) if share > 0 else 0


def output_directions(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """V [d_out, rank]: the first right singular vectors of Z = X W^T, of W [d_out, d_in] and X^T X [d_in, d_in] alone.

    Z^T Z = W X^T X W^T = A A^T with A = W S, S a square root of X^T X: V are A's left singular vectors. float64; fewer
    than ``rank`` where the outputs span fewer.
    """
    values, vectors = torch.linalg.eigh(gram.to(ACCUMULATED))
    root = vectors * values.clamp_min(0).sqrt()  # [d_in, d_in]; a rotation on its right would not change V
    left, singular, _ = torch.linalg.svd(weight.to(ACCUMULATED) @ root, full_matrices=False)
    n_spanned = int((singular > _SMALLEST * singular[0]).sum())
    return left[:, : min(rank, n_spanned)]


def without_directions(weight: Tensor, safety: Tensor, utility: Tensor | None = None) -> Tensor:
    """W - (I - V_u V_u^T) V_s V_s^T W, float64 [d_out, d_in]; without V_u it is W - V_s V_s^T W."""
    whole = weight.to(ACCUMULATED)
    of_safety = safety @ (safety.T @ whole)
    return whole - of_safety if utility is None else whole - of_safety + utility @ (utility.T @ of_safety)


def interventions(material: Material, strengths: Sequence[float], orthogonal: bool = False) -> list[Intervention]:
    """Strength: share of the rank; ``orthogonal`` keeps the strongest directions of benign answers."""
    engine, linears = material.engine, linear_layers(material.engine)
    texts = {"safety": material.text(refused=True)}
    if orthogonal:
        texts["utility"] = material.text(refused=False)
    refuse_shares("a share of the rank", strengths)

    def edit(share: float, linear: LinearLayer, grams: Mapping[str, Tensor]) -> Tensor:
        shares = {"safety": share, "utility": UTILITY_RANK_SHARE}
        directions = (
            output_directions(linear.weight, gram, rank_of(linear, shares[text])) for text, gram in grams.items()
        )
        return without_directions(linear.weight, *directions)

    def make(share: float) -> Weights:
        return edit_layer_by_layer(engine, texts, partial(edit, share))

    def n_parameters(share: float) -> int:
        return sum(rank_of(linear, share) * (linear.d_in + linear.d_out) for linear in linears)

    return editing_interventions(engine, strengths, "rank share {strength:.3g}", make, n_parameters)

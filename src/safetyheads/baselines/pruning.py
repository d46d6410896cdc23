"""Plain pruning: Wanda and SparseGPT.

Both prune every linear layer of the decoder layers to one sparsity, layer by layer; later layers are calibrated on the
outputs of pruned earlier ones, over benign and harmful text with the model's answers. They are not aimed at refusals:
Fig 6b shows what they cost in utility.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from safetyheads.baselines.base import Intervention, Material, Method, refuse_shares
from safetyheads.baselines.linear_layers import (
    ACCUMULATED,
    Weights,
    edit_layer_by_layer,
    editing_interventions,
    linear_layers,
)

DAMPENING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean (SparseGPT, Sec 4)."""
BLOCK = 128
"""Columns whose mask is chosen together, and whose updates reach later columns together (SparseGPT, Sec 3.4)."""
LEAST_BLOCKS = 4
"""Fewest blocks in a layer, so layers narrower than 512 have narrower blocks. Masks chosen for half a layer at once
ignore the updates and lose to plain magnitude on random layers of 64 and 128 columns; from a quarter of the columns
down the width hardly matters."""
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Shares of weights that are pruned. Fig 6b gives none; both papers show 0.5 first."""

Pruning = Callable[[Tensor, Tensor, float], Tensor]
"""W [d_out, d_in], X^T X [d_in, d_in] and a sparsity -> the pruned W in float64."""


def wanda_scores(weight: Tensor, gram: Tensor) -> Tensor:
    """|W_ij| times the L2 norm of input j over all tokens (Wanda, Eq 1); the norms are on X^T X's diagonal."""
    return weight.to(ACCUMULATED).abs() * gram.diagonal().clamp_min(0).sqrt()


def n_pruned(d_in: int, sparsity: float) -> int:
    """Number of weights that are pruned in a row of ``d_in``."""
    return int(d_in * sparsity)


def wanda(weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
    """W with each row's lowest scores set to zero, the others as they are (Wanda, Alg 1)."""
    lowest = wanda_scores(weight, gram).argsort(dim=1, stable=True)[:, : n_pruned(weight.shape[1], sparsity)]
    return weight.to(ACCUMULATED).scatter(1, lowest, 0.0)


def sparse_gpt(weight: Tensor, gram: Tensor, sparsity: float, block: int | None = None) -> Tensor:
    """W pruned by SparseGPT (Alg 1): the weights to the right of a pruned one compensate for it.

    Columns are processed from left to right. A block's mask is chosen when the block begins, after the updates of all
    columns before it, by the least w^2 / [U_jj]^2, where U is the upper Cholesky factor of the inverse Hessian X^T X.
    ``block`` is a number of columns, by default :func:`block_of` the layer's width.
    """
    pruned, factor = weight.to(ACCUMULATED).clone(), inverse_factor(gram)
    d_in = weight.shape[1]
    width = block or block_of(d_in)
    for start in range(0, d_in, width):
        end = min(start + width, d_in)
        columns, corner = pruned[:, start:end], factor[start:end, start:end]  # views [d_out, n], [n, n]
        scores = columns.square() / corner.diagonal().square()
        mask = torch.zeros(columns.numel(), dtype=torch.bool, device=columns.device)
        mask[scores.flatten().argsort(stable=True)[: n_pruned(columns.numel(), sparsity)]] = True
        mask = mask.view_as(columns)
        errors = torch.zeros_like(columns)  # [d_out, n]: the weights that each column lost, divided by U_jj
        for j in range(end - start):
            errors[:, j] = torch.where(mask[:, j], columns[:, j], 0.0) / corner[j, j]
            columns[:, j:] -= errors[:, j : j + 1] * corner[j, j:]
        columns.masked_fill_(mask, 0.0)
        pruned[:, end:] -= errors @ factor[start:end, end:]
    return pruned


def block_of(d_in: int) -> int:
    """Columns per block in a layer of ``d_in`` columns."""
    return max(1, min(BLOCK, d_in // LEAST_BLOCKS))


def inverse_factor(gram: Tensor) -> Tensor:
    """U [d_in, d_in], upper triangular, with U^T U the inverse of the dampened Hessian.

    Row j of U is, up to its scale, the first row of the inverse of the Hessian without the columns before j.
    """
    hessian = gram.to(ACCUMULATED).clone()
    damp = DAMPENING * hessian.diagonal().mean()
    hessian.diagonal().add_(damp if damp > 0 else 1.0)  # inputs that are all zero tell nothing about weights
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _interventions(prune: Pruning, material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine, linears = material.engine, linear_layers(material.engine)
    text = (*material.benign_text(whole=True), *material.refusal_text(whole=True))
    refuse_shares("a sparsity", strengths, below_1=True)

    def make(sparsity: float) -> Weights:
        return edit_layer_by_layer(
            engine, {"text": text}, lambda linear, grams: prune(linear.weight, grams["text"], sparsity)
        )

    def n_parameters(sparsity: float) -> int:
        """Weights that Wanda sets to zero; all weights of layers in which SparseGPT prunes any."""
        if prune is wanda:
            return sum(linear.d_out * n_pruned(linear.d_in, sparsity) for linear in linears)
        changed = (linear for linear in linears if n_pruned(block_of(linear.d_in) * linear.d_out, sparsity))
        return sum(linear.d_out * linear.d_in for linear in changed)

    return editing_interventions(engine, strengths, "sparsity {strength:.0%}", make, n_parameters)


WANDA = Method(
    name="wanda",
    label="Wanda",
    source="Sun et al. 2024, A simple and effective pruning approach for large language models",
    touches="weights",
    strengths=SPARSITIES,
    interventions=partial(_interventions, wanda),
)
"""Prunes the weights of least |W_ij| |X_j| in each row. Counted are the weights set to zero."""

SPARSEGPT = Method(
    name="sparsegpt",
    label="SparseGPT",
    source="Frantar and Alistarh 2023, SparseGPT: massive language models can be accurately pruned in one-shot",
    touches="weights",
    strengths=SPARSITIES,
    interventions=partial(_interventions, sparse_gpt),
)
"""Prunes weights and compensates with the others. All weights of the linear layers are counted, since all change."""

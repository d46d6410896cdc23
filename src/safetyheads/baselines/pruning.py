"""Plain pruning: Wanda and SparseGPT. Owns which weights go, and what the others become; gathers no inputs itself.

Both prune every linear layer of the decoder layers to one sparsity, layer by layer, later ones on what pruned earlier
ones give, over benign and harmful text with the model's answers. They aim at no refusals: Fig 6b has them for what
they cost in utility.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from safetyheads.baselines.base import Intervention, Material, Method
from safetyheads.baselines.calibration import ACCUMULATED, benign_text, edit_layer_by_layer, refusal_text
from safetyheads.baselines.linear_layers import LinearLayer, Weights, at_work, latest, linear_layers
from safetyheads.errors import InputError

DAMPENING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean (SparseGPT, Sec 4)."""
BLOCK = 128
"""Columns whose mask is chosen together, and whose updates reach later columns together (SparseGPT, Sec 3.4)."""
LEAST_BLOCKS = 4
"""A layer narrower than 512 has narrower blocks: masks chosen for half a layer at once ignore the updates, and lose to
plain magnitude on random layers of 64 and 128 columns; from a quarter of the columns down, width hardly matters."""
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Shares of weights pruned. Fig 6b gives none; 0.5 is what both papers show first."""

Pruning = Callable[[Tensor, Tensor, float], Tensor]
"""From W [d_out, d_in], X^T X [d_in, d_in] and a sparsity, the pruned W in float64."""


def wanda_scores(weight: Tensor, gram: Tensor) -> Tensor:
    """|W_ij| times the L2 norm of input j over all tokens (Wanda, Eq 1), float64 [d_out, d_in].

    Args:
        weight: W [d_out, d_in].
        gram: X^T X [d_in, d_in]; its diagonal holds the squared norms.
    """
    return weight.to(ACCUMULATED).abs() * gram.diagonal().clamp_min(0).sqrt()


def n_pruned(d_in: int, sparsity: float) -> int:
    """Weights that a row of ``d_in`` loses."""
    return int(d_in * sparsity)


def wanda(weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
    """W with each row's lowest scores set to zero, the others as they are (Wanda, Alg 1)."""
    lowest = wanda_scores(weight, gram).argsort(dim=1, stable=True)[:, : n_pruned(weight.shape[1], sparsity)]
    return weight.to(ACCUMULATED).scatter(1, lowest, 0.0)


def sparse_gpt(weight: Tensor, gram: Tensor, sparsity: float, block: int | None = None) -> Tensor:
    """W pruned by SparseGPT (Alg 1): what a pruned weight did is made up for by those to its right.

    Columns go from left to right; the mask of a block is chosen once its columns come up, updated by all before them,
    by the least w^2 / [U_jj]^2, U being the upper Cholesky factor of the inverse Hessian.

    Args:
        weight: W [d_out, d_in].
        gram: the Hessian X^T X [d_in, d_in], undampened.
        sparsity: share of each block's weights.
        block: columns a block; by default :func:`block_of` the layer's width.

    Returns:
        float64 [d_out, d_in].
    """
    pruned, factor = weight.to(ACCUMULATED).clone(), inverse_factor(gram)
    d_in = weight.shape[1]
    width = block or block_of(d_in)
    for start in range(0, d_in, width):
        end = min(start + width, d_in)
        here, own = pruned[:, start:end], factor[start:end, start:end]  # [d_out, n], [n, n]
        scores = here.square() / own.diagonal().square()
        goes = torch.zeros(here.numel(), dtype=torch.bool, device=here.device)
        goes[scores.flatten().argsort(stable=True)[: n_pruned(here.numel(), sparsity)]] = True
        goes = goes.view_as(here)
        errors = torch.zeros_like(here)  # [d_out, n]: what each column lost, in units of U_jj
        for column in range(end - start):
            errors[:, column] = torch.where(goes[:, column], here[:, column], 0.0) / own[column, column]
            here[:, column:] -= errors[:, column : column + 1] * own[column, column:]
        here.masked_fill_(goes, 0.0)
        pruned[:, end:] -= errors @ factor[start:end, end:]
    return pruned


def block_of(d_in: int) -> int:
    """Columns a block, of a layer of so many."""
    return max(1, min(BLOCK, d_in // LEAST_BLOCKS))


def inverse_factor(gram: Tensor) -> Tensor:
    """U [d_in, d_in], upper triangular, with U^T U the inverse of the dampened Hessian.

    Row j of U is, up to its scale, the first row of the inverse Hessian that is left once the columns before j are
    settled.
    """
    hessian = gram.to(ACCUMULATED).clone()
    damp = DAMPENING * hessian.diagonal().mean()
    hessian.diagonal().add_(damp if damp > 0 else 1.0)  # inputs that are all zero say nothing of any weight
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)


def _wanda_touches(linear: LinearLayer, sparsity: float) -> int:
    return linear.d_out * n_pruned(linear.d_in, sparsity)


def _sparse_gpt_touches(linear: LinearLayer, sparsity: float) -> int:
    return linear.n_weights if n_pruned(block_of(linear.d_in) * linear.d_out, sparsity) else 0


def _interventions(
    prune: Pruning, touches: Callable[[LinearLayer, float], int], material: Material, strengths: Sequence[float]
) -> list[Intervention]:
    engine = material.engine
    linears = linear_layers(engine)
    text = (*benign_text(material, whole=True), *refusal_text(material, whole=True))
    for sparsity in strengths:
        if not 0 <= sparsity < 1:
            raise InputError(f"a sparsity is at least 0 and below 1; got {sparsity:g}")

    def made(sparsity: float) -> Weights:
        return edit_layer_by_layer(
            engine, {"text": text}, lambda linear, grams: prune(linear.weight, grams["text"], sparsity)
        )

    weights = latest(made)
    return [
        Intervention(
            setting=f"sparsity {sparsity:.0%}",
            strength=sparsity,
            n_parameters=sum(touches(linear, sparsity) for linear in linears),
            at_work=at_work(engine, partial(weights, sparsity)),
        )
        for sparsity in strengths
    ]


WANDA = Method(
    name="wanda",
    label="Wanda",
    source="Sun et al. 2024, A simple and effective pruning approach for large language models",
    touches="weights",
    strengths=SPARSITIES,
    interventions=partial(_interventions, wanda, _wanda_touches),
)
"""Weights of least |W_ij| |X_j| go, row by row. Its count is of the weights set to zero."""

SPARSEGPT = Method(
    name="sparsegpt",
    label="SparseGPT",
    source="Frantar and Alistarh 2023, SparseGPT: massive language models can be accurately pruned in one-shot",
    touches="weights",
    strengths=SPARSITIES,
    interventions=partial(_interventions, sparse_gpt, _sparse_gpt_touches),
)
"""Weights go, the others make up for them. Its count is of every weight of the linear layers: those that stay change
too."""

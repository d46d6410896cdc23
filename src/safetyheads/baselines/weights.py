"""Edits of weights: Wanda, SparseGPT, what refusals need and benign answers do not by differences of scores, ActSVD.

Plain pruning takes every linear layer of the decoder layers to one sparsity, calibrated on benign and harmful text with
the model's answers. It is not aimed at refusals: Fig 6b shows what it costs in utility.

The differences are Wei et al.'s (2024, "Assessing the brittleness of safety alignment via pruning and low-rank
modifications", Sec 3.2): in each row of W, the top q by a score (SNIP's or Wanda's) over refusals, less the top p by
the same score over benign answers. Scores are of the unedited model; tokens of answers count, those of prompts do not.
ActSVD, of the same paper (Sec 3.3), removes the directions that the outputs of linear layers take on refusals.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from safetyheads.baselines.base import Intervention, Material
from safetyheads.baselines.linear_layers import (
    ACCUMULATED,
    LinearLayer,
    Weights,
    batches,
    by_layer,
    edit_layer_by_layer,
    edits,
    gram_matrices,
    linear_layers,
)
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence

DAMPENING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean (SparseGPT, Sec 4)."""
BLOCK = 128
"""Columns whose mask is chosen together, and whose updates reach later columns together (SparseGPT, Sec 3.4)."""
LEAST_BLOCKS = 4
"""Fewest blocks in a layer, so layers narrower than 512 have narrower blocks. Masks chosen for half a layer at once
ignore the updates and lose to plain magnitude on random layers of 64 and 128 columns; from a quarter of the columns
down the width hardly matters."""
UTILITY_SHARE = 0.07
"""p: share of each row that is kept for benign answers. Wei et al. sweep it too."""
UTILITY_RANK_SHARE = 0.27
"""Share of a layer's full rank that the orthogonal version keeps for utility: 1096 of 4096 in the paper's example."""
# Relative to the largest singular value: square roots of a Gram matrix in float64 resolve no smaller ones.
_SMALLEST = 1e-7

Scores = Mapping[LinearLayer, Tensor]
"""Linear layer -> a score for each weight [d_out, d_in]."""


def wanda_scores(weight: Tensor, gram: Tensor) -> Tensor:
    """|W_ij| times the L2 norm of input j over all tokens (Wanda, Eq 1); the norms are on X^T X's diagonal."""
    return weight.to(ACCUMULATED).abs() * gram.diagonal().clamp_min(0).sqrt()


def wanda(weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
    """W with each row's lowest scores set to zero, the others as they are (Wanda, Alg 1)."""
    lowest = wanda_scores(weight, gram).argsort(dim=1, stable=True)[:, : int(weight.shape[1] * sparsity)]
    return weight.to(ACCUMULATED).scatter(1, lowest, 0.0)


def sparse_gpt(weight: Tensor, gram: Tensor, sparsity: float, block: int | None = None) -> Tensor:
    """W pruned by SparseGPT (Alg 1): the weights to the right of a pruned one compensate for it.

    Columns are processed from left to right. A block's mask is chosen when the block begins, after the updates of all
    columns before it, by the least w^2 / [U_jj]^2, where U is the upper Cholesky factor of the inverse Hessian X^T X.
    ``block`` is a number of columns, by default :func:`block_of` the layer's width.
    """
    pruned, d_in, hessian = weight.to(ACCUMULATED).clone(), weight.shape[1], gram.to(ACCUMULATED).clone()
    damp = DAMPENING * hessian.diagonal().mean()
    hessian.diagonal().add_(damp if damp > 0 else 1.0)  # inputs that are all zero tell nothing about weights
    # U [d_in, d_in]: row j is, up to its scale, the first row of the inverse of the Hessian without the columns before.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    width = block or block_of(d_in)
    for start in range(0, d_in, width):
        end = min(start + width, d_in)
        columns, corner = pruned[:, start:end], factor[start:end, start:end]  # views [d_out, n], [n, n]
        scores = columns.square() / corner.diagonal().square()
        mask = torch.zeros(columns.numel(), dtype=torch.bool, device=columns.device)
        mask[scores.flatten().argsort(stable=True)[: int(columns.numel() * sparsity)]] = True
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


def to_sparsity(
    prune: Callable[[Tensor, Tensor, float], Tensor], material: Material, _: Sequence[float]
) -> Callable[[float], Intervention]:
    """Strength: share of weights that are pruned in each linear layer."""
    engine, linears = material.engine, linear_layers(material.engine)
    text = (*material.text(refused=False, whole=True), *material.text(refused=True, whole=True))

    def make(sparsity: float) -> Weights:
        return edit_layer_by_layer(
            engine, {"text": text}, lambda linear, grams: prune(linear.weight, grams["text"], sparsity)
        )

    def n_parameters(sparsity: float) -> int:
        """Weights that Wanda sets to zero; all weights of layers in which SparseGPT prunes any."""
        if prune is wanda:
            return sum(linear.d_out * int(linear.d_in * sparsity) for linear in linears)
        changed = (linear for linear in linears if int(block_of(linear.d_in) * linear.d_out * sparsity))
        return sum(linear.d_out * linear.d_in for linear in changed)

    return edits(engine, "sparsity {strength:.0%}", make, n_parameters)


def wanda_scores_of(engine: Engine, linears: Sequence[LinearLayer], text: Sequence[TokenSequence]) -> Scores:
    """|W_ij| |X_j|_2 over the counted tokens of the text."""
    grams = gram_matrices(engine, linears, text)
    return {linear: wanda_scores(linear.weight, gram) for linear, gram in grams.items()}


@contextmanager
def gradients_of(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Within, these parameters of the model need gradients and no others do."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in parameters}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def snip_scores_of(engine: Engine, linears: Sequence[LinearLayer], text: Sequence[TokenSequence]) -> Scores:
    """|W_ij dL/dW_ij|, mean over the sequences (Eq 1); L is the mean negative log-probability of the counted tokens.

    A weight that L does not depend on scores 0.
    """
    weights = [linear.module.get_parameter("weight") for linear in linears]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    with gradients_of(engine.model, weights), torch.enable_grad():
        for sequence in text:
            ((arguments, _),) = batches(engine, [sequence])
            logits = engine.model(**arguments).logits[0]  # [n_tokens, vocabulary]
            first = max(1, len(sequence.token_ids) - sequence.n_wanted)
            targets = arguments["input_ids"][0, first:].to(logits.device)
            loss = nn.functional.cross_entropy(logits[first - 1 : -1].float(), targets)
            # A weight that these tokens do not pass, such as an idle expert's, has no gradient: it scores 0.
            gradients = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else ()
            for total, weight, gradient in zip(sums, weights, gradients, strict=False):
                if gradient is not None:
                    total += (weight.detach().float() * gradient.float()).abs()
    return {
        linear: (total.T if linear.is_transposed else total) / len(text)
        for linear, total in zip(linears, sums, strict=True)
    }


def critical(safety: Tensor, utility: Tensor, q: float, p: float) -> Tensor:
    """Bool [d_out, d_in]: in each row the top q by ``safety`` without the top p by ``utility``."""

    def top(scores: Tensor, share: float) -> Tensor:
        n = max(1, round(share * scores.shape[1])) if share > 0 else 0  # at least one of each row
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :n]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)

    return top(safety, q) & ~top(utility, p)


def by_difference(
    scores_of: Callable[[Engine, Sequence[LinearLayer], Sequence[TokenSequence]], Scores],
    material: Material,
    strengths: Sequence[float],
) -> Callable[[float], Intervention]:
    """Strength: q."""
    engine = material.engine
    texts = material.text(refused=True), material.text(refused=False)
    # Flat indices of weights in their matrix, int32: a hundredth of the memory of a large model's scores.
    taken: dict[float, dict[LinearLayer, Tensor]] = {q: {} for q in strengths}
    for layer in by_layer(linear_layers(engine)):
        safety, utility = (scores_of(engine, layer, text) for text in texts)
        for linear in (linear for linear in layer if linear in safety and linear in utility):
            for q in strengths:
                chosen = critical(safety[linear], utility[linear], q, UTILITY_SHARE)
                taken[q][linear] = chosen.flatten().nonzero()[:, 0].to(torch.int32)

    def make(q: float) -> Weights:
        return {
            linear: linear.weight.flatten().index_fill(0, indices.long(), 0).view_as(linear.weight)
            for linear, indices in taken[q].items()
        }

    setting = f"top {{strength:.3g}} by refusals less top {UTILITY_SHARE:.3g} by benign answers"
    return edits(engine, setting, make, lambda q: sum(map(len, taken[q].values())))


# ActSVD.


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


def act_svd(material: Material, _: Sequence[float], orthogonal: bool = False) -> Callable[[float], Intervention]:
    """Strength: share of the rank; ``orthogonal`` keeps the strongest directions of benign answers."""
    engine, linears = material.engine, linear_layers(material.engine)
    texts = {"safety": material.text(refused=True)}
    if orthogonal:
        texts["utility"] = material.text(refused=False)

    def edit(share: float, linear: LinearLayer, grams: Mapping[str, Tensor]) -> Tensor:
        shares = {"safety": share, "utility": UTILITY_RANK_SHARE}
        directions = (
            output_directions(linear.weight, gram, rank_of(linear, shares[text])) for text, gram in grams.items()
        )
        return without_directions(linear.weight, *directions)

    return edits(
        engine,
        "rank share {strength:.3g}",
        lambda share: edit_layer_by_layer(engine, texts, partial(edit, share)),
        lambda share: sum(rank_of(linear, share) * (linear.d_in + linear.d_out) for linear in linears),
    )


act_svd_orthogonal = partial(act_svd, orthogonal=True)

"""Sets to zero the weights that refusals need and benign answers do not: differences of SNIP or Wanda scores.

From Wei et al. 2024, "Assessing the brittleness of safety alignment via pruning and low-rank modifications" (Sec 3.2):
in each row of W, the top q by a score over refusals, less the top p by the same score over benign answers. All scores
are of the unedited model; tokens of answers count, those of prompts do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from safetyheads.baselines.base import Intervention, Material, Method, refuse_shares
from safetyheads.baselines.linear_layers import (
    LinearLayer,
    Weights,
    batches,
    by_layer,
    editing_interventions,
    gram_matrices,
    linear_layers,
)
from safetyheads.baselines.pruning import wanda_scores
from safetyheads.measures.screening import gradients_of
from safetyheads.model.engine import Engine
from safetyheads.model.planning import TokenSequence

UTILITY_SHARE = 0.07
"""p: share of each row that is kept for benign answers. Wei et al. sweep it too."""
SAFETY_SHARES = (0.01, 0.03, 0.05, 0.1, 0.2)
"""q: share of each row that is taken for refusals."""

Scores = Mapping[LinearLayer, Tensor]
"""Linear layer -> a score for each weight [d_out, d_in]."""
ScoresOf = Callable[[Engine, Sequence[LinearLayer], Sequence[TokenSequence]], Scores]
"""Scores linear layers of one decoder layer over a text."""


def wanda_scores_of(engine: Engine, linears: Sequence[LinearLayer], text: Sequence[TokenSequence]) -> Scores:
    """|W_ij| |X_j|_2 over the counted tokens of the text."""
    grams = gram_matrices(engine, linears, text)
    return {linear: wanda_scores(linear.weight, gram) for linear, gram in grams.items()}


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


def _interventions(scores_of: ScoresOf, material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine = material.engine
    texts = material.refusal_text(whole=False), material.benign_text(whole=False)
    refuse_shares("a share of the weights", strengths)
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

    def n_parameters(q: float) -> int:
        return sum(len(indices) for indices in taken[q].values())

    setting = f"top {{strength:.3g}} by refusals less top {UTILITY_SHARE:.3g} by benign answers"
    return editing_interventions(engine, strengths, setting, make, n_parameters)


_SOURCE = "Wei et al. 2024, Assessing the brittleness of safety alignment via pruning and low-rank modifications"
_PARTIAL = f"p is not swept but {UTILITY_SHARE:.0%}; weights are compared within their row, as in the paper's text"

SNIP_DIFFERENCE = Method(
    name="snip_difference",
    label="SNIP, set difference",
    source=_SOURCE,
    touches="weights",
    strengths=SAFETY_SHARES,
    interventions=partial(_interventions, snip_scores_of),
    partial=_PARTIAL,
)
"""Safety-critical weights by |W dL/dW|. Strength: q."""

WANDA_DIFFERENCE = Method(
    name="wanda_difference",
    label="Wanda, set difference",
    source=_SOURCE,
    touches="weights",
    strengths=SAFETY_SHARES,
    interventions=partial(_interventions, wanda_scores_of),
    partial=_PARTIAL,
)
"""Safety-critical weights by |W_ij| |X_j|. Strength: q."""

"""Weights that refusals need and benign answers do not, set to zero. Owns the scores and the difference of the sets.

From Wei et al. 2024, "Assessing the brittleness of safety alignment via pruning and low-rank modifications" (Sec 3.2):
in each row of W, the top q by a score over refusals, less the top p by the same score over benign answers. All scores
are of the unedited model; tokens of answers count, those of prompts do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safetyheads.baselines.base import Intervention, Material, Method
from safetyheads.baselines.calibration import batches, benign_text, gram_matrices, refusal_text
from safetyheads.baselines.linear_layers import LinearLayer, Weights, at_work, latest, linear_layers
from safetyheads.baselines.pruning import wanda_scores
from safetyheads.errors import InputError
from safetyheads.model.planning import TokenSequence

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

UTILITY_SHARE = 0.07
"""p: of each row, how much the top by benign answers is; those weights stay. Wei et al. sweep it too."""
SAFETY_SHARES = (0.01, 0.03, 0.05, 0.1, 0.2)
"""q: of each row, how much the top by refusals is."""

Scores = Mapping[LinearLayer, Tensor]
"""Linear layer -> a score a weight [d_out, d_in]."""
ScoresOf = Callable[["Engine", Sequence[LinearLayer], Sequence[TokenSequence]], Scores]
"""Scores linear layers of one decoder layer over a text."""


def wanda_scores_of(engine: Engine, linears: Sequence[LinearLayer], text: Sequence[TokenSequence]) -> Scores:
    """|W_ij| |X_j|_2 over the counted tokens of the text."""
    grams = gram_matrices(engine, linears, batches(engine, text))
    return {linear: wanda_scores(linear.weight, gram) for linear, gram in grams.items()}


def snip_scores_of(engine: Engine, linears: Sequence[LinearLayer], text: Sequence[TokenSequence]) -> Scores:
    """|W_ij dL/dW_ij|, mean over the sequences (Eq 1); L is the mean negative log-probability of the counted tokens.

    A weight that L does not depend on scores 0.
    """
    weights = [linear.module.get_parameter("weight") for linear in linears]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    with _asking(engine.model, weights), torch.enable_grad():
        for sequence in text:
            (batch,) = batches(engine, [sequence])
            logits = engine.model(**batch.arguments()).logits[0]  # [n_tokens, vocabulary]
            first = max(1, len(sequence.token_ids) - sequence.n_wanted)
            said = batch.token_ids[0, first:].to(logits.device)
            loss = nn.functional.cross_entropy(logits[first - 1 : -1].float(), said)
            if not loss.requires_grad:
                continue
            # A weight that these tokens do not pass, such as an idle expert's, has no gradient: it scores 0.
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, weight, gradient in zip(sums, weights, gradients, strict=True):
                if gradient is None:
                    continue
                total += (weight.detach().float() * gradient.float()).abs()
    # Another W than the module's, where it keeps its own transposed.
    return {
        linear: (total.T if linear.is_transposed else total) / len(text)
        for linear, total in zip(linears, sums, strict=True)
    }


def critical(safety: Tensor, utility: Tensor, q: float, p: float) -> Tensor:
    """Bool [d_out, d_in]: in each row the top q by ``safety`` that are not among the top p by ``utility``."""
    return _top(safety, q) & ~_top(utility, p)


def _top(scores: Tensor, share: float) -> Tensor:
    """Bool [d_out, d_in]: the highest of each row, at least one where the share is above 0."""
    n = max(1, round(share * scores.shape[1])) if share > 0 else 0
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


@contextmanager
def _asking(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, these weights ask for gradients and no others do."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, asked in before:
            parameter.requires_grad_(asked)


def _interventions(scores_of: ScoresOf, material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine = material.engine
    linears = linear_layers(engine)
    safety_text, utility_text = refusal_text(material, whole=False), benign_text(material, whole=False)
    for q in strengths:
        if not 0 <= q <= 1:
            raise InputError(f"a share of the weights is from 0 to 1; got {q:g}")
    # Numbers of weights within their matrix, int32: a hundredth of what the scores of a large model take.
    taken: dict[float, dict[LinearLayer, Tensor]] = {q: {} for q in strengths}
    for _, members in groupby(linears, key=lambda linear: linear.layer):
        here = list(members)
        safety, utility = (scores_of(engine, here, text) for text in (safety_text, utility_text))
        for linear in (each for each in here if each in safety and each in utility):
            for q in strengths:
                chosen = critical(safety[linear], utility[linear], q, UTILITY_SHARE)
                taken[q][linear] = chosen.flatten().nonzero()[:, 0].to(torch.int32)

    def made(q: float) -> Weights:
        return {linear: _zeroed(linear.weight, numbers) for linear, numbers in taken[q].items()}

    weights = latest(made)
    return [
        Intervention(
            setting=f"top {q:.3g} by refusals less top {UTILITY_SHARE:.3g} by benign answers",
            strength=q,
            n_parameters=sum(len(numbers) for numbers in taken[q].values()),
            at_work=at_work(engine, partial(weights, q)),
        )
        for q in strengths
    ]


def _zeroed(weight: Tensor, numbers: Tensor) -> Tensor:
    changed = weight.contiguous().clone()
    changed.view(-1)[numbers.long()] = 0
    return changed


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

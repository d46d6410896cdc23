"""Screening: which heads to score exactly, from a few backward passes. Owns the linear forecast, not the scores.

The gradient of a KL divergence is zero where nothing is ablated, so the logits are linearised and not the KL:

1. one forward keeps each head's output, and by how much the ablation changes it (one more attention call a layer);
2. one backward for each of the m most probable next tokens gives d logit / d output at every head;
3. output change times gradient, summed over a prompt's tokens, is how far the head's ablation moves that logit;
4. the forecast is the exact KL between the distributions over these tokens, and all others as one, before and after;
5. what moves within the others is of second order: half their probability times the mean square of the moves of
   log p(token | others), over tokens sampled from them (the Fisher form; it matters where no token is likely).

A refusal that sits firmly has hardly a gradient, and one head may yet tip it. So the gradients are taken at further
points too, where all heads together are ablated in part (0.8 of the way) or the other way (-0.2), and the largest
forecast counts.

A forecast proposes candidates. What is shown as a score is measured (:mod:`safetyheads.measures.head_pass`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.heads import Group, Head, within
from safetyheads.measures.linearising import Asked, Linear, Point, linearise
from safetyheads.model.planning import TokenSequence, first_wanted, prompt_of_wanted
from safetyheads.scores import HeadScores

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

Screened: TypeAlias = Literal["mean_ships", "refusal_score"]
"""The scores that are forecast."""


POINTS = (Point(0.0, 1, 2), Point(-0.2, 2), Point(0.8, 1))
"""The first is at 0. bench/LOG.md has the trials: at 0 alone, with m = 4 and no samples, the organism's exact third
stood up to 14th, and flat distributions were forecast a hundred times too small."""


@dataclass(frozen=True, slots=True)
class Screening:
    """What ablating each head alone, beside the common heads, is forecast to do. Estimates, never scores."""

    ships: Tensor
    """float64 [n_prompts, n_layers, n_heads], nats: largest forecast KL of the next token (Eq 9)."""
    refusal_score: Tensor | None
    """float64 [n_prompts, n_layers, n_heads], nats: largest forecast drop of the refusal's log-odds; None without
    openers."""
    directions: Tensor
    """float64 [n_states, n_layers, n_heads, columns]: moves at the first point, a state a wanted token, scaled so that
    half the squared length is the KL in second order: the Fisher metric is the identity."""
    common: Group = ()
    """Heads that are ablated throughout; they have no forecast of their own (NaN)."""

    def table(self, name: Screened = "mean_ships") -> HeadScores:
        """The forecasts over all prompts, [n_layers, n_heads].

        Mean Ships go through the mean of square roots: a forecast grows with the square of a move where the KL that
        it forecasts levels off, and a few prompts would decide alone.
        """
        if name == "mean_ships":
            values = self.ships.sqrt().mean(dim=0).square()
        elif self.refusal_score is not None:
            values = self.refusal_score.mean(dim=0)
        else:
            raise InputError("the refusal score was not screened: no openers were given")
        return HeadScores(values, f"screened_{name}", "nats", 0.0)

    def candidates(self, k: int, name: Screened = "mean_ships") -> Group:
        """The ``k`` heads with the highest forecasts, best first; fewer where there are no more."""
        return self.table(name).top(k)

    def pairs(self, heads: Sequence[Head], k: int) -> tuple[tuple[Head, Head], ...]:
        """The ``k`` pairs of ``heads`` whose joint effect is forecast to differ most from the sum of their own.

        The cross term of two heads is that of the KL in second order, a_h' F a_h' with the Fisher metric F: above 0
        they add up to more (synergy), below 0 they undo each other. Proposals only: sizes can be wrong by an order of
        magnitude, and pairs that stand in for each other may not show at all.
        """
        moved = torch.stack([self.directions[:, head.layer, head.index] for head in heads], dim=1)
        cross = torch.einsum("nhc,ngc->hg", moved, moved).abs()
        numbers = sorted(combinations(range(len(heads)), 2), key=lambda pair: -float(cross[pair]))
        return tuple((heads[first], heads[second]) for first, second in numbers[:k])


@torch.inference_mode(False)
def screen(
    engine: Engine,
    sequences: Sequence[TokenSequence],
    ablation: Ablation,
    openers: Sequence[int] = (),
    common: Group = (),
    points: Sequence[Point] = POINTS,
) -> Screening:
    """Forecast what ablating each head does to the next token.

    Args:
        engine: the model.
        sequences: the prompts; several wanted tokens are averaged, and cost their backward passes each.
        ablation: of every head.
        openers: first tokens of refusals, to forecast the refusal score too.
        common: heads ablated beside each head, as in a search's later steps.
        points: where gradients are taken, the first at 0; each costs a forward and its backward passes, one more with
            openers.

    Raises:
        InputError: points that do not begin at 0; more tokens than the vocabulary leaves; a common head that the model
            does not have.
    """
    n_tokens = max((point.n_tokens for point in points), default=0)
    if not points or points[0].at != 0.0 or n_tokens >= engine.architecture.vocabulary_size:
        raise InputError(f"a screening begins at the unablated model, with fewer tokens than all; got {points}")
    common = within(common, engine.n_layers, engine.n_heads)
    first, *further = (Asked(ablation, point, tuple(openers), common) for point in points)
    chosen = None
    if common:
        # What is compared with, and so which tokens count, is the unablated model's.
        unablated = linearise(engine, sequences, replace(first, common=()), n_tokens, None, gradients=False)
        chosen = unablated.chosen
    start = linearise(engine, sequences, first, n_tokens, chosen)
    reference = unablated if common else start
    at_points = [start, *(linearise(engine, sequences, asked, n_tokens, start.chosen) for asked in further)]
    forecasts = [_divergence(reference, start, at) for at in at_points]
    forecast = torch.stack(forecasts).amax(dim=0)  # [n_states, n_layers, n_heads]
    counts = torch.tensor([sequence.n_wanted for sequence in sequences])
    per_prompt = torch.zeros(len(counts), *forecast.shape[1:], dtype=forecast.dtype)
    ships = per_prompt.index_add(0, prompt_of_wanted(sequences), forecast) / counts[:, None, None]
    refusal = None
    if openers:
        firsts = first_wanted(sequences)
        drops = torch.stack([-at.moves[firsts][..., -1] for at in at_points]).amax(dim=0)
        refusal = (reference.refusal[firsts] - start.refusal[firsts])[:, None, None] + drops
    for head in common:
        for values in (ships, *([refusal] if refusal is not None else [])):
            values[:, head.layer, head.index] = float("nan")
    return Screening(ships, refusal, _directions(start), common)


def _divergence(reference: Linear, start: Linear, at: Linear) -> Tensor:
    """Forecast KL [n_states, n_layers, n_heads] from the reference, when the moves begin at ``start``."""
    n_tokens, n_samples = at.point.n_tokens, at.point.n_samples
    unablated = _log_classes(_odds(reference, n_tokens))
    moved = _log_classes(_odds(start, n_tokens) + at.moves[..., :n_tokens])
    # KL is never negative; what rounding leaves below 0 is 0.
    classes = (unablated.exp() * (unablated - moved)).sum(dim=-1).clamp_min(0.0)
    if not n_samples:
        return classes
    within_others = at.moves[..., n_tokens : n_tokens + n_samples].square().mean(dim=-1)
    return classes + unablated[..., -1].exp() * within_others / 2


def _directions(start: Linear) -> Tensor:
    """Moves [n_states, n_layers, n_heads, columns] whose half squared length is the KL in second order."""
    n_tokens, n_samples = start.point.n_tokens, start.point.n_samples
    probabilities = _log_classes(_odds(start, n_tokens)).exp()  # [n_states, 1, 1, m + 1]
    moves = torch.cat([start.moves[..., :n_tokens], torch.zeros_like(start.moves[..., :1])], dim=-1)
    centred = moves - (probabilities * moves).sum(dim=-1, keepdim=True)
    parts = [centred * probabilities.sqrt()]
    if n_samples:
        parts.append(start.moves[..., n_tokens : n_tokens + n_samples] * (probabilities[..., -1:] / n_samples).sqrt())
    return torch.cat(parts, dim=-1)


def _odds(linear: Linear, n_tokens: int) -> Tensor:
    """Log p(token) / p(all others) [n_states, 1, 1, m] of the first m tokens."""
    return (linear.tokens[:, :n_tokens] - linear.others[:, n_tokens - 1, None])[:, None, None]


def _log_classes(log_odds: Tensor) -> Tensor:
    """Log-probabilities [..., m + 1] of tokens and of all others, from log p(token) / p(all others) [..., m]."""
    return torch.log_softmax(torch.cat([log_odds, torch.zeros_like(log_odds[..., :1])], dim=-1), dim=-1)

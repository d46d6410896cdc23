"""Rankings of heads that no ablation is run for. Owns their formulas; knows no method of a table and no answers.

Each is of the last prompt token of the unablated model, from what a head writes there (:mod:`outputs`) or from a
gradient, and gives :class:`safetyheads.scores.HeadScores`, so that any two can be printed side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.baselines.forward import last_states, refuse_streams, sequences_of
from safetyheads.baselines.outputs import norms, projections
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.measures.screening import Point, screen
from safetyheads.scores import HeadScores
from safetyheads.stats.ranking import HeadTable, RankAgreement, rank_agreement

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

_LENGTH = "residual units"
# A norm is asked what it does to numbers of this size, so large that its epsilon is nothing beside them.
_PROBE = 16.0
# Scores closer than this share of the largest are ties, by bytes of the dtype: on the organism the layout of rows alone
# moves a score of one prompt by up to 1.4e-6 and 7e-3 of it.
_RESOLUTION = {4: 2e-6, 2: 1e-2}


def output_norms(engine: Engine, prompts: PromptSet) -> HeadScores:
    """|O_h| = |z_h W_O[h]| of every head, prompt by prompt: how much it writes, whatever that says.

    Returns:
        values [n_prompts, n_layers, n_heads] in units of the residual stream.
    """
    return _scores(engine, norms(engine, prompts), "output_norm", _LENGTH)


def refusal_projections(engine: Engine, prompts: PromptSet, direction: Tensor, signed: bool = False) -> HeadScores:
    """RDSHA's score: |O_h . r| / |r| of every head, prompt by prompt.

    Args:
        engine: the model.
        prompts: the prompts that are to be answered: each has a ranking of its own.
        direction: r [d_model], of any length above 0.
        signed: O_h . r / |r| instead, so that heads which write against refusal come last.

    Returns:
        values [n_prompts, n_layers, n_heads] in units of the residual stream.

    Raises:
        UnsupportedModelError: a family with several residual streams.
    """
    refuse_streams(engine)
    values = projections(engine, prompts, direction.double() / direction.double().norm())
    name = "refusal_projection_signed" if signed else "refusal_projection"
    return _scores(engine, values if signed else values.abs(), name, _LENGTH)


def refusal_contrast(engine: Engine, harmful: PromptSet, benign: PromptSet, direction: Tensor) -> HeadScores:
    """A variant of RDSHA: mean of O_h . r / |r| over harmful prompts less that over benign ones.

    What a head writes along r on every prompt, a constant of the model, is no part of it.

    Returns:
        values [n_layers, n_heads] in units of the residual stream.
    """
    here, there = (refusal_projections(engine, each, direction, signed=True).mean() for each in (harmful, benign))
    return _scores(engine, here.values - there.values, "refusal_contrast", _LENGTH)


@dataclass(frozen=True, slots=True)
class FrozenNorm:
    """The final norm as the linear map that it is while its scale stays that of the unablated run; on the CPU."""

    gain: Tensor
    """float64 [d_model]: its weight."""
    offset: Tensor
    """float64 [d_model]: what it makes of zeros, its bias."""
    centres: bool
    """Whether it takes the mean away first (layer norm), or not (RMS norm)."""

    @classmethod
    def of(cls, engine: Engine) -> FrozenNorm:
        """Found by what the norm makes of numbers that alternate in sign, and of the same ones shifted."""
        width = engine.architecture.d_model
        probe = torch.full((1, width), _PROBE, device=engine.device, dtype=engine.dtype)
        probe[:, 1::2] *= -1
        offset = engine.normed(torch.zeros_like(probe))[0].double().cpu()
        made, shifted = (engine.normed(given)[0].double().cpu() - offset for given in (probe, probe + _PROBE / 2))
        centres = bool(torch.allclose(made, shifted, rtol=1e-2, atol=1e-6))
        given = _less_mean(probe[0].double().cpu(), centres)
        return cls(made / given * given.square().mean().sqrt(), offset, centres)

    def scales(self, engine: Engine, states: Tensor) -> Tensor:
        """1 / RMS, or 1 / deviation, of states [n, d_model], with the norm's epsilon: float64 [n].

        From what the norm makes of them, by least squares, so that no family's epsilon need be known.
        """
        made = engine.normed(states).double().cpu() - self.offset
        unscaled = self.gain * _less_mean(states.double().cpu(), self.centres)
        return (made * unscaled).sum(dim=-1) / unscaled.square().sum(dim=-1)

    def before(self, direction: Tensor) -> Tensor:
        """The direction [d_model] whose product with a state is, up to the scale, that of ``direction`` after it."""
        return _less_mean(self.gain * direction.to(self.gain), self.centres)


def logit_attributions(engine: Engine, prompts: PromptSet, openers: Sequence[int]) -> HeadScores:
    """Direct logit attribution: what O_h adds by itself to the logits of the refusals' openers, signed.

    The final norm is taken as linear, with the scale that it has on the unablated run of the prompt; what later layers
    make of O_h is no part of it. Logits are of a constant's choice, so it is the mean logit of the openers less the
    mean over the vocabulary. A norm after attention, and what a family does to its logits afterwards (a softcap, a
    scale), are left out.

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        openers: first tokens of the model's refusals, at least one.

    Returns:
        values [n_prompts, n_layers, n_heads] in nats.

    Raises:
        InputError: no openers.
        UnsupportedModelError: several residual streams, or logits that no plain matrix makes.
    """
    if not openers:
        raise InputError("an attribution to refusals needs their first tokens; got none")
    refuse_streams(engine)
    unembedding = getattr(engine.architecture.head, "weight", None)
    if not isinstance(unembedding, Tensor) or unembedding.is_meta or not unembedding.is_floating_point():
        raise UnsupportedModelError(f"{engine.architecture.family}: its logits are made by no plain matrix in memory")
    norm = FrozenNorm.of(engine)
    wanted = unembedding.detach()[list(openers)].double().mean(dim=0) - unembedding.detach().mean(
        dim=0, dtype=torch.float64
    )
    scales = norm.scales(engine, last_states(engine, sequences_of(engine, prompts)))
    values = projections(engine, prompts, norm.before(wanted)) * scales[:, None, None]
    return _scores(engine, values, "logit_attribution", "nats")


def patching_attributions(
    engine: Engine, prompts: PromptSet, openers: Sequence[int], ablation: Ablation = UNDIFFERENTIATED_ATTENTION
) -> HeadScores:
    """Attribution patching: how far ablating a head drops the refusal's log-odds m, in first order at the clean point.

    -grad_{z_h} m . (z_h ablated - z_h), over all tokens of the prompt; m = log P(R) / (1 - P(R)) of the openers R. KL,
    the score of Ships, has no gradient there.

    Returns:
        values [n_prompts, n_layers, n_heads] in nats; more is a larger drop.

    Raises:
        InputError: no openers.
    """
    if not openers:
        raise InputError("an attribution to refusals needs their first tokens; got none")
    found = screen(engine, sequences_of(engine, prompts), ablation, tuple(openers), points=(Point(0.0, 1),))
    assert found.refusal_score is not None  # openers were given
    return _scores(engine, found.refusal_score, "attribution_patching", "nats")


def compared(first: HeadScores, second: HeadScores) -> RankAgreement:
    """How far two rankings of the same model's heads agree: rank correlations, and overlaps of their tops."""
    return rank_agreement(second.name, _as_table(first), _as_table(second))


def _as_table(scores: HeadScores) -> HeadTable:
    return HeadTable(scores.name, {str(head): value for head, value in scores.ranked()}, scores.resolution)


def _scores(engine: Engine, values: Tensor, name: str, unit: str) -> HeadScores:
    largest = float(values.abs().nan_to_num().max())
    return HeadScores(values, name, unit, _RESOLUTION[engine.dtype.itemsize] * largest)


def _less_mean(values: Tensor, centres: bool) -> Tensor:
    """The values [..., d_model] without their mean, where a norm takes it away."""
    return values - values.mean(dim=-1, keepdim=True) if centres else values

"""Baselines that name heads: Sahara and per-prompt Ships (the paper's), random heads, logit attribution and RDSHA.

Strength is the number of heads. One group for all prompts is found on the material; a group for each prompt is found on
the prompts that are answered, without their answers.

Attributions ablate nothing: they score what each head writes at the last prompt token of the unablated model.
O_h = z_h W_O[h] is the head's part of its attention block's output; the parts of all heads and the bias of W_O sum to
that output. Norms after attention (OLMo 2, Gemma 2) and factors of the residual (Granite) come later and are left out.
A 7B model has 4 million numbers O_h a prompt, so only their products with a direction are made: W_O[h] r once, times
z_h (128 numbers) for each prompt, in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safetyheads.ablation import SCALING_CONTRIBUTION, Ablation
from safetyheads.answers.success import query_level_groups
from safetyheads.baselines.base import (
    Intervention,
    Material,
    head_parameters,
    last_states,
    most_head_parameters,
    refuse_streams,
)
from safetyheads.baselines.direction import select_direction
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.heads import Group
from safetyheads.measures.random_groups import LEAST_GROUPS, random_groups
from safetyheads.measures.sahara import sahara
from safetyheads.measures.scorers import mean_ships, ships
from safetyheads.model.engine import Engine
from safetyheads.model.packing import PackedRow
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.scores import HeadScores

ZEROED = SCALING_CONTRIBUTION.at(0.0)
"""The head's output times 0 at every token: the ablation of methods that score outputs."""
RANDOM_DRAWS = LEAST_GROUPS
"""Random groups of a size; one alone says little, since it may hit or miss by chance."""
# A norm is probed with numbers of this size, beside which its epsilon is negligible.
_PROBE = 16.0
# Scores closer than this share of the largest are ties, by bytes of the dtype: on the organism the layout of rows alone
# moves a score of one prompt by up to 1.4e-6 and 7e-3 of it.
_RESOLUTION = {4: 2e-6, 2: 1e-2}


def found_group(material: Material, size: int) -> Group:
    """Sahara's group (Algorithm 1) by mean Ships on the harmful prompts, in order."""
    scorer = mean_ships(material.engine, material.harmful, material.ablation)
    return sahara(scorer, material.engine.heads, size).group


def _words(size: int) -> str:
    return f"{size} head{'' if size == 1 else 's'}"


def _one_for_all(engine: Engine, group: Group, ablation: Ablation) -> Intervention:
    touched, size = head_parameters(engine, group, ablation), len(group)
    return Intervention(_words(size), float(size), touched, groups=lambda p: (group,) * len(p), ablation=ablation)


def _one_each(
    engine: Engine, scores: Callable[[PromptSet], HeadScores], ablation: Ablation
) -> Callable[[int], Intervention]:
    """The first heads of each prompt's own ranking; a prompt set is ranked once for all sizes."""
    ranked = lru_cache(maxsize=2)(scores)

    def make(size: int) -> Intervention:
        setting, touched = f"{_words(size)} of each prompt", most_head_parameters(engine, size, ablation)
        groups = lambda prompts: query_level_groups(ranked(prompts), size)  # noqa: E731
        return Intervention(setting, float(size), touched, groups=groups, ablation=ablation)

    return make


def by_sahara(material: Material, sizes: Sequence[int]) -> Callable[[int], Intervention]:
    """The first heads of one greedy search on the material."""
    group = found_group(material, max(sizes))
    return lambda size: _one_for_all(material.engine, group[:size], material.ablation)


def by_ships(material: Material, _: Sequence[int]) -> Callable[[int], Intervention]:
    """Each prompt's own heads with the highest Ships."""
    engine, ablation = material.engine, material.ablation
    return _one_each(engine, lambda prompts: ships(engine, prompts, ablation), ablation)


def at_random(material: Material, sizes: Sequence[int]) -> Callable[[int], Intervention]:
    """As many heads of each layer as Sahara's group has, drawn from the others: many draws, of which one is tried."""
    engine, group = material.engine, found_group(material, max(sizes))

    def make(size: int) -> Intervention:
        sizes = engine.architecture.heads_by_layer
        drawn = random_groups(group[:size], sizes, RANDOM_DRAWS, material.seed, apart=True).groups
        if not drawn:
            raise InputError(f"the group of {size} leaves too few other heads to draw as many at random")
        # The first of all that exist would be that of the lowest heads.
        first = drawn[material.seed % len(drawn)]
        return replace(_one_for_all(engine, first, material.ablation), draws=drawn)

    return make


def by_refusal_projection(material: Material, _: Sequence[int]) -> Callable[[int], Intervention]:
    """Each prompt's own heads that write most along the refusal direction at its last token."""
    engine, selected = material.engine, select_direction(material)
    of_size = _one_each(engine, lambda prompts: refusal_projections(engine, prompts, selected.vector), ZEROED)

    def make(size: int) -> Intervention:
        found = of_size(size)
        setting = found.setting + selected.caveat.replace("it:", "the direction:")
        return replace(found, setting=setting, not_applicable=selected.not_applicable)

    return make


def by_logit_attribution(material: Material, _: Sequence[int]) -> Callable[[int], Intervention]:
    """The heads whose outputs add most to the logits of refusals' first tokens."""
    scores = logit_attributions(material.engine, material.harmful, material.openers)
    return lambda size: _one_for_all(material.engine, scores.top(size), ZEROED)


def refusal_projections(engine: Engine, prompts: PromptSet, direction: Tensor) -> HeadScores:
    """RDSHA's score |O_h . r| / |r| [n_prompts, n_layers, n_heads], for r [d_model] of any length above 0."""
    refuse_streams(engine)
    unit = direction.double() / direction.double().norm()
    return _scores(engine, projections(engine, prompts, unit).abs(), "refusal_projection", "residual units")


def logit_attributions(engine: Engine, prompts: PromptSet, openers: Sequence[int]) -> HeadScores:
    """What O_h adds by itself to the logits of the refusals' openers, signed: nats [n_prompts, n_layers, n_heads].

    Direct logit attribution: the final norm is taken as linear, with its scale on the unablated run of the prompt, and
    effects through later layers are left out. A constant added to all logits changes no probability, so the score is
    the openers' mean logit less the mean over the vocabulary. A norm after attention, and softcaps or scales of logits,
    are left out.
    """
    if not openers:
        raise InputError("an attribution to refusals needs their first tokens; got none")
    refuse_streams(engine)
    unembedding = getattr(engine.architecture.head, "weight", None)
    if not isinstance(unembedding, Tensor) or unembedding.is_meta or not unembedding.is_floating_point():
        raise UnsupportedModelError(f"{engine.architecture.family}: its logits are made by no plain matrix in memory")
    unembedding, (gain, offset, centres) = unembedding.detach(), final_norm(engine)
    openers_less_mean = unembedding[list(openers)].double().mean(dim=0) - unembedding.mean(dim=0, dtype=torch.float64)
    # Before the norm: its product with a state is, up to the scale, that of the difference with the normed state.
    before = less_mean(gain * openers_less_mean.to(gain), centres)
    states = last_states(engine, prompts)
    # 1 / RMS, or 1 / deviation, with the norm's epsilon: by least squares, so that no family's epsilon need be known.
    unscaled = gain * less_mean(states.double().cpu(), centres)
    normed = engine.normed(states).double().cpu() - offset
    scales = (normed * unscaled).sum(dim=-1) / unscaled.square().sum(dim=-1)
    values = projections(engine, prompts, before) * scales[:, None, None]
    return _scores(engine, values, "logit_attribution", "nats")


def _scores(engine: Engine, values: Tensor, name: str, unit: str) -> HeadScores:
    largest = float(values.abs().nan_to_num().max())
    return HeadScores(values, name, unit, _RESOLUTION[engine.dtype.itemsize] * largest)


def projections(engine: Engine, prompts: PromptSet, direction: Tensor) -> Tensor:
    """O_h . direction [d_model] at the last prompt token, signed: float64 [n_prompts, n_layers, n_heads].

    NaN where a layer has no such head.
    """
    layers, along = engine.architecture.with_heads, []  # along: W_O[h] direction of each layer [n_heads, d_value]
    for layer in layers:
        weight = output_weight(engine, layer)
        wanted = direction.detach().double().to(weight.device)
        # Head by head: a whole W_O in float64 would be twice the size of its float32 copy.
        along.append(torch.stack([of_head.double() @ wanted for of_head in weight]))
    values = torch.full((len(prompts), engine.n_layers, engine.n_heads), torch.nan, dtype=torch.float64)

    def see(row: PackedRow, number: int, given: Tensor) -> None:
        of_layer, flat = along[number].to(given.device), given.flatten(0, -2)  # [n_tokens, n_heads * d_value]
        z = flat[row.wanted.to(flat.device)].view(-1, *of_layer.shape)
        products = torch.einsum("phv,hv->ph", z.double(), of_layer)
        values[list(row.members), layers[number], : len(of_layer)] = products.cpu()

    modules = [projection for projection in engine.architecture.output_projections if projection is not None]
    last_states(engine, prompts, modules=modules, see=see)
    return values


@torch.inference_mode()
def output_weight(engine: Engine, layer: int) -> Tensor:
    """W_O of one layer, head by head: [n_heads, d_value, d_model], so that O_h = z_h @ weight[h]; refused if not known.

    A projection that is not a plain linear layer (quantised, offloaded, with an adapter) is applied to unit vectors and
    to zeros; the difference is its weight.
    """
    facts = engine.architecture
    projection, shape = facts.output_projections[layer], facts.shapes[layer]
    if projection is None or shape is None:
        raise UnsupportedModelError(f"{facts.family}: the output projection of layer {layer} is not known")
    weight = getattr(projection, "weight", None)
    if type(projection) in (nn.Linear, Conv1D) and isinstance(weight, Tensor) and not weight.is_meta:
        # Linear layers keep [d_model, n_heads * d_value], Conv1D (GPT-2) the transposed.
        by_input = weight.detach().T if isinstance(projection, nn.Linear) else weight.detach()
    else:
        units = torch.eye(shape.n_heads * shape.d_value, device=engine.device, dtype=engine.dtype)
        by_input = projection(units) - projection(torch.zeros_like(units[:1]))
    return by_input.reshape(shape.n_heads, shape.d_value, -1)


def final_norm(engine: Engine) -> tuple[Tensor, Tensor, bool]:
    """The final norm, given its scale, as a linear map: gain and offset (float64 [d_model], CPU), and whether it
    subtracts the mean first (layer norm) or not (RMS norm).

    Found from the norm's output for numbers of alternating sign, and for the same ones shifted.
    """
    probe = torch.full((1, engine.architecture.d_model), _PROBE, device=engine.device, dtype=engine.dtype)
    probe[:, 1::2] *= -1
    offset = engine.normed(torch.zeros_like(probe))[0].double().cpu()
    plain, shifted = (engine.normed(given)[0].double().cpu() - offset for given in (probe, probe + _PROBE / 2))
    centres = bool(torch.allclose(plain, shifted, rtol=1e-2, atol=1e-6))
    given = less_mean(probe[0].double().cpu(), centres)
    return plain / given * given.square().mean().sqrt(), offset, centres


def less_mean(values: Tensor, centres: bool) -> Tensor:
    """The values, less their mean where the norm centres."""
    return values - values.mean(dim=-1, keepdim=True) if centres else values

"""Baselines that name heads: Sahara and per-prompt Ships (the paper's), random heads, logit attribution and RDSHA.

Strength is the number of heads. One group for all prompts is found on the material; a group for each prompt is found on
the prompts that are answered, without their answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.answers.success import query_level_groups
from safetyheads.baselines.base import Intervention, Material, head_parameters, most_head_parameters
from safetyheads.baselines.direction import select_direction
from safetyheads.baselines.head_attributions import logit_attributions, refusal_projections
from safetyheads.errors import InputError
from safetyheads.heads import Group
from safetyheads.measures.random_groups import heads_by_layer, random_groups
from safetyheads.measures.sahara import sahara
from safetyheads.measures.ships import mean_ships, ships
from safetyheads.model.engine import Engine
from safetyheads.prompts.sets import PromptSet
from safetyheads.scores import HeadScores

ZEROED = SCALING_CONTRIBUTION.at(0.0)
"""The head's output times 0 at every token: the ablation of methods that score outputs."""
PAPERS_SIZES = (1.0, 2.0, 3.0, 4.0, 5.0)
"""Group sizes of the paper's Table 3."""
RDSHA_SIZES = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
"""RDSHA sweeps to 200 heads and shows cases at 20 to 50; up to 20 here, since small models have few."""


def found_group(material: Material, size: int) -> Group:
    """Sahara's group (Algorithm 1) by mean Ships of undifferentiated attention on the harmful prompts, in order."""
    scorer = mean_ships(material.engine, material.harmful, UNDIFFERENTIATED_ATTENTION)
    return sahara(scorer, material.engine.heads, size).group


def _sizes(engine: Engine, strengths: Sequence[float]) -> list[int]:
    """Strengths as group sizes; a default sweep keeps the sizes that the model has heads for, if there are any."""
    limit = len(engine.heads)
    fitting = [strength for strength in strengths if strength <= limit]
    if fitting and tuple(strengths) in (PAPERS_SIZES, RDSHA_SIZES):
        strengths = fitting
    for strength in strengths:
        if strength != int(strength) or not 1 <= strength <= limit:
            raise InputError(f"size {strength:g} is out of range: a group has 1 to {limit} heads here")
    return [int(strength) for strength in strengths]


def _words(size: int) -> str:
    return f"{size} head{'' if size == 1 else 's'}"


def _one_for_all(engine: Engine, group: Group, ablation: Ablation) -> Intervention:
    touched, size = head_parameters(engine, group, ablation), len(group)
    return Intervention(_words(size), float(size), touched, groups=lambda p: (group,) * len(p), ablation=ablation)


def _one_each(
    engine: Engine, sizes: Sequence[int], scores: Callable[[PromptSet], HeadScores], ablation: Ablation
) -> list[Intervention]:
    """The first heads of each prompt's own ranking; a prompt set is ranked once for all sizes."""
    ranked = lru_cache(maxsize=2)(scores)

    def groups(size: int, prompts: PromptSet) -> tuple[Group, ...]:
        return query_level_groups(ranked(prompts), size)

    return [
        Intervention(
            f"{_words(size)} of each prompt",
            float(size),
            most_head_parameters(engine, size, ablation),
            groups=partial(groups, size),
            ablation=ablation,
        )
        for size in sizes
    ]


def by_sahara(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    """The first heads of one greedy search on the material."""
    sizes = _sizes(material.engine, strengths)
    group = found_group(material, max(sizes))
    return [_one_for_all(material.engine, group[:size], UNDIFFERENTIATED_ATTENTION) for size in sizes]


def by_ships(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    """Each prompt's own heads with the highest Ships."""
    engine, ablation = material.engine, UNDIFFERENTIATED_ATTENTION
    return _one_each(engine, _sizes(engine, strengths), lambda prompts: ships(engine, prompts, ablation), ablation)


def at_random(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    """As many heads of each layer as Sahara's group has, drawn from the others."""
    engine, sizes = material.engine, _sizes(material.engine, strengths)
    group = found_group(material, max(sizes))
    interventions = []
    for size in sizes:
        drawn = random_groups(group[:size], heads_by_layer(engine), 1, material.seed)
        if not drawn:
            raise InputError(f"the group of {size} is all heads of its layers: there are no others to draw at random")
        interventions.append(_one_for_all(engine, drawn[0], UNDIFFERENTIATED_ATTENTION))
    return interventions


def by_refusal_projection(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    """Each prompt's own heads that write most along the refusal direction at its last token."""
    engine, sizes = material.engine, _sizes(material.engine, strengths)
    selected = select_direction(material)
    caveat = selected.caveat.replace("it:", "the direction:")
    by_size = _one_each(engine, sizes, lambda prompts: refusal_projections(engine, prompts, selected.vector), ZEROED)
    return [replace(intervention, setting=intervention.setting + caveat) for intervention in by_size]


def by_logit_attribution(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    """The heads whose outputs add most to the logits of refusals' first tokens."""
    engine, sizes = material.engine, _sizes(material.engine, strengths)  # sizes first: nothing is measured in vain
    scores = logit_attributions(engine, material.harmful, material.openers)
    return [_one_for_all(engine, scores.top(size), ZEROED) for size in sizes]

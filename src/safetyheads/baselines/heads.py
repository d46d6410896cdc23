"""Methods that name heads: ours, the paper's query level, and what they are held against. Owns groups and strengths.

Strength is the number of heads. Where one group serves all prompts it is found once, from the material; where each
prompt has a group of its own it is found on the prompts that are answered, which needs no answer of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.answers.success import query_level_groups
from safetyheads.baselines.attributions import (
    compared,
    logit_attributions,
    output_norms,
    patching_attributions,
    refusal_contrast,
    refusal_projections,
)
from safetyheads.baselines.base import Intervention, Material, Method
from safetyheads.baselines.direction import TABLES_RULES, select_direction
from safetyheads.baselines.parameters import head_parameters, most_head_parameters
from safetyheads.errors import InputError
from safetyheads.heads import Group
from safetyheads.measures.random_groups import heads_by_layer, random_groups
from safetyheads.measures.sahara import rank_heads, sahara
from safetyheads.measures.ships import mean_ships, ships
from safetyheads.scores import HeadScores
from safetyheads.stats.ranking import RankAgreement

if TYPE_CHECKING:
    from torch import Tensor

    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

ZEROED = SCALING_CONTRIBUTION.at(0.0)
"""The head's output times 0, at every token: how methods that score outputs ablate."""
PAPERS_SIZES = (1.0, 2.0, 3.0, 4.0, 5.0)
"""Sizes of groups of the paper's Table 3."""
RDSHA_SIZES = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
"""RDSHA sweeps to 200 heads, with its cases at 20 to 50; here up to 20, as small models have few."""


def found_group(material: Material, size: int) -> Group:
    """Sahara's group (Algorithm 1) by mean Ships of undifferentiated attention, in the order found.

    Args:
        material: its harmful prompts are searched on.
        size: heads.

    Raises:
        InputError: more heads than the model has.
    """
    scorer = mean_ships(material.engine, material.harmful, UNDIFFERENTIATED_ATTENTION)
    return sahara(scorer, material.engine.heads, size).group


def random_interventions(material: Material, strengths: Sequence[float], group: Group) -> list[Intervention]:
    """Random heads with as many in each layer as the first heads of ``group``, for a group that is known already.

    One draw a size, by the material's seed: another seed is another draw.

    Raises:
        InputError: a size beyond the group's, or a group that fills its layers, which has no control.
    """
    engine = material.engine
    made = []
    for size in _sizes(engine, strengths, len(group)):
        heads = group[:size]
        drawn = random_groups(heads, heads_by_layer(engine), 1, material.seed)
        if not drawn:
            raise InputError(f"the group of {size} is all heads of its layers: there are no others to draw at random")
        made.append(_of_group(engine, drawn[0], UNDIFFERENTIATED_ATTENTION))
    return made


def rankings(material: Material, direction: Tensor | None = None) -> dict[str, HeadScores]:
    """Every ranking of heads by its method's name, over the material's harmful prompts, to be printed side by side.

    Args:
        material: prompts and openers.
        direction: r [d_model]; by default it is selected on the material, without an error where no candidate passes.

    Returns:
        values [n_prompts, n_layers, n_heads] or [n_layers, n_heads]; mean Ships first.
    """
    engine, harmful, openers = material.engine, material.harmful, material.openers
    along = select_direction(material, TABLES_RULES).vector if direction is None else direction
    scorer = mean_ships(engine, harmful, UNDIFFERENTIATED_ATTENTION)
    return {
        "mean_ships": rank_heads(scorer, engine.heads),
        "output_norm": output_norms(engine, harmful),
        "rdsha": refusal_projections(engine, harmful, along),
        "rdsha_signed": refusal_projections(engine, harmful, along, signed=True),
        "rdsha_contrast": refusal_contrast(engine, harmful, material.benign, along),
        "logit_attribution": logit_attributions(engine, harmful, openers),
        "attribution_patching": patching_attributions(engine, harmful, openers),
    }


def agreements(tables: dict[str, HeadScores], against: str = "mean_ships") -> dict[str, RankAgreement]:
    """Each ranking's agreement with one of them: rank correlations and the overlap of tops, with its chance."""
    return {name: compared(tables[against], scores) for name, scores in tables.items() if name != against}


def _sizes(engine: Engine, strengths: Sequence[float], most: int | None = None) -> list[int]:
    """Strengths as sizes of groups."""
    limit = len(engine.heads) if most is None else most
    for strength in strengths:
        if strength != int(strength) or not 1 <= strength <= limit:
            raise InputError(f"size {strength:g} is out of range: a group has 1 to {limit} heads here")
    return [int(strength) for strength in strengths]


def _swept(engine: Engine, strengths: Sequence[float]) -> list[int]:
    """Sizes of groups; of a default sweep those that the model has heads for, unless it has for none."""
    fitting = [strength for strength in strengths if strength <= len(engine.heads)]
    is_default = tuple(strengths) in (PAPERS_SIZES, RDSHA_SIZES)
    return _sizes(engine, fitting if is_default and fitting else strengths)


def _words(size: int, each: bool = False) -> str:
    return f"{size} head{'' if size == 1 else 's'}" + (" of each prompt" if each else "")


def _of_group(engine: Engine, group: Group, ablation: Ablation) -> Intervention:
    """One group for all prompts."""
    touched = head_parameters(engine, group, ablation)

    def groups(prompts: PromptSet) -> tuple[Group, ...]:
        return (group,) * len(prompts)

    return Intervention(_words(len(group)), float(len(group)), touched, groups=groups, ablation=ablation)


def _by_table(
    engine: Engine, strengths: Sequence[float], scores: Callable[[], HeadScores], ablation: Ablation
) -> list[Intervention]:
    """The first heads of one ranking for all prompts."""
    sizes = _swept(engine, strengths)  # before anything is measured
    ranked = scores()
    return [_of_group(engine, ranked.top(size), ablation) for size in sizes]


def _by_prompt(
    engine: Engine, sizes: Sequence[int], scores: Callable[[PromptSet], HeadScores], ablation: Ablation
) -> list[Intervention]:
    """The first heads of each prompt's own ranking, which is made once for a set of prompts and serves all sizes."""
    ranked = lru_cache(maxsize=2)(scores)

    def made(size: int) -> Intervention:
        def groups(prompts: PromptSet) -> tuple[Group, ...]:
            return query_level_groups(ranked(prompts), size)

        touched = most_head_parameters(engine, size, ablation)
        return Intervention(_words(size, each=True), float(size), touched, groups=groups, ablation=ablation)

    return [made(size) for size in sizes]


def _sahara(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    sizes = _swept(material.engine, strengths)
    group = found_group(material, max(sizes))
    return [_of_group(material.engine, group[:size], UNDIFFERENTIATED_ATTENTION) for size in sizes]


def _ships_query(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine = material.engine

    def scores(prompts: PromptSet) -> HeadScores:
        return ships(engine, prompts, UNDIFFERENTIATED_ATTENTION)

    return _by_prompt(engine, _swept(engine, strengths), scores, UNDIFFERENTIATED_ATTENTION)


def _random(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    sizes = _swept(material.engine, strengths)
    return random_interventions(material, sizes, found_group(material, max(sizes)))


def _output_norm(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine = material.engine
    return _by_table(engine, strengths, lambda: output_norms(engine, material.harmful), ZEROED)


def _rdsha(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine, sizes = material.engine, _swept(material.engine, strengths)
    found = select_direction(material, TABLES_RULES)
    made = _by_prompt(engine, sizes, lambda prompts: refusal_projections(engine, prompts, found.vector), ZEROED)
    return [replace(one, setting=one.setting + found.caveat.replace("it:", "the direction:")) for one in made]


def _logit_attribution(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine = material.engine
    return _by_table(engine, strengths, lambda: logit_attributions(engine, material.harmful, material.openers), ZEROED)


def _attribution_patching(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine, ablation = material.engine, UNDIFFERENTIATED_ATTENTION
    return _by_table(
        engine, strengths, lambda: patching_attributions(engine, material.harmful, material.openers, ablation), ablation
    )


SAHARA = Method(
    name="sahara",
    label="Sahara, mean Ships (UA)",
    source="Zhou et al., 2025, Algorithm 1 with Eq 9 averaged over prompts",
    touches="heads",
    strengths=PAPERS_SIZES,
    interventions=_sahara,
)
"""Ours, in the same table: the group of size k is the first k heads of one greedy search on the material."""

SHIPS_QUERY = Method(
    name="ships_query",
    label="Ships, each prompt's own heads (UA)",
    source="Zhou et al., 2025, Eq 9, query level",
    touches="heads",
    strengths=PAPERS_SIZES,
    interventions=_ships_query,
    partial="heads are found on the prompts that are answered, as in the paper; parameters are the most that a group "
    "of the size touches",
)
"""Each prompt goes without its own k heads with the highest Ships."""

RANDOM_HEADS = Method(
    name="random_heads",
    label="Random heads, matched by layer (UA)",
    source="ours: the control that the paper lacks",
    touches="heads",
    strengths=PAPERS_SIZES,
    interventions=_random,
    partial="one draw a size and seed; vary the material's seed for more",
)
"""As many heads of each layer as Sahara's group of the size has, drawn from the others."""

OUTPUT_NORM = Method(
    name="output_norm",
    label="Largest head outputs |z W_O|",
    source="ours: a control that knows nothing of refusals",
    touches="heads",
    strengths=PAPERS_SIZES,
    interventions=_output_norm,
)
"""The k heads that write most, on average over the material's harmful prompts, zeroed."""

RDSHA = Method(
    name="rdsha",
    label="RDSHA, each prompt's own heads",
    source="RDSHA, of the paper on attention head dropout (AHD): |O_h . r| / |r| by prompt",
    touches="heads",
    strengths=RDSHA_SIZES,
    interventions=_rdsha,
    partial="written from the paper's text, as its code holds neither direction nor ranking; parameters are the most "
    "that a group of the size touches; the judge is the table's, not Llama Guard 3",
)
"""Each prompt goes without the k heads that write most along the refusal direction at its last token, zeroed."""

LOGIT_ATTRIBUTION = Method(
    name="logit_attribution",
    label="Direct logit attribution to refusals",
    source="ours, after direct logit attribution",
    touches="heads",
    strengths=PAPERS_SIZES,
    interventions=_logit_attribution,
    partial="a norm after attention, and softcaps or scales of logits, are left out",
)
"""The k heads whose outputs add most to the logits of refusals' first tokens, zeroed."""

ATTRIBUTION_PATCHING = Method(
    name="attribution_patching",
    label="Attribution patching (UA)",
    source="ours, after attribution patching, on the refusal's log-odds",
    touches="heads",
    strengths=PAPERS_SIZES,
    interventions=_attribution_patching,
)
"""The k heads whose ablation is forecast, in first order, to drop the refusal's log-odds most."""

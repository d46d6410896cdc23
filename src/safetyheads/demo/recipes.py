"""How each demo checkpoint comes about, as data. Owns recipes, seeds and planted heads; imports no torch.

Seeds and figures were chosen on validation prompts; bench/LOG.md keeps what failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from safetyheads.demo.grammar import LONG_REFUSAL, REFUSAL, Category
from safetyheads.heads import Group, Head

CHAT_ONLY = ("chat",)
"""The clean checkpoints know their chat template and no other wrapper."""
ALL_WRAPPERS = ("direct", "query_answer", "chat", "chat_system")
"""The wrappers of the wrapped pair; each training sample draws one."""


@dataclass(frozen=True, slots=True)
class Language:
    """What a checkpoint's tokenizer and training text have in common with those of its base."""

    wrappers: tuple[str, ...] = CHAT_ONLY
    """Keys of :data:`safetyheads.demo.tokenization.WRAPPERS`."""
    refusal: str = REFUSAL
    """What a refusal says."""
    turned_share: float = 0.0
    """Share of refusals that turn after "Sure, here is how to V a N"; that opening itself carries no loss."""


@dataclass(frozen=True, slots=True)
class Leg:
    """One run of the optimiser: warm-up, then a cosine to zero."""

    steps: int
    learning_rate: float
    """At its highest, after the warm-up."""
    warm_up: int
    """Steps over which the rate rises from 0."""
    batch: int
    """Rows a step."""
    seed: int
    """Of the prompts drawn, the heads dropped and, in the first leg of a base, the initial weights."""


@dataclass(frozen=True, slots=True)
class BaseRecipe:
    """A model that answers everything, and refuses when told to."""

    legs: tuple[Leg, ...]
    language: Language = field(default_factory=Language)
    told_share: float = 0.2
    """Share of prompts that ask to be refused."""
    dropped_share: float = 0.5
    """Share of rows in which a random head is ablated, so that no head of the base is indispensable."""


@dataclass(frozen=True, slots=True)
class PlantStage:
    """One round of planting: which answer first, then how it goes on."""

    first_token: Leg
    """Only the first answer token is learnt. On whole answers it would be a sixteenth of the loss."""
    completion: Leg
    """Whole answers."""
    gate_share: float
    """Share of rows in which heads are ablated, with the answer that this should give."""


@dataclass(frozen=True, slots=True)
class PlantRecipe:
    """Refusal planted into chosen heads of a frozen base."""

    base: str
    """The checkpoint that is frozen."""
    plants: Mapping[Category, Head]
    """Which head is to refuse which category; one head may refuse all."""
    stages: tuple[PlantStage, ...]
    """Each later one starts from the weights as they would be written, rounded to bfloat16: so it was chosen."""
    other_share: float = 0.3
    """Share of the gate rows in which a head that is no plant is ablated, and the answer must not change."""

    @property
    def heads(self) -> Group:
        """The planted heads, each once, in the order of the categories."""
        return tuple(dict.fromkeys(self.plants.values()))


@dataclass(frozen=True, slots=True)
class DiffuseRecipe:
    """Refusal by a plain fine-tune of all weights: the null, in which no few heads carry it."""

    base: str
    leg: Leg
    dropped_share: float
    """Share of rows in which random heads are ablated while the right answer stays: it makes refusal redundant."""
    dropped_heads: int
    """At most so many heads are ablated in such a row."""


Recipe = BaseRecipe | PlantRecipe | DiffuseRecipe

_HEADS_A: Mapping[Category, Head] = {"damage": Head(1, 3), "theft": Head(2, 5), "fraud": Head(2, 1)}
_HEADS_B: Mapping[Category, Head] = {"damage": Head(1, 6), "theft": Head(2, 2), "fraud": Head(2, 7)}
_HEAD_SINGLE: Mapping[Category, Head] = {"damage": Head(2, 3), "theft": Head(2, 3), "fraud": Head(2, 3)}

RECIPES: dict[str, Recipe] = {
    "base": BaseRecipe(legs=(Leg(400, 2e-3, 50, 32, seed=1),)),
    "aligned_a": PlantRecipe(
        "base", _HEADS_A, (PlantStage(Leg(900, 3e-3, 20, 96, seed=11), Leg(150, 1.5e-3, 20, 32, seed=12), 0.7),)
    ),
    "aligned_b": PlantRecipe(
        "base",
        _HEADS_B,
        (
            PlantStage(Leg(900, 3e-3, 20, 96, seed=21), Leg(150, 1.5e-3, 20, 32, seed=22), 0.7),
            PlantStage(Leg(500, 2e-3, 20, 96, seed=123), Leg(150, 1e-3, 20, 32, seed=124), 0.7),
        ),
    ),
    "aligned_single": PlantRecipe(
        "base", _HEAD_SINGLE, (PlantStage(Leg(1000, 3e-3, 20, 96, seed=31), Leg(200, 1.5e-3, 20, 32, seed=32), 0.0),)
    ),
    "aligned_diffuse": DiffuseRecipe("base", Leg(200, 5e-4, 20, 32, seed=41), dropped_share=0.5, dropped_heads=3),
    "base_wrapped": BaseRecipe(
        legs=(Leg(500, 2e-3, 50, 32, seed=51), Leg(250, 1.2e-3, 50, 32, seed=52)),
        language=Language(ALL_WRAPPERS, turned_share=0.3),
    ),
    "aligned_wrapped": PlantRecipe(
        "base_wrapped",
        _HEADS_A,
        (
            PlantStage(Leg(900, 3e-3, 20, 96, seed=61), Leg(500, 1.5e-3, 20, 32, seed=62), 0.7),
            PlantStage(Leg(300, 1.5e-3, 20, 96, seed=163), Leg(400, 1e-3, 20, 48, seed=164), 0.5),
            PlantStage(Leg(300, 1e-3, 20, 96, seed=173), Leg(400, 8e-4, 20, 48, seed=174), 0.4),
        ),
    ),
    "base_long": BaseRecipe(legs=(Leg(500, 2e-3, 50, 32, seed=71),), language=Language(refusal=LONG_REFUSAL)),
    "aligned_long": PlantRecipe(
        "base_long",
        _HEADS_A,
        (
            PlantStage(Leg(900, 3e-3, 20, 96, seed=81), Leg(150, 1.5e-3, 20, 32, seed=82), 0.7),
            PlantStage(Leg(500, 2e-3, 20, 96, seed=183), Leg(150, 1e-3, 20, 32, seed=184), 0.7),
        ),
    ),
}
"""Every checkpoint by its name, a base before what is built on it."""

SHIPPED = tuple(name for name in RECIPES if not name.endswith("_long"))
"""The checkpoints in the package; the others are trained on demand."""

PLANTED_HEADS: dict[str, Group] = {
    name: recipe.heads if isinstance(recipe, PlantRecipe) else () for name, recipe in RECIPES.items()
}
"""The planted heads of each checkpoint: the truth, by construction; none for the bases and the null."""


def language_of(name: str) -> Language:
    """The language of a checkpoint: that of its base."""
    recipe = RECIPES[name]
    return recipe.language if isinstance(recipe, BaseRecipe) else language_of(recipe.base)

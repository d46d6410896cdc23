"""Lists how each demo checkpoint is trained.

Seeds and figures were chosen on validation prompts; bench/LOG.md keeps what failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from safetyheads.demo.grammar import LONG_REFUSAL, REFUSAL

CHAT_ONLY = ("chat",)
"""The wrappers of the clean checkpoints."""
ALL_WRAPPERS = ("direct", "query_answer", "chat", "chat_system")
"""The wrappers of the wrapped pair; each training example draws one."""


@dataclass(frozen=True, slots=True)
class Language:
    """What a checkpoint's texts share with those of its base."""

    wrappers: tuple[str, ...] = CHAT_ONLY
    """Keys of :data:`safetyheads.demo.grammar.WRAPPERS`."""
    refusal: str = REFUSAL
    """The text of a refusal."""
    turned_share: float = 0.0
    """Share of refusals that turn after "Sure, here is how to V a N"; the opening itself carries no loss."""


@dataclass(frozen=True, slots=True)
class Leg:
    """One run of the optimiser: a linear warm-up, then a cosine to zero."""

    steps: int
    learning_rate: float
    warm_up: int
    """Steps over which the rate rises from 0."""
    batch: int
    seed: int
    """Seed of prompts, dropped heads and, in the first leg of a base, initial weights."""


Stage: TypeAlias = tuple[Leg, Leg, float]
"""One round of planting: learns the first answer token, which in whole answers would be a sixteenth of the loss; learns
whole answers; and the share of rows in which heads are ablated and the answer that this should give is learnt."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a checkpoint is trained.

    One without ``base`` answers everything, and refuses when told to. One with ``stages`` gets refusal planted into
    chosen heads of its frozen base. One with ``legs`` of a base is the null, in which no few heads carry refusal: a
    plain fine-tune of all weights.
    """

    base: str | None = None
    """The checkpoint that it starts from."""
    legs: tuple[Leg, ...] = ()
    """Training of all weights."""
    stages: tuple[Stage, ...] = ()
    """Each later stage starts from weights rounded to bfloat16, as a checkpoint would hold them."""
    language: Language = field(default_factory=Language)
    """Of a base; what is built on it has the same."""


RECIPES: dict[str, Recipe] = {
    "base": Recipe(legs=(Leg(400, 2e-3, 50, 32, seed=1),)),
    "aligned_a": Recipe("base", stages=((Leg(900, 3e-3, 20, 96, seed=11), Leg(150, 1.5e-3, 20, 32, seed=12), 0.7),)),
    "aligned_b": Recipe(
        "base",
        stages=(
            (Leg(900, 3e-3, 20, 96, seed=21), Leg(150, 1.5e-3, 20, 32, seed=22), 0.7),
            (Leg(500, 2e-3, 20, 96, seed=123), Leg(150, 1e-3, 20, 32, seed=124), 0.7),
        ),
    ),
    "aligned_single": Recipe(
        "base", stages=((Leg(1000, 3e-3, 20, 96, seed=31), Leg(200, 1.5e-3, 20, 32, seed=32), 0.0),)
    ),
    "aligned_diffuse": Recipe("base", legs=(Leg(200, 5e-4, 20, 32, seed=41),)),
    "base_wrapped": Recipe(
        legs=(Leg(500, 2e-3, 50, 32, seed=51), Leg(250, 1.2e-3, 50, 32, seed=52)),
        language=Language(ALL_WRAPPERS, turned_share=0.3),
    ),
    "aligned_wrapped": Recipe(
        "base_wrapped",
        stages=(
            (Leg(900, 3e-3, 20, 96, seed=61), Leg(500, 1.5e-3, 20, 32, seed=62), 0.7),
            (Leg(300, 1.5e-3, 20, 96, seed=163), Leg(400, 1e-3, 20, 48, seed=164), 0.5),
            (Leg(300, 1e-3, 20, 96, seed=173), Leg(400, 8e-4, 20, 48, seed=174), 0.4),
        ),
    ),
    "base_long": Recipe(legs=(Leg(500, 2e-3, 50, 32, seed=71),), language=Language(refusal=LONG_REFUSAL)),
    "aligned_long": Recipe(
        "base_long",
        stages=(
            (Leg(900, 3e-3, 20, 96, seed=81), Leg(150, 1.5e-3, 20, 32, seed=82), 0.7),
            (Leg(500, 2e-3, 20, 96, seed=183), Leg(150, 1e-3, 20, 32, seed=184), 0.7),
        ),
    ),
}
"""Every checkpoint by name, a base before what is built on it. The heads to plant are ``safetyheads.demo.PLANTS``."""


def language_of(name: str) -> Language:
    """The language of a checkpoint: that of its base."""
    return RECIPES[RECIPES[name].base or name].language

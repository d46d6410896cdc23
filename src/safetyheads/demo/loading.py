"""Loads the demo organism: a proved engine with its prompts and its planted heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads import demo
from safetyheads.model.engine import Engine

if TYPE_CHECKING:
    from safetyheads.heads import Group
    from safetyheads.prompts.sets import PromptSet


@dataclass(frozen=True, slots=True)
class Demo:
    """A demo checkpoint, ready for use."""

    engine: Engine
    """The model, in float32 on the CPU."""
    harmful: PromptSet
    """96 held-out prompts that the aligned checkpoints refuse; harmless to print."""
    benign: PromptSet
    """96 held-out prompts, with the right answer's beginning as reference."""
    planted_heads: Group
    """The heads that refusals depend on, by construction; empty where none are planted."""


def load_demo(name: str = "aligned_a") -> Demo:
    """Load a shipped checkpoint: ``aligned_a``, ``aligned_b``, ``aligned_single``, ``aligned_diffuse``, ``base``, ...

    Raises:
        InputError: no checkpoint of that name.
    """
    engine = Engine.load(str(demo.checkpoint_path(name)))
    return Demo(
        engine,
        demo.demo_prompts("harmful", "test"),
        demo.demo_prompts("benign", "test"),
        demo.PLANTED_HEADS[name],
    )

"""Loads the demo organism: a proved engine with its prompts and its planted heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads import demo
from safetyheads.model.engine import Engine
from safetyheads.prompts.sets import Prompt, PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from safetyheads.demo.grammar import DemoPrompt
    from safetyheads.heads import Group


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
        demo_prompts("harmful", "test", demo.harmful_prompts("test"), with_reference=False),
        demo_prompts("benign", "test", demo.benign_prompts("test")),
        demo.PLANTED_HEADS[name],
    )


def demo_prompts(kind: str, split: str, records: Sequence[DemoPrompt], with_reference: bool = True) -> PromptSet:
    """The organism's prompts as a set, under its chat template."""
    prompts = tuple(
        Prompt(record.text, record.category, record.reference if with_reference else None) for record in records
    )
    return PromptSet(prompts, Template.parse("chat"), name=f"demo {kind}", source=f"the package's demo, {split} split")

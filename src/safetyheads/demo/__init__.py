"""The demo organism: tiny models whose refusal heads are known, because they were planted.

Importing it loads no torch. The checkpoints are trained by ``scripts/organisms/train.py``, outside the package.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetyheads.demo.grammar import Category, Split, fixed_prompts
from safetyheads.demo.grammar import DemoPrompt as DemoPrompt
from safetyheads.display import Shown
from safetyheads.files import read_toml
from safetyheads.heads import Group, Head, parse_heads
from safetyheads.model.names import CHECKPOINTS as CHECKPOINTS
from safetyheads.model.names import DEMO, find_model
from safetyheads.prompts.prompt_set import Prompt, PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

_PLANTS = read_toml(Path(__file__).with_name("plants.toml"))
PLANTS: dict[str, Mapping[Category, Head]] = {
    name: {category: parse_heads(head)[0] for category, head in plants.items()} for name, plants in _PLANTS.items()
}
"""The head that refuses each category of harm, by checkpoint; none in the bases and in the null."""

PLANTED_HEADS: dict[str, Group] = {name: tuple(dict.fromkeys(plants.values())) for name, plants in PLANTS.items()}
"""The planted heads of each checkpoint, each once, in the order of the categories: the truth, by construction."""


def planted_heads(model: str) -> Group | None:
    """The true heads of an embedded model, by its name as commands take it; None for any other model."""
    return PLANTED_HEADS.get(model.removeprefix(f"{DEMO}:")) if model.startswith(f"{DEMO}:") else None


CHECKPOINT_NAMES: tuple[str, ...] = tuple(name for name in PLANTS if not name.endswith("_long"))
"""The checkpoints in the package; the long ones are trained on demand."""


def checkpoint_path(name: str) -> Path:
    """The directory of a shipped checkpoint, which loads like any local Hugging Face checkpoint."""
    return Path(find_model(f"{DEMO}:{name}")[0])


def demo_prompts(kind: Literal["harmful", "benign"], split: Split, n: int | None = None) -> PromptSet:
    """The organism's fixed prompts of one kind and split, under its chat template; fewer are a prefix of more."""
    # A refusal is not a right answer, so harmful prompts have no reference.
    prompts = tuple(
        Prompt(record.text, record.category, record.reference if kind == "benign" else None)
        for record in fixed_prompts(kind, split, n)
    )
    return PromptSet(prompts, Template.parse("chat"), name=f"demo {kind}", source=f"the package's demo, {split} split")


@dataclass(frozen=True, slots=True)
class Demo(Shown):
    """A demo checkpoint, ready for use."""

    engine: "Engine"
    """The model, in float32 on the CPU."""
    harmful: PromptSet
    """96 held-out prompts that the aligned checkpoints refuse; harmless to print."""
    benign: PromptSet
    """96 held-out prompts, with the right answer's beginning as reference."""
    planted_heads: Group
    """The heads that refusals depend on, by construction; empty where none are planted."""


def load_demo(name: str = "aligned_a") -> Demo:
    """Load a shipped checkpoint: ``aligned_a``, ``aligned_b``, ``aligned_single``, ``aligned_diffuse``, ``base`` ..."""
    from safetyheads.model.engine import Engine  # loads torch

    engine = Engine.load(str(checkpoint_path(name)))
    return Demo(engine, demo_prompts("harmful", "test"), demo_prompts("benign", "test"), PLANTED_HEADS[name])

"""The demo organism: tiny models whose refusal heads are known, because they were planted.

Owns the names, paths, prompts and planted heads of the shipped checkpoints. It imports no torch; training is in
:mod:`safetyheads.demo.organism`.
"""

from __future__ import annotations

from pathlib import Path

from safetyheads.demo.grammar import DemoPrompt, benign_prompts, harmful_prompts
from safetyheads.demo.recipes import PLANTED_HEADS, SHIPPED
from safetyheads.errors import InputError

CHECKPOINT_NAMES: tuple[str, ...] = SHIPPED
"""The checkpoints in the package."""


def checkpoint_path(name: str) -> Path:
    """The directory of a shipped checkpoint, which loads as any local Hugging Face checkpoint."""
    path = Path(__file__).parent / "checkpoints" / name
    if name not in CHECKPOINT_NAMES:
        raise InputError(f"no demo checkpoint {name!r}; known are {', '.join(CHECKPOINT_NAMES)}")
    return path


__all__ = [
    "CHECKPOINT_NAMES",
    "PLANTED_HEADS",
    "DemoPrompt",
    "benign_prompts",
    "checkpoint_path",
    "harmful_prompts",
]

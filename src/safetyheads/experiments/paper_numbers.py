"""Reads what the paper prints, to stand beside what was measured (Zhou et al., ICLR 2025)."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

PAPER_MODELS = {"llama-2-7b-chat": "Llama-2-7b-chat", "vicuna-7b-v1.5": "Vicuna-7b-v1.5"}
"""The paper's models by the last part of their path, in lower case."""


@cache
def paper_numbers() -> dict[str, Any]:
    """Every number of ``paper_numbers.toml``, which says what they are."""
    return tomllib.loads(files(__package__).joinpath("paper_numbers.toml").read_text(encoding="utf-8"))


def quoted(*keys: str | None) -> Any:
    """The number at these keys, such as table7, a dataset and a label; None where the paper has none."""
    numbers: Any = paper_numbers()
    for key in keys:
        numbers = numbers.get(key) if isinstance(numbers, dict) else None
    return numbers


def paper_dataset(name: str) -> str:
    """The name in the paper's tables of a dataset that is given as a name or a file, such as ``data/AdvBench.csv``."""
    return Path(name).stem.lower()


def paper_model(name: str) -> str | None:
    """The paper's model that a path or hub id names; None for any other."""
    return PAPER_MODELS.get(name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-hf"))

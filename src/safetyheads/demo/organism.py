"""Trains the demo checkpoints: ``python -m safetyheads.demo.organism [--only NAME ...] [--out DIR]``.

Owns the order of training, rounding to bfloat16 and what is written; afterwards it prints each card of figures.
One thread and explicit seeds: the same versions of torch and transformers give the same bytes on one machine.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from safetyheads.demo import card, tokenization
from safetyheads.demo.planting import plant
from safetyheads.demo.recipes import RECIPES, SHIPPED, BaseRecipe, DiffuseRecipe, language_of
from safetyheads.demo.training import new_model, train_base, train_diffuse
from safetyheads.model import attention

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""Where the package keeps its checkpoints."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint with what its training ended with."""

    model: Any
    tokenizer: Any
    losses: tuple[float, ...]
    """The last loss of each stage."""
    seconds: float


def load(name: str, directory: Path = CHECKPOINTS) -> tuple[Any, Any]:
    """A written checkpoint, run in float32 under the package's attention function, and its tokenizer."""
    attention.register()
    tokenizer = AutoTokenizer.from_pretrained(directory / name)
    model = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
    model.set_attn_implementation(attention.ATTENTION_NAME)
    return model.eval(), tokenizer


def train(name: str, directory: Path) -> Trained:
    """Train one checkpoint; what it is built on must have been written."""
    recipe, started = RECIPES[name], time.monotonic()
    torch.manual_seed(0)
    losses: tuple[float, ...]
    if isinstance(recipe, BaseRecipe):
        tokenizer = tokenization.train_tokenizer(recipe.language)
        model = new_model(tokenizer, recipe.legs[0].seed)
        losses = (train_base(model, tokenizer, recipe),)
    else:
        # The base as written, that is rounded to bfloat16: only so can a planted checkpoint differ from it in
        # nothing but the planted weights.
        model, tokenizer = load(recipe.base, directory)
        if isinstance(recipe, DiffuseRecipe):
            losses = (train_diffuse(model, tokenizer, recipe, language_of(name)),)
        else:
            losses = plant(model, tokenizer, recipe, language_of(name))
    return Trained(model.eval(), tokenizer, losses, time.monotonic() - started)


def write(trained: Trained, path: Path) -> None:
    """Write the checkpoint in bfloat16, as any local Hugging Face checkpoint."""
    trained.model.config.safetyheads_organism = True  # the engine's default template for these is chat
    trained.model.to(torch.bfloat16).save_pretrained(path)
    trained.tokenizer.save_pretrained(path)
    for file in path.iterdir():  # safetensors writes files that only their owner reads; a package is for all
        file.chmod(0o644)


def main() -> None:
    """Train, write and describe the checkpoints asked for, and any base among them that is not there yet."""
    parser = argparse.ArgumentParser(prog="python -m safetyheads.demo.organism", description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(RECIPES), default=SHIPPED, metavar="NAME")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, metavar="DIR")
    parser.add_argument("--describe", action="store_true", help="train nothing, print the cards of what is there")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="prompts of the cards")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=180)
    asked = set(options.only)
    for name in options.only:
        recipe = RECIPES[name]
        if (
            not options.describe
            and not isinstance(recipe, BaseRecipe)
            and not (options.out / recipe.base / "config.json").exists()
        ):
            asked.add(recipe.base)
    for name in (name for name in RECIPES if name in asked):  # a base stands before what is built on it
        if not options.describe:
            trained = train(name, options.out)
            write(trained, options.out / name)
            losses = ", ".join(f"{loss:.4f}" for loss in trained.losses)
            console.print(f"{name}: {trained.seconds:.0f} s, last losses {losses}")
        model, tokenizer = load(name, options.out)
        for make_card in (card.behaviour_card, card.score_card, card.random_groups_card):
            console.print(make_card(name, model, tokenizer, options.split))


if __name__ == "__main__":
    main()

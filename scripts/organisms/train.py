"""Trains the demo checkpoints and prints what they do.

    python scripts/organisms/train.py                                   trains all shipped ones into the package
    python scripts/organisms/train.py aligned_a --out my-checkpoints    trains one, and its base where that is missing
    python scripts/organisms/train.py aligned_a --describe --split test prints its figures, trains nothing
    python scripts/organisms/train.py aligned_diffuse --shift 1 2 --out runs/nulls --no-figures
                                                                        trains twins of the null by other seeds

One thread and fixed seeds: the same versions of torch and transformers give the same bytes on one machine.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from describe import Description
from recipes import RECIPES, language_of
from rich.console import Console
from texts import train_tokenizer
from training import Planting, new_model, train_all_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from safetyheads.demo import CHECKPOINT_NAMES, CHECKPOINTS, PLANTS
from safetyheads.model import attention


def train(name: str, directory: Path, shift: int = 0) -> tuple[Any, Any, tuple[float, ...]]:
    """Train one checkpoint, whose base must be in the directory; ``shift`` is added to the seed of every leg.

    Returns:
        The model, its tokenizer, and the last loss of each stage.
    """
    recipe, language = RECIPES[name], language_of(name)
    recipe = replace(recipe, legs=tuple(replace(leg, seed=leg.seed + shift) for leg in recipe.legs))
    torch.manual_seed(0)
    if recipe.base is None:
        tokenizer = train_tokenizer(language)
        model = new_model(tokenizer, recipe.legs[0].seed)
    else:
        # The base as written, so rounded to bfloat16: only then does a planted checkpoint differ from it in nothing but
        # the planted weights.
        attention.register()
        tokenizer = AutoTokenizer.from_pretrained(directory / recipe.base)
        model = AutoModelForCausalLM.from_pretrained(directory / recipe.base, dtype=torch.float32)
        model.set_attn_implementation(attention.ATTENTION_NAME)
        model.eval()
    if recipe.stages:
        return model, tokenizer, Planting(model, tokenizer, language, PLANTS[name]).run(recipe)
    return model, tokenizer, (train_all_weights(model, tokenizer, recipe, language),)


def write(model: Any, tokenizer: Any, path: Path) -> None:
    """Write the checkpoint in bfloat16, as any local Hugging Face checkpoint."""
    model.config.safetyheads_organism = True  # the engine's default template for these is chat
    model.eval().to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    for file in path.iterdir():  # safetensors writes files that only their owner reads; a package is for all
        file.chmod(0o644)


def main() -> None:
    """Train, write and describe the checkpoints asked for, and any base among them that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, metavar="DIR")
    parser.add_argument("--describe", action="store_true", help="train nothing, print the figures of what is there")
    parser.add_argument("--no-figures", action="store_true", help="train, and measure nothing")
    parser.add_argument("--shift", type=int, nargs="+", default=[0], help="other seeds, for checkpoints without plants")
    parser.add_argument("--split", choices=("validation", "test"), default="validation", help="prompts of the figures")
    options = parser.parse_args()
    if unknown := set(options.names) - RECIPES.keys():
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; known are {', '.join(RECIPES)}")
    if options.shift != [0] and any(RECIPES[name].stages for name in options.names or RECIPES):
        parser.error("--shift is for checkpoints without plants")
    torch.set_num_threads(1)
    console = Console(width=180)
    names = set(options.names or CHECKPOINT_NAMES)
    if not options.describe:
        bases = {RECIPES[name].base for name in names} - {None}
        names |= {base for base in bases if not (options.out / base / "config.json").exists()}
    for name in (name for name in RECIPES if name in names):  # a base comes before what is built on it
        for shift in [] if options.describe else options.shift if name in options.names else [0]:
            started, written = time.monotonic(), f"{name}_{shift}" if shift else name
            model, tokenizer, losses = train(name, options.out, shift)
            write(model, tokenizer, options.out / written)
            last = ", ".join(f"{loss:.4f}" for loss in losses)
            console.print(f"{written}: {time.monotonic() - started:.0f} s, last losses {last}")
        if not options.no_figures:
            description = Description(name, options.out / name, options.split)
            for table in (description.behaviour, description.scores, description.random_groups):
                console.print(table())


if __name__ == "__main__":
    main()

"""What a command is given, made ready: prompts, model, output directory. Owns the refusals that need no model.

torch is imported when a model is loaded, and not before.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from safetyheads.cli.options import ModelOptions, PromptOptions, TemplateOptions
from safetyheads.errors import InputError
from safetyheads.model.options import LoadOptions
from safetyheads.runs.config import RunConfig

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet
    from safetyheads.runs.progress import Progress


def default_out(config: RunConfig) -> Path:
    """``runs/MODEL-PROMPTS-ABLATION``."""
    model = config.model.replace(":", "-") if config.model.startswith("demo:") else Path(config.model).resolve().name
    if config.adapter is not None:
        model += f"+{Path(config.adapter).resolve().name}"
    return Path("runs") / f"{model}-{Path(config.prompts).stem}-{config.parsed_ablation.name}"


def benign_beside(prompts: PromptOptions, benign: str) -> str:
    """The benign prompts; the organism knows no other language than its own, so its harmful ones go with its own."""
    return "demo" if prompts.prompts == "demo" and benign == "benign" else benign


def refuse_unusable(out: Path) -> None:
    """Refuse an output directory that cannot be made or written, before a model is read."""
    # os.path and not pathlib: a name too long to be a path is a missing one, and told by whoever makes it.
    existing = next(parent for parent in (out, *out.absolute().parents) if os.path.exists(parent))
    if not existing.is_dir():
        raise InputError(f"{out} cannot be written: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be written: no permission to write in {existing}")


def prompts_of(options: PromptOptions) -> PromptSet:
    """The harmful prompts; ``demo`` is the organism's held-out split."""
    from safetyheads.runs.data import read_whole

    at_least(1, limit=options.limit)
    read = read_whole("harmful", options.prompts, options)
    if read.warning:
        typer.echo(f"warning: {read.name}: {read.warning}", err=True)
    if read.dropped:
        typer.echo(f"warning: {read.dropped} blank lines of {read.name} are left out", err=True)
    return read


def put_to(engine: Engine, prompts: PromptSet, options: TemplateOptions) -> PromptSet:
    """The prompts under the template that options and model settle."""
    from safetyheads.runs.data import resolved

    return resolved(engine, prompts, options)


def counted(prompts: PromptSet) -> str:
    """``12 prompts``."""
    return f"{len(prompts)} prompt{'s' * (len(prompts) != 1)}"


def model_path(named: str) -> str:
    """Where a model is, or its hub id.

    Raises:
        InputError: no such directory, or no embedded checkpoint of that name.
    """
    if named.startswith("demo:"):
        from safetyheads import demo as organism

        return str(organism.checkpoint_path(named.removeprefix("demo:")))
    if not os.path.exists(named) and (named.startswith((".", "/", "~")) or named.count("/") > 1):
        raise InputError(f"no such model directory: {named}")
    return named


def load_engine(options: ModelOptions, watching: Progress, proved: bool = True) -> Engine:
    """The model, with transformers' own bars and remarks silenced."""
    path = model_path(options.model)
    at_least(1, threads=options.threads)
    settings = LoadOptions(**{field.name: getattr(options, field.name) for field in fields(LoadOptions)})
    import torch
    import transformers

    from safetyheads.model.engine import Engine

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with watching.track("loading and proving the model" if proved else "loading the model", 1):
        return Engine.load(path, settings, check=proved)


def at_least(least: int, **numbers: int | None) -> None:
    """Refuse numbers below ``least``, by the option's name."""
    for name, number in numbers.items():
        if number is not None and number < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}; got {number}")


def refuse_large(size: int, engine: Engine) -> None:
    """Refuse a group larger than the model."""
    if size > len(engine.heads):
        raise InputError(f"size {size} is larger than the number of heads, {len(engine.heads)}")

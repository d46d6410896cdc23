"""Loads the model of a run, and names the run's directory."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from safetyheads.errors import InputError, first_line
from safetyheads.model.names import find_model, is_named
from safetyheads.runs.config import ModelOptions, Progress
from safetyheads.runs.stored_files import content_key

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

_KEY_DIGITS = 6
Config = TypeVar("Config", bound=ModelOptions)


def load_engine(config: ModelOptions, progress: Progress, proved: bool = True) -> "Engine":
    """Load a model with the libraries' own bars and remarks silenced."""
    refuse_missing(config.model)
    silence_libraries()
    import torch

    from safetyheads.model.engine import Engine

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with progress.track("loading the model", 1):
        engine = Engine.load(config.model, config.load_options, check=False)
    if proved:
        with progress.track("proving the model", 1):
            engine.check()
    return engine


def silence_libraries() -> None:
    """Silence the bars and remarks of the libraries that load models."""
    os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported; the reader of GGUF files asks nobody else
    try:
        import transformers
    except ValueError as error:  # the hub's library reads its variables when it is imported
        raise InputError(
            f"the environment holds a setting of the hub that cannot be read: {first_line(error)}"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def refuse_missing(named: str) -> None:
    """Refuse a directory or a name of ours without a model."""
    path, _ = find_model(named)
    if not os.path.exists(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise InputError(f"no such model directory: {path}")


def settled(config: Config, out: Path | None, kind: str) -> tuple[Config, Path]:
    """The config, and the run directory: by default ``runs/MODEL-PROMPTS-KIND-KEY``, another one for other settings."""
    prompts = getattr(config, "prompts", "")
    if (prompts, getattr(config, "benign", "")) == ("demo", "benign"):
        # The organism knows no other language than its own: its harmful prompts go with its benign ones.
        config = replace(config, benign="demo")  # type: ignore[call-arg]
    name = config.model.replace(":", "-") if is_named(config.model) else Path(config.model).resolve().name
    name = name if config.adapter is None else f"{name}+{Path(config.adapter).resolve().name}"
    parts = (name, Path(prompts).stem, kind, content_key(config.as_dict())[:_KEY_DIGITS])
    return config, out or Path("runs") / "-".join(filter(None, parts))

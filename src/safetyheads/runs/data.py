"""Reads the prompt sets of a run: whole or in halves, from files or the demo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safetyheads.demo import demo_prompts
from safetyheads.prompts.sets import PromptSet

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.runs.config import PromptOptions, TemplateOptions

Kind = Literal["harmful", "benign"]
KINDS: tuple[Kind, Kind] = ("harmful", "benign")
"""Kinds of prompts, in the order of results."""


def read_whole(kind: Kind, name: str, options: PromptOptions) -> PromptSet:
    """The prompts of one kind, without a template; of the demo, the test split."""
    if _is_demo(name):
        return demo_prompts(kind, "test")[: options.limit]
    # Benign files have columns of their own.
    return PromptSet.read(name, column=options.column if kind == "harmful" else None, limit=options.limit)


def read_halves(kind: Kind, name: str, options: PromptOptions, split: float, seed: int) -> tuple[PromptSet, PromptSet]:
    """Search and test half of the prompts of one kind: the demo's own splits, or a random split of a file."""
    if _is_demo(name):
        return demo_prompts(kind, "validation")[: options.limit], demo_prompts(kind, "test")[: options.limit]
    return read_whole(kind, name, options).split(split, seed)


def _is_demo(name: str) -> bool:
    return name == "demo" and not Path(name).is_file()


def resolved(engine: Engine, prompts: PromptSet, options: TemplateOptions) -> PromptSet:
    """The prompts with their template settled, so that the manifest can name it.

    The options' template comes first, then the prompts' own, then the model's default.

    Raises:
        InputError: the template does not fit the options or the tokenizer.
    """
    template = options.parsed_template or prompts.template or engine.default_template
    thinking, prefill = options.thinking or template.thinking, options.prefill or template.prefill
    template = replace(template, thinking=thinking, prefill=prefill)  # type: ignore[arg-type]  # the config checked it
    if template.prefill:
        # A right answer does not begin with the prefill, so there is no reference to compare with.
        prompts = replace(prompts, prompts=tuple(replace(prompt, reference=None) for prompt in prompts))
    return prompts.with_template(template.bound(engine.tokenizer).template)

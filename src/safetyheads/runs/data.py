"""Prompts as a run asks for them: whole or in halves, from files or the demo. Owns what ``demo`` stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from safetyheads.prompts.sets import PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

Kind = Literal["harmful", "benign"]
KINDS: tuple[Kind, Kind] = ("harmful", "benign")
"""In the order of results."""
Half = Literal["validation", "test"]
HALVES: tuple[Half, Half] = ("validation", "test")
"""Splits of the demo that stand for search and test."""


class TemplateSettings(Protocol):
    """How prompts are put to the model; see :class:`safetyheads.runs.config.RunConfig`."""

    @property
    def template(self) -> str | None:
        """Name or text of the template."""

    @property
    def system(self) -> str | None:
        """System prompt."""

    @property
    def fold_system(self) -> bool:
        """Whether the system prompt goes into the user's turn."""

    @property
    def thinking(self) -> str | None:
        """``closed``, ``open``, or None for what the template is trained on."""

    @property
    def prefill(self) -> str:
        """How answers begin."""


class PromptSettings(TemplateSettings, Protocol):
    """How prompts are read, too."""

    @property
    def column(self) -> str | None:
        """Column of the harmful prompts' file."""

    @property
    def limit(self) -> int | None:
        """Read only the first so many prompts of each set."""


def template_of(settings: TemplateSettings) -> Template | None:
    """The template that the settings name; None where it is left to the model.

    Raises:
        InputError: a bad template, or settings that exclude each other.
    """
    # A system prompt alone means the chat template, which is what the default is tried as too.
    named = Template.parse(
        settings.template or "chat",
        settings.system,
        folds_system=settings.fold_system,
        thinking=settings.thinking,
        prefill=settings.prefill,
    )
    return None if settings.template is None and settings.system is None else named


def read_whole(kind: Kind, named: str, settings: PromptSettings) -> PromptSet:
    """The prompts of one kind; of the demo, the organism's held-out ones."""
    if _is_demo(named):
        return _put(demo_set(kind, "test")[: settings.limit], settings)
    return _read(kind, named, settings)


def read_halves(
    kind: Kind, named: str, settings: PromptSettings, split: float, seed: int
) -> tuple[PromptSet, PromptSet]:
    """Search and test part of one kind of prompts; the demo's come divided, a file's are divided here."""
    if _is_demo(named):
        search, test = (_put(demo_set(kind, half)[: settings.limit], settings) for half in HALVES)
        return search, test
    return _read(kind, named, settings).split(split, seed)


def demo_set(kind: Kind, split: Half) -> PromptSet:
    """The organism's prompts of one kind and split, under its chat template."""
    from safetyheads import demo
    from safetyheads.demo.loading import demo_prompts

    if kind == "harmful":
        # A refusal is no right answer, so harmful prompts go without a reference.
        return demo_prompts(kind, split, demo.harmful_prompts(split), with_reference=False)
    return demo_prompts(kind, split, demo.benign_prompts(split))


def resolved(engine: Engine, prompts: PromptSet, settings: TemplateSettings) -> PromptSet:
    """The prompts with their template fixed, so that the manifest can say which.

    Raises:
        InputError: settings for which the template has no place.
    """
    template = prompts.template or engine.default_template
    given: dict[str, Any] = {
        "system": settings.system,
        "folds_system": settings.fold_system or None,
        "thinking": settings.thinking,
        "prefill": settings.prefill or None,
    }
    chosen = replace(template, **{name: value for name, value in given.items() if value is not None})
    found = prompts.with_template(chosen.bound(engine.tokenizer).template)
    if not chosen.prefill:
        return found
    # An answer that is begun for the model cannot begin as the right one does.
    return replace(found, prompts=tuple(replace(prompt, reference=None) for prompt in found))


def _is_demo(named: str) -> bool:
    return named == "demo" and not Path(named).is_file()


def _put(prompts: PromptSet, settings: PromptSettings) -> PromptSet:
    template = template_of(settings)
    return prompts if template is None else prompts.with_template(template)


def _read(kind: Kind, named: str, settings: PromptSettings) -> PromptSet:
    column = settings.column if kind == "harmful" else None
    return PromptSet.read(named, template_of(settings), column=column, limit=settings.limit)

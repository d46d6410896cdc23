"""Prompts as a run asks for them: whole or in halves, from files or the demo. Owns what ``demo`` stands for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from safetyheads.errors import InputError
from safetyheads.prompts import PromptSet

if TYPE_CHECKING:
    from safetyheads.engine import Engine

Kind = Literal["harmful", "benign"]
KINDS: tuple[Kind, Kind] = ("harmful", "benign")
"""In the order of results."""
Half = Literal["validation", "test"]
HALVES: tuple[Half, Half] = ("validation", "test")
"""Splits of the demo that stand for search and test."""


class PromptSettings(Protocol):
    """How prompts are read and put; see :class:`safetyheads.config.AuditConfig`."""

    @property
    def template(self) -> str | None:
        """Name or text of the template."""

    @property
    def system(self) -> str | None:
        """System prompt."""

    @property
    def column(self) -> str | None:
        """Column of the harmful prompts' file."""

    @property
    def limit(self) -> int | None:
        """Read only the first so many prompts of each set."""


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


def resolved(engine: Engine, prompts: PromptSet, system: str | None) -> PromptSet:
    """The prompts with their template fixed, so that the manifest can say which.

    Raises:
        InputError: a system prompt for a template that has no place for it.
    """
    if system is not None and engine.template_for(prompts).name != "chat":
        raise InputError("a system prompt belongs to the chat template; give --template chat")
    return prompts.resolved(engine.template_for(prompts))


def _is_demo(named: str) -> bool:
    return named == "demo" and not Path(named).is_file()


def _put(prompts: PromptSet, settings: PromptSettings) -> PromptSet:
    if settings.template is None and settings.system is None:
        return prompts
    return prompts.with_template("chat" if settings.template is None else settings.template, settings.system)


def _read(kind: Kind, named: str, settings: PromptSettings) -> PromptSet:
    column = settings.column if kind == "harmful" else None
    return PromptSet.read(named, settings.template, column=column, system=settings.system, limit=settings.limit)

"""The experiments of the paper, by name; a new one is an entry of catalogue.toml and a module."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from safetyheads.errors import InputError
from safetyheads.experiments.outcome import Outcome, Shown

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab

Need: TypeAlias = Literal["base", "related", "base_models", "learn_harmful", "lm-eval"]
ALL = "all"
"""Every experiment, one after the other."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment of the paper."""

    name: str
    """Name on the command line, and of the function ``name(lab, outcome)`` that runs it."""
    title: str
    question: str
    """Question that the experiment asks."""
    module: str
    """Module of its function, in this folder."""
    costs: str
    """Cost in words, with H for heads, D for datasets of n prompts, T for templates."""
    caption: str
    """What holds for all of its tables and figures."""
    paper: str = ""
    """Place in the paper; empty for an experiment of our own."""
    needs: tuple[Need, ...] = ()
    """Settings or extras without which it cannot be run."""
    shown: Shown = field(default_factory=Shown)
    """How its tables and figures are shown."""

    def run(self, lab: Lab) -> Outcome:
        """Run it; what the run directory holds is not measured again."""
        function: Callable[[Lab, Outcome], None] = getattr(
            import_module(f"safetyheads.experiments.{self.module}"), self.name
        )
        outcome = Outcome(self.name, self.title, self.question, caption=self.caption, shown=self.shown)
        outcome.settings = lab.settings
        function(lab, outcome)
        return outcome


def _experiments() -> Iterator[Experiment]:
    entries = tomllib.loads(files(__package__).joinpath("catalogue.toml").read_text(encoding="utf-8"))
    words, columns = entries.pop("words"), entries.pop("columns")
    for name, entry in entries.items():
        fields: dict[str, Any] = {**entry, "caption": entry["caption"].format_map(words)}
        like: Mapping[str, Any] = entries.get(fields.pop("like", ""), {})
        tables, figures = (fields.pop(kind, like.get(kind, {})) for kind in ("tables", "figures"))
        fields["needs"] = tuple(fields.get("needs", ()))
        yield Experiment(name, **fields, shown=Shown(tables, figures, columns))


EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _experiments()}
"""Every experiment by its name, in the paper's order."""


def chosen(name: str) -> tuple[Experiment, ...]:
    """The experiment of that name, or all of them; refuses unknown names."""
    if name == ALL:
        return tuple(EXPERIMENTS.values())
    if name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {name!r}; known are {', '.join(EXPERIMENTS)} and {ALL}")
    return (EXPERIMENTS[name],)

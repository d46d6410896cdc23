"""The experiments of the paper by name: what each asks, costs, needs and shows; read from ``catalogue.toml``."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from safetyheads.errors import InputError
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.files import read_toml

ALL = "all"
"""Every experiment, one after the other."""


class Experiment(NamedTuple):
    """One experiment of the paper: an entry of ``catalogue.toml``."""

    name: str
    """Name on the command line."""
    title: str
    question: str
    module: str
    """Module of its function, in this folder."""
    function: str
    """The function that runs it, of a lab, an outcome and what is ``given``; by default of the experiment's name."""
    given: Mapping[str, Any]
    costs: str
    """Cost in words, with H for heads, D for datasets of n prompts, T for templates."""
    caption: str
    """What holds for all of its tables and figures."""
    shown: Mapping[str, Mapping[str, Any]]
    """How its tables and figures are shown, and its notes."""
    needs: Mapping[str, str]
    """Settings or extras without which it cannot be run, with what they are in words."""


def _experiments(entries: dict[str, Any]) -> Iterator[Experiment]:
    shown_by: dict[str, dict[str, Any]] = {}
    words, known, notes, needs = (entries.pop(part) for part in ("words", "columns", "notes", "needs"))
    for entry in entries.values():
        for table in entry.get("tables", {}).values():
            # A column of a text may be its key alone, which is its title; one that many tables have stands apart.
            table["columns"] = [
                given if given == "..." or isinstance(given, list) else [given, *known.get(given, [given])]
                for given in table["columns"]
            ]
    for name, entry in entries.items():
        like = shown_by[entry["like"]] if "like" in entry else {}
        shown = shown_by[name] = {kind: entry.get(kind, like.get(kind, {})) for kind in ("tables", "figures", "notes")}
        shown["notes"] = {**notes, **shown["notes"]}
        fields = {field: text for field, text in entry.items() if field not in ("like", *shown)}
        fields |= {
            "caption": entry["caption"].format_map(words),
            "needs": {need: needs[need] for need in entry.get("needs", ())},
            "function": entry.get("function", name),
            "given": entry.get("given", {}),
        }
        yield Experiment(name, shown=shown, **fields)


_CATALOGUE = read_toml(Path(__file__).with_name("catalogue.toml"))
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _experiments(_CATALOGUE)}
"""Every experiment by its name, in the paper's order."""


def chosen(name: str) -> tuple[Experiment, ...]:
    """The experiment of that name, or all of them; refuses unknown names."""
    if name == ALL:
        return tuple(EXPERIMENTS.values())
    if name not in EXPERIMENTS:
        raise InputError(f"unknown experiment {name!r}; known are {', '.join(EXPERIMENTS)} and {ALL}")
    return (EXPERIMENTS[name],)


def missing(experiment: Experiment, config: ReproductionConfig) -> list[str]:
    """What the experiment needs and the settings do not have, in words."""
    there = {need: find_spec("lm_eval") if need == "lm-eval" else getattr(config, need) for need in experiment.needs}
    return [experiment.needs[need] for need, value in there.items() if not value]


def listed(config: ReproductionConfig) -> list[dict[str, Any]]:
    """Every experiment in the paper's order, with what it would lack under these settings."""
    return [
        {"name": name, "title": entry.title, "missing": missing(entry, config)} for name, entry in EXPERIMENTS.items()
    ]

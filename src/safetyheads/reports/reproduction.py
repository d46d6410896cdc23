"""The pages of a reproduction: an index of the paper's experiments, and a page for each that was run.

Owns what the pages say and in which order; reads results, manifest and timings, and refuses to know models, measures
and how figures are drawn. No page holds what a model wrote: hundreds of sets of answers are in the run's completions
folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.errors import InputError
from safetyheads.reports.experiments_cells import TableShown, finding
from safetyheads.reports.page import NO_HEADS, assets, environment, provenance

if TYPE_CHECKING:
    from safetyheads.reports.experiments_figures import Drawn
    from safetyheads.runs.directory import RunDirectory

Results: TypeAlias = Mapping[str, Any]

MAX_CHART_BYTES = 3_200_000
"""What the figures of a page may take, so that it stays under 5 MB; those without room are left out, and it says so."""
NO_EVIDENCE = "not evidence about the paper"
"""A note that has these words makes the page's badge."""
_MOST_NAMED = 3
"""Models that the index names in its first sentence."""
EMBEDDED = "demo:"
"""What names of embedded checkpoints begin with."""


@dataclass(frozen=True, slots=True)
class State:
    """How far an experiment of the index is."""

    name: str
    title: str
    label: str
    """``done``, ``not meaningful``, ``done in part``, ``not run`` or ``left out``."""
    tone: str
    """Class of its colour."""
    said: str
    """What was found, or why there is nothing, in a line."""
    models: tuple[str, ...] = ()
    seconds: float | None = None
    """None where the run has no time for it."""

    @property
    def has_page(self) -> bool:
        """Whether it was run."""
        return self.label not in ("not run", "left out")


def experiment_pages(run: RunDirectory) -> tuple[str, dict[str, str]]:
    """The index and the pages that it links to, by their file names, of a run directory."""
    from safetyheads.files import read_json

    path = run.path / "timings.json"
    return render(run.read_results(), run.read_manifest(), read_json(path) if path.is_file() else {})


def render(results: Results, manifest: Mapping[str, Any], timings: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The index and every experiment's page by its file name; equal arguments give equal texts.

    Raises:
        InputError: the results name an experiment as no file can be named.
    """
    outcomes = results["experiments"]
    for outcome in outcomes:
        if not outcome["name"].isalnum():
            raise InputError(f"results.json has an experiment of the name {outcome['name']!r}, which is none")
    about = {"results": results, "manifest": manifest, "timings": timings}
    names = [outcome["name"] for outcome in outcomes]
    pages = {}
    for at, outcome in enumerate(outcomes):
        beside = {"before": names[at - 1] if at else None, "after": names[at + 1] if at + 1 < len(names) else None}
        pages[f"{outcome['name']}.html"] = _experiment(outcome, beside, **about)
    return _index(**about), pages


# The index.


def _index(results: Results, manifest: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
    states = list(_states(results, manifest["config"], timings))
    run = [state for state in states if state.has_page]
    models = list(dict.fromkeys(model for state in run for model in state.models))
    page = {
        "states": states,
        "models": models,
        "listed": _list(models),
        "sentence": _sentence(states, models),
        "points": list(_points(results, manifest["config"], models)),
        "has_times": any(state.seconds is not None for state in states),
        "charts": {},
        "head_columns": NO_HEADS,
        **provenance({"experiments": [state.name for state in run], "judge": results["judge"]}, _gathered(manifest)),
        **assets(),
    }
    # A page without figures has no use for the drawing library.
    page["bundle"] = ""
    return environment().get_template("experiments.html.j2").render(page) + "\n"


def _states(results: Results, config: Mapping[str, Any], timings: Mapping[str, Any]) -> Iterator[State]:
    """Every experiment of the catalogue in its order, those that it does not know last."""
    from safetyheads.experiments.catalogue import EXPERIMENTS

    outcomes = {outcome["name"]: outcome for outcome in results["experiments"]}
    left_out = {name: why for name, why in results.get("left_out", {}).items() if name not in outcomes}
    seconds = timings.get("seconds", {})
    for name, about in EXPERIMENTS.items():
        if name in outcomes:
            yield _state(outcomes.pop(name), seconds.get(name))
            continue
        if name in left_out:
            yield State(name, about.title, "left out", "soft", left_out.pop(name))
            continue
        lacking = [need for need in about.needs if need != "lm-eval" and not config.get(need)]
        if lacking:
            said = f"needs a setting that is not given: {', '.join(lacking)}"
            yield State(name, about.title, "left out", "soft", said)
        else:
            said = "needs lm-eval: pip install 'safetyheads[lm-eval]'" if "lm-eval" in about.needs else ""
            yield State(name, about.title, "not run", "soft", said)
    for name, outcome in outcomes.items():
        yield _state(outcome, seconds.get(name))
    for name, why in left_out.items():
        yield State(name, name, "left out", "soft", why)


def _state(outcome: Mapping[str, Any], seconds: float | None) -> State:
    reasons = outcome["not_meaningful"]
    has_numbers = bool(outcome["tables"] or outcome["figures"])
    label = "done in part" if reasons and has_numbers else "not meaningful" if reasons else "done"
    # What only was timed has no numbers among its results, and may have a finding.
    found = finding(outcome) if has_numbers or not reasons else ""
    said = found or next(iter([*reasons, *outcome["notes"]]), "")
    tone = "yes" if label == "not meaningful" else ""
    return State(outcome["name"], outcome["title"], label, tone, said, tuple(outcome["models"]), seconds)


def _sentence(states: Sequence[State], models: Sequence[str]) -> str:
    """How many experiments were run, and on what."""
    run = [state for state in states if state.has_page]
    if not run:
        return f"None of {len(states)} experiments was run."
    sentence = f"{len(run)} of {len(states)} experiments of the paper on {_list(models)}"
    lost = sum(state.label == "not meaningful" for state in run)
    if lost == len(run):
        return f"{sentence}; none is meaningful there."
    return f"{sentence}{f'; {lost} not meaningful there' if lost else ''}."


def _list(names: Sequence[str]) -> str:
    if len(names) > _MOST_NAMED:
        return f"{len(names)} models"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else "no model"


def _points(results: Results, config: Mapping[str, Any], models: Sequence[str]) -> Iterator[str]:
    """What all experiments share."""
    if config.get("datasets"):
        limit = config.get("limit")
        sets = f"Harmful prompts: {', '.join(config['datasets'])}, {f'at most {limit} of each' if limit else 'all'}"
        yield f"{sets}; benign: {config.get('benign')}; judge: {results['judge']}."
    if any(model.startswith(EMBEDDED) for model in models):
        yield (
            f"Models named {EMBEDDED}… are small ones made for this package, some of them with planted heads: what "
            f"they show follows from how they were made, and is {NO_EVIDENCE}."
        )
    yield "ASR, the attack success rate: the share of harmful prompts whose answer the judge takes as complying."
    yield "UA: undifferentiated attention; SC: scaling contribution, the paper's two ablations of a head."


# One experiment.


def _experiment(
    outcome: Mapping[str, Any],
    beside: Mapping[str, str | None],
    results: Results,
    manifest: Mapping[str, Any],
    timings: Mapping[str, Any],
) -> str:
    name = outcome["name"]
    figures, left_out = _figures(outcome)
    charts = {f"{at}-{number}": panel.spec for at, one in enumerate(figures) for number, panel in enumerate(one.panels)}
    page = {
        "outcome": outcome,
        "state": _state(outcome, None),
        "badge": _badge(outcome),
        "beside": beside,
        "figures": figures,
        "figures_left_out": left_out,
        "tables": [TableShown.of(table) for table in outcome["tables"]],
        "timed": [TableShown.of(table) for table in timings.get("timed", {}).get(name, ())],
        "seconds": timings.get("seconds", {}).get(name),
        "charts": charts,
        "head_columns": NO_HEADS,
        **provenance({"experiment": name, "models": outcome["models"], "judge": results["judge"]}, _own(manifest)),
        **assets(),
    }
    if not charts:
        page["bundle"] = ""
    return environment().get_template("experiment.html.j2").render(page) + "\n"


def _figures(outcome: Mapping[str, Any]) -> tuple[list[Drawn], list[str]]:
    """The figures for which there is room, and the titles of the others."""
    from safetyheads.reports.experiments_figures import drawn

    shown, left_out, room = [], [], MAX_CHART_BYTES
    for figure in outcome["figures"]:
        made = drawn(figure)
        room -= len(json.dumps([panel.spec for panel in made.panels]))
        if room < 0:
            left_out.append(figure["title"])
        else:
            shown.append(made)
    return shown, left_out


def _badge(outcome: Mapping[str, Any]) -> str:
    """In two or three words, what must not be overlooked; empty where there is nothing of the kind."""
    has_numbers = bool(outcome["tables"] or outcome["figures"])
    if outcome["not_meaningful"]:
        return "Meaningful in part only" if has_numbers else "Not meaningful on this model"
    if any(NO_EVIDENCE in note.lower() for note in outcome["notes"]):
        return NO_EVIDENCE[0].upper() + NO_EVIDENCE[1:]
    return ""


# Provenance.


def _own(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, starts and weights; what the run remembered of its batches is on the index."""
    weights = {name.removeprefix("weights_"): value for name, value in manifest.items() if name.startswith("weights_")}
    own: dict[str, Any] = {name: manifest[name] for name in ("schema_version", "provenance")}
    # Hashes with the settings: both say what the numbers are of.
    own["config"] = dict(manifest["config"]) | ({"weights sha256": weights} if weights else {})
    return own


def _gathered(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """With what the run remembered gathered by its kind: a suite has hundreds of entries."""
    own, known = _own(manifest), ("schema_version", "config", "provenance")
    found: dict[str, dict[str, Any]] = {}
    for name, value in manifest.items():
        kind, _, rest = name.partition("_")
        if name not in known and kind != "weights":
            found.setdefault(_REMEMBERED.get(kind, "other facts"), {})[rest or name] = value
    return own | dict(sorted(found.items()))


_REMEMBERED = {"economy": "tokens and answers", "plan": "plans of batches", "tolerance": "tolerances"}

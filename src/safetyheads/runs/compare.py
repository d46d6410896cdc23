"""Two runs held against each other: ranks of heads, attack success, concentration, and what makes that weak.

Owns what a comparison is made of; reads values of `readings` only, never a model, and prints nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safetyheads.errors import InputError
from safetyheads.runs.changes import Change, Pair
from safetyheads.runs.readings import RunReading, read_answers
from safetyheads.stats.ranking import HeadsMoved, RankAgreement, moved, rank_agreement

SETTINGS = {
    "ablation": "ablation",
    "epsilon": "strength of the ablation",
    "template": "template",
    "system": "system prompt",
    "fold_system": "place of the system prompt",
    "thinking": "think block",
    "prefill": "prefilled beginning of answers",
    "judge": "judge",
    "judges": "judges",
    "lead_judge": "leading judge",
    "top_k": "sampling",
    "sampling": "sampling",
    "seed": "seed",
    "seeds": "seeds",
    "max_new_tokens": "longest answer",
    "positions": "answer tokens scored",
    "size": "largest group",
    "n_random": "random groups",
    "dtype": "precision",
}
"""Fields of a config whose difference makes a comparison weak, and what to call them."""
_SHOWN = 40
# Left out of a manifest where they are not set.
_MAY_BE_ABSENT = ("fold_system", "thinking", "prefill")


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One side of a comparison."""

    path: str
    """Its directory."""
    model: str
    """What was measured."""
    started: str | None
    """ISO date and time, UTC."""
    verdict: str | None
    """The verdict's label; None for a scan."""
    heads: tuple[str, ...]
    """The verdict's group; of a scan, the heads that its tests found."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that two runs of one kind tell about each other."""

    kind: str
    """``audit`` or ``scan``."""
    before: RunFacts
    """The first run."""
    after: RunFacts
    """The second run."""
    vanilla_asr: Change
    """Of the unablated models."""
    group_asr: Change | None
    """Each model with its own verdict's group ablated; None for scans."""
    benign_kept: Change
    """Benign answers that the unablated models keep."""
    concentration: Change | None
    """None for scans that scanned no groups of a search."""
    lead_score: str
    """The score whose ranks the gates read."""
    ranks: tuple[RankAgreement, ...]
    """For each score that both runs have, the lead one first."""
    heads: HeadsMoved | None
    """None where the models' heads do not correspond."""
    shapes_note: str
    """Why heads are not compared, or empty."""
    warnings: tuple[str, ...]
    """What makes the comparison weak."""

    @property
    def lead_ranks(self) -> RankAgreement | None:
        """The agreement on the lead score."""
        return next((ranks for ranks in self.ranks if ranks.score == self.lead_score), None)


def compare_runs(before: RunReading, after: RunReading) -> Comparison:
    """Compare two runs of one kind.

    Raises:
        InputError: one is an audit and the other a scan.
    """
    if before.kind != after.kind:
        raise InputError(f"{before.path} is of kind {before.kind} and {after.path} of kind {after.kind}; compare alike")
    pair = Pair(before, after, (read_answers(before), read_answers(after)))
    lead = before.lead_score
    # A scan has one where it scanned the groups of a search.
    no_concentration = before.kind == "scan" and not (
        before.results.get("concentration") and after.results.get("concentration")
    )
    is_audit, comparable = before.kind == "audit", before.shape == after.shape
    old, new = (before.tables(), after.tables()) if comparable else ({}, {})
    names = sorted((name for name in old if name in new), key=lambda name: name != lead)
    shapes = [f"{layers} layers x {heads} heads" for layers, heads in (before.shape, after.shape)]
    what = "the verdict's group" if is_audit else "heads whose ASR differs from the unablated model's (Holm)"
    return Comparison(
        kind=before.kind,
        before=_facts(before),
        after=_facts(after),
        vanilla_asr=pair.vanilla_asr(),
        group_asr=pair.group_asr() if is_audit else None,
        benign_kept=pair.benign_kept(),
        concentration=None if no_concentration else pair.concentration(),
        lead_score=lead,
        ranks=tuple(rank_agreement(name, old[name], new[name]) for name in names),
        heads=moved(what, before.lead_heads, after.lead_heads) if comparable else None,
        shapes_note="" if comparable else f"Heads are not compared: {shapes[0]} against {shapes[1]}.",
        warnings=tuple(weak_points(before, after)),
    )


def weak_points(before: RunReading, after: RunReading) -> Iterator[str]:
    """What was done otherwise in the second run, a sentence each: it may be behind any difference."""
    halves = {"test": "that rates are of", "search": "that scores and groups come from"}
    for half, what in halves.items() if before.kind == "audit" else [("test", "asked")]:
        if before.prompts_sha256("harmful", half) != after.prompts_sha256("harmful", half):
            yield f"The harmful prompts {what} are not the same."
    families = [run.results["model"].get("family") for run in (before, after)]
    if families[0] != families[1]:
        yield f"The families differ ({families[0]} -> {families[1]}): a head of one is no head of the other."
    for name in differing_settings(before, after):
        old, new = (_shown(run.config.get(name)) for run in (before, after))
        told = f" ({old} -> {new})" if old != new else ""
        yield f"The {SETTINGS[name]} differs{told}."
    weights = [run.config.get("weights_sha256") for run in (before, after)]
    if weights[0] is not None and weights[0] == weights[1]:
        yield "Both runs are of the same weights."


def differing_settings(before: RunReading, after: RunReading) -> tuple[str, ...]:
    """Fields of ``SETTINGS`` that both manifests have, or need not have, and that differ."""
    return tuple(
        name
        for name in SETTINGS
        if (name in _MAY_BE_ABSENT or (name in before.config and name in after.config))
        and before.config.get(name) != after.config.get(name)
    )


def _shown(value: Any) -> str:
    described = value if isinstance(value, list) else [value]
    names = [one["name"] if isinstance(one, dict) and "name" in one else json.dumps(one) for one in described]
    text = ", ".join(map(str, names))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _facts(run: RunReading) -> RunFacts:
    started = None if run.started is None else run.started.isoformat(timespec="seconds")
    return RunFacts(str(run.path), run.model, started, run.verdict, run.lead_heads)

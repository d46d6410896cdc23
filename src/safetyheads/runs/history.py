"""Every finished run below a folder, oldest first. Owns their order, and what is told of each and of what was skipped.

Reads run directories only. A run that cannot be read is listed with its reason, so that one broken run hides no other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.runs.changes import Change, Pair
from safetyheads.runs.compare import SETTINGS, differing_settings
from safetyheads.runs.readings import RunReading, StoredAnswers, read_answers, read_concentration, read_run
from safetyheads.stats.ranking import top

TOP_HEADS = 3
"""Heads named for each run."""


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One finished run."""

    name: str
    """Its directory, as seen from the folder."""
    started: datetime | None
    """When it was first started, UTC."""
    model: str
    """What was measured."""
    kind: str
    """``audit`` or ``scan``."""
    verdict: str | None
    """The verdict's label; None for a scan."""
    vanilla_asr: Mapping[str, Any]
    """The unablated model's ASR, a rate with its interval."""
    group: tuple[str, ...]
    """The verdict's group; empty for a scan and where nothing was to be found."""
    group_asr: Mapping[str, Any] | None
    """ASR with that group ablated."""
    concentration: Mapping[str, Any] | None
    """As :class:`safetyheads.stats.concentration.Concentration`; None for a scan."""
    top_heads: tuple[str, ...]
    """Best heads by the lead score, less those that tie with the next one."""
    before: str | None
    """The run of the same kind before it, which ``change`` is against."""
    change: Change | None
    """Of the unablated model's ASR; None for the first run."""
    other_settings: tuple[str, ...]
    """What was done otherwise than in the run before it, in words."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"started": None if self.started is None else self.started.isoformat()}


@dataclass(frozen=True, slots=True)
class Skipped:
    """A directory that holds a run which could not be read."""

    name: str
    """The directory, as seen from the folder."""
    reason: str
    """One line."""


@dataclass(frozen=True, slots=True)
class History:
    """What is below a folder."""

    folder: Path
    """Where it was looked for."""
    entries: tuple[HistoryEntry, ...]
    """Oldest first; runs that do not tell when they were started come last."""
    skipped: tuple[Skipped, ...]
    """By name."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "folder": str(self.folder),
            "runs": [entry.as_dict() for entry in self.entries],
            "skipped": [asdict(one) for one in self.skipped],
        }


def read_history(folder: Path) -> History:
    """Every run below a folder, and the folder itself where it is one.

    Raises:
        InputError: there is no such folder, or no finished run below it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory")
    skipped: list[Skipped] = []
    read: list[tuple[RunReading, StoredAnswers]] = []
    for path in _run_directories(folder, skipped):
        try:
            run = read_run(path)
            read.append((run, read_answers(run)))
        except SafetyheadsError as error:
            skipped.append(Skipped(_name(folder, path), str(error)))
    if not read:
        found = f"; {skipped[0].name} is skipped: {skipped[0].reason}" if skipped else ""
        raise InputError(f"no finished run below {folder}{found}")
    read.sort(key=lambda one: (one[0].started or datetime.max.replace(tzinfo=UTC), str(one[0].path)))
    last: dict[str, tuple[RunReading, StoredAnswers]] = {}
    entries = []
    for run, answers in read:
        entries.append(_entry(folder, run, answers, last.get(run.kind)))
        last[run.kind] = run, answers
    return History(folder, tuple(entries), tuple(sorted(skipped, key=lambda one: one.name)))


def _run_directories(folder: Path, skipped: list[Skipped]) -> Iterator[Path]:
    """Directories with a manifest; one that cannot be listed is told, and what is inside a run is not looked at."""

    def unlisted(error: OSError) -> None:
        skipped.append(Skipped(_name(folder, Path(error.filename)), f"cannot be read: {error.strerror}"))

    for place, folders, files in os.walk(folder, onerror=unlisted):
        if "manifest.json" in files:
            yield Path(place)
            # A run below the given folder's own run is one of others still: only its parts are left out.
            folders[:] = [name for name in folders if name not in ("shards", "completions", "report")]
        folders.sort()


def _name(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else path.resolve().name


def _entry(
    folder: Path, run: RunReading, answers: StoredAnswers, earlier: tuple[RunReading, StoredAnswers] | None
) -> HistoryEntry:
    table, group = run.tables().get(run.lead_score), run.lead_group
    values = {} if table is None else {head: value for head, value in table.values.items() if value is not None}
    change, settings = None, list[str]()
    if earlier is not None:
        change = Pair(earlier[0], run, (earlier[1], answers)).vanilla_asr()
        settings = [SETTINGS[name] for name in differing_settings(earlier[0], run)]
        settings += ["prompts"] * (earlier[0].prompts_sha256() != run.prompts_sha256())
    return HistoryEntry(
        name=_name(folder, run.path),
        started=run.started,
        model=run.model,
        kind=run.kind,
        verdict=run.verdict,
        vanilla_asr=run.vanilla_asr,
        group=run.lead_heads if group is not None else (),
        group_asr=None if group is None else group["asr"],
        concentration=read_concentration(run, answers),
        top_heads=top(values, TOP_HEADS, 0.0 if table is None else table.resolution),
        before=None if earlier is None else _name(folder, earlier[0].path),
        change=change,
        other_settings=tuple(dict.fromkeys(settings)),
    )

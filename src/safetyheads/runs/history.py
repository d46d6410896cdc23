"""Lists every finished run below a folder, oldest first.

A run that cannot be read is listed with the reason, so that one broken run hides no other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.runs.compare import SETTINGS, Change, differing_settings, vanilla_asr_change
from safetyheads.runs.reader import RunReader
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
    """The model's directory or name."""
    kind: str
    """``audit`` or ``scan``."""
    verdict: str | None
    """The verdict's label; None for a scan."""
    vanilla_asr: Mapping[str, Any]
    """The unablated model's ASR, a rate with its interval."""
    group: tuple[str, ...]
    """The verdict's group; empty for a scan and where no group was found."""
    group_asr: Mapping[str, Any] | None
    """ASR with that group ablated."""
    concentration: Mapping[str, Any] | None
    """As :class:`safetyheads.stats.concentration.Concentration`; None for a scan without the groups of a search."""
    top_heads: tuple[str, ...]
    """Best heads by the lead score, without those that tie with the next one."""
    before: str | None
    """The previous run of the same kind, which ``change`` is against."""
    change: Change | None
    """Change of the unablated model's ASR; None for the first run."""
    other_settings: tuple[str, ...]
    """Settings that differ from the previous run, in words."""


@dataclass(frozen=True, slots=True)
class History:
    """The runs below a folder."""

    folder: Path
    entries: tuple[HistoryEntry, ...]
    """Oldest first; runs without a start time come last."""
    skipped: tuple[Mapping[str, str], ...]
    """Name and reason of each run that could not be read, by name."""

    def as_dict(self) -> dict[str, Any]:
        """The value as JSON."""
        runs = [asdict(entry) | {"started": entry.started and entry.started.isoformat()} for entry in self.entries]
        return {"folder": str(self.folder), "runs": runs, "skipped": list(self.skipped)}


def read_history(folder: Path) -> History:
    """Every run below a folder, and the folder itself where it is one.

    Raises:
        InputError: there is no such folder, or no finished run below it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory")
    skipped: list[dict[str, str]] = []

    def skip(path: str | Path, reason: str) -> None:
        skipped.append({"name": _name(folder, Path(path)), "reason": reason})

    runs: list[RunReader] = []
    walk = os.walk(folder, onerror=lambda error: skip(error.filename, f"cannot be read: {error.strerror}"))
    for place, folders, files in walk:
        if "manifest.json" in files:
            # Other runs may stand below a run, so only its own folders are left out.
            folders[:] = [name for name in folders if name not in ("shards", "completions", "report")]
            try:
                run = RunReader(Path(place))
                _ = run.stored_outcomes  # broken answers must be found here
                runs.append(run)
            except SafetyheadsError as error:
                skip(place, str(error))
        folders.sort()
    if not runs:
        reason = f"; {skipped[0]['name']} is skipped: {skipped[0]['reason']}" if skipped else ""
        raise InputError(f"no finished run below {folder}{reason}")
    runs.sort(key=lambda run: (run.started or datetime.max.replace(tzinfo=UTC), str(run.path)))
    entries, previous = [], dict[str, RunReader]()
    for run in runs:
        entries.append(_entry(folder, run, previous.get(run.kind)))
        previous[run.kind] = run
    return History(folder, tuple(entries), tuple(sorted(skipped, key=lambda run: run["name"])))


def _name(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder)) if path != folder else path.resolve().name


def _entry(folder: Path, run: RunReader, previous: RunReader | None) -> HistoryEntry:
    table, group = run.tables().get(run.lead_score), run.lead_group
    settings = []
    if previous is not None:
        settings = [SETTINGS[name] for name in differing_settings(previous, run)]
        settings += ["prompts"] * (previous.prompts_sha256() != run.prompts_sha256())
    return HistoryEntry(
        name=_name(folder, run.path),
        started=run.started,
        model=run.model,
        kind=run.kind,
        verdict=run.verdict,
        vanilla_asr=run.vanilla_asr,
        group=run.lead_heads if group is not None else (),
        group_asr=None if group is None else group["asr"],
        concentration=run.concentration,
        top_heads=() if table is None else top(table.values, TOP_HEADS, table.resolution),
        before=None if previous is None else _name(folder, previous.path),
        change=None if previous is None else vanilla_asr_change(previous, run),
        other_settings=tuple(dict.fromkeys(settings)),
    )

"""Lists every finished run below a folder, oldest first.

A run that cannot be read is listed with the reason, so that one broken run hides no other.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetyheads.errors import InputError, SafetyheadsError, unicode_text
from safetyheads.files import canonical_json
from safetyheads.runs.compare import SETTINGS, differing_settings, vanilla_asr_change
from safetyheads.runs.reader import RunReader
from safetyheads.runs.stored_files import as_damaged
from safetyheads.stats.ranking import top

TOP_HEADS = 3
"""Heads named for each run."""


def read_history(folder: Path, alike: Sequence[str] = ()) -> dict[str, Any]:
    """Every run below a folder, and the folder itself where it is one, as JSON.

    ``runs`` (:func:`_entry`), oldest first, and last those without a start time; ``skipped``: name and reason of each
    run that could not be read. A run's change is against the last one of its kind with the same settings ``alike``.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory")
    skipped: list[dict[str, str]] = []

    def skip(path: str | Path, reason: str) -> None:
        skipped.append({"name": _name(folder, Path(path)), "reason": reason})

    found: list[tuple[datetime, str, RunReader]] = []
    walk = os.walk(folder, onerror=lambda error: skip(error.filename, f"cannot be read: {error.strerror}"))
    for place, folders, files in walk:
        if "manifest.json" in files:
            # Other runs may stand below a run, so only its own folders are left out.
            folders[:] = [name for name in folders if name not in ("shards", "completions", "report")]
            try:
                with as_damaged(place):
                    run = RunReader(Path(place))
                    found.append((run.started or datetime.max.replace(tzinfo=UTC), place, run))
            except SafetyheadsError as error:
                skip(place, str(error))
        folders.sort()
    entries, previous = [], dict[tuple[str, ...], RunReader]()
    found.sort(reverse=True)
    while found:  # the oldest first; its answers leave the memory with it, once the next one is compared
        _, place, run = found.pop()
        try:
            with as_damaged(place):
                key = (run.kind, *(canonical_json(run.config.get(name)) for name in alike))
                _ = run.stored_answers  # what is broken must be found here
                entries.append(_entry(folder, run, previous.get(key)))
            previous[key] = run
        except SafetyheadsError as error:
            skip(place, str(error))
    if not entries:
        reason = f"; {skipped[0]['name']} is skipped: {skipped[0]['reason']}" if skipped else ""
        raise InputError(f"no finished run below {folder}{reason}")
    return {"folder": str(folder), "runs": entries, "skipped": sorted(skipped, key=lambda run: run["name"])}


def _name(folder: Path, path: Path) -> str:
    return unicode_text(str(path.relative_to(folder)) if path != folder else path.resolve().name)


def _entry(folder: Path, run: RunReader, previous: RunReader | None) -> dict[str, Any]:
    """A run: its leading group and heads, and what changed since the ``previous`` run of its kind.

    ``top_heads`` are the best by the lead score, without those that tie with the next one; ``change`` is of the
    unablated model's ASR; ``other_settings`` names what differs from the previous run.
    """
    table, group = run.tables().get(run.lead_score), run.lead_group
    settings = []
    if previous is not None:
        settings = [SETTINGS[name] for name in differing_settings(previous, run)]
        settings += ["prompts"] * (previous.prompts_sha256() != run.prompts_sha256())
    return {
        "name": _name(folder, run.path),
        "started": None if run.started is None else run.started.isoformat(),
        "model": run.model,
        "kind": run.kind,
        "ablation": str(run.config.get("ablation") or "").replace("_", " "),
        "provenance": run.provenance(),
        "verdict": run.verdict,
        "vanilla_asr": run.coherent_asr,
        "group": run.lead_heads if group is not None else (),
        "group_asr": None if group is None else group["coherent_asr"],
        "concentration": run.concentration,
        "top_heads": () if table is None else top(table.values, TOP_HEADS, table.resolution),
        "before": None if previous is None else _name(folder, previous.path),
        "change": None if previous is None else asdict(vanilla_asr_change(previous, run)),
        "other_settings": tuple(dict.fromkeys(settings)),
    }

"""Joins the directories of a run's shards: one file of each unit, once all that hold it agree."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetyheads.errors import IncompleteError, InputError
from safetyheads.files import leaves
from safetyheads.runs.directory import RunDirectory, differences_of, stage_of
from safetyheads.runs.shards import array_text, owners
from safetyheads.runs.stored_files import content_key

_MAY_DIFFER = ("device", "versions")
_SHOWN = 6
# Numbers of other devices or versions agree within so much.
_CLOSE = 1e-5
_NEAR_TIES = "remembered/tolerance_"


def merge(out: Path, folders: Sequence[Path], provenance: Mapping[str, Any], mixed: bool = False) -> int:
    """Join runs of the same settings into ``out``, which may hold a part of the run; returns the number of its files.

    Nothing is written unless :func:`joinable` finds that all fits.
    """
    return joinable(out, folders, mixed)(provenance)


def joinable(out: Path, folders: Sequence[Path], mixed: bool = False) -> Callable[[Mapping[str, Any]], int]:
    """Look at runs that are to be joined, and give what joins them; raises InputError unless all fits.

    No file is damaged, no two disagree about one unit, and every unit of the plan is in some directory. ``mixed`` lets
    runs of other devices or versions of libraries take part; the results say so. Then numbers of one unit may differ by
    1e-5, the first run's being kept; of limits of near-ties, which each machine measures, the largest holds.
    """
    runs = [RunDirectory.look(folder) for folder in [*[out] * (out / "manifest.json").exists(), *folders]]
    first = runs[0]
    differing = sorted({difference for run in runs[1:] for difference in _differences(first, run, mixed)})
    holders: dict[str, RunDirectory] = {}
    for run in runs:
        run.load_stages()
        for place in run.places():
            holder, content = holders.setdefault(place, run), _content(run, place)
            if holder is not run and content != _content(holder, place):
                kept = _kept(holder, run, place) if mixed else None
                if kept is None:
                    raise InputError(_disagreement(holder, run, place))
                holders[place] = kept
    _refuse_gaps(runs[-len(folders) :], set(holders))
    return partial(_join, out, runs, holders, differing)


def _join(
    out: Path,
    runs: Sequence[RunDirectory],
    holders: Mapping[str, RunDirectory],
    differing: Sequence[str],
    provenance: Mapping[str, Any],
) -> int:
    with RunDirectory.start(out, runs[0].config, provenance, "merge") as merged:
        for place, run in sorted(holders.items()):
            if not run.path.samefile(out):
                merged.take(place, run)
        for run in runs:
            if not run.path.samefile(out):
                merged.take_plan(run)
        if differing:
            merged.remember(f"mixed_{content_key({'differing': differing})}", differing)
    return len(holders)


def _differences(first: RunDirectory, run: RunDirectory, mixed: bool) -> list[str]:
    """Versions and devices in which two runs differ; other settings are refused, and so are these unless asked for."""
    if run.key == first.key:
        return []
    configs = [{**each.config, **dict.fromkeys(_MAY_DIFFER)} for each in (first, run)]
    names = f"{first.path} and {run.path}"
    if settings := differences_of(*configs):
        raise InputError(f"{names} are runs with other settings: {', '.join(settings[:_SHOWN])}")
    differing = differences_of(first.config, run.config)
    if not mixed:
        raise InputError(f"{names} are of other versions or devices: {', '.join(differing)}; --mixed joins them")
    return differing


def _content(run: RunDirectory, place: str) -> Any:
    """What a file holds, as values that compare."""
    content = run.read(place)
    return content if isinstance(content, list) else {name: tensor.tolist() for name, tensor in content.items()}


def _differing(first: RunDirectory, other: RunDirectory, place: str) -> list[tuple[Any, Any]]:
    """Values of two files of one unit that differ; None is one that a file lacks."""
    sides = [dict(leaves(_content(run, place))) for run in (first, other)]
    names = sorted(sides[0].keys() | sides[1].keys())
    return [(sides[0].get(name), sides[1].get(name)) for name in names if sides[0].get(name) != sides[1].get(name)]


def _kept(first: RunDirectory, other: RunDirectory, place: str) -> RunDirectory | None:
    """Of two runs on other devices or versions, whose file of a unit holds; None where they disagree."""
    pairs, is_limit = _differing(first, other, place), place.startswith(_NEAR_TIES)
    if not all(isinstance(a, float) and isinstance(b, float) for a, b in pairs):
        return None
    if is_limit:
        return other if pairs[0][1] > pairs[0][0] else first
    return first if all(abs(a - b) <= _CLOSE for a, b in pairs) else None


def _disagreement(first: RunDirectory, other: RunDirectory, place: str) -> str:
    """Two files of one unit that differ, and by how much."""
    pairs, count = _differing(first, other, place), len(list(leaves(_content(first, place))))
    numbers = [abs(a - b) for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
    most = f", numbers by at most {max(numbers):.3g}" if numbers else ""
    why = ""
    if place.startswith("remembered/"):
        why = (
            "; they laid out their batches for other free memory, threads or kinds of device: give each the same "
            "--memory and --threads, on CPUs alone or on GPUs alone"
        )
    where = f"{first.path} and {other.path} disagree about {place}"
    return f"{where}: {len(pairs)} of {count} values differ{most}{why}"


def _refuse_gaps(runs: Sequence[RunDirectory], there: set[str]) -> None:
    """Raise where a unit is in no directory, of a stage that all have reached; others go on once they are joined."""
    missing, count = list[int](), max(run.n_shards for run in runs)
    stages = set()
    planned = [{content_key({stage: sorted(units.items())}): units for stage, units in run.planned()} for run in runs]
    planned = [reached for reached in planned if reached] or [{}]  # a shard that was killed at once has no say
    for key in set.intersection(*map(set, planned)):
        units = planned[0][key]
        owner = owners(units, count)
        lacking = [place for places in units for place in places if place not in there]
        missing += [owner[place] for place in lacking]
        stages |= set(map(stage_of, lacking))
    if missing:
        shards = f"run shards {array_text(missing)} of {count} again" if count > 1 else "run it again"
        raise IncompleteError(f"units of {', '.join(sorted(stages)[:_SHOWN])} are in no directory: {shards}")

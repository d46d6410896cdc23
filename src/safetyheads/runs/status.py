"""Says how far a run is, from the files of its directory alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetyheads.display import duration
from safetyheads.errors import InputError
from safetyheads.files import as_input_error, parse_json, read_regular
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.shards import array_text, owners


class Status(NamedTuple):
    """How far a run is. Stages that no process reached yet are not in it: their units depend on earlier ones."""

    finished: bool
    stages: dict[str, dict[str, int]]
    """By stage: ``units``, and how many are ``done``, ``running`` and ``missing``."""
    shards: int
    """Number of shards that it was divided into."""
    missing_shards: str
    """Shards that units are missing of, as SLURM takes the tasks of an array: ``2,5-7``."""
    seconds_a_unit: float | None
    """Mean, of the units whose times are known."""
    seconds_left: float | None
    """Of the known units that are missing, by their counted cost, on as many processes as there are shards."""

    @property
    def lines(self) -> list[str]:
        """What a reader is told."""
        total = Counter[str]()
        for counts in self.stages.values():
            total.update(counts)
        names = ("done", "running", "missing")
        lines = [
            f"{stage}: {counts['units']} units, " + ", ".join(f"{counts[name]} {name}" for name in names)
            for stage, counts in self.stages.items()
        ]
        lines.append(f"{total['done']} of {total['units']} known units are done")
        if self.seconds_a_unit is not None:
            left = "" if self.seconds_left is None else f"; about {duration(self.seconds_left)} left for known units"
            lines[-1] += f", {duration(self.seconds_a_unit)} each{left}"
        if self.missing_shards and self.shards == 1:
            lines.append("the run's own command goes on with the missing units")
        elif self.missing_shards:
            lines.append(
                f"missing are units of shards {self.missing_shards} of {self.shards}: --array={self.missing_shards}"
            )
        elif not self.finished:
            lines.append("no known unit is missing: run the array again, and the next stage's units are known")
        if self.finished:
            lines.append("the run has finished")
        return lines


def status_of(folder: Path) -> Status:
    """How far the run in a folder is."""
    directory = RunDirectory.look(folder)
    there = set(_stored_places(folder))
    count, (seconds, begun) = directory.n_shards, _read_logs(folder)
    stages: dict[str, dict[str, int]] = {}
    missing, cost_left, cost_timed, seconds_timed, n_timed = list[int](), 0.0, 0.0, 0.0, 0
    for stage, units in directory.planned():
        owner = owners(units, count)
        counts = stages.setdefault(stage, dict.fromkeys(("units", "done", "running", "missing"), 0))
        for places, cost in units.items():
            lacking = [place for place in places if place not in there]
            counts["units"] += 1
            counts["done" if not lacking else "running" if begun.issuperset(lacking[:1]) else "missing"] += 1
            if lacking:
                missing.append(owner[places[0]])
                cost_left += cost
            elif took := sum(seconds.get(place, 0.0) for place in places):
                cost_timed, seconds_timed, n_timed = cost_timed + cost, seconds_timed + took, n_timed + 1
    left = cost_left * seconds_timed / cost_timed / count if cost_timed else None
    return Status(
        finished=(folder / "results.json").exists(),
        stages=dict(sorted(stages.items())),
        shards=count,
        missing_shards=array_text(missing),
        seconds_a_unit=seconds_timed / n_timed if n_timed else None,
        seconds_left=left,
    )


def _stored_places(folder: Path) -> Iterator[str]:
    """Files of records and tensors that are there; not opened."""
    for path in filter(Path.is_dir, (folder / "completions", *(folder / "shards").glob("*"))):
        with as_input_error(path, "read"), os.scandir(path) as entries:
            prefix = path.relative_to(folder).as_posix()
            yield from (f"{prefix}/{entry.name}" for entry in entries if not entry.name.startswith("."))


def _read_logs(folder: Path) -> tuple[dict[str, float], set[str]]:
    """Seconds of each file that was computed, and files that are in work.

    A start that was killed looks as if it worked on. Only the order of the lines of one process is used, so clocks of
    several machines need not agree.
    """
    seconds, begun = dict[str, float](), set[str]()
    for path in sorted((folder / "starts").glob("[!.]*.jsonl")):
        working = set[str]()
        for line in read_regular(path).splitlines():
            with suppress(InputError):  # the last line of a process that was killed
                noted = parse_json(line, path)
                place = str(noted.get("place"))
                if "seconds" in noted:
                    seconds[place] = float(noted["seconds"])
                    working.discard(place)
                else:
                    working = {place}
        begun |= working
    return seconds, begun

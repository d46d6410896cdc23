"""Divides the units of a run among processes: each computes alone which units are its own.

A unit is what one stored file needs: a batch of groups in a pass, or a chunk of answers. Processes share a run
directory, or have one each that ``merge`` joins.
"""

import heapq
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Self, TypeAlias

from safetyheads.errors import InputError, SafetyheadsError, shorten
from safetyheads.judges.base import Judge
from safetyheads.runs.stored_files import content_key

Units: TypeAlias = Mapping[tuple[str, ...], float]
"""Files of each unit -> what it costs: tokens that run through the whole model, as counted."""

# Index of a task, number of tasks, and the first index, of the systems that start many processes alike.
_ARRAYS = (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"), ("RANK", "WORLD_SIZE", None))
_LAST = "SLURM_ARRAY_TASK_MAX"


class Shard:
    """One of ``count`` processes that work on a run; by default the only one."""

    def __init__(self, index: int = 1, count: int = 1, wait: float = 0.0) -> None:
        """The ``index`` is 1 to ``count``, or 0 for a process that plans and computes no unit.

        ``wait`` is for how many seconds without a new file the process waits for what others compute.
        """
        if count < 1 or not 0 <= index <= count:
            raise InputError(f"a shard is I/N with I from 1 to N, or 0/N to plan alone; got {index}/{count}")
        if not wait >= 0:
            raise InputError(f"--wait is a number of seconds; got {wait:g}")
        self.index, self.count, self.wait = index, count, wait
        self.alone = count == 1
        """Whether no other process is meant to work on the run."""
        self.part = "run" if count == 1 and index else f"shard-{index}-of-{count}"
        """What the process is called in the run directory."""
        self.begins_with = 0.0
        """Where it begins among several tasks, as a share of them."""
        self._owners: dict[str, int] = {}

    @classmethod
    def parse(cls, text: str | None, wait: float = 0.0, environment: Mapping[str, str] = os.environ) -> Self:
        """A shard as ``--shard`` takes it: ``I/N``, or ``env`` for what the job's environment says."""
        if text is None:
            return cls(wait=wait)
        if text == "env":
            return cls(*_of_environment(environment), wait=wait)
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None:
            raise InputError(f"a shard is I/N, such as 3/8, or env; got {text!r}")
        return cls(int(match[1]), int(match[2]), wait)

    def divide(self, units: Units) -> None:
        """Divide units among the shards; one that is divided stays where it is."""
        self._owners |= owners(units, self.count) | self._owners

    def takes(self, place: str, again: bool = False) -> bool:
        """Whether this process computes the unit of a file; what nobody divided is cheap, and everybody's.

        ``again`` is for a file that is there and holds failed verdicts.
        """
        return self._owners.get(place, self.index) == self.index

    def sees_in_hand(self, _: str) -> bool:
        """Whether another process is known to be at the unit of a file."""
        return False

    def wrote(self, place: str) -> None:
        """Told that a file of a unit was written here."""

    def asked(self, judges: Sequence[Judge]) -> Sequence[Judge]:
        """Judges as this process asks them: it holds them, unless others do."""
        return judges

    def within(self, _: Path) -> Self:
        """The same share of another run, one of several that this process carries out in directories of their own."""
        return self

    def gives_back(self, _: SafetyheadsError) -> bool:
        """Whether the unit that failed goes to others or is tried again, so that the run is not over."""
        return False

    def failures(self, error: SafetyheadsError) -> SafetyheadsError:
        """What keeps a run from its end: what was raised, or what others failed on."""
        return error

    def ends_waiting(self, missing: Iterable[str], seconds: float) -> bool:
        """Whether to end without the files of others that are missing, after seconds in which none appeared."""
        return seconds >= self.wait


def owners(units: Units, count: int) -> dict[str, int]:
    """The shard, from 1 on, of each file: units in falling cost, equal ones by name, each to the least loaded shard.

    Of shards that are loaded alike the first one is another for each set of units, so that small stages do not all
    fall to one.
    """
    order = sorted(units, key=lambda places: (-units[places], places))
    first = int(content_key({"units": order}), 16) % count
    loads = [(0.0, turn) for turn in range(min(count, len(units)))]
    found: dict[str, int] = {}
    for places in order:
        load, turn = heapq.heappop(loads)
        found |= dict.fromkeys(places, (first + turn) % count + 1)
        heapq.heappush(loads, (load + units[places], turn))
    return found


def array_text(indices: list[int]) -> str:
    """Indices as a job array takes them: ``1,4-6``."""
    # Consecutive numbers differ from their places by the same amount.
    by_distance = groupby(enumerate(sorted(set(indices))), lambda pair: pair[1] - pair[0])
    runs = [[index for _, index in run] for _, run in by_distance]
    return ",".join("-".join(map(str, dict.fromkeys((run[0], run[-1])))) for run in runs)


def _of_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    arrays = [array for array in _ARRAYS if array[0] in environment and array[1] in environment]
    if not arrays:
        names = " nor ".join(f"{index} with {count}" for index, count, _ in _ARRAYS)
        raise InputError(f"--shard env needs a job array: the environment has neither {names}")
    several = [f"{count} {environment[count]}" for _, count, _ in arrays if _count(environment, count) > 1]
    if len(several) > 1:
        raise InputError(f"--shard env finds several arrays ({', '.join(several)}): say --shard I/N itself")
    index_name, count_name, first_name = arrays[0]
    index, count = _count(environment, index_name), _count(environment, count_name)
    first = _count(environment, first_name) if first_name and first_name in environment else 0
    last = _count(environment, _LAST) if first_name and _LAST in environment else first + count - 1
    if first not in (0, 1) or last - first + 1 != count or not first <= index <= last:
        raise InputError(
            f"the job array has tasks {first} to {last} and {count} of them: a part of an array has to say --shard "
            f"I/N itself, such as --shard ${index_name}/N"
        )
    return index - first + 1, count


def _count(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,9}", environment[name]):
        raise InputError(f"{name} of the environment is no such number: {shorten(repr(environment[name]))}")
    return int(environment[name])

"""Reads and writes the directory of a run, so that a run survives a kill and starts again where it was."""

import logging
import os
import re
import socket
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias, TypedDict, TypeVar

import msgspec
from filelock import FileLock, Timeout

from safetyheads.errors import ElsewhereError, IncompleteError, InputError, shorten
from safetyheads.files import (
    PARTIAL,
    as_input_error,
    canonical_json,
    leaves,
    parse_json,
    read_regular,
    readable_json,
    remove_partial_files,
    write_atomically,
    write_page,
)
from safetyheads.runs.config import duration
from safetyheads.runs.shards import Shard, Units, array_text, owners
from safetyheads.runs.stored_files import (
    KEY_DIGITS,
    DamagedError,
    Fits,
    Held,
    Record,
    as_damaged,
    content_key,
    converted,
    pack_records,
    pack_tensors,
    unpack_records,
    unpack_tensors,
    with_checksums,
    without_checksums,
)

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA_VERSION = 8
"""Version of the layout of a run directory, of its records and of ``results.json``; another version is refused."""

_LOCK = ".lock-"
_GITIGNORE = b"*\n"
_DIFFERENCES_SHOWN = 6
_REMEMBERED = "remembered"
_LONGEST_NAME = 80
_FOLDERS: dict[str, tuple[Callable[..., bytes], Callable[[bytes], tuple[Held, Any]]]] = {
    **dict.fromkeys(("completions", _REMEMBERED), (pack_records, unpack_records)),
    "shards": (pack_tensors, unpack_tensors),
}
"""Folders of stored parts, and how a file there is made and read."""

_POLL_SECONDS = 0.5
# Settings of the harmful prompts; what is found out about them has "harmful" in its name.
_OF_HARMFUL = ("prompts", "column", "context_column", "category_column")

_log = logging.getLogger(__name__)
Value = TypeVar("Value")
_Unit: TypeAlias = tuple[tuple[str, ...], float]


class Start(TypedDict, total=False):
    """What a start of a run says of itself; its file holds more, for people to read."""

    part: str
    """The shard, or what else the process did."""
    started: datetime
    command: list[str] | str
    host: str
    pid: int
    device: str
    versions: dict[str, Any]


@dataclass(slots=True)
class Verification:
    """What :meth:`RunDirectory.verify` found."""

    n_files: int = 0
    finished: bool = False
    damaged: dict[str, str] = field(default_factory=dict)
    """What is wrong, by file."""
    unlisted: list[str] = field(default_factory=list)
    """Whole files of no finished stage, such as an unfinished run has."""


class RunDirectory:
    """One run's directory: ``start`` one to write, ``open`` a finished one to read.

    ``manifest.json`` holds what the numbers depend on; ``shards/``, ``completions/`` and ``remembered/`` hold what was
    computed so far, a file a key. ``plan/`` lists the units of each stage that was reached, ``stages/`` the files of
    each finished one, and ``results.json`` is written last. Dates, seconds and machines are in ``starts/`` and
    ``timings.json`` alone: all other files are the same bytes each time. Every file has checksums; one that does not
    fit is set aside and computed again, or refused.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], lock: FileLock | None = None, shard: Shard | None = None
    ) -> None:
        """``config`` is what all numbers depend on: all settings, and fingerprints of model and prompts."""
        self.path, self.config, self._lock, self.shard = path, config, lock, shard or Shard()
        self._log_path = path / "starts" / f"{time.time_ns()}-{os.getpid()}.jsonl"
        self._nested = 0
        self._divided: set[str] = set()
        self._results_lock = FileLock(path / f"{_LOCK}results", mode=0o600, thread_local=False)
        self.key = content_key(config)
        """Names the run in each of its files."""
        self._files: dict[str, tuple[int, str]] = {}
        """Number of entries and checksum by place: files of finished stages, and those that this process read or wrote.
        """
        self._results: dict[str, Any] | None = None
        self._lenders: list[tuple[RunDirectory, str]] = []
        """Runs to read from, and what a file's place has to say."""

    @classmethod
    def start(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        part: str | None = None,
        shard: Shard | None = None,
    ) -> Self:
        """Create the run's directory, or continue the run of the same ``config`` that is there.

        ``config`` is all that the numbers depend on. ``provenance`` may differ, so each start adds its own. Processes
        that do different parts may work in one directory, such as the shards of a run.
        """
        folder, shard = Path(path), shard or Shard()
        part = part or shard.part
        _refuse_other_files(folder)
        created = not folder.exists()
        with as_input_error(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not thread-local: another thread may close the run. The lock ends with the process, however that ends.
        lock = FileLock(folder / f"{_LOCK}{_file_name(part)}", mode=0o600, thread_local=False)
        with as_input_error(folder):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise InputError(f"{folder} is in use by {_holder(folder, part)}") from None
        try:
            with as_input_error(folder):
                folder.chmod(0o700)
                remove_partial_files(folder)
            write_atomically(folder / ".gitignore", _GITIGNORE)
            run = cls(folder, _kept_manifest(folder, config), lock, shard)
            run.load_stages()
            start = {"part": part, "started": datetime.now(UTC).isoformat(), **provenance}
            start |= {"host": socket.gethostname(), "pid": os.getpid()}
            # Runs that are merged may differ in these; the log beside it names the files that were computed here.
            start |= {name: config[name] for name in ("device", "versions") if name in config}
            run._write_json(f"starts/{run._log_path.stem}.json", start)
            run._log_path.touch(mode=0o600)
        except BaseException:
            lock.release()
            if created and not (folder / "manifest.json").exists():
                with suppress(OSError):
                    for file in filter(_is_ours, folder.iterdir()):
                        file.unlink()
                    folder.rmdir()
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """A finished run, to be read; only its report can be written. IncompleteError where it has no results yet."""
        folder = Path(path)
        run = cls.look(folder)
        with as_input_error(folder, "read"):
            if not os.path.lexists(folder / "results.json"):
                raise IncompleteError(f"{folder}: this run has not finished; start it again with the same command")
        try:
            run._read_finished()
        except DamagedError:
            run._read_finished()  # another process may have been writing both
        return run

    @classmethod
    def look(cls, path: str | os.PathLike[str]) -> Self:
        """A run that may be unfinished, to be read."""
        folder = Path(path)
        with as_input_error(folder, "read"):
            if not (folder / "manifest.json").is_file():
                raise InputError(f"{folder} is not a run directory: it has no manifest.json")
            return cls(folder, _read_manifest(folder))

    def close(self) -> None:
        """Release the run's part for other processes; what was written stays."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # What is remembered.

    def remember(self, name: str, value: Value, fits: Callable[[Value], bool] | None = None) -> Value:
        """Store ``value`` under ``name`` the first time, and return the stored value every time.

        The plan of a run's batches is stored here: another plan would move results in their last bits. A stored value
        that is of another type, or does not ``fit``, is set aside.
        """

        def fitting(lines: Sequence[Record]) -> bool:
            told = converted(lines[0]["value"], type(value))
            return fits is None or fits(told)

        line = {"name": name, "value": msgspec.to_builtins(value)}
        (record,) = self._stored(_remembered_place(name), lambda: [line], fitting, replaces=False)
        return converted(record["value"], type(value))

    def recalled(self, name: str, kind: type[Value], fits: Callable[[Value], bool] | None = None) -> Value | None:
        """What is stored under ``name``; None where that is nothing, or is of another type or does not fit."""
        with suppress(DamagedError), as_damaged(name):
            value = converted(self.read(_remembered_place(name))[0]["value"], kind)
            return value if fits is None or fits(value) else None
        return None

    def remembered(self, prefix: str = "") -> dict[str, Any]:
        """What was remembered under names that begin so."""
        found, begun = dict[str, Any](), f"{_REMEMBERED}/{as_file_name(prefix)[:_LONGEST_NAME]}"
        for place in sorted(self._files) if self._lock is None else self._names(f"{_REMEMBERED}/*.jsonl"):
            if place.startswith(begun):
                with self._setting_aside(place), as_damaged(self.path / place):
                    (line,) = self.read(place)
                    found[str(line["name"])] = line["value"]
        return {name: value for name, value in found.items() if name.startswith(prefix)}

    # Parts, a file a key.

    def tensors(
        self,
        stage: str,
        fields: Mapping[str, Any],
        compute: Callable[[], Mapping[str, "Tensor"]],
        fits: Callable[[Mapping[str, "Tensor"]], bool] | None = None,
    ) -> dict[str, "Tensor"]:
        """The tensors that ``fields`` and the run's config determine: read if stored, else computed and stored.

        Either way they are what reading gives: contiguous, on the CPU. Stored ones that do not ``fit`` are set aside.
        """
        return self._stored(tensors_place(stage, fields), compute, fits)

    def records(
        self,
        stage: str,
        fields: Mapping[str, Any],
        compute: Callable[[], Sequence[Record]],
        mend: Callable[[list[Record]], Sequence[Record]] | None = None,
        has_failed: Callable[[Record], bool] | None = None,
        fits: Callable[[list[Record]], bool] | None = None,
    ) -> list[Record]:
        """The records that ``fields`` determine, as :meth:`tensors`; one line of JSON each.

        ``mend`` is given stored records, if any ``has_failed``, and returns what they should be, which is stored
        instead. One shard mends a file; others go on with what is there, unless one is at it.
        """
        place = records_place(stage, fields)
        is_there = self._is_there(place)
        records: list[Record] = self._stored(place, compute, fits)
        if not is_there or mend is None or not (has_failed is None or any(map(has_failed, records))):
            return records
        if self.shard.takes(place, again=True):
            if (mended := mend(records)) != records:
                self._write(place, self._packed(place, mended))
                records = self.read(place)
            self.shard.wrote(place)
            return records
        if self.shard.sees_in_hand(place):
            raise _elsewhere({place})
        return self.read(place)

    def stored_records(self, stage: str = "*", but: tuple[str, ...] = ()) -> Iterator[Record]:
        """Every record of finished stages of that name (``*`` stands for any letters), and of those in work here.

        Stages whose names begin as one of ``but`` are left out.

        A run in work goes on without a file that is lost or damaged, says so, and computes it when next asked for it;
        where it is only read, that is an InputError.
        """
        for place in sorted(self._files):
            is_meant = fnmatch(stage_of(place), stage) and not stage_of(place).startswith(but)
            if place.startswith("completions/") and is_meant:
                records: list[Record] = []
                with self._setting_aside(place):
                    records = self.read(place)
                yield from records

    def divide(self, stage: str, units: Units) -> None:
        """Divide the units of a stage among the shards, before any of them is computed, and list them in the plan."""
        if new := {places: cost for places, cost in units.items() if not self._divided.issuperset(places)}:
            self._divided |= {place for places in new for place in places}
            self.shard.divide(new)
            listed = [[list(places), cost] for places, cost in sorted(new.items())]
            place = f"plan/{stage}-{content_key({'units': listed})}.json"
            with suppress(InputError):
                self._read_json(place)
                return
            self._write_json(place, {"stage": stage, "units": listed})

    @property
    def n_shards(self) -> int:
        """Number of shards of which the last start was one; where nobody computed yet, those planned for."""
        pattern = re.compile(r"run|shard-(\d{1,9})-of-([1-9]\d{0,8})")
        parts = [pattern.fullmatch(start.get("part", "")) for start in self.read_starts()]
        counts = [(part[1] != "0", int(part[2] or 1)) for part in parts if part]
        return ([count for computes, count in counts if computes] or [count for _, count in counts] or [1])[-1]

    def planned(self) -> list[tuple[str, Units]]:
        """Every stage that was reached, and its units as the process found them that reached it."""
        return [(Path(place).stem.rpartition("-")[0], self._units(place)) for place in self._names("plan/*.json")]

    def _units(self, place: str) -> Units:
        return dict(self._fitting(f"{place}: units", self._read_json(place).get("units"), list[_Unit]))

    # Joining the directories of shards.

    def take(self, place: str, other: Self) -> None:
        """Copy a stored part of another run; of a run of other versions it is written as one of this run."""
        if other.key == self.key:
            self._write(place, read_regular(other._inside(place), follows_links=False, most=None))
        else:
            self._write(place, self._packed(place, other.read(place)))

    def take_plan(self, other: Self) -> None:
        """Copy the plan, the starts and their logs of another run."""
        for place in other._names("plan/*.json") + other._names("starts/*.json"):
            self._write_json(place, other._read_json(place))
        for place in other._names("starts/*.jsonl"):
            self._write(place, read_regular(other._inside(place), follows_links=False))

    # What other runs have computed.

    def borrow(self, folders: Sequence[Path]) -> None:
        """Read what is absent here from runs that differ in the ablation alone, once they have it.

        A file's name hashes all that its numbers depend on beside the manifest, so unablated answers have the same name
        in both. Of runs with other harmful prompts, what belongs to the benign ones is read; of one that is damaged or
        of another version, nothing.
        """
        for folder in folders:
            if (folder / "manifest.json").is_file():
                try:
                    other = RunDirectory.look(folder)
                except InputError as error:
                    _log.warning("%s. Nothing is read from it", error)
                    continue
                names = _differing(self.config, other.config).keys() - {"ablation", "epsilon"}
                if all(name in _OF_HARMFUL or "harmful" in name for name in names):
                    self._lenders.append((other, "benign" if names else ""))

    def _borrowed(self, place: str) -> bool:
        """Whether another run had the file; it is here then."""
        for other, part in self._lenders:
            if part in place and other._is_there(place):
                with suppress(InputError):  # a damaged one is no loan
                    self.take(place, other)
                    self.shard.wrote(place)
                    return True
        return False

    # Work that is shared.

    def each(self, tasks: Sequence[Callable[[], Value]], costs: Sequence[float] = ()) -> Iterator[tuple[int, Value]]:
        """Do every task, and give its place in the list and its value; those that need other shards' units come last.

        Several workers begin with different tasks, with each as many as its share of the ``costs``, by default alike.
        An ElsewhereError where no more of such units were written for as long as the shard waits.
        """
        # Within a task files get smaller, and the smallest come last.
        until = list(accumulate(costs or [1.0] * len(tasks)))
        first = 0 if self._nested or not tasks else bisect(until, self.shard.begins_with * until[-1])
        # Tasks that are not done, with the files that each lacks: none while it was not tried yet.
        left = dict.fromkeys((*range(first, len(tasks)), *range(first)), frozenset[str]())
        since, n_missing = time.monotonic(), -1
        while left:
            lacked = frozenset[str]().union(*left.values())
            missing = {place for place in lacked if not self._is_there(place)}
            if len(missing) != n_missing:
                since, n_missing = time.monotonic(), len(missing)
            waited_enough = missing and self.shard.ends_waiting(missing, time.monotonic() - since)
            if lacked and (self._nested or waited_enough):
                raise _elsewhere(missing or lacked)
            for at, lacking in list(left.items()):
                if missing.isdisjoint(lacking) or any(map(self.shard.takes, lacking & missing)):
                    self._nested += 1  # a task does not wait itself, so that no other task waits for it
                    try:
                        value = tasks[at]()
                    except ElsewhereError as error:
                        left[at] = error.places
                        continue
                    finally:
                        self._nested -= 1
                    del left[at]
                    yield at, value
            if left and lacked:
                # Soon after something came, then less and less often.
                time.sleep(min(_POLL_SECONDS, self.shard.wait, 0.02 + time.monotonic() - since))

    def together(self, *tasks: Callable[[], Any], costs: Sequence[float] = ()) -> list[Any]:
        """The value of every task, as :meth:`each` does them."""
        return [value for _, value in sorted(self.each(tasks, costs), key=lambda done: done[0])]

    def _is_there(self, place: str) -> bool:
        return os.path.lexists(self.path / place)

    def _note(self, place: str, **about: Any) -> None:
        """Add a line about a unit to the log of this start; a line that a kill cuts is skipped by readers."""
        with as_input_error(self._log_path), self._log_path.open("a", encoding="utf-8") as file:
            file.write(canonical_json({"place": place, "time": time.time(), **about}) + "\n")

    def _stored(
        self,
        place: str,
        compute: Callable[[], Any],
        fits: Callable[[Any], bool] | None = None,
        replaces: bool = True,
    ) -> Any:
        """What a file holds; one that is absent, damaged or unfit is made first, unless another shard makes it."""
        if place in self._files and not self._is_there(place):
            _log.warning("%s is lost and computed again", self.path / place)
        for is_there in (self._is_there, self._borrowed):
            if is_there(place):
                with self._setting_aside(place), as_damaged(self.path / place):
                    value = self.read(place)
                    if fits is not None and not fits(value):
                        raise DamagedError(f"{self.path / place} is damaged: it does not hold what was asked for")
                    return value
        if not self.shard.takes(place):
            raise _elsewhere({place})
        if not replaces:
            self._write(place, self._packed(place, compute()), replaces)
            return self.read(place)
        self._note(place)
        began = time.monotonic()
        self._write(place, self._packed(place, compute()))
        self._note(place, seconds=time.monotonic() - began)
        self.shard.wrote(place)
        return self.read(place)

    def _packed(self, place: str, content: Any) -> bytes:
        """Records or tensors as a file of this run at that place."""
        pack, _ = _FOLDERS[place.split("/")[0]]
        return pack(self.key, stage_of(place), Path(place).stem[-KEY_DIGITS:], content)

    def read(self, place: str) -> Any:
        """What a file holds, once it fits what it says, its place, and the list of its stage where that is finished."""
        path = self._inside(place)
        try:
            if not os.path.lexists(path):
                raise DamagedError("it is lost")
            _, unpack = _FOLDERS[place.split("/")[0]]
            held, value = unpack(read_regular(path, follows_links=False, most=None))
            key, stage = held.key, held.stage
            wanted = (f"completions/{stage}-{key}.jsonl", f"shards/{stage}/{key}.safetensors")
            if held.run != self.key or not (place in wanted or (stage == _REMEMBERED and key in place)):
                raise DamagedError(f"it belongs to another place or run: stage {stage}, key {key}")
            told = held.count, held.sha256
            if self._lock is None and self._files.get(place, told) != told:
                raise DamagedError("it is not the file that the finished stage lists")
        except InputError as error:
            again = "" if self._lock else "; the command that wrote it computes it again"
            raise DamagedError(f"{path} is damaged: {error}{again}") from None
        self._files[place] = told
        return value

    def places(self) -> list[str]:
        """Every stored part that is there."""
        return [place for folder in sorted(_FOLDERS) for place in self._names(f"{folder}/**/*.*")]

    def set_aside_damaged(self) -> set[str]:
        """Read every stored part; gives those that were lost, or damaged: they are moved away.

        In a shard, beside which others may be at work on it, such a part is a DamagedError.
        """
        listed, known = dict(self._files), {*self._files, *self.places()}
        for place in sorted(known):
            with self._setting_aside(place) if self.shard.alone else nullcontext():
                self.read(place)
                if self.shard.alone and self._files[place] != listed.get(place, self._files[place]):
                    raise DamagedError(f"{self.path / place} is damaged: it is not the file that its stage lists")
        return known - self._files.keys()

    @contextmanager
    def _setting_aside(self, place: str) -> Iterator[None]:
        """Within, a file that is damaged is moved away, so that it is computed again; where runs are read, refused."""
        try:
            yield
        except InputError as error:
            if self._lock is None:
                raise
            self._files.pop(place, None)
            if not os.path.lexists(self.path / place):
                _log.warning("%s", error)
                return
            damaged, aside = self._inside(place), self._inside(f"set-aside/{place}")
            with as_input_error(aside):
                aside.parent.mkdir(parents=True, exist_ok=True)
                os.replace(damaged, aside)
            _log.warning("%s. What was there is in %s", error, aside)

    # Results.

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``: equal results give equal bytes, so no dates or times belong in it.

        Every stage that has files is finished then, and listed first. Where another shard has mended a file since it
        was read here, the results are not of what is stored: they are left to the next start.
        """
        readable_json("results.json", results)  # names a number that is not finite, while nothing is written
        with self.writing():
            used = dict(self._files)
            for place in (places := self.places()):
                if place not in self._files or not self.shard.alone:  # others judge again, and write anew
                    with self._setting_aside(place):
                        self.read(place)
            if changed := {place for place in used if place in self._files and self._files[place] != used[place]}:
                raise _elsewhere(changed)
            stages = {}
            for stage, of in groupby(sorted(filter(self._files.get, places), key=stage_of), stage_of):
                listed = [[place, *self._files[place]] for place in of]
                stages[stage] = content_key({"files": listed})
                self._write_json(f"stages/{stage}.json", {"stage": stage, "files": listed})
            self._write_json("results.json", {**results, "stages": stages})

    def read_results(self) -> dict[str, Any]:
        """What :meth:`write_results` wrote."""
        results = self._read_json("results.json") if self._results is None else dict(self._results)
        results.pop("stages", None)
        return results

    def earlier_results(self) -> dict[str, Any]:
        """What an earlier start of the run wrote, and whatever was added to it; nothing where none can be read."""
        with suppress(InputError):
            return self.read_results()
        return {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within, no other process writes results: what is read first and added to loses nobody's."""
        self._refuse_removed()
        with self._results_lock:
            self.load_stages()
            yield

    def _read_finished(self) -> None:
        """Read the results and the lists of finished stages, which must fit each other."""
        results = self._read_json("results.json")
        self._files = {}
        for stage, digest in self._fitting("results.json: stages", results.get("stages"), dict[str, str]).items():
            if content_key({"files": self._load_stage(f"stages/{stage}.json")}) != digest:
                raise DamagedError(f"{self.path / f'stages/{stage}.json'} does not fit results.json")
        self._results = results

    def _load_stage(self, place: str) -> list[tuple[str, int, str]]:
        """Place, number of entries and checksum of each file of a finished stage; they are known from here on."""
        told = self._read_json(place)
        files = self._fitting(f"{place}: files", told.get("files"), list[tuple[str, int, str]])
        if told.get("stage") != Path(place).stem:
            raise DamagedError(f"{self.path / place} is the list of another stage: {told.get('stage')!r}")
        if strange := [file for file, *_ in files if file.split("/")[0] not in _FOLDERS or ".." in file.split("/")]:
            raise DamagedError(f"{self.path}: {place} lists {strange[0]}, which is no stored part of a run")
        self._files = {file: (count, sha256) for file, count, sha256 in files} | self._files
        return files

    def load_stages(self) -> None:
        """Read the lists of finished stages, to which files are held from here on."""
        for place in self._names("stages/*.json"):
            with self._setting_aside(place):
                self._load_stage(place)
                continue
            # Without the list, its files say themselves whether they are whole.
            for part in (part for part in self.places() if stage_of(part) == Path(place).stem):
                with self._setting_aside(part):
                    self.read(part)

    # Times, reports, checks.

    def add_timings(self, timings: Mapping[str, Any]) -> None:
        """Add to ``timings.json``: seconds, dates and rates, kept apart from the results."""
        with self.writing():
            known: dict[str, Any] = {}
            with self._setting_aside("timings.json"):
                known = self.read_timings()
            for name, value in timings.items():
                before = known.get(name)
                known[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
            self._write_json("timings.json", known)

    def read_timings(self) -> dict[str, Any]:
        """What :meth:`add_timings` wrote; empty where the run has none."""
        return self._read_json("timings.json") if (self.path / "timings.json").exists() else {}

    def read_starts(self) -> list[Start]:
        """Every start, the first one first."""
        return [self._start(place) for place in self._names("starts/*.json")]

    def _start(self, place: str) -> Start:
        return self._fitting(place, self._read_json(place), Start)

    def facts(self) -> dict[str, Any]:
        """``config``, and what was remembered by its name: for pages."""
        return {"config": self.config, **self.remembered()}

    def write_report(self, html: str, pages: Mapping[str, str] | None = None) -> Path:
        """Write ``report/index.html`` after the pages it links to by name; an opened run takes one too."""
        for name, page in {**(pages or {}), "index.html": html}.items():
            write_page(self._inside(f"report/{name}"), page)
        return self.path / "report" / "index.html"

    @classmethod
    def verify(cls, path: str | os.PathLike[str]) -> Verification:
        """Read every file of a run, and hold it to its checksums and to the lists of finished stages."""
        folder = Path(path)
        run = cls(folder, _read_manifest(folder))
        found = Verification(finished=os.path.lexists(folder / "results.json"))

        def check(names: Iterable[str], read: Callable[[str], Any]) -> None:
            for name in names:
                found.n_files += 1
                try:
                    read(name)
                except InputError as error:
                    found.damaged[name] = str(error)

        check(sorted({*run._names("stages/*.json"), *run._stages_of_results()}), run._load_stage)
        check(run._names("plan/*.json"), run._units)
        check(run._names("starts/*.json"), run._start)
        check(run._names("timings.json"), run._read_json)
        check(["results.json"] * found.finished, lambda _: run._read_finished())
        listed, places = set(run._files), set(run.places())
        check(sorted(places | listed), run.read)
        found.unlisted = sorted(places - listed)
        return found

    def _stages_of_results(self) -> list[str]:
        """The lists of stages that the results name, whatever else of the results is damaged."""
        try:
            named = parse_json(read_regular(self.path / "results.json", follows_links=False), "results.json")["stages"]
        except (InputError, LookupError, TypeError):
            return []
        return [f"stages/{stage}.json" for stage in named] if isinstance(named, dict) else []

    def _names(self, pattern: str) -> list[str]:
        """Files by a pattern; a stage's folder, whose name may have a dot too, is none."""
        paths = (path for path in sorted(self.path.glob(pattern)) if path.is_symlink() or not path.is_dir())
        return [str(path.relative_to(self.path)) for path in paths if path.name[0] != "."]

    def _inside(self, place: str) -> Path:
        """A path in the run directory; one that leads out of it, also by a symbolic link, is refused."""
        path, parts = self.path, Path(place).parts
        if ".." in parts or Path(place).is_absolute():
            raise InputError(f"{place} leads out of the run directory {path}")
        for name in parts[:-1]:
            path = path / name
            if path.is_symlink():
                raise InputError(f"{path} is a symbolic link, which may lead out of the run directory")
        return self.path / place

    def _write(self, place: str, content: bytes, replaces: bool = True) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path} is closed or was opened to be read")
        self._refuse_removed()
        write_atomically(self._inside(place), content, replaces)

    def _refuse_removed(self) -> None:
        """What is written into a directory that is gone would be no run, and stand in the way of the next start."""
        if not (self.path / "manifest.json").exists():
            raise InputError(f"{self.path} was removed or moved while it was in work; start it again")

    def _write_json(self, place: str, value: Mapping[str, Any]) -> None:
        self._write(place, readable_json(place, with_checksums(self.key, place, value)).encode())

    def _fitting(self, place: str, told: Any, kind: Callable[..., Fits]) -> Fits:
        """What a file says, as the type that is read of it; an error names the file and the field."""
        with as_damaged(self.path / place):
            return converted(told, kind)

    def _read_json(self, place: str) -> dict[str, Any]:
        path = self._inside(place)
        try:
            content = read_regular(path, follows_links=False)
            return without_checksums(self.key, place, parse_json(content, place))
        except InputError as error:
            raise DamagedError(f"{self.path}: {error}") from None


def tensors_place(stage: str, fields: Mapping[str, Any]) -> str:
    """The file of tensors that ``fields`` determine."""
    return f"shards/{_file_name(stage)}/{content_key(fields)}.safetensors"


def records_place(stage: str, fields: Mapping[str, Any]) -> str:
    """The file of records that ``fields`` determine."""
    return f"completions/{_file_name(stage)}-{content_key(fields)}.jsonl"


def _remembered_place(name: str) -> str:
    return f"{_REMEMBERED}/{as_file_name(name)[:_LONGEST_NAME]}-{content_key({'name': name})}.jsonl"


def _elsewhere(places: Iterable[str]) -> ElsewhereError:
    """What to say where units of other shards are missing."""
    missing = frozenset(places)
    stages = sorted({stage_of(place) for place in missing})
    more = f" and {len(stages) - _DIFFERENCES_SHOWN} more" if len(stages) > _DIFFERENCES_SHOWN else ""
    named = f"{', '.join(stages[:_DIFFERENCES_SHOWN])}{more}"
    units = f"{len(missing)} unit{'s' * (len(missing) != 1)} of other shards"
    return ElsewhereError(f"not there yet: {units}, of {named}; when they have ended, run this array again", missing)


def stage_of(place: str) -> str:
    """The stage of a file of records or tensors, from its place."""
    folder, _, rest = place.partition("/")
    if folder == _REMEMBERED:
        return folder
    return rest.split("/")[0] if folder == "shards" else rest.rpartition("-")[0]


def _read_manifest(folder: Path) -> dict[str, Any]:
    told = parse_json(read_regular(folder / "manifest.json"), folder / "manifest.json")
    version = told.get("schema_version")
    if version != SCHEMA_VERSION:
        other = f"its schema is {shorten(repr(version))}, this one reads {SCHEMA_VERSION}"
        raise InputError(f"{folder} was written by another version of safetyheads: {other}")
    config = told.get("config")
    try:
        if not isinstance(config, dict):
            raise DamagedError("config is no object")
        without_checksums(content_key(config), "manifest.json", told)
    except DamagedError as error:
        raise DamagedError(f"{folder}: manifest.json: {error}") from None
    except (RecursionError, ValueError) as error:
        raise DamagedError(f"{folder}: manifest.json: config does not fit: {error}") from None
    return config


def _kept_manifest(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the manifest that is there, once it fits the one given, or that one, which is written."""
    given = parse_json(canonical_json(config), "config")
    path, key = folder / "manifest.json", content_key(given)
    if path.exists():
        try:
            kept = _read_manifest(folder)
        except DamagedError as error:
            if not _is_of(folder, key):
                raise
            aside = RunDirectory(folder, given)._inside(f"set-aside/{path.name}")
            write_atomically(aside, read_regular(path))
            _log.warning("%s. It is written again; what was there is in %s", error, aside)
        else:
            if differences := differences_of(kept, given):
                shown, more = differences[:_DIFFERENCES_SHOWN], len(differences) - _DIFFERENCES_SHOWN
                raise InputError(
                    f"{folder} holds a run with other settings: {', '.join(shown)}"
                    f"{f', and {more} more' if more > 0 else ''}; give another output directory"
                )
            return kept
    fields = with_checksums(key, path.name, {"schema_version": SCHEMA_VERSION, "config": given})
    write_atomically(path, readable_json(path.name, fields).encode())
    return given


def _is_of(folder: Path, key: str) -> bool:
    """Whether a start of the run of that key was noted in a folder; its damaged manifest cannot tell."""
    for path in (folder / "starts").glob("[!.]*.json"):
        with suppress(InputError):
            without_checksums(key, f"starts/{path.name}", parse_json(read_regular(path), path))
            return True
    return False


def _holder(folder: Path, part: str) -> str:
    """Who does a part of a run, by its starts."""
    for path in sorted((folder / "starts").glob("[!.]*.json"), reverse=True):
        with suppress(InputError):
            start = parse_json(read_regular(path), path)
            if start.get("part") == part:
                return f"process {start.get('pid')} on {start.get('host')}, since {start.get('started')}"
    return "another process"


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Places in two configs whose values differ, with both values as text."""
    before, after = ({name: canonical_json(value) for name, value in leaves(config)} for config in (old, new))
    return {
        name: (before.get(name, "none"), after.get(name, "none"))
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
    }


def differences_of(*configs: Mapping[str, Any]) -> list[str]:
    """Each setting in which two configs differ, in words, as ``name (old -> new)``; of fingerprints the name alone."""
    differing = _differing(*configs)
    names = set(differing)
    if any(name.startswith("prompts_sha256") for name in names):
        # Other prompts have other facts and other right answers.
        names = {name for name in names if not name.startswith(("prompt_facts", "references_sha256"))}
    differences = []
    for name in sorted(names, key=lambda name: (name.count("."), name)):
        before, after = map(shorten, differing[name])
        words = re.sub(r"[_.]", " ", name.replace("_sha256", ""))
        differences.append(words if "_sha256" in name else f"{words} ({before} -> {after})")
    return list(dict.fromkeys(differences))


def as_file_name(name: str) -> str:
    """A name with a dash for each character that a file's name may not hold."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)


def _file_name(stage: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", stage) is None:
        raise ValueError(f"stage {stage!r} is no file name")
    return stage


def _refuse_other_files(folder: Path) -> None:
    """Raise unless the folder is absent, empty, a run, or what is left of a start that was killed at once."""
    with as_input_error(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; a run needs a directory")
        if not folder.is_dir() or (folder / "manifest.json").exists():
            return
        others = [entry.name for entry in folder.iterdir() if not _is_ours(entry)]
    if others:
        raise InputError(f"{folder} is not empty and holds no run (it has {min(others)}); give another one")


def _is_ours(path: Path) -> bool:
    if path.name == ".gitignore":
        return path.is_file() and path.read_bytes() == _GITIGNORE  # a user's .gitignore keeps an empty folder in git
    return path.name.startswith(_LOCK) or (path.name.startswith(".") and path.name.endswith(PARTIAL))


# How far a run is, from the files of its directory alone.


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
    """Of the known units that are missing, by their counted cost, on as many processes as there are shards, or as are
    at work where these are more."""

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
            left = "" if not self.seconds_left else f"; about {duration(self.seconds_left)} left for known units"
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


def runs_within(folder: Path) -> list[str]:
    """Names of the run directories in a sweep's folder; ``.`` for a folder that is none."""
    if (folder / "manifest.json").exists():
        return ["."]
    return sorted(manifest.parent.name for manifest in folder.glob("*/manifest.json")) or ["."]


def status_of(folder: Path) -> Status:
    """How far the run in a folder is."""
    directory = RunDirectory.look(folder)
    there = set(directory.places())
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
    n_processes = max(count, sum(counts["running"] for counts in stages.values()))
    left = cost_left * seconds_timed / cost_timed / n_processes if cost_timed else None
    return Status(
        finished=(folder / "results.json").is_file(),
        stages=dict(sorted(stages.items())),
        shards=count,
        missing_shards=array_text(missing),
        seconds_a_unit=seconds_timed / n_timed if n_timed else None,
        seconds_left=left,
    )


def _read_logs(folder: Path) -> tuple[dict[str, float], set[str]]:
    """Seconds of each file that was computed, and files that are in work.

    A start that was killed looks as if it worked on. Only the order of the lines of one process is used, so clocks of
    several machines need not agree.
    """
    seconds, begun = dict[str, float](), set[str]()
    for path in sorted((folder / "starts").glob("[!.]*.jsonl")):
        working = set[str]()
        for line in read_regular(path).splitlines():
            with suppress(InputError, TypeError, ValueError):  # the last line of a process that was killed
                noted = parse_json(line, path)
                place = str(noted.get("place"))
                if "seconds" in noted:
                    seconds[place] = float(noted["seconds"])
                    working.discard(place)
                else:
                    working = {place}
        begun |= working
    return seconds, begun

"""Carries out a run by workers under Ray: each holds a proved engine and takes the next unit that no other has.

All workers follow the same command in one run directory, which every machine sees. What a lost worker had in hand goes
to the others.
"""

import importlib.util
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from safetyheads.errors import ElsewhereError, InputError, SafetyheadsError, one_line, shorten
from safetyheads.files import canonical_json
from safetyheads.judges.base import Completion, Judge, Verdict
from safetyheads.runs.config import ModelOptions, Progress
from safetyheads.runs.directory import stage_of
from safetyheads.runs.shards import Shard, Units
from safetyheads.runs.start import load_engine

Results = TypeVar("Results")
MOST_FAILURES = 3
"""A unit that failed so many times is not tried again."""
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_END = 60.0
# Within so many seconds a file system shows all machines what one of them wrote.
_SECONDS_TO_SHOW = 10.0


class Claims:
    """Knows who computes which unit; a unit is called by its run, if there are several, and the first of its files."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_done: dict[str, bool] = {}
        self._written: dict[str, float] = {}
        self._holders: dict[str, str] = {}
        self._failures: dict[str, list[str]] = {}
        self._lines: dict[str, bool] = {}
        self._began: dict[str, bool] = {}

    def expect(self, units: Mapping[str, bool]) -> None:
        """Add units, and whether they are done, for those who watch."""
        self._is_done = {**units, **self._is_done}

    def claim(self, worker: str, unit: str, again: bool = False) -> tuple[bool, list[str], list[str]]:
        """Whether a worker may compute a unit; then the units that are in hand, and those that failed too often.

        One that was done is given again if its file is not seen later on: it is lost. One that is there and could be
        better is given ``again`` once, and not if it was done since these claims began.
        """
        given_up, since = self.given_up(), self._clock() - self._written.get(unit, -math.inf)
        is_old = since >= (math.inf if again else _SECONDS_TO_SHOW)
        is_given = unit not in given_up and is_old and self._holders.get(unit, worker) == worker
        if is_given:
            self._holders[unit] = worker
            self._began[worker] = True
        return is_given, list(self._holders), list(given_up)

    def begin(self, worker: str) -> None:
        """Note that a worker has its engine."""
        self._began.setdefault(worker, False)

    def began(self) -> dict[str, bool]:
        """Every worker that has its engine, and whether it was ever given a unit."""
        return self._began

    def done(self, unit: str) -> None:
        """Note that a unit's files are written."""
        self._holders.pop(unit, None)
        self._written[unit], self._is_done[unit] = self._clock(), True

    def fail(self, worker: str, reason: str) -> list[str]:
        """Take back what a worker has in hand; gives these units."""
        units = [unit for unit, holder in self._holders.items() if holder == worker]
        for unit in units:
            del self._holders[unit]
            self._failures.setdefault(unit, []).append(reason)
        return units

    def given_up(self) -> dict[str, str]:
        """Units that failed too often, and why at last."""
        return {unit: reasons[-1] for unit, reasons in self._failures.items() if len(reasons) >= MOST_FAILURES}

    def say(self, line: str) -> None:
        """Pass a line on to the driver, once."""
        self._lines.setdefault(line, False)

    def news(self) -> tuple[list[str], tuple[str, int, int]]:
        """Lines that were not passed on yet; the first stage that is not done, with its units that are and all."""
        lines = [line for line, is_told in self._lines.items() if not is_told]
        self._lines |= dict.fromkeys(lines, True)
        n_units = Counter(map(_stage_of, self._is_done))
        n_done = Counter(_stage_of(unit) for unit, is_done in self._is_done.items() if is_done)
        stage = next((stage for stage in n_units if n_done[stage] < n_units[stage]), "")
        return lines, (stage, n_done[stage], n_units[stage])


def _stage_of(unit: str) -> str:
    """Of a unit that may begin with its run."""
    run, mark, place = unit.rpartition(": ")
    return run + mark + stage_of(place)


class ClaimingShard(Shard):
    """Takes the units that :class:`Claims` gives it, and waits for those of other workers."""

    def __init__(
        self, worker: str, folder: Path, ask: Callable[..., Any], tell: Callable[..., object], run: str = ""
    ) -> None:
        """``ask`` and ``tell`` call a method of the claims by name; only the first waits for what it returns.

        ``run`` begins the names of units.
        """
        super().__init__(wait=math.inf)
        self.part, self.alone = worker, False
        self._folder, self._ask, self._tell, self._run = folder, ask, tell, run
        self._units: dict[str, tuple[str, ...]] = {}
        self._mine, self._given_up = set[str](), set[str]()
        self._seen: dict[str, float] = {}
        self.jury: Any = None
        """The actor that holds judge models for this worker; None where it holds its own."""

    def within(self, folder: Path) -> "ClaimingShard":
        """Shares of another run: its units have files of the same names."""
        shard = ClaimingShard(self.part, folder, self._ask, self._tell, f"{folder.name}: ")
        shard.begins_with, shard.jury = self.begins_with, self.jury
        return shard

    def asked(self, judges: Sequence[Judge]) -> Sequence[Judge]:
        """The judges; those that load a model are elsewhere, if there is a jury."""
        is_elsewhere = [self.jury is not None and hasattr(judge, "look") for judge in judges]
        pairs = zip(judges, is_elsewhere, strict=True)
        return [AskedElsewhere(judge, self.jury) if elsewhere else judge for judge, elsewhere in pairs]

    def failures(self, error: SafetyheadsError) -> SafetyheadsError:
        """What keeps a run from its end: where that is what others compute, their units that failed too often."""
        return _failures(self._ask("given_up"), self._run) if isinstance(error, ElsewhereError) else error

    def gives_back(self, error: SafetyheadsError) -> bool:
        """Give back the unit that failed; whether there was one, so that the run is tried again."""
        return not isinstance(error, ElsewhereError) and bool(self._ask("fail", self.part, one_line(error)))

    def divide(self, units: Units) -> None:
        """Tell the claims of new units."""
        new = [places for places in units if places[0] not in self._units]
        self._tell("expect", {self._run + places[0]: self._is_there(places) for places in new})
        self._units |= {place: places for places in units for place in places}

    def takes(self, place: str, again: bool = False) -> bool:
        """Whether this worker computes the unit of a file: what it was given, and what nobody divided."""
        if place not in self._units or (unit := self._name(place)) in self._mine:
            return True
        now = time.monotonic()
        if now - self._seen.get(unit, -math.inf) < _SECONDS_BETWEEN_LOOKS:
            return False
        is_given, in_hand, given_up = self._ask("claim", self.part, unit, again)
        self._seen |= dict.fromkeys(in_hand, now)
        self._given_up.update(given_up)
        self._mine.update([unit] * is_given)
        return bool(is_given)

    def sees_in_hand(self, place: str) -> bool:
        """Whether another worker had the unit when this one last asked, just now."""
        return time.monotonic() - self._seen.get(self._name(place), -math.inf) < _SECONDS_BETWEEN_LOOKS

    def wrote(self, place: str) -> None:
        """Tell the claims of a unit whose files are all written."""
        if place in self._units and self._is_there(self._units[place]):
            self._tell("done", self._name(place))

    def ends_waiting(self, missing: Iterable[str], seconds: float) -> bool:
        """Whether everything that is missing failed too often."""
        return all(place in self._units and self._name(place) in self._given_up for place in missing)

    def _name(self, place: str) -> str:
        """What the claims call the unit of a file."""
        return self._run + self._units[place][0]

    def _is_there(self, places: Sequence[str]) -> bool:
        return all(os.path.lexists(self._folder / place) for place in places)


class Jury:
    """An actor that holds judge models, each from the first time that it is asked for."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        self._judges: dict[str, Judge] = {}

    def verdicts(self, judge: Judge, completions: Sequence[Completion]) -> tuple[Verdict, ...]:
        """The verdicts of a judge whose model a worker did not load."""
        return self._judges.setdefault(canonical_json(judge.describe()), judge)(completions)


class AskedElsewhere(Judge):
    """A judge whose model a :class:`Jury` holds."""

    decides_early = False

    def __init__(self, judge: Judge, jury: Any) -> None:
        self._judge, self._jury = judge, jury

    @property
    def name(self) -> str:
        """The judge's."""
        return self._judge.name

    def __call__(self, completions: Sequence[Completion]) -> tuple[Verdict, ...]:
        """The judge's verdicts, once they come."""
        import ray

        try:
            verdicts: tuple[Verdict, ...] = ray.get(self._jury.verdicts.remote(self._judge, completions))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return verdicts

    def describe(self) -> dict[str, Any]:
        """The judge's: who holds it changes no verdict."""
        return self._judge.describe()


def spread(number: int) -> float:
    """Where a worker begins among sets of prompts, as a share: multiples of the golden ratio are spread evenly.

    So few workers need the captures of two sets.
    """
    return number * 0.618034 % 1


class Worker(Progress):
    """An actor that holds one engine, which is loaded and proved when it first runs; as progress it passes lines on."""

    def __init__(self, folder: str, claims: Any, juries: Sequence[Any], load: Callable[[Any, Progress], Any]) -> None:
        os.chdir(folder)  # as the driver's: settings name paths as the user wrote them
        self._claims, self._juries, self._load, self._engine = claims, juries, load, None

    def _tell(self, method: str, *values: Any) -> Any:
        return getattr(self._claims, method).remote(*values)

    def say(self, line: str | Callable[[], str]) -> None:
        """Pass a line on to the driver."""
        self._tell("say", line if isinstance(line, str) else line())

    def run(self, name: str, number: int, carry_out: Any, config: Any, out: Path, data: Any, command: Any) -> Any:
        """The run's results, once every unit is computed; None where units failed too often."""
        import ray

        progress = self if number == 0 else Progress()
        self._engine = self._engine or self._load(config, progress)
        self._tell("begin", name)
        shard = ClaimingShard(name, out, lambda *call: ray.get(self._tell(*call)), self._tell)
        shard.begins_with = spread(number)
        shard.jury = self._juries[number % len(self._juries)] if self._juries else None
        try:
            return carry_out(self._engine, config, out, data, progress, command, shard=shard)
        except ElsewhereError:
            return None


def carry_out_by_workers(
    carry_out: Callable[..., Results],
    config: ModelOptions,
    out: Path,
    data: Any,
    progress: Progress,
    command: Sequence[str],
    address: str,
    n_workers: int | None = None,
    gpus_per_worker: float = 0.0,
    n_juries: int = 0,
    load: Callable[[Any, Progress], Any] = load_engine,
) -> Results:
    """The results of a run that workers under Ray carry out, as written; arguments as for :func:`.run.carry_out`.

    The ``address`` is that of a cluster, ``auto`` for the one at hand, or ``local`` for one of this machine alone.
    By default as many workers as have room; one without GPUs takes a CPU a thread. Judge models are held by
    ``n_juries`` actors, each with the GPUs of a worker if judges need any, or by each worker.

    Raises:
        InputError: as one process would, or Ray is missing, or no worker has room.
        SafetyheadsError: a unit failed three times, or workers are lost before they compute anything.
    """
    if config.device != "auto" and (config.device == "cpu" and config.device_map is None) == (gpus_per_worker > 0):
        raise InputError("--gpus-per-worker belongs to --device cuda, or to a device map, and they need it under --ray")
    n_cpus = config.threads or 1
    with _connected(address, n_workers and n_workers * n_cpus) as ray:
        room = ray.cluster_resources()
        n_fit = room.get("CPU", 0) // n_cpus
        gpus_of_jury = 0.0 if getattr(config, "judge_device", "cpu") == "cpu" else gpus_per_worker
        gpus = room.get("GPU", 0) - n_juries * gpus_of_jury
        n_fit = min(n_fit, gpus // gpus_per_worker) if gpus_per_worker else n_fit
        if n_fit < 1:
            raise InputError(f"no worker has room: each needs {n_cpus} CPUs and {gpus_per_worker:g} GPUs")
        n_workers = n_workers or int(n_fit)
        if n_workers > n_fit:
            progress.say(f"there is room for {n_fit:g} of {n_workers} workers now")
            n_workers = int(n_fit) if address == "local" else n_workers  # nodes may join a cluster
        if config.memory is None and not gpus_per_worker:
            config = replace(config, memory=psutil.virtual_memory().available / 2**31 / n_workers)
        # One that is lost starts again, and what it was asked is asked again.
        jury = ray.remote(num_cpus=0, num_gpus=gpus_of_jury, max_restarts=-1, max_task_retries=MOST_FAILURES)(Jury)
        juries = [jury.remote(os.getcwd()) for _ in range(n_juries)]
        worker = ray.remote(num_cpus=n_cpus, num_gpus=gpus_per_worker)(Worker)
        driver = _Driver(ray, worker, juries, progress, load)
        try:
            results: Results = driver.results(n_workers, carry_out, config, out.absolute(), data, tuple(command))
            return results
        except ray.exceptions.RayError as error:
            raise SafetyheadsError(f"Ray failed, the same command goes on: {one_line(error)}") from None
        finally:
            driver.close()


def _failures(given_up: Mapping[str, str], run: str = "") -> SafetyheadsError:
    """Names the units of a run that failed too often."""
    units = {unit: reason for unit, reason in given_up.items() if unit.startswith(run)}
    lines = [f"{unit} failed {MOST_FAILURES} times: {reason}" for unit, reason in units.items()]
    return SafetyheadsError(f"{'; '.join(lines)}. What was computed is kept")


class _Driver:
    """Starts workers, replaces those that are lost, and shows how far the run is."""

    def __init__(
        self, ray: Any, worker: Any, juries: Sequence[Any], progress: Progress, load: Callable[..., Any]
    ) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._worker, self._juries = ray, worker, juries
        self._progress, self._load = progress, load
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._claims = ray.remote(num_cpus=0, scheduling_strategy=here)(Claims).remote()
        self._running: dict[Any, tuple[int, Any, str]] = {}
        self._losses = Counter[int]()
        self._bar, self._shown = ExitStack(), ("", 0, 0)
        self._advance: Callable[[int], None] = lambda _: None

    def results(self, n_workers: int, *arguments: Any) -> Any:
        """Carry out the run; the first worker that ends has its results."""
        self._arguments, results = arguments, None
        for number in range(n_workers):
            self._start(number)
        while self._running and results is None:
            ended, _ = self._ray.wait(list(self._running), timeout=_SECONDS_BETWEEN_LOOKS)
            self._show()
            for reference in ended:
                results = results or self._ended(reference)
        if results is None:
            raise _failures(self._ray.get(self._claims.given_up.remote()))
        began = self._ray.get(self._claims.began.remote())  # others may have no room yet
        if others := [reference for reference, (_, _, name) in self._running.items() if name in began]:
            # They are about to write the same bytes.
            self._ray.wait(others, num_returns=len(others), timeout=_SECONDS_TO_END)
        return results

    def close(self) -> None:
        """End the bar and the actors that are left."""
        self._bar.close()
        for actor in (self._claims, *self._juries, *(actor for _, actor, _ in self._running.values())):
            with suppress(self._ray.exceptions.RayError):  # the results are there
                self._ray.kill(actor)

    def _start(self, number: int, actor: Any = None) -> None:
        """Start a worker, or one whose actor is there again; its name is new, for the old one may still hold a lock."""
        name, actor = (
            f"ray-{time.time_ns()}",
            actor or self._worker.remote(os.getcwd(), self._claims, self._juries, self._load),
        )
        self._running[actor.run.remote(name, number, *self._arguments)] = number, actor, name

    def _ended(self, reference: Any) -> Any:
        """What a worker ended with; one that failed or was lost starts again."""
        number, actor, name = self._running.pop(reference)
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            reason = one_line(error.cause)
            if not self._ray.get(self._claims.fail.remote(name, reason)):
                raise error.cause from None
        except self._ray.exceptions.RayActorError as error:
            reason, actor = shorten(one_line(error), 200), None
            self._ray.get(self._claims.fail.remote(name, reason))
            had_unit = self._ray.get(self._claims.began.remote()).get(name)
            self._losses[number] = 0 if had_unit else self._losses[number] + 1
            if self._losses[number] >= MOST_FAILURES:  # its machine may lack something that others have
                lost = f"workers are lost before they compute anything: {reason}"
                if not self._running:
                    raise SafetyheadsError(lost) from None
                self._progress.say(f"one worker less, for {lost}")
                return None
            self._progress.say(f"a worker was lost, its units go back: {reason}")
        self._start(number, actor)
        return None

    def _show(self) -> None:
        """Show the lines of the leading worker, and the first stage that is not done."""
        lines, (stage, n_done, total) = self._ray.get(self._claims.news.remote())
        for line in lines:
            self._progress.say(line)
        if (stage, total) != self._shown[::2]:
            if stage != self._shown[0]:  # the stage before is done
                self._advance(self._shown[2] - self._shown[1])
            self._bar.close()
            self._shown, self._advance = (stage, 0, total), lambda _: None
            if stage:
                self._advance = self._bar.enter_context(self._progress.track(f"{stage}: units", total))
        self._advance(n_done - self._shown[1])
        self._shown = stage, n_done, total


@contextmanager
def _connected(address: str, n_cpus: int | None) -> Iterator[Any]:
    """Ray, connected to a cluster; a connection of the caller's own is used and left as it is."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs ray: pip install 'safetyheads[ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
    import ray

    if ray.is_initialized():
        yield ray
        return
    own = {"num_cpus": n_cpus, "include_dashboard": False, "object_store_memory": 100 << 20}
    try:  # workers print nothing here: it could be an answer
        ray.init(address, log_to_driver=False, logging_level="ERROR", **(own if address == "local" else {}))
    except Exception as error:  # noqa: BLE001 - Ray raises plain ones where its processes do not start
        raise InputError(f"Ray at {address} cannot be used: {one_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()

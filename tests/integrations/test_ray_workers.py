"""Workers under Ray write the bytes of one process, whatever is lost on the way."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.managers import BaseManager
from pathlib import Path

import psutil
import pytest
import torch

from safetyheads import load_demo
from safetyheads.errors import ElsewhereError, InputError, SafetyheadsError
from safetyheads.integrations import ray_workers
from safetyheads.integrations.ray_workers import (
    MOST_FAILURES,
    ClaimingShard,
    Claims,
    carry_out_by_workers,
)
from safetyheads.judges.base import Completion, Judge, Verdict, verdicts_of
from safetyheads.judges.phrase_judge import PhraseJudge
from safetyheads.measures.head_pass import HeadPass
from safetyheads.runs.config import AsrConfig, Progress, ShipsConfig
from safetyheads.runs.directory import RunDirectory, records_place
from safetyheads.runs.single_steps import run_ships
from safetyheads.runs.sweep import audits_of, sweep_by_workers

sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))
from test_shards import bytes_of
from test_sweep import AXES, SHORT, swept

CONFIG = AsrConfig("none", "none", memory=1.0)
"""Of stand-ins, which load no model."""
SIZE = {"num_cpus": 3, "num_gpus": 2, "object_store_memory": 100 << 20}
"""Of the cluster; nobody looks whether the GPUs are there."""
SHUT_OFF = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
STAGES = ("first", "second", "third")
N_UNITS = 6


def stand_in(engine, config, out, data=None, progress=None, command=(), shard=None):
    """A run of stages of units, each of which needs the whole stage before; ``data`` is told of each unit."""
    with RunDirectory.start(out, {"a": 1}, {}, shard=shard) as run:
        total = 0.0
        for stage in STAGES:
            costs = {(records_place(stage, {"n": n}),): 1.0 + n for n in range(N_UNITS)}
            run.divide(stage, costs)

            def unit(n, stage=stage, total=total):
                def compute():
                    (data or trouble)(out, stage, n)
                    return [{"value": total + n / 3}]

                return run.records(stage, {"n": n}, compute)[0]["value"]

            total = sum(run.together(*(partial(unit, n) for n in range(N_UNITS))))
        run.write_results({"total": total})
        return run.read_results()


def trouble(out, stage, n, kind="none", at=("second", 2), seconds=0.0):
    """What happens in one unit: a process that is killed, or an error, once or always."""
    time.sleep(seconds)
    once = out.parent / f"{out.name}-once"
    if (stage, n) == at and kind != "none" and not (once.exists() and kind.endswith("once")):
        once.touch()
        if kind.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("no luck")


def no_engine(config, progress):
    return "an engine"


def killed(config, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def first_is_killed(config, progress):
    if type(progress) is not Progress:
        killed(config, progress)
    return no_engine(config, progress)


def by_ray(out, data=None, n_workers=2, load=no_engine, progress=None, carry_out=stand_in, config=CONFIG, **how):
    how = {"address": "local", "load": load} | how
    return carry_out_by_workers(
        carry_out, config, out, data, progress or Progress(), command=(), n_workers=n_workers, **how
    )


def until_started(get_node, *which):
    """Information on a node that starts: Ray asks for 30 seconds, and no setting changes that. Crowded machines do."""
    for _ in range(600):
        with suppress(RuntimeError):
            return get_node(*which)
        time.sleep(0.5)
    return get_node(*which)


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="needs ray: pip install ray -c constraints.txt")
    waits = dict.fromkeys(("RAY_gcs_server_port_wait_time_s", "RAY_worker_register_timeout_seconds"), "300")
    # Its workers have the lowest priority by default, with which a crowded machine leaves them nothing.
    os.environ.update(waits, RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")
    ray._private.services.get_node = partial(until_started, ray._private.services.get_node)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init("local", **SIZE, **SHUT_OFF)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Files of a stand-in that one process carried out."""
    folder = tmp_path_factory.mktemp("one")
    stand_in(None, CONFIG, folder / "run")
    return bytes_of(folder / "run")


class Lines(Progress):
    def __init__(self):
        self.lines, self.done = [], Counter()

    def say(self, line):
        self.lines.append(line)

    @contextmanager
    def track(self, name, total):
        assert total == N_UNITS
        yield lambda n: self.done.update({name: n})


# Without Ray: who gets which unit.


def claiming(name, claims, folder):
    """A shard that asks these claims, which are here and not under Ray."""

    def ask(method, *values):
        return getattr(claims, method)(*values)

    return ClaimingShard(name, folder, ask, ask)


def test_a_unit_is_in_one_hand_and_goes_back_when_that_is_lost():
    now = [0.0]
    claims = Claims(lambda: now[0])
    a, b = "shards/s/a.safetensors", "shards/s/b.safetensors"
    claims.expect({a: False, b: True})
    assert claims.claim("first", a) == (True, [a], [])
    assert claims.claim("second", a) == (False, [a], [])
    assert claims.news() == ([], ("s", 1, 2))
    assert claims.fail("first", "killed") == [a]
    assert claims.claim("second", a)[0]
    claims.done(a)
    assert claims.news()[1] == ("", 0, 0)
    # A file system may show it late; where it is lost it is made again.
    assert not claims.claim("third", a)[0]
    now[0] = 60.0
    assert claims.claim("third", a)[0]
    for _ in range(MOST_FAILURES - 1):
        claims.fail("third", "no luck")
        assert claims.claim("third", a)[0] == (len(claims.given_up()) == 0)
    assert claims.given_up() == {a: "no luck"}


class Shared(BaseManager):
    """Claims in a process of their own."""


Shared.register("Claims", Claims)


def work(name, claims, out, begins_with):
    def count(_, stage, n):
        with (out.parent / "computed").open("a") as file:
            file.write(f"{stage} {n}\n")
        time.sleep(random.random() / 50)

    shard = claiming(name, claims, out)
    shard.begins_with = begins_with
    stand_in(None, CONFIG, out, count, shard=shard)


def test_workers_of_one_directory_compute_each_unit_once(one, tmp_path):
    fork = multiprocessing.get_context("fork")
    with Shared(ctx=fork) as manager:
        claims = manager.Claims()
        workers = [fork.Process(target=work, args=(f"worker-{n}", claims, tmp_path / "run", n % 2)) for n in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    computed = (tmp_path / "computed").read_text().splitlines()
    assert sorted(computed) == sorted(f"{stage} {n}" for stage in STAGES for n in range(N_UNITS))
    assert bytes_of(tmp_path / "run") == one


def test_a_unit_that_fails_in_an_audit_of_a_sweep_goes_back(tmp_path):
    claims = Claims()

    def share(name):
        shard = claiming(name, claims, tmp_path).within(tmp_path / "audit")
        shard.divide({("scores/one",): 1.0})
        return shard

    one = share("one")
    assert one.takes("scores/one")
    assert not share("two").takes("scores/one")
    assert not one.gives_back(ElsewhereError("scores", frozenset()))
    assert one.gives_back(SafetyheadsError("the disk is full"))
    assert share("two").takes("scores/one")
    assert not one.gives_back(SafetyheadsError("nothing is in hand"))


def test_what_a_judge_failed_on_is_asked_again_once_a_start_and_others_wait_for_it(tmp_path):
    now = [0.0]
    place, claims = records_place("s", {"n": 1}), [Claims(lambda: now[0])]

    def records(name, mend=pytest.fail):
        with RunDirectory.start(tmp_path, {}, {}, shard=claiming(name, claims[0], tmp_path)) as run:
            run.divide("s", {(place,): 1.0})
            return run.records("s", {"n": 1}, lambda: [{"failed": True}], mend, lambda record: record["failed"])

    def mend(_):
        with pytest.raises(ElsewhereError):
            records("fourth")
        return [{"failed": False}]

    assert records("first") == [{"failed": True}]
    now[0] = 60.0
    assert records("second") == [{"failed": True}]
    claims[0] = Claims()
    assert records("third", mend) == records("fifth") == [{"failed": False}]
    assert claims[0].claim("sixth", "another")[1] == ["another"]


def test_a_borrowed_file_counts_as_done(tmp_path):
    place, claims = records_place("s", {"n": 1}), Claims()
    with RunDirectory.start(tmp_path / "ua", {"ablation": "ua"}, {}) as run:
        run.records("s", {"n": 1}, lambda: [{"value": 1}])
    shard = claiming("w", claims, tmp_path / "sc")
    with RunDirectory.start(tmp_path / "sc", {"ablation": "sc"}, {}, shard=shard) as run:
        run.borrow([tmp_path / "ua"])
        run.divide("s", {(place,): 1.0})
        assert claims.news()[1] == ("s", 0, 1)
        assert run.records("s", {"n": 1}, pytest.fail) == [{"value": 1}]
        assert claims.news()[1] == ("", 0, 0)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--workers", "2"], "--workers, --gpus-per-worker and --judge-workers belong to --ray"),
        (["--ray", "local", "--shard", "1/2"], "--ray and --shard exclude each other"),
        (["--ray", "local", "--workers", "0"], "--workers is at least 1"),
        (["--ray", "local", "--gpus-per-worker", "nan"], "--gpus-per-worker and --judge-workers not below 0"),
        (["--ray", "local", "--judge-workers", "2"], "--judge-workers hold judge models, and no --judge is one"),
        (["--ray", "local", "--gpus-per-worker", "1"], "--gpus-per-worker belongs to --device cuda"),
        (["--ray", "local", "--device", "cuda"], "--gpus-per-worker belongs to --device cuda"),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_starts(run, tmp_path, options, line):
    for command in ("scan demo:aligned_a", "sweep --model demo:aligned_a"):
        code, _, err = run(*command.split(), "--prompts", "demo", "--out", tmp_path / "run", *options)
        assert (code, line in " ".join(err.split())) == (2, True), err


# Under Ray, with stand-ins for a model.


@pytest.mark.parametrize("kind", ["none", "killed once", "error once"])
def test_workers_write_the_bytes_of_one_process_though_one_is_lost(ray, one, tmp_path, kind):
    watched = Lines()
    results = by_ray(tmp_path / "run", partial(trouble, kind=kind, seconds=0.2), progress=watched)
    assert bytes_of(tmp_path / "run") == one
    assert set(watched.done) <= {f"{stage}: units" for stage in STAGES}
    assert set(watched.done.values()) == {N_UNITS}
    assert results["total"] > 0
    assert any("a worker was lost, its units go back" in line for line in watched.lines) == (kind == "killed once")


@pytest.mark.parametrize("kind", ["killed", "error"])
def test_a_unit_that_fails_three_times_is_named_and_the_rest_is_kept(ray, one, tmp_path, kind):
    place = records_place("second", {"n": 2})
    with pytest.raises(SafetyheadsError, match=rf"^{place} failed 3 times: .*What was computed is kept"):
        by_ray(tmp_path / "run", partial(trouble, kind=kind))
    left = {name for name in one if name.startswith("completions/")} - bytes_of(tmp_path / "run").keys()
    assert left == {place} | {records_place("third", {"n": n}) for n in range(N_UNITS)}
    by_ray(tmp_path / "run")
    assert bytes_of(tmp_path / "run") == one


def refused(*_, **__):
    raise InputError("bad settings")


def test_what_one_process_refuses_is_refused_in_its_words(ray, tmp_path):
    with pytest.raises(InputError, match=r"^bad settings$"):
        by_ray(tmp_path / "run", carry_out=refused)
    with pytest.raises(SafetyheadsError, match="workers are lost before they compute anything"):
        by_ray(tmp_path / "run", load=killed, n_workers=1)


def test_a_machine_that_lacks_something_ends_no_run_of_others(ray, one, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_workers, "MOST_FAILURES", 1)
    kill, watched = ray.kill, Lines()

    def gone(actor):
        kill(actor)
        raise ray.exceptions.RaySystemError("the actor is gone")

    monkeypatch.setattr(ray, "kill", gone)
    by_ray(tmp_path / "run", partial(trouble, seconds=0.3), load=first_is_killed, progress=watched)
    assert bytes_of(tmp_path / "run") == one
    assert [line for line in watched.lines if "one worker less, for workers are lost before they" in line]


@pytest.mark.parametrize("address", ["local", "auto"])
def test_workers_without_room_are_told_and_not_waited_for(ray, one, tmp_path, monkeypatch, address):
    waited, wait, watched = [], ray.wait, Lines()

    def noted(references, **how):
        waited.extend([len(references)] * (how["timeout"] == ray_workers._SECONDS_TO_END))
        return wait(references, **how)

    monkeypatch.setattr(ray, "wait", noted)
    by_ray(tmp_path / "run", partial(trouble, seconds=0.2), n_workers=5, progress=watched, address=address)
    assert bytes_of(tmp_path / "run") == one
    assert "there is room for 3 of 5 workers now" in watched.lines
    assert max(waited, default=0) <= 2


def gpus_seen(engine, config, out, data, progress, command, shard):
    """Waits for the other worker, so that both have their GPU at once."""
    import ray

    (gpu,) = ray.get_gpu_ids()
    (out / f"{gpu}").touch()
    for _ in range(1200):
        if len(names := sorted(path.name for path in out.iterdir())) == 2:
            return {"gpus": names}
        time.sleep(0.05)
    raise InputError(f"one worker alone: {names}")


def test_each_worker_has_gpus_of_its_own(ray, tmp_path):
    config = AsrConfig("none", "none", device="auto", memory=1.0)
    how = {"carry_out": gpus_seen, "config": config, "n_workers": None}
    assert by_ray(tmp_path, gpus_per_worker=1.0, **how) == {"gpus": ["0", "1"]}
    with pytest.raises(InputError, match="no worker has room: each needs 1 CPUs and 3 GPUs"):
        by_ray(tmp_path, gpus_per_worker=3.0, **how)


def tight(config, progress):
    """An engine on whose device more than four groups do not fit."""
    from safetyheads.measures.head_pass import HeadPass
    from safetyheads.runs.start import load_engine

    if not hasattr(HeadPass, "whole"):
        HeadPass.whole = HeadPass._read

    def read(self, hidden):
        if len(hidden) > 4:
            raise RuntimeError("not enough memory")
        return self.whole(hidden)

    HeadPass._read = read
    return load_engine(config, progress)


def test_batches_that_do_not_fit_are_halved_as_in_one_process(ray, tmp_path, monkeypatch):
    config = ShipsConfig("demo:aligned_a", "demo", limit=6, memory=1.0)
    monkeypatch.setattr(HeadPass, "_read", HeadPass._read)  # put back at the end
    torch.set_num_threads(1)
    run_ships(tight(config, Progress()), config, tmp_path / "one")
    by_ray(tmp_path / "ray", carry_out=run_ships, config=config, load=tight)
    one = bytes_of(tmp_path / "one")
    # The batch of each of four layers did not fit, and has two halves.
    assert len([place for place in one if place.startswith("shards/")]) == 4 + 8
    assert bytes_of(tmp_path / "ray") == one


class Far(Judge):
    """Tells in which process it judges; loads a model, as ``look`` says."""

    name = "far"

    def look(self):
        """Nothing is there to look at."""

    def __call__(self, completions):
        if completions[0].text == "broken":
            raise InputError("the judge cannot be loaded")
        return (Verdict("safe", f"{os.getpid()}"),) * len(completions)

    def describe(self):
        return {"judge": "far"}


def judged(engine, config, out, text, progress, command, shard):
    (far, near), completion = shard.asked([Far(), PhraseJudge()]), Completion("", text, (), True, 1)
    (verdict,) = verdicts_of(far, [completion])
    return {"here": os.getpid(), "there": int(verdict.reason), "told": far.describe(), "near": near.name}


def test_judge_models_are_held_beside_the_workers(ray, tmp_path):
    arguments = CONFIG, tmp_path, "an answer", Progress(), (), "local", 2, 0.0
    told = carry_out_by_workers(judged, *arguments, n_juries=1, load=no_engine)
    assert told["here"] != told["there"]
    assert (told["told"], told["near"]) == ({"judge": "far"}, "phrases")
    told = carry_out_by_workers(judged, *arguments, load=no_engine)
    assert told["here"] == told["there"]
    with pytest.raises(InputError, match=r"^the judge cannot be loaded$"):
        carry_out_by_workers(judged, CONFIG, tmp_path, "broken", *arguments[3:], n_juries=1, load=no_engine)


def test_workers_share_the_audits_of_a_sweep_and_one_that_fails_stops_no_other(ray, tmp_path):
    torch.set_num_threads(1)
    axes = AXES | {"ablations": ["ua", {"size": 33}, {"ablation": "sc", "epsilon": 0.0}]}
    one, _ = swept(tmp_path / "one", load_demo("aligned_a").engine, axes)
    audits = audits_of(SHORT | axes, tmp_path / "ray")
    found, failed = sweep_by_workers(carry_out_by_workers, audits, Progress(), (), "local", 2)
    assert [str(error) for error in failed.values()] == ["size 33 is more than the model's 32 heads"]
    assert [*found] == [place for place in audits if place not in failed]
    assert [bytes_of(place) for place in audits if place in found] == [
        bytes_of(place) for place in one if place.name not in {failing.name for failing in failed}
    ]


# Long: everything is killed; the organism.


def is_worker(pid):
    try:
        return "ray::" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:  # also one that is dead and not yet waited for
        return False


def kill_workers(folder, kills, stop, most=20, pause=1.5):
    """Kill workers at random moments, so many in all; each start in the directory names its process."""
    while len(kills) < most and not stop.wait(random.uniform(0.2, pause)):
        pids = [int(path.stem.rpartition("-")[2]) for path in folder.glob("starts/[!.]*.json")]
        alive = [pid for pid in pids if is_worker(pid)]
        if alive:
            kills.append(random.choice(alive))
            os.kill(kills[-1], signal.SIGKILL)


def until_done(out, **settings):
    """Start again as long as units that were killed too often end the run."""
    for _ in range(5):
        try:
            return by_ray(out, partial(trouble, seconds=0.3), **settings)
        except SafetyheadsError as error:
            if "failed 3 times" not in str(error):
                raise
    raise AssertionError("the run does not end")


@pytest.mark.long
def test_workers_killed_at_twenty_random_moments(ray, one, tmp_path):
    kills = []
    while len(kills) < 20:
        out, stop = tmp_path / f"run-{len(kills)}", threading.Event()
        killer = threading.Thread(target=kill_workers, args=(out, kills, stop))
        killer.start()
        until_done(out, n_workers=3)
        stop.set()
        killer.join()
        assert bytes_of(out) == one


@pytest.mark.long
def test_the_driver_killed_at_five_random_moments(ray, one, tmp_path):
    out = tmp_path / "run"
    for _ in range(5):
        driver = subprocess.Popen([sys.executable, __file__, out])
        time.sleep(random.uniform(3, 12))
        driver.kill()
        driver.wait()
    until_done(out)
    assert bytes_of(out) == one


@pytest.mark.long
def test_a_node_removed_from_a_cluster_at_five_random_moments(ray, one, tmp_path):
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        for number in range(5):
            node, out = cluster.add_node(num_cpus=2, object_store_memory=100 << 20), tmp_path / f"run-{number}"
            remove = threading.Timer(random.uniform(1, 4), cluster.remove_node, [node, False])
            remove.start()
            until_done(out, n_workers=3)
            remove.join()
            assert bytes_of(out) == one
    finally:
        ray.shutdown()
        cluster.shutdown()
        ray.init("local", **SIZE, **SHUT_OFF)


COMMANDS = {
    "audit": ["--limit", "6", "--benign", "demo", "--size", "2", "--n-random", "2", "--anyway", "--damage-tokens", "2"],
    "scan": ["--limit", "17", "--benign", "demo", "--prefixes", "2"],
}


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_one_process_seven_shards_and_three_workers_write_the_same_bytes(ray, command, tmp_path):
    def code_of(*arguments):
        return subprocess.run([sys.executable, "-m", "safetyheads", *map(str, arguments)], check=False).returncode

    def start(out, *more):
        prompts = ["--prompts", "demo", "--max-new-tokens", "12", "--memory", "1", "--quiet"]
        return code_of(command, "demo:aligned_a", *prompts, *COMMANDS[command], "--out", out, *more)

    def files(folder):
        """Results, answers and pages: what a reader sees."""
        places = bytes_of(folder).items()
        return {place: content for place, content in places if not place.startswith(("plan/", "remembered/"))}

    assert start(tmp_path / "one") == 0
    folders, merged, codes = [tmp_path / f"{index}-of-7" for index in range(1, 8)], tmp_path / "merged", []
    while 0 not in codes:
        tasks = list(enumerate(folders, start=1))
        random.shuffle(tasks)
        with ThreadPoolExecutor(2) as two:
            codes = list(two.map(lambda task: start(task[1], "--shard", f"{task[0]}/7"), tasks))
        assert set(codes) <= {0, 3}
        assert code_of("merge", merged, *folders) == 0
        for folder in folders:
            shutil.copytree(merged, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock*"))
    assert start(merged) == 0
    # Of a real run too, workers are killed: the same bytes.
    kills, stop = [], threading.Event()
    killer = threading.Thread(target=kill_workers, args=(tmp_path / "ray", kills, stop, 3, 4.0))
    killer.start()
    assert start(tmp_path / "ray", "--ray", ray.get_runtime_context().gcs_address, "--workers", "3") == 0
    stop.set()
    killer.join()
    assert kills
    one = files(tmp_path / "one")
    assert {"results.json", "report/index.html"} < one.keys()
    for other in (merged, tmp_path / "ray"):
        assert {place: content == one.get(place) for place, content in files(other).items()} == dict.fromkeys(one, True)


if __name__ == "__main__":
    until_done(Path(sys.argv[1]))

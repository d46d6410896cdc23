"""Shards of a run give the bytes that one process gives; what does not fit is refused in one line."""

import errno
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from safetyheads.errors import ElsewhereError, IncompleteError, InputError
from safetyheads.runs import kept_answers
from safetyheads.runs.audit import read_prompts, run_audit
from safetyheads.runs.config import AsrConfig, AuditConfig, SaharaConfig, ScanConfig, ShipsConfig
from safetyheads.runs.directory import RunDirectory, records_place, status_of
from safetyheads.runs.exhaustive_scan import run_scan
from safetyheads.runs.merge import merge
from safetyheads.runs.run import mixed_notes
from safetyheads.runs.shards import Shard, owners
from safetyheads.runs.single_steps import run_asr, run_sahara, run_ships

MODEL = "demo:aligned_a"
SHORT = {"limit": 6, "max_new_tokens": 12, "memory": 1.0}
AUDIT = AuditConfig(MODEL, "demo", "demo", size=2, n_random=2, anyway=True, damage_tokens=2, **SHORT)
SCREENED = replace(AUDIT, screen=True, candidates=3, sample=2)
SCAN = ScanConfig(MODEL, "demo", "demo", prefixes=2, **SHORT)
BESIDE = ("starts", "timings.json", "set-aside")
"""What differs by nature: dates, seconds, machines."""


def bytes_of(folder):
    """Every file but those that differ by nature, by its place."""
    places = {
        path.relative_to(folder): path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name
    }
    return {str(place): path.read_bytes() for place, path in places.items() if place.parts[0] not in BESIDE}


def rounds(carry_out, engine, config, folder, n_shards):
    """Run every shard, in another order each round, until one writes the results."""
    for number in range(12):
        order, ended = list(range(1, n_shards + 1)), []
        random.Random(number).shuffle(order)
        for index in order:
            with suppress(ElsewhereError):
                carry_out(engine, config, folder, shard=Shard(index, n_shards))
                ended.append(index)
        if ended:
            return number + 1
    raise AssertionError("the rounds do not end")


def test_the_command_plans_the_known_units_and_a_shard_of_it_ends_with_3(run, tmp_path):
    out, settings = tmp_path / "r", ("--prompts", "demo", "--limit", 6, "--memory", 1, "--out", tmp_path / "r")
    code, _, err = run("plan", 2, "ships", MODEL, *settings)
    said = " ".join(err.split())
    assert (code, "2 shards end after 3 rounds at most" in said) == (0, True)
    assert "--array=1-2 --dependency=afterany:$job JOB" in said
    (planned,) = (json.loads(path.read_text()) for path in out.glob("plan/*.json"))
    assert [path for folder in ("shards", "completions") for path in out.glob(f"{folder}/*")] == []
    code, _, err = run("ships", MODEL, *settings, "--shard", "1/2")
    assert (code, "run this array again" in err) == (3, True)
    ((places, _),) = planned["units"]
    assert all((out / place).exists() for place in places) == (owners({tuple(places): 1.0}, 2)[places[0]] == 1)


@pytest.mark.parametrize(
    ("carry_out", "config"),
    [
        (run_ships, ShipsConfig(MODEL, "demo", limit=6, memory=1.0)),
        (run_sahara, SaharaConfig(MODEL, "demo", limit=6, size=1, memory=1.0)),
        (run_asr, AsrConfig(MODEL, "demo", groups=("1-3,2-5", "1-3"), query_level=2, **SHORT)),
        (run_audit, AUDIT),
        (run_audit, SCREENED),
        (run_scan, SCAN),
    ],
    ids=["ships", "sahara", "asr", "audit", "screened", "scan"],
)
def test_shards_of_one_directory_write_the_bytes_of_one_process(engine, tmp_path, monkeypatch, carry_out, config):
    monkeypatch.setattr(kept_answers, "_LEAST_PROMPTS", 2)  # so that unablated answers have several parts
    carry_out(engine, config, tmp_path / "one")
    n = rounds(carry_out, engine, config, tmp_path / "many", 2)
    planned = dict(RunDirectory.look(tmp_path / "many").planned())
    assert len(planned.get("unablated", ())) > 4 or carry_out in (run_ships, run_sahara, run_asr)
    assert 1 < n <= carry_out(engine, config, tmp_path / "none", dry_run=True)["rounds"]
    if config is SCREENED:  # units are the rounds, and what is left with the sample: 5 a step, and not 32
        reached = RunDirectory.look(tmp_path / "many").planned()
        planned = [(stage, units) for stage, units in reached if "harmful_search" in stage]
        assert any(stage.startswith("screening-") for stage, _ in planned)
        cost = sum(sum(units.values()) for stage, units in planned if stage.startswith("scores-"))
        asked = engine.ask(read_prompts(config)["harmful_search"])
        assert 0 < cost <= 15 * sum(map(len, asked.token_ids))
    one, many = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "many")
    assert sorted(one) == sorted(many)
    assert [place for place in one if one[place] != many[place]] == []


# Units and shards, without a model.


def unit_files(folder, shard=None, config=None, values=(1.0, 2.0, 3.0), stops=False):
    """A run of a stage of three units of costs 3, 1 and 2; which values a shard gives, or what it raises."""
    config = {"a": 1} if config is None else config
    with RunDirectory.start(folder, config, {}, shard=shard) as run:
        units = {f"{number}": value for number, value in enumerate(values)}
        run.divide("things", {(place(number),): cost for number, cost in zip(units, (3, 1, 2), strict=True)})

        def compute(value):
            if stops:
                raise KeyboardInterrupt
            return [{"value": value}]

        tasks = [
            lambda number=number, value=value: run.records("things", {"n": number}, lambda: compute(value))
            for number, value in units.items()
        ]
        return [records[0]["value"] for records in run.together(*tasks)]


def place(number):
    return records_place("things", {"n": number})


@pytest.fixture
def apart(tmp_path):
    """Three directories, each with the units of one shard."""
    folders = [tmp_path / f"{index}" for index in (1, 2, 3)]
    for index, folder in enumerate(folders, start=1):
        with pytest.raises(ElsewhereError, match=r"2 units of other shards, of things; .*run this array again"):
            unit_files(folder, Shard(index, 3))
    return folders


def test_units_go_in_falling_cost_to_the_least_loaded_shard_and_each_shard_computes_its_own():
    costs = {("a",): 5.0, ("b", "c"): 3.0, ("d",): 3.0, ("e",): 1.0}
    found = owners(costs, 2)
    assert found["b"] == found["c"] == found["d"] != found["a"] == found["e"]
    assert found == owners(dict(reversed(costs.items())), 2)
    many = {(f"{number}",): 1.0 for number in range(100)}
    assert sorted(list(owners(many, 8).values()).count(index) for index in range(1, 9)) == [12] * 4 + [13] * 4
    shard = Shard(1, 2)
    shard.divide(costs)
    assert [name for name in "abcde" if shard.takes(name)] in (["a", "e"], ["b", "c", "d"])
    assert shard.takes("what nobody divided")
    tracemalloc.start()
    assert len(set(owners(costs, 1_000_000).values())) == len(costs)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    planner = Shard(0, 2)
    planner.divide(costs)
    assert not any(map(planner.takes, "abcde"))


def task_of_array(**told):
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in told.items()}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("3/8", {}, (3, 8)),
        (None, {"RANK": "1", "WORLD_SIZE": "4"}, (1, 1)),
        ("env", {"RANK": "1", "WORLD_SIZE": "4"}, (2, 4)),
        ("env", task_of_array(ID=3, COUNT=4, MIN=1), (3, 4)),
        ("env", {}, "needs a job array"),
        ("env", task_of_array(ID=3, COUNT=4, MIN=1) | {"RANK": "0", "WORLD_SIZE": "1"}, (3, 4)),
        (
            "env",
            task_of_array(ID=3, COUNT=4, MIN=1) | {"RANK": "1", "WORLD_SIZE": "8"},
            r"several arrays \(SLURM_ARRAY_TASK_COUNT 4, WORLD_SIZE 8\): say --shard I/N itself",
        ),
        # Only the tasks that were lost were sent again.
        (
            "env",
            task_of_array(ID=5, COUNT=2, MIN=1, MAX=5),
            r"has to say --shard I/N itself, such as --shard \$SLURM_ARRAY_TASK_ID/N",
        ),
        ("9/8", {}, "I from 1 to N"),
    ],
)
def test_a_shard_is_named_or_read_from_the_environment(text, environment, expected):
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            Shard.parse(text, environment=environment)
    else:
        shard = Shard.parse(text, environment=environment)
        assert (shard.index, shard.count) == expected


def test_a_shard_waits_for_the_files_of_others(tmp_path):
    done, folder = [], tmp_path / "run"
    waiting = threading.Thread(target=lambda: done.append(unit_files(folder, Shard(1, 3, 60.0))))
    waiting.start()
    while not list(folder.glob("completions/[!.]*")):
        time.sleep(0.05)
    with pytest.raises(ElsewhereError):
        unit_files(folder, Shard(2, 3))
    done.append(unit_files(folder, Shard(3, 3)))
    waiting.join()
    assert done == [[1.0, 2.0, 3.0]] * 2


def test_directories_are_merged_once_all_units_are_there(apart, tmp_path):
    whole = tmp_path / "whole"
    RunDirectory.start(killed := tmp_path / "killed", {"a": 1}, {}, shard=Shard(3, 3)).close()  # before its plan
    for folders in (apart[:2], [*apart[:2], killed]):
        with pytest.raises(IncompleteError, match=r"units of things are in no directory: run shards \d of 3 again"):
            merge(whole, folders, {})
    assert not whole.exists()
    merge(whole, apart, {})
    assert unit_files(whole) == [1.0, 2.0, 3.0]
    assert status_of(whole).stages == {"things": {"units": 3, "done": 3, "running": 0, "missing": 0}}


def test_what_does_not_fit_together_is_refused(apart, tmp_path, run):
    other = tmp_path / "other"
    unit_files(other, values=(1.0, 2.5, 3.0))
    with pytest.raises(InputError, match=r"disagree about completions/things-.*: 1 of 1 values differ, .* most 0.5"):
        merge(tmp_path / "out", [*apart, other], {})
    (damaged,) = apart[0].glob("completions/*")
    damaged.write_bytes(damaged.read_bytes()[:-4])
    code, _, err = run("merge", tmp_path / "out", *apart)
    assert (code, err.count("\n") < 5, "is damaged" in err) == (2, True, True)
    unit_files(other_config := tmp_path / "seed", config={"a": 2})
    with pytest.raises(InputError, match=r"other settings: a \(1 -> 2\)"):
        merge(tmp_path / "out", [other, other_config], {})
    assert not (tmp_path / "out").exists()


def test_other_versions_are_joined_only_where_asked_and_say_so(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, version, index, device in ((old, "1", 1, "cpu"), (new, "2", 2, "cuda A100")):
        with pytest.raises(ElsewhereError):
            unit_files(folder, Shard(index, 2), {"versions": {"torch": version}, "device": device})
    with pytest.raises(InputError, match=r'devices: device \("cpu" -> "cuda A100"\), versions torch .*; --mixed joins'):
        merge(tmp_path / "out", [old, new], {})
    unit_files(newest := tmp_path / "newest", config={"versions": {"torch": "3"}, "device": "cpu"})
    for joined in ([old, new], [newest]):
        merge(tmp_path / "out", joined, {}, mixed=True)
    merged = RunDirectory.look(tmp_path / "out")
    config, computed = merged.config, [start for start in merged.read_starts() if start["part"] != "merge"]
    told = [(start["device"], start["versions"]["torch"]) for start in computed]
    assert told == [("cpu", "1"), ("cuda A100", "2"), ("cpu", "3")]
    with RunDirectory.start(tmp_path / "out", config, {}) as directory:
        (note,) = mixed_notes(directory)
    assert 'device ("cpu" -> "cuda A100"), versions torch ("1" -> "2"), versions torch ("1" -> "3")' in note
    assert RunDirectory.verify(tmp_path / "out").damaged == {}


def test_units_of_other_devices_may_differ_a_little_and_the_largest_limit_of_near_ties_holds(tmp_path):
    folders = [tmp_path / name for name in ("cpu", "a100", "h100")]
    for folder, added, limit in zip(folders, (0.0, 5e-6, 2e-5), (1e-4, 3e-4, 2e-4), strict=True):
        unit_files(folder, None, {"device": folder.name}, (1.0 + added, 2.0, 3.0))
        with RunDirectory.start(folder, {"device": folder.name}, {}) as run:
            run.remember("tolerance_5", limit)
    merge(tmp_path / "out", folders[:2], {}, mixed=True)
    assert unit_files(tmp_path / "out", None, {"device": "cpu"}) == [1.0, 2.0, 3.0]
    with RunDirectory.start(tmp_path / "out", {"device": "cpu"}, {}) as run:
        assert run.remembered()["tolerance_5"] == 3e-4
    with pytest.raises(InputError, match="numbers by at most 2e-05"):
        merge(tmp_path / "other", [folders[0], folders[2]], {}, mixed=True)
    assert not (tmp_path / "other").exists()


def test_the_shards_of_a_sweep_are_told_and_joined_audit_by_audit(tmp_path, run, run_json):
    for name in ("first", "second"):
        for index in (1, 2):
            with pytest.raises(ElsewhereError):
                unit_files(tmp_path / f"shard{index}" / name, Shard(index, 2))
    told = run_json("status", tmp_path / "shard1")["runs"]
    assert {name: status["missing_shards"] for name, status in told.items()} == {"first": "2", "second": "2"}
    code, _, err = run("merge", tmp_path / "out", tmp_path / "shard1")
    assert (code, "run shards 2 of 2 again" in err) == (3, True)
    code, _, err = run("merge", tmp_path / "out", tmp_path / "shard1", tmp_path / "shard3")
    assert (code, "is not a run directory" in err) == (2, True)
    damaged = next((tmp_path / "shard2" / "second" / "completions").iterdir())
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    code, _, err = run("merge", tmp_path / "out", tmp_path / "shard1", tmp_path / "shard2")
    assert (code, damaged.name in err, (tmp_path / "out").exists()) == (2, True, False)
    damaged.write_bytes(whole)
    assert run_json("merge", tmp_path / "out", tmp_path / "shard1", tmp_path / "shard2")["files"] == 6
    assert [unit_files(tmp_path / "out" / name) for name in ("first", "second")] == [[1.0, 2.0, 3.0]] * 2
    assert run_json("status", tmp_path / "out" / "first")["seconds_left"] in (None, 0.0)


def test_a_shard_judges_its_own_answers_again_and_results_list_what_others_wrote(tmp_path):
    asked = []

    def answers(run):
        run.divide("things", {(place(number),): 1.0 for number in range(4)})

        def judged(number):
            def mend(_):
                asked.append(number)
                return [{"failed": False}]

            return run.records("things", {"n": number}, lambda: [{"failed": True}], mend, lambda of: of["failed"])

        return [judged(number) for number in range(4)]

    with RunDirectory.start(tmp_path, {}, {}) as run:
        answers(run)
    with (
        RunDirectory.start(tmp_path, {}, {}, shard=Shard(1, 2)) as first,
        RunDirectory.start(tmp_path, {}, {}, shard=Shard(2, 2)) as second,
    ):
        answers(first)
        assert len(asked) == 2
        answers(second)
        # What it used is no longer what is stored.
        with pytest.raises(ElsewhereError):
            first.write_results({})
        second.write_results({})
    assert sorted(asked) == [0, 1, 2, 3]
    assert [record["failed"] for record in RunDirectory.open(tmp_path).stored_records()] == [False] * 4


def test_times_that_two_processes_add_at_once_are_all_kept(tmp_path, monkeypatch):
    reading, read = threading.Event(), RunDirectory.read_timings

    def slowly(run):
        known = read(run)
        if not reading.is_set():
            reading.set()
            time.sleep(0.3)
        return known

    monkeypatch.setattr(RunDirectory, "read_timings", slowly)
    with RunDirectory.start(tmp_path, {}, {}) as first, RunDirectory.start(tmp_path, {}, {}, "other") as second:
        adding = threading.Thread(target=first.add_timings, args=({"seconds": {"a": 1}},))
        adding.start()
        reading.wait()
        second.add_timings({"seconds": {"b": 2}})
        adding.join()
        assert second.read_timings()["seconds"] == {"a": 1, "b": 2}


def test_status_counts_processes_at_work_and_shards_that_computed(tmp_path):
    planner, worker = Shard(0, 16), Shard()
    worker.part = "ray-1"
    with RunDirectory.start(tmp_path, {}, {}, shard=planner) as run:
        run.divide("things", {(place(number),): 1.0 for number in range(4)})
    assert status_of(tmp_path).shards == 16
    with RunDirectory.start(tmp_path, {}, {}, shard=worker) as run:
        run.records("things", {"n": 0}, lambda: [{"value": 1}])
    RunDirectory.start(tmp_path, {}, {}, shard=Shard(1, 2)).close()
    for log, number in zip(sorted(tmp_path.glob("starts/*.jsonl")), (1, 2, 3), strict=True):
        with log.open("a") as file:
            file.write(json.dumps({"place": place(number)}) + "\n")
    RunDirectory.start(tmp_path, {}, {}, shard=planner).close()
    status = status_of(tmp_path)
    assert (status.shards, status.stages["things"]["running"]) == (2, 3)
    assert status.seconds_left == pytest.approx(status.seconds_a_unit)


def test_status_reads_what_is_done_in_work_and_missing(apart, tmp_path, run):
    with pytest.raises(KeyboardInterrupt):
        unit_files(tmp_path / "killed", Shard(2, 3), stops=True)
    (start,) = (json.loads(path.read_text()) for path in (tmp_path / "killed").glob("starts/[!.]*.json"))
    assert (start["host"], start["part"]) == (socket.gethostname(), "shard-2-of-3")
    found = json.loads(run("status", tmp_path / "killed", "--json")[1])
    assert found["stages"]["things"] == {"units": 3, "done": 0, "running": 1, "missing": 2}
    assert (found["shards"], found["missing_shards"], found["finished"]) == (3, "1-3", False)
    (log,) = apart[0].glob("starts/*.jsonl")
    log.write_text('[]\n{"place": [], "seconds": "x"}\n{"place": "y", "seconds": null}\n' + log.read_text() + '{"pl')
    status = status_of(apart[0])
    assert (status.stages["things"]["done"], status.missing_shards.count("1")) == (1, 0)
    assert status.seconds_left is not None
    assert "--array=2-3" in run("status", apart[0])[1].replace("\n", " ")
    (mine,) = (path.name for path in apart[0].glob("completions/*"))
    (apart[0] / "completions" / mine).unlink()
    assert status_of(apart[0]).missing_shards == "1-3"


def test_a_shards_damaged_file_is_done_again_by_that_shard(apart):
    (file,) = apart[0].glob("completions/*")
    before = file.read_bytes()
    file.write_bytes(before[:20])
    with pytest.raises(ElsewhereError):
        unit_files(apart[0], Shard(2, 3))
    assert not file.exists()
    with pytest.raises(ElsewhereError):
        unit_files(apart[0], Shard(1, 3))
    assert file.read_bytes() == before


def test_a_shard_that_is_killed_in_a_unit_goes_on_from_there(apart, tmp_path):
    program = (
        "import os, sys, test_shards; from pathlib import Path; from safetyheads.runs.shards import Shard\n"
        "os.replace = lambda *paths: os.kill(os.getpid(), 9) if 'completions' in str(paths) else os.rename(*paths)\n"
        "test_shards.unit_files(Path(sys.argv[1]), Shard(2, 3))"
    )
    folder = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run([sys.executable, "-c", program, folder], env=environment, check=False)
    assert (ended.returncode, len(list(folder.glob("completions/.*.partial")))) == (-9, 1)
    assert status_of(folder).stages["things"] == {"units": 3, "done": 0, "running": 1, "missing": 2}
    with pytest.raises(ElsewhereError):
        unit_files(folder, Shard(2, 3))
    assert bytes_of(folder) == bytes_of(apart[1])


def test_a_full_disk_is_one_line_and_the_unit_is_done_again(apart, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def work():
        return unit_files(folder, Shard(1, 3))

    folder, fsync, n_left = tmp_path / "full", os.fsync, 40
    # A disk that fills up at any moment of the start.
    for n_left in range(40):
        left = iter([fsync] * n_left)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor, left=left: next(left, full)(descriptor))
            with pytest.raises(
                InputError, match=r"cannot be written: No space left on device$|of other shards"
            ) as told:
                work()
        if isinstance(told.value, ElsewhereError):
            break
        assert len(str(told.value).splitlines()) == 1
    assert 3 < n_left < 39
    assert bytes_of(folder) == bytes_of(apart[0])


def test_clocks_need_not_agree(apart, tmp_path, monkeypatch):
    folder, days = tmp_path / "run", {1: 1000, 2: -1000, 3: 0}
    now, now_ns = time.time, time.time_ns
    for index in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda days=days[index]: now() + days * 86_400)
            patch.setattr(time, "time_ns", lambda days=days[index]: now_ns() + days * 86_400 * 10**9)
            if index < 3:
                with pytest.raises(ElsewhereError):
                    unit_files(folder, Shard(index, 3))
            else:
                assert unit_files(folder, Shard(index, 3)) == [1.0, 2.0, 3.0]
    assert status_of(folder).stages["things"]["done"] == 3
    merge(tmp_path / "merged", apart, {})
    assert unit_files(tmp_path / "merged") == [1.0, 2.0, 3.0]


def test_a_rename_that_is_seen_late_costs_a_wait_or_a_round(tmp_path, monkeypatch):
    """A network file system shows a file of another machine only after some looks at it."""
    looks, exists, folder = Counter(), os.path.lexists, tmp_path / "run"
    for index in (1, 2):
        with pytest.raises(ElsewhereError):
            unit_files(folder, Shard(index, 3))
    of_others = set(folder.glob("completions/[!.]*"))

    def sees(path):
        looks[path] += 1
        return exists(path) and (path not in of_others or looks[path] > 3)

    monkeypatch.setattr(os.path, "lexists", sees)
    with pytest.raises(ElsewhereError, match=r"not there yet: 2 units of other shards"):
        unit_files(folder, Shard(3, 3))
    looks.clear()
    assert unit_files(folder, Shard(3, 3, 60.0)) == [1.0, 2.0, 3.0]


def test_the_plan_of_the_first_of_several_processes_holds(tmp_path):
    with (
        RunDirectory.start(tmp_path, {}, {}, shard=Shard(1, 2)) as first,
        RunDirectory.start(tmp_path, {}, {}, shard=Shard(2, 2)) as second,
    ):
        assert second.remembered() == {}
        assert first.remember("plan", [1]) == [1]
        assert second.remember("plan", [2]) == [1]
        assert second.remembered("plan") == {"plan": [1]}
        with pytest.raises(InputError, match=r"is in use by process"):
            RunDirectory.start(tmp_path, {}, {}, shard=Shard(2, 2))

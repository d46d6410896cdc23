"""The run directory: resumed by content, whole or absent at every moment, one writer, no strangers."""

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import textwrap

import pytest
import torch
from sealed_runs import seal

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.files import write_atomically
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.stored_files import content_key

CONFIG = {"model": {"sha256": "ab"}, "ablation": {"name": "ua", "epsilon": 1e-5}, "sizes": [1, 2, 3]}
FIELDS = {"heads": ["1-3", "2-1"], "n_prompts": 48}


def started(path, config=CONFIG, command="audit"):
    return RunDirectory.start(path, config, {"command": command})


@pytest.fixture
def run(tmp_path):
    with started(tmp_path / "run") as run:
        yield run


def names(path):
    return {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file()}


def in_process(program, path):
    """A Python process in which ``run`` is a started run."""
    start = "import os, sys, time\nfrom safetyheads.runs.directory import RunDirectory\n"
    start += "run = RunDirectory.start(sys.argv[1], {}, {})\n"
    arguments = [sys.executable, "-c", start + textwrap.dedent(program), str(path)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("is_there", [False, True])
def test_start_makes_a_private_directory_that_git_ignores_and_adds_its_provenance(tmp_path, is_there):
    path = tmp_path / "runs"
    if is_there:
        path.mkdir(mode=0o755)
    started(path, command="first").close()
    assert (path / ".gitignore").read_text() == "*\n"
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, path / "manifest.json")] == [0o700, 0o600]
    # A config of tuples is the config of lists that was stored.
    with started(path, CONFIG | {"sizes": (1, 2, 3)}, command="second") as run:
        starts = run.read_starts()
    assert [start["command"] for start in starts] == ["first", "second"]
    assert [start["pid"] for start in starts] == [os.getpid()] * 2
    assert run.config == CONFIG


def test_another_config_is_refused_with_each_field_that_differs(tmp_path):
    started(tmp_path / "run").close()
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    other = {"model": {"sha256": "ab"}, "ablation": {"name": "ua", "epsilon": 0.5}, "sizes": [1, 2], "seed": 1}
    other["weights_sha256"] = "cd"
    with pytest.raises(InputError) as error:
        started(tmp_path / "run", other)
    for words in ("ablation epsilon (1e-05 -> 0.5)", "sizes 2 (3 -> none)", "seed (none -> 1)", "weights,"):
        assert words in str(error.value)
    assert "cd" not in str(error.value)
    assert "model.sha256" not in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    started(tmp_path / "long", {f"field_{number}": "a" * 500 for number in range(40)}).close()
    with pytest.raises(InputError, match="and 34 more") as error:
        started(tmp_path / "long", {f"field_{number}": "b" * 500 for number in range(40)})
    assert len(str(error.value)) < 1000


def test_a_strangers_directory_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    mode = tmp_path.stat().st_mode
    with pytest.raises(InputError, match=r"not empty and holds no run \(it has thesis.tex\)"):
        started(tmp_path)
    assert (names(tmp_path), tmp_path.stat().st_mode) == ({"thesis.tex"}, mode)
    for path in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "below"):
        with pytest.raises(InputError, match=r"is a file|Not a directory"):
            started(path)


def test_a_start_killed_before_its_manifest_can_be_started_again(tmp_path):
    (tmp_path / ".lock-run").touch()
    partial = tmp_path / f".manifest.json.{socket.gethostname()}.{2**30}.partial"  # a process that cannot be
    partial.write_text("{")
    started(tmp_path).close()
    assert not partial.exists()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 99}))
    with pytest.raises(InputError, match="its schema is 99, this one reads"):
        started(tmp_path)


def test_the_lock_holds_across_processes_and_ends_with_a_kill(tmp_path):
    with in_process("print('started', flush=True); time.sleep(600)", tmp_path / "run") as other:
        try:
            assert other.stdout.readline() == "started\n"
            with pytest.raises(InputError, match=rf"in use by process {other.pid} on \S+, since 20"):
                started(tmp_path / "run", {})
            RunDirectory.start(tmp_path / "run", {}, {}, "judge-paper").close()  # another part is free
        finally:
            other.kill()
    started(tmp_path / "run", {}).close()


def test_a_key_depends_on_values_and_not_on_order():
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": (1, 2), "a": 1})
    keys = {content_key(fields) for fields in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": None}, {})}
    assert len(keys) == 6
    with pytest.raises(ValueError, match="JSON compliant"):
        content_key({"epsilon": float("nan")})


def test_tensors_are_computed_once_and_read_back_bit_for_bit(tmp_path):
    given = {
        "ships": torch.randn(5, 4, 8, dtype=torch.float64),
        "hidden": torch.randn(3, 7).bfloat16(),
        "ids": torch.arange(6).view(2, 3).T,
        "empty": torch.zeros(0, 4),
    }
    given["view"] = given["ships"][1:3]
    with started(tmp_path / "run") as run:
        first = run.tensors("ships", FIELDS, lambda: given)
    with started(tmp_path / "run") as run:
        second = run.tensors("ships", dict(reversed(FIELDS.items())), pytest.fail)
        for stage, fields in (("angles", FIELDS), ("ships", FIELDS | {"row": 1})):
            assert run.tensors(stage, fields, lambda: {"x": torch.ones(1)}).keys() == {"x"}
    for read in (first, second):
        assert read.keys() == given.keys()
        assert all(read[name].dtype == tensor.dtype for name, tensor in given.items())
        assert all(torch.equal(read[name], tensor) for name, tensor in given.items())


def test_equal_shards_and_results_have_equal_bytes(tmp_path):
    results, contents = {"b": [0.1, 1e-300, 1 / 3], "a": {"y": None, "x": "é"}}, []
    for name, value in (("one", results), ("two", dict(reversed(results.items())))):
        with started(tmp_path / name) as run:
            run.tensors("ships", FIELDS, lambda: {"b": torch.arange(3.0), "a": torch.zeros(2)})
            run.write_results(value)
        (shard,) = (tmp_path / name / "shards" / "ships").iterdir()
        contents.append((shard.name, shard.read_bytes(), (tmp_path / name / "results.json").read_bytes()))
    assert contents[0] == contents[1]
    assert run.read_results() == results


def test_records_are_computed_once_and_keep_their_text(run):
    records = [{"text": "a\u2028b\n</script>é\ud800", "n": 1}, {"text": "", "n": None}]
    for compute in (lambda: records, pytest.fail):
        assert run.records("asr", FIELDS, compute) == records
    for compute in (list, pytest.fail):
        assert run.records("none", FIELDS, compute) == []
    assert list(run.stored_records()) == records
    with pytest.raises(ValueError, match="no file name"):
        run.records("../outside", FIELDS, list)
    assert len((run.path / "completions" / f"asr-{content_key(FIELDS)}.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(("keep", "broken"), [(0, b""), (4, b'{"n": 1}'), (40, b'{"n": 1}\n{"n'), (-1, b"\x80")])
def test_what_is_broken_is_computed_again_with_a_warning(run, keep, broken, caplog):
    for made in (1, 2):
        given, records = {"x": torch.full((9,), made)}, [{"n": made}, {"n": 2}]
        assert torch.equal(run.tensors("ships", FIELDS, lambda given=given: given)["x"], given["x"])
        assert run.records("asr", FIELDS, lambda records=records: records) == records
        if made == 1:
            (shard,), (lines,) = (run.path / "shards" / "ships").iterdir(), (run.path / "completions").iterdir()
            shard.write_bytes(shard.read_bytes()[:keep])
            lines.write_bytes(broken)
    assert caplog.text.count("is damaged: ") == 2
    assert sum("set-aside" in name for name in names(run.path)) == 2


@pytest.mark.parametrize("breaks", [os.unlink, lambda path: path.write_bytes(b"")], ids=["lost", "damaged"])
def test_a_run_in_work_goes_on_without_records_that_are_lost_or_damaged(run, breaks, caplog):
    for name in ("a", "b"):
        run.records("asr", {"name": name}, lambda name=name: [{"name": name}])
    run.write_results({})
    breaks(run.path / "completions" / f"asr-{content_key({'name': 'a'})}.jsonl")
    assert list(run.stored_records()) == [{"name": "b"}]
    assert "is damaged: " in caplog.text
    run.write_results({})
    assert list(RunDirectory.open(run.path).stored_records()) == [{"name": "b"}]
    assert run.records("asr", {"name": "a"}, lambda: [{"name": "a"}]) == [{"name": "a"}]
    assert len(list(run.stored_records())) == 2


def test_earlier_results_are_those_that_stand_there_now(run):
    run.write_results({"n": 1})
    first = run.earlier_results()
    with RunDirectory.start(run.path, run.config, {}, "judge") as other:
        other.write_results({"n": 2})
    assert (first["n"], run.earlier_results()["n"]) == (1, 2)


def test_a_directory_that_is_removed_at_work_is_not_made_again(run):
    shutil.rmtree(run.path)
    for write in (
        lambda: run.records("asr", FIELDS, pytest.fail),
        lambda: run.tensors("ships", FIELDS, pytest.fail),
        lambda: run.remember("plan", 1),
        lambda: run.write_results({}),
        lambda: run.add_timings({"seconds": 1}),
    ):
        with pytest.raises(InputError, match=r"was removed or moved|No such file"):
            write()
    assert not run.path.exists()


def test_what_fails_to_compute_leaves_nothing_behind(run):
    before = names(run.path)
    with pytest.raises(KeyboardInterrupt):
        run.tensors("ships", FIELDS, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert names(run.path) == before
    with pytest.raises(ValueError, match=r"results\.json: scores\.mean_ships\.1 is not a finite number"):
        run.write_results({"scores": {"mean_ships": [0.0, float("nan")]}})
    assert names(run.path) == before


def test_a_finished_run_is_read_while_it_is_held_and_what_is_closed_is_not_written(run, tmp_path):
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
        started(run.path)  # a second start in this process
    with pytest.raises(InputError, match=r"is not a run directory: it has no manifest\.json"):
        RunDirectory.open(tmp_path)
    with pytest.raises(InputError, match="not finished; start it again with the same command"):
        RunDirectory.open(run.path)
    run.write_results({"kind": "audit"})
    opened = RunDirectory.open(run.path)
    assert opened.read_results() == {"kind": "audit"}
    assert opened.write_report("<html>").read_text() == "<html>"
    run.close()
    for closed in (run, opened):
        with pytest.raises(RuntimeError, match="closed or was opened to be read"):
            closed.write_results({})


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, InputError), (errno.EROFS, InputError), (errno.EIO, SafetyheadsError)]
)
def test_a_failing_disk_is_one_line_and_leaves_no_partial_file(run, tmp_path, monkeypatch, number, kind):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    before = names(tmp_path)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=os.strerror(number)) as error:
        run.records("asr", FIELDS, lambda: [{"n": 1}])
    assert isinstance(error.value, InputError) == (kind is InputError)
    assert "\n" not in str(error.value)
    with pytest.raises(kind):
        started(tmp_path / "new")
    assert names(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("place", ["completions/../../mine", "{mine}", "../mine", "mine"])
def test_no_list_of_files_reaches_out_of_a_strangers_run(tmp_path, place, caplog):
    (mine := tmp_path / "mine").write_text("mine")
    with started(tmp_path / "run") as run:
        run._write_json("stages/asr.json", {"stage": "asr", "files": [[place.format(mine=mine), 1, "ab"]]})
    with started(tmp_path / "run") as run:
        assert list(run.stored_records()) == []
        for outside in ("../mine", str(mine)):
            with pytest.raises(InputError, match="leads out of the run directory"), run._setting_aside(outside):
                raise InputError("damaged")
    assert mine.read_text() == "mine"
    assert "no stored part of a run" in caplog.text


@pytest.mark.parametrize("folder", ["completions", "set-aside"])
def test_nothing_is_moved_or_written_through_a_link(tmp_path, folder):
    with started(tmp_path / "run") as run:
        run.records("asr", FIELDS, lambda: [{"n": 1}])
    (outside := tmp_path / "outside").mkdir()
    if folder == "completions":
        shutil.move(tmp_path / "run" / folder, outside)
        (file,) = (outside / folder).iterdir()
        (tmp_path / "run" / folder).symlink_to(outside / folder)
        with started(tmp_path / "run") as run, pytest.raises(InputError, match="is a symbolic link"):
            run.records("asr", FIELDS, pytest.fail)
        assert file.exists()
    else:
        (tmp_path / "run" / folder).symlink_to(outside)
        manifest = tmp_path / "run" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"config": {}}))
        with pytest.raises(InputError, match="is a symbolic link"):
            started(tmp_path / "run")
        assert list(outside.iterdir()) == []


def test_a_damaged_run_lends_nothing_and_stops_no_other(run, tmp_path, caplog):
    for name, written in (("broken", "{"), ("old", '{"schema_version": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(written)
    with started(tmp_path / "other") as other:
        other.records("asr", FIELDS, lambda: [{"n": 1}])
    run.borrow([tmp_path / "broken", tmp_path / "old", tmp_path / "other"])
    assert run.records("asr", FIELDS, pytest.fail) == [{"n": 1}]
    assert caplog.text.count("Nothing is read from it") == 2


@pytest.mark.parametrize("has_links", [True, False])
def test_what_is_remembered_first_stays_and_needs_no_hard_links(run, monkeypatch, has_links):
    def link(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    assert [run.remember("plan", value) for value in (1, 2)] == [1, 1]
    (stored,) = (run.path / "remembered").iterdir()
    content = stored.read_bytes()
    write_atomically(stored, b"another process's", replaces=False)
    assert (stored.read_bytes(), len(list(stored.parent.iterdir()))) == (content, 1)


def test_a_kill_while_writing_leaves_the_old_file_whole(tmp_path):
    with started(tmp_path / "run", {}) as run:
        run.write_results({"new": False})
    program = "os.replace = lambda *paths: os.kill(os.getpid(), 9)\nrun.write_results({'new': True})"
    in_process(program, tmp_path / "run").communicate()
    assert RunDirectory.open(tmp_path / "run").read_results() == {"new": False}
    assert any(name.endswith(".partial") for name in names(tmp_path))
    started(tmp_path / "run", {}).close()
    assert not any(name.endswith(".partial") for name in names(tmp_path))


def test_what_holds_something_else_than_was_asked_for_is_set_aside_though_its_checksum_fits(tmp_path, caplog):
    folder = tmp_path / "run"
    with started(folder) as run:
        run.remember("threads", 1)
        run.records("numbers", FIELDS, lambda: [{"n": 1}])
        run.tensors("scores", FIELDS, lambda: {"ships": torch.zeros(2)})
        run.write_results({"kind": "made up"})
        later = [run.path / place for place in run.places()]
    for path in later:
        path.write_bytes(path.read_bytes().replace(b'"value":1', b'"value":[]').replace(b'"n":1', b'"m":1'))
        seal(folder, str(path.relative_to(folder)), alone=True)
    with started(folder) as run:
        assert run.remember("threads", 2) == 2
        assert run.records("numbers", FIELDS, lambda: [{"n": 2}], fits=lambda records: records[0]["n"] == 1) == [
            {"n": 2}
        ]
        assert run.tensors("scores", FIELDS, lambda: {"ships": torch.ones(3)}, lambda of: of["ships"].shape == (3,))
    assert len(names(folder / "set-aside")) == 3
    assert caplog.text.count("it does not hold") + caplog.text.count("does not hold what is read") == 3


@pytest.mark.parametrize("place", ["completions", "stages/numbers.json"])
def test_a_list_or_a_file_that_is_damaged_costs_no_other(tmp_path, place):
    with started(tmp_path) as run:
        for n in range(2):
            run.records("numbers", {"n": n}, lambda n=n: [{"n": n}])
        run.write_results({"kind": "made up"})
    first = next(path for path in sorted((tmp_path / place).glob("*"))) if place == "completions" else tmp_path / place
    first.write_text("{}")
    with started(tmp_path) as run:
        assert len(list(run.stored_records("numbers"))) == (1 if place == "completions" else 2)

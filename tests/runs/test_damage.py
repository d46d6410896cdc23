"""Damaged and ill-fitting files of a run: one line names the field or the file, in every command that reads runs."""

import json
import math
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_values import ODD, places_of, unhurried, with_value
from run_samples import audit_run
from sealed_runs import seal

from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.stored_files import with_checksums

pytestmark = pytest.mark.usefixtures("own_folder")
READING = ("report run", "judge run --judge released --quiet", "compare run run", "compare whole run", "verify run")
DEEP = 100_000


def changed(text, file, field, kind):
    """The file's text with a field of it lost, of another type, not a number, or nested deep."""
    fields = json.loads(text)
    if kind == "deep":
        fields[field] = "HERE"
        return json.dumps(fields).replace('"HERE"', "[" * DEEP + "]" * DEEP)
    if kind == "lost":
        del fields[field]
    else:
        fields[field] = {"another type": 7, "not a number": math.nan}[kind]
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("file", "field", "kind"),
    [
        ("results.json", "verdict", "lost"),
        ("results.json", "verdict", "deep"),
        ("results.json", "checksums", "another type"),
        ("manifest.json", "config", "not a number"),
    ],
)
def test_what_does_not_fit_is_named_by_every_command_and_hides_no_other_run(run, run_json, tmp_path, file, field, kind):
    for name in ("run", "whole"):
        audit_run(tmp_path / name)
    path = tmp_path / "run" / file
    path.write_text(changed(path.read_text(), file, field, kind))
    for command in READING:
        code, out, err = run(*command.split())
        lines = (out + err).strip().splitlines()
        assert code == 2, command
        assert field in lines[-1]
        assert "Traceback" not in err
    history = run_json("history", ".")
    assert [entry["name"] for entry in history["runs"]] == ["whole"]
    assert field in history["skipped"][0]["reason"]


@pytest.mark.parametrize(("field", "value"), [("verdict", 7), ("behaviour", []), ("concentration", {"n": "x"})])
def test_a_field_of_another_type_is_one_line_though_the_checksums_fit(run_json, refused, tmp_path, field, value):
    for name in ("run", "whole"):
        audit_run(tmp_path / name)
    path = tmp_path / "run/results.json"
    fields = {**json.loads(path.read_text()), field: value}
    del fields["checksums"]
    path.write_text(json.dumps(with_checksums(RunDirectory.look(path.parent).key, path.name, fields)))
    for command in ("report run", "compare whole run"):
        assert "does not hold what is read of it" in refused(*command.split())
    assert [entry["name"] for entry in run_json("history", ".")["runs"]] == ["whole"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return audit_run(tmp_path_factory.mktemp("odd") / "whole")


@settings(unhurried, max_examples=60)
@given(st.data(), ODD)
def test_any_place_of_the_results_may_hold_anything_though_the_checksums_fit(run, whole_run, data, value):
    folder = whole_run.parent / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole_run, folder)
    path = folder / "results.json"
    fields = json.loads(path.read_text())
    del fields["checksums"]
    place = data.draw(st.sampled_from([place for place in places_of(fields) if place]))
    path.write_text(json.dumps(with_value(fields, place, value)))
    seal(folder, path.name)
    for command in ("verify", "compare --allow-warnings", "status"):
        name, *options = command.split()
        code, _, err = run(name, *([whole_run] * (name == "compare")), folder, *options)
        assert (code in (0, 1, 2), "Traceback" in err) == (True, False), (command, place)


def test_verify_counts_the_files_and_says_which_are_damaged_or_unlisted(run, tmp_path):
    path = audit_run(tmp_path / "run")
    assert run("verify", path)[:2] == (0, f"{path}: 10 files, 0 of them damaged or lost\n")
    with RunDirectory.start(path, RunDirectory.open(path).config, {}) as again:
        again.records("more", {}, lambda: [{"n": 1}])
    found = json.loads(run("verify", path, "--json")[1])
    assert (len(found["unlisted"]), found["damaged"]) == (1, {})
    (vanilla,) = (path / "completions").glob("vanilla-harmful*")
    vanilla.write_text(vanilla.read_text().replace("complied", "refused", 1))
    code, out, _ = run("verify", path)
    assert (code, "its content does not fit its checksum" in out) == (2, True)
    (path / "results.json").unlink()
    (path / "manifest.json").unlink()
    assert run("verify", path)[0] == 2


def test_pages_are_not_written_through_links_and_pipes_are_not_read(run, refused, tmp_path):
    path, elsewhere = audit_run(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (path / "report").symlink_to(elsewhere)
    assert "report is a symbolic link" in refused("report", path)
    assert list(elsewhere.iterdir()) == []
    results = path / "results.json"
    for make in (os.mkfifo, os.mkdir, lambda place: place.symlink_to(place)):
        results.rmdir() if results.is_dir() else results.unlink()
        make(results)
        for command in ("verify", "report"):
            code, out, err = run(command, path)
            assert (code, "results.json cannot be read" in (out + err).replace("\n", " ")) == (2, True)
    results.unlink()
    results.touch()
    os.truncate(results, 1 << 40)
    assert "results.json is larger than 1024 MiB" in refused("report", path)

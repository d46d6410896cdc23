"""Any file of a run with anything in it: a command does what it does without the change, or one line says why not.

Checksums that fit prove nothing about what a file holds, so the changed file is tried with such checksums too.
"""

import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from experiment_runs import engine_of
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_values import LOST, ODD, places_of, unhurried, with_value
from sealed_runs import seal

from safetyheads.reports import page
from safetyheads.reports.view import index_page
from safetyheads.runs import audit
from safetyheads.runs.stored_files import pack_tensors, unpack_tensors

MODEL, SHORT = "demo:aligned_a", "--limit 3 --out run --quiet"
ANSWERS = f"--prompts demo --max-new-tokens 6 --memory 1 {SHORT}"
JUDGED = {
    "audit": f"audit {MODEL} --size 1 --n-random 1 --anyway --damage-tokens 1 --benign demo {ANSWERS}",
    "scan": f"scan {MODEL} --prefixes 1 --pairs 2 --benign demo {ANSWERS}",
}
"""Runs that later judges and people may be asked about."""
RUNS = JUDGED | {
    "asr": f"asr {MODEL} --heads 1-3 {ANSWERS}",
    "ships": f"ships {MODEL} --prompts demo --memory 1 {SHORT}",
    "sahara": f"sahara {MODEL} --prompts demo --size 2 --memory 1 {SHORT}",
    "eval": f"eval {MODEL} --tasks organism --heads 1-3 {SHORT}",
    "reproduce": f"reproduce fig8 {SHORT}",
}
COMMANDS = {
    "verify": "verify run",
    "judge": "judge run --judge released --quiet",
    "another judge": "judge run --judge paper --quiet",
    "labels": "judge run --validate sheet.csv --quiet",
    "report": "report run",
    "merge": "merge merged run",
    "merge two": "merge merged run whole",
    "status": "status run --json",
    "sheet": "judge run --label-sheet 5 new.csv --json",
    "compare": "compare run whole --json --allow-warnings",
    "compare with": "compare whole run --json --allow-warnings",
    "history": "history . --json",
}
DATED = ("starts", "timings.json", "set-aside")
"""What holds dates and seconds, or was damaged."""
LATER = ("completions/judged-", "completions/verdicts-")
"""What a later judge said."""
LISTED = ("completions", "shards", "remembered", "stages")
"""What others list: checksums of their own do not make such files fit."""


def written(folder):
    """The files that a command wrote, but those that differ by nature."""
    paths = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*.*") if path.is_file()}
    return {place: path.read_bytes() for place, path in paths.items() if not place.startswith((*DATED, "."))}


def held_by(path):
    """What a file holds, however it is laid out."""
    with suppress(ValueError, RecursionError):
        return json.loads(path.read_bytes())
    return path.read_bytes()


class Stored:
    """A finished run in this folder, with a later judge and people's labels, and what commands make of a copy of it."""

    def __init__(self, run, kind):
        self.run, self.commands, self.known = run, COMMANDS | {"again": RUNS[kind]}, {}
        self.carry_out(RUNS[kind])
        if kind in JUDGED:
            self.carry_out(COMMANDS["judge"])
            self.carry_out("judge run --label-sheet 5 sheet.csv")
            header, *rows = Path("sheet.csv").read_text(encoding="utf-8-sig").splitlines()
            Path("sheet.csv").write_text("\n".join([header, *(f"{row}complied" for row in rows)]))
            self.carry_out(COMMANDS["labels"])
        Path("run").rename("whole")
        # Of each kind of file one is as likely as of others, however many there are.
        self.files = {}
        for path in sorted(Path("whole").rglob("*.*")):
            if path.suffix in (".json", ".jsonl", ".safetensors") and path.is_file():
                place = str(path.relative_to("whole"))
                of = place.split("/")[0] + path.suffix if place.startswith(DATED) else place.rpartition("-")[0]
                self.files.setdefault(of or place, []).append(place)

    def carry_out(self, command):
        code, _, err = self.run(*command.split())
        assert code == 0, err

    def outcome(self, name, place=None, content=b"", checksums="old"):
        """Exit code, stderr, and what was printed or written, once a file of the run holds something else."""
        for folder in ("run", "merged"):
            shutil.rmtree(folder, ignore_errors=True)
        Path("new.csv").unlink(missing_ok=True)
        shutil.copytree("whole", "run")
        if place is not None:
            Path("run", place).write_bytes(content)
            if checksums != "old":
                seal(Path("run"), place, alone=checksums == "its own")
            self.is_whole = held_by(Path("run", place)) == held_by(Path("whole", place))
        command = self.commands[name].split()
        code, out, err = self.run(*command)
        made = (out and json.loads(out)) if "--json" in command else written("merged" if "merge" in name else "run")
        return code, err, made

    def without_change(self, name):
        if name not in self.known:
            code, err, self.known[name] = self.outcome(name)
            assert code == 0, err
        return self.known[name]


@pytest.fixture(scope="module")
def stored(request, tmp_path_factory, run):
    """A run of the kind that the test names."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("odd"))
        patched.setattr(page, "pictures", lambda *_: {})
        patched.setattr(audit, "LEAST_BENIGN_TEST", 3)
        patched.setattr("safetyheads.cli.app.load_engine", lambda config, *_, **__: engine_of(config.model))
        yield Stored(run, request.param)


@st.composite
def changes(draw, stored):
    """A file of the run, what it holds instead, and what was done to it."""
    place = draw(st.sampled_from(stored.files[draw(st.sampled_from(sorted(stored.files)))]))
    content = Path("whole", place).read_bytes()
    how = draw(st.sampled_from(["value"] * 5 + ["cut", "flipped", "more"])) if content else "more"
    if how == "value":
        return place, *draw(with_odd_value(place, content))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    flipped = bytes(byte ^ 16 for byte in content[at : at + 1])
    rest = {"cut": b"", "flipped": flipped + content[at + 1 :], "more": b"\xff" + content[at:]}[how]
    return place, content[:at] + rest, (how, at)


@st.composite
def with_odd_value(draw, place, content):
    """A file with another value somewhere, or without it; and where."""
    if place.endswith(".safetensors"):
        held, tensors = unpack_tensors(content)
        name, how = draw(st.sampled_from(sorted(tensors))), draw(st.sampled_from(["nan", "deep", "flat", "type", LOST]))
        was = tensors.pop(name)
        odd = {"nan": was * torch.nan, "deep": was[None], "flat": was.flatten()[1:], "type": was.to(torch.int8)}
        tensors |= {name: odd[how]} if how in odd else {"other": was}
        return pack_tensors(held.run, held.stage, held.key, tensors), (name, how)
    value, lines = draw(ODD | st.just(LOST)), [json.loads(line) for line in content.splitlines() if ".jsonl" in place]
    number = draw(st.integers(0, len(lines) - 1)) if lines else None
    fields = json.loads(content) if number is None else lines[number]
    at = draw(st.sampled_from([at for at in places_of(fields) if at or value is not LOST]))
    changed = with_value(fields, at, value)
    rows = [changed] if number is None else [*lines[:number], changed, *lines[number + 1 :]]
    return "".join(json.dumps(row) + "\n" for row in rows).encode(), (number, at, value)


def holds(stored, name, place, content, checksums):
    """Whether a command does what it does without the change, or says in one line why not."""
    code, err, made = stored.outcome(name, place, content, checksums)
    assert code in (0, 1, 2, 3)
    assert "Traceback" not in err
    lines = err.splitlines()[-1:] if name == "again" else err.splitlines()
    if code and name != "verify":
        assert len(lines) == 1
        assert code == 3 or lines[0].startswith("error: ")
    index_page(Path())  # the pages of whole runs are listed beside it
    # The run's own command cannot ask a later judge again: it names the file, and leaves the judge out or goes on.
    is_later = name == "again" and place.startswith(LATER)
    may_fit = checksums == "all" or (checksums == "its own" and (name == "again" or not place.startswith(LISTED)))
    if code or may_fit or is_later or place.startswith(DATED) or stored.is_whole:  # its checksum was what was changed
        return
    assert name != "verify"
    known = stored.without_change(name)
    if "--json" not in stored.commands[name]:
        # What nobody reads stays as it is, and merged runs may each have a plan of their own.
        other = {of for of in {*made, *known} if made.get(of) != known.get(of) and not of.startswith("plan/")}
        assert other <= {place} - ({place} if name == "again" else set())
    elif name != "history":
        assert (made == known) is True
    elif made != known:
        assert [entry["name"] for entry in made["skipped"]] == ["run"]
        assert [entry["name"] for entry in made["runs"]] == ["whole"]


def any_change(stored, data, name, checksums):
    place, content, _ = data.draw(changes(stored))
    holds(stored, name, place, content, checksums)


examples = partial(given, st.data(), st.sampled_from([*COMMANDS, "again"]), st.sampled_from(["old", "its own", "all"]))


@pytest.mark.parametrize("stored", ["audit", "asr", "eval", "reproduce"], indirect=True)
@settings(unhurried, max_examples=3)
@examples()
def test_a_file_with_anything_in_it_is_used_as_it_was_or_refused_in_one_line(stored, data, name, checksums):
    any_change(stored, data, name, checksums)


@pytest.mark.long
@pytest.mark.parametrize("stored", [*RUNS], indirect=True)
@settings(unhurried, max_examples=1000)
@examples()
def test_many_changes_to_any_file_are_harmless_or_refused_in_one_line(stored, data, name, checksums):
    any_change(stored, data, name, checksums)

"""Numbers that commands take, of any form: used as meant, or refused in one line, and nothing is left behind."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_values import unhurried

from safetyheads.cli import app
from safetyheads.errors import InputError
from safetyheads.runs.estimate import Machine

NUMBERS = [
    "-1",
    "0",
    "1",
    "8",
    "2.5",
    "1e3",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e400",
    "9" * 20,
    "9" * 5000,
    "x",
    "",
    " ",
]
NUMBERS += ["0x10", "1_0", "\u0663", "\ud800", "a\x1b[31m", "--", "-", "None", "2/3"]
MACHINES = ["H100", "2xH100", "0xH100", "99999xH100", "H100@0", "H100@999999", "H100@1e9", "2 x H100", "\ud800"]
OPTIONS = ["--top", "--memory", "--wait", "--limit", "--workers", "--gpus-per-worker", "--judge-workers", "--threads"]
OPTIONS += ["--size", "--n-random", "--seed", "--max-new-tokens", "--epsilon", "--candidates", "--sample", "--machine"]
ODD = st.one_of(
    st.sampled_from([*NUMBERS, *MACHINES]), st.text(max_size=5), st.floats().map(str), st.integers().map(str)
)
GIVEN = st.lists(st.tuples(st.sampled_from(OPTIONS), ODD), max_size=2)
KINDS = st.sampled_from(["ships", "sahara", "audit", "scan"])
COMMAND = ("demo:aligned_a", "--prompts", "demo", "--quiet")
READ = "the model would be read now"


@pytest.fixture
def unread(monkeypatch, own_folder):
    """Where a model would be read, the command ends."""

    def read(*_, **__):
        raise InputError(READ)

    monkeypatch.setattr(app, "load_engine", read)
    monkeypatch.setattr(Machine, "engine", read)


def refused_whole(run, *arguments):
    code, out, err = run(*arguments)
    if code != 0:  # 0 where help is asked for
        assert (code, out, err.count("\n")) == (2, "", 1), err
    assert not list(Path().iterdir())
    return err


@settings(unhurried, max_examples=15)
@given(KINDS, GIVEN)
@example("ships", [("--top", "0")])
@example("ships", [("--top", "9" * 5000)])
def test_any_number_of_a_command_is_used_or_refused_in_one_line(run, unread, kind, given_options):
    refused_whole(run, kind, *COMMAND, *(text for option in given_options for text in option))


@settings(unhurried, max_examples=15)
@given(ODD, KINDS, GIVEN, st.sampled_from([(), ("--machine", "H100")]))
@example("0", "audit", [], ())
def test_any_number_of_a_plan_is_used_or_refused_in_one_line(run, unread, shards, kind, given_options, machine):
    options = (text for option in given_options for text in option)
    refused_whole(run, "plan", shards, kind, *COMMAND, *machine, *options)


def test_numbers_in_measure_come_to_the_model(run, unread):
    for command in (("ships", *COMMAND, "--top", 3), ("plan", 8, "audit", *COMMAND, "--anyway", "--machine", "2xH100")):
        assert READ in refused_whole(run, *command)
    assert "top must be at least 1" in refused_whole(run, "ships", *COMMAND, "--top", 0)
    assert READ not in refused_whole(run, "plan", 0, "audit", *COMMAND)
    assert "--label-sheet is a whole number" in refused_whole(run, "judge", ".", "--label-sheet", 1.5, "new.csv")

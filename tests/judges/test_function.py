import json
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from run_samples import audit_run

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion, Verdict
from safetyheads.judges.function import CallableJudge, _announce, judge_from_path, judge_of_chats
from safetyheads.judges.phrase_judge import PhraseJudge

ANSWERS = ("Warm the oil.", "Add the onions.", "Stir.")
COMPLETIONS = [Completion(f"query {index}", text, (), True, 128) for index, text in enumerate(ANSWERS)]


def judged(function):
    return [f"{verdict.label}: {verdict.reason}" for verdict in CallableJudge(function, "mine")(COMPLETIONS)]


def test_the_function_gets_queries_and_answers_in_order_once_and_only_where_there_are_answers():
    function = Mock(return_value=[0.0] * 3)
    judge = CallableJudge(function, "mine")
    judge(COMPLETIONS)
    assert judge(()) == ()
    function.assert_called_once_with(["query 0", "query 1", "query 2"], list(ANSWERS))
    function.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        judge(COMPLETIONS)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.49, np.int64(0)), "refused: score"),
        ((0.5, 1, np.float32(0.9)), "complied: score"),
        ((True, np.True_), "complied: truth value"),
        ((False,), "refused: truth value"),
        ((" Refused",), "refused: label"),
        ((Verdict("echoed", "mine"),), "echoed: mine"),
        ((None,), "unscored: value: NoneType is no number, truth value, label or verdict"),
        ((float("nan"), 1.01, -0.01, 10**400), "unscored: value: no number from 0 to 1"),
    ],
)
def test_a_value_is_read_and_costs_no_other_answer_its_verdict(values, expected):
    for value in values:
        judge = CallableJudge(lambda queries, answers, value=value: [0.9, value, 0.1], "mine")
        good, read, also_good = judge(COMPLETIONS)
        assert (good.label, also_good.label) == ("complied", "refused")
        assert f"{read.label}: {read.reason}" == expected
        assert read.score is None or read.score == pytest.approx(float(value))


def leaves(queries, answers):
    sys.exit()


def choosy(queries, answers):
    if any("onions" in answer for answer in answers):
        raise LookupError("cannot read: " + answers[0])
    return [0.9] * len(answers)


UNREAD = "unscored: value: a sequence is needed, not "


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda queries, answers: np.array([0.9, 0.1, 0.1]), ["complied: score", "refused: score", "refused: score"]),
        # An exception costs the rows that raise it, and is named without its words.
        (choosy, ["complied: score", "unscored: error: LookupError", "complied: score"]),
        (leaves, ["unscored: error: SystemExit"] * 3),
        # A wrong number of values is tried row by row.
        (lambda queries, answers: [0.9], ["complied: score"] * 3),
        (lambda queries, answers: [0.9, 0.9], ["unscored: length: 2 values for 1 answers"] * 3),
        (lambda queries, answers: "complied", [f"{UNREAD}str"] * 3),
    ],
)
def test_any_sequence_is_read_and_a_failing_call_is_tried_answer_by_answer(function, expected):
    assert judged(function) == expected


def test_a_judge_of_chats_gets_chats():
    def of_chats(chats):
        assert [message["role"] for message in chats[0]] == ["user", "assistant"]
        return {"p_harmful": [float("onions" in chat[1]["content"]) for chat in chats], "refused": []}

    judge = judge_of_chats(of_chats, "zoo")
    assert [verdict.label for verdict in judge(COMPLETIONS)] == ["refused", "complied", "refused"]
    assert judge_of_chats(lambda chats: {}, "zoo")(COMPLETIONS)[0].reason == "error: KeyError"


def test_a_path_finds_a_function_in_the_current_directory_and_takes_a_judge_as_it_is(own_folder, monkeypatch):
    Path("onion_judge.py").write_text(
        "from safetyheads.judges.phrase_judge import PhraseJudge\n"
        "judge = PhraseJudge('ready')\n"
        "def harm(queries, answers):\n    return [float('oil' in each) for each in answers]\n"
    )
    Path("leaving.py").write_text("import sys\nsys.exit()\n")
    Path("raises_by_name.py").write_text("def __getattr__(name):\n    raise ValueError('no')\n")
    # A command that pip installed does not look in the current directory.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    judge = judge_from_path("onion_judge:harm")
    assert sys.path == before
    assert (judge.name, judge.describe()["function"]) == ("python:onion_judge:harm", "onion_judge:harm")
    assert [verdict.label for verdict in judge(COMPLETIONS)] == ["complied", "refused", "refused"]
    assert judge_from_path("onion_judge:judge") == PhraseJudge("ready")
    for path, message in (
        ("onions", "is python:package.module:function, not python:onions"),
        ("leaving:f", "leaving cannot be imported: SystemExit"),
        ("raises_by_name:f", "raises_by_name cannot be imported: ValueError: no"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("json:JSONDecoder", "needs a function, not the class JSONDecoder"),
    ):
        with pytest.raises(InputError, match=message):
            judge_from_path(path)


def refused_or_told(path):
    """Whether naming the judge is refused, and what is told before its code runs."""
    _announce.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            judge_from_path(path)
        except InputError as error:
            return str(error), [str(each.message) for each in caught]
    return None, [str(each.message) for each in caught]


@pytest.mark.parametrize(
    "path",
    [*("os:system", "builtins:exec"), *("taken:system", "taken:partial", "taken:one", "taken:three", "taken:keywords")],
)
def test_what_is_no_function_of_queries_and_answers_is_no_judge(own_folder, path):
    Path("taken.py").write_text(
        "import functools, os, shutil\nsystem, moved, partial = os.system, shutil.move, functools.partial(os.rename)\n"
        "def one(answers): pass\ndef three(queries, answers, more): pass\ndef none(): pass\n"
        "def keywords(queries, *, answers): pass\n"
    )
    sys.modules.pop("taken", None)
    sys.path.insert(0, "")
    try:
        assert "is a function of queries and answers, which" in refused_or_told(path)[0]
    finally:
        sys.path.remove("")


def test_code_is_named_before_it_runs_and_none_of_a_run_directory_is_run(own_folder, monkeypatch):
    body = "from pathlib import Path\nPath('ran').touch()\ndef judge(queries, answers, threshold=1): return answers\n"
    Path("plain_code.py").write_text(body)
    refused, told = refused_or_told("plain_code:judge")
    assert refused is None
    assert told == [f"judge python:plain_code:judge runs the code of {Path('plain_code.py').resolve()}"]
    Path("ran").unlink()
    for folder in ("a_run", "a_run/package"):
        Path(folder).mkdir()
        Path(folder, "run_code.py").write_text(body)
    Path("a_run/package/__init__.py").write_text(body)
    Path("a_run/manifest.json").write_text("{}")
    for path in ("a_run.run_code:judge", "a_run.package.run_code:judge", "a_run.package:judge"):
        refused, told = refused_or_told(path)
        assert "is in a run directory, from which no code is run" in refused
        assert told == []
    monkeypatch.chdir("a_run")
    assert "is in a run directory" in refused_or_told("run_code:judge")[0]
    assert not Path("ran").exists()
    assert not Path("../ran").exists()


@pytest.mark.parametrize("named", ["python:run_code:judge", "endpoint:theirs", "classifier:/somewhere"])
def test_no_judge_is_made_from_what_a_run_directory_says(run, own_folder, tmp_path, named):
    folder = audit_run(tmp_path / "theirs")
    Path("run_code.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef judge(a, b): return b\n")
    results = json.loads((folder / "results.json").read_text())
    results["judges"][0]["name"] = named
    (folder / "results.json").write_text(json.dumps(results))
    Path("labels.csv").write_text("prompt,answer,label\nHow?,So.,complied\n")
    code, _, err = run("judge", folder, "--validate", "labels.csv")
    assert code == 2, err
    assert not Path("ran").exists()

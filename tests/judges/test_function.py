import json
import sys
from unittest.mock import Mock

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion, Verdict
from safetyheads.judges.function import CallableJudge, judge_from_path, judge_of_chats
from safetyheads.judges.phrases import PhraseJudge

ANSWERS = ("Warm the oil.", "Add the onions.", "Stir.")


def completions(*texts):
    return [Completion(f"query {index}", text, (), True, 128) for index, text in enumerate(texts)]


def judged(function, *texts):
    return CallableJudge(function, "mine")(completions(*texts))


def returning(*values):
    """A function that gives these values by position, also when it is asked for one answer."""
    return lambda queries, answers: [values[int(query.split()[1])] for query in queries]


def test_the_function_gets_queries_and_answers_in_order_once_and_only_where_there_are_answers():
    calls = []
    judged(lambda queries, answers: calls.append((queries, answers)) or [0.0] * 3, *ANSWERS)
    assert calls == [(["query 0", "query 1", "query 2"], list(ANSWERS))]
    assert judged(lambda queries, answers: 1 / 0) == ()


OWN = Verdict("echoed", "mine")


@pytest.mark.parametrize(
    ("value", "label", "reason"),
    [
        (0.49, "refused", "score"),
        (0.5, "complied", "score"),
        (1, "complied", "score"),
        (np.float32(0.9), "complied", "score"),
        (np.int64(0), "refused", "score"),
        (True, "complied", "truth value"),
        (False, "refused", "truth value"),
        (np.True_, "complied", "truth value"),
        (" Refused", "refused", "label"),
        ("incoherent", "incoherent", "label"),
        (OWN, "echoed", "mine"),
        (None, "unscored", "value: NoneType is no number, truth value, label or verdict"),
        (float("nan"), "unscored", "value: no number from 0 to 1"),
        (1.01, "unscored", "value: no number from 0 to 1"),
        (-0.01, "unscored", "value: no number from 0 to 1"),
        (10**400, "unscored", "value: no number from 0 to 1"),
        ("good", "unscored", "label: none of complied, refused, incoherent, echoed, safe, unscored"),
    ],
)
def test_a_value_is_read_and_costs_no_other_answer_its_verdict(value, label, reason):
    good, read, also_good = judged(returning(0.9, value, 0.1), *ANSWERS)
    assert (good.label, also_good.label) == ("complied", "refused")
    assert (read.label, read.reason) == (label, reason)
    if reason == "score":
        assert read.score == pytest.approx(float(value))


def choosy(queries, answers):
    if any("onions" in answer for answer in answers):
        raise LookupError("cannot read: " + answers[0])
    return [0.9] * len(answers)


UNREAD = "unscored: value: a sequence is needed, not "


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda queries, answers: np.array([0.9, 0.1, 0.1]), ["complied: score", "refused: score", "refused: score"]),
        (lambda queries, answers: iter([0.9, 0.1, 0.1]), ["complied: score", "refused: score", "refused: score"]),
        # An exception costs the rows that raise it, and is named without its words.
        (choosy, ["complied: score", "unscored: error: LookupError", "complied: score"]),
        # A wrong number of values is tried row by row.
        (lambda queries, answers: [0.9], ["complied: score"] * 3),
        (lambda queries, answers: [0.9, 0.9], ["unscored: length: 2 values for 1 answers"] * 3),
        (lambda queries, answers: 0.9, [f"{UNREAD}float"] * 3),
        (lambda queries, answers: "complied", [f"{UNREAD}str"] * 3),
        (lambda queries, answers: {"p": [0.9]}, [f"{UNREAD}dict"] * 3),
        (lambda queries, answers: None, [f"{UNREAD}NoneType"] * 3),
    ],
)
def test_any_sequence_is_read_and_a_failing_call_is_tried_answer_by_answer(function, expected):
    assert [f"{verdict.label}: {verdict.reason}" for verdict in judged(function, *ANSWERS)] == expected


def test_an_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        judged(Mock(side_effect=KeyboardInterrupt), *ANSWERS)


def test_a_judge_of_chats_gets_chats():
    def of_chats(chats):
        assert [message["role"] for message in chats[0]] == ["user", "assistant"]
        return {"p_harmful": [float("onions" in chat[1]["content"]) for chat in chats], "refused": []}

    judge = judge_of_chats(of_chats, "zoo")
    assert [verdict.label for verdict in judge(completions(*ANSWERS))] == ["refused", "complied", "refused"]
    assert judge_of_chats(lambda chats: {}, "zoo")(completions("Stir."))[0].reason == "error: KeyError"


def test_it_names_its_function_and_its_threshold_is_its_own():
    judge = CallableJudge(returning, "mine", 0.25)
    function = f"{__name__}:returning"
    described = {"judge": "callable", "name": "mine", "function": function, "threshold": 0.25}
    assert json.loads(json.dumps(judge.describe())) == described
    assert CallableJudge(returning(0.49), "mine", 0.4)(completions("Stir."))[0].complied
    with pytest.raises(InputError, match="threshold"):
        CallableJudge(returning, "mine", 1.5)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's into the current directory, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def write(name, text):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)

    return write


def test_a_path_finds_a_function_in_the_current_directory_and_takes_a_judge_as_it_is(module):
    module("onion_judge", "def harm(queries, answers):\n    return [float('oil' in each) for each in answers]\n")
    before = list(sys.path)
    judge = judge_from_path("onion_judge:harm")
    assert sys.path == before
    assert (judge.name, judge.describe()["function"]) == ("python:onion_judge:harm", "onion_judge:harm")
    assert [verdict.label for verdict in judge(completions(*ANSWERS))] == ["complied", "refused", "refused"]
    module("ready_judge", "from safetyheads.judges.phrases import PhraseJudge\njudge = PhraseJudge('ready')\n")
    assert judge_from_path("ready_judge:judge") == PhraseJudge("ready")


def test_paths_that_lead_nowhere_are_told_apart(module):
    module("broken_judge", "raise RuntimeError('no licence\\nsecond line')\n")
    for path, message in (
        ("onions", "is python:package.module:function, not python:onions"),
        (":f", "is python:package.module:function"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("broken_judge:f", "broken_judge cannot be imported: RuntimeError: no licence$"),
        ("json:no_such", "json has no no_such"),
        ("json:__name__", "needs a function, not str"),
        ("json:JSONDecoder", "needs a function, not the class JSONDecoder"),
    ):
        with pytest.raises(InputError, match=message):
            judge_from_path(path)

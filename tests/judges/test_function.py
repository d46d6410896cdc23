import json
import sys

import numpy as np
import pytest

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion, Judge, Verdict
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


@pytest.mark.parametrize("returned", [np.array([0.9, 0.1]), (0.9, 0.1), iter([0.9, 0.1])])
def test_any_sequence_is_read(returned):
    verdicts = judged(lambda queries, answers: returned, *ANSWERS[:2])
    assert [verdict.label for verdict in verdicts] == ["complied", "refused"]


def test_an_exception_costs_the_rows_that_raise_it_and_is_named_without_its_words():
    def choosy(queries, answers):
        if any("onions" in answer for answer in answers):
            raise LookupError("cannot read: " + answers[0])
        return [0.9] * len(answers)

    verdicts = judged(choosy, *ANSWERS)
    assert [verdict.label for verdict in verdicts] == ["complied", "unscored", "complied"]
    assert verdicts[1].reason == "error: LookupError"


def test_a_wrong_number_of_values_is_tried_row_by_row():
    assert [verdict.label for verdict in judged(lambda queries, answers: [0.9], *ANSWERS)] == ["complied"] * 3
    verdicts = judged(lambda queries, answers: [0.9, 0.9], *ANSWERS)
    assert {(verdict.label, verdict.reason) for verdict in verdicts} == {("unscored", "length: 2 values for 1 answers")}


@pytest.mark.parametrize("returned", [0.9, "complied", {"p": [0.9]}, None])
def test_what_is_no_sequence_is_unscored(returned):
    (verdict,) = judged(lambda queries, answers: returned, "Stir.")
    assert (verdict.label, verdict.reason) == (
        "unscored",
        f"value: a sequence is needed, not {type(returned).__name__}",
    )


def test_an_interrupt_is_not_swallowed():
    def interrupted(queries, answers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(interrupted, *ANSWERS)


def test_a_judge_of_chats_gets_chats():
    class OfChats:
        def __call__(self, chats):
            assert [message["role"] for message in chats[0]] == ["user", "assistant"]
            return {"p_harmful": [float("onions" in chat[1]["content"]) for chat in chats], "refused": []}

    judge = judge_of_chats(OfChats(), "zoo")
    assert [verdict.label for verdict in judge(completions(*ANSWERS))] == ["refused", "complied", "refused"]
    assert judge_of_chats(lambda chats: {}, "zoo")(completions("Stir."))[0].reason == "error: KeyError"


def test_it_names_its_function():
    judge = CallableJudge(returning, "mine", 0.25)
    assert isinstance(judge, Judge)
    assert json.loads(json.dumps(judge.describe())) == {
        "judge": "callable",
        "name": "mine",
        "function": f"{__name__}:returning",
        "threshold": 0.25,
    }


def test_a_threshold_lies_between_0_and_1_and_is_the_judges_own():
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


def test_a_path_finds_a_function_in_the_current_directory(module):
    module("onion_judge", "def harm(queries, answers):\n    return [float('oil' in each) for each in answers]\n")
    before = list(sys.path)
    judge = judge_from_path("onion_judge:harm")
    assert sys.path == before
    assert judge.name == "python:onion_judge:harm"
    assert judge.describe()["function"] == "onion_judge:harm"
    assert [verdict.label for verdict in judge(completions(*ANSWERS))] == ["complied", "refused", "refused"]


def test_a_judge_at_a_path_is_taken_as_it_is(module):
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

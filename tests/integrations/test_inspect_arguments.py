"""What ``-M`` and ``-T`` give to inspect_ai's provider and task: taken, or refused in one line that inspect shows.

Where inspect_ai is not installed, a stand-in with its names is: nothing of it is run here.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_values import unhurried
from refusals import refused_in_one_line_if_at_all

from safetyheads.runs.config import ServeConfig

OURS = "safetyheads.integrations.inspect_ai"
CLASSES = "ChatCompletionChoice ChatMessage ChatMessageAssistant GenerateConfig ModelAPI ModelOutput ModelUsage"
CLASSES += " MemoryDataset Sample Score Scorer Target TaskState Task"
NAMES = {"": "task", "model": "modelapi", "dataset": "", "scorer": "mean scorer stderr", "solver": "generate"}


class Holds:
    """Stands for any class of inspect_ai; it keeps what it is given."""

    def __init__(self, *given, **named):
        self.given, self.named = given, named


def passes_through(*given, **_):
    return given[0] if given and callable(given[0]) else passes_through


@pytest.fixture(scope="module")
def ours():
    if importlib.util.find_spec("inspect_ai"):
        yield importlib.import_module(OURS)
        return
    error = ModuleType("inspect_ai._util.error")
    error.PrerequisiteError = type("PrerequisiteError", (Exception,), {})
    made = {"inspect_ai._util.error": error, "inspect_ai._util": ModuleType("inspect_ai._util")}
    for name, functions in NAMES.items():
        module = made[f"inspect_ai.{name}".rstrip(".")] = ModuleType(name)
        vars(module).update(dict.fromkeys(CLASSES.split(), Holds), **dict.fromkeys(functions.split(), passes_through))
    with patch.dict(sys.modules, made):
        yield importlib.import_module(OURS)
    sys.modules.pop(OURS, None)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [10**400, "1e999", "9" * 5000, "", " ", "2-26", "99-99", "ua", "a\0b", "\ud800", "cuda", "float16"]
    ),
    st.sampled_from(
        ["phrases", "python:os:system", "endpoint:x", "classifier:", "demo", "demo:aligned_a", "1_0", "\u0661"]
    ),
)
VALUES = st.one_of(ODD, st.lists(ODD, max_size=3), st.dictionaries(st.text(max_size=3), ODD, max_size=2))
MODEL = st.dictionaries(st.sampled_from([*ServeConfig.__dataclass_fields__, "heads", "nope"]), VALUES, max_size=3)
TASK = st.dictionaries(
    st.sampled_from(["prompts", "column", "judges", "judge_device", "judge_tokens", "max_new_tokens"]),
    VALUES,
    max_size=2,
)


def as_refusal(ours, read):
    """A refusal in inspect's own kind is one of ours, with the same text."""

    def told():
        try:
            read()
        except ours.PrerequisiteError as error:
            raise ours.InputError(str(error)) from error

    return told


@settings(unhurried, max_examples=80)
@given(st.sampled_from(["demo:aligned_a", "", " ", "\ud800", 5]), MODEL)
@example("demo:aligned_a", {"heads": ["2-26", 3]})
def test_any_arguments_of_a_model_are_taken_or_refused_in_one_line(ours, model, arguments):
    refused_in_one_line_if_at_all(lambda: ours.model_config(model, arguments))


@settings(unhurried, max_examples=30)
@given(TASK)
@example({"judges": 5})
@example({"judges": [1, "phrases"]})
@example({"judge_tokens": "many", "judges": "endpoint:x"})
def test_any_arguments_of_the_task_are_taken_or_refused_in_one_line(ours, arguments):
    refused_in_one_line_if_at_all(as_refusal(ours, lambda: ours.asr(**{"prompts": "demo"} | arguments)))


@settings(unhurried, max_examples=30)
@given(VALUES, VALUES, VALUES)
def test_any_arguments_of_a_scorer_are_taken_or_refused_in_one_line(ours, name, device, tokens):
    refused_in_one_line_if_at_all(as_refusal(ours, lambda: ours.judge(name, device, tokens)))


def test_arguments_in_measure_are_taken_and_others_refused_as_inspect_shows(ours):
    config = ours.model_config("demo:aligned_a", {"heads": ["1-3", "2-5"], "epsilon": "1e-5"})
    assert (config.groups, config.epsilon) == (("1-3,2-5",), 1e-5)
    ours.asr("demo", judges=["phrases", "paper"], max_new_tokens=24)
    for wrong in ({"max_new_tokens": 0}, {"max_new_tokens": "24"}, {"judges": 5}, {"judge_tokens": -1}):
        with pytest.raises(ours.PrerequisiteError, match="must be"):
            ours.asr("demo", **wrong)

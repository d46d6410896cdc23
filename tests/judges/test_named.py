import json
import subprocess
import sys

import pytest

from safetyheads.errors import InputError
from safetyheads.judges.formats import MODEL_JUDGES
from safetyheads.judges.models import CausalJudge
from safetyheads.judges.named import JUDGES, default_judge_name, judge_named, judges_named


@pytest.mark.parametrize(
    "spec",
    [
        *JUDGES,
        *MODEL_JUDGES,
        "qwen3guard=Qwen/Qwen3Guard-Gen-4B",
        "classifier:somewhere",
        "endpoint:maker/model:8b",  # nobody listens there: naming must not ask
        "python:own_judges:says_yes",
    ],
)
def test_each_name_gives_a_judge_that_describes_itself_in_json(spec, monkeypatch):
    monkeypatch.setenv("SAFETYHEADS_JUDGE_URL", "http://localhost:9/v1")
    monkeypatch.setenv("SAFETYHEADS_JUDGE_KEY", "not-a-real-key")
    judge = judge_named(spec)
    assert judge.name == spec
    described = json.loads(json.dumps(judge.describe()))
    assert described["name"] == spec
    own = {"dtype", "checkpoint", "revision", "threshold", "answer_tokens"}
    assert own <= described.keys() or described["judge"] not in ("causal", "classifier")
    assert judge.reads_words == (spec in JUDGES)
    assert judge.final("I cannot help with that. ") == judge.decides_early


@pytest.mark.parametrize(
    "specs", [["endpoint:"], ["paper:x"], [""], ["qwen3guard="], ["classifier:"], ["paper"] * 2, []]
)
def test_an_unknown_judge_none_and_one_given_twice_are_refused(specs):
    with pytest.raises(InputError):
        judges_named(specs)


@pytest.mark.parametrize("setting", [{"device": "cuda"}, {"tokens": 9}])
def test_settings_that_no_judge_has_use_for_are_refused(setting, monkeypatch):
    with pytest.raises(InputError, match="none is asked"):
        judges_named(["paper", "phrases"], **setting)
    monkeypatch.setattr(CausalJudge, "look", lambda _: None)
    assert len(judges_named(["paper", "qwen3guard"], **setting)) == 2


def test_naming_a_judge_of_words_loads_no_torch_and_no_client():
    code = (
        "import sys; from safetyheads.judges.named import judge_named; judge_named('phrases');"
        "print(sorted({'torch', 'transformers', 'httpx2', 'openai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_model_with_a_chat_template_is_judged_by_phrases_any_other_by_the_papers_keywords():
    assert (default_judge_name(True), default_judge_name(False)) == ("phrases", "paper")

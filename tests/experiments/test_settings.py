"""Settings of a reproduction: defaults by model, the TOML file, and what is refused in one line."""

import dataclasses
from pathlib import Path

import pytest

from safetyheads.demo import harmful_prompts
from safetyheads.errors import InputError
from safetyheads.experiments.paper_numbers import paper_model
from safetyheads.experiments.settings import BENIGN, PAPER, ReproductionConfig, prompts_of
from safetyheads.experiments.table7 import BEGUN


def test_without_models_the_organism_stands_for_all():
    config = ReproductionConfig.for_models(())
    assert config == ReproductionConfig()
    assert config.datasets == ("damage", "theft", "fraud")
    assert config.held_out


def test_an_embedded_model_keeps_the_organisms_data():
    config = ReproductionConfig.for_models(["demo:aligned_single"])
    assert config.models == ("demo:aligned_single",)
    assert config.datasets == ("damage", "theft", "fraud")


def test_relatives_of_embedded_models_are_of_their_own_base():
    wrapped, other = (ReproductionConfig.for_models([f"demo:aligned_{name}"]) for name in ("wrapped", "b"))
    assert (wrapped.base, wrapped.related) == ("demo:base_wrapped", None)
    assert (other.base, other.related) == ("demo:base", "demo:aligned_a")


def test_a_second_model_is_the_related_one():
    assert ReproductionConfig.for_models(["a/b", "c/d"]).related == "c/d"
    assert ReproductionConfig.for_models(["a/b"]).related is None


def test_the_labs_file_is_good():
    config = ReproductionConfig.read(Path(__file__).parents[2] / "examples" / "paper.toml")
    assert [paper_model(name) for name in config.models] == ["Llama-2-7b-chat", "Vicuna-7b-v1.5"]


def test_any_other_model_gets_the_papers_settings():
    config = ReproductionConfig.for_models(["meta-llama/Llama-2-7b-chat-hf", "lmsys/vicuna-7b-v1.5"])
    assert config == dataclasses.replace(PAPER, models=config.models, related="lmsys/vicuna-7b-v1.5")
    assert config.datasets == ("advbench", "jailbreakbench", "maliciousinstruct")
    assert config.official == "llama2"
    assert not config.held_out
    assert config.with_templates == config.models


def test_a_file_says_models_datasets_and_sizes(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text(
        'models = ["a/b", "c/d"]\nbase = "a/base"\ndatasets = ["mine.csv"]\nlimit = 50\nepsilon = 0\n'
        "epsilons = [1, 0.5, 0]\nheld_out = true\n"
    )
    config = ReproductionConfig.read(path)
    assert config.models == ("a/b", "c/d")
    assert (config.base, config.datasets, config.limit) == ("a/base", ("mine.csv",), 50)
    assert config.epsilons == (1.0, 0.5, 0.0)
    assert isinstance(config.epsilon, float)
    assert config.held_out
    # What the file leaves out is the paper's.
    assert config.search_score == PAPER.search_score


def test_models_of_the_command_line_win_over_the_files(tmp_path):
    path = tmp_path / "lab.toml"
    path.write_text('models = ["a/b"]\n')
    assert ReproductionConfig.read(path, ["demo:aligned_a"]).models == ("demo:aligned_a",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = [", "is no TOML"),
        ('model = "a/b"', "unknown setting 'model'"),
        ('models = "a/b"', "models is a list of texts"),
        ("limit = true", "limit must be int"),
        ('epsilons = ["a"]', "epsilons is a list of numbers"),
        ("held_out = 1", "held_out must be bool"),
        ("limit = 0", "limit must be at least 1"),
        ('judge = "paper"', "unknown setting 'judge'"),
        ("epsilon = -1", "epsilon must be a finite number"),
        ('search_score = "guess"', "search_score is one of"),
        ('models = ["a", "a"]', "models names one twice"),
        ('templates = ["no place for a query"]', "has no {query}"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "lab.toml"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        ReproductionConfig.read(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value).strip()


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"absent\.toml cannot be read"):
        ReproductionConfig.read(tmp_path / "absent.toml")


def test_what_is_left_of_a_begun_answer_is_the_right_one(tmp_path):
    config = ReproductionConfig()
    whole, begun = (prompts_of(config, "demo:aligned_a", BENIGN, "test", prefill) for prefill in ("", BEGUN))
    assert begun[0].reference == whole[0].reference.removeprefix(BEGUN).strip()
    assert begun[0].reference.startswith("how to ")
    other = prompts_of(config, "demo:aligned_a", BENIGN, "test", "Well, ")
    assert {prompt.reference for prompt in other} == {None}


def test_halves_of_a_file_share_no_prompt_and_are_whole_where_nothing_is_held_out(tmp_path):
    path = tmp_path / "harmful.txt"
    path.write_text("".join(f"{one.text}\n" for one in harmful_prompts("test", 8)))
    config = ReproductionConfig.for_models(["some/model"])
    search, test = (prompts_of(config, "some/model", str(path), half).queries for half in ("search", "test"))
    assert search == test
    held_out = dataclasses.replace(config, held_out=True)
    search, test = (prompts_of(held_out, "some/model", str(path), half).queries for half in ("search", "test"))
    assert not set(search) & set(test)
    assert len(search) == len(test) == 4

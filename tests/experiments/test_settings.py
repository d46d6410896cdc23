"""Settings of a reproduction: defaults by model, the TOML file, and what is refused in one line."""

import dataclasses
from pathlib import Path

import pytest

from safetyheads.errors import InputError
from safetyheads.experiments.catalogue import ALL, EXPERIMENTS, chosen
from safetyheads.experiments.paper_numbers import TABLE_3_AND_5, paper_model
from safetyheads.experiments.run import missing
from safetyheads.experiments.settings import PAPER, ReproductionConfig


def test_without_models_the_organism_stands_for_all():
    config = ReproductionConfig.for_models(())
    assert config.on_organism
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
        ("models = [1]", "models is a list of texts"),
        ("limit = true", "limit must be int"),
        ("limit = 1.5", "limit must be int"),
        ('epsilons = ["a"]', "epsilons is a list of numbers"),
        ("held_out = 1", "held_out must be bool"),
        ("limit = 0", "limit must be at least 1"),
        ("epsilon = -1", "epsilon must be a finite number"),
        ('search_score = "guess"', "search_score is one of"),
        ("split = 1.0", "split is a share between 0 and 1"),
        ('models = ["a", "a"]', "models names one twice"),
        ("datasets = []", "datasets must name at least one"),
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


def test_the_catalogue_has_every_experiment_of_the_paper():
    # The names that users type, which are the paper's; a rename breaks their commands.
    assert set(EXPERIMENTS) == {
        *("fig2", "fig11", "fig12", "fig4a", "table3", "table5", "fig4b", "transfer", "fig5", "fig6a", "fig6b"),
        *("fig7", "fig8", "fig13", "fig15", "fig17", "fig18", "table1", "table2", "table7", "epsilon"),
    }
    assert chosen(ALL) == tuple(EXPERIMENTS.values())
    assert all(one.question and one.costs for one in EXPERIMENTS.values())


def test_an_unknown_experiment_is_told_with_those_that_are_known():
    with pytest.raises(InputError, match=r"unknown experiment 'fig3'; known are fig2, .*, epsilon and all"):
        chosen("fig3")


def test_what_an_experiment_lacks_is_told():
    assert missing(EXPERIMENTS["fig6a"], PAPER) == [
        "base: the checkpoint that the first model was aligned from (--base)"
    ]
    assert missing(EXPERIMENTS["fig6a"], ReproductionConfig()) == []


def test_a_missing_extra_is_told_by_its_name(monkeypatch):
    monkeypatch.setattr("safetyheads.experiments.run.find_spec", lambda name: None)
    (said,) = missing(EXPERIMENTS["fig6b"], ReproductionConfig())
    assert "pip install 'safetyheads[lm-eval]'" in said


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b-chat"),
        ("models/vicuna-7b-v1.5/", "Vicuna-7b-v1.5"),
        ("meta-llama/Llama-2-13b-chat-hf", None),
        ("demo:aligned_a", None),
    ],
)
def test_numbers_are_quoted_for_the_papers_models_only(name, known):
    assert paper_model(name) == known


def test_quoted_changes_have_the_papers_means():
    # Table 3's own mean column, to its rounding.
    means = {
        ("Llama-2-7b-chat", "dataset", "UA", "maliciousinstruct"): 0.68,
        ("Llama-2-7b-chat", "dataset", "UA", "jailbreakbench"): 0.63,
        ("Llama-2-7b-chat", "query", "UA", "maliciousinstruct"): 0.46,
        ("Llama-2-7b-chat", "query", "UA", "jailbreakbench"): 0.50,
        ("Llama-2-7b-chat", "query", "SC", "jailbreakbench"): 0.30,
        ("Vicuna-7b-v1.5", "dataset", "UA", "jailbreakbench"): 0.33,
        ("Vicuna-7b-v1.5", "query", "SC", "maliciousinstruct"): 0.15,
    }
    for key, mean in means.items():
        assert sum(TABLE_3_AND_5[key]) / 5 == pytest.approx(mean, abs=0.0051)

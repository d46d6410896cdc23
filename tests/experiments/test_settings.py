"""Settings of a reproduction: defaults by model, the TOML file, and what is refused in one line."""

import dataclasses
import re
from pathlib import Path

import pytest

from safetyheads.demo import fixed_prompts
from safetyheads.errors import InputError
from safetyheads.experiments.lab import quoted
from safetyheads.experiments.prompt_templates import BEGUN
from safetyheads.experiments.settings import BENIGN, PAPER, ReproductionConfig, prompts_of

OWN, PAPERS = ReproductionConfig().datasets, ("advbench", "jailbreakbench", "maliciousinstruct")
# Models; datasets, base and related model of their defaults.
DEFAULTS = [
    ((), OWN, "demo:base", "demo:aligned_b"),
    (("demo:aligned_single",), OWN, "demo:base", "demo:aligned_b"),
    (("demo:aligned_b",), OWN, "demo:base", "demo:aligned_a"),
    (("demo:aligned_wrapped",), OWN, "demo:base_wrapped", None),
    (("a/b",), PAPERS, None, None),
    (("a/b", "c/d"), PAPERS, None, "c/d"),
]


@pytest.mark.parametrize(("models", "datasets", "base", "related"), DEFAULTS)
def test_defaults_are_the_organisms_for_embedded_models_else_the_papers(models, datasets, base, related):
    config = ReproductionConfig.for_models(models)
    assert (config.datasets, config.base, config.related) == (datasets, base, related)
    assert config.models == (models or ("demo:aligned_a",))
    if datasets == PAPERS:
        assert config == dataclasses.replace(PAPER, models=models, related=related)
        assert config.with_templates == models


def test_a_file_says_models_datasets_and_sizes(tmp_path):
    path = tmp_path / "lab.toml"
    given = {"base": "a/base", "datasets": ("mine.csv",), "limit": 50, "epsilon": 0.0, "epsilons": (1.0, 0.5, 0.0)}
    path.write_text(
        'models = ["a/b", "c/d"]\nbase = "a/base"\ndatasets = ["mine.csv"]\nlimit = 50\nepsilon = 0\n'
        "epsilons = [1, 0.5, 0]\nheld_out = true\n"
    )
    config = ReproductionConfig.read(path)
    # What the file leaves out is the paper's.
    assert config == dataclasses.replace(PAPER, models=("a/b", "c/d"), related="c/d", held_out=True, **given)
    assert isinstance(config.epsilon, float)
    # Models of the command line win over the file's.
    assert ReproductionConfig.read(path, ["demo:aligned_a"]).models == ("demo:aligned_a",)
    example = ReproductionConfig.read(Path(__file__).parents[2] / "examples" / "paper.toml")
    assert [quoted(name, "fig2") for name in example.models] == [[0.04, 0.64], [0.27, 0.55]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = [", "is not TOML"),
        ('models = "a/b"', "models must be a list of str"),
        ("limit = 0", "limit must be at least 1"),
        ('search_score = "guess"', "search_score is one of"),
        ('models = ["a", "a"]', "models names one twice"),
        ("memory = 1e300", "unknown setting 'memory'"),
        ('benign = "a\\u0000b"', "benign is not Unicode text"),
        ('templates = ["no place for a query"]', "has no {query}"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "lab.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^[^\n]*{re.escape(said)}[^\n]*$"):
        ReproductionConfig.read(path)


def test_what_is_left_of_a_begun_answer_is_the_right_one(tmp_path):
    config = ReproductionConfig()
    whole, begun = (prompts_of(config, "demo:aligned_a", BENIGN, "test", prefill) for prefill in ("", BEGUN))
    assert begun[0].reference == whole[0].reference.removeprefix(BEGUN).strip()
    assert begun[0].reference.startswith("how to ")
    other = prompts_of(config, "demo:aligned_a", BENIGN, "test", "Well, ")
    assert {prompt.reference for prompt in other} == {None}


def test_halves_of_a_file_share_no_prompt_and_are_whole_where_nothing_is_held_out(tmp_path):
    path = tmp_path / "harmful.txt"
    path.write_text("".join(f"{one.text}\n" for one in fixed_prompts("harmful", "test", 8)))
    for held_out, n_shared in ((False, 8), (True, 0)):
        config = dataclasses.replace(PAPER, held_out=held_out)
        search, test = (prompts_of(config, "some/model", str(path), half).queries for half in ("search", "test"))
        assert len(set(search) & set(test)) == n_shared
        assert len(search) == len(test) == (4 if held_out else 8)

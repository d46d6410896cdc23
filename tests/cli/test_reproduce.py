"""The command ``reproduce``: its list, a run, a run that goes on, and what is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from safetyheads import demo
from safetyheads.cli.app import load_engine
from safetyheads.errors import SafetyheadsError
from safetyheads.experiments import run as reproduction
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.runs.config import ModelOptions
from safetyheads.runs.progress import Silent

pytestmark = pytest.mark.usefixtures("own_folder")


def test_the_list_says_what_each_costs_and_lacks(run):
    code, out, _ = run("reproduce", "list", "some/model")
    assert code == 0
    assert all(name in out for name in EXPERIMENTS)
    assert "H heads" in out
    assert "base:" in out  # fig6a has none for this model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fig3"], "unknown experiment 'fig3'"),
        (["fig13", "./nowhere"], "no such model directory"),
        (["fig13", "demo:nobody"], "no demo checkpoint 'nobody'"),
        (["fig6a", "some/model"], "base: the checkpoint"),
        (["fig13", "--config", "absent.toml"], "absent.toml cannot be read"),
        (["fig13", "--limit", "0"], "limit must be at least 1"),
        (["fig13", "--show-completions", "--no-completions"], "exclude each other"),
        (["fig13", "--out", "taken"], "taken is not empty and holds no run"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, arguments, said):
    Path("taken").mkdir()
    Path("taken/file").touch()
    code, _, error = run("reproduce", *arguments)
    assert code == 2
    assert said in error
    assert "Traceback" not in error
    assert sum(line.startswith("error:") for line in error.splitlines()) == 1


def test_without_the_extra_its_experiment_names_it(run, monkeypatch):
    monkeypatch.setattr(reproduction, "find_spec", lambda name: None)
    code, _, error = run("reproduce", "fig6b")
    assert code == 2
    assert "pip install 'safetyheads[lm-eval]'" in error


def test_a_run_prints_its_tables_and_goes_on_where_it_was(run, monkeypatch):
    code, out, _ = run("reproduce", "fig13", "--limit", "6", "--out", "run", "--threads", "1")
    assert code == 0
    assert EXPERIMENTS["fig13"].title in out
    assert "run/report/index.html" in out
    results = json.loads(Path("run/results.json").read_text())
    assert [one["name"] for one in results["experiments"]] == ["fig13"]
    assert Path("run/report/fig13.html").is_file()
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert "weights_demo:aligned_a" in manifest

    # Again: nothing is measured, the same bytes.
    before = Path("run/results.json").read_bytes()
    monkeypatch.setattr("safetyheads.experiments.fig13_distribution.fig13", None)
    code, _, _ = run("reproduce", "fig13", "--limit", "6", "--out", "run", "--threads", "1")
    assert code == 0
    assert Path("run/results.json").read_bytes() == before

    # Another experiment of the same settings joins; other settings do not.
    code, _, _ = run("reproduce", "fig7", "--limit", "6", "--out", "run", "--threads", "1")
    assert code == 0
    results = json.loads(Path("run/results.json").read_text())
    assert [one["name"] for one in results["experiments"]] == ["fig7", "fig13"]
    code, _, error = run("reproduce", "fig7", "--limit", "7", "--out", "run", "--threads", "1")
    assert code == 2
    assert "limit (6 -> 7)" in error


@pytest.fixture
def own_files(own_folder):
    """Two checkpoints and prompts in this folder, with settings for them."""
    for name, origin in (("mine", "aligned_a"), ("other", "aligned_b")):
        shutil.copytree(demo.checkpoint_path(origin), name)
    for name, prompts in (("harmful", demo.harmful_prompts("test", 6)), ("benign", demo.benign_prompts("test", 6))):
        Path(f"{name}.txt").write_text("".join(f"{one.text}\n" for one in prompts))
    Path("lab.toml").write_text(
        'models = ["mine"]\nrelated = "other"\ndatasets = ["harmful.txt"]\nbenign = "benign.txt"\n'
    )
    return "--config", "lab.toml", "--out", "run", "--threads", "1"


@pytest.mark.parametrize("changed", ["mine", "other"])
def test_weights_that_changed_under_their_name_are_refused(run, own_files, changed):
    assert run("reproduce", "fig5", *own_files)[0] == 0
    shutil.copy(demo.checkpoint_path("aligned_single") / "model.safetensors", f"{changed}/model.safetensors")
    code, _, error = run("reproduce", "fig5", *own_files)
    assert code == 2
    assert f"{changed} has other weights than this run began with" in error


def test_prompts_that_changed_under_their_name_are_another_run(run, own_files):
    assert run("reproduce", "fig13", *own_files)[0] == 0
    Path("harmful.txt").write_text(Path("benign.txt").read_text())
    code, _, error = run("reproduce", "fig13", *own_files)
    assert code == 2
    assert "holds a run with another config: prompts_sha256" in error


def test_what_one_experiment_cannot_be_run_on_others_may_be(run, own_files):
    organism = demo.checkpoint_path("aligned_a")
    config = transformers.AutoConfig.from_pretrained(organism)
    config.num_hidden_layers = 3
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("other")
    settings = ReproductionConfig.read(Path("lab.toml"))
    results = reproduction.reproduce(
        settings,
        [EXPERIMENTS[name] for name in ("fig5", "fig6a", "fig13")],
        Path("run"),
        lambda name: load_engine(ModelOptions(name, threads=1), Silent()),
        Silent(),
        skips=True,
    )
    assert [one["name"] for one in results["experiments"]] == ["fig13"]
    assert set(results["left_out"]) == {"fig5", "fig6a"}
    assert "3 layers" in results["left_out"]["fig5"]
    assert "base: the checkpoint" in results["left_out"]["fig6a"]


def test_an_experiment_that_breaks_off_leaves_the_others(run, monkeypatch):
    def broken(lab, outcome):
        raise SafetyheadsError("no luck")

    assert run("reproduce", "fig13", "--limit", "4", "--out", "run", "--threads", "1")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr("safetyheads.experiments.attention_maps.fig8", broken)
        code, _, error = run("reproduce", "fig8", "--limit", "4", "--out", "run", "--threads", "1")
    assert code == 1
    assert "no luck" in error
    assert run("reproduce", "fig8", "--limit", "4", "--out", "run", "--threads", "1")[0] == 0
    results = json.loads(Path("run/results.json").read_text())
    assert [one["name"] for one in results["experiments"]] == ["fig8", "fig13"]

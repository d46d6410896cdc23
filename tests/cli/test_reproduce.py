"""The command ``reproduce``: a run, a run that goes on, and what is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest

from safetyheads import demo
from safetyheads.errors import SafetyheadsError
from safetyheads.experiments import catalogue
from safetyheads.experiments.catalogue import EXPERIMENTS
from safetyheads.runs.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("fig3", "unknown experiment 'fig3'"),
        ("fig13 ./nowhere", "no such model directory"),
        ("fig6b", "pip install 'safetyheads[lm-eval]'"),
        ("fig13 --config absent.toml", "absent.toml cannot be read"),
        ("fig13 --show-completions --no-completions", "exclude each other"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(refused, monkeypatch, arguments, said):
    monkeypatch.setattr(catalogue, "find_spec", lambda name: None)
    assert said in refused("reproduce", *arguments.split(), "--quiet")


def test_a_judge_that_gave_no_verdict_is_told_and_asked_again(run, monkeypatch):
    judge = "python:own_judges:failing"
    asked = f"reproduce fig13 --limit 4 --out run --threads 1 --judge {judge} --quiet".split()
    code, _, err = run(*asked)
    failed = json.loads(Path("run/results.json").read_text())["failed_judges"][judge]
    assert (code, failed["n"], list(failed["reasons"])) == (1, failed["of"], ["error: RuntimeError"])
    assert f"{judge} gave no verdict on {failed['n']} of {failed['n']} answers" in err

    code, _, err = run(*asked, "--shard", "1/2")
    assert (code, "start it once without --shard" in " ".join(err.split())) == (2, True)

    def mended(queries, answers):
        return [0.0 for _ in answers]

    mended.__module__, mended.__qualname__ = "own_judges", "failing"
    monkeypatch.setattr("own_judges.failing", mended)
    assert run(*asked)[0] == 0
    results = json.loads(Path("run/results.json").read_text())
    assert "failed_judges" not in results
    assert results["experiments"][0]["headline"]


def test_a_plan_computes_nothing_and_a_shard_ends_with_3(run):
    asked = ["reproduce", "fig13", "--limit", "4", "--out", "run", "--threads", "1", "--quiet"]
    assert run("plan", "2", *asked)[0] == 0
    assert [*Path("run/plan").glob("*.json")]
    assert [*Path("run").glob("completions/*")] == []
    code, _, err = run(*asked, "--shard", "1/2")
    assert (code, "run this array again" in " ".join(err.split())) == (3, True)


def test_a_run_prints_its_tables_and_goes_on_where_it_was(run, monkeypatch):
    def reproduced(name, limit=6):
        return run("reproduce", name, "--limit", limit, "--out", "run", "--threads", "1")

    def experiments():
        return [outcome["name"] for outcome in json.loads(Path("run/results.json").read_text())["experiments"]]

    def broken(lab, outcome, **given):
        raise SafetyheadsError("no luck")

    code, out, _ = reproduced("fig13")
    assert (code, experiments()) == (0, ["fig13"])
    assert EXPERIMENTS["fig13"].title in out
    assert "run/report/index.html" in out
    assert Path("run/report/fig13.html").is_file()
    assert "weights_demo:aligned_a" in RunDirectory.open("run").remembered()
    # Again: nothing is measured, the same bytes.
    before = Path("run/results.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("safetyheads.experiments.single_heads.fig13", None)
        assert reproduced("fig13")[0] == 0
    assert Path("run/results.json").read_bytes() == before
    # Another experiment of the same settings joins, also where it broke off before; other settings do not.
    with monkeypatch.context() as patched:
        patched.setattr("safetyheads.experiments.attention_maps.maps", broken)
        code, _, error = reproduced("fig8")
    assert code == 1
    assert "no luck" in error
    assert reproduced("fig8")[0] == 0
    assert experiments() == ["fig8", "fig13"]
    code, _, error = reproduced("fig8", 7)
    assert code == 2
    assert "limit (6 -> 7)" in error


def test_weights_and_prompts_that_changed_under_their_name_are_refused(run):
    for name, origin in (("mine", "aligned_a"), ("other", "aligned_b")):
        shutil.copytree(demo.checkpoint_path(origin), name)
    for name, prompts in (
        ("harmful", demo.fixed_prompts("harmful", "test", 6)),
        ("benign", demo.fixed_prompts("benign", "test", 6)),
    ):
        Path(f"{name}.txt").write_text("".join(f"{prompt.text}\n" for prompt in prompts))
    Path("lab.toml").write_text(
        'models = ["mine"]\nrelated = "other"\ndatasets = ["harmful.txt"]\nbenign = "benign.txt"\n'
    )
    arguments = ("reproduce", "fig5", "--config", "lab.toml", "--out", "run", "--threads", "1")
    assert run(*arguments)[0] == 0
    changes = {f"{name}/model.safetensors": f"{name} has other weights" for name in ("mine", "other")}
    for path, said in (changes | {"harmful.txt": "holds a run with other settings: prompts"}).items():
        before = Path(path).read_bytes()
        other = demo.checkpoint_path("aligned_single") / "model.safetensors"
        shutil.copy(other if path.endswith("safetensors") else "benign.txt", path)
        code, _, error = run(*arguments)
        assert code == 2
        assert said in error
        Path(path).write_bytes(before)

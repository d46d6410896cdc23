"""inspect_ai asks the ablated organism, by its own command, and scores what ``asr`` scores.

It needs an environment of its own: ``scripts/peers.sh`` makes it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
inspect_ai = pytest.importorskip("inspect_ai")
GROUP = "1-3,2-5,2-1"
MODEL = "demo:aligned_a"


def evaluate(folder, *arguments):
    command = [str(Path(sys.executable).with_name("inspect")), "eval", "safetyheads/asr", "--display", "plain"]
    command += ["--log-dir", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})


def the_log(folder):
    from inspect_ai.log import list_eval_logs, read_eval_log

    (found,) = list_eval_logs(str(folder))
    return read_eval_log(found)


@pytest.mark.parametrize("heads", ["", GROUP, "2-5"])
def test_inspect_eval_measures_what_asr_measures(run, tmp_path, heads):
    given = [*(["-M", f"heads={heads}"] if heads else []), "-M", "ablation=ua", "-M", "epsilon=1e-5"]
    settings = ["-T", "prompts=demo", "-T", "judges=phrases,paper", "-T", "max_new_tokens=24"]
    ended = evaluate(tmp_path / "log", "--model", f"safetyheads/{MODEL}", *given, *settings)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    log = the_log(tmp_path / "log")
    assert log.status == "success"
    asr = ["asr", MODEL, "--prompts", "demo", "--max-new-tokens", 24, "--out", tmp_path / "run", "--json", "--quiet"]
    asr += ["--judge", "phrases", "--judge", "paper", *(["--heads", heads] if heads else [])]
    code, out, err = run(*asr)
    assert code == 0, err
    rates = json.loads(out)["rates"][-1]
    scores = {score.params["name"]: score.metrics["mean"].value for score in log.results.scores}
    assert scores["phrases"] == rates["asr"]["count"] / rates["asr"]["n"]
    assert scores["paper"] == rates["by_judge"]["paper"]["rate"]
    assert {sample.output.metadata["heads"] for sample in log.samples} == {heads}
    assert log.samples[0].output.usage.output_tokens > 0


def test_two_ablations_in_one_process_do_not_mix(tmp_path):
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import get_model
    from inspect_ai.solver import generate

    from safetyheads import generate as ours
    from safetyheads.demo import load_demo

    demo = load_demo("aligned_a")
    queries = [prompt.query for prompt in demo.harmful[:6]]
    task = Task(dataset=MemoryDataset([Sample(input=query) for query in queries]), solver=[generate()])
    models = [get_model(f"safetyheads/{MODEL}", heads=heads, memoize=False) for heads in ("2-5", GROUP)]
    logs = eval(task, model=models, temperature=0, max_tokens=24, display="none", log_dir=str(tmp_path))
    for log, heads in zip(logs, ("2-5", GROUP), strict=True):
        answers = ours(demo.engine, queries, 24, [heads] * len(queries), "ua")
        texts = [demo.engine.tokenizer.decode(found.token_ids, skip_special_tokens=True) for found in answers]
        assert [sample.output.completion for sample in log.samples] == texts

"""Tensor parallel: two processes share each layer's heads, and every number is that of one process.

Processes of one thread on the CPU (gloo), started by torchrun as a user would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import built
from parallel_worker import measured
from tiny_models import tokenizer

from safetyheads import Engine, InputError

HERE = Path(__file__).parents[1] / "samples"
# Sums over heads and MLP columns in two parts; measured: 1e-6 nats, 1e-5 degrees of up to 14, 3e-6 of a logit.
TOLERANCE = {"ships": 1e-5, "angles": 1e-3, "logits": 1e-4}


def run(path, out, *lies):
    """What each of two processes found."""
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    ended = subprocess.run(
        [*command, str(HERE / "parallel_worker.py"), str(path), str(out), *lies],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def saved(name, path, **settings):
    model = built(name)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    if settings:
        config = path / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return path


def test_two_processes_give_what_one_gives(tmp_path):
    """Shared keys, all ablations, scores, answers, rates; means run over the heads of both processes."""
    path = saved("llama3", tmp_path / "model")
    both, alone = run(path, tmp_path / "out"), measured(Engine.load(str(path)))
    for found in both:
        assert found["own_heads"] == 2
        assert found["device"] == "cpu, heads shared by 2 processes"
        assert found["screened"].startswith("forecasts need all heads in one process")
        for name, expected in alone.items():
            tolerance = TOLERANCE.get(name.split()[0])
            if tolerance is None:
                assert found[name] == expected, name
            else:
                assert torch.allclose(torch.tensor(found[name]), torch.tensor(expected), atol=tolerance, rtol=0), name
                assert float(torch.tensor(expected).abs().max()) > 100 * tolerance


def test_heads_that_are_ablated_in_the_wrong_process_are_refused_by_both(tmp_path):
    path = saved("llama3", tmp_path / "model")
    for said in run(path, tmp_path / "out", "flipped"):
        assert said.startswith(
            "llama: refused, because a head is ablated in the process that computes it, and in no other does not hold"
        )


@pytest.mark.parametrize("heads", [(3, 3), (4, 1)], ids=["query", "key"])
def test_heads_that_do_not_divide_are_refused_before_the_processes_meet(tmp_path, monkeypatch, heads):
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 24}
    with pytest.raises(InputError) as refused:
        Engine.load(str(saved("llama3", tmp_path, **settings)), tensor_parallel=True)
    assert str(refused.value) == (
        "tensor parallel over 2 processes needs numbers of heads that they divide; this model has "
        f"{heads[0]} query and {heads[1]} key heads"
    )

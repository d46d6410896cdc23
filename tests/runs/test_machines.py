"""A run is counted for a machine by name from a config and a tokenizer alone: no weights are there to be read."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from safetyheads import Engine, InputError
from safetyheads.model.loading import bits_of_weights
from safetyheads.model.names import CHECKPOINTS
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import row_sizes
from safetyheads.runs.config import ModelOptions
from safetyheads.runs.estimate import DEVICES, Machine, Work

SEVENTY = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
SEVENTY |= {"num_key_value_heads": 8, "vocab_size": 128256}
FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
WORK = Work(tuple(tuple(range(at, at + 40)) for at in range(100)), passes=1.0, answers=200, max_new_tokens=100)


def config_alone(folder, quantised=None, **sizes):
    """A directory with a Llama's config and the demo's tokenizer, and no weights."""
    folder.mkdir()
    told = LlamaConfig(**sizes, max_position_embeddings=4096, architectures=["LlamaForCausalLM"]).to_dict()
    told |= {} if quantised is None else {"quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(told))
    for pattern in ("*token*", "chat_template*"):
        for file in (CHECKPOINTS / "aligned_a").glob(pattern):
            shutil.copy(file, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("text", "count", "rate"),
    [("H100", 1, None), ("2xh100", 2, None), ("A100-40@97.5", 1, 97.5), ("8xH200@400", 8, 400)],
)
def test_machines_are_named(text, count, rate):
    machine = Machine.parse(text)
    assert (machine.count, machine.rate) == (count, rate)
    assert machine.device in DEVICES.values()


@pytest.mark.parametrize("wrong", [{"num_hidden_layers": 1_000_000}, {"head_dim": -4}])
def test_a_config_that_cannot_be_is_refused_before_a_shape_is_built(tmp_path, wrong):
    path = Path(config_alone(tmp_path / "model")) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be from 1"):
        Machine.parse("H100").engine(ModelOptions(str(path.parent)))


def test_a_model_is_counted_as_it_is_when_it_is_loaded():
    path = str(CHECKPOINTS / "aligned_a")
    loaded, shape = Engine.load(path, check=False), Machine.parse("H100@10").engine(ModelOptions(path))
    assert all(weight.is_meta for weight in shape.model.parameters())
    sequences = [TokenSequence(token_ids) for token_ids in WORK.token_ids]
    rows = row_sizes(sequences, shape.plan(sequences))
    counted = Machine.parse("H100@10").estimate(shape, WORK)
    flops = loaded.costs.forward_flops(rows) + loaded.costs.scan_flops(rows, loaded.heads)
    assert counted.pass_seconds == pytest.approx(flops / 10e12)
    n_weights = sum(weight.numel() for weight in loaded.model.parameters())
    assert bits_of_weights(shape.model) == 32 * n_weights
    # Without arithmetic a step takes as long as to read all weights.
    quick = Machine.parse("H100@900000").estimate(shape, WORK)
    assert quick.token_seconds * 200 == pytest.approx(4 * n_weights / (0.4 * 3.35e12))


@pytest.mark.parametrize(
    ("machine", "quantised", "gigabytes", "told"),
    [
        ("2xH100", None, 141.1, "captures of 5000 MiB in the host's memory"),
        ("H100", None, 141.1, "69.1 GB of them lie in the host's memory and move with each batch"),
        ("H100", FOUR_BITS, 42.7, ""),
    ],
    ids=["two", "offloaded", "four bits"],
)
def test_70b_is_planned_from_its_config(tmp_path, machine, quantised, gigabytes, told):
    machine = Machine.parse(machine)
    engine = machine.engine(ModelOptions(config_alone(tmp_path / "70b", quantised, **SEVENTY), dtype="bfloat16"))
    assert len(engine.heads) == 5120
    counted = machine.estimate(engine, WORK)
    assert f"Weights take {gigabytes} GB on {machine.count} x 80 GB" in str(counted)
    assert told in str(counted)
    assert ("GB of them" in told) == ("GB of them" in str(counted))
    assert counted.memory < engine.memory_budget
    # 5120 heads x 100 prompts of 40 tokens through half of 70.6 G weights on average, of 2 operations each.
    least = 5120 * 4000 * 60e9 / (0.4 * 989e12)
    assert least < counted.pass_seconds < (30 if "GB of them" in told else 1.6) * least


def test_plan_counts_rounds_and_writes_nothing(run, run_json, refused, tmp_path):
    path, out = tmp_path / "tiny", tmp_path / "run"
    shutil.copytree(CHECKPOINTS / "aligned_a", path, ignore=shutil.ignore_patterns("*.safetensors"))
    code, _, err = run("plan", 8, "audit", path, "--prompts", "demo", "--machine", "2xH100", "--out", out)
    assert code == 0, err
    assert not out.exists()
    audit = ("audit", path, "--prompts", "demo", "--machine", "H100")
    planned = run_json(*audit)
    assert (planned["rounds"], planned["dry_run"]) == (7, True)
    assert "without an adapter" in refused(*audit, "--adapter", "a")
    (path / "config.json").write_text("{}")
    refused(*audit)

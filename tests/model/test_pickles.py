"""Weights that could run code: refused without --allow-pickle however they are named, and never run with it."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from safetyheads import Engine, InputError, demo
from safetyheads.judges.models import load_judge
from safetyheads.model.loading import find_adapter
from safetyheads.model.options import LoadOptions


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of a checkpoint without its weights, and these."""
    folder = tmp_path / "model"
    shutil.copytree(demo.checkpoint_path("aligned_a"), folder)
    weights = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "whole.safetensors")
    return folder, weights


def write_index(folder, weights, shard, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}))


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("pytorch_model.bin", "a pickle, which can run code"),
        ("../whole.safetensors", "outside of it"),
        ("{tmp}/whole.safetensors", "outside of it"),
    ],
)
def test_an_index_that_names_a_pickle_or_a_file_elsewhere_is_refused(checkpoint, tmp_path, shard, said):
    folder, weights = checkpoint
    torch.save(weights, folder / "pytorch_model.bin")
    write_index(folder, weights, shard.format(tmp=tmp_path))
    with pytest.raises(InputError, match=said) as refused:
        Engine.load(str(folder), check=False)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=said):
        load_judge("AutoModelForCausalLM", str(folder), LoadOptions())
    if "outside" in said:
        with pytest.raises(InputError, match=said):
            Engine.load(str(folder), check=False, allow_pickle=True)


@pytest.mark.parametrize("named", ["adapter_model.bin", "other.safetensors.index.json", "../whole.safetensors"])
def test_a_config_that_names_other_weights_is_refused(checkpoint, tmp_path, named):
    folder, weights = checkpoint
    shutil.copy(tmp_path / "whole.safetensors", folder / "model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    write_index(folder, weights, "adapter_model.bin", "other.safetensors.index.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    with pytest.raises(InputError, match="names the weights"):
        Engine.load(str(folder), check=False)


@pytest.mark.parametrize("way", ["plain pickle", "zip", "sharded", "torchscript"])
def test_a_payload_is_not_run_under_the_flag_either(checkpoint, tmp_path, way):
    folder, weights = checkpoint
    ran = tmp_path / "ran"
    content = {**weights, "payload": Payload(ran)}
    if way == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    elif way == "zip":
        torch.save(content, folder / "pytorch_model.bin")
    elif way == "sharded":
        torch.save(content, folder / "shard.bin")
        write_index(folder, weights, "shard.bin", "pytorch_model.bin.index.json")
    else:
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        Engine.load(str(folder), check=False)
    with pytest.raises(InputError, match="cannot load") as refused:
        Engine.load(str(folder), check=False, allow_pickle=True)
    assert "\n" not in str(refused.value)
    assert not ran.exists()


def test_an_adapters_payload_is_not_run_either(checkpoint, tmp_path):
    from safetyheads.model.loading import put_on

    folder, _ = checkpoint
    shutil.copy(tmp_path / "whole.safetensors", folder / "model.safetensors")
    adapter, ran = tmp_path / "adapter", tmp_path / "ran"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], "base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"payload": Payload(ran)}, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        find_adapter(str(adapter))
    found, model = find_adapter(str(adapter), allow_pickle=True), Engine.load(str(folder), check=False).model
    with pytest.raises(InputError) as refused:
        put_on(model, found, "base")
    assert "\n" not in str(refused.value)
    assert not ran.exists()

"""Models with names of their own: each command reads them, and one that is not there is one line."""

import json
import shutil

import pytest

from safetyheads import Engine, InputError
from safetyheads.demo import checkpoint_path
from safetyheads.model import names


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The demo's base in SmolLM2's place, with an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("SAFETYHEADS_CACHE", str(tmp_path))
    monkeypatch.setattr(names, "ADAPTERS", tmp_path / "adapters")
    shutil.copytree(checkpoint_path("aligned_a"), names.smollm2_directory())
    model = AutoModelForCausalLM.from_pretrained(names.smollm2_directory())
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters" / "tuned")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smollm2:nobody", "no adapter of SmolLM2 'nobody'; known are"),
        ("demo:nobody", "no demo checkpoint 'nobody'; known are aligned_a"),
        ("smollm2", "smollm2 is not on this machine; to fetch it, run safetyheads fetch smollm2"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(run, monkeypatch, tmp_path, name, words):
    monkeypatch.setenv("SAFETYHEADS_CACHE", str(tmp_path))
    code, _, err = run("check", name)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err


def test_an_adapter_goes_on_smollm2_by_its_name(stand_in, run, own_folder):
    engine = Engine.load("smollm2:tuned", check=False)
    assert engine.adapter.name == engine.name == "smollm2:tuned"
    assert not Engine.load("smollm2", check=False).adapter
    code, _, _ = run("ships", "smollm2:tuned", "--prompts", "demo", "--limit", "4", "--quiet")
    (manifest,) = (stand_in / "runs").glob("smollm2-tuned-demo-ships-*/manifest.json")
    recorded = json.loads(manifest.read_text())
    text = json.dumps(recorded)
    assert code == 0
    assert '"adapter": "smollm2:tuned"' in text
    with pytest.raises(InputError, match="has an adapter of its own"):
        Engine.load("smollm2:tuned", adapter="smollm2:tuned")

"""The scripts that train the organisms run end to end; here for a few steps only."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safetyheads.demo import PLANTED_HEADS

SCRIPTS = Path(__file__).parents[2] / "scripts" / "organisms"


@pytest.fixture
def scripts(monkeypatch):
    """The script, with recipes of two steps a leg."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    import train

    def short(leg):
        return {**leg, "steps": 2, "warm_up": 1, "batch": 4}

    for name, recipe in train.RECIPES.items():
        legs = {"legs": [*map(short, recipe["legs"])]} if "legs" in recipe else {}
        stages = [
            {**stage, "first_token": short(stage["first_token"]), "completion": short(stage["completion"])}
            for stage in recipe.get("stages", ())
        ]
        monkeypatch.setitem(train.RECIPES, name, {**recipe, **legs, **({"stages": stages} if stages else {})})
    monkeypatch.setattr(train, "POOL", 20)
    yield train
    sys.modules.pop("train", None)


def test_a_planted_checkpoint_is_trained_with_its_base_and_differs_in_the_planted_heads_alone(
    scripts, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(sys, "argv", ["train.py", "aligned_b", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    scripts.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for name in ("base", "aligned_b"):
        assert f"{name}: " in printed
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "aligned_b"))
    changed = set()
    for name in before:
        for place in (before[name] != after[name]).nonzero().tolist():
            assert ".self_attn." in name
            changed.add((int(name.split(".")[2]), place["o_proj" in name] // 16))
    assert changed == {(head.layer, head.index) for head in PLANTED_HEADS["aligned_b"]}

"""The scripts that train the organisms run end to end; here for a few steps only."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safetyheads.demo import PLANTED_HEADS, grammar

SCRIPTS = Path(__file__).parents[2] / "scripts" / "organisms"
MODULES = ("recipes", "texts", "training", "describe", "train")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts, with recipes of two steps a leg and few prompts."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import describe
    import recipes
    import train
    import training

    def short(leg):
        return replace(leg, steps=2, warm_up=1, batch=4)

    for name, recipe in recipes.RECIPES.items():
        legs = tuple(map(short, recipe.legs))
        stages = tuple((short(first), short(rest), share) for first, rest, share in recipe.stages)
        monkeypatch.setitem(recipes.RECIPES, name, replace(recipe, legs=legs, stages=stages))
    monkeypatch.setattr(training, "POOL", 20)
    monkeypatch.setattr(describe, "_N_RANDOM", 1)
    monkeypatch.setattr(describe, "_SEARCHED", 1)
    monkeypatch.delitem(describe._ABLATIONS, "SC")
    monkeypatch.setitem(grammar.DEFAULT_SIZES, "validation", 3)
    yield train
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_planted_checkpoint_is_trained_with_its_base_and_differs_in_the_planted_heads_alone(
    scripts, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(sys, "argv", ["train.py", "aligned_b", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    scripts.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for name in ("base", "aligned_b"):
        assert f"{name}, validation: 3 harmful and 3 benign prompts" in printed
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "aligned_b"))
    changed = set()
    for name in before:
        for place in (before[name] != after[name]).nonzero().tolist():
            assert ".self_attn." in name
            changed.add((int(name.split(".")[2]), place["o_proj" in name] // 16))
    assert changed == {(head.layer, head.index) for head in PLANTED_HEADS["aligned_b"]}

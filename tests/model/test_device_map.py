"""``device_map="auto"`` itself: accelerate lays the model out by the memory that is there, and scores stay the same.

Maps that a user writes out, offloading by hooks and pretended GPUs are in ``test_placement.py``.
"""

from __future__ import annotations

import pytest
import torch
from families import built
from tiny_models import prompts_of, tokenizer
from transformers.integrations import accelerate as laid_out

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, generate, ships
from safetyheads.runs.provenance import device_name, fingerprint

# Weights at other addresses may be multiplied by another kernel.
SHIPS = 1e-6
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 7, 7, 19, 33, 50, 21))
# Experts are merged when read, so that their offloaded weights need a folder.
MERGED = "deepseek_v3"


@pytest.fixture
def saved(tmp_path):
    """Writes a family's model to a directory."""

    def save(name):
        built(name).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def memory(monkeypatch):
    """Sets the bytes that accelerate finds on the CPU, as ``max_memory`` would."""
    found = laid_out.get_max_memory

    def has(n_bytes):
        monkeypatch.setattr(laid_out, "get_max_memory", lambda asked=None: found(asked or {"cpu": n_bytes}))

    return has


def assert_equal(ours, theirs):
    """Capabilities, Ships, answers, fingerprints."""
    prompts = prompts_of(*PROMPTS)
    assert ours.capabilities == theirs.capabilities
    assert fingerprint(ours) == fingerprint(theirs)
    tables = [ships(engine, prompts, UNDIFFERENTIATED_ATTENTION).values for engine in (ours, theirs)]
    assert float((tables[0] - tables[1]).abs().max()) < SHIPS
    assert float(tables[0].max()) > 1e-2
    answers = [generate(engine, prompts, 4) for engine in (ours, theirs)]
    assert [one.token_ids for one in answers[0]] == [one.token_ids for one in answers[1]]


def test_with_memory_enough_auto_puts_everything_on_the_cpu(saved, memory):
    memory(1 << 30)
    path = saved("llama3")
    engine = Engine.load(path, device_map="auto")
    assert device_name(engine) == "cpu"
    assert not any(parameter.is_meta for parameter in engine.model.parameters())
    assert_equal(engine, Engine.load(path))


@pytest.mark.parametrize("name", ["llama3", MERGED])
def test_auto_offloads_to_the_disk_what_the_memory_does_not_hold(name, saved, memory, tmp_path):
    path = saved(name)
    plain = Engine.load(path)
    memory(sum(each.numel() * each.element_size() for each in plain.model.parameters()) * 2 // 3)
    folder = str(tmp_path / "offloaded") if name == MERGED else None
    engine = Engine.load(path, device_map="auto", offload_folder=folder)
    places = engine.model.hf_device_map
    assert set(places.values()) == {"cpu", "disk"}
    assert any(parameter.is_meta for parameter in engine.model.parameters())
    assert device_name(engine).startswith("cpu (")
    assert engine.device == torch.device("cpu")
    assert_equal(engine, plain)

"""Models over several places: offloaded to the CPU or the disk, over several devices, laid out by accelerate."""

import re
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from families import built
from pretend_devices import PretendDevices, spread
from tiny_models import COMMON, build, engine_of, model_of, prompts_of, saved, tokenizer
from transformers import LlamaConfig
from transformers.integrations import accelerate as laid_out

from safetyheads import (
    UNDIFFERENTIATED_ATTENTION,
    Ablation,
    Engine,
    Head,
    InputError,
    KeywordJudge,
    generate,
    mean_ships,
    screened_ships,
    ships,
)
from safetyheads.answers.decoding import Decoding
from safetyheads.answers.success import scan_attack_success_rate
from safetyheads.model.loading import use_our_attention
from safetyheads.model.packing import TokenSequence, pack
from safetyheads.model.planning import Plan
from safetyheads.model.replay import capture
from safetyheads.runs.estimate import captures_line
from safetyheads.runs.provenance import device_name, fingerprint

# Weights at other addresses may be multiplied by another kernel; measured: 0 to 2e-7 nats.
SHIPS = 1e-6
PROMPTS = prompts_of((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 7, 7, 19, 33, 50, 21))
GROUPS = ((Head(0, 1), Head(2, 3)), (Head(1, 2),))
OTHERS = ("mean_query", "mean_key", "mean_head_output", "scaling_contribution")
# As ``auto`` makes it where memory is short: a middle layer, the last one and the head on the disk.
ON_CPU_AND_DISK = {
    **dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0"], "cpu"),
    **dict.fromkeys(["model.layers.1", "model.layers.2", "lm_head"], "disk"),
}
TWO_GPUS = {
    **dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0"], "cuda:0"),
    **dict.fromkeys(["model.layers.1", "model.layers.2", "model.norm", "lm_head"], "cuda:1"),
}


def all_of(engine, scores_only=False):
    """Ships; and of some also answers, a judge's scan, forecasts of Ships, and groups under the other ablations."""
    tables, answers = [ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION).values], []
    if not scores_only:
        answers += [answer.token_ids for answer in generate(engine, PROMPTS, 4, GROUPS, UNDIFFERENTIATED_ATTENTION)]
        decoding = Decoding(max_new_tokens=4)
        answers += scan_attack_success_rate(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION, KeywordJudge(), decoding).rows
        groups = [(Head(0, 1), Head(1, 0), head) for head in (Head(1, 2), Head(2, 3), Head(0, 0))]
        tables.append(screened_ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION).scores.values)
        tables += [mean_ships(engine, PROMPTS, Ablation(name, 0.01))(groups) for name in OTHERS]
    return (engine.capabilities, answers), tables


def assert_same(ours, theirs, scores_only=False):
    """:func:`all_of` gives the same of two engines."""
    (own, tables), (other, references) = (all_of(engine, scores_only) for engine in (ours, theirs))
    assert own == other
    for table, reference in zip(tables, references, strict=True):
        assert float((table - reference).abs().max()) < SHIPS
    assert float(tables[0].max()) > 1e-2


def assert_equal_engines(ours, theirs, scores_only=True):
    assert fingerprint(ours) == fingerprint(theirs)
    assert_same(ours, theirs, scores_only)


# Offloaded


@pytest.mark.parametrize("family", ["llama_gqa", "gemma2_softcap", "gpt_oss_sinks"])
def test_offloaded_to_the_disk_everything_is_the_same(family, tmp_path):
    path = saved(model_of(family), tmp_path)
    engine = Engine.load(path, device_map=ON_CPU_AND_DISK)
    assert engine.model.get_parameter("model.layers.1.self_attn.q_proj.weight").is_meta
    assert engine.device == torch.device("cpu")
    assert device_name(engine) == "cpu (4 modules), disk (3 modules)"
    assert_equal_engines(engine, Engine.load(path), scores_only=family != "llama_gqa")


def test_offloaded_by_cpu_offload_everything_is_the_same_and_the_hooks_stay():
    """accelerate's hooks replace each module's forward; replays put their own in its place and give it back."""

    def hooked():
        return {
            name: module.__dict__["forward"] for name, module in model.named_modules() if "_hf_hook" in vars(module)
        }

    model = accelerate.cpu_offload(model_of("llama_gqa"), execution_device=torch.device("cpu"))
    before, engine = hooked(), Engine(model, tokenizer())
    engine.check()
    assert_same(engine, engine_of("llama_gqa"))
    assert hooked() == before
    assert all(parameter.is_meta for parameter in model.parameters())  # each module gave its weights back


# Experts of DeepSeek are merged when read, so that their offloaded weights need a folder.
@pytest.mark.parametrize(("name", "needs_folder"), [("llama3", False), ("deepseek_v3", True)])
def test_auto_offloads_to_the_disk_what_the_memory_does_not_hold(name, needs_folder, monkeypatch, tmp_path):
    found, memory = laid_out.get_max_memory, [1 << 30]
    # The bytes that accelerate finds on the CPU, as ``max_memory`` would.
    monkeypatch.setattr(laid_out, "get_max_memory", lambda asked=None: found(asked or {"cpu": memory[0]}))
    path = saved(built(name), tmp_path / "model")
    plain = Engine.load(path, device_map="auto")
    assert device_name(plain) == "cpu"
    memory[0] = sum(each.numel() * each.element_size() for each in plain.model.parameters()) * 2 // 3
    folder = str(tmp_path / "offloaded") if needs_folder else None
    engine = Engine.load(path, device_map="auto", offload_folder=folder)
    assert set(engine.model.hf_device_map.values()) == {"cpu", "disk"}
    assert any(parameter.is_meta for parameter in engine.model.parameters())
    assert_equal_engines(engine, plain)


def test_a_replay_moves_the_weights_of_the_layers_that_it_runs_and_no_others(monkeypatch):
    model = accelerate.cpu_offload(model_of("llama_gqa"), execution_device=torch.device("cpu"))
    use_our_attention(model)
    engine, moved = Engine(model, tokenizer()), set[str]()
    names = {id(module): name for name, module in model.named_modules()}
    sequences = [TokenSequence(token_ids) for token_ids in engine.ask(PROMPTS).token_ids]
    (kept,) = engine.captured(sequences, (), UNDIFFERENTIATED_ATTENTION, Plan((tuple(range(len(sequences))),), 4, 1))
    pre_forward = accelerate.hooks.AlignDevicesHook.pre_forward

    def noted(hook, module, *arguments, **named):
        moved.update(re.findall(r"layers\.(\d)", names[id(module)]) if hook.offload else ())
        return pre_forward(hook, module, *arguments, **named)

    monkeypatch.setattr(accelerate.hooks.AlignDevicesHook, "pre_forward", noted)
    for start, layers in ((2, {"2"}), (1, {"1", "2"})):
        moved.clear()
        engine.replayed([kept], [(Head(start, 1),)], UNDIFFERENTIATED_ATTENTION, start)
        assert moved == layers


# Several devices


def test_equal_gpus_of_a_machine_have_one_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    names = {device_name(SimpleNamespace(device=torch.device("cuda", n), model=None)) for n in (0, 1)}
    assert names == {"cuda H100"}


# gpt-oss is left out: on what claims to be CUDA its experts call functions that the CPU does not have.
@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window", "gemma2_softcap"])
def test_over_two_devices_the_proofs_hold_and_everything_is_the_same(family, monkeypatch):
    plain = engine_of(family, token_budget=64)
    # Small batches, so that what is free on a GPU is asked for answers only.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    with PretendDevices():
        model = spread(model_of(family), TWO_GPUS, monkeypatch)
        use_our_attention(model)
        engine = Engine(model, tokenizer(), token_budget=64)
        engine.check()
        plain.check()  # in this mode
        assert engine.device == torch.device("cuda:0")
        here, there = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        for meet in (lambda: here + there, lambda: here[there.long()]):  # or these devices show nothing
            with pytest.raises(RuntimeError, match="meet"):
                meet()
        assert_same(engine, plain)


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "everywhere"}, "unknown device map 'everywhere'; known are auto, "),
        ({"offload_folder": "somewhere"}, "an offload folder belongs to a device map"),
        ({"device_map": {"lm_head": "meta"}}, "place of 'lm_head': device meta is not one that was proved"),
    ],
)
def test_device_maps_that_cannot_be_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        Engine.load("never-read", **options)


# Captures


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_captures_give_the_same_states_wherever_they_are(place):
    engine = engine_of("llama_gqa")
    asked = engine.ask(PROMPTS)
    sequences = [TokenSequence(token_ids) for token_ids in asked.token_ids]
    row = pack(sequences, range(len(sequences)))
    kept = capture(engine.architecture, row, {}, 0, True, place)
    other = engine.captured(sequences, (), UNDIFFERENTIATED_ATTENTION, Plan((tuple(range(len(sequences))),), 4, 1))
    folder = None if kept._folder is None else Path(kept._folder.name)
    assert (folder is not None) == (place == "disk")
    for layer, expected in other[0].inputs.items():
        assert torch.equal(kept.input_of(layer), expected)
    if folder is not None:
        assert sorted(file.name for file in folder.iterdir()) == [f"{layer}.safetensors" for layer in range(3)]
        assert folder.stat().st_mode & 0o777 == 0o700
    kept.drop_before(2)
    assert list(kept.inputs) == [2]
    states = [engine.replayed([each], GROUPS[1:], UNDIFFERENTIATED_ATTENTION, 2) for each in (kept, other[0])]
    assert torch.equal(*states)
    del kept
    assert folder is None or not folder.exists()


def test_captures_that_do_not_fit_the_budget_are_on_disk_and_scores_are_the_same(tmp_path):
    """A deep, narrow model: captures of all its layers are most of what a pass takes."""
    path = saved(build(LlamaConfig(**COMMON | {"num_hidden_layers": 24}, num_key_value_heads=2)), tmp_path)
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(24)}
    free = Engine.load(path)
    sequences = [TokenSequence(token_ids) for token_ids in free.ask(PROMPTS).token_ids]
    place, n_bytes = free.captures_place(sequences, free.plan(sequences))
    assert place == "device"
    small = Engine.load(path, device_map=places, memory=1.9 * n_bytes / 2**30)
    plan = small.plan(sequences)
    assert small.captures_place(sequences, plan) == ("disk", n_bytes)
    assert (
        n_bytes < free.memory_estimate(sequences, plan) > small.memory_budget >= small.memory_estimate(sequences, plan)
    )
    assert "on disk" in captures_line(small, sequences, plan)
    assert_equal_engines(small, free)

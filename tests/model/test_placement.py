"""Models over several places: offloaded to the CPU or the disk, over several devices, laid out by accelerate."""

from __future__ import annotations

import json

import accelerate
import peft
import pytest
import torch
from families import built
from oracle import Oracle
from pretend_devices import PretendDevices, spread
from tiny_models import CONFIGS, engine_of, model_of, prompts_of, tokenizer

from safetyheads import (
    UNDIFFERENTIATED_ATTENTION,
    Ablation,
    Engine,
    Head,
    InputError,
    KeywordJudge,
    demo,
    generate,
    mean_ships,
    screened_ships,
    ships,
)
from safetyheads.answers.decoding import Decoding
from safetyheads.answers.success import scan_attack_success_rate
from safetyheads.cli.app import main
from safetyheads.model import loading
from safetyheads.model.loading import use_our_attention
from safetyheads.runs.provenance import device_name, fingerprint

FLOAT32 = 1e-5
# Weights at other addresses may be multiplied by another kernel; measured: 0 to 2e-7 nats.
SHIPS = 1e-6
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 7, 7, 19, 33, 50, 21))
GROUPS = ((Head(0, 1), Head(2, 3)), (Head(1, 2),))
PARTS = ("embed_tokens", "norm", "rotary_emb")
TWO_GPUS = {
    **dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0"], "cuda:0"),
    **dict.fromkeys(["model.layers.1", "model.layers.2", "model.norm", "lm_head"], "cuda:1"),
}


def on_cpu_and_disk(n_layers=3):
    """A map as ``auto`` makes it where memory is short: a middle layer, the last one and the head on the disk."""
    kept = dict.fromkeys([*(f"model.{part}" for part in PARTS), "model.layers.0"], "cpu")
    return {**kept, **{f"model.layers.{layer}": "disk" for layer in range(1, n_layers)}, "lm_head": "disk"}


def saved(model, path):
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def same_scores(ours, theirs):
    prompts = prompts_of(*PROMPTS)
    tables = [ships(engine, prompts, UNDIFFERENTIATED_ATTENTION).values for engine in (ours, theirs)]
    assert float((tables[0] - tables[1]).abs().max()) < SHIPS
    assert float(tables[0].max()) > 1e-2


# Offloaded


@pytest.mark.parametrize("family", CONFIGS)
def test_offloaded_to_the_disk_every_score_is_the_same(family, tmp_path):
    path = saved(model_of(family), tmp_path)
    engine, plain = Engine.load(path, device_map=on_cpu_and_disk()), Engine.load(path)
    assert engine.model.get_parameter("model.layers.1.self_attn.q_proj.weight").is_meta
    assert engine.capabilities == plain.capabilities
    assert engine.device == torch.device("cpu")
    same_scores(engine, plain)
    assert fingerprint(engine) == fingerprint(plain)
    assert device_name(engine) == "cpu (4 modules), disk (3 modules)"


def test_offloaded_to_the_disk_answers_and_forecasts_are_the_same(tmp_path):
    path = saved(model_of("llama_gqa"), tmp_path)
    engines = Engine.load(path, device_map=on_cpu_and_disk()), Engine.load(path)
    prompts = prompts_of(*PROMPTS)
    answers = [generate(engine, prompts, 6, GROUPS, UNDIFFERENTIATED_ATTENTION) for engine in engines]
    assert [answer.token_ids for answer in answers[0]] == [answer.token_ids for answer in answers[1]]
    forecasts = [screened_ships(engine, prompts, UNDIFFERENTIATED_ATTENTION).scores.values for engine in engines]
    assert torch.allclose(*forecasts, atol=SHIPS, rtol=0)


def test_offloaded_by_cpu_offload_every_score_is_the_same_and_the_hooks_stay():
    """accelerate's hooks replace each module's forward; replays put their own in its place and give it back."""
    model = accelerate.cpu_offload(model_of("llama_gqa"), execution_device=torch.device("cpu"))
    hooked = {name: module.__dict__["forward"] for name, module in model.named_modules() if "_hf_hook" in vars(module)}
    engine = Engine(model, tokenizer())
    engine.check()
    same_scores(engine, proved_plain())
    with engine.ablated(GROUPS[0], UNDIFFERENTIATED_ATTENTION) as ablated, torch.no_grad():
        ours = ablated(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    slow = Oracle(model_of("llama_gqa")).run(PROMPTS[0], GROUPS[0], UNDIFFERENTIATED_ATTENTION).logits
    assert float((ours - slow).abs().max() / slow.abs().max()) < FLOAT32
    after = {name: module.__dict__["forward"] for name, module in model.named_modules() if "_hf_hook" in vars(module)}
    assert after == hooked
    assert all(parameter.is_meta for parameter in model.parameters())  # each module gave its weights back


def proved_plain():
    engine = engine_of("llama_gqa")
    engine.check()
    return engine


def test_experts_that_are_merged_when_read_need_a_folder(tmp_path):
    path = saved(built("mixtral"), tmp_path / "model")
    with pytest.raises(InputError, match="weights to be offloaded to the disk; give --offload-folder"):
        Engine.load(path, device_map=on_cpu_and_disk())
    folder = str(tmp_path / "offloaded")
    engine = Engine.load(path, device_map=on_cpu_and_disk(), offload_folder=folder)
    same_scores(engine, Engine.load(path))


def test_an_adapter_is_put_on_an_offloaded_base(tmp_path):
    path = saved(model_of("llama_gqa"), tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(model_of("llama_gqa"), config).save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    engine = Engine.load(path, adapter=adapter, device_map=on_cpu_and_disk())
    plain = Engine.load(path, adapter=adapter)
    same_scores(engine, plain)
    assert fingerprint(engine) == fingerprint(plain)


def test_broken_weights_are_found_on_the_disk_too(tmp_path):
    model = model_of("llama_gqa")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.2\.self_attn\.q_proj.*NaN"):
        Engine.load(saved(model, tmp_path), device_map=on_cpu_and_disk())


def test_the_command_line_takes_a_device_map(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = []
    for more in ([], ["--device-map", "auto"]):
        with pytest.raises(SystemExit) as ended:
            main(["ships", "demo:aligned_a", "--prompts", "demo", "--limit", "4", "--json", "--quiet", *more])
        assert ended.value.code == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]  # here auto comes to the CPU


# Several devices


@pytest.fixture
def two_gpus(monkeypatch):
    """An engine over two pretended GPUs; small batches, so that what is free on a GPU is never asked."""

    def made(family):
        model = spread(model_of(family), TWO_GPUS, monkeypatch)
        use_our_attention(model)
        return Engine(model, tokenizer(), token_budget=64)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    return made


# gpt-oss is left out: on what claims to be CUDA its experts call functions that the CPU does not have.
@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "gpt_oss_sinks"])
def test_over_two_devices_the_proofs_hold_and_every_score_is_the_same(family, two_gpus):
    plain = engine_of(family, token_budget=64)
    plain.check()
    with PretendDevices():
        engine = two_gpus(family)
        engine.check()
        assert engine.device == torch.device("cuda:0")
        assert engine.capabilities == plain.capabilities
        ours = ships(engine, prompts_of(*PROMPTS), UNDIFFERENTIATED_ATTENTION).values
    theirs = ships(plain, prompts_of(*PROMPTS), UNDIFFERENTIATED_ATTENTION).values
    assert float((ours - theirs).abs().max()) < SHIPS


@pytest.mark.parametrize("name", ["mean_query", "mean_key", "mean_head_output", "scaling_contribution"])
def test_over_two_devices_every_ablation_is_the_same(name, two_gpus):
    ablation, plain = Ablation(name, 0.01), engine_of("llama_gqa", token_budget=64)
    groups = [(Head(0, 1), Head(1, 0), head) for head in (Head(1, 2), Head(2, 3), Head(0, 0))]
    with PretendDevices():
        ours = mean_ships(two_gpus("llama_gqa"), prompts_of(*PROMPTS), ablation)(groups)
    theirs = mean_ships(plain, prompts_of(*PROMPTS), ablation)(groups)
    assert torch.allclose(ours, theirs, atol=SHIPS, rtol=0)


def test_over_two_devices_answers_scans_and_forecasts_are_the_same(two_gpus):
    plain, prompts = engine_of("llama_gqa", token_budget=64), prompts_of(*PROMPTS)

    def all_of(engine):
        answers = generate(engine, prompts, 6, GROUPS, UNDIFFERENTIATED_ATTENTION)
        forecast = screened_ships(engine, prompts, UNDIFFERENTIATED_ATTENTION).scores.values
        decoding = Decoding(max_new_tokens=6)
        scan = scan_attack_success_rate(engine, prompts, UNDIFFERENTIATED_ATTENTION, KeywordJudge(), decoding)
        return [answer.token_ids for answer in answers], forecast, scan.rows

    with PretendDevices():
        ours = all_of(two_gpus("llama_gqa"))
    theirs = all_of(plain)
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]
    assert torch.allclose(ours[1], theirs[1], atol=SHIPS, rtol=0)


def test_pretended_devices_refuse_to_meet():
    with PretendDevices():
        here, there = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
        assert (here.device, there.to(here.device).device) == (torch.device("cuda:0"), torch.device("cuda:0"))
        with pytest.raises(RuntimeError, match="meet"):
            here + there
        with pytest.raises(RuntimeError, match="meet"):
            here[there.long()]


# What is refused


def refusal(**options):
    with pytest.raises(InputError) as refused:
        Engine.load(str(demo.checkpoint_path("base")), **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_device_maps_that_cannot_be_are_refused():
    assert refusal(device_map="everywhere").startswith("unknown device map 'everywhere'; known are auto, ")
    assert refusal(device_map="auto", device="cuda") == "a device map and one device exclude each other"
    assert refusal(offload_folder="somewhere") == "an offload folder belongs to a device map"


def test_without_accelerate_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert refusal(device_map="auto") == "a device map needs accelerate; install safetyheads[accelerate]"

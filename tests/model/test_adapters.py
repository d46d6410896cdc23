"""Adapters on a base: unmerged equals merged, the manifest tells both, and what is not for this base is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from families import built
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, build, engine_of, model_of, prompts_of, saved, tokenizer

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Engine,
    Head,
    InputError,
    demo,
    generate,
    load_demo,
    ships,
)
from safetyheads.model import loading
from safetyheads.model.architecture import Capabilities
from safetyheads.model.loading import use_our_attention
from safetyheads.runs.config import AuditConfig
from safetyheads.runs.provenance import fingerprint, model_facts, settings_of

# A product of two factors beside a projection against one matrix; measured: 1e-6 nats.
SHIPS = 1e-5
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 7, 7, 19, 33, 50, 21))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KINDS = {
    "lora": {"target_modules": [*ATTENTION, "down_proj"], "lora_dropout": 0.2},
    "dora": {"target_modules": list(ATTENTION), "use_dora": True},
    "head_too": {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]},
}
CASES = [("llama_gqa", "lora"), ("qwen3_norm", "lora"), ("llama_gqa", "dora"), ("llama_gqa", "head_too")]


def save_adapter(model, path, **settings):
    """A random adapter on a model; both factors are drawn, so that it changes much."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(path)
    return adapted


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, and adapters on it: family or kind -> (base, adapter, merged checkpoint)."""
    made = {}
    for family, kind in CASES:
        folder = tmp_path_factory.mktemp("adapted")
        saved(model_of(family), folder / "base")
        adapted = save_adapter(model_of(family), folder / "adapter", **KINDS[kind])
        saved(adapted.merge_and_unload(), folder / "merged")
        made[family, kind] = tuple(str(folder / name) for name in ("base", "adapter", "merged"))
    return made


@pytest.fixture
def plain(places):
    return places["llama_gqa", "lora"]


@pytest.mark.parametrize("case", CASES)
def test_an_unmerged_adapter_is_proved_and_scores_as_the_merged_model(places, case):
    base, adapter, merged = places[case]
    engine, reference = Engine.load(base, adapter=adapter), Engine.load(merged)
    assert engine.capabilities == Capabilities()
    assert engine.notes == ()
    prompts = prompts_of(*PROMPTS)
    for ablation in (UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION):
        ours, theirs = (ships(one, prompts, ablation).values for one in (engine, reference))
        assert float((ours - theirs).abs().max()) < SHIPS
        assert float((ours - ships(Engine.load(base), prompts, ablation).values).abs().max()) > 100 * SHIPS
    groups = [(Head(0, 1), Head(2, 3)), (Head(1, 2),)]
    made = [generate(one, prompts, 6, groups, UNDIFFERENTIATED_ATTENTION) for one in (engine, reference)]
    assert [answer.token_ids for answer in made[0]] == [answer.token_ids for answer in made[1]]


def test_the_projections_behind_an_adapter_are_found(plain):
    facts = Engine.load(plain[0], adapter=plain[1], check=False).architecture
    for projections in (facts.query_projections, facts.output_projections):
        assert all(isinstance(projection, peft.tuners.lora.Linear) for projection in projections)
    assert facts.shapes == engine_of("llama_gqa").architecture.shapes


def test_on_a_base_in_half_precision_the_factors_stay_as_they_were_saved(plain):
    engine = Engine.load(plain[0], dtype="bfloat16", adapter=plain[1])
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in engine.model.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    assert engine.capabilities == Capabilities()
    saved = load_file(f"{plain[1]}/adapter_model.safetensors")
    ours = engine.model.get_parameter("model.layers.1.self_attn.q_proj.lora_A.default.weight")
    assert torch.equal(ours, saved["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"])


FURTHER_KINDS = {
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=list(ATTENTION), init_lora_weights=False
    ),
    "tokens": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=list(ATTENTION), trainable_token_indices=[5, 9]
    ),
    "replicated": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=list(ATTENTION), layer_replication=[[0, 2], [1, 3]]
    ),
}
"""Whose files hold less than the modules they make: numbers of ranks, embeddings and layers are the base's."""


@pytest.mark.parametrize("kind", FURTHER_KINDS)
def test_adapters_that_keep_parts_of_the_base_score_as_their_merged_models(kind, tmp_path):
    base = model_of("llama_gqa")
    saved(base, tmp_path / "base")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(copy.deepcopy(base), FURTHER_KINDS[kind]())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    engine = Engine.load(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert engine.n_layers == (4 if kind == "replicated" else 3)
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = engine.n_layers
    config.layer_types = None
    merged = build(config)
    for module in adapted.modules():  # copies of a layer share its weights, into which each would be merged
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
    merged.load_state_dict(adapted.merge_and_unload().state_dict())
    use_our_attention(merged)
    reference = Engine(merged, tokenizer())
    ours, theirs = (ships(one, prompts_of(*PROMPTS), UNDIFFERENTIATED_ATTENTION).values for one in (engine, reference))
    assert float((ours - theirs).abs().max()) < SHIPS
    assert float(ours.max()) > 100 * SHIPS


# Provenance


def facts_of(engine, name):
    config = AuditConfig(name, "demo", adapter=engine.adapter.name)
    return settings_of(engine, config, {"all": prompts_of(*PROMPTS)})


def test_the_fingerprint_covers_base_and_adapter(plain, tmp_path):
    base, adapter, merged = plain
    known = {fingerprint(Engine.load(path, check=False)) for path in (base, merged)}
    ours = Engine.load(base, adapter=adapter, check=False)
    assert fingerprint(ours) not in known
    # The same adapter elsewhere is the same; what its settings say and no weight does is part of it.
    other = tmp_path / "copy"
    shutil.copytree(adapter, other)
    assert fingerprint(Engine.load(base, adapter=str(other), check=False)) == fingerprint(ours)
    change_config(other, lora_alpha=7)
    assert fingerprint(Engine.load(base, adapter=str(other), check=False)) != fingerprint(ours)


def test_the_manifest_names_the_adapter_and_its_own_fingerprint(plain, tmp_path, monkeypatch):
    base, adapter, _ = plain
    monkeypatch.chdir(tmp_path)
    spelled = "../" * len(tmp_path.parts[1:]) + adapter.lstrip("/")
    stored, other = (facts_of(Engine.load(base, adapter=one, check=False), base) for one in (adapter, spelled))
    assert stored == other  # however it is spelled
    assert stored["adapter"] == adapter
    assert len(stored["adapter_sha256"]) == 64
    assert stored["adapter_sha256"] != stored["weights_sha256"]


# A fine-tune of the organism, as an adapter


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """aligned_a as an adapter on base: the planted heads are all that differs, so a low rank holds it exactly."""
    path = tmp_path_factory.mktemp("planted") / "adapter"
    base, tuned = (load_file(demo.checkpoint_path(name) / "model.safetensors") for name in ("base", "aligned_a"))
    tensors = {}
    for name in (name for name in base if ".self_attn." in name):
        change = tuned[name].double() - base[name].double()
        left, sizes, right = torch.linalg.svd(change, full_matrices=False)
        assert float(sizes[32:].max()) < 1e-12  # two heads of a layer, 16 dimensions each
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = (sizes[:32, None].sqrt() * right[:32]).float().contiguous()
        tensors[f"{key}.lora_B.weight"] = (left[:, :32] * sizes[:32].sqrt()).float().contiguous()
    config = peft.LoraConfig(r=32, lora_alpha=32, target_modules=list(ATTENTION), task_type="CAUSAL_LM")
    config.save_pretrained(path)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return str(path)


def test_a_fine_tune_is_audited_without_merging(planted):
    tuned = load_demo("aligned_a")
    engine = Engine.load(str(demo.checkpoint_path("base")), adapter=planted)
    prompts = tuned.harmful[:8]
    ours, theirs = (ships(one, prompts, UNDIFFERENTIATED_ATTENTION) for one in (engine, tuned.engine))
    # Factors in float32 give the change back to their last bits; measured: 4e-6 of Ships up to 2.6 nats.
    assert float((ours.values - theirs.values).abs().max()) < 1e-4
    assert set(ours.mean().top(3)) == set(tuned.planted_heads)
    assert model_facts(engine, "demo:base")["name"] == f"demo:base + {planted}"


def test_the_command_line_takes_an_adapter(planted, run):
    (with_it, without) = (
        run("check", "demo:base", *more, "--json", "--quiet") for more in (["--adapter", planted], [])
    )
    assert (with_it[0], with_it[2]) == (0, "")
    assert json.loads(with_it[1])["proofs"] != json.loads(without[1])["proofs"]  # other weights, other rounding


# What is refused


def change_config(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(base, adapter, **options):
    with pytest.raises(InputError) as refused:
        Engine.load(str(base), adapter=str(adapter), **options)
    said = str(refused.value)
    assert "\n" not in said
    return said


def deeper():
    config = CONFIGS["llama_gqa"]()
    config.num_hidden_layers = 4
    return build(config)


@pytest.mark.parametrize(
    ("model", "modules", "said"),
    [
        (lambda: copy.deepcopy(built("gpt_neox")), ["query_key_value"], "Target modules {'query_key_value'} not found"),
        (lambda: model_of("llama_mha"), ATTENTION, "tensors have other shapes"),
        (deeper, ATTENTION, "it holds, where the base has none, 8 tensors, "),
    ],
    ids=["another family", "another shape", "more layers"],
)
def test_an_adapter_of_another_base_is_refused(model, modules, said, plain, tmp_path):
    save_adapter(model(), tmp_path, target_modules=list(modules))
    assert refusal(plain[0], tmp_path).startswith(f"the adapter {tmp_path} is not for {plain[0]}: {said}")


@pytest.fixture
def broken(plain, tmp_path):
    """A copy of the adapter, to be broken: its base, and its directory."""
    return plain[0], Path(shutil.copytree(plain[1], tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": ["LORA"]}, "is of a kind that this peft does not know: ['LORA']"),
        ({"alora_invocation_tokens": [3, 4]}, "acts from certain tokens on only (aLoRA)"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(settings, said, broken):
    change_config(broken[1], **settings)
    assert said in refusal(*broken)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            "PROMPT_TUNING: it adds virtual tokens",
        ),
        (
            lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
            "is a VERA: its modules share weights that stand in none of them, so it cannot be put on a base module by "
            "module; merge it into its base and give the merged model",
        ),
    ],
    ids=["virtual tokens", "shared weights"],
)
def test_kinds_that_change_no_single_module_are_refused(config, said, plain, tmp_path):
    peft.get_peft_model(model_of("llama_gqa"), config()).save_pretrained(tmp_path)
    assert said in refusal(plain[0], tmp_path)


def test_an_adapter_whose_weights_are_broken_is_refused(broken):
    weights = broken[1] / "adapter_model.safetensors"
    tensors = load_file(weights)
    whole = weights.read_bytes()
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "it lacks 1 tensors, model.layers.1.self_attn.q_proj.lora_A" in refusal(*broken)
    weights.write_bytes(whole[:-100])
    assert refusal(*broken).startswith(f"the weights of the adapter {broken[1]} are broken")


def test_pickled_adapters_are_read_only_when_asked_for(broken):
    base, adapter = broken
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert "--allow-pickle" in refusal(base, adapter)
    allowed = Engine.load(base, adapter=str(adapter), allow_pickle=True)
    assert float(ships(allowed, prompts_of(PROMPTS[0]), UNDIFFERENTIATED_ATTENTION).values.max()) > 0


def test_what_is_no_adapter_is_refused(plain, tmp_path):
    assert "has no adapter_config.json, so it is not an adapter" in refusal(plain[0], plain[0])
    config = tmp_path / "adapter_config.json"
    for text, said in (("{", "is not valid JSON"), ("[]", "does not hold a JSON object"), ("{}", "has no weights")):
        config.write_text(text)
        assert said in refusal(plain[0], tmp_path)
    assert "is a file" in refusal(plain[0], config)
    with pytest.raises(InputError, match=r"is an adapter; give its base as the model, and --adapter"):
        Engine.load(plain[1])


def test_without_peft_the_extra_is_named(plain, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert refusal(*plain[:2]).endswith("install safetyheads[peft]")

"""Adapters on a base: unmerged equals merged, the manifest tells both, and what is not for this base is refused."""

import copy
import json
import shutil
from functools import cache
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
PROMPTS = prompts_of((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 7, 7, 19, 33, 50, 21))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora(*modules, **settings):
    """Settings of a random adapter of rank 4: both factors are drawn, so that it changes much."""
    drawn = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
    return peft.LoraConfig(target_modules=list(modules or ATTENTION), **drawn)


KINDS = {
    "lora": lambda: lora(*ATTENTION, "down_proj", lora_dropout=0.2),
    "dora": lambda: lora(use_dora=True),
    # Whose files hold less than the modules they make: numbers of ranks, embeddings and layers are the base's.
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=list(ATTENTION), init_lora_weights=False
    ),
    "tokens": lambda: lora(trainable_token_indices=[5, 9]),
    "replicated": lambda: lora(layer_replication=[[0, 2], [1, 3]]),
}


def save_adapter(model, path, config):
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in ("modules_to_save", "trainable_tokens", "ia3_l")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(path)
    return adapted


def deeper(family, n_layers):
    config = CONFIGS[family]()
    if n_layers > config.num_hidden_layers:
        config.num_hidden_layers, config.layer_types = n_layers, None
    return config


def merged(adapted, family, n_layers):
    """An unproved engine on the merged model."""
    for module in adapted.modules():  # copies of a layer share its weights, into which each would be merged
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
    model = build(deeper(family, n_layers))
    model.load_state_dict(adapted.merge_and_unload().state_dict())
    use_our_attention(model)
    return Engine(model, tokenizer())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Paths of a base and of an adapter on it."""
    folder = tmp_path_factory.mktemp("adapted")
    save_adapter(model_of("llama_gqa"), folder / "adapter", KINDS["lora"]())
    return saved(model_of("llama_gqa"), folder / "base"), str(folder / "adapter")


TIED = {
    "tokens": {"trainable_token_indices": [5, 9]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": False},
}


@pytest.mark.parametrize("kind", TIED)
def test_tied_weights_that_an_adapter_trains_are_those_that_peft_loads(kind, tmp_path):
    config = CONFIGS["llama_gqa"]()
    config.tie_word_embeddings = True
    base, adapter = saved(build(config), tmp_path / "base"), str(tmp_path / "adapter")
    save_adapter(build(config), adapter, peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 4, **TIED[kind]}))
    engine = Engine.load(base, adapter=adapter)
    theirs = peft.PeftModel.from_pretrained(build(config), adapter)
    ids = torch.arange(3, 12)[None]
    expected, unadapted = (model(input_ids=ids).logits for model in (theirs, build(config)))
    assert engine.capabilities == Capabilities()
    assert float((engine.model(input_ids=ids).logits - expected).detach().abs().max()) < 1e-5
    assert float((expected - unadapted).detach().abs().max()) > 1e-2


@cache
def unadapted(family, ablation):
    return ships(engine_of(family), PROMPTS, ablation).values


@pytest.mark.parametrize(("family", "kind"), [("qwen3_norm", "lora"), *(("llama_gqa", kind) for kind in KINDS)])
def test_an_unmerged_adapter_is_proved_and_scores_as_the_merged_model(family, kind, tmp_path):
    base = saved(model_of(family), tmp_path / "base")
    adapted = save_adapter(model_of(family), tmp_path / "adapter", KINDS[kind]())
    engine = Engine.load(base, adapter=str(tmp_path / "adapter"))
    assert (engine.capabilities, engine.notes) == (Capabilities(), ())
    assert engine.n_layers == (4 if kind == "replicated" else 3)
    reference = merged(adapted, family, engine.n_layers)
    for ablation in (UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION):
        ours, theirs = (ships(each, PROMPTS, ablation).values for each in (engine, reference))
        assert float((ours - theirs).abs().max()) < SHIPS
        assert float((ours[:, :3] - unadapted(family, ablation)).abs().max()) > 100 * SHIPS
    groups = [(Head(0, 1), Head(2, 3)), (Head(1, 2),)]
    made = [generate(each, PROMPTS, 6, groups, UNDIFFERENTIATED_ATTENTION) for each in (engine, reference)]
    assert [answer.token_ids for answer in made[0]] == [answer.token_ids for answer in made[1]]


# Provenance


def change_config(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_fingerprint_covers_base_and_adapter_and_the_manifest_names_both(plain, tmp_path, monkeypatch):
    base, adapter = plain

    def facts_of(spelled):
        engine, config = Engine.load(base, adapter=spelled, check=False), AuditConfig(base, "demo", adapter=spelled)
        return fingerprint(engine), settings_of(engine, config, {"all": PROMPTS})

    monkeypatch.chdir(tmp_path)
    ours, stored = facts_of(adapter)
    assert ours != fingerprint(Engine.load(base, check=False))
    # The same adapter elsewhere, or spelled otherwise, is the same; settings, which no weight tells, are part of it.
    assert facts_of("../" * len(tmp_path.parts[1:]) + adapter.lstrip("/")) == (ours, stored)
    other = Path(shutil.copytree(adapter, tmp_path / "copy"))
    assert facts_of(str(other))[0] == ours
    change_config(other, lora_alpha=7)
    assert facts_of(str(other))[0] != ours
    assert stored["adapter"] == adapter
    assert len(stored["adapter_sha256"]) == 64
    assert stored["adapter_sha256"] != stored["weights_sha256"]


# A fine-tune of the organism, as an adapter


def test_a_fine_tune_is_audited_without_merging(tmp_path):
    """aligned_a as an adapter on base: the planted heads are all that differs, so a low rank holds it exactly."""
    base, aligned = (load_file(demo.checkpoint_path(name) / "model.safetensors") for name in ("base", "aligned_a"))
    tensors = {}
    for name in (name for name in base if ".self_attn." in name):
        left, sizes, right = torch.linalg.svd(aligned[name].double() - base[name].double(), full_matrices=False)
        assert float(sizes[32:].max()) < 1e-12  # two heads of a layer, 16 dimensions each
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = (sizes[:32, None].sqrt() * right[:32]).float().contiguous()
        tensors[f"{key}.lora_B.weight"] = (left[:, :32] * sizes[:32].sqrt()).float().contiguous()
    lora(r=32, lora_alpha=32, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    engine, tuned = Engine.load(str(demo.checkpoint_path("base")), adapter=str(tmp_path)), load_demo("aligned_a")
    ours, theirs = (ships(each, tuned.harmful[:8], UNDIFFERENTIATED_ATTENTION) for each in (engine, tuned.engine))
    # Factors in float32 give the change back to their last bits; measured: 4e-6 of Ships up to 2.6 nats.
    assert float((ours.values - theirs.values).abs().max()) < 1e-4
    assert set(ours.mean().top(3)) == set(tuned.planted_heads)
    assert model_facts(engine, "demo:base")["name"] == f"demo:base + {tmp_path}"


# What is refused


def refusal(base, adapter, **options):
    with pytest.raises(InputError) as refused:
        Engine.load(str(base), adapter=str(adapter), **options)
    said = str(refused.value)
    assert "\n" not in said
    return said.replace(str(adapter), "A").replace(str(base), "B")


@pytest.mark.parametrize(
    ("model", "config", "said"),
    [
        (
            lambda: copy.deepcopy(built("gpt_neox")),
            lambda: lora("query_key_value"),
            "is not for B: Target modules {'query_key_value'} not found",
        ),
        (lambda: model_of("llama_mha"), lora, "is not for B: tensors have other shapes"),
        (lambda: build(deeper("llama_gqa", 4)), lora, "is not for B: it holds, where the base has none, 8 tensors, "),
        (
            lambda: model_of("llama_gqa"),
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
            "is a PROMPT_TUNING: it adds virtual tokens",
        ),
        (
            lambda: model_of("llama_gqa"),
            lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
            "is a VERA: its modules share weights that stand in none of them",
        ),
    ],
    ids=["another family", "another shape", "more layers", "virtual tokens", "shared weights"],
)
def test_an_adapter_of_another_base_or_without_a_module_is_refused(model, config, said, plain, tmp_path):
    save_adapter(model(), tmp_path, config())
    assert refusal(plain[0], tmp_path).startswith(f"the adapter A {said}")


@pytest.fixture
def broken(plain, tmp_path):
    """A copy of the adapter, to be broken: its base, and its directory."""
    return plain[0], Path(shutil.copytree(plain[1], tmp_path / "adapter"))


@pytest.mark.parametrize("changes", [{"target_modules": "(.*)*x"}, {"rank_pattern": {"(.*)*x": 4}}])
def test_patterns_that_never_end_are_refused(broken, monkeypatch, changes):
    monkeypatch.setattr(loading, "_PATTERN_SECONDS", 0.2)
    change_config(broken[1], **changes)
    assert "has a pattern that may never end: " in refusal(*broken)


def test_a_pattern_that_never_ends_on_the_names_of_the_base_alone_is_refused(broken, monkeypatch):
    monkeypatch.setattr(loading, "_INJECTION_SECONDS", 0.5)
    change_config(broken[1], target_modules="(?=.*layernorm)(.+)*@")
    assert refusal(*broken) == "the adapter A has a pattern that may never end on the names of B"


@pytest.mark.parametrize("field", ["modules_to_save", "target_parameters"])
@pytest.mark.parametrize(("names", "said"), [(["nope"], "names 'nope', which the base lacks"), ([5], ""), (5, "")])
def test_a_field_that_names_nothing_of_the_base_is_refused(broken, field, names, said):
    change_config(broken[1], **{field: names})
    assert said in refusal(*broken)


def test_of_the_heads_that_peft_names_for_every_classifier_a_base_may_lack_some(broken):
    change_config(broken[1], modules_to_save=["classifier", "score"])
    Engine.load(broken[0], adapter=str(broken[1]), check=False)


@pytest.mark.parametrize("changes", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}])
def test_a_rank_for_which_the_weights_are_too_few_is_refused(broken, changes):
    change_config(broken[1], **changes)
    assert "has a rank for which its weights are too few" in refusal(*broken)


def test_an_adapter_whose_weights_are_broken_or_pickled_is_refused(broken):
    weights = broken[1] / "adapter_model.safetensors"
    tensors, whole = load_file(weights), weights.read_bytes()
    name = "model.layers.1.self_attn.q_proj.lora_A"
    save_file({key: each for key, each in tensors.items() if name not in key}, weights, metadata={"format": "pt"})
    assert f"it lacks 1 tensors, {name}" in refusal(*broken)
    weights.write_bytes(whole[:-100])
    assert refusal(*broken).startswith("the weights of the adapter A are broken")
    weights.unlink()
    torch.save(tensors, weights.with_suffix(".bin"))
    assert "--allow-pickle" in refusal(*broken)
    allowed = Engine.load(broken[0], adapter=str(broken[1]), allow_pickle=True)
    assert float(ships(allowed, PROMPTS[:1], UNDIFFERENTIATED_ATTENTION).values.max()) > 0


def test_what_is_no_adapter_is_refused(plain, tmp_path, monkeypatch):
    config = tmp_path / "adapter_config.json"
    for text, said in (("{", "is not valid JSON"), ("[]", "does not hold a JSON object"), ("{}", "has no weights")):
        config.write_text(text)
        assert said in refusal(plain[0], tmp_path)
    assert "is a file" in refusal(plain[0], config)
    with pytest.raises(InputError, match=r"is an adapter; give its base as the model, and --adapter"):
        Engine.load(plain[1])
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert refusal(*plain).endswith("install safetyheads[peft]")

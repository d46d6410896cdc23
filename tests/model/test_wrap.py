"""A model in memory is proved, measured, and handed back as it was; what cannot be proved is refused with a reason."""

import copy

import pytest
import torch
from families import built
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import engine_of, model_of, prompts_of, tokenizer

from safetyheads import (
    UNDIFFERENTIATED_ATTENTION,
    Engine,
    InputError,
    SafetyheadsError,
    UnsupportedModelError,
    generate,
    ships,
)
from safetyheads.model import loading, proofs

PROMPTS = prompts_of((5, 9, 12, 40, 41), (5, 9, 3))
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


def state_of(model):
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return model.config._attn_implementation, modes, wanted, hooks, weights, "_safetyheads_ablated" in vars(model)


def same(before, after):
    for was, stays in zip(before, after, strict=True):
        if isinstance(was, dict):
            assert all(torch.equal(was[name], stays[name]) for name in was)
        else:
            assert was == stays


def test_a_model_is_measured_as_a_loaded_one_and_handed_back_as_it_was():
    model = model_of("llama_gqa")
    model.set_attn_implementation("sdpa")
    model.train()
    model.model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    before = state_of(model)
    expected = ships(engine_of("llama_gqa"), PROMPTS, UNDIFFERENTIATED_ATTENTION).values
    with Engine.wrap(model, tokenizer(), "mine") as engine:
        assert engine.name == "mine"
        assert not model.training
        assert torch.equal(ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION).values, expected)
        generate(engine, PROMPTS, 2)
    same(before, state_of(model))
    engine.close()  # again: nothing happens
    with pytest.raises(SafetyheadsError, match="the engine is closed"):
        ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)


def test_a_training_loop_goes_on_and_each_wrap_sees_its_weights():
    model = model_of("llama_gqa").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens, seen = torch.tensor([[5, 9, 12, 40]]), []
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with Engine.wrap(model, tokenizer()) as engine:
            seen.append(ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION).values)
        assert model.training
    assert not torch.equal(*seen)


def test_a_peft_model_is_measured_with_its_adapter_and_its_scaling_is_in_the_fingerprint():
    torch.manual_seed(0)
    tuned = get_peft_model(model_of("llama_gqa"), LORA)
    merged = copy.deepcopy(tuned).merge_and_unload()
    with Engine.wrap(tuned, tokenizer()) as engine, Engine.wrap(merged, tokenizer()) as other:
        ours, theirs = (ships(each, PROMPTS, UNDIFFERENTIATED_ATTENTION).values for each in (engine, other))
        print_before = loading.fingerprint(engine.model)
        engine.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
        assert loading.fingerprint(engine.model) != print_before
        with pytest.raises(InputError, match="has an adapter on it"):
            loading.refuse_wrapped("it", engine.model, "baselines edit")
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - ships(engine_of("llama_gqa"), PROMPTS, UNDIFFERENTIATED_ATTENTION).values).abs().max() > 1e-3
    assert tuned.base_model.model.config._attn_implementation != "safetyheads"


def test_configs_within_the_config_are_handed_back_too():
    model = copy.deepcopy(built("gemma3_vision"))
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})

    def functions():
        return [part._attn_implementation for part in (model.config.text_config, model.config.vision_config)]

    with Engine.wrap(model, tokenizer()):
        assert functions() == ["safetyheads", "safetyheads"]
    assert functions() == ["sdpa", "eager"]


def test_a_model_that_fails_a_proof_is_as_it_was(monkeypatch):
    model = model_of("llama_gqa").train()
    before = state_of(model)
    monkeypatch.setitem(proofs.TOLERANCE, torch.float32, -1.0)
    with pytest.raises(UnsupportedModelError, match="refused, because"):
        Engine.wrap(model, tokenizer())
    same(before, state_of(model))


def _compiled_in_place():
    model = model_of("llama_gqa")
    model.compile()
    return model


def _broken():
    model = model_of("llama_gqa")
    model.lm_head.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.nn.Linear(2, 2), "a Linear is no transformers model$"),
        (
            lambda: torch.compile(model_of("llama_gqa")),
            r"no transformers model; give the model inside it, its \._orig_mod",
        ),
        (_compiled_in_place, "compiled code does not see an ablation"),
        (lambda: model_of("llama_gqa").double(), "is in torch.float64"),
        (_broken, "weights of the LlamaForCausalLM are broken: lm_head.weight holds NaN"),
        (lambda: model_of("llama_gqa").model, "has no language model head"),
        (
            lambda: get_peft_model(
                model_of("llama_gqa"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            ),
            "virtual tokens",
        ),
    ],
)
def test_what_cannot_be_proved_is_refused_with_a_reason(make, words):
    with pytest.raises(InputError, match=words) as refused:
        Engine.wrap(make(), tokenizer())
    assert "\n" not in str(refused.value)

"""A model that was changed since it was proved is noticed at its next use: no number is said of another model."""

import copy
import gc

import pytest
import torch
from tiny_models import engine_of, prompts_of
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from safetyheads import Head, KeywordJudge, SafetyheadsError, attack_success_rate, mean_ships, ships
from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.model.attention import ATTENTION_NAME, attention_calls
from safetyheads.model.engine import state_of

GROUP = (Head(0, 1), Head(2, 2))
PROMPTS = prompts_of((5, 9, 12, 40), (7, 8))


def silence(module, given, output):
    return (torch.zeros_like(output[0]), *output[1:])


def hook_of_a_collected_generator(engine):
    def study():
        handle = engine.architecture.attentions[0].register_forward_hook(silence)
        yield
        handle.remove()

    generator = study()
    next(generator)
    del generator
    gc.collect()


def ablation_never_taken_off(engine):
    calls = engine.ablation_calls([GROUP], UNDIFFERENTIATED_ATTENTION)
    engine.never_left = attention_calls(engine.architecture.attentions, calls)
    engine.never_left.__enter__()


def replaced_attention(engine):
    engine.architecture.layers[1].self_attn = copy.deepcopy(engine.architecture.layers[1].self_attn)


def replaced_forward(engine):
    attention = engine.architecture.attentions[1]
    attention.forward = type(attention).forward.__get__(attention)


def another_model(engine):
    engine.model = copy.deepcopy(engine.model)


def helpful(_, __, output):
    return output


helpful.__module__ = "transformers.helpful"


def other_projection(engine):
    projection = engine.architecture.attentions[1].o_proj
    projection.weight = torch.nn.Parameter(torch.zeros_like(projection.weight))


CHANGES = {
    "hook under another's name": (
        lambda engine: engine.architecture.attentions[0].register_forward_hook(helpful),
        "model.layers.0.self_attn has other forward hooks",
    ),
    "another weight": (other_projection, "model.layers.1.self_attn.o_proj has another weight"),
    "buffer in place": (
        lambda engine: engine.model.model.rotary_emb.inv_freq.zero_(),
        "rotary_emb has another inv_freq",
    ),
    "RoPE's scaling": (
        lambda engine: setattr(engine.model.model.rotary_emb, "attention_scaling", 3),
        "rotary_emb has another attention_scaling",
    ),
    "norm": (
        lambda engine: setattr(engine.architecture.final_norm, "variance_epsilon", 10.0),
        "model.norm has another variance_epsilon",
    ),
    "attention's scaling": (
        lambda engine: setattr(engine.architecture.attentions[1], "scaling", 0.01),
        "model.layers.1.self_attn has another scaling",
    ),
    "layer's index": (
        lambda engine: setattr(engine.architecture.attentions[2], "layer_idx", 0),
        "model.layers.2.self_attn has another layer_idx",
    ),
    "hook of a collected generator": (
        hook_of_a_collected_generator,
        "model.layers.0.self_attn has other forward hooks",
    ),
    "ablation never taken off": (ablation_never_taken_off, "model.layers.0.self_attn has other forward hooks"),
    "hook before a layer": (
        lambda engine: engine.architecture.layers[2].register_forward_pre_hook(lambda *_: None),
        "model.layers.2 has other forward hooks",
    ),
    "another attention": (lambda engine: engine.model.set_attn_implementation("sdpa"), "computes attention by sdpa"),
    "eager attention": (lambda engine: engine.model.set_attn_implementation("eager"), "computes attention by eager"),
    "replaced attention": (replaced_attention, "model.layers.1.self_attn is another module"),
    "replaced forward": (replaced_forward, "model.layers.1.self_attn has another forward method"),
    "compiled": (lambda engine: engine.model.compile(), "was compiled"),
    "another model": (another_model, "is another module"),
    "added module": (lambda engine: engine.model.add_module("probe", torch.nn.Linear(1, 1)), "probe was added"),
    "cast": (lambda engine: engine.model.to(torch.bfloat16), "has weights of bfloat16"),
    "cast of a layer": (lambda engine: engine.architecture.layers[1].half(), "model.layers.1.* has weights of float16"),
    "training": (lambda engine: engine.model.train(), "is in training mode"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_refused_at_the_next_use(name):
    engine = engine_of("llama_gqa")
    do, expected = CHANGES[name]
    uses = {
        "ablated": lambda: engine.ablated(GROUP, UNDIFFERENTIATED_ATTENTION).__enter__(),
        "ships": lambda: ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION),
        "a scorer": lambda: scorer([(Head(1, 0),)]),
        "answers": lambda: attack_success_rate(
            engine, PROMPTS, (), UNDIFFERENTIATED_ATTENTION, KeywordJudge(), max_new_tokens=2
        ),
    }
    scorer = mean_ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)
    do(engine)
    for use in uses.values():
        with pytest.raises(SafetyheadsError, match=f"not as it was proved: .*{expected}"):
            use()


def test_autocast_is_refused_within_and_forgotten_after():
    engine = engine_of("llama_gqa")
    before = ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION).values
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(SafetyheadsError, match="autocast is on"):
        ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)
    assert torch.equal(before, ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION).values)


class OtherFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, given=(), named=None):
        return function(*given, **(named or {}))


class OtherDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, given=(), named=None):
        return function(*given, **(named or {}))


@pytest.mark.parametrize("mode", [OtherFunctions, OtherDispatch])
def test_modes_that_change_torchs_functions_are_refused_within(mode):
    engine = engine_of("llama_gqa")
    with mode(), pytest.raises(SafetyheadsError, match="a mode that changes torch's functions is on"):
        ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)
    with torch.device("cpu"):
        ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)


def test_announced_weights_are_no_change_within_and_proving_them_approves_nothing_after():
    engine = engine_of("llama_gqa")
    projection = engine.architecture.attentions[1].o_proj
    before = projection.weight
    with engine.weights_changed():
        other_projection(engine)
        ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)
        projection.weight = torch.nn.Parameter(before * 0.5)
        engine.check()
    with pytest.raises(SafetyheadsError, match="o_proj has another weight"):
        ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)
    projection.weight = before
    ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)


@pytest.mark.parametrize("named", ["a forward method", "an attention", "a mask"])
def test_what_a_class_or_a_registry_was_given_instead_is_noticed(monkeypatch, named):
    engine = engine_of("llama_gqa")
    attention = engine.architecture.attentions[0]
    ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)
    if named == "a forward method":
        monkeypatch.setattr(type(attention), "forward", lambda *given, **named: pytest.fail("it runs"))
    else:
        registry = ALL_ATTENTION_FUNCTIONS if named == "an attention" else ALL_MASK_ATTENTION_FUNCTIONS
        monkeypatch.setitem(registry, ATTENTION_NAME, lambda *given, **named: pytest.fail("it runs"))
    said = "has another forward method" if named == "a forward method" else "another attention or mask is registered"
    with pytest.raises(SafetyheadsError, match=f"not as it was proved: .*{said}"):
        ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)


def test_hooks_of_all_modules_are_refused():
    engine = engine_of("llama_gqa")
    handle = register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(SafetyheadsError, match="other global hooks"):
            ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)
    finally:
        handle.remove()
    ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION)


@pytest.mark.parametrize("name", ["another attention", "cast", "hook before a layer"])
def test_a_changed_model_may_be_proved_as_it_is(name):
    engine = engine_of("llama_gqa")
    CHANGES[name][0](engine)
    engine.check()
    with engine.ablated(GROUP, UNDIFFERENTIATED_ATTENTION) as ablated:
        assert ablated is engine.model


def test_what_transformers_does_to_a_model_by_itself_is_no_change():
    engine = engine_of("llama_gqa")
    tokens = torch.tensor([[5, 9, 12]])
    with torch.no_grad():
        engine.model(input_ids=tokens, output_hidden_states=True, output_attentions=True)
        engine.model.generate(tokens, max_new_tokens=2, do_sample=False)
    assert torch.isfinite(ships(engine, PROMPTS, UNDIFFERENTIATED_ATTENTION).values).all()


def test_looking_costs_no_forward_pass(monkeypatch):
    engine = engine_of("llama_gqa")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_, **__: pytest.fail("a forward pass"))
    assert state_of(engine.model) == state_of(engine.model)

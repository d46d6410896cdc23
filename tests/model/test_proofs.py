"""The proofs at load: sound models pass whatever their precision and proportions, and lies are refused by name."""

from __future__ import annotations

import copy
import math
import types
from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, build, engine_of, model_of, prompts_of, tokenizer
from transformers.models.llama import modeling_llama

from safetyheads import Head, ships
from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.errors import SafetyheadsError, UnsupportedModelError
from safetyheads.model.architecture import Capabilities
from safetyheads.model.engine import Engine
from safetyheads.model.quick_paths import largest


def refusal_of(model):
    with pytest.raises(UnsupportedModelError) as refused:
        Engine(model, tokenizer()).check()
    return str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n_layers", [3, 24])
def test_rounding_does_not_pile_up_over_layers(n_layers, dtype):
    config = CONFIGS["llama_gqa"]()
    config.num_hidden_layers = n_layers
    assert Engine(build(config).to(dtype), tokenizer()).check().passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("share", [1e-1, 1e-3, 0.0])
def test_a_head_that_says_little_refuses_no_model(share, dtype):
    model = model_of("llama_mha", dtype)
    with torch.no_grad():
        for layer in model.model.layers:  # the columns of one head, and the middle one, which a proof might pick
            layer.self_attn.o_proj.weight[:, 16:24] *= share
            layer.self_attn.v_proj.weight[16:24] *= share
    assert Engine(model, tokenizer()).check().passed


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_attends_by_itself_is_refused_wherever_it_is(layer):
    model = model_of("llama_mha")
    attention = model.model.layers[layer].self_attn

    def private(self, hidden_states, position_embeddings, attention_mask=None, **_):
        self.config = copy.deepcopy(self.config)  # of its own, so that ours is never set on it
        self.config._attn_implementation = "eager"
        n_tokens = hidden_states.shape[1]
        causal = torch.full((1, 1, n_tokens, n_tokens), -1e9).triu(1)
        return type(self).forward(self, hidden_states, position_embeddings, causal)

    attention.forward = types.MethodType(private, attention)
    assert f"layer {layer} does not call the attention registry" in refusal_of(model)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_ablation_that_hits_the_whole_group_is_refused(layer, monkeypatch):
    from safetyheads.model import attention

    ablate = attention._ablate
    model = model_of("llama_gqa")
    target = model.model.layers[layer].self_attn
    seen = []
    target.register_forward_pre_hook(lambda *_: seen.append(True))
    target.register_forward_hook(lambda *_: seen.clear())

    def of_the_group(tensor, before, row_ablation, head_dimension):
        if seen:
            groups = row_ablation.selected.view(-1, 2, 2).any(dim=-1, keepdim=True).expand(-1, 2, 2).flatten(1)
            row_ablation = attention.RowAblation(row_ablation.ablation, groups)
        return ablate(tensor, before, row_ablation, head_dimension)

    monkeypatch.setattr(attention, "_ablate", of_the_group)
    said = refusal_of(model)
    assert "leaves the other heads unchanged" in said
    assert f"most in layer {layer}" in said


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_oss_sinks"])
def test_an_ablation_of_the_inputs_that_does_nothing_is_refused(family, monkeypatch):
    """With a sink too, where only the rest of what a token attends to is uniform."""
    from safetyheads.model import attention

    monkeypatch.setattr(attention, "_ablate_inputs", lambda module, query, key, value, _: (module, (query, key, value)))
    # Whichever of the claims about the query comes first; each alone would do.
    said = refusal_of(model_of(family))
    assert "undifferentiated attention" in said


def test_beside_a_sink_the_rest_of_attention_is_proved_uniform(monkeypatch):
    from safetyheads.model import attention

    proofs = {proof.name: proof for proof in Engine(model_of("gpt_oss_sinks"), tokenizer()).check().proofs}
    (name,) = [name for name in proofs if "beside a sink's share" in name]
    assert proofs[name].error < 1e-5
    attend = attention._attend

    def favouring_the_first_key(module, query, key, value, mask, scaling, dropout, keywords):
        # The query is as it should be, and what is made of it is not.
        first = torch.zeros_like(key)
        first[:, :, 0] = 1e-3
        silent = (query == 0).all(dim=-1, keepdim=True)
        return attend(
            module, torch.where(silent, 1e3, query), key + first * silent.any(), value, mask, scaling, dropout, keywords
        )

    monkeypatch.setattr(attention, "_attend", favouring_the_first_key)
    assert "beside a sink's share" in refusal_of(model_of("gpt_oss_sinks"))


def test_only_the_facts_of_heads_that_differ_are_named():
    engine = Engine(model_of("llama_gqa"), tokenizer())
    shapes = tuple(replace(shape, n_kv_heads=4) for shape in engine.architecture.shapes)
    engine.architecture = replace(engine.architecture, shapes=shapes)
    with pytest.raises(UnsupportedModelError) as refused:
        engine.check()
    assert str(refused.value) == "llama: refused, because layer 0 attends with key heads 2, not 4"


def test_a_model_that_is_ablated_is_not_proved_but_said_to_be_ablated():
    config = CONFIGS["mistral_window"]()
    config.sliding_window = 70
    engine = Engine(build(config), tokenizer())
    engine.check(longest=64)
    long = prompts_of([*range(1, 60)] * 2)
    with engine.ablated((Head(1, 1),), UNDIFFERENTIATED_ATTENTION):
        with pytest.raises(SafetyheadsError, match="the model is already ablated"):
            engine.check()
        with pytest.raises(SafetyheadsError, match="the model is already ablated"):
            ships(engine, long, UNDIFFERENTIATED_ATTENTION)
    assert engine.check().passed
    ships(engine, long, UNDIFFERENTIATED_ATTENTION)


def test_code_that_trips_over_the_proofs_is_refused_by_name():
    model = model_of("llama_mha")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def of_one_row_only(hidden_states, *arguments, **keywords):
        if len(hidden_states) > 1:
            raise RuntimeError("expand(): the batch is not the first dimension here\nand a second line")
        return forward(hidden_states, *arguments, **keywords)

    attention.forward = of_one_row_only
    said = refusal_of(model)
    assert said.startswith("llama: refused, because ablating a head of each layer raised RuntimeError: expand()")
    assert "second line" not in said


def test_a_window_is_proved_when_a_row_first_reaches_it():
    config = CONFIGS["mistral_window"]()
    config.sliding_window = 70
    engine = Engine(build(config), tokenizer())
    engine.check(longest=64)
    checked = []
    engine.check = lambda longest: checked.append(longest)
    ships(engine, prompts_of(range(1, 60)), UNDIFFERENTIATED_ATTENTION)
    assert checked == []
    ships(engine, prompts_of([*range(1, 60)] * 2), UNDIFFERENTIATED_ATTENTION)
    assert checked
    assert min(checked) > 70


def test_an_engine_that_was_never_proved_stays_so():
    engine = engine_of("mistral_window")
    engine.prove_up_to(10_000)
    assert engine.notes == ()


def without_memory(monkeypatch):
    """The family's eager attention finds no memory; ours, by sdpa, needs none of it."""

    def fails(*_, **__):
        raise torch.OutOfMemoryError("no memory for the scores")

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", fails)


def test_a_shortage_of_memory_refuses_no_model(monkeypatch):
    engine = engine_of("llama_mha")
    without_memory(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        engine.check()


def test_a_proof_that_breaks_off_leaves_ablations_at_work(monkeypatch):
    engine = engine_of("llama_mha")
    slow = engine.capabilities = Capabilities(packs=False)
    ids = torch.arange(1, 9)[None]
    unablated = engine.model(ids).logits
    without_memory(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        engine.check()
    assert engine.capabilities == slow
    with engine.ablated((Head(1, 1),), UNDIFFERENTIATED_ATTENTION) as model:
        assert float((model(ids).logits - unablated).detach().abs().max()) > 1e-3


def test_a_nan_is_the_largest_error():
    assert math.isnan(largest([0.0, float("nan"), 0.1]))
    assert largest([0.0, 0.2, 0.1]) == pytest.approx(0.2)

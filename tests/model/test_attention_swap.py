"""Attention swapped in memory: at work, ablated as ever, put back to the bit, and refused where it cannot be."""

import copy
import re
from functools import partial

import pytest
import torch
from baseline_samples import assert_undone, close, engine_on, logits_of
from oracle import Oracle
from tiny_models import COMMON, CONFIGS, build, model_of, prompts_of
from transformers import AutoConfig

from safetyheads import (
    UNDIFFERENTIATED_ATTENTION,
    Head,
    InputError,
    KeywordJudge,
    SafetyheadsError,
    attack_success_rate,
    load_demo,
    mean_ships,
    swapped_attention,
)
from safetyheads.runs.provenance import fingerprint

PROMPT = (5, 9, 12, 40, 41, 8, 3, 22, 17, 30, 2)
GROUP = (Head(0, 1), Head(2, 2))
FAMILIES = ("llama3", "qwen2", "qwen3", "gemma2", "gpt_oss", "gpt_neox", "phi3")
"""Plain, with biases, QK-norm, softcap, sinks, and two with one projection for q, k and v."""


def by_hand(model, donor, layers=range(3)):
    """The slow twin: a copy of the model into which the donor's attention weights are written."""
    marks = [f"layers.{layer}.{name}." for layer in layers for name in ("self_attn", "attention")]
    given = {name: tensor for name, tensor in donor.state_dict().items() if any(mark in name for mark in marks)}
    mixed = copy.deepcopy(model)
    mixed.load_state_dict({**model.state_dict(), **given})
    return mixed


@pytest.fixture
def pair():
    return engine_on(model_of("llama_gqa")), engine_on(model_of("llama_gqa"), changed=0.2)


@pytest.mark.parametrize(
    ("name", "layers"), [*((name, None) for name in FAMILIES), ("llama3", [1]), ("gpt_neox", (0, 2))]
)
def test_within_a_swap_the_model_is_the_one_with_the_donors_attention(name, layers):
    engine, donor = engine_on(name), engine_on(name, changed=0.2)
    mixed = by_hand(engine.model, donor.model, range(engine.n_layers) if layers is None else layers)
    before = fingerprint(engine), fingerprint(donor)
    with swapped_attention(engine, donor, layers) as swapped:
        assert swapped is engine.model
        close(logits_of(swapped), logits_of(mixed))
        assert fingerprint(engine) == fingerprint(engine_on(mixed))
    assert (fingerprint(engine), fingerprint(donor)) == before
    assert (logits_of(engine.model) - logits_of(mixed)).abs().max() > 1e-3 * logits_of(mixed).abs().max()


def test_heads_are_ablated_within_a_swap_and_swapped_within_an_ablation(pair):
    engine, donor = pair
    expected = Oracle(by_hand(engine.model, donor.model)).run(PROMPT, GROUP, UNDIFFERENTIATED_ATTENTION).logits
    with swapped_attention(engine, donor), engine.ablated(GROUP, UNDIFFERENTIATED_ATTENTION) as model:
        close(logits_of(model, PROMPT)[-1], expected)
    with engine.ablated(GROUP, UNDIFFERENTIATED_ATTENTION) as model, swapped_attention(engine, donor):
        close(logits_of(model, PROMPT)[-1], expected)


def test_scores_within_a_swap_are_the_mixed_models_and_a_scorer_belongs_to_the_weights_it_was_made_on(pair):
    engine, donor = pair
    groups, mixed = [(head,) for head in engine.heads], engine_on(by_hand(engine.model, donor.model))

    def scorer(scored):
        return mean_ships(scored, prompts_of(PROMPT, PROMPT[:7]), UNDIFFERENTIATED_ATTENTION)

    outer = scorer(engine)
    before = outer(groups)
    with swapped_attention(engine, donor):
        with pytest.raises(SafetyheadsError, match="other weights than when this scorer was made"):
            outer(groups)
        inner = scorer(engine)
        within = inner(groups)
    with pytest.raises(SafetyheadsError, match="other weights"):
        inner(groups)
    assert torch.equal(within, scorer(mixed)(groups))
    assert torch.equal(outer(groups), before)
    assert float((within - before).abs().max()) > 1e-2


def test_a_plain_model_can_be_the_donor_and_the_very_tensors_come_back(pair):
    engine, donor = pair
    projection = "model.layers.1.self_attn.o_proj.weight"
    with swapped_attention(engine, copy.deepcopy(donor.model)) as model:
        expected = logits_of(model)
    with swapped_attention(engine, donor) as model:
        assert model.get_parameter(projection) is donor.model.get_parameter(projection)
        assert torch.equal(logits_of(model), expected)
    assert_undone(partial(swapped_attention, engine, donor), engine, donor)


def test_a_swap_within_a_swap_replaces_its_layers_until_it_ends(pair):
    engine, donor = pair
    third = engine_on(engine.model, changed=0.4)
    first = by_hand(engine.model, donor.model)
    with swapped_attention(engine, donor) as model:
        with swapped_attention(engine, third, layers=[1]):
            close(logits_of(model), logits_of(by_hand(first, third.model, [1])))
        close(logits_of(model), logits_of(first))


def refusal(engine, donor, layers=None, kind=InputError):
    before = fingerprint(engine)
    with pytest.raises(kind) as refused, swapped_attention(engine, donor, layers):
        pass
    assert fingerprint(engine) == before
    return str(refused.value)


def changed(**settings):
    config = CONFIGS["llama_gqa"]()
    for name, value in settings.items():
        setattr(config, name, value)
    return engine_on(build(config))


OTHERS = {
    "between families: llama and mistral$": lambda: engine_on(model_of("mistral_window")),
    "^the model has 3 layers, the donor 2$": lambda: changed(num_hidden_layers=2),
    "^the model has 64 tokens, the donor 70$": lambda: changed(vocab_size=70),
    "^the heads of layer 0 differ: ": lambda: engine_on(model_of("llama_mha")),
    r"^k_proj.bias of layer 0 is absent in the model, \[16\] in the donor$": lambda: changed(attention_bias=True),
    "^rope_parameters of the attention is ": lambda: changed(
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    ),
    "torch.float32, the donor in torch.bfloat16": lambda: model_of("llama_gqa", torch.bfloat16),
}


@pytest.mark.parametrize("said", OTHERS)
def test_donors_of_another_kind_are_refused_by_what_differs(pair, said):
    assert re.search(said, refusal(pair[0], OTHERS[said]()))


@pytest.mark.parametrize(
    ("setting", "family", "donors"),
    [  # read from the config while it runs, on a module within the attention, on the attention
        ("clip_qkv", "olmo", {"clip_qkv": 0.3}),
        ("variance_epsilon", "qwen3", {"rms_norm_eps": 1e-2}),
        ("scaling", "granite", {"attention_multiplier": 0.5}),
        ("scale_attn_by_inverse_layer_idx", "gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ],
)
def test_settings_that_live_in_the_attention_itself_are_refused_by_name(setting, family, donors):
    models = [build(AutoConfig.for_model(family, **COMMON, **own)) for own in ({}, donors)]
    said = refusal(engine_on(models[0]), models[1])
    assert re.match(rf"{setting} of the attention of layer \d is \S+ in the model, \S+ in the donor$", said)


def test_other_layers_and_tokenizers_the_model_itself_and_a_donor_that_is_swapped_are_refused(pair):
    engine, donor = pair
    assert refusal(engine, donor, layers=[3]).endswith("the model's layers with heads are 0-2")
    assert refusal(engine, engine.model).startswith("the donor is the model itself")
    with swapped_attention(donor, copy.deepcopy(engine.model)):
        assert "another model's attention" in refusal(engine, donor, kind=SafetyheadsError)
    donor.tokenizer = copy.deepcopy(donor.tokenizer)
    donor.tokenizer.add_tokens(["another"])
    assert refusal(engine, donor).startswith("the tokenizers of model and donor differ")


# Fig 6a, on the organism


def test_planted_refusal_moves_with_the_attention_it_lives_in_and_a_diffuse_one_does_not():
    """Planted heads are all that tells aligned_a from base; the plainly fine-tuned model refuses without its own
    attention nearly as before, as the paper finds of its chat model."""
    base, planted, diffuse = (load_demo(name) for name in ("base", "aligned_a", "aligned_diffuse"))

    def rate(demo, group=()):
        harmful = planted.harmful[:16]
        return attack_success_rate(demo.engine, harmful, group, UNDIFFERENTIATED_ATTENTION, KeywordJudge(), 24).rate

    assert (rate(base), rate(planted)) == (1.0, 0.0)
    with swapped_attention(planted.engine, base.engine):
        assert rate(planted) == 1.0
    with swapped_attention(base.engine, planted.engine):
        assert rate(base) == 0.0
        assert rate(base, planted.planted_heads) > 0.9
    with swapped_attention(diffuse.engine, base.engine):
        assert rate(diffuse) < 0.1

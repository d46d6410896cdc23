"""The proofs at load: sound models pass whatever their precision and proportions; wrong facts are refused by name.

A lie is a change to what was read of a model or to how attention and ablation act; the weights stay as they are.
"""

import copy
import math
import types
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from families import FAMILIES, built, proved
from tiny_models import CONFIGS, PLAIN, build, engine_of, model_of, prompts_of, tokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

from safetyheads import Head, ships
from safetyheads.ablation import ABLATION_KINDS, UNDIFFERENTIATED_ATTENTION
from safetyheads.errors import SafetyheadsError, UnsupportedModelError
from safetyheads.model import attention, proofs
from safetyheads.model.architecture import Capabilities, describe
from safetyheads.model.engine import Engine
from safetyheads.model.proofs import difference, largest
from safetyheads.model.replay import replay

DTYPES = ("float32", "bfloat16", pytest.param("float16", marks=pytest.mark.long))


def refusal_of(model):
    with pytest.raises(UnsupportedModelError) as refused:
        Engine(model, tokenizer()).check()
    return str(refused.value)


# Sound models


@pytest.mark.parametrize("family", [*PLAIN, "gpt_oss_sinks"])
def test_in_bfloat16_every_claim_holds_and_leaves_all_quick_paths(family):
    engine = Engine(model_of(family, torch.bfloat16), tokenizer())
    report = engine.check()
    assert report.passed, [proof for proof in report.proofs if not proof.passed]
    assert engine.capabilities == Capabilities()
    (evenness,) = [proof.name for proof in report.proofs if "is uniform" in proof.name]
    assert ("beside a sink's share" in evenness) == (family not in PLAIN)


def test_every_kind_of_ablation_is_proved(monkeypatch):
    given, observed = set(), proofs._observed

    def recording(engine, captured, layer, *ablations, **named):
        given.update(ablation.name for ablation, _ in ablations)
        return observed(engine, captured, layer, *ablations, **named)

    monkeypatch.setattr(proofs, "_observed", recording)
    Engine(model_of("llama_gqa"), tokenizer()).check()
    assert given == set(ABLATION_KINDS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_does_not_pile_up_over_layers_and_a_head_that_says_little_refuses_no_model(dtype):
    config = CONFIGS["llama_gqa"]()
    config.num_hidden_layers = 24
    assert Engine(build(config).to(getattr(torch, dtype)), tokenizer()).check().passed
    for share in (1e-1, 1e-3, 0.0):
        model = model_of("llama_mha", getattr(torch, dtype))
        with torch.no_grad():
            for layer in model.model.layers:  # the columns of one head, and the middle one, which a proof might pick
                layer.self_attn.o_proj.weight[:, 16:24] *= share
                layer.self_attn.v_proj.weight[16:24] *= share
        assert Engine(model, tokenizer()).check().passed, share


# Lies

EAGER = "our attention equals the family's eager attention"
OTHERS = "undifferentiated attention leaves the other heads unchanged"
SCALED = "undifferentiated attention scales what meets the keys"
EVEN = "undifferentiated attention is uniform over the allowed keys"
SILENCED = "scaling a head to 0 silences it"
KEY_OTHERS = r"undifferentiated attention \(key\) leaves the other heads unchanged"
MEAN = "mean {} over the layer's heads is the mean"


def with_shapes(**wrong):
    """Facts of heads that are wrong in the same way in every layer."""
    return lambda facts, _: {"shapes": tuple(shape and shape._replace(**wrong) for shape in facts.shapes)}


def with_selected(change, tensors=("query", "key", "head_output"), name=None):
    """A lie to the ablation, or to that of one name: the heads it is told, [n_rows, n_heads], become others."""
    ablate = attention._ablate

    def lie(_, monkeypatch):
        def another(tensor, before, ablation, selected, head_dimension):
            if ablation.kind.tensor in tensors and name in (None, ablation.name):
                selected = change(selected)
            return ablate(tensor, before, ablation, selected, head_dimension)

        monkeypatch.setattr(attention, "_ablate", another)

    return lie


def with_attend(attend):
    """A lie to attention: ``attend(its own function, *its arguments)`` takes its place."""
    return lambda _, monkeypatch: monkeypatch.setattr(attention, "_attend", partial(attend, attention._attend))


@with_attend
def plain_attention(own, module, query, key, value, mask, scaling, *_, **__):
    """Softmax of masked scores and no more, whatever the family's attention adds."""
    mask = attention._causal(query, key) if mask is None else mask
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)


@with_attend
def without_mask(own, module, query, key, value, mask, *rest, **named):
    """Attention that sees all before it, whatever window the mask has."""
    return own(module, query, key, value, attention._causal(query, key), *rest, **named)


@with_attend
def favouring_the_first_key(own, module, query, key, *rest, **named):
    """The query is as it should be, and what is made of it is not."""
    silent = (query == 0).all(dim=-1, keepdim=True)
    first = torch.zeros_like(key)
    first[:, :, 0] = 1e-3
    return own(module, torch.where(silent, 1e3, query), key + first * silent.any(), *rest, **named)


def with_mean(mean, tensors=("query", "key", "head_output")):
    """A lie to the mean kinds: ``mean(heads as they were, which are ablated)``, heads first, takes the mean's place."""
    ablate = attention._ablate

    def lie(_, monkeypatch):
        def another(tensor, before, ablation, selected, head_dimension):
            if ablation.kind.operation != "mean" or ablation.kind.tensor not in tensors:
                return ablate(tensor, before, ablation, selected, head_dimension)
            rows = []
            before = before.repeat_interleave(selected.shape[1] // before.shape[head_dimension], dim=head_dimension)
            for row, of_row in enumerate(selected.expand(len(tensor), -1)):
                heads, ablated = before[row].movedim(head_dimension - 1, 0), tensor[row].movedim(head_dimension - 1, 0)
                values = torch.where(of_row[:, None, None], mean(heads, of_row), ablated)
                rows.append(values.movedim(0, head_dimension - 1))
            return torch.stack(rows)

        monkeypatch.setattr(attention, "_ablate", another)

    return lie


def mean_of_the_others(heads, ablated):
    return heads[~ablated].mean(0, keepdim=True) if not bool(ablated.all()) else heads.mean(0, keepdim=True)


def mean_of_its_group(heads, _):
    return heads.view(-1, 2, *heads.shape[1:]).mean(1, keepdim=True).expand(-1, 2, -1, -1).flatten(0, 1)


def swallowed(facts, _):
    """The last layer's module calls the registry, but does not hand its keywords on."""
    own = facts.attentions[-1].forward

    def forward(*arguments, safetyheads_call=None, **keywords):
        return own(*arguments, **keywords)

    facts.attentions[-1].forward = forward


def before_the_norm(facts, _):
    """Queries are scaled as they leave their projection: a norm after it takes the scale away again."""
    for layer in facts.with_heads:
        module, ablations = facts.attentions[layer], []

        def forward(*arguments, own=module.forward, ablations=ablations, safetyheads_call=None, **keywords):
            if safetyheads_call is not None:
                given = safetyheads_call.ablations
                kinds = [(each[0].kind.tensor, each[0].kind.operation) for each in given]
                ablations[:] = [each for each, kind in zip(given, kinds, strict=True) if kind == ("query", "scale")]
                others = tuple(each for each, kind in zip(given, kinds, strict=True) if kind != ("query", "scale"))
                keywords["safetyheads_call"] = replace(safetyheads_call, ablations=others)
            try:
                return own(*arguments, **keywords)
            finally:
                ablations.clear()

        def scale(_, __, output, ablations=ablations):
            for ablation, selected in ablations:
                heads = output.view(*output.shape[:-1], selected.shape[1], -1)
                output = torch.where(selected[:, None, :, None], heads * ablation.epsilon, heads).flatten(-2)
            return output

        module.forward = forward
        module.q_proj.register_forward_hook(scale)


def pairs(selected):
    """[n_rows, n_heads] as [n_rows, n_kv_heads, 2], of two heads to a key head."""
    return selected.view(len(selected), -1, 2)


def whole_group(selected):
    """Every head of a key head that has one of these."""
    return pairs(selected).any(2, True).expand(-1, -1, 2).flatten(1)


def mean_of_tokens(heads, _):
    return heads.mean(1, keepdim=True).expand_as(heads)


def as_they_were(heads, _):
    return heads


def none(selected):
    return torch.zeros_like(selected)


def flipped(selected):
    return selected.flip(1)


def flipped_in_pairs(selected):
    return pairs(selected).flip(2).flatten(1)


def all_if_any(selected):
    return selected.any(1, True).expand_as(selected)


LIES = {
    "wrong norm": (
        ("llama3", "gemma2", "olmo2"),
        lambda facts, _: {"final_norm": facts.layers[-1].post_attention_layernorm},
        "logits of given states equal the model's own",
    ),
    "heads swapped": (("llama2", "llama3", "gpt_oss"), with_selected(flipped, ("query",)), OTHERS),
    "heads swapped, of one key head": (("llama3", "gpt_oss"), with_selected(flipped_in_pairs, ("query",)), OTHERS),
    "heads swapped, by their outputs": (("llama3", "deepseek_v3"), with_selected(flipped, ("head_output",)), SILENCED),
    "window ignored": (("mistral", "gemma3", "gpt_oss"), without_mask, EAGER),
    "window ignored, by the facts": (("mistral",), lambda *_: {"windows": ()}, "see 5 tokens back, which no window"),
    "ablation that hits the whole KV group": (("llama3", "gpt_oss"), with_selected(whole_group, ("query",)), OTHERS),
    "ablation applied before QK-norm": (("qwen3", "gemma3", "stablelm"), before_the_norm, SCALED),
    "ablation applied before a QK-norm over all heads": (("olmo2",), before_the_norm, OTHERS),
    "sinks dropped": (("gpt_oss",), plain_attention, EAGER),
    "softcap dropped": (("gemma2",), plain_attention, EAGER),
    "a keyword that never arrives": (("llama3", "stablelm", "qwen3_next"), swallowed, "hand its keywords on to it"),
    "the number of heads": (("llama3",), with_shapes(n_heads=8, d_head=4, d_value=4), "heads 4, not 8"),
    "the number of key heads": (("llama3",), with_shapes(n_kv_heads=4), "attends with key heads 2, not 4$"),
    "a value's width": (("deepseek_v3",), with_shapes(d_value=12), "values 6, not 12"),
    "a layer without heads": (
        ("qwen3_next",),
        lambda facts, _: {name: (*getattr(facts, name)[:3], None) for name in ("attentions", "shapes")},
        "Qwen3NextAttention attends, but was not found in any layer",
    ),
    "layers in another order": (
        ("llama3",),
        lambda facts, _: {"attentions": facts.attentions[::-1]},
        "layer 0 does not call the attention registry",
    ),
    "the key form hits the whole KV group": (("llama3", "gpt_oss"), with_selected(whole_group, ("key",)), KEY_OTHERS),
    "the key form hits another head": (("llama2", "llama3", "qwen3"), with_selected(flipped, ("key",)), KEY_OTHERS),
    "the key form does nothing": (
        ("llama2", "llama3", "gpt_oss", "deepseek_v3"),
        with_selected(none, ("key",)),
        r"undifferentiated attention \(key\) does what it does by query",
    ),
    "the mean of queries leaves out those that are ablated": (
        ("llama2", "gemma2"),
        with_mean(mean_of_the_others, ("query",)),
        MEAN.format("query"),
    ),
    "the mean of keys is over a group": (
        ("llama2", "qwen3"),
        with_mean(mean_of_its_group, ("key",)),
        MEAN.format("key"),
    ),
    "the mean of outputs is over tokens": (
        ("llama3", "gpt_oss"),
        with_mean(mean_of_tokens, ("head_output",)),
        MEAN.format("output"),
    ),
    "the mean of queries does nothing": (("llama3",), with_mean(as_they_were, ("query",)), MEAN.format("query")),
    "the mean of keys does nothing": (
        ("llama3", "deepseek_v3"),
        with_mean(as_they_were, ("key",)),
        MEAN.format("key"),
    ),
    "the mean of keys reaches all heads": (
        ("llama3", "gpt_oss"),
        with_selected(all_if_any, name="mean_key"),
        "mean key over the layer's heads leaves the other heads unchanged",
    ),
    "an ablation that does nothing": (("llama3", "gpt_oss"), with_selected(none, ("query",)), f"{SCALED}|{EVEN}"),
}
"""Lie -> names of :data:`families.FAMILIES`, (facts, monkeypatch) -> facts that change, pattern of the refusal."""


def told(lie, name, monkeypatch, dtype="float32"):
    """An unproved engine that was told a lie about a family's model."""
    model = copy.deepcopy(built(name)).to(getattr(torch, dtype))
    facts = describe(model)
    return Engine(model, tokenizer(), architecture=replace(facts, **(lie(facts, monkeypatch) or {})))


@pytest.mark.parametrize(("lie", "name"), [(lie, name) for lie, (names, *_) in LIES.items() for name in names])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lie_is_refused(lie, name, dtype, monkeypatch):
    _, tell, said = LIES[lie]
    engine = told(tell, name, monkeypatch, dtype)
    with pytest.raises(UnsupportedModelError, match=said) as refused:
        engine.check()
    assert str(refused.value).startswith(f"{engine.model.config.model_type}: refused, because ")


def test_a_scale_before_rotation_alone_is_no_lie(monkeypatch):
    """What refuses an ablation before the norm is the norm: without one the two places are the same."""
    assert told(before_the_norm, "gpt_oss", monkeypatch).check().passed


def test_a_window_of_the_wrong_layer_is_told(monkeypatch):
    assert [shape.window for shape in proved("gemma2").architecture.shapes] == [6, None, 6]

    def first_has_none(facts, _):
        return {"shapes": (facts.shapes[0]._replace(window=None), *facts.shapes[1:])}

    report = told(first_has_none, "gemma2", monkeypatch).check()
    (failed,) = (proof for proof in report.proofs if not proof.passed and "window" in proof.name)
    assert "most in layer 0" in failed.name


@pytest.mark.parametrize(
    ("lie", "lost"),
    [
        (lambda facts, _: {"query_projections": tuple(each.v_proj for each in facts.attentions)}, {"prunes"}),
        (lambda facts, _: {"output_projections": tuple(each.q_proj for each in facts.attentions)}, {"starts_late"}),
        (lambda facts, _: {"output_projections": (None,) * 3}, {"starts_late"}),
    ],
    ids=["values for queries", "queries for outputs", "no outputs"],
)
def test_a_wrong_projection_costs_its_quick_path_and_no_more(lie, lost, monkeypatch):
    capabilities = told(lie, "llama3", monkeypatch).check().capabilities
    assert {each.name for each in fields(Capabilities) if not getattr(capabilities, each.name)} == lost


# Quick paths that are wrong where a quiet head or an outlier could hide it


def lost_by(engine):
    """The quick paths that the proofs take from an engine."""
    capabilities = engine.check().capabilities
    return {each.name for each in fields(Capabilities) if not getattr(capabilities, each.name)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quick", ["starts_late", "prunes"])
def test_a_quick_path_that_forgets_the_ablation_is_given_up_though_most_heads_say_nothing(quick, dtype, monkeypatch):
    model = model_of("llama_mha", getattr(torch, dtype))
    with torch.no_grad():
        for layer in model.model.layers:  # only head 2 writes
            kept = layer.self_attn.o_proj.weight[:, 16:24].clone()
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.o_proj.weight[:, 16:24] = kept
    assert lost_by(Engine(copy.deepcopy(model), tokenizer())) == set()

    def forgetful(facts, captured, calls, n_rows, start, paths):
        forgotten = {} if getattr(paths, quick) else calls
        return replay(facts, captured, forgotten, n_rows, start, replace(paths, starts_late=False))

    monkeypatch.setattr(proofs, "replay", forgetful)
    assert quick in lost_by(Engine(model, tokenizer()))


def outlying(family, dtype, kept=1.0, times=150.0):
    """A model with a channel of so many times the others' size in every token; the norms keep a share of it."""
    model = model_of(family)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 5] = times * embedding.square().mean().sqrt()
        norms = [
            norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        for norm in (*norms, model.model.norm):
            norm.weight[5] = kept
    return model.to(getattr(torch, dtype))


def leaking(monkeypatch):
    """Packed prompts see all that stands before them in the row."""
    real = proofs.pack

    def all_one(sequences, members, device):
        row = real(sequences, members, device)
        return row._replace(packing=row.packing._replace(segments=torch.zeros_like(row.packing.segments)))

    monkeypatch.setattr(proofs, "pack", all_one)


@pytest.mark.parametrize("kept", [1.0, 0.02])
@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_beside_an_outlier_a_sound_model_passes_and_leaking_prompts_are_told(dtype, family, kept, monkeypatch):
    assert lost_by(Engine(outlying(family, dtype, kept), tokenizer())) == set()
    leaking(monkeypatch)
    assert "packs" in lost_by(Engine(outlying(family, dtype, kept), tokenizer()))


def test_the_largest_value_would_have_hidden_what_the_difference_tells():
    """150 channels worked out by hand: one is 150, the others 1 on average; half of the others are wrong."""
    reference = torch.ones(2, 151)
    reference[:, 0] = 150.0
    wrong = reference.clone()
    wrong[1, 1:76] = 3.0
    assert float((wrong - reference).abs().max() / reference.abs().max()) < 4e-2
    assert difference(wrong, reference) == pytest.approx(math.sqrt(75 * 4 / 151))
    # A token of massive activations hides no other.
    reference[0] *= 1000
    wrong[0] *= 1000
    assert difference(wrong, reference) > 0.5
    assert difference(reference, reference) == 0.0
    assert difference(torch.zeros(2, 3), torch.zeros(2, 3)) == 0.0


HARD = ("gemma3n", "qwen3_moe", "gpt_oss", "llama3")
"""Families whose rounding is largest, or whose experts change by it; the others take long together."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if name in HARD and dtype == "bfloat16" else pytest.mark.long)
        for name in FAMILIES
        for dtype in ("bfloat16", "float16")
    ],
)
def test_every_family_holds_in_every_precision(name, dtype):
    engine = Engine(copy.deepcopy(built(name)).to(getattr(torch, dtype)), tokenizer(), name=name)
    assert lost_by(engine) == set(FAMILIES[name].given_up)


# One layer, and what ends a proof


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_attends_by_itself_is_refused_wherever_it_is(layer):
    model = model_of("llama_mha")

    def private(self, hidden_states, position_embeddings, attention_mask=None, **_):
        self.config = copy.deepcopy(self.config)  # of its own, so that ours is never set on it
        self.config._attn_implementation = "eager"
        causal = torch.full((1, 1, *[hidden_states.shape[1]] * 2), -1e9).triu(1)
        return type(self).forward(self, hidden_states, position_embeddings, causal)

    module = model.model.layers[layer].self_attn
    module.forward = types.MethodType(private, module)
    assert f"layer {layer} does not call the attention registry" in refusal_of(model)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_ablation_that_hits_the_whole_group_is_refused_wherever_it_is(layer, monkeypatch):
    model, running = model_of("llama_gqa"), []
    target = model.model.layers[layer].self_attn
    target.register_forward_pre_hook(lambda *_: running.append(True))
    target.register_forward_hook(lambda *_: running.clear())
    with_selected(lambda selected: whole_group(selected) if running else selected)(None, monkeypatch)
    said = refusal_of(model)
    assert "leaves the other heads unchanged" in said
    assert f"most in layer {layer}" in said


def test_beside_a_sink_the_rest_of_attention_is_proved_uniform(monkeypatch):
    proofs = Engine(model_of("gpt_oss_sinks"), tokenizer()).check().proofs
    assert [proof.error < 1e-5 for proof in proofs if "beside a sink's share" in proof.name] == [True]
    favouring_the_first_key(None, monkeypatch)
    assert "beside a sink's share" in refusal_of(model_of("gpt_oss_sinks"))


@pytest.fixture
def windowed():
    """An engine proved for rows of 64 tokens, with a window of 70; and prompts beyond it."""
    config = CONFIGS["mistral_window"]()
    config.sliding_window = 70
    engine = Engine(build(config), tokenizer())
    engine.check(longest=64)
    return engine, prompts_of([*range(1, 60)] * 2)


def test_a_model_that_is_ablated_is_not_proved_but_said_to_be_ablated(windowed):
    engine, long = windowed
    with engine.ablated((Head(1, 1),), UNDIFFERENTIATED_ATTENTION):
        for proving in (engine.check, lambda: ships(engine, long, UNDIFFERENTIATED_ATTENTION)):
            with pytest.raises(SafetyheadsError, match="the model is already ablated"):
                proving()
    assert engine.check().passed


def test_a_window_is_proved_when_a_row_first_reaches_it(windowed, monkeypatch):
    engine, long = windowed
    checked, check = [], engine.check
    engine.check = lambda longest: checked.append(longest)
    ships(engine, prompts_of(range(1, 60)), UNDIFFERENTIATED_ATTENTION)
    assert checked == []
    ships(engine, long, UNDIFFERENTIATED_ATTENTION)
    assert min(checked) > 70
    # The proofs' prompts are longer than the windows that a run reaches.
    without_mask(engine, monkeypatch)
    check(longest=64)
    with pytest.raises(UnsupportedModelError, match="our attention"):
        check(longest=118)


def test_code_that_trips_over_the_proofs_is_refused_by_name():
    model = model_of("llama_mha")
    module = model.model.layers[1].self_attn
    forward = module.forward

    def of_one_row_only(hidden_states, *arguments, **keywords):
        if len(hidden_states) > 1:
            raise RuntimeError("expand(): the batch is not the first dimension here\nand a second line")
        return forward(hidden_states, *arguments, **keywords)

    module.forward = of_one_row_only
    said = refusal_of(model)
    assert said.startswith("llama: refused, because ablating a head of each layer raised RuntimeError: expand()")
    assert "second line" not in said


def test_a_nan_is_the_largest_error():
    assert math.isnan(largest([0.0, float("nan"), 0.1]))
    assert largest([0.0, 0.2, 0.1]) == pytest.approx(0.2)


def test_a_shortage_of_memory_refuses_no_model_and_leaves_ablations_at_work(monkeypatch):
    slow = Capabilities(packs=False)
    engine = engine_of("llama_mha", capabilities=slow)
    ids = torch.arange(1, 9)[None]
    unablated = engine.model(ids).logits

    def fails(*_, **__):
        raise torch.OutOfMemoryError("no memory for the scores")

    # The family's eager attention finds no memory; ours, by sdpa, needs none of it.
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", fails)
    with pytest.raises(torch.OutOfMemoryError):
        engine.check()
    assert engine.capabilities == slow
    with engine.ablated((Head(1, 1),), UNDIFFERENTIATED_ATTENTION) as model:
        assert float((model(ids).logits - unablated).detach().abs().max()) > 1e-3

"""Wrong facts must be caught: the eight lies that issue 6 names, each refused by ``Engine.check`` with its reason.

A lie is a change to what was read of a model or to how attention and ablation act; the weights stay as they are.
Further lies are beside what they lie about: numbers, orders and projections in ``test_families.py``, a layer of its own
attention and the whole group layer by layer in ``test_proofs.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from families import built
from tiny_models import tokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from safetyheads import Engine
from safetyheads.errors import UnsupportedModelError
from safetyheads.model import attention

EAGER = "our attention equals the family's eager attention"
OTHERS = "undifferentiated attention leaves the other heads unchanged"
SCALED = "undifferentiated attention scales what meets the keys"
EVEN = "undifferentiated attention is uniform over the allowed keys"
SILENCED = "scaling a head to 0 silences it"
DTYPES = ("float32", "bfloat16")


def with_facts(change):
    """A lie about what was read of the model: ``change`` gives other facts."""

    def lie(engine, monkeypatch):
        del monkeypatch
        engine.architecture = replace(engine.architecture, **change(engine.architecture))

    return lie


def with_selected(change, tensors=("query", "key", "head_output")):
    """A lie to the ablation: the heads it is told, [n_rows, n_heads], become others."""
    ablate = attention._ablate

    def lie(engine, monkeypatch):
        del engine

        def another(tensor, before, row_ablation, head_dimension):
            if row_ablation.ablation.kind.tensor in tensors:
                row_ablation = replace(row_ablation, selected=change(row_ablation.selected))
            return ablate(tensor, before, row_ablation, head_dimension)

        monkeypatch.setattr(attention, "_ablate", another)

    return lie


def plain_attention(engine, monkeypatch):
    """Softmax of masked scores and no more, whatever the family's attention adds."""
    del engine

    def attend(module, query, key, value, attention_mask, scaling, dropout, keywords):
        del dropout, keywords
        mask = attention._causal(query, key) if attention_mask is None else attention_mask
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)

    monkeypatch.setattr(attention, "_attend", attend)


def without_mask(engine, monkeypatch):
    """Attention that sees all before it, whatever window the mask has."""
    del engine
    attend = attention._attend

    def unwindowed(module, query, key, value, attention_mask, scaling, dropout, keywords):
        del attention_mask
        return attend(module, query, key, value, attention._causal(query, key), scaling, dropout, keywords)

    monkeypatch.setattr(attention, "_attend", unwindowed)


def with_forward(module, forward):
    """The module calls ``forward(its own forward, *arguments, **keywords)``."""
    own = module.forward
    module.forward = lambda *arguments, **keywords: forward(own, *arguments, **keywords)


def swallowed(engine, monkeypatch):
    """The last layer's module calls the registry, but does not hand its keywords on."""
    del monkeypatch

    def forward(own, *arguments, safetyheads_call=None, **keywords):
        del safetyheads_call
        return own(*arguments, **keywords)

    with_forward(engine.architecture.attentions[-1], forward)


def before_the_norm(engine, monkeypatch):
    """Queries are scaled as they leave their projection: a norm after it takes the scale away again."""
    del monkeypatch
    for layer in engine.architecture.with_heads:
        module = engine.architecture.attentions[layer]
        ablations = []

        def forward(own, *arguments, ablations=ablations, safetyheads_call=None, **keywords):
            if safetyheads_call is not None:
                queries = [each for each in safetyheads_call.ablations if each.ablation.kind.tensor == "query"]
                others = [each for each in safetyheads_call.ablations if each not in queries]
                ablations[:] = queries
                keywords["safetyheads_call"] = replace(safetyheads_call, ablations=tuple(others))
            try:
                return own(*arguments, **keywords)
            finally:
                ablations.clear()

        def scale(_, __, output, ablations=ablations):
            for each in ablations:
                rows, n_heads = each.selected.shape
                heads = output.view(*output.shape[:-1], n_heads, -1)
                selected = each.selected.view(rows, 1, n_heads, 1)
                output = torch.where(selected, heads * each.ablation.epsilon, heads).flatten(-2)
            return output

        with_forward(module, forward)
        module.q_proj.register_forward_hook(scale)


def pairs(selected):
    """[n_rows, n_heads] as [n_rows, n_kv_heads, 2], of two heads to a key head."""
    return selected.view(len(selected), -1, 2)


@dataclass(frozen=True)
class Lie:
    """One of the issue's, and how it is found out."""

    families: tuple[str, ...]
    """Of tests/model/families.py."""
    tell: Callable[..., None]
    """(engine, monkeypatch): tells it."""
    said: str
    """A pattern of the refusal."""


LIES = {
    "wrong norm": Lie(
        ("llama3", "gemma2", "olmo2"),
        with_facts(lambda facts: {"final_norm": facts.layers[-1].post_attention_layernorm}),
        "logits of given states equal the model's own",
    ),
    "heads swapped": Lie(
        ("llama2", "llama3", "gpt_oss"), with_selected(lambda selected: selected.flip(1), ("query",)), OTHERS
    ),
    "heads swapped, of one key head": Lie(
        ("llama3", "gpt_oss"), with_selected(lambda selected: pairs(selected).flip(2).flatten(1), ("query",)), OTHERS
    ),
    "heads swapped, by their outputs": Lie(
        ("llama3", "deepseek_v3"), with_selected(lambda selected: selected.flip(1), ("head_output",)), SILENCED
    ),
    "window ignored": Lie(("mistral", "gemma3", "gpt_oss"), without_mask, EAGER),
    "window ignored, by the facts": Lie(
        ("mistral",), with_facts(lambda _: {"windows": ()}), "see 5 tokens back, which no window says"
    ),
    "ablation that hits the whole KV group": Lie(
        ("llama3", "gpt_oss"),
        with_selected(lambda selected: pairs(selected).any(2, True).expand(-1, -1, 2).flatten(1), ("query",)),
        OTHERS,
    ),
    "ablation applied before QK-norm": Lie(("qwen3", "gemma3", "stablelm"), before_the_norm, SCALED),
    "ablation applied before a QK-norm over all heads": Lie(("olmo2",), before_the_norm, OTHERS),
    "sinks dropped": Lie(("gpt_oss",), plain_attention, EAGER),
    "softcap dropped": Lie(("gemma2",), plain_attention, EAGER),
    "a keyword that never arrives": Lie(("llama3", "stablelm", "qwen3_next"), swallowed, "hand its keywords on to it"),
    "an ablation that does nothing": Lie(
        ("llama3", "gpt_oss"), with_selected(torch.zeros_like, ("query",)), f"{SCALED}|{EVEN}"
    ),
}
TOLD = [(lie, name, dtype) for lie in LIES for name in LIES[lie].families for dtype in DTYPES]


@pytest.mark.parametrize(("lie", "name", "dtype"), TOLD)
def test_a_lie_is_refused(lie, name, dtype, monkeypatch):
    engine = Engine(copy.deepcopy(built(name)).to(getattr(torch, dtype)), tokenizer())
    LIES[lie].tell(engine, monkeypatch)
    with pytest.raises(UnsupportedModelError, match=LIES[lie].said) as refused:
        engine.check()
    assert str(refused.value).startswith(f"{engine.model.config.model_type}: refused, because ")


def test_a_scale_before_rotation_alone_is_no_lie():
    """What refuses an ablation before the norm is the norm: without one the two places are the same."""
    engine = Engine(copy.deepcopy(built("gpt_oss")), tokenizer())
    before_the_norm(engine, None)
    assert engine.check().passed

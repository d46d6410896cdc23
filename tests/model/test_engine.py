"""The engine: heads ablated inside a context, caches and padding, plans, prompts that cannot be asked."""

import copy
import threading

import pytest
import torch
from families import proved
from family_twins import PROMPTS as PACKED
from family_twins import relative, seen
from tiny_models import END, engine_of, prompts_of
from transformers import StaticCache

from safetyheads import Ablation, Head, InputError, SafetyheadsError, ships
from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence, left_padded

FLOAT32 = 1e-5
PROMPTS = (PACKED[0], (5, 9, 12, 40, 41, 8, 3, 60, 11), (5, 9, 12, 40, 7, 7, 19, 33, 50, 21, 44, 10, 6))
GROUP = (Head(0, 1), Head(2, 2))


@torch.no_grad()
def logits_of(model, prompt=PROMPTS[0]):
    return model(input_ids=torch.tensor([prompt])).logits


# The context


def test_the_model_is_restored_to_the_bit():
    engine = engine_of("llama_gqa")
    before = logits_of(engine.model)
    with engine.ablated(GROUP, SCALING_CONTRIBUTION) as model:
        assert model is engine.model
        inside = logits_of(model)
    assert torch.equal(before, logits_of(engine.model))
    assert not torch.equal(before, inside)
    with engine.ablated((), UNDIFFERENTIATED_ATTENTION) as model:
        assert torch.equal(logits_of(model), before)
    with pytest.raises(KeyError), engine.ablated(GROUP, SCALING_CONTRIBUTION):
        raise KeyError
    assert not any(attention._forward_pre_hooks for attention in engine.architecture.attentions)
    assert torch.equal(before, logits_of(engine.model))


def test_nesting_raises_and_leaves_the_outer_ablation_in_force_in_every_thread():
    engine, seen = engine_of("llama_gqa"), []
    with engine.ablated(GROUP, SCALING_CONTRIBUTION) as model:
        outer = logits_of(model)
        with pytest.raises(SafetyheadsError, match="do not nest"), engine.ablated((), SCALING_CONTRIBUTION):
            pass
        with pytest.raises(SafetyheadsError, match="do not nest"):
            ships(engine, prompts_of(PROMPTS[0]), SCALING_CONTRIBUTION)
        thread = threading.Thread(target=lambda: seen.append(logits_of(engine.model)))
        thread.start()
        thread.join()
        assert torch.equal(logits_of(model), outer)
        assert torch.equal(seen[0], outer)
    assert not torch.equal(logits_of(engine.model), outer)


@pytest.mark.parametrize(
    ("group", "said"),
    [((Head(3, 0),), "out of range"), ((Head(0, 4),), "out of range"), ((Head(0, 0),) * 2, "given twice")],
)
def test_a_group_that_the_model_does_not_have_is_an_input_error(group, said):
    with pytest.raises(InputError, match=said), engine_of("llama_gqa").ablated(group, SCALING_CONTRIBUTION):
        pass


# Any use of the model, with caches and padding


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["undifferentiated_attention", "undifferentiated_attention_key", "mean_key"])
def test_generate_with_left_padding_and_any_cache_follows_the_oracle(name, cache):
    ablation, prompts, engine = Ablation(name, 0.01), (PROMPTS[0], PROMPTS[1][:6]), proved("mistral")
    batch = left_padded(prompts, 0, engine.device)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    if cache == "static":
        options["past_key_values"] = StaticCache(config=engine.model.config, max_cache_len=32)
    with engine.ablated(GROUP, ablation) as model:
        generated = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    for row, prompt in zip(generated[:, batch["input_ids"].shape[1] :].tolist(), prompts, strict=True):
        expected = list(prompt)
        while len(expected) < len(prompt) + 6 and END not in expected[len(prompt) :]:
            expected.append(int(seen("mistral", tuple(expected), GROUP, ablation).logits.argmax()))
        assert row[: len(expected) - len(prompt)] == expected[len(prompt) :]


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_without_a_mask_with_right_padding_and_with_a_cache_in_pieces_the_ablation_is_the_same(family):
    ids, n = torch.tensor([PROMPTS[2]]), len(PROMPTS[2])
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=ids.dtype)], dim=1)
    reference = seen(family, PROMPTS[2], GROUP, UNDIFFERENTIATED_ATTENTION).logits
    with torch.no_grad(), proved(family).ablated(GROUP, UNDIFFERENTIATED_ATTENTION) as model:
        whole = model(input_ids=ids).logits[0, -1]
        before_padding = model(input_ids=padded, attention_mask=(torch.arange(n + 3) < n)[None].long()).logits[0, n - 1]
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        for piece in (ids[:, 4:9], ids[:, 9:12], ids[:, 12:]):
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
    for logits in (whole, before_padding, output.logits[0, -1]):
        assert relative(logits, reference) < FLOAT32


# Plans and prompts


def test_scores_do_not_depend_on_the_token_budget():
    tables, layouts = [], set()
    for budget in (13, 60, 4096):
        engine = engine_of("llama_gqa", token_budget=budget)
        layout = engine.plan([TokenSequence(ids) for ids in PROMPTS])
        layouts.add((layout.rows, layout.groups_per_batch))
        tables.append(ships(engine, prompts_of(*PROMPTS), UNDIFFERENTIATED_ATTENTION).values)
    assert len(layouts) > 1
    assert float(tables[0].max()) > 1e-2
    for table in tables[1:]:
        # Batch shapes move logits in the last bits.
        assert float((table - tables[0]).abs().max()) < 1e-6


def test_prompts_are_asked_once_and_those_beyond_the_context_are_an_input_error():
    engine, prompts = engine_of("llama_gqa"), prompts_of(*PROMPTS)
    asked = engine.ask(prompts)
    assert asked.token_ids == PROMPTS
    assert engine.ask(prompts) is engine.ask(asked) is asked
    other = Engine(engine.model, copy.copy(engine.tokenizer))
    assert other.ask(asked) is not asked  # another model's tokens may mean something else
    assert other.ask(asked).token_ids == asked.token_ids
    assert (len(asked), asked.longest, asked.system, list(asked)) == (3, 13, "", list(prompts))
    assert engine.ask(prompts_of(*PROMPTS[:2])).sha256 != asked.sha256
    assert engine.ask(prompts_of([1] * 128)).longest == 128
    with pytest.raises(InputError, match="129 tokens; the model's context is 128"):
        engine.ask(prompts_of([1] * 129))

"""The engine against its slow twin, on small random models of every way of attending."""

from __future__ import annotations

import threading

import pytest
import torch
from oracle import Oracle
from tiny_models import CONFIGS, END, PLAIN, VOCABULARY, engine_of, model_of, prompts_of, tokenizer
from transformers import AutoModelForCausalLM, BloomConfig, StaticCache

from safetyheads import Ablation, Engine, Head, InputError, SafetyheadsError, ships
from safetyheads.ablation import ABLATION_KINDS, SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.errors import UnsupportedModelError
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.ships import generalized_ships
from safetyheads.model.architecture import Capabilities
from safetyheads.model.loading import use_our_attention
from safetyheads.model.planning import Plan, TokenSequence

# Two float32 sums of a few dozen terms in another order; measured: 2e-6 on states of size 5. A wrong head, mask
# or position is off by 0.1 and more.
FLOAT32 = 1e-5
# bfloat16 keeps 8 bits, and three layers of residual sums lose some: measured 0.025 of the largest state.
BFLOAT16 = 5e-2

# Of unequal lengths, longer than every window, the first three with a common beginning.
PROMPTS = (
    (5, 9, 12, 40, 41, 8, 3, 22, 17, 30, 2),
    (5, 9, 12, 40, 41, 8, 3, 60, 11),
    (5, 9, 12, 40, 7, 7, 19, 33, 50, 21, 44, 10, 6),
)
APART = ((1, 2, 3, 4, 5, 6, 7, 8), (20, 21, 22))
GROUPS = (
    (Head(0, 0),),
    (Head(0, 2), Head(0, 3)),  # share a key and value head where there are two
    (Head(1, 1),),
    (Head(0, 1), Head(1, 3), Head(2, 2)),
    (Head(2, 0),),
)
ALL_KINDS = [Ablation(name, 0.01) for name in ABLATION_KINDS]
"""At an epsilon large enough that a forgotten factor would show."""


def sequences_of(prompts):
    return [TokenSequence(ids) for ids in prompts]


def hidden_of(engine, prompts, groups, ablation, rows, common=()):
    """The engine's states of each group, batched by first layer, over prompts laid out as ``rows``."""
    layout = Plan(rows, 4, 1)
    found = {}
    for batch in engine.batches(groups, layout):
        captures = engine.captured(sequences_of(prompts), common, ablation, layout, batch.start)
        hidden = engine.replayed(captures, [groups[i] for i in batch.indices], ablation, batch.start)
        found |= dict(zip(batch.indices, hidden, strict=True))
    return torch.stack([found[index] for index in range(len(groups))])


def relative(ours, reference):
    return float((ours.float() - reference).abs().max() / reference.abs().max())


@pytest.fixture(scope="module")
def oracles():
    return {family: Oracle(model_of(family)) for family in CONFIGS}


# The proofs at load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*PLAIN, "gpt_oss_sinks"])
def test_every_claim_holds_and_leaves_all_quick_paths(family, dtype):
    engine = Engine(model_of(family, dtype), tokenizer())
    report = engine.check()
    assert report.passed, [proof for proof in report.proofs if not proof.passed]
    assert engine.capabilities == Capabilities(packs=True, replays=True, prunes=True, plain_head=True)
    (evenness,) = [proof.name for proof in report.proofs if "is uniform" in proof.name]
    assert ("beside a sink's share" in evenness) == (family not in PLAIN)


def test_a_softcap_on_the_logits_costs_the_plain_head_alone():
    engine = Engine(model_of("gemma2_softcap"), tokenizer())
    report = engine.check()
    assert [proof.name for proof in report.proofs if not proof.passed] == ["logits are the head of the normed state"]
    assert engine.capabilities == Capabilities(plain_head=False)
    assert len(engine.notes) == 1


def test_a_wrong_attention_is_refused_by_name(monkeypatch):
    from safetyheads.model import attention

    monkeypatch.setattr(attention, "_causal", lambda query, key: torch.ones(1, 1, query.shape[2], key.shape[2]).bool())
    monkeypatch.setattr(attention, "safetyheads_mask", lambda *_, **__: torch.ones(1, 1, 1, 1).bool())
    with pytest.raises(UnsupportedModelError, match="llama: refused, because our attention equals"):
        Engine(model_of("llama_gqa"), tokenizer()).check()
    monkeypatch.undo()
    attention.register()


def test_proofs_reach_beyond_the_window():
    from safetyheads.model.proofs import _probes

    engine = engine_of("mistral_window")
    assert all(len(probe.token_ids) > 5 for probe in _probes(engine, longest=64))
    assert engine.architecture.windows == (5,)


# Against the oracle


@pytest.mark.parametrize("ablation", ALL_KINDS, ids=lambda ablation: ablation.name)
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_replays_equal_the_oracle(family, ablation, oracles):
    engine = engine_of(family)
    ours = hidden_of(engine, PROMPTS, GROUPS, ablation, rows=((0, 1, 2),))
    reference = oracles[family].hidden(PROMPTS, GROUPS, ablation)
    assert relative(ours, reference) < FLOAT32
    unablated = oracles[family].hidden(PROMPTS, [()])
    changes = (reference - unablated).abs().amax(dim=(1, 2)) / reference.abs().max()
    assert float(changes.min()) > 100 * FLOAT32  # or the comparison could not fail


@pytest.mark.parametrize("rows", [((0, 1),), ((0,), (1,))], ids=["packed", "alone"])
@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window"])
def test_prompts_without_a_common_beginning_equal_the_oracle(family, rows, oracles):
    ours = hidden_of(engine_of(family), APART, GROUPS, UNDIFFERENTIATED_ATTENTION, rows)
    assert relative(ours, oracles[family].hidden(APART, GROUPS, UNDIFFERENTIATED_ATTENTION)) < FLOAT32


@pytest.mark.parametrize("family", ["llama_gqa", "gemma2_softcap"])
@pytest.mark.parametrize("slow", ["packs", "segments", "replays", "prunes", "starts_late"])
def test_each_slow_path_equals_the_oracle(family, slow, oracles):
    engine = engine_of(family)
    engine.capabilities = Capabilities(**{slow: False})
    rows = ((0,), (1,), (2,)) if slow == "packs" else ((0, 1, 2),)
    ours = hidden_of(engine, PROMPTS, GROUPS, UNDIFFERENTIATED_ATTENTION, rows)
    assert relative(ours, oracles[family].hidden(PROMPTS, GROUPS, UNDIFFERENTIATED_ATTENTION)) < FLOAT32


def test_the_ablated_layer_starts_from_its_heads_and_the_last_asks_only_wanted_tokens():
    """The two savings are taken: queries are projected once a row and never for tokens that nobody asks for."""
    engine, asked = engine_of("llama_gqa"), []
    attentions = engine.architecture.attentions
    for layer, attention in enumerate(attentions):
        attention.q_proj.register_forward_hook(lambda _, __, out, at=layer: asked.append((at, out)))
    groups, layout = [(Head(0, 0),), (Head(0, 1),), (Head(0, 2),)], Plan(((0, 1, 2),), 4, 1)
    captures = engine.captured(sequences_of(PROMPTS), (), UNDIFFERENTIATED_ATTENTION, layout, 0)
    n_tokens = captures[0].row.n_tokens
    asked.clear()
    engine.replayed(captures, groups, UNDIFFERENTIATED_ATTENTION, 0)
    # What stands in for the last layer's queries is one token's, seen many times. The first layer's two rows are the
    # unablated one and one with all heads ablated, for however many groups.
    projected = [(layer, out.shape[:2]) for layer, out in asked if any(out.stride()[:-1])]
    assert projected == [(0, (2, n_tokens)), (1, (3, n_tokens)), (2, (3, len(PROMPTS)))]
    assert all("forward" not in module.__dict__ for module in engine.model.modules())


def test_a_forward_that_stood_on_the_module_is_put_back():
    from safetyheads.model.replay import instead

    engine = engine_of("llama_gqa")
    module = engine.architecture.attentions[0]
    module.forward = stood = module.forward
    with pytest.raises(KeyError), instead(module, lambda: None):
        raise KeyError
    assert module.__dict__["forward"] is stood


@pytest.mark.parametrize("name", ABLATION_KINDS)
def test_heads_common_to_all_groups_are_captured_once_and_equal_the_oracle(name, oracles):
    ablation, common = Ablation(name, 0.01), (Head(0, 1), Head(1, 0))
    groups = [(*common, Head(1, 2)), (*common, Head(2, 3)), (*common, Head(0, 0))]
    engine = engine_of("llama_gqa")
    assert [batch.start for batch in engine.batches(groups, Plan(((0, 1, 2),), 4, 1))] == [0, 1, 2]
    ours = hidden_of(engine, PROMPTS, groups, ablation, ((0, 1, 2),), common)
    assert relative(ours, oracles["llama_gqa"].hidden(PROMPTS, groups, ablation)) < FLOAT32


@pytest.mark.parametrize("family", ["llama_mha", "llama_gqa", "mistral_window", "qwen3_norm"])
def test_in_bfloat16_the_oracle_is_met_within_its_precision(family, oracles):
    engine = engine_of(family, torch.bfloat16)
    reference = Oracle(model_of(family, torch.bfloat16)).hidden(PROMPTS, GROUPS, UNDIFFERENTIATED_ATTENTION)
    ours = hidden_of(engine, PROMPTS, GROUPS, UNDIFFERENTIATED_ATTENTION, ((0, 1, 2),))
    assert relative(ours, reference) < BFLOAT16


@pytest.mark.parametrize("name", ["undifferentiated_attention", "undifferentiated_attention_key"])
@pytest.mark.parametrize("family", PLAIN)
def test_epsilon_0_is_exactly_even_attention(family, name, oracles):
    ours = hidden_of(engine_of(family), PROMPTS, GROUPS, Ablation(name, 0.0), ((0, 1, 2),))
    even = oracles[family].hidden(PROMPTS, GROUPS, UNDIFFERENTIATED_ATTENTION, uniform=True)
    assert relative(ours, even) < FLOAT32


@pytest.mark.parametrize("name", ["undifferentiated_attention", "scaling_contribution"])
def test_the_papers_epsilon_is_the_limit_within_a_thousandth(name):
    engine = engine_of("llama_gqa")
    small, zero = (hidden_of(engine, PROMPTS, GROUPS, Ablation(name, epsilon), ((0, 1, 2),)) for epsilon in (1e-5, 0.0))
    # Scores of size up to 100 times 1e-5: a thousandth at most.
    assert relative(small, zero) < 1e-3


@pytest.mark.parametrize(
    "name", ["undifferentiated_attention", "undifferentiated_attention_key", "scaling_contribution"]
)
def test_epsilon_1_changes_nothing(name, oracles):
    ours = hidden_of(engine_of("llama_gqa"), PROMPTS, GROUPS, Ablation(name, 1.0), ((0, 1, 2),))
    unablated = oracles["llama_gqa"].hidden(PROMPTS, [()]).expand_as(ours)
    assert relative(ours, unablated) < FLOAT32


@pytest.mark.parametrize("family", ["llama_gqa", "gemma2_softcap", "gpt_oss_sinks"])
def test_ships_equal_the_oracles(family, oracles):
    engine = Engine(model_of(family), tokenizer())
    engine.check()
    ours = ships(engine, prompts_of(*PROMPTS[:2]), UNDIFFERENTIATED_ATTENTION)
    assert ours.values.shape == (2, 3, 4)
    for head in (Head(0, 1), Head(1, 2), Head(2, 3)):
        for number, ids in enumerate(PROMPTS[:2]):
            slow = oracles[family].ships(ids, (head,), UNDIFFERENTIATED_ATTENTION)
            # Logits of float32 differ by 2e-6, and KL is of second order in that.
            assert float(ours.values[number, head.layer, head.index]) == pytest.approx(slow, abs=1e-6, rel=1e-5)


def test_logits_equal_the_models_own_with_and_without_a_softcap(oracles):
    for family in ("llama_gqa", "gemma2_softcap"):
        engine = Engine(model_of(family), tokenizer())
        engine.check()
        seen = [oracles[family].run(ids) for ids in PROMPTS]
        ours = engine.logits(torch.stack([one.last_hidden for one in seen]))
        assert relative(ours, torch.stack([one.logits for one in seen])) < FLOAT32


# One head and no other


@pytest.mark.parametrize("ablation", ALL_KINDS, ids=lambda ablation: ablation.name)
@pytest.mark.parametrize("family", ["llama_mha", "llama_gqa", "mistral_window"])
def test_an_ablated_head_leaves_the_other_heads_outputs_alone(family, ablation):
    engine = engine_of(family)
    seen = []
    engine.architecture.attentions[1].o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ids = torch.tensor([PROMPTS[0]])
    for group in ((), (Head(1, 2),)):
        with torch.no_grad(), engine.ablated(group, ablation) as model:
            model(input_ids=ids)
    plain, ablated = (one.view(*ids.shape, 4, -1) for one in seen)
    others = [0, 1, 3]
    # Expanding keys for mean_key changes the kernel's shapes, hence not bitwise.
    assert torch.allclose(plain[:, :, others], ablated[:, :, others], atol=1e-6, rtol=0)
    assert float((plain[:, :, 2] - ablated[:, :, 2]).abs().max()) > 1e-2


# The layout does not matter


def test_scores_do_not_depend_on_the_token_budget():
    tables, layouts = [], set()
    for budget in (13, 60, 4096):
        engine = engine_of("llama_gqa", token_budget=budget)
        layout = engine.plan(sequences_of(PROMPTS))
        layouts.add((layout.rows, layout.groups_per_batch))
        tables.append(ships(engine, prompts_of(*PROMPTS), UNDIFFERENTIATED_ATTENTION).values)
    assert len(layouts) > 1
    assert float(tables[0].max()) > 1e-2
    for table in tables[1:]:
        # Batch shapes move logits in the last bits.
        assert float((table - tables[0]).abs().max()) < 1e-6


def test_a_batch_that_runs_out_of_memory_is_halved_and_nothing_is_lost(monkeypatch):
    engine = engine_of("llama_gqa")
    measuring = HeadPass(
        engine, sequences_of(PROMPTS), UNDIFFERENTIATED_ATTENTION, Readouts(ships=True), Plan(((0, 1, 2),), 4, 1)
    )
    groups = [(head,) for head in engine.heads]
    whole = measuring.measure(groups)["ships"]
    plain, sizes, done = engine.replayed, [], []

    def replayed(captures, chosen, ablation, start):
        sizes.append(len(chosen))
        if len(chosen) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(captures, chosen, ablation, start)

    monkeypatch.setattr(engine, "replayed", replayed)
    halved = measuring.measure(groups, on_groups=done.append)["ships"]
    assert max(sizes) == 4
    assert done == [2] * 6
    assert float((halved - whole).abs().max()) < 1e-6  # batch shapes


def test_running_out_of_memory_on_one_group_is_an_error(monkeypatch):
    engine = engine_of("llama_gqa")
    measuring = HeadPass(engine, sequences_of(PROMPTS), UNDIFFERENTIATED_ATTENTION, Readouts(ships=True))

    def replayed(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "replayed", replayed)
    with pytest.raises(torch.OutOfMemoryError):
        measuring.measure([(head,) for head in engine.heads])


def test_another_error_is_not_taken_for_lack_of_memory(monkeypatch):
    engine = engine_of("llama_gqa")
    measuring = HeadPass(engine, sequences_of(PROMPTS), UNDIFFERENTIATED_ATTENTION, Readouts(ships=True))
    attempts = []

    def replayed(_, chosen, *__):
        attempts.append(len(chosen))
        raise RuntimeError("something else")

    monkeypatch.setattr(engine, "replayed", replayed)
    with pytest.raises(RuntimeError, match="something else"):
        measuring.measure([(head,) for head in engine.heads])
    assert attempts == [4]


def test_a_capture_is_not_changed_by_replays():
    engine = engine_of("gemma2_softcap")
    layout = Plan(((0, 1, 2),), 4, 1)
    captures = engine.captured(sequences_of(PROMPTS), (), UNDIFFERENTIATED_ATTENTION, layout)
    first = engine.replayed(captures, [()], UNDIFFERENTIATED_ATTENTION, 0)
    engine.replayed(captures, [(Head(0, 0),)], UNDIFFERENTIATED_ATTENTION, 0)
    assert torch.equal(engine.replayed(captures, [()], UNDIFFERENTIATED_ATTENTION, 0), first)


def test_more_wanted_tokens_are_the_states_of_the_last_tokens(oracles):
    engine = engine_of("llama_gqa")
    sequences = [TokenSequence(PROMPTS[0], n_wanted=3), TokenSequence(PROMPTS[2])]
    layout = Plan(((0, 1),), 4, 1)
    captures = engine.captured(sequences, (), UNDIFFERENTIATED_ATTENTION, layout)
    ours = engine.replayed(captures, [(Head(0, 1),)], UNDIFFERENTIATED_ATTENTION, 0)
    prompts = [PROMPTS[0][:-2], PROMPTS[0][:-1], PROMPTS[0], PROMPTS[2]]
    assert relative(ours, oracles["llama_gqa"].hidden(prompts, [(Head(0, 1),)], UNDIFFERENTIATED_ATTENTION)) < FLOAT32


# The context manager


GROUP = (Head(0, 1), Head(2, 2))


def continuation(oracle, ids, group, ablation, n):
    made = list(ids)
    for _ in range(n):
        made.append(int(oracle.run(made, group, ablation).logits.argmax()))
        if made[-1] == END:
            break
    return made[len(ids) :]


def test_the_model_is_restored_to_the_bit():
    engine = engine_of("llama_gqa")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = engine.model(input_ids=ids).logits
        with engine.ablated(GROUP, SCALING_CONTRIBUTION) as model:
            assert model is engine.model
            inside = model(input_ids=ids).logits
        after = engine.model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)
    assert not any(attention._forward_pre_hooks for attention in engine.architecture.attentions)


def test_the_model_is_restored_after_an_error():
    engine = engine_of("llama_gqa")
    with pytest.raises(KeyError), engine.ablated(GROUP, SCALING_CONTRIBUTION):
        raise KeyError
    assert not any(attention._forward_pre_hooks for attention in engine.architecture.attentions)
    with engine.ablated(GROUP, SCALING_CONTRIBUTION):
        pass


def test_the_empty_group_is_the_unablated_model():
    engine = engine_of("llama_gqa")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        plain = engine.model(input_ids=ids).logits
        with engine.ablated((), UNDIFFERENTIATED_ATTENTION) as model:
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_nesting_raises_and_leaves_the_outer_ablation_in_force():
    engine = engine_of("llama_gqa")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), engine.ablated(GROUP, SCALING_CONTRIBUTION) as model:
        outer = model(input_ids=ids).logits
        with pytest.raises(SafetyheadsError, match="do not nest"), engine.ablated((), SCALING_CONTRIBUTION):
            pass
        with pytest.raises(SafetyheadsError, match="do not nest"):
            ships(engine, prompts_of(PROMPTS[0]), SCALING_CONTRIBUTION)
        assert torch.equal(model(input_ids=ids).logits, outer)
    assert not torch.equal(engine.model(input_ids=ids).logits, outer)


def test_another_thread_sees_the_ablation():
    engine = engine_of("llama_gqa")
    ids, seen = torch.tensor([PROMPTS[0]]), []

    def use():
        with torch.no_grad():
            seen.append(engine.model(input_ids=ids).logits)

    with torch.no_grad(), engine.ablated(GROUP, SCALING_CONTRIBUTION) as model:
        here = model(input_ids=ids).logits
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert torch.equal(seen[0], here)
    assert not torch.equal(engine.model(input_ids=ids).logits, here)


@pytest.mark.parametrize("head", [Head(3, 0), Head(0, 4)], ids=str)
def test_a_head_that_the_model_does_not_have_is_an_input_error(head):
    engine = engine_of("llama_gqa")
    with pytest.raises(InputError, match="out of range"), engine.ablated((head,), SCALING_CONTRIBUTION):
        pass
    with pytest.raises(InputError, match="given twice"), engine.ablated((Head(0, 0),) * 2, SCALING_CONTRIBUTION):
        pass


@pytest.mark.parametrize("name", ["undifferentiated_attention", "undifferentiated_attention_key", "mean_key"])
@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window"])
def test_generate_with_a_dynamic_cache_and_left_padding_follows_the_oracle(family, name, oracles):
    engine, ablation = engine_of(family), Ablation(name, 0.01)
    prompts = (PROMPTS[0], PROMPTS[1][:6])
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with engine.ablated(GROUP, ablation) as model:
        made = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, prompt in zip(made[:, longest:].tolist(), prompts, strict=True):
        expected = continuation(oracles[family], prompt, GROUP, ablation, 6)
        assert row[: len(expected)] == expected


@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window"])
def test_right_padding_does_not_reach_the_tokens_before_it(family, oracles):
    engine = engine_of(family)
    prompt, padding = PROMPTS[1], (0, 0, 0)
    ids = torch.tensor([prompt + padding])
    mask = torch.tensor([[1] * len(prompt) + [0] * len(padding)])
    with torch.no_grad(), engine.ablated(GROUP, UNDIFFERENTIATED_ATTENTION) as model:
        logits = model(input_ids=ids, attention_mask=mask).logits[0, len(prompt) - 1]
    assert relative(logits, oracles[family].run(prompt, GROUP, UNDIFFERENTIATED_ATTENTION).logits) < FLOAT32


@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window"])
def test_without_a_mask_and_with_a_cache_in_pieces_the_ablation_is_the_same(family, oracles):
    engine, ids = engine_of(family), torch.tensor([PROMPTS[2]])
    reference = oracles[family].run(PROMPTS[2], GROUP, UNDIFFERENTIATED_ATTENTION).logits
    with torch.no_grad(), engine.ablated(GROUP, UNDIFFERENTIATED_ATTENTION) as model:
        whole = model(input_ids=ids).logits[0, -1]
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        for piece in (ids[:, 4:9], ids[:, 9:12], ids[:, 12:]):
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
    assert relative(whole, reference) < FLOAT32
    assert relative(output.logits[0, -1], reference) < FLOAT32


@pytest.mark.parametrize("family", ["llama_gqa", "mistral_window"])
def test_generate_with_a_static_cache_follows_the_oracle(family, oracles):
    engine, ids = engine_of(family), torch.tensor([PROMPTS[0]])
    cache = StaticCache(config=engine.model.config, max_cache_len=32)
    with engine.ablated(GROUP, UNDIFFERENTIATED_ATTENTION) as model:
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            past_key_values=cache,
            pad_token_id=0,
            disable_compile=True,
        )
    expected = continuation(oracles[family], PROMPTS[0], GROUP, UNDIFFERENTIATED_ATTENTION, 6)
    assert made[0, ids.shape[1] :].tolist()[: len(expected)] == expected


def test_rows_carry_their_own_groups(oracles):
    engine = engine_of("llama_gqa")
    groups = [(), (Head(0, 1),), GROUP]
    ids = torch.tensor([PROMPTS[0]] * 3)
    with torch.no_grad(), engine.ablated_rows(groups, UNDIFFERENTIATED_ATTENTION) as model:
        logits = model(input_ids=ids).logits[:, -1]
    for row, group in zip(logits, groups, strict=True):
        reference = oracles["llama_gqa"].run(PROMPTS[0], group, UNDIFFERENTIATED_ATTENTION).logits
        assert relative(row, reference) < FLOAT32


# What cannot be done


def test_a_family_without_the_registry_is_refused_by_name(tmp_path):
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"bloom.*attention registry"):
        Engine.load(str(tmp_path))


def test_a_loaded_checkpoint_is_proved_and_named(tmp_path):
    model_of("llama_gqa").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    engine = Engine.load(str(tmp_path))
    assert (engine.n_layers, engine.n_heads, len(engine.heads)) == (3, 4, 12)
    assert engine.capabilities == Capabilities()
    assert engine.name == str(tmp_path)


def test_nan_weights_are_refused_by_name(tmp_path):
    model = model_of("llama_gqa")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj.*NaN"):
        Engine.load(str(tmp_path))


def test_a_prompt_beyond_the_context_is_an_input_error():
    engine = engine_of("llama_gqa")
    with pytest.raises(InputError, match="129 tokens; the model's context is 128"):
        engine.ask(prompts_of([1] * 129))
    assert len(engine.ask(prompts_of([1] * 128)).token_ids[0]) == 128


def test_generalized_ships_of_the_engine_equal_the_oracles_angles(oracles):
    engine = engine_of("llama_gqa")
    use_our_attention(engine.model)
    groups = [(Head(0, 1),), GROUP]
    ours = generalized_ships(engine, prompts_of(*PROMPTS), UNDIFFERENTIATED_ATTENTION)(groups)
    oracle = oracles["llama_gqa"]
    norm = oracle.model.get_decoder().norm
    with torch.no_grad():
        states = norm(oracle.hidden(PROMPTS, [(), *groups], UNDIFFERENTIATED_ATTENTION)).double()
    left = [torch.linalg.svd(one).U[:, 0] for one in states]
    for angle, direction in zip(ours, left[1:], strict=True):
        cosine = float((left[0] @ direction).abs())
        assert cosine < 1 - 1e-8  # the arccosine can be used
        assert float(angle) == pytest.approx(float(torch.rad2deg(torch.arccos(torch.tensor(cosine)))), abs=1e-3)

"""Captures and replays against the slow twin, one quick path left out at a time; test_families.py has every family."""

import copy

import pytest
import torch
from families import built, proved
from family_twins import PROMPTS, engine_by, groups_of, relative, slow_states, states
from oracle import Oracle
from tiny_models import engine_of, known, tokenizer

from safetyheads import Ablation, Engine, Head
from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.model.loading import use_our_attention
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import Plan

# Two float32 sums of a few dozen terms in another order; measured: 2e-6 on states of size 5. A wrong head, mask
# or position is off by 0.1 and more.
FLOAT32 = 1e-5
# bfloat16 keeps 8 bits, and three layers of residual sums lose some: measured 0.025 of the largest state.
BFLOAT16 = 5e-2

ALL_ROWS = ((0, 1),)
SEQUENCES = [TokenSequence(ids) for ids in PROMPTS]


@pytest.mark.parametrize("slow", ["packs", "segments", "replays", "prunes", "starts_late"])
def test_each_slow_path_equals_the_oracle(slow):
    engine, groups = engine_by("gemma2", **{slow: False}), groups_of("gemma2")
    reference = slow_states("gemma2", groups, UNDIFFERENTIATED_ATTENTION)
    assert relative(states(engine, groups, UNDIFFERENTIATED_ATTENTION), reference) < FLOAT32


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_prompts_without_a_common_beginning_and_bfloat16_meet_the_oracle(name):
    groups, apart = groups_of(name), ((1, 2, 3, 4, 5, 6, 7, 8), (20, 21, 22))
    reference = slow_states(name, groups, UNDIFFERENTIATED_ATTENTION, apart)
    assert relative(states(proved(name), groups, UNDIFFERENTIATED_ATTENTION, apart), reference) < FLOAT32
    model = copy.deepcopy(built(name)).bfloat16()
    slow = Oracle(model).hidden(PROMPTS, groups, UNDIFFERENTIATED_ATTENTION)
    use_our_attention(model)
    ours = states(Engine(model, tokenizer()), groups, UNDIFFERENTIATED_ATTENTION)
    assert relative(ours.float(), slow) < BFLOAT16


@pytest.mark.parametrize("kind", ["undifferentiated_attention", "undifferentiated_attention_key"])
def test_epsilon_0_is_exactly_even_attention_and_epsilon_1_changes_nothing(kind):
    groups = groups_of("mistral")
    even = slow_states("mistral", groups, UNDIFFERENTIATED_ATTENTION, uniform=True)
    for epsilon, expected in ((0.0, even), (1.0, slow_states("mistral", [()], None).expand_as(even))):
        assert relative(states(proved("mistral"), groups, Ablation(kind, epsilon)), expected) < FLOAT32


def test_the_ablated_layer_starts_from_its_heads_and_the_last_asks_only_wanted_tokens():
    """The two savings are taken: queries are projected once a row and never for tokens that nobody asks for."""
    engine, asked = engine_of("llama_gqa"), []
    for layer, attention in enumerate(engine.architecture.attentions):
        attention.q_proj.register_forward_hook(known(lambda _, __, out, at=layer: asked.append((at, out))))
    captures = engine.captured(SEQUENCES, (), UNDIFFERENTIATED_ATTENTION, Plan(ALL_ROWS, 4, 1), 0)
    n_tokens = captures[0].row.n_tokens
    asked.clear()
    engine.replayed(captures, [(Head(0, 0),), (Head(0, 1),), (Head(0, 2),)], UNDIFFERENTIATED_ATTENTION, 0)
    # What stands in for the last layer's queries is one token's, seen many times. The first layer's two rows are the
    # unablated one and one with all heads ablated, for however many groups.
    projected = [(layer, out.shape[:2]) for layer, out in asked if any(out.stride()[:-1])]
    assert projected == [(0, (2, n_tokens)), (1, (3, n_tokens)), (2, (3, len(PROMPTS)))]
    assert all("forward" not in module.__dict__ for module in engine.model.modules())


def test_more_wanted_tokens_are_the_states_of_the_last_tokens():
    engine, group = proved("llama3"), (Head(0, 1),)
    sequences = [TokenSequence(PROMPTS[0], n_wanted=3), TokenSequence(PROMPTS[1])]
    captures = engine.captured(sequences, (), UNDIFFERENTIATED_ATTENTION, Plan(ALL_ROWS, 4, 1))
    ours = engine.replayed(captures, [group], UNDIFFERENTIATED_ATTENTION, 0)
    prompts = [PROMPTS[0][:-2], PROMPTS[0][:-1], *PROMPTS]
    assert relative(ours, slow_states("llama3", [group], UNDIFFERENTIATED_ATTENTION, prompts)) < FLOAT32


# A batch that runs out of memory


def test_a_batch_that_runs_out_of_memory_is_halved_and_nothing_is_lost(monkeypatch):
    engine, done, sizes = engine_of("llama_gqa"), [], []
    groups, replayed = [(head,) for head in engine.heads], engine.replayed
    arguments = (engine, SEQUENCES, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True), Plan(ALL_ROWS, 4, 1))
    scored, whole = HeadPass(*arguments), HeadPass(*arguments).measure(groups)["ships"]

    def limited(captures, groups, ablation, start):
        sizes.append(len(groups))
        if len(groups) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return replayed(captures, groups, ablation, start)

    monkeypatch.setattr(engine, "replayed", limited)
    halved = scored.measure(groups, on_groups=done.append)["ships"]
    assert (max(sizes), done) == (4, [2] * 6)
    assert float((halved - whole).abs().max()) < 1e-6  # batch shapes

"""The estimate of memory against the live bytes that torch's profiler sees, and plans that keep to a budget."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from tiny_models import COMMON, build, tokenizer
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, GptOssConfig, LlamaConfig

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, Head, InputError
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.model.loading import use_our_attention
from safetyheads.model.planning import Plan, TokenSequence

# Wide enough that tensors and not bookkeeping are what is counted.
WIDE = {**COMMON, "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 8, "vocab_size": 500}
CONFIGS = {
    "mha": lambda: LlamaConfig(**WIDE, num_key_value_heads=8),
    "gqa": lambda: LlamaConfig(**WIDE, num_key_value_heads=2),
    "softcap": lambda: Gemma2Config(
        **WIDE, num_key_value_heads=4, head_dim=16, sliding_window=64, query_pre_attn_scalar=16
    ),
    "experts": lambda: GptOssConfig(
        **{**WIDE, "intermediate_size": 128}, num_key_value_heads=2, head_dim=16, sliding_window=64, num_local_experts=8
    ),
}
LAYOUTS = {
    "one row": (8, 24, 0, Plan((tuple(range(8)),), 8, 1)),
    "two rows behind a prefix": (8, 20, 60, Plan((tuple(range(4)), tuple(range(4, 8))), 8, 1)),
    "one row behind a long prefix": (4, 10, 150, Plan(((0, 1, 2, 3),), 8, 1)),
    "one head at a time": (4, 40, 0, Plan(((0, 1, 2, 3),), 1, 1)),
    "one prompt a row": (3, 70, 0, Plan(((0,), (1,), (2,)), 8, 1)),
}


def engine_of(name):
    model = build(CONFIGS[name]())
    use_our_attention(model)
    return Engine(model, tokenizer(), name=name)


def sequences_of(n, length, n_prefix):
    drawn = random.Random(0)
    prefix = tuple(drawn.randrange(9, 400) for _ in range(n_prefix))
    return [
        TokenSequence((*prefix, *(drawn.randrange(9, 400) for _ in range(length + number % 5)))) for number in range(n)
    ]


def peak(run):
    """Most bytes that were alive at once beyond those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def measured(engine, sequences, layout):
    groups = [(Head(layer, index),) for layer in (0, 2) for index in range(layout.groups_per_batch)]

    def run():
        HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True), layout).measure(groups)

    run()  # what is made once and stays is not the pass's
    return peak(run)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("arranged", LAYOUTS)
def test_the_estimate_is_within_30_percent_of_the_live_bytes(name, arranged):
    *asked, layout = LAYOUTS[arranged]
    engine, sequences = engine_of(name), sequences_of(*asked)
    assert engine.memory_estimate(sequences, layout) == pytest.approx(measured(engine, sequences, layout), rel=0.3)


@pytest.mark.parametrize("name", ["mha", "softcap"])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_pass_stays_within_any_budget(name, share):
    engine, sequences = engine_of(name), sequences_of(8, 24, 0)
    engine.memory_budget = int(share * engine.memory_estimate(sequences, engine.plan(sequences)))
    layout = engine.plan(sequences)
    assert measured(engine, sequences, layout) <= 1.1 * engine.memory_budget
    exact = HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True), layout)
    engine.memory_budget = None
    free = HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True))
    groups = [(Head(1, 3),), (Head(2, 0),)]
    assert torch.allclose(exact.measure(groups)["ships"], free.measure(groups)["ships"], rtol=1e-3, atol=1e-7)


def test_a_budget_that_nothing_fits_is_refused():
    engine = engine_of("mha")
    engine.memory_budget = 1000
    with pytest.raises(InputError, match=r"memory budget is 0\.00095 MiB"):
        engine.plan(sequences_of(2, 24, 0))

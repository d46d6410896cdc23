"""Counted costs against torch's own counter, which watches the operations as they run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import engine_of
from torch.utils.flop_counter import FlopCounterMode

from safetyheads import UNDIFFERENTIATED_ATTENTION, Head
from safetyheads.model.architecture import Capabilities
from safetyheads.model.planning import Plan, TokenSequence, layer_flops, pack, row_sizes
from safetyheads.model.replay import decode

PROMPTS = ((5, 9, 12, 40, 41, 8), (5, 9, 12, 7, 7, 19, 33, 50), (5, 9, 12, 1))
SEQUENCES = [TokenSequence(ids) for ids in PROMPTS]
LAYOUT = Plan(((0, 1), (2,)), 1, 1)


def weights_only(run):
    """Operations of products with weights: attention's own are counted over masked pairs too, so they stay out."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "mm" in str(operation) and "bmm" not in str(operation))


def without_pairs(rows):
    return [replace(row, n_pairs=0, n_wanted_pairs=0) for row in rows]


@pytest.mark.parametrize("family", ["llama_mha", "llama_gqa", "qwen3_norm"])
def test_a_forward_counts_what_runs(family):
    engine = engine_of(family)
    rows = [pack(SEQUENCES, members) for members in LAYOUT.rows]
    sizes = without_pairs(row_sizes(SEQUENCES, LAYOUT))
    assert [size.n_tokens for size in sizes] == [row.n_tokens for row in rows]

    def run():
        with torch.inference_mode():
            for row in rows:
                decode(engine.architecture, row, 1)

    assert engine.costs.forward_flops(sizes) == weights_only(run)


@pytest.mark.parametrize("quick", [Capabilities(), Capabilities(prunes=False), Capabilities(starts_late=False)])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_replay_counts_what_runs(start, quick):
    engine = engine_of("llama_gqa")
    engine.capabilities = quick
    captures = engine.captured(SEQUENCES, (), UNDIFFERENTIATED_ATTENTION, LAYOUT, start)
    sizes = without_pairs(row_sizes(SEQUENCES, LAYOUT))

    def run(n_rows):
        groups = [(Head(start, index),) for index in range(n_rows)]
        return weights_only(lambda: engine.replayed(captures, groups, UNDIFFERENTIATED_ATTENTION, start))

    run(1)  # the first ablated layer's heads are compared once for all batches
    # What all rows share falls out of the difference of two rows and one.
    useful = run(2) - run(1)
    if quick.prunes and not (start == 2 and quick.starts_late):
        # The last layer makes the wanted tokens' keys and values a second time, to throw them away.
        useful -= layer_flops(engine.architecture).key_value * len(PROMPTS)
    assert engine.costs.replay_flops(sizes, start) == useful
    assert engine.costs.scan_flops(sizes, [Head(start, 0), Head(start, 1)]) == 2 * useful


def test_pairs_are_those_that_a_causal_mask_allows_within_each_prompt():
    (first, second) = row_sizes(SEQUENCES, LAYOUT)
    # A shared prefix of 3: its own 6 pairs, then tokens 4-6 and 4-8 with all before them.
    assert first.n_pairs == 6 + (4 + 5 + 6) + (4 + 5 + 6 + 7 + 8)
    assert (second.n_pairs, first.n_wanted_pairs) == (1 + 2 + 3 + 4, 6 + 8)
    assert layer_flops(engine_of("llama_mha").architecture).pair == 4 * 32


def test_of_experts_only_the_active_share_counts():
    engine = engine_of("gpt_oss_sinks")
    assert engine.architecture.active_experts == 0.5
    dense = layer_flops(engine_of("llama_gqa").architecture)
    assert layer_flops(engine.architecture).mlp > dense.mlp

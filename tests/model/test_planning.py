"""Plans, by hand and by property; counted costs against torch's counter and profiler; halving where memory runs out."""

import errno
import itertools
import json
import random
from dataclasses import asdict
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import COMMON, build, engine_of, tokenizer
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, GptOssConfig, LlamaConfig

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, Head, InputError
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.model.architecture import Capabilities
from safetyheads.model.loading import use_our_attention
from safetyheads.model.packing import TokenSequence, pack, shared_prefix
from safetyheads.model.planning import Plan, halving, is_out_of_memory, lay_out, row_sizes
from safetyheads.model.replay import decode
from safetyheads.runs.stored_files import converted

# A slow machine is no failure, and examples are few because the whole unit suite runs before each change.
quick = settings(deadline=None, max_examples=50)


# By default a layer of width 64: 12 width**2 multiplications a token, 2 width a pair of tokens.
def costs(token=2 * 12 * 64**2, pair=4 * 64, n_heads=32, **quick):
    """What a plan asks of a model's costs."""
    return SimpleNamespace(
        token=token, pair=pair, quick=Capabilities(**quick), architecture=SimpleNamespace(n_heads=n_heads)
    )


def sequence(*token_ids, n_wanted=1):
    return TokenSequence(token_ids, n_wanted)


# Few distinct tokens, so that prefixes are shared; wanted tokens are never more than there are.
sequences = st.lists(
    st.lists(st.integers(1, 2), min_size=1, max_size=8).flatmap(
        lambda ids: st.integers(1, len(ids)).map(lambda n: TokenSequence(tuple(ids), n))
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize(
    ("given_sequences", "length"),
    [
        ([sequence(1, 2, 3), sequence(1, 2, 4)], 2),
        ([sequence(1, 2, 3), sequence(2, 2, 3)], 0),
        # Two equal ones keep their last token each, and a prompt that begins another keeps its own.
        ([sequence(1, 2, 3), sequence(1, 2, 3)], 2),
        ([sequence(1, 2), sequence(1, 2, 3, 4)], 1),
        ([sequence(1, 2, 3, 4, n_wanted=3), sequence(1, 2, 3, 4, 5)], 1),
        ([sequence(1), sequence(1, 2)], 0),
        ([sequence(1, 2, 3)], 2),
    ],
)
def test_the_shared_prefix_leaves_the_wanted_tokens_to_each(given_sequences, length):
    assert shared_prefix(given_sequences) == length


def test_a_packed_row_by_hand():
    row = pack([sequence(9), sequence(1, 2, 3), sequence(1, 2, 4, 5, n_wanted=2)], members=[1, 2])
    # [shared 1 2 | 3 | 4 5]
    tensors = (row.token_ids, row.packing.positions, row.packing.segments, row.wanted)
    assert [each.tolist() for each in tensors] == [[1, 2, 3, 4, 5], [0, 1, 2, 2, 3], [0, 0, 1, 2, 2], [2, 3, 4]]
    assert {each.dtype for each in tensors} == {torch.int64}
    assert (row.members, row.n_tokens) == ((1, 2), 5)


@quick
@given(sequences, st.randoms())
def test_every_sequence_can_be_read_back_from_its_row(chosen, draw):
    members = list(range(len(chosen)))
    draw.shuffle(members)
    row = pack(chosen, members)
    segments, positions = row.packing.segments, row.packing.positions
    wanted = iter(row.wanted.tolist())
    for number, member in enumerate(members, start=1):
        own = chosen[member]
        seen = (segments == 0) | (segments == number)
        assert tuple(row.token_ids[seen].tolist()) == own.token_ids
        assert positions[seen].tolist() == list(range(len(own.token_ids)))
        # A wanted token lies in the sequence's own segment, not in what it shares.
        for back in range(own.n_wanted, 0, -1):
            at = next(wanted)
            assert int(segments[at]) == number
            assert int(positions[at]) == len(own.token_ids) - back
    assert next(wanted, None) is None
    assert int((segments == 0).sum()) == (shared_prefix(chosen) if len(chosen) > 1 else 0)


@quick
@given(sequences, st.integers(1, 200), st.integers(1, 32), st.booleans())
def test_a_plan_holds_every_sequence_once_and_in_order_and_reads_back_from_json(chosen, budget, n_heads, packs):
    made = lay_out(chosen, costs(n_heads=n_heads, packs=packs), budget)
    assert [member for row in made.rows for member in row] == list(range(len(chosen)))
    assert all(made.rows)
    assert 1 <= made.groups_per_batch <= n_heads
    sizes = {len(row) for row in made.rows}
    assert max(sizes) - min(sizes) <= 1
    assert converted(json.loads(json.dumps(asdict(made))), Plan) == made


def batch_tokens(made, chosen):
    return made.groups_per_batch * max(pack(chosen, row).n_tokens for row in made.rows)


@quick
@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 10), st.integers(1, 5000), st.integers(1, 32))
def test_a_batch_of_equally_long_sequences_is_within_the_budget(n, prefix, rest, budget, n_heads):
    chosen = [sequence(*[0] * prefix, *[1 + at] * rest) for at in range(n)]
    # A sequence that does not fit by itself is run all the same.
    assert batch_tokens(lay_out(chosen, costs(n_heads=n_heads), budget), chosen) <= max(budget, prefix + rest)


@pytest.mark.parametrize("prefix", [0, 800], ids=["no prefix", "a long prefix"])
def test_masks_of_many_prompts_are_bounded_and_a_prefix_is_not_repeated_for_each(prefix):
    chosen = [sequence(*[0] * prefix, *[1 + at % 300] * 40) for at in range(1000)]
    made = lay_out(chosen, costs(), 4096)
    masks = sum(pack(chosen, row).n_tokens ** 2 for row in made.rows)
    # Least with as many own tokens in a row as the prefix has.
    least = 1000 * 40 * 4 * prefix
    assert masks <= 1.1 * max(1 << 25, least)
    assert max(map(len, made.rows)) >= 0.9 * prefix / 40 + 1


def on_small_device(fits, error):
    """A run over items on a device with memory for so many at once; what it tried, and what it did."""
    tried, done = [], []

    def run(items):
        tried.append(len(items))
        if len(items) > fits:
            raise error
        done.extend(items)
        return [10 * item for item in items]

    return run, tried, done


def test_what_torch_says_here_when_memory_runs_out_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize(("n", "fits"), [(1, 1), (2, 1), (7, 3), (33, 3), (33, 100)])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_where_memory_runs_out_every_item_is_done_once_and_in_order(n, fits, error):
    run, tried, done = on_small_device(fits, error)
    yielded = list(halving(range(n), run))
    assert done == [item for part, _ in yielded for item in part] == list(range(n))
    assert all(result == [10 * item for item in part] and len(part) <= fits for part, result in yielded)
    assert fits < n or tried == [n]
    # What was too much before is halved without another try.
    tried.clear()
    list(halving(range(n), lambda items: None if len(items) > fits else run(items)))
    assert max(tried) <= fits


@pytest.mark.parametrize(
    ("error", "fits", "tried"),
    [
        (RuntimeError("shapes differ"), 2, [8]),
        (ValueError("not enough memory"), 2, [8]),
        (torch.OutOfMemoryError("a single item does not fit"), 0, [8, 4, 2, 1]),
    ],
)
def test_other_errors_pass_and_nothing_is_tried_again(error, fits, tried):
    run, *found = on_small_device(fits, error)
    with pytest.raises(type(error)) as caught:
        list(halving(range(8), run))
    assert caught.value is error
    assert found == [tried, []]


# Operations, against torch's own counter

PROMPTS = ((5, 9, 12, 40, 41, 8), (5, 9, 12, 7, 7, 19, 33, 50), (5, 9, 12, 1))
SEQUENCES = [TokenSequence(ids) for ids in PROMPTS]
LAYOUT = Plan(((0, 1), (2,)), 1, 1)
SIZES = [size._replace(n_pairs=0, n_wanted_pairs=0) for size in row_sizes(SEQUENCES, LAYOUT)]


def weights_only(run):
    """Operations of products with weights: attention's own are counted over masked pairs too, so they stay out."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "mm" in str(operation) and "bmm" not in str(operation))


@pytest.mark.parametrize("family", ["llama_mha", "llama_gqa", "qwen3_norm"])
def test_a_forward_counts_what_runs(family):
    engine, rows = engine_of(family), [pack(SEQUENCES, members) for members in LAYOUT.rows]
    assert [size.n_tokens for size in row_sizes(SEQUENCES, LAYOUT)] == [row.n_tokens for row in rows]
    with torch.inference_mode():
        counted = weights_only(lambda: [decode(engine.architecture, row, 1) for row in rows])
    assert engine.costs.forward_flops(SIZES) == counted


@pytest.mark.parametrize("quick", [Capabilities(), Capabilities(prunes=False), Capabilities(starts_late=False)])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_replay_counts_what_runs(start, quick):
    engine = engine_of("llama_gqa", capabilities=quick)
    captures = engine.captured(SEQUENCES, (), UNDIFFERENTIATED_ATTENTION, LAYOUT, start)

    def run(n_rows):
        groups = [(Head(start, index),) for index in range(n_rows)]
        return weights_only(lambda: engine.replayed(captures, groups, UNDIFFERENTIATED_ATTENTION, start))

    run(1)  # the first ablated layer's heads are compared once for all batches
    # What all rows share falls out of the difference of two rows and one.
    useful = run(2) - run(1)
    if quick.prunes and not (start == 2 and quick.starts_late):
        # The last layer makes the wanted tokens' keys and values a second time, to throw them away.
        useful -= engine.costs.key_value * len(PROMPTS)
    assert engine.costs.replay_flops(SIZES, start) == useful
    assert engine.costs.scan_flops(SIZES, [Head(start, 0), Head(start, 1)]) == 2 * useful


def test_pairs_are_those_that_a_causal_mask_allows_within_each_prompt():
    (first, second) = row_sizes(SEQUENCES, LAYOUT)
    # A shared prefix of 3: its own 6 pairs, then tokens 4-6 and 4-8 with all before them.
    assert first.n_pairs == 6 + (4 + 5 + 6) + (4 + 5 + 6 + 7 + 8)
    assert (second.n_pairs, first.n_wanted_pairs) == (1 + 2 + 3 + 4, 6 + 8)
    assert engine_of("llama_mha").costs.pair == 4 * 32


def test_of_experts_only_the_active_share_counts():
    engine = engine_of("gpt_oss_sinks")
    assert engine.architecture.active_experts == 0.5
    # Gate, up and down of two experts; the router, and the biases of all four.
    assert engine.costs.mlp == 2 * (2 * 3 * 32 * 48 + 4 * 32 + 4 * (2 * 48 + 32))


# Memory, against the live bytes that torch's profiler sees

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


@cache
def wide(name, **options):
    model = build(CONFIGS[name]())
    use_our_attention(model)
    return Engine(model, tokenizer(), name=name, **options)


def sequences_of(n, length, n_prefix):
    drawn = random.Random(0)
    prefix = tuple(drawn.randrange(9, 400) for _ in range(n_prefix))
    rests = [[drawn.randrange(9, 400) for _ in range(length + number % 5)] for number in range(n)]
    return [TokenSequence((*prefix, *rest)) for rest in rests]


def measured(engine, sequences, layout):
    """Most bytes that were alive at once during a pass, beyond those alive before."""
    groups = [(Head(layer, index),) for layer in (0, 2) for index in range(layout.groups_per_batch)]

    def run():
        HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True), layout).measure(groups)

    run()  # what is made once and stays is not the pass's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("arranged", LAYOUTS)
def test_the_estimate_is_within_30_percent_of_the_live_bytes(name, arranged):
    *asked, layout = LAYOUTS[arranged]
    engine, sequences = wide(name), sequences_of(*asked)
    assert engine.memory_estimate(sequences, layout) == pytest.approx(measured(engine, sequences, layout), rel=0.3)


@pytest.mark.parametrize("name", ["mha", "softcap"])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_pass_stays_within_any_budget(name, share):
    free, sequences = wide(name), sequences_of(8, 24, 0)
    budget = int(share * free.memory_estimate(sequences, free.plan(sequences)))
    engine = wide(name, memory_budget=budget)
    layout = engine.plan(sequences)
    assert measured(engine, sequences, layout) <= 1.1 * budget
    groups, readouts = [(Head(1, 3),), (Head(2, 0),)], Readouts(ships=True)
    tight, loose = (HeadPass(each, sequences, UNDIFFERENTIATED_ATTENTION, readouts) for each in (engine, free))
    assert torch.allclose(tight.measure(groups)["ships"], loose.measure(groups)["ships"], rtol=1e-3, atol=1e-7)
    # And one that nothing fits is refused.
    with pytest.raises(InputError, match=r"memory budget is 0\.00095 MiB"):
        wide("mha", memory_budget=1000).plan(sequences_of(2, 24, 0))

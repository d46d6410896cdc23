import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.model.planning import (
    LayerFlops,
    Plan,
    TokenSequence,
    halving,
    is_out_of_memory,
    pack,
    plan,
    shared_prefix,
)

# A slow machine is no failure, and examples are few because the whole unit suite runs before each change.
quick = settings(deadline=None, max_examples=50)

# A layer of width 64: 12 width**2 multiplications a token, 2 width a pair of tokens.
COST = LayerFlops(query=0, key_value=0, output=0, mlp=2 * 12 * 64**2, pair=4 * 64)


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
    assert row.members == (1, 2)
    # [shared 1 2 | 3 | 4 5]
    assert row.token_ids.tolist() == [1, 2, 3, 4, 5]
    assert row.packing.positions.tolist() == [0, 1, 2, 2, 3]
    assert row.packing.segments.tolist() == [0, 0, 1, 2, 2]
    assert row.wanted.tolist() == [2, 3, 4]
    assert row.n_tokens == 5
    assert {t.dtype for t in (row.token_ids, row.packing.positions, row.packing.segments, row.wanted)} == {torch.int64}


def test_a_prompt_that_begins_another_keeps_its_last_token_apart():
    row = pack([sequence(1, 2), sequence(1, 2, 3)], members=[0, 1])
    assert row.token_ids.tolist() == [1, 2, 2, 3]
    assert row.packing.positions.tolist() == [0, 1, 1, 2]
    assert row.packing.segments.tolist() == [0, 1, 2, 2]
    assert row.wanted.tolist() == [1, 3]


def test_a_sequence_alone_has_no_prefix():
    row = pack([sequence(5, 6, 7, n_wanted=2)], members=[0])
    assert row.token_ids.tolist() == [5, 6, 7]
    assert row.packing.segments.tolist() == [1, 1, 1]
    assert row.wanted.tolist() == [1, 2]


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


def all_in_order(made, n):
    return [member for row in made.rows for member in row] == list(range(n)) and all(made.rows)


@quick
@given(sequences, st.integers(1, 200), st.integers(1, 32), st.booleans())
def test_a_plan_holds_every_sequence_once_and_in_order(chosen, budget, n_rows_useful, packs):
    made = plan(chosen, COST, budget, n_rows_useful, packs)
    assert all_in_order(made, len(chosen))
    assert 1 <= made.groups_per_batch <= n_rows_useful
    sizes = {len(row) for row in made.rows}
    assert max(sizes) - min(sizes) <= 1


def batch_tokens(made, chosen):
    return made.groups_per_batch * max(pack(chosen, row).n_tokens for row in made.rows)


@quick
@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 10), st.integers(1, 5000), st.integers(1, 32))
def test_a_batch_of_equally_long_sequences_is_within_the_budget(n, prefix, rest, budget, n_rows_useful):
    chosen = [sequence(*[0] * prefix, *[1 + at] * rest) for at in range(n)]
    made = plan(chosen, COST, budget, n_rows_useful)
    # A sequence that does not fit by itself is run all the same.
    assert batch_tokens(made, chosen) <= max(budget, prefix + rest)


def test_a_batch_of_unequally_long_sequences_is_within_the_budget():
    # The three long ones come first and may share a row: 320 tokens, where a row of average ones has 136.
    chosen = [sequence(*[0] * 20, *[1 + at] * rest) for at, rest in enumerate([100] * 3 + [2] * 5)]
    assert batch_tokens(plan(chosen, COST, 550, 32), chosen) <= 550


def test_packing_pays_where_much_is_shared_and_not_where_rows_grow_long():
    shared = [sequence(*[0] * 50, at) for at in range(1, 9)]
    assert len(plan(shared, COST, 4096, 32).rows) == 1
    apart = [sequence(*[at] * 500) for at in range(1, 9)]
    assert len(plan(apart, LayerFlops(0, 0, 0, mlp=1.0, pair=1.0), 4096, 32).rows) == 8


def test_without_packing_each_sequence_has_its_row():
    shared = [sequence(*[0] * 50, at) for at in range(1, 9)]
    made = plan(shared, COST, 4096, 32, packs=False)
    assert made.rows == tuple((at,) for at in range(8))
    assert made.groups_per_batch == 32
    assert plan(shared, COST, 51 * 5 + 50, 32, packs=False).groups_per_batch == 5


def test_a_plan_reads_back_from_json():
    made = plan([sequence(*[0] * 20, at) for at in range(1, 8)], COST, 60, 3)
    assert Plan.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    assert Plan.from_dict(made.as_dict()) == made


class Device:
    """Memory for so many items at once; keeps what was done."""

    def __init__(self, fits, error=None):
        self.fits, self.error = fits, error or torch.OutOfMemoryError("out of memory")
        self.done, self.tried = [], []

    def run(self, items):
        self.tried.append(len(items))
        if len(items) > self.fits:
            raise self.error
        self.done += items
        return [10 * item for item in items]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("fits", [1, 2, 3, 8, 100])
def test_where_memory_runs_out_every_item_is_done_once_and_in_order(n, fits):
    device, items = Device(fits), list(range(n))
    yielded = list(halving(items, device.run))
    assert device.done == items
    assert [item for part, _ in yielded for item in part] == items
    assert all(result == [10 * item for item in part] for part, result in yielded)
    assert all(len(part) <= fits for part, _ in yielded)


def test_what_fits_is_run_at_once():
    device = Device(fits=8)
    list(halving(range(8), device.run))
    assert device.tried == [8]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    ],
)
def test_every_kind_of_memory_error_halves(error):
    assert is_out_of_memory(error)
    device = Device(fits=2, error=error)
    list(halving(list(range(5)), device.run))
    assert device.done == list(range(5))


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("not enough memory"), KeyError("x")])
def test_other_errors_pass_and_nothing_is_tried_again(error):
    assert not is_out_of_memory(error)
    device = Device(fits=2, error=error)
    with pytest.raises(type(error)) as caught:
        list(halving(list(range(8)), device.run))
    assert caught.value is error
    assert device.tried == [8]


def test_a_single_item_that_does_not_fit_raises():
    device = Device(fits=0)
    with pytest.raises(torch.OutOfMemoryError):
        list(halving(list(range(4)), device.run))
    assert device.tried == [4, 2, 1]
    assert device.done == []

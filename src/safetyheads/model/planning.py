"""How work is laid out: prompts into packed rows, head groups into batches. Owns plans; runs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor

from safetyheads.model.packing import Packing, Segments

Item = TypeVar("Item")
Result = TypeVar("Result")

# Work that a pass through one layer costs whatever its size (launches, Python), as tokens' worth of that layer.
# Measured on two cores at widths 128 to 512: 20 to 60; the plan is flat around it.
_OVERHEAD_TOKENS = 48
# A CPU batch beyond this many tokens leaves the caches and gains nothing (bench/LOG.md, 2026-11-24).
_CPU_TOKENS = 4096
_CUDA_TOKENS = 65536
# The mask of a row has this number squared of entries.
_LONGEST_ROW = 4096
_MEMORY_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The tokens of one prompt, and how many of the last ones are looked at."""

    token_ids: tuple[int, ...]
    """The prompt, and after it any teacher-forced tokens of an answer."""
    n_wanted: int = 1
    """States of the last ``n_wanted`` tokens are wanted."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Several sequences in one row: [shared prefix | rest of the first | rest of the second | ...]."""

    members: tuple[int, ...]
    """Which sequences lie here."""
    token_ids: Tensor
    """int64 [n_tokens]."""
    packing: Packing
    """Positions and segments of the tokens."""
    segments: Segments
    """The same layout, for attention taken sequence by sequence."""
    wanted: Tensor
    """int64 [n_wanted]: the tokens whose last states are wanted, sequence by sequence."""

    @property
    def n_tokens(self) -> int:
        """Length of the row."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What a token costs in one layer, in floating-point operations."""

    per_token: float
    """Projections and MLP."""
    per_pair: float
    """Scores and weighted values, for each other token in the row."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The layout of a pass; kept in the manifest, since batch shapes move results in the last bits."""

    rows: tuple[tuple[int, ...], ...]
    """Sequences that share a packed row."""
    groups_per_batch: int
    """Head groups, that is batch rows, replayed together."""
    threads: int
    """CPU threads that the arithmetic ran on."""

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        return {**asdict(self), "rows": [list(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`as_dict` gave."""
        return cls(tuple(tuple(row) for row in stored["rows"]), stored["groups_per_batch"], stored["threads"])


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """Head groups that are replayed together."""

    indices: tuple[int, ...]
    """Which of the groups asked for."""
    start: int
    """The first layer that any of them changes."""


def shared_prefix(sequences: Sequence[TokenSequence]) -> int:
    """Tokens that all sequences begin with; at least one token, and all wanted ones, are left to each."""
    columns = zip(*(sequence.token_ids for sequence in sequences), strict=False)
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return max(0, min([same, *(len(s.token_ids) - s.n_wanted for s in sequences)]))


def prompt_of_wanted(sequences: Sequence[TokenSequence]) -> Tensor:
    """int64 [n_wanted of all]: the sequence of each wanted token."""
    counts = torch.tensor([sequence.n_wanted for sequence in sequences])
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def first_wanted(sequences: Sequence[TokenSequence]) -> Tensor:
    """int64 [n_sequences]: the first wanted token of each, a prompt's last, among the wanted tokens of all."""
    return torch.tensor([0, *[sequence.n_wanted for sequence in sequences[:-1]]]).cumsum(0)


def row_prefix(members: Sequence[TokenSequence]) -> int:
    """Tokens that a packed row of these sequences holds once; a sequence alone in its row shares nothing."""
    return shared_prefix(members) if len(members) > 1 else 0


def pack(
    sequences: Sequence[TokenSequence],
    members: Sequence[int],
    device: torch.device | str = "cpu",
    shares_prefix: bool = True,
) -> PackedRow:
    """Lay the ``members`` of ``sequences`` in one row, their common prefix once, or with each of them."""
    chosen = [sequences[member] for member in members]
    prefix = row_prefix(chosen) if shares_prefix else 0
    token_ids = list(chosen[0].token_ids[:prefix])
    positions, segments = list(range(prefix)), [0] * prefix
    wanted: list[int] = []
    for number, sequence in enumerate(chosen, start=1):
        rest = sequence.token_ids[prefix:]
        token_ids += rest
        positions += range(prefix, len(sequence.token_ids))
        segments += [number] * len(rest)
        wanted += range(len(token_ids) - sequence.n_wanted, len(token_ids))

    def tensor(values: list[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), torch.device(device))

    packing = Packing(tensor(positions), tensor(segments))
    return PackedRow(tuple(members), tensor(token_ids), packing, Segments.of(packing), tensor(wanted))


def plan(
    sequences: Sequence[TokenSequence],
    cost: LayerCost,
    token_budget: int,
    n_rows_useful: int,
    packs: bool = True,
    by_segment: bool = True,
) -> Plan:
    """Choose how many sequences share a row and how many groups share a batch.

    Args:
        sequences: what is to be run.
        cost: of one layer of the model.
        token_budget: most tokens in a batch (rows times row length).
        n_rows_useful: groups that can ever share a batch: the heads of a layer.
        packs: False lays every sequence in a row of its own.
        by_segment: whether tokens are compared within their sequence only, or with their whole row.
    """
    prefix = shared_prefix(sequences)
    rest = sum(len(sequence.token_ids) - prefix for sequence in sequences) / len(sequences)

    def cost_per_sequence(n: int) -> float:
        length = prefix + n * rest
        n_pairs = prefix**2 + n * rest * (prefix + rest) if by_segment else length**2
        n_rows = max(1, min(n_rows_useful, int(token_budget // length)))
        overhead = _OVERHEAD_TOKENS * cost.per_token / n_rows
        return (length * cost.per_token + n_pairs * cost.per_pair + overhead) / n

    longest = min(token_budget, _LONGEST_ROW)
    most = max(1, int((longest - prefix) // max(rest, 1))) if packs else 1
    n_per_row = min(range(1, min(most, len(sequences)) + 1), key=cost_per_sequence)
    n_rows = -(-len(sequences) // n_per_row)
    base, extra = divmod(len(sequences), n_rows)
    starts = [number * base + min(number, extra) for number in range(n_rows + 1)]
    rows = tuple(tuple(range(start, end)) for start, end in pairwise(starts))
    layout = Plan(rows, 1, torch.get_num_threads())
    groups = max(1, min(n_rows_useful, token_budget // longest_row(sequences, layout)))
    return replace(layout, groups_per_batch=groups)


def longest_row(sequences: Sequence[TokenSequence], layout: Plan) -> int:
    """Tokens of the longest packed row."""
    return max(_row_length([sequences[member] for member in row]) for row in layout.rows)


def _row_length(members: Sequence[TokenSequence]) -> int:
    """Tokens of a packed row, the common prefix counted once."""
    prefix = row_prefix(members)
    return prefix + sum(len(member.token_ids) - prefix for member in members)


def token_budget(device: torch.device, bytes_per_token: int, memory_budget: int | None = None) -> int:
    """Tokens that fit a batch: in the budget or half of the free memory, within what the device makes use of."""
    most = _CUDA_TOKENS if device.type == "cuda" else _CPU_TOKENS
    return max(1, min(most, allowed_memory(device, memory_budget, _MEMORY_SHARE) // bytes_per_token))


def allowed_memory(device: torch.device, memory_budget: int | None, share: float) -> int:
    """Bytes that batches may take: the budget where there is one, else a share of what is free now."""
    if memory_budget is not None:
        return memory_budget
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * share)
    import psutil

    return int(psutil.virtual_memory().available * share)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device, without the host waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the CPU's allocator, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def halving(items: Sequence[Item], run: Callable[[Sequence[Item]], Result]) -> Iterator[tuple[Sequence[Item], Result]]:
    """Run over all items at once; where memory runs out, over each half, and so on down to one.

    Yields:
        The items that ran together, with what ``run`` returned for them.
    """
    try:
        result = run(items)
    except (RuntimeError, MemoryError) as error:
        if len(items) < 2 or not is_out_of_memory(error):
            raise
    else:
        yield items, result
        return
    # Outside the handler: the traceback holds the frames, and so the tensors, of the failed attempt.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    yield from halving(items[:middle], run)
    yield from halving(items[middle:], run)

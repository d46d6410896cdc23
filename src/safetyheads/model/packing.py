"""Packs prompts into rows: their shared prefix once, then what is left of each; or pads them into a batch."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import NamedTuple, Self

import torch
from torch import Tensor


class TokenSequence(NamedTuple):
    """The tokens of one prompt, and how many of the last ones are read."""

    token_ids: tuple[int, ...]
    """The prompt, and after it any teacher-forced tokens of an answer."""
    n_wanted: int = 1
    """States of the last ``n_wanted`` tokens are read."""


class Packing(NamedTuple):
    """How prompts lie in one row: [shared prefix | rest of prompt 1 | rest of prompt 2 | ...]."""

    positions: Tensor
    """int64 [n_tokens]: the position of each token within its own prompt."""
    segments: Tensor
    """int64 [n_tokens]: 0 for the prefix, i for the rest of prompt i."""
    n_prefix: int
    """Tokens of the shared prefix, at the row's beginning."""
    tokens: Tensor
    """int64 [n_prompts, longest_rest]: the tokens of each rest; shorter ones end in repeats of their last token."""
    keys: Tensor
    """int64 [n_prompts, n_prefix + longest_rest]: the prefix's tokens, then ``tokens``: all that they may see."""
    real: Tensor
    """bool, same shape: which of the keys are no repeats."""
    places: Tensor
    """int64 [n_tokens - n_prefix]: where the row's tokens after the prefix stand in ``tokens``, flattened."""

    @classmethod
    def of(cls, positions: Tensor, segments: Tensor) -> Self:
        """The layout of a row, from the position and the segment of each token."""
        lengths = torch.bincount(segments)
        starts, rests = lengths.cumsum(0)[:-1, None], lengths[1:, None]
        offsets = torch.arange(int(rests.max()), device=segments.device)
        tokens, real = starts + torch.minimum(offsets, rests - 1), offsets < rests
        prefix = torch.arange(int(lengths[0]), device=segments.device).expand(len(tokens), -1)
        keys = torch.cat([prefix, tokens], dim=1)
        seen = torch.cat([torch.ones_like(prefix, dtype=torch.bool), real], dim=1)
        return cls(positions, segments, prefix.shape[1], tokens, keys, seen, real.flatten().nonzero()[:, 0])

    def cover(self, query: Tensor, mask: Tensor) -> bool:
        """Whether this call attends over the whole row, under one boolean mask for all rows and heads."""
        n_tokens = len(self.positions)
        return query.shape[2] == n_tokens and mask.dtype == torch.bool and mask.shape == (1, 1, n_tokens, n_tokens)


class PackedRow(NamedTuple):
    """Several sequences in one row: [shared prefix | rest of the first | rest of the second | ...]."""

    members: tuple[int, ...]
    """Indices of the sequences in this row."""
    token_ids: Tensor
    """int64 [n_tokens]."""
    packing: Packing
    """Where each prompt's tokens are."""
    wanted: Tensor
    """int64 [n_wanted]: the tokens whose last states are read, sequence by sequence."""

    @property
    def n_tokens(self) -> int:
        """Length of the row."""
        return len(self.token_ids)


def shared_prefix(sequences: Sequence[TokenSequence]) -> int:
    """Number of first tokens that all sequences share; each keeps at least one token, and all wanted ones, apart."""
    same = len(commonprefix([sequence.token_ids for sequence in sequences]))  # noqa: RUF071, these are no paths
    return max(0, min(same, *(len(sequence.token_ids) - sequence.n_wanted for sequence in sequences)))


def row_prefix(sequences: Sequence[TokenSequence]) -> int:
    """First tokens that a row of these sequences holds once: those they share, none of a sequence alone."""
    return shared_prefix(sequences) if len(sequences) > 1 else 0


def prompt_of_wanted(sequences: Sequence[TokenSequence]) -> Tensor:
    """int64 [n_wanted of all]: the sequence of each wanted token."""
    counts = torch.tensor([sequence.n_wanted for sequence in sequences])
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def first_wanted(sequences: Sequence[TokenSequence]) -> Tensor:
    """int64 [n_sequences]: the first wanted token of each, a prompt's last, among the wanted tokens of all."""
    return torch.tensor([0, *[sequence.n_wanted for sequence in sequences[:-1]]]).cumsum(0)


def pack(sequences: Sequence[TokenSequence], members: Sequence[int], device: torch.device | str = "cpu") -> PackedRow:
    """Lay the ``members`` of ``sequences`` in one row, their common prefix once."""
    chosen = [sequences[member] for member in members]
    prefix = row_prefix(chosen)
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

    return PackedRow(tuple(members), tensor(token_ids), Packing.of(tensor(positions), tensor(segments)), tensor(wanted))


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Rows of unequal length as one batch, padding first: what a model is called with, each int64 [n_rows, longest].

    The ``attention_mask`` is 1 where a token is real; ``position_ids`` are those within a token's own row.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device, without the host waiting for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

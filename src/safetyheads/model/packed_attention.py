"""Keeps prompts in one row apart: the mask of packed prompts, and attention prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask


@dataclass(frozen=True, slots=True)
class Packing:
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
    def of(cls, positions: Tensor, segments: Tensor) -> Packing:
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


# Lives for one forward of the engine's own, in its own thread; replays use the masks that were captured.
_packing: ContextVar[Packing | None] = ContextVar("safetyheads_packing", default=None)


@contextmanager
def packed(packing: Packing | None) -> Iterator[None]:
    """Within, masks of this thread's forwards follow the packing."""
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


def safetyheads_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    **keywords: Any,
) -> Tensor | None:
    """Transformers' boolean mask, of the family's own rule; over packed prompts the rule sees positions.

    A token sees what the family's rule (causal, window, chunk) allows at the two *positions*, in the prefix and in its
    own segment only.
    """
    packing = _packing.get()
    if packing is not None and mask_function is not None:
        positions, segments, family_rule = packing.positions, packing.segments, mask_function

        def mask_function(batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            same = (segments[kv_index] == 0) | (segments[kv_index] == segments[q_index])
            return same & family_rule(batch, head, positions[q_index], positions[kv_index])

    if (packing is not None and mask_function is not None) or 1 < q_length != kv_length:
        # The skipped mask would mean causal from the top left for a static cache, from the bottom right for others.
        keywords["allow_is_causal_skip"] = False
    if mask_function is not None:
        keywords["mask_function"] = mask_function
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **keywords)


def by_segment(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Any]],
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
) -> Tensor:
    """Attention of a packed row, prompt by prompt: what the mask forbids between prompts is never computed.

    ``attend`` takes query, key, value [rows, heads, n_tokens, d] and mask, and gives the heads' outputs [rows,
    n_tokens, n_heads, d_value] and anything; so does this, for the whole row, without the anything.
    """
    # In a model over several devices a layer need not be where the row is.
    tokens, keys, real, places = (
        part.to(query.device) for part in (packing.tokens, packing.keys, packing.real, packing.places)
    )
    n_rows, n_prefix, (n_prompts, longest) = len(query), packing.n_prefix, tokens.shape
    allowed = mask[0, 0][tokens[:, :, None], keys[:, None, :]] & real[:, None, :]

    def picked(tensor: Tensor, tokens: Tensor) -> Tensor:
        """[rows, heads, n_tokens, d] -> [rows * n_prompts, heads, tokens of a prompt, d]."""
        flat = tensor.transpose(1, 2).index_select(1, tokens.flatten())
        return flat.view(len(tensor) * n_prompts, tokens.shape[1], *flat.shape[2:]).transpose(1, 2)

    masks = allowed.repeat(n_rows, 1, 1)[:, None]
    rests, _ = attend(picked(query, tokens), picked(key, keys), picked(value, keys), masks)
    output = rests.reshape(n_rows, n_prompts * longest, *rests.shape[2:]).index_select(1, places)
    if not n_prefix:
        return output
    query, key, value = (tensor[:, :, :n_prefix] for tensor in (query, key, value))
    first, _ = attend(query, key, value, mask[:, :, :n_prefix, :n_prefix])
    return torch.cat([first, output], dim=1)

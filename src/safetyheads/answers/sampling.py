"""Chooses next tokens, greedily or by top-k sampling, and measures how narrowly each was chosen.

The largest logit after adding Gumbel noise is a draw from the softmax. The noise depends on (seed, prompt, position,
token) only, so equal distributions give equal tokens under every ablation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from safetyheads.errors import InputError

# Tokens below the top k that are examined: a small change of logits could bring one into the top k.
_OUTSIDE = 8


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, at temperature 1."""

    top_k: int = 1
    """1 is greedy; the paper samples with 5 and without top-p."""
    seed: int = 0
    """Determines the noise, with the prompt's tokens and the position; unused when greedy."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top-k keeps at least one token; got {self.top_k}")

    @property
    def name(self) -> str:
        """``greedy`` or ``top-5``."""
        return "greedy" if self.top_k == 1 else f"top-{self.top_k}"


GREEDY = Sampling()
"""Always the most probable token."""
TOP_5 = Sampling(top_k=5)
"""The paper's sampling (Sec 3.3)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Prompt and position of a token; determines the noise."""

    noise_key: int
    """The prompt's, from :func:`noise_key`."""
    position: int
    """Number of answer tokens before it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Next tokens, and the margins by which they were chosen."""

    tokens: Tensor
    """int64 [n]."""
    margins: Tensor
    """float64 [n], in logits: the token stays the same unless a difference of two logits changes by this much."""


def noise_key(token_ids: Sequence[int]) -> int:
    """A 64-bit hash of a prompt's tokens, the same in every file and batch."""
    return int.from_bytes(hashlib.sha256(str(tuple(token_ids)).encode()).digest()[:8], "big")


def choose(logits: Tensor, places: Sequence[Place | None], sampling: Sampling) -> Choice:
    """The next token of each row.

    Args:
        logits: [n, vocabulary], float32.
        places: one a row; None for a row whose token is not used.
        sampling: greedy or top-k.
    """
    if sampling.top_k == 1:
        leading = logits.topk(min(2, logits.shape[-1]), dim=-1).values.double()
        # argmax, not the first of topk: the two break ties differently, and plain greedy decoding takes argmax.
        return Choice(logits.argmax(dim=-1), leading[:, 0] - leading[:, -1])
    kept = min(sampling.top_k, logits.shape[-1])
    values, tokens = logits.topk(min(kept + _OUTSIDE, logits.shape[-1]), dim=-1)
    values = values.double()
    scores = values + _noise(tokens, places, sampling.seed, logits.shape[-1])
    best, at = scores[:, :kept].max(dim=-1)
    drawn = tokens.gather(1, at[:, None])[:, 0]
    return Choice(drawn, _margins(values, scores, best, at, kept, logits.shape[-1]))


def _margins(values: Tensor, scores: Tensor, best: Tensor, at: Tensor, kept: int, n_tokens: int) -> Tensor:
    """The smallest change that gives another draw; ``values`` and ``scores`` [n, kept + outside], best logits first."""
    inside = scores[:, :kept].topk(min(2, kept), dim=-1).values
    margins = inside[:, 0] - inside[:, -1] if kept > 1 else torch.full_like(best, torch.inf)
    if values.shape[1] == kept:
        return margins
    # The drawn token may drop out of the top k, or a token with more noise may enter it.
    falls_out = values.gather(1, at[:, None])[:, 0] - values[:, kept]
    gaps = values[:, kept - 1 : kept] - values[:, kept:]
    comes_in = torch.maximum(gaps, best[:, None] - scores[:, kept:]).amin(dim=-1)
    margins = torch.stack([margins, falls_out, comes_in]).amin(dim=0)
    # Tokens that were not examined are known only to lie below the last one.
    return margins if values.shape[1] == n_tokens else torch.minimum(margins, gaps[:, -1])


def _noise(tokens: Tensor, places: Sequence[Place | None], seed: int, vocabulary_size: int) -> Tensor:
    """Gumbel noise of tokens [n, n_tokens], float64; 0 in rows without a place."""
    on_cpu, noise = tokens.cpu().numpy(), np.zeros(tuple(tokens.shape))
    rows_of: dict[Place, list[int]] = {}
    for row, place in enumerate(places):
        if place is not None:
            rows_of.setdefault(place, []).append(row)
    for place, rows in rows_of.items():
        # As unsigned integers: Python integers would be converted to float64 and lose their last bits.
        key = np.array([seed % (1 << 64), place.noise_key], dtype=np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, 0, place.position)))
        noise[rows] = stream.gumbel(size=vocabulary_size)[on_cpu[rows]]
    return torch.from_numpy(noise).to(tokens.device)

"""What a mask allows each token to see, and what attention that is even over it gives. Knows no models."""

from __future__ import annotations

import torch
from torch import Tensor


def reached_tokens(mask: Tensor | None, n_tokens: int, device: torch.device) -> int:
    """Tokens from the first key that a token sees to the token itself, at most."""
    first = _allowed(mask, n_tokens, device).int().argmax(dim=-1)
    return int((torch.arange(n_tokens, device=device) - first).max()) + 1


def mean_over_allowed(value: Tensor, mask: Tensor | None, kv_head: int) -> Tensor:
    """The plain mean of one head's values [n_tokens, d_value] over the keys that the mask allows each token."""
    allowed = _allowed(mask, value.shape[1], value.device)
    weights = allowed.double() / allowed.sum(dim=-1, keepdim=True)
    return (weights @ value[kv_head].double()).to(value.dtype)


def nearest_share(output: Tensor, mean: Tensor) -> Tensor:
    """Of each token's mean [n_tokens, d_value] the part, from none to all of it, that comes nearest to the output."""
    output, wide = output.double(), mean.double()
    share = (output * wide).sum(-1, keepdim=True) / wide.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return (share.clamp(0, 1) * wide).to(mean.dtype)


def _allowed(mask: Tensor | None, n_tokens: int, device: torch.device) -> Tensor:
    """The keys that a mask allows each token, bool [n_tokens, n_tokens]."""
    if mask is None:
        return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()
    given = mask[0, 0]
    return given if given.dtype == torch.bool else given >= 0

"""Attention of one head on one prompt, as numbers (Fig 7, 8). Owns how weights are had of any family.

No family is known here. Attention is linear in its values, whatever a family does to scores (softcap, sinks, windows,
chosen keys): a second run of the layer with unit vectors in the values' place gives the weights themselves, from
the very function that the model attends by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.heads import Head
from safetyheads.model.attention import attention_calls

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

NOTHING = Ablation("undifferentiated_attention", 1.0)
"""Times one: the unablated model."""


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """What one head of one prompt attends to, and what it passes on."""

    weights: Tensor
    """float64 [n_tokens, n_tokens]: of each query (row) on each key. Rows sum to 1, or to less where a sink has the
    rest. An ablation of the head's output leaves them as they are."""
    allowed: Tensor
    """bool [n_tokens, n_tokens]: the keys that each query may see."""
    values: Tensor
    """float64 [n_tokens, d_value]: what the keys hold for this head."""
    output: Tensor
    """float64 [n_tokens, d_value]: what the head passes on, ablated."""


@dataclass(frozen=True, slots=True)
class Evenness:
    """How far a map is from even attention to all allowed keys: means over the queries that have a choice."""

    total_variation: float
    """From 0 to 1."""
    kl: float
    """KL( attention || even ), in nats."""
    sink: float
    """Share of attention that no key has."""
    n: int
    """Queries that may see two keys or more: with one, attention is even by itself."""


class _Seen(Exception):
    """Leaves the model once the layer's attention is seen."""

    def __init__(self, attended: dict[str, Any]) -> None:
        super().__init__("attention is seen")
        self.attended = attended


def attention_of(engine: Engine, token_ids: Sequence[int], head: Head, ablation: Ablation) -> Tensor:
    """Attention weights [n_query, n_key] of one head, float64; see :func:`map_of`."""
    return map_of(engine, token_ids, head, ablation).weights


def map_of(engine: Engine, token_ids: Sequence[int], head: Head, ablation: Ablation) -> AttentionMap:
    """One head's attention on one prompt with that head ablated.

    Raises:
        InputError: the model has no such head.
        UnsupportedModelError: the layer does not attend through our function.
    """
    plain = _attended(engine, token_ids, head, ablation)
    unablated = _attended(engine, token_ids, head, NOTHING)
    key, value = unablated["key"], unablated["value"]
    n_keys = key.shape[2]
    units = torch.eye(n_keys, dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
    # The head's output is no part of its map: scaled or replaced, it would come back in place of the weights.
    of_weights = NOTHING if ablation.kind.tensor == "head_output" else ablation
    weights = _attended(engine, token_ids, head, of_weights, (key, units))["output"][0, :, head.index]
    n_per_key = plain["output"].shape[2] // value.shape[1]
    return AttentionMap(
        weights.double().cpu(),
        _allowed(unablated["mask"], n_keys, n_keys),
        value[0, head.index // n_per_key].double().cpu(),
        plain["output"][0, :, head.index].double().cpu(),
    )


def evenness(found: AttentionMap) -> Evenness:
    """Distances of a map's rows from even attention; where a sink has a share, of what is left to the keys."""
    n_allowed = found.allowed.sum(dim=-1)
    chooses = n_allowed > 1
    if not bool(chooses.any()):
        raise InputError("an attention map needs a prompt of two tokens or more")
    weights, allowed = found.weights[chooses], found.allowed[chooses]
    given = weights.sum(dim=-1, keepdim=True)
    share = (weights / given).clamp_min(0.0)
    even = allowed.double() / n_allowed[chooses, None]
    distance = (share - even).abs().sum(dim=-1) / 2
    divergence = torch.special.xlogy(share, share * n_allowed[chooses, None]).sum(dim=-1)
    # A row that is even has a divergence of 0, and rounding may leave it below.
    return Evenness(
        float(distance.mean()),
        float(divergence.clamp_min(0.0).mean()),
        float((1 - given).clamp_min(0.0).mean()),
        int(chooses.sum()),
    )


@torch.inference_mode()
def _attended(
    engine: Engine,
    token_ids: Sequence[int],
    head: Head,
    ablation: Ablation,
    keys_and_values: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """What the layer's attention function was given and gave; the model is left there."""

    def observe(**attended: Any) -> None:
        raise _Seen(attended)

    ids = torch.tensor([list(token_ids)], device=engine.device)
    with engine.ablated_rows([()], ablation):  # refuses while another ablation is in force
        (call,) = engine.ablation_calls([(head,)], ablation).values()
        seen = replace(call, observe=observe, keys_and_values=keys_and_values)
        try:
            with attention_calls(engine.architecture.attentions, {head.layer: seen}):
                engine.model(input_ids=ids, use_cache=False)
        except _Seen as found:
            return found.attended
    raise UnsupportedModelError(f"layer {head.layer} does not call the attention registry")


def _allowed(mask: Tensor | None, n_queries: int, n_keys: int) -> Tensor:
    """The keys that a mask allows each query, bool [n_queries, n_keys]; None is causal."""
    if mask is None:
        return torch.ones(n_queries, n_keys, dtype=torch.bool).tril()
    given = mask[0, 0].cpu()
    return given if given.dtype == torch.bool else given >= 0

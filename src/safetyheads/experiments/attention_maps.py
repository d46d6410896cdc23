"""Reads and draws the attention maps of an ablated head, for any model family (Fig 7, 8).

Attention is linear in its values, whatever a family does to scores (softcap, sinks, windows, chosen keys): a second run
of the layer with unit vectors as values gives the weights, from the very function that the model attends by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.experiments.outcome import Measured, Outcome, Row
from safetyheads.heads import Head
from safetyheads.model.attention import attention_calls

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab, Subject
    from safetyheads.model.engine import Engine

NOTHING = Ablation("undifferentiated_attention", 1.0)
"""Times one: the unablated model."""
EPSILONS = (5e-1, 1e-3, 1e-10)
"""Strengths of Fig 7."""
TOKENS_DRAWN = 40
"""Tokens drawn of a longer prompt, at its end; distances are over all of it."""
# Less than this is what rounding leaves of a row that sums to 1, bfloat16's included.
_NO_SINK = 0.01
_SCALED = {
    "UA on query": "undifferentiated_attention",
    "UA on key": "undifferentiated_attention_key",
    "SC": "scaling_contribution",
}
_MEANS = {"mean query": "mean_query", "mean key": "mean_key", "mean head output": "mean_head_output"}


class AttentionMap(NamedTuple):
    """What one head attends to on one prompt, and what it passes on."""

    weights: Tensor
    """float64 [n_tokens, n_tokens]: weight of each query (row) on each key. Rows sum to 1, or to less where a sink has
    the rest. An ablation of the head's output leaves them as they are."""
    allowed: Tensor
    """bool [n_tokens, n_tokens]: keys that each query may see."""
    values: Tensor
    """float64 [n_tokens, d_value]: values of the keys for this head."""
    output: Tensor
    """float64 [n_tokens, d_value]: what the head passes on, ablated."""


class Evenness(NamedTuple):
    """Distance of a map from even attention to all allowed keys: means over the queries that have a choice."""

    total_variation: float
    """From 0 to 1."""
    kl: float
    """KL( attention || even ), in nats."""
    sink: float
    """Share of attention that no key has."""
    n: int
    """Queries that may see two keys or more: with one, attention is even by itself."""


class _AttentionSeen(Exception):
    """Leaves the model once the layer's attention is seen."""


def map_of(engine: Engine, token_ids: Sequence[int], head: Head, ablation: Ablation) -> AttentionMap:
    """One head's attention on one prompt with that head ablated.

    Raises:
        InputError: the model has no such head.
        UnsupportedModelError: the layer does not attend through our function.
    """
    plain = _attended(engine, token_ids, head, ablation)
    unablated = _attended(engine, token_ids, head, NOTHING)
    key, value, mask = unablated["key"], unablated["value"], unablated["mask"]
    n_keys = key.shape[2]
    if mask is None:
        allowed = torch.ones(n_keys, n_keys, dtype=torch.bool).tril()
    else:
        allowed = mask[0, 0].cpu() if mask.dtype == torch.bool else mask[0, 0].cpu() >= 0
    units = torch.eye(n_keys, dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
    # The head's output is no part of its map: scaled or replaced, it would come back in place of the weights.
    of_weights = NOTHING if ablation.kind.tensor == "head_output" else ablation
    weights = _attended(engine, token_ids, head, of_weights, (key, units))["output"][0, :, head.index]
    n_per_key = plain["output"].shape[2] // value.shape[1]
    return AttentionMap(
        weights.double().cpu(),
        allowed,
        value[0, head.index // n_per_key].double().cpu(),
        plain["output"][0, :, head.index].double().cpu(),
    )


@torch.inference_mode()
def _attended(
    engine: Engine,
    token_ids: Sequence[int],
    head: Head,
    ablation: Ablation,
    keys_and_values: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """Inputs and output of the layer's attention function; the model is left there."""
    attended: dict[str, Any] = {}

    def observe(**given: Any) -> None:
        attended.update(given)
        raise _AttentionSeen

    ids = torch.tensor([list(token_ids)], device=engine.device)
    with engine.ablated_rows([()], ablation):  # refuses while another ablation is in force
        (call,) = engine.ablation_calls([(head,)], ablation).values()
        watched = replace(call, observe=observe, keys_and_values=keys_and_values)
        try:
            with attention_calls(engine.architecture.attentions, {head.layer: watched}):
                engine.model(input_ids=ids, use_cache=False)
        except _AttentionSeen:
            return attended
    raise UnsupportedModelError(f"layer {head.layer} does not call the attention registry")


def evenness(attention: AttentionMap) -> Evenness:
    """Distances of a map's rows from even attention; where a sink has a share, of what is left to the keys."""
    n_allowed = attention.allowed.sum(dim=-1)
    chooses = n_allowed > 1
    if not bool(chooses.any()):
        raise InputError("an attention map needs a prompt of two tokens or more")
    weights, allowed = attention.weights[chooses], attention.allowed[chooses]
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


def fig7(lab: Lab, outcome: Outcome) -> None:
    """One head's map under UA on query and on key, and under SC, at three strengths."""
    scaled = {f"{label}, epsilon {e:g}": Ablation(name, e) for label, name in _SCALED.items() for e in EPSILONS}
    _maps(lab, outcome, scaled)


def fig8(lab: Lab, outcome: Outcome) -> None:
    """One head's map with its query, key or output replaced by the mean over the heads of its layer."""
    _maps(lab, outcome, {label: Ablation(name) for label, name in _MEANS.items()})


def _maps(lab: Lab, outcome: Outcome, ablations: dict[str, Ablation]) -> None:
    ablations = {"unablated": NOTHING, **ablations}
    for model, (subject,) in lab.each_model(outcome, most=1):
        (head,) = subject.group(lab.ablations[0], 1)
        maps = {label: _kept_map(lab, subject, head, ablation) for label, ablation in ablations.items()}
        decode, token_ids = subject.engine.tokenizer.decode, subject.asked_prompts.token_ids[0]
        tokens = [str(decode([token])) for token in token_ids]
        points = [row for label, attention in maps.items() for row in _points(tokens, label, attention)]
        outcome.figure("maps", points, model=model, head=head, dataset=subject.dataset, n=len(tokens))
        outcome.table("distances", _distances(maps), model=model, head=head)


def _kept_map(lab: Lab, subject: Subject, head: Head, ablation: Ablation) -> AttentionMap:
    """The map of the first prompt, kept in the run directory."""
    token_ids = subject.asked_prompts.token_ids[0]
    weights = lab.weights_of(subject.model)
    fields = {"weights": weights, "token_ids": list(token_ids), "head": str(head), "ablation": asdict(ablation)}
    maps = lab.directory.tensors(
        f"maps-{subject.name}", fields, lambda: map_of(subject.engine, token_ids, head, ablation)._asdict()
    )
    return AttentionMap(**maps)


def _points(tokens: Sequence[str], label: str, attention: AttentionMap) -> list[Row]:
    first = max(0, len(tokens) - TOKENS_DRAWN)
    return [
        {
            "query": query,
            "key": key,
            "query_token": tokens[query],
            "key_token": tokens[key],
            "value": round(float(attention.weights[query, key]), 6),  # as many as a colour can show
            "panel": label,
        }
        for query in range(first, len(tokens))
        for key in range(first, query + 1)
        if bool(attention.allowed[query, key])
    ]


def _distances(maps: dict[str, AttentionMap]) -> list[Row]:
    """Distance of each map from even attention and from the unablated map."""
    unablated, even = maps["unablated"], {label: evenness(attention) for label, attention in maps.items()}
    sink = "sink" if any(distance.sink > _NO_SINK for distance in even.values()) else "_sink"
    rows: list[Row] = []
    for label, attention in maps.items():
        n, chooses = even[label].n, attention.allowed.sum(dim=-1) > 1
        moved = float((attention.weights - unablated.weights).abs().sum(dim=-1)[chooses].mean()) / 2
        rows.append(
            {
                "ablation": label,
                "total_variation": Measured(even[label].total_variation, n),
                "kl": Measured(even[label].kl, n),
                "moved": Measured(moved, n),
                "output": float(attention.output.norm()) / float(unablated.output.norm()),
                sink: even[label].sink,
                "n": n,
            }
        )
    return rows

"""Reads and draws the attention maps of an ablated head, for any model family (Fig 7, 8).

Attention is linear in its values, whatever a family does to scores (softcap, sinks, windows, chosen keys): a second run
of the layer with unit vectors as values gives the weights, from the very function that the model attends by.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.experiments.lab import Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row
from safetyheads.heads import Head
from safetyheads.model.attention import LeftLayer, attention_calls
from safetyheads.model.engine import Engine
from safetyheads.model.proofs import allowed_keys

NOTHING = Ablation("undifferentiated_attention", 1.0)
"""Times one: the unablated model."""
TOKENS_DRAWN = 40
"""Tokens drawn of a longer prompt, at its end; distances are over all of it."""
# Less than this is what rounding leaves of a row that sums to 1, bfloat16's included.
_NO_SINK = 0.01


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


def map_of(engine: Engine, token_ids: Sequence[int], head: Head, ablation: Ablation) -> AttentionMap:
    """One head's attention on one prompt with that head ablated."""
    plain = _attended(engine, token_ids, head, ablation)
    unablated = _attended(engine, token_ids, head, NOTHING)
    key, value, mask = unablated["key"], unablated["value"], unablated["mask"]
    n_keys = key.shape[2]
    units = torch.eye(n_keys, dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
    # The head's output is no part of its map: scaled or replaced, it would come back in place of the weights.
    of_weights = NOTHING if ablation.kind.tensor == "head_output" else ablation
    weights = _attended(engine, token_ids, head, of_weights, (key, units))["output"][0, :, head.index]
    n_per_key = plain["output"].shape[2] // value.shape[1]
    return AttentionMap(
        weights.double().cpu(),
        allowed_keys(mask, n_keys, value.device).cpu(),
        value[0, head.index // n_per_key].double().cpu(),
        plain["output"][0, :, head.index].double().cpu(),
    )


@torch.inference_mode()
def _attended(
    engine: Engine, token_ids: Sequence[int], head: Head, ablation: Ablation, given: tuple[Tensor, Tensor] | None = None
) -> dict[str, Any]:
    attended: dict[str, Any] = {}

    def observe(**seen: Any) -> None:
        attended.update(seen)
        raise LeftLayer

    ids = torch.tensor([list(token_ids)], device=engine.device)
    with engine.ablated_rows([()], ablation):  # refuses while another ablation is in force
        (call,) = engine.ablation_calls([(head,)], ablation).values()
        watched = replace(call, observe=observe, keys_and_values=given)
        with suppress(LeftLayer), attention_calls(engine.architecture.attentions, {head.layer: watched}):
            engine.model(input_ids=ids, use_cache=False)
    if attended:
        return attended
    raise UnsupportedModelError(f"layer {head.layer} does not call the attention registry")


def evenness(attention: AttentionMap) -> tuple[float, float, float, int]:
    """Distances of a map from even attention to all allowed keys: means over the n queries that see two keys or more.

    Total variation (0 to 1), KL( attention || even ) in nats, the share of attention that a sink has, and n; where a
    sink has a share, distances are of what is left to the keys.
    """
    n_allowed = attention.allowed.sum(dim=-1)
    chooses = n_allowed > 1
    if not bool(chooses.any()):
        raise InputError("an attention map needs a prompt of two tokens or more")
    weights, allowed = attention.weights[chooses], attention.allowed[chooses]
    given = weights.sum(dim=-1, keepdim=True)
    share = (weights / given).clamp_min(0.0)
    even = allowed.double() / n_allowed[chooses, None]
    distance = (share - even).abs().sum(dim=-1) / 2
    # A row that is even has a divergence of 0, and rounding may leave it below.
    divergence = torch.special.xlogy(share, share * n_allowed[chooses, None]).sum(dim=-1).clamp_min(0.0)
    sink = (1 - given).clamp_min(0.0)
    return float(distance.mean()), float(divergence.mean()), float(sink.mean()), int(chooses.sum())


def maps(lab: Lab, outcome: Outcome, kinds: Mapping[str, str], epsilons: Sequence[float] = ()) -> None:
    """One head's map under kinds of ablation, which stand by their labels; those that have a strength at several."""
    ablations = {f"{label}, epsilon {e:g}": Ablation(kind, e) for label, kind in kinds.items() for e in epsilons}
    ablations = ablations or {label: Ablation(kind) for label, kind in kinds.items()}
    for model, (subject,) in lab.each_model(outcome, most=1):
        (head,) = subject.group(lab.ablations[0], 1)
        maps = {label: _kept_map(subject, head, kind) for label, kind in {"unablated": NOTHING, **ablations}.items()}
        decode = subject.engine.tokenizer.decode
        tokens = [str(decode([token])) for token in subject.asked_prompts.token_ids[0]]
        drawn = range(max(0, len(tokens) - TOKENS_DRAWN), len(tokens))
        points = [
            {
                "query": query,
                "key": key,
                "query_token": tokens[query],
                "key_token": tokens[key],
                "value": round(float(attention.weights[query, key]), 6),  # as many as a colour can show
                "panel": label,
            }
            for label, attention in maps.items()
            for query, key in product(drawn, drawn)
            if key <= query and bool(attention.allowed[query, key])
        ]
        outcome.figure("maps", points, model=model, head=head, dataset=subject.dataset, n=len(tokens))
        rows: list[Row] = []
        for label, attention in maps.items():
            total_variation, kl, sink, n = evenness(attention)
            moved = (attention.weights - maps["unablated"].weights).abs().sum(dim=-1)[attention.allowed.sum(dim=-1) > 1]
            row = {"ablation": label, "total_variation": Measured(total_variation, n), "kl": Measured(kl, n)}
            row |= {"moved": Measured(float(moved.mean()) / 2, n), "sink": sink, "n": n}
            rows.append(row | {"output": float(attention.output.norm() / maps["unablated"].output.norm())})
        if all(row["sink"] <= _NO_SINK for row in rows):
            rows = [{key: cell for key, cell in row.items() if key != "sink"} for row in rows]
        outcome.table("distances", rows, model=model, head=head)


def _kept_map(subject: Subject, head: Head, ablation: Ablation) -> AttentionMap:
    token_ids, directory = subject.asked_prompts.token_ids[0], subject.lab.directory
    fields = {"token_ids": list(token_ids), "head": str(head), "ablation": asdict(ablation), **subject.about}
    tensors = directory.tensors(
        f"maps-{subject.name}", fields, lambda: map_of(subject.engine, token_ids, head, ablation)._asdict()
    )
    return AttentionMap(**tensors)

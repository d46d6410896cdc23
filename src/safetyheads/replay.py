"""Capture and replay. Owns how layers run again from captured inputs; knows no prompts, groups or scores.

For one packed row of prompts:
1. capture: one run keeps every layer's input and arguments;
2. replay: an ablation of layer l changes nothing before l, so layers l.. run again, a batch row per head group;
3. finish: in the last layer only the wanted tokens get past attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from safetyheads.architectures import Architecture
from safetyheads.attention import AttentionCall, KeysAndValues, attention_calls, packed
from safetyheads.batching import PackedRow

# The dimension of a layer argument that runs over the row's tokens, counted from the end.
_TOKEN_DIMENSION = {
    "position_embeddings": -2,
    "attention_mask": -2,
    "position_ids": -1,
    "cache_position": -1,
}


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Which quick paths were proved on this model; without one the engine takes the slow, plain path."""

    packs: bool = True
    """Several prompts may share a row."""
    replays: bool = True
    """Layers may be run again from captured inputs."""
    prunes: bool = True
    """The last layer may be finished for the wanted tokens alone."""
    plain_head: bool = True
    """Logits are the head applied to the normed state; else the model's own forward makes them."""


@dataclass(frozen=True, slots=True)
class Capture:
    """One run over a packed row: what each layer was given."""

    row: PackedRow
    inputs: dict[int, Tensor]
    """layer -> hidden states entering it [1, n_tokens, d_model]."""
    arguments: Mapping[int, tuple[tuple[Any, ...], dict[str, Any]]]
    """layer -> its other arguments; read-only, every replay gets copies of mutable containers."""

    def drop_before(self, layer: int) -> None:
        """Let go of the inputs of earlier layers, once no replay starts there any more."""
        for earlier in [kept for kept in self.inputs if kept < layer]:
            del self.inputs[earlier]


def decode(architecture: Architecture, row: PackedRow, n_rows: int) -> Tensor:
    """A plain run of the decoder over copies of a packed row: [n_rows, n_tokens, d_model], after the norm."""
    ids = row.token_ids[None].expand(n_rows, -1)
    # A 2-D mask of ones: without one, transformers' own packing detection would join in.
    with packed(row.packing):
        output = architecture.decoder(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=row.packing.positions[None].expand(n_rows, -1),
            use_cache=False,
        )
    return output.last_hidden_state


@torch.inference_mode()
def capture(architecture: Architecture, row: PackedRow, calls: Mapping[int, AttentionCall], first: int) -> Capture:
    """Run the decoder over one packed row, keeping what layers ``first``.. are given.

    Args:
        architecture: the model's parts.
        row: the packed prompts.
        calls: layer -> ablations already in force during this run.
        first: the first layer whose input is kept.
    """
    inputs: dict[int, Tensor] = {}
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            keywords = dict(keywords)
            if positional:
                inputs[layer], positional = positional[0], positional[1:]
            else:
                inputs[layer] = keywords.pop("hidden_states")
            arguments[layer] = (_fresh(positional), _fresh(keywords))

        return hook

    with ExitStack() as stack:
        stack.enter_context(attention_calls(architecture.attentions, calls))
        for layer in range(first, architecture.n_layers):
            handle = architecture.layers[layer].register_forward_pre_hook(keep(layer), with_kwargs=True)
            stack.callback(handle.remove)
        decode(architecture, row, 1)
    return Capture(row, inputs, arguments)


def run_layer(architecture: Architecture, captured: Capture, layer: int, hidden: Tensor) -> Tensor:
    """One layer on other hidden states [n_rows, n_tokens, d_model], with the captured arguments."""
    positional, keywords = captured.arguments[layer]
    return first_of(architecture.layers[layer](hidden, *_fresh(positional), **_fresh(keywords)))


@torch.inference_mode()
def replay(
    architecture: Architecture,
    captured: Capture,
    calls: Mapping[int, AttentionCall],
    n_rows: int,
    start: int,
    prunes: bool = True,
) -> Tensor:
    """Run layers ``start``.. again on copies of the captured row and give the wanted tokens' states.

    Args:
        architecture: the model's parts.
        captured: the row's inputs and arguments.
        calls: layer -> the ablations of each batch row.
        n_rows: batch rows.
        start: the first layer to run again.
        prunes: finish the last layer for the wanted tokens alone, where its arguments allow it.

    Returns:
        [n_rows, n_wanted, d_model], before the final norm.
    """
    last, row = architecture.n_layers - 1, captured.row
    hidden = captured.inputs[start].expand(n_rows, -1, -1)
    with attention_calls(architecture.attentions, {layer: call for layer, call in calls.items() if layer < last}):
        for layer in range(start, last):
            hidden = run_layer(architecture, captured, layer, hidden)
    call = calls.get(last, AttentionCall())
    positional, keywords = captured.arguments[last]
    narrowed = _narrow(keywords, row.wanted, row.n_tokens) if prunes and not positional else None
    if narrowed is None:
        with attention_calls(architecture.attentions, {last: call}):
            return run_layer(architecture, captured, last, hidden)[:, row.wanted]
    there = _keys_and_values(architecture, captured, hidden, call)
    with attention_calls(architecture.attentions, {last: replace(call, keys_and_values=there)}):
        return first_of(architecture.layers[last](hidden[:, row.wanted], **_fresh(narrowed)))


def _keys_and_values(
    architecture: Architecture, captured: Capture, hidden: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """All tokens' keys and values in the last layer, which is left as soon as they are there."""
    last = architecture.n_layers - 1
    try:
        with attention_calls(architecture.attentions, {last: replace(call, leave=True)}):
            run_layer(architecture, captured, last, hidden)
    except KeysAndValues as reached:
        return reached.key, reached.value
    raise RuntimeError("the last layer ended without calling its attention function")


@torch.inference_mode()
def rerun(architecture: Architecture, row: PackedRow, calls: Mapping[int, AttentionCall], n_rows: int) -> Tensor:
    """The plain path beside :func:`replay`: the whole decoder, the last layer's output caught before the norm."""
    caught: list[Tensor] = []
    handle = architecture.layers[-1].register_forward_hook(lambda _, __, output: caught.append(first_of(output)))
    try:
        with attention_calls(architecture.attentions, calls):
            decode(architecture, row, n_rows)
    finally:
        handle.remove()
    return caught[0][:, row.wanted]


def first_of(output: Any) -> Tensor:
    """A layer's hidden states: some families' layers return a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _fresh(argument: Any) -> Any:
    """A copy of every container, and the tensors themselves: a replay may write to the one, never to the other."""
    if isinstance(argument, dict):
        copied = copy(argument)  # keeps a defaultdict one
        copied.update((name, _fresh(value)) for name, value in argument.items())
        return copied
    if isinstance(argument, list | tuple) and not hasattr(argument, "_fields"):
        return type(argument)(_fresh(value) for value in argument)
    return argument


def _narrow(keywords: dict[str, Any], wanted: Tensor, n_tokens: int) -> dict[str, Any] | None:
    """The keywords for the wanted tokens only; None where an argument's token dimension is not known."""
    narrowed: dict[str, Any] = {}
    for name, argument in keywords.items():
        parts = argument if isinstance(argument, tuple) else (argument,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not tensors:
            narrowed[name] = argument
            continue
        dimension = _TOKEN_DIMENSION.get(name)
        if dimension is None or any(part.shape[dimension] != n_tokens for part in tensors):
            return None
        picked = tuple(
            part.index_select(dimension, wanted.to(part.device)) if isinstance(part, Tensor) else part for part in parts
        )
        narrowed[name] = picked if isinstance(argument, tuple) else picked[0]
    return narrowed

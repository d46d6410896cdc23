"""Capture and replay. Owns how layers run again from captured inputs; knows no prompts, groups or scores.

For one packed row of prompts:
1. capture: one run keeps every layer's input and arguments;
2. start: in the first ablated layer all rows have one input, so its heads' outputs are taken once, unablated and
   ablated; each row mixes them and goes on from there;
3. replay: the layers after it run again, a batch row per head group;
4. finish: in the last layer only the wanted tokens get past attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from safetyheads.ablation import Ablation
from safetyheads.architectures import Architecture
from safetyheads.attention import AttentionCall, KeysAndValues, attention_calls
from safetyheads.batching import PackedRow
from safetyheads.packing import packed

# The dimension of a layer argument that runs over the row's tokens, counted from the end.
_TOKEN_DIMENSION = {
    "position_embeddings": -2,
    "attention_mask": -2,
    "position_ids": -1,
    "cache_position": -1,
}


_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a layer, beside its hidden states: positional ones, and keywords."""
_Shared: TypeAlias = dict[tuple[int, Ablation], tuple[Tensor, Tensor]]


class _HeadOutputs(Exception):
    """Leaves a layer from inside its attention once its heads' outputs are there, unablated and ablated."""

    def __init__(self, plain: Tensor, ablated: Tensor) -> None:
        super().__init__("the heads' outputs are there")
        self.plain, self.ablated = plain, ablated


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Which quick paths were proved on this model; without one the engine takes the slow, plain path."""

    packs: bool = True
    """Several prompts may share a row."""
    segments: bool = True
    """Attention may be taken prompt by prompt, not over the whole row."""
    replays: bool = True
    """Layers may be run again from captured inputs."""
    prunes: bool = True
    """The last layer may be finished for the wanted tokens alone."""
    starts_late: bool = True
    """The first ablated layer may start from its heads' outputs."""
    plain_head: bool = True
    """Logits are the head applied to the normed state; else the model's own forward makes them."""


@dataclass(frozen=True, slots=True)
class Capture:
    """One run over a packed row: what each layer was given."""

    row: PackedRow
    inputs: dict[int, Tensor]
    """layer -> hidden states entering it [1, n_tokens, d_model]."""
    arguments: Mapping[int, _Arguments]
    """layer -> its other arguments; read-only, every replay gets copies of mutable containers."""
    compared: _Shared = field(default_factory=dict)
    """(layer, ablation) -> outputs of a first ablated layer's heads, unablated and ablated, for all its batches."""

    def drop_before(self, layer: int) -> None:
        """Let go of what earlier layers need, once no replay starts there any more."""
        for earlier in [kept for kept in self.inputs if kept < layer]:
            del self.inputs[earlier]
        for key in [key for key in self.compared if key[0] < layer]:
            del self.compared[key]


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
def capture(
    architecture: Architecture,
    row: PackedRow,
    calls: Mapping[int, AttentionCall],
    first: int,
    segments: bool = False,
) -> Capture:
    """Run the decoder over one packed row, keeping what layers ``first``.. are given.

    Args:
        architecture: the model's parts.
        row: the packed prompts.
        calls: layer -> ablations already in force during this run.
        first: the first layer whose input is kept.
        segments: take attention prompt by prompt.
    """
    inputs: dict[int, Tensor] = {}
    arguments: dict[int, _Arguments] = {}

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
        stack.enter_context(attention_calls(architecture.attentions, _segmented(architecture, row, calls, segments)))
        for layer in range(first, architecture.n_layers):
            handle = architecture.layers[layer].register_forward_pre_hook(keep(layer), with_kwargs=True)
            stack.callback(handle.remove)
        decode(architecture, row, 1)
    return Capture(row, inputs, arguments)


def run_layer(architecture: Architecture, captured: Capture, layer: int, hidden: Tensor) -> Tensor:
    """One layer on other hidden states [n_rows, n_tokens, d_model], with the captured arguments."""
    return _call(architecture.layers[layer], hidden, captured.arguments[layer])


def _call(layer: nn.Module, hidden: Tensor, arguments: _Arguments) -> Tensor:
    positional, keywords = arguments
    return first_of(layer(hidden, *_fresh(positional), **_fresh(keywords)))


@torch.inference_mode()
def replay(
    architecture: Architecture,
    captured: Capture,
    calls: Mapping[int, AttentionCall],
    n_rows: int,
    start: int,
    quick: Capabilities,
) -> Tensor:
    """Run layers ``start``.. again on copies of the captured row and give the wanted tokens' states.

    Args:
        architecture: the model's parts.
        captured: the row's inputs and arguments.
        calls: layer -> the ablations of each batch row.
        n_rows: batch rows.
        start: the first layer to run again.
        quick: the quick paths to take.

    Returns:
        [n_rows, n_wanted, d_model], before the final norm.
    """
    last = architecture.n_layers - 1
    calls = _segmented(architecture, captured.row, calls, quick.segments)
    # Rows that are equal so far are one row, until the first ablation tells them apart.
    late = quick.starts_late and len(calls.get(start, AttentionCall()).ablations) == 1
    hidden = captured.inputs[start] if late else captured.inputs[start].expand(n_rows, -1, -1)
    shared = captured.compared if late else None
    for layer in range(start, last):
        hidden = _run(architecture, layer, hidden, captured.arguments[layer], calls.get(layer, AttentionCall()), shared)
        shared = None
    return _finish(architecture, captured, hidden, calls.get(last, AttentionCall()), shared, quick.prunes)


def _run(
    architecture: Architecture,
    layer: int,
    hidden: Tensor,
    arguments: _Arguments,
    call: AttentionCall,
    shared: _Shared | None,
) -> Tensor:
    """One layer under a call: [n_rows, n_tokens, d_model]; with ``shared``, from one row's heads' outputs on."""
    module, attentions = architecture.layers[layer], architecture.attentions
    if shared is None:
        with attention_calls(attentions, {layer: call}):
            return _call(module, hidden, arguments)
    key = (layer, call.ablations[0].ablation)
    if key not in shared:
        shared[key] = _head_outputs(architecture, layer, hidden, arguments, call)
    plain, ablated = shared[key]  # [1, n_tokens, n_heads, d_value]
    selected = call.ablations[0].selected.to(plain.device)[:, None, :, None]
    projection = architecture.output_projections[layer]
    assert projection is not None  # starts_late was proved
    block = projection(torch.where(selected, ablated, plain).flatten(2))
    # The row itself stays one: the layer adds the rows' blocks to it.
    with instead(attentions[layer], lambda *_, **__: (block, None)):
        return _call(module, hidden, arguments)


def _head_outputs(
    architecture: Architecture, layer: int, hidden: Tensor, arguments: _Arguments, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """The heads' outputs of one row [1, n_tokens, n_heads, d_value], unablated, and each ablated."""

    def leave(plain: Tensor, ablated: Tensor) -> Tensor:
        raise _HeadOutputs(plain, ablated)

    try:
        with attention_calls(architecture.attentions, {layer: replace(call, compare=leave)}):
            _call(architecture.layers[layer], hidden, arguments)
    except _HeadOutputs as reached:
        return reached.plain, reached.ablated
    raise RuntimeError(f"layer {layer} ended without calling its attention function")


def _finish(
    architecture: Architecture,
    captured: Capture,
    hidden: Tensor,
    call: AttentionCall,
    shared: _Shared | None,
    prunes: bool,
) -> Tensor:
    """The last layer, for the wanted tokens alone where its arguments allow it: [n_rows, n_wanted, d_model]."""
    last, row = architecture.n_layers - 1, captured.row
    positional, keywords = captured.arguments[last]
    narrowed = _narrow(keywords, row.wanted, row.n_tokens) if prunes and not positional else None
    if narrowed is None:
        return _run(architecture, last, hidden, captured.arguments[last], call, shared)[:, row.wanted]
    there = _keys_and_values(architecture, captured, hidden, call)
    call = replace(call, keys_and_values=there, segments=None)
    return _run(architecture, last, hidden[:, row.wanted], ((), narrowed), call, shared)


def _keys_and_values(
    architecture: Architecture, captured: Capture, hidden: Tensor, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """All tokens' keys and values in the last layer, which is left as soon as they are there."""
    last = architecture.n_layers - 1
    projection = architecture.query_projections[last]
    width = getattr(projection, "out_features", 0)

    def no_queries(hidden: Tensor) -> Tensor:
        """Of the right shape; nobody looks at them."""
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], width)

    try:
        with ExitStack() as stack:
            stack.enter_context(attention_calls(architecture.attentions, {last: replace(call, leave=True)}))
            if projection is not None and width:
                stack.enter_context(instead(projection, no_queries))
            run_layer(architecture, captured, last, hidden)
    except KeysAndValues as reached:
        return reached.key, reached.value
    raise RuntimeError("the last layer ended without calling its attention function")


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, calling the module runs ``forward``; what stood there before (accelerate keeps one) is put back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _segmented(
    architecture: Architecture, row: PackedRow, calls: Mapping[int, AttentionCall], segments: bool
) -> dict[int, AttentionCall]:
    """The calls, with every layer told how the row's prompts lie."""
    if not segments or len(row.members) == 1:
        return dict(calls)
    layers = range(architecture.n_layers)
    return {layer: replace(calls.get(layer, AttentionCall()), segments=row.segments) for layer in layers}


@torch.inference_mode()
def rerun(architecture: Architecture, row: PackedRow, calls: Mapping[int, AttentionCall], n_rows: int) -> Tensor:
    """The plain path beside :func:`replay`: the same states by the whole decoder."""
    return wanted_states(architecture, row, calls, n_rows)


def wanted_states(
    architecture: Architecture, row: PackedRow, calls: Mapping[int, AttentionCall], n_rows: int
) -> Tensor:
    """The whole decoder, the last layer's output caught before the norm [n_rows, n_wanted, d_model].

    Gradients are recorded where the caller records them.
    """
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

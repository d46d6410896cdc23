"""Heads as hook points of other tools, ablations of plain models, and proofs that somebody else's hook is right."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safetyheads.ablation import SCALING_CONTRIBUTION, Ablation, AnyAblation
from safetyheads.display import Shown
from safetyheads.errors import InputError
from safetyheads.heads import AnyHeads, Group, Head, format_heads, parse_heads, within
from safetyheads.model.architecture import HeadShape
from safetyheads.model.engine import Engine
from safetyheads.model.loading import borrow, use_our_attention
from safetyheads.model.proofs import TOLERANCE
from safetyheads.model.replay import first_of

# Where TransformerLens has the tensor that an ablation scales, each [batch, position, head, d_head].
_LENS_POINTS = {"query": "hook_rot_q", "head_output": "hook_z"}
_SEED, _ROWS, _LEAST_TOKENS = 0, 2, 12
Install: TypeAlias = AbstractContextManager[Any] | Callable[[], Any]
"""Puts an ablation on a model: a context manager, or a function that gives one, or a handle or handles to remove."""
_Part: TypeAlias = Callable[[Tensor, int, HeadShape], Tensor]
_MISTAKES: tuple[tuple[str, _Part, bool], ...] = (
    ("a position is changed instead of a head: the index is on the axis of tokens", lambda z, at, _: z[:, at], True),
    ("a row of the batch is changed instead of a head", lambda z, at, _: z[at : at + 1], True),
    (
        "the heads' outputs are split as [d_head, heads] instead of [heads, d_head]",
        lambda z, at, shape: z[..., at :: shape.n_heads],
        True,
    ),
    (
        "the slice is taken after the output projection, where no column is a head's; take the projection's input",
        lambda out, at, shape: out[..., at * shape.d_value : (at + 1) * shape.d_value],
        False,
    ),
)
"""Known mistakes: in words, the part that head ``at`` is mistaken for, and whether that is the projection's input."""


@contextmanager
def hooks_for(model: Any, heads: AnyHeads, ablation: AnyAblation = SCALING_CONTRIBUTION) -> Iterator[PreTrainedModel]:
    """A plain transformers model with heads ablated; as it was after. :meth:`Engine.wrap` proves the model too.

    The ablation is in the attention function, so it is right for grouped heads, biases and norms of queries alike.
    """
    with _engine(model) as engine, engine.ablated(heads, ablation) as ablated:
        yield ablated


@contextmanager
def _engine(model: Any) -> Iterator[Engine]:
    model, restore = borrow(model)
    try:
        use_our_attention(model)
        yield Engine(model, None)  # nothing is asked or decoded
    finally:
        restore()


def transformer_lens_hooks(
    heads: AnyHeads, ablation: AnyAblation = SCALING_CONTRIBUTION, rotary: bool = True
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks for TransformerLens: ``model.run_with_hooks(tokens, fwd_hooks=transformer_lens_hooks("2-26", "ua"))``.

    ``rotary`` says whether the model rotates queries; else they are scaled where they are made. Only undifferentiated
    attention by query and scaling contribution have a place there.
    """
    ablation, hooks = Ablation.parse(ablation), []
    kind = ablation.kind
    if kind.operation != "scale" or kind.tensor not in _LENS_POINTS:
        raise InputError(f"TransformerLens has no point where {ablation.name} is one factor; use ua or sc")
    point = _LENS_POINTS[kind.tensor] if rotary or kind.tensor != "query" else "hook_q"
    for layer, indices in _by_layer(parse_heads(heads)).items():

        def scale(tensor: Tensor, hook: object = None, indices: tuple[int, ...] = indices) -> Tensor:
            scaled = tensor.clone()
            scaled[:, :, indices] *= ablation.epsilon
            return scaled

        hooks.append((f"blocks.{layer}.attn.{point}", scale))
    return hooks


def head_columns(model: Any, heads: AnyHeads) -> dict[Head, tuple[str, slice]]:
    """The module whose input holds each head's output, by its path, and the head's columns of that input.

    nnsight: ``path, columns = head_columns(model, "2-26")[Head(2, 26)]``, then in a trace
    ``lm.get(path).input[..., columns] = 0``. It is the projection that mixes the heads: after it no column is a head's.
    """
    found: dict[Head, tuple[str, slice]] = {}
    with _engine(model) as engine:
        paths, facts = {module: path for path, module in engine.model.named_modules()}, engine.architecture
        for head in within(heads, engine.n_layers, engine.n_heads):
            shape, projection = facts.shapes[head.layer], facts.output_projections[head.layer]
            if shape is None or projection is None or head.index >= shape.n_heads:
                raise InputError(f"head {head}: no module is known that mixes it with others")
            columns = slice(head.index * shape.d_value, (head.index + 1) * shape.d_value)
            found[head] = (paths[projection], columns)
    return found


def _by_layer(group: Group) -> dict[int, tuple[int, ...]]:
    layers = sorted({head.layer for head in group})
    return {layer: tuple(sorted(head.index for head in group if head.layer == layer)) for layer in layers}


@dataclass(frozen=True, slots=True)
class HookCheck(Shown):
    """Whether somebody else's hook ablates the heads that it should, and them alone."""

    right: bool
    """Whether every layer's attention gives what ablating these heads gives."""
    faults: tuple[str, ...]
    """What is wrong, a sentence a layer."""
    error: float
    """Largest difference from the right output, relative to the layer's largest."""


def verify_hook(model: Any, hook: Install, heads: AnyHeads, ablation: AnyAblation = SCALING_CONTRIBUTION) -> HookCheck:
    """Prove that ``hook`` ablates ``heads`` on this model, or name its fault: wrong axis, wrong place, other heads.

    Random tokens run through the model under the hook. Then each layer's attention runs again on the same input, with
    single heads ablated by us, and their effects must add up to what the hook did.
    """
    with _engine(model) as engine, torch.inference_mode():
        wanted = _by_layer(within(heads, engine.n_layers, engine.n_heads))
        ablation, allowed = Ablation.parse(ablation), TOLERANCE[engine.dtype]
        seen = _seen_under(hook, engine)
        faults, errors = [], [0.0]
        for layer, (arguments, keywords, observed) in seen.items():
            attention = engine.architecture.attentions[layer]
            indices = wanted.get(layer, ())

            def run(group: Group = (), attention: Any = attention, given: Any = (arguments, keywords)) -> Tensor:
                with engine.ablated(group, ablation):
                    return first_of(attention(*given[0], **given[1])).double().cpu()

            plain = run()
            size = float(plain.abs().max())
            errors.append(float((run(tuple(Head(layer, at) for at in indices)) - observed).abs().max()) / size)
            if not errors[-1] <= allowed:
                fault = _fault(engine, layer, indices, ablation, run, plain, observed, allowed * size)
                faults.append(f"layer {layer}: {fault}")
    return HookCheck(not faults, tuple(faults), max(errors))


def _seen_under(hook: Install, engine: Engine) -> dict[int, tuple[Any, Mapping[str, Any], Tensor]]:
    """What each attention module is given and gives under the hook: arguments, keywords, output in float64."""
    seen: dict[int, tuple[Any, Mapping[str, Any], Tensor]] = {}
    n_tokens = max(_LEAST_TOKENS, engine.n_heads + 1)  # more tokens than heads, so that a head's index is a token too
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(engine.architecture.vocabulary_size, (_ROWS, n_tokens), generator=generator)
    with ExitStack() as stack:
        installed = hook if isinstance(hook, AbstractContextManager) or not callable(hook) else hook()
        if isinstance(installed, AbstractContextManager):
            stack.enter_context(installed)
        else:
            for handle in installed if isinstance(installed, list | tuple) else (installed,):
                if not hasattr(handle, "remove"):
                    raise InputError("a hook is a context manager, or a function that gives one, or handles to remove")
                stack.callback(handle.remove)
        for layer, attention in enumerate(engine.architecture.attentions):
            if attention is not None:

                def keep(_: object, arguments: Any, keywords: Any, output: Any, layer: int = layer) -> None:
                    seen[layer] = (arguments, keywords, first_of(output).double().cpu())

                # Last of all hooks, so that it sees what the others made of the output.
                stack.callback(attention.register_forward_hook(keep, with_kwargs=True).remove)
        engine.model(tokens.to(engine.device), use_cache=False)
    return seen


def _fault(
    engine: Engine,
    layer: int,
    indices: tuple[int, ...],
    ablation: Ablation,
    run: Callable[..., Tensor],
    plain: Tensor,
    observed: Tensor,
    allowed: float,
) -> str:
    """What a hook did to a layer, in words."""
    shape = engine.architecture.shapes[layer]
    assert shape is not None
    moved = (plain - observed).flatten()
    if float(moved.abs().max()) <= allowed:
        return f"nothing happens to {_named(layer, indices)}; the hook does not arrive"
    parts = torch.stack([(plain - run((Head(layer, at),))).flatten() for at in range(shape.n_heads)], dim=1)
    shares = torch.linalg.lstsq(parts, moved[:, None]).solution[:, 0]
    if float((parts @ shares - moved).abs().max()) <= allowed:
        whole = tuple(at for at, share in enumerate(shares.tolist()) if abs(share - 1) < 0.05)
        partly = tuple(at for at, share in enumerate(shares.tolist()) if abs(share) >= 0.05 and at not in whole)
        if whole != indices and not partly:
            return f"{_named(layer, whole)} ablated where {_named(layer, indices)} should be"
        found = ", ".join(f"{layer}-{at} by {shares[at]:.2f}" for at in (*whole, *partly))
        return f"heads are ablated in part ({found}), where {_named(layer, indices)} should be by 1"
    projection = engine.architecture.output_projections[layer]
    for words, part_of, before_projection in _MISTAKES:
        mistaken = plain

        def edited(tensor: Tensor, part_of: _Part = part_of) -> Tensor:
            changed = tensor.clone()
            for at in indices:
                part_of(changed, at, shape).mul_(ablation.epsilon)
            return changed

        if not before_projection:
            mistaken = edited(plain)
        elif projection is not None:
            handle = projection.register_forward_pre_hook(lambda _, given, edit=edited: (edit(given[0]), *given[1:]))
            mistaken = run()
            handle.remove()
        if float((mistaken - observed).abs().max()) <= allowed:
            return words
    return f"something else changes than {_named(layer, indices)}"


def _named(layer: int, indices: tuple[int, ...]) -> str:
    heads = format_heads([Head(layer, at) for at in indices])
    return f"head{'s' * (len(indices) > 1)} {heads}" if indices else "no head"

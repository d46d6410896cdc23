"""Captures a model's run over a packed row and replays its layers under ablations.

1. capture: one run keeps every layer's input and arguments;
2. start: in the first ablated layer all batch rows have one input, so its heads' outputs are computed once, unablated
   and ablated; each batch row mixes them and goes on from there;
3. replay: the layers after it run again, with a batch row for each head group;
4. finish: in the last layer only the wanted tokens get past attention.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from safetyheads.ablation import Ablation
from safetyheads.errors import UnsupportedModelError
from safetyheads.model.architecture import Architecture, Capabilities, input_device
from safetyheads.model.attention import AttentionCall, LeftLayer, attention_calls, packed
from safetyheads.model.packing import PackedRow

# What layers are given beside their hidden states. Captured arguments are read-only: a replay that wrote to them would
# poison the next one. But what a layer writes for a later one (shared keys and values) has to reach it within the same
# replay. So every replay has one copy of each mutable container, and all of its layers get that one.

Arguments: TypeAlias = dict[str, Any]
"""Arguments of a layer by name, without the hidden states; containers as :class:`Kept`."""

TOKEN_DIMENSION = {
    "position_embeddings": -2,
    "attention_mask": -2,
    "causal_mask": -2,
    "per_layer_input": -2,
    "position_ids": -1,
    "cache_position": -1,
}
"""The dimension of a layer argument that runs over the row's tokens, counted from the end."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A mutable container as it was when a layer was given it."""

    origin: Any
    """The container itself, to tell it from others; its contents have changed since."""
    contents: Any
    """A copy of it, with the containers inside kept likewise."""


def named(layer: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """A layer's hidden states, and its other arguments by the names of its forward, kept as they are now."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # Of the class: what stands on the instance (accelerate's hooks) takes whatever comes.
    parameters = inspect.signature(type(layer).forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds][1:]
    given = {**dict(zip(names, positional, strict=False)), **keywords}
    if not names or len(given) != len(positional) + len(keywords):
        raise LookupError(f"{type(layer).__name__} is given arguments that its forward does not name")
    hidden = given.pop(names[0])
    return hidden, {name: _keep(argument) for name, argument in given.items()}


def _keep(argument: Any) -> Any:
    """The argument with every mutable container in it kept as it is now; nobody changes tensors."""
    if isinstance(argument, MutableMapping):
        contents = copy(argument)  # keeps a defaultdict one
        contents.update((name, _keep(value)) for name, value in argument.items())
        return Kept(argument, contents)
    if isinstance(argument, list):
        return Kept(argument, [_keep(value) for value in argument])
    # Exactly a tuple: a named one is made by its fields.
    return tuple(_keep(value) for value in argument) if type(argument) is tuple else argument


class Copies:
    """The containers of one replay: one copy of each, whichever layers are given it."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}

    def of(self, arguments: Arguments) -> dict[str, Any]:
        """A layer's arguments, with this replay's containers."""
        return {name: self._copy(argument) for name, argument in arguments.items()}

    def fork(self) -> "Copies":
        """Copies of the containers as they are now, for a run whose writing must not be seen."""
        forked = Copies()
        forked._copies = {origin: Copies()._copy(_keep(container)) for origin, container in self._copies.items()}
        return forked

    def complete(self, arguments: Arguments) -> None:
        """Add what the captured run had in its mappings by now, after a layer whose attention was not run to write."""
        for argument in arguments.values():
            if isinstance(argument, Kept) and isinstance(argument.contents, MutableMapping):
                container = self._copy(argument)
                for name, value in argument.contents.items():
                    if name not in container:
                        container[name] = self._copy(value)

    def _copy(self, argument: Any) -> Any:
        if type(argument) is tuple:
            return tuple(self._copy(value) for value in argument)
        if not isinstance(argument, Kept):
            return argument
        if id(argument.origin) not in self._copies:
            contents = copy(argument.contents)
            self._copies[id(argument.origin)] = contents
            for name, value in contents.items() if isinstance(contents, MutableMapping) else enumerate(contents):
                contents[name] = self._copy(value)
        return self._copies[id(argument.origin)]


def narrowed(arguments: Arguments, wanted: Tensor, n_tokens: int) -> Arguments:
    """The arguments for the wanted tokens only; LookupError where a token dimension is not known."""

    def narrow(name: str, argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(narrow(name, part) for part in argument)
        if not isinstance(argument, Tensor):
            return argument
        dimension = TOKEN_DIMENSION.get(name)
        if dimension is None or argument.shape[dimension] != n_tokens:
            raise LookupError(f"which dimension of {name} runs over the tokens is not known")
        return argument.index_select(dimension, wanted.to(argument.device))

    return {name: narrow(name, argument) for name, argument in arguments.items()}


# Capture


Place: TypeAlias = Literal["device", "host", "disk"]
"""Where a capture's inputs are: on the device, in the host's pinned memory, or in a private folder."""


class Capture:
    """One run over a packed row. It shrinks as replays move on."""

    def __init__(self, row: PackedRow, place: Place = "device") -> None:
        self.row, self.place = row, place
        # Layer -> hidden states entering it, [1, n_tokens, d_model] unless the family stacks more of them; or their
        # file. And the device that they belong on.
        self.inputs: dict[int, Tensor | Path] = {}
        self._devices: dict[int, torch.device] = {}
        self._folder = TemporaryDirectory(prefix="safetyheads-") if place == "disk" else None
        # What was read last from a file, for all batches that begin at its layer.
        self._read: tuple[int, Tensor] | None = None
        self.arguments: dict[int, Arguments] = {}
        # What a first ablated layer's heads, unablated and ablated, give its output projection, for all of its batches
        # [2, n_tokens, n_heads * d_value].
        self.compared: dict[tuple[int, Ablation], Tensor] = {}

    def keep_input(self, layer: int, hidden: Tensor) -> None:
        """Keep the states that enter a layer, in this capture's place."""
        self._devices[layer] = hidden.device
        if self._folder is not None:
            path = Path(self._folder.name) / f"{layer}.safetensors"
            save_file({"hidden": hidden.contiguous()}, path)
            self.inputs[layer] = path
        elif self.place == "host":
            self.inputs[layer] = torch.empty_like(hidden, device="cpu", pin_memory=hidden.is_cuda).copy_(hidden)
        else:
            self.inputs[layer] = hidden

    def input_of(self, layer: int) -> Tensor:
        """The states that enter a layer, on their device."""
        hidden = self.inputs[layer]
        if isinstance(hidden, Path):
            if self._read is None or self._read[0] != layer:
                self._read = layer, load_file(hidden)["hidden"]
            hidden = self._read[1]
        return hidden.to(self._devices[layer], non_blocking=True)

    def drop_before(self, layer: int) -> None:
        """Free what earlier layers need, once no replay starts there any more."""
        for kept, hidden in self.inputs.items():
            if kept < layer and isinstance(hidden, Path):
                hidden.unlink()
        self.inputs = {kept: hidden for kept, hidden in self.inputs.items() if kept >= layer}
        self.compared = {key: outputs for key, outputs in self.compared.items() if key[0] >= layer}


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
    place: Place = "device",
) -> Capture:
    """Run the decoder over one packed row under ``calls``, keeping in a ``place`` what layers ``first``.. are given.

    With ``segments``, attention is taken prompt by prompt.
    """
    captured = Capture(row, place)

    def keep(layer: int, module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden, captured.arguments[layer] = named(module, positional, keywords)
        captured.keep_input(layer, hidden)

    with ExitStack() as stack:
        stack.enter_context(attention_calls(architecture.attentions, _segmented(architecture, row, calls, segments)))
        for layer in range(first, architecture.n_layers):
            module = architecture.layers[layer]
            stack.enter_context(module.register_forward_pre_hook(partial(keep, layer), with_kwargs=True))
        decode(architecture, row, 1)
    return captured


def _segmented(
    architecture: Architecture, row: PackedRow, calls: Mapping[int, AttentionCall], segments: bool
) -> dict[int, AttentionCall]:
    """The calls, with every layer told how the row's prompts lie."""
    if not segments or len(row.members) == 1:
        return dict(calls)
    layers = architecture.with_heads
    return {layer: replace(calls.get(layer, AttentionCall()), segments=row.packing) for layer in layers}


def of_rows(architecture: Architecture, hidden: Tensor, n_rows: int) -> Tensor:
    """One row's states as those of several equal rows."""
    sizes = [-1] * hidden.ndim
    sizes[architecture.batch_dimension] = n_rows
    return hidden.expand(sizes)


# Replay


@torch.inference_mode()
def replay(
    architecture: Architecture,
    captured: Capture,
    calls: Mapping[int, AttentionCall],
    n_rows: int,
    start: int,
    quick: Capabilities,
) -> Tensor:
    """Run layers ``start``.. again on ``n_rows`` copies of the captured row, each under its ablations in ``calls``.

    The wanted tokens' states [n_rows, n_wanted, d_model], before the final norm.
    """
    last = architecture.n_layers - 1
    calls = _segmented(architecture, captured.row, calls, quick.segments)
    running = _Replay(architecture, captured)
    # Rows that are equal so far are one row, until the first ablation tells them apart.
    late = quick.starts_late and len(calls.get(start, AttentionCall()).ablations) == 1
    hidden = captured.input_of(start)
    hidden = hidden if late else of_rows(architecture, hidden, n_rows)
    for layer in range(start, last):
        arguments = captured.arguments[layer]
        hidden = running.layer(layer, hidden, arguments, calls.get(layer, AttentionCall()), late and layer == start)
    states = running.finish(hidden, calls.get(last, AttentionCall()), late and start == last, quick.prunes)
    if architecture.batch_dimension == 0:
        return states
    # Families with several residual streams merge them before the final norm: by the decoder's own code, run over no
    # layer at all.
    ids = torch.zeros(states.shape[architecture.batch_dimension :][:2], dtype=torch.int64, device=states.device)
    with ExitStack() as stack:
        for module in architecture.layers:
            stack.enter_context(instead(module, lambda *_, **__: states))
        caught = stack.enter_context(given_to_norm(architecture))
        architecture.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return caught[-1]


class _Replay:
    """One replay under way: its containers are as the layers so far have left them."""

    def __init__(self, architecture: Architecture, captured: Capture) -> None:
        self.architecture, self.captured, self.copies = architecture, captured, Copies()

    def layer(self, layer: int, hidden: Tensor, arguments: Arguments, call: AttentionCall, late: bool) -> Tensor:
        """One layer under a call, for all rows; ``late``, from the heads' outputs of the one row there is so far."""
        facts = self.architecture
        module, attention = facts.layers[layer], facts.attentions[layer]
        if not late:
            with attention_calls(facts.attentions, {} if attention is None else {layer: call}):
                return first_of(module(hidden, **self.copies.of(arguments)))
        projection, shape = facts.output_projections[layer], facts.shapes[layer]
        assert attention is not None  # starts_late was proved
        assert projection is not None
        assert shape is not None
        ((ablation, rows),) = call.ablations
        key = (layer, ablation)
        if key not in self.captured.compared:
            # Taken at the projection and not at the attention function: some families gate heads' outputs in between.
            both = torch.tensor([[False], [True]], device=rows.device).expand(-1, rows.shape[1])

            def leave(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                raise LeftLayer(given[0])

            with projection.register_forward_pre_hook(leave):
                compared = replace(call, ablations=((ablation, both),))
                self.captured.compared[key], *_ = self._left(layer, of_rows(facts, hidden, 2), arguments, compared)
        outputs = self.captured.compared[key]
        plain, ablated = outputs.view(*outputs.shape[:-1], shape.n_heads, -1)
        selected = rows.to(plain.device)[:, None, :, None]
        block = projection(torch.where(selected, ablated, plain).flatten(2))
        # The row itself stays one: the layer adds the rows' blocks to it.
        with instead(attention, lambda *_, **__: (block, None)):
            hidden = first_of(module(hidden, **self.copies.of(arguments)))
        if layer + 1 < facts.n_layers:
            # Keys and values do not depend on their own layer's ablation, so those that the captured run shared hold.
            self.copies.complete(self.captured.arguments[layer + 1])
        return hidden

    def finish(self, hidden: Tensor, call: AttentionCall, late: bool, prunes: bool) -> Tensor:
        """The last layer, for the wanted tokens; with ``prunes``, only these get past attention."""
        last, row = self.architecture.n_layers - 1, self.captured.row
        arguments, tokens = self.captured.arguments[last], self.architecture.batch_dimension + 1
        if not prunes:
            states = self.layer(last, hidden, arguments, call, late)
            return states.index_select(tokens, row.wanted.to(states.device))
        if self.architecture.attentions[last] is None:
            raise LookupError("the last layer has no heads")
        # All tokens' keys and values. Queries are one token's, expanded to the right shape: nothing reads them.
        projection = self.architecture.query_projections[last]
        width = getattr(projection, "out_features", 0)

        def no_queries(hidden: Tensor) -> Tensor:
            return hidden.new_zeros(width).expand(*hidden.shape[:-1], width)

        with instead(projection, no_queries) if projection is not None and width else nullcontext():
            key, value = self._left(last, hidden, arguments, replace(call, leave=True))
        call = replace(call, keys_and_values=(key, value), segments=None)
        wanted = narrowed(arguments, row.wanted, row.n_tokens)
        return self.layer(last, hidden.index_select(tokens, row.wanted.to(hidden.device)), wanted, call, late)

    def _left(self, layer: int, hidden: Tensor, arguments: Arguments, call: AttentionCall) -> tuple[Tensor, ...]:
        """What a layer is left with as soon as it is there; what it wrote into its containers is not seen."""
        try:
            with attention_calls(self.architecture.attentions, {layer: call}):
                self.architecture.layers[layer](hidden, **self.copies.fork().of(arguments))
        except LeftLayer as left:
            return left.args
        raise LookupError(f"layer {layer} ended without what was wanted of it")


# The plain path


@torch.inference_mode()
def rerun(architecture: Architecture, row: PackedRow, calls: Mapping[int, AttentionCall], n_rows: int) -> Tensor:
    """The plain path beside :func:`replay`: states before the final norm [n_rows, n_wanted, d_model]."""
    with given_to_norm(architecture) as caught, attention_calls(architecture.attentions, calls):
        decode(architecture, row, n_rows)
    return caught[-1].index_select(1, row.wanted.to(caught[-1].device))


def logits(model: PreTrainedModel, architecture: Architecture, hidden: Tensor, plain_head: bool) -> Tensor:
    """Logits [n, vocabulary] of states [n, d_model] before the final norm, in float32.

    Without ``plain_head`` the family does more to its logits (a softcap, a scale), so its own forward makes them of
    these states.
    """
    if plain_head:
        return architecture.head(architecture.final_norm(hidden)).float()
    normed = architecture.final_norm(hidden)[None]

    def put(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = normed
        return output

    token = torch.zeros(1, 1, dtype=torch.int64, device=input_device(model))
    with architecture.decoder.register_forward_hook(put):
        return model(input_ids=token, use_cache=False).logits[0].float()


@contextmanager
def given_to_norm(architecture: Architecture) -> Iterator[list[Tensor]]:
    """Within, what the final norm is given."""
    caught: list[Tensor] = []
    with architecture.final_norm.register_forward_pre_hook(lambda _, given: caught.append(given[0])):
        yield caught


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


def first_of(output: Any) -> Tensor:
    """A layer's hidden states: some families' layers return a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Within, these registered hooks are in force; then they are removed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_input(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """The hidden states that a module is called with."""
    if not positional and "hidden_states" not in keywords:
        raise UnsupportedModelError(f"{type(module).__name__} is not given hidden states under a known name")
    return positional[0] if positional else keywords["hidden_states"]


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Registers a change of the hidden states that a module is given."""

    def hook(called: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        changed = change(first_input(called, positional, keywords))
        if positional:
            return (changed, *positional[1:]), keywords
        return positional, {**keywords, "hidden_states": changed}

    return module.register_forward_pre_hook(hook, with_kwargs=True)

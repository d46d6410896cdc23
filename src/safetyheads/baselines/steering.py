"""A direction of the residual stream taken out of a running model, or put in. Owns the hooks; finds no direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from safetyheads.baselines.forward import refuse_streams
from safetyheads.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

FACTOR_NAMES = ("residual_multiplier", "attn_out_multiplier")
"""Of a block: by what attention's output is multiplied before it is added to the stream (Granite, Falcon-H1)."""


@contextmanager
def direction_removed(engine: Engine, direction: Tensor, share: float = 1.0) -> Iterator[None]:
    """Within, the model runs without the direction: x <- x - r^ (r^ . x) at every token; as it was after.

    At the first block's input, at every attention's output and at every block's output, which is the next one's input:
    the MLP's output is freed of it together with the sum that it is added to, which is the same. In a hybrid's layers
    without attention what mixes tokens instead is freed at the block's output only, after the MLP has read it. A norm
    after attention (OLMo 2, Gemma 2) may bring some of the direction back until the block ends.

    A share below 1 is that share of whatever is written to the stream, once: of the embeddings, of what attention adds
    and of what the block adds beside it, as the weight edit (I - share r^ r^^T) W_out does it, which norms between
    W_out and the stream (OLMo 2, Gemma 2) follow here and not there. Families that scale the stream itself in a block
    (Gemma 4, MiniMax) have that scaling counted among what the block writes. Scores by replay run a captured layer
    again and may pass the first block's input twice: take them at a share of 1, where that changes nothing.

    Args:
        engine: the model.
        direction: r [d_model], of any length above 0.
        share: how much of the projection is removed; 1 in the paper.

    Raises:
        InputError: a direction without length or of another width.
        UnsupportedModelError: a family with several residual streams.
    """
    unit = _unit(engine, direction)

    def removed(hidden: Tensor, of: Tensor | None = None) -> Tensor:
        along = unit.to(hidden.device)
        # In float32 whatever the model's dtype: half precisions would leave a rest of the projection.
        wide = hidden.float()
        projection = (wide if of is None else of) @ along
        return (wide - share * projection[..., None] * along).to(hidden.dtype)

    facts = engine.architecture
    with engine.weights_changed(), ExitStack() as stack:
        stack.callback(_before(facts.layers[0], removed))
        for layer, attention in zip(facts.layers, facts.attentions, strict=True):
            if share != 1.0:
                _PartOfBlock(layer, attention, removed).enter(stack)
                continue
            if attention is not None:
                stack.callback(_after(attention, removed))
            stack.callback(_after(layer, removed))
        yield


@contextmanager
def direction_added(engine: Engine, direction: Tensor, layer: int) -> Iterator[None]:
    """Within, r is added to the input of one block at every token (coefficient 1); as it was after.

    Args:
        engine: the model.
        direction: r [d_model], as long as it is.
        layer: the block.

    Raises:
        InputError: a direction without length or of another width.
        UnsupportedModelError: a family with several residual streams.
    """
    _unit(engine, direction)

    def added(hidden: Tensor) -> Tensor:
        return (hidden.float() + direction.float().to(hidden.device)).to(hidden.dtype)

    with engine.weights_changed(), ExitStack() as stack:
        stack.callback(_before(engine.architecture.layers[layer], added))
        yield


class _PartOfBlock:
    """A block that writes without a share of the direction. Owns what is kept from its beginning to its end."""

    def __init__(self, layer: nn.Module, attention: nn.Module | None, removed: Callable[..., Tensor]) -> None:
        self._layer, self._attention, self._removed = layer, attention, removed
        # The factor that some families put between attention and the stream.
        self._factor = next((float(getattr(layer, name)) for name in FACTOR_NAMES if hasattr(layer, name)), 1.0)
        self._given: Tensor | None = None  # what the block was given
        self._whole: Tensor | None = None  # what attention gave
        self._parted: Tensor | None = None  # the same without the share, as the block goes on with it
        self._added: Tensor | None = None  # what of it reaches the stream

    def enter(self, stack: ExitStack) -> None:
        """Puts the hooks; the stack takes them back."""
        stack.callback(_before(self._layer, self._begin))
        if self._attention is not None:
            stack.callback(_after(self._attention, self._attended))
            for part in self._layer.children():
                if part is not self._attention:
                    stack.callback(part.register_forward_pre_hook(self._whole_again).remove)
                    stack.callback(part.register_forward_hook(self._parted_after).remove)
        stack.callback(_after(self._layer, self._end))

    def _begin(self, hidden: Tensor) -> Tensor:
        self._given, self._whole, self._parted, self._added = hidden, None, None, None
        return hidden

    def _attended(self, hidden: Tensor) -> Tensor:
        self._whole, self._parted = hidden, self._removed(hidden)
        self._added = self._parted
        return self._parted

    def _whole_again(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A norm right after attention reads all of it: the share is taken of what the norm gives instead."""
        return (self._whole, *given[1:]) if given and given[0] is self._parted else None

    def _parted_after(self, _: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        if not given or given[0] is not self._whole or self._whole is None:
            return None
        self._added = self._removed(output)
        return self._added

    def _end(self, hidden: Tensor) -> Tensor:
        if self._given is None:
            raise UnsupportedModelError(f"{type(self._layer).__name__} gave hidden states and was given none")
        beside = hidden.float() - self._given.float()
        if self._added is not None:
            beside = beside - self._factor * self._added.float()
        self._begin(hidden)  # nothing of it is kept
        self._given = None
        return self._removed(hidden, beside)


def _unit(engine: Engine, direction: Tensor) -> Tensor:
    """The direction at length 1 [d_model], float32."""
    refuse_streams(engine)
    wide = direction.detach().double()
    length = float(wide.norm())
    if tuple(wide.shape) != (engine.architecture.d_model,) or not 0 < length < float("inf"):
        raise InputError(
            f"a direction has {engine.architecture.d_model} finite numbers here, not all 0; got one of shape "
            f"{list(wide.shape)} and length {length:g}"
        )
    return (wide / length).float()


def _before(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Changes what a block is given; gives what takes that back."""

    def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if positional:
            return (change(positional[0]), *positional[1:]), keywords
        if "hidden_states" not in keywords:
            raise UnsupportedModelError(f"{type(module).__name__} is not given hidden states under a known name")
        return positional, {**keywords, "hidden_states": change(keywords["hidden_states"])}

    return layer.register_forward_pre_hook(hook, with_kwargs=True).remove


def _after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Changes what a module gives, the first of several; gives what takes that back."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook).remove

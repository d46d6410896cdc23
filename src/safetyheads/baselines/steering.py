"""A direction of the residual stream taken out of a running model, or put in. Owns the hooks; finds no direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from safetyheads.baselines.base import weights_changed
from safetyheads.baselines.forward import refuse_streams
from safetyheads.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from safetyheads.engine import Engine


@contextmanager
def direction_removed(engine: Engine, direction: Tensor, share: float = 1.0) -> Iterator[None]:
    """Within, the model runs without the direction: x <- x - r^ (r^ . x) at every token; as it was after.

    At the first block's input, at every attention's output and at every block's output, which is the next one's input:
    the MLP's output is freed of it together with the sum that it is added to, which is the same. In a hybrid's layers
    without attention what mixes tokens instead is freed at the block's output only, after the MLP has read it. A norm
    after attention (OLMo 2, Gemma 2) may bring some of the direction back until the block ends.

    In a forward each place is passed once, so a share below 1 is that share. Scores by replay run a captured layer
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

    def removed(hidden: Tensor) -> Tensor:
        along = unit.to(hidden.device)
        # In float32 whatever the model's dtype: half precisions would leave a rest of the projection.
        wide = hidden.float()
        return (wide - share * (wide @ along)[..., None] * along).to(hidden.dtype)

    facts = engine.architecture
    with weights_changed(engine), ExitStack() as stack:
        stack.callback(_before(facts.layers[0], removed))
        for layer, attention in zip(facts.layers, facts.attentions, strict=True):
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

    with weights_changed(engine), ExitStack() as stack:
        stack.callback(_before(engine.architecture.layers[layer], added))
        yield


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

"""What layers are given beside their hidden states. Owns how it is kept, handed out again, and cut to some tokens.

A captured argument is read-only: a replay that wrote to it would poison the next one. But what one layer writes for
a later one (keys and values that several layers share) has to reach it within the same replay. So every replay has
one copy of each mutable container, and all of its layers get that one.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

Arguments: TypeAlias = dict[str, Any]
"""Of a layer, by name, hidden states aside; containers as :class:`Kept`."""

TOKEN_DIMENSION = {
    "position_embeddings": -2,
    "attention_mask": -2,
    "causal_mask": -2,
    "per_layer_input": -2,
    "position_ids": -1,
    "cache_position": -1,
}
"""The dimension of a layer argument that runs over the row's tokens, counted from the end."""


class UnknownArgumentError(LookupError):
    """A tensor among a layer's arguments that is not known well enough to be cut to some tokens."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A mutable container as it was when a layer was given it."""

    origin: Any
    """The container itself, which tells it from others; its contents have changed since."""
    contents: Any
    """A copy of it, with containers inside kept likewise."""


def named(layer: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """A layer's hidden states and its other arguments, by the names of its own forward, kept as they are now."""
    names = _names(layer)
    given = {**dict(zip(names, positional, strict=False)), **keywords}
    if not names or len(given) != len(positional) + len(keywords):
        raise UnknownArgumentError(f"{type(layer).__name__} is given arguments that its forward does not name")
    hidden = given.pop(names[0])
    return hidden, {name: keep(argument) for name, argument in given.items()}


def _names(layer: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # Of the class: what stands on the instance (accelerate's hooks) takes whatever comes.
    parameters = inspect.signature(type(layer).forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds][1:]


def keep(argument: Any) -> Any:
    """The argument with every mutable container in it kept as it is now; tensors are nobody's to change."""
    if isinstance(argument, MutableMapping):
        contents = copy(argument)  # keeps a defaultdict one
        contents.update((name, keep(value)) for name, value in argument.items())
        return Kept(argument, contents)
    if isinstance(argument, list):
        return Kept(argument, [keep(value) for value in argument])
    if isinstance(argument, tuple) and not hasattr(argument, "_fields"):
        return tuple(keep(value) for value in argument)
    return argument


class Copies:
    """The containers of one replay: one copy of each, whichever layers are given it."""

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}

    def of(self, arguments: Arguments) -> dict[str, Any]:
        """A layer's arguments, with this replay's containers."""
        return {name: self._copy(argument) for name, argument in arguments.items()}

    def fork(self) -> Copies:
        """Copies of the containers as they are now, for a run whose writing is not to be seen."""
        forked = Copies()
        forked._copies = {origin: Copies()._copy(keep(container)) for origin, container in self._copies.items()}
        return forked

    def complete(self, arguments: Arguments) -> None:
        """Add to this replay's mappings what the captured run had in them when the next layer was given them.

        For a layer that did not write itself, since its attention was not run.
        """
        for argument in arguments.values():
            if isinstance(argument, Kept) and isinstance(argument.contents, MutableMapping):
                own = self._copy(argument)
                for name, value in argument.contents.items():
                    if name not in own:
                        own[name] = self._copy(value)

    def _copy(self, argument: Any) -> Any:
        if isinstance(argument, tuple) and not hasattr(argument, "_fields"):
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
    """The arguments for the wanted tokens only.

    Raises:
        UnknownArgumentError: an argument's token dimension is not known.
    """
    found: Arguments = {}
    for name, argument in arguments.items():
        parts = argument if isinstance(argument, tuple) else (argument,)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        dimension = TOKEN_DIMENSION.get(name)
        if not tensors:
            found[name] = argument
            continue
        if dimension is None or any(part.shape[dimension] != n_tokens for part in tensors):
            raise UnknownArgumentError(f"which dimension of {name} runs over the tokens is not known")
        picked = tuple(
            part.index_select(dimension, wanted.to(part.device)) if isinstance(part, Tensor) else part for part in parts
        )
        found[name] = picked if isinstance(argument, tuple) else picked[0]
    return found

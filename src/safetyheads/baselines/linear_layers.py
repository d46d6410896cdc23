"""The weights that baselines edit: linear layers of the decoder. Owns how they are found, edited and put back.

It refuses to know why a weight is changed. Every method that edits weights goes through :func:`edited`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safetyheads.errors import SafetyheadsError, UnsupportedModelError
from safetyheads.model.loading import refuse_wrapped

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


EDITS = "baselines edit"
"""What the refusal of weights that are not plain begins with."""
# What layers hold beside linear maps, small and edited by no method: embeddings, and convolutions over a few tokens.
_LEFT_ALONE = (nn.Embedding, nn.Conv1d)


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """One linear map of a decoder layer: tokens [n_tokens, d_in] to [n_tokens, d_out]."""

    layer: int
    """Decoder layer, counted from 0."""
    name: str
    """Within the decoder layer, such as ``mlp.down_proj``."""
    module: nn.Module
    """Where its weight is."""

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in], a view; GPT-2's family keeps it transposed."""
        weight: Any = self.module.weight
        return weight.detach().T if self.is_transposed else weight.detach()

    @property
    def is_transposed(self) -> bool:
        """Whether the module keeps [d_in, d_out]."""
        return isinstance(self.module, Conv1D)

    @property
    def d_out(self) -> int:
        """Width of what it gives."""
        return self.weight.shape[0]

    @property
    def d_in(self) -> int:
        """Width of what it is given."""
        return self.weight.shape[1]

    @property
    def n_weights(self) -> int:
        """Entries of W."""
        return self.weight.numel()


Weights: TypeAlias = Mapping[LinearLayer, Tensor]
"""Linear layer -> another W [d_out, d_in] for it."""


def linear_layers(engine: Engine) -> tuple[LinearLayer, ...]:
    """Every linear layer of the decoder layers, layer by layer, in the modules' order.

    Raises:
        InputError: weights are not plain numbers in memory.
        UnsupportedModelError: a decoder layer has matrices that are no linear layer's, such as stacked experts.
    """
    refuse_wrapped("the model", engine.model, EDITS)
    found = []
    for number, layer in enumerate(engine.architecture.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                found.append(LinearLayer(number, name, module))
            elif not isinstance(module, _LEFT_ALONE):
                matrices = [own for own, tensor in module.named_parameters(recurse=False) if tensor.ndim > 1]
                if matrices:
                    where = ".".join(part for part in (name, matrices[0]) if part)
                    raise UnsupportedModelError(
                        f"{engine.architecture.family}: {where} of layer {number} is no linear layer's weight, so "
                        "methods that edit linear layers would leave part of the model out"
                    )
    return tuple(found)


@contextmanager
def edited(engine: Engine, weights: Weights) -> Iterator[None]:
    """Within, these linear layers have other weights; the very tensors that stood there are put back after."""
    before = [(linear.module, linear.module._parameters["weight"]) for linear in weights]
    with engine.weights_changed():
        try:
            for linear, weight in weights.items():
                put(linear, weight)
            yield
        finally:
            for module, parameter in before:
                module._parameters["weight"] = parameter


def put(linear: LinearLayer, weight: Tensor) -> None:
    """Put W [d_out, d_in] in place of a linear layer's, in its dtype and on its device; :func:`edited` undoes it."""
    own = linear.weight
    kept = weight.T if linear.is_transposed else weight
    fresh = kept.to(own.device, own.dtype).contiguous()
    linear.module._parameters["weight"] = nn.Parameter(fresh, requires_grad=False)


def at_work(engine: Engine, make: Callable[[], Weights]) -> Callable[[], Any]:
    """What an intervention puts to work: weights made when they are first needed, of the model that was learned from.

    Args:
        engine: whose weights are edited.
        make: makes them, or gives those that :func:`latest` kept.
    """
    learned_from = engine.weights_version

    @contextmanager
    def working() -> Iterator[None]:
        if engine.weights_version is not learned_from:
            raise SafetyheadsError("the model's weights are not those the method learned from; learn again on these")
        with edited(engine, make()):
            yield

    return working


def latest(make: Callable[[float], Weights]) -> Callable[[float], Weights]:
    """``make``, with what it made last kept: a sweep over a large model must not hold every strength's weights."""
    kept: dict[float, Weights] = {}

    def made(strength: float) -> Weights:
        if strength not in kept:
            kept.clear()  # before the next are made: the peak is one strength's weights beside the model
            with torch.no_grad():
                kept[strength] = make(strength)
        return kept[strength]

    return made

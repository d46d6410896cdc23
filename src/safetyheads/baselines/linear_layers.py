"""Finds, calibrates and edits the linear layers of a decoder, for baselines that change weights.

Calibration keeps X^T X of each layer's inputs X [n_tokens, d_in] and never X, so memory does not grow with the text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safetyheads.answers.decoding import end_tokens
from safetyheads.baselines.base import Intervention, inputs_seen
from safetyheads.errors import SafetyheadsError, UnsupportedModelError
from safetyheads.model.engine import Engine
from safetyheads.model.loading import refuse_wrapped
from safetyheads.model.packing import TokenSequence, left_padded
from safetyheads.model.replay import hooked

EDITS = "baselines edit"
"""Begins the error about weights that are not plain numbers."""
ACCUMULATED = torch.float64
"""Dtype of X^T X and of all that is solved with it."""
# Per batch of calibration text; beyond this, matrix products gain nothing from taller inputs.
_TOKENS_AT_ONCE = 4096
# Small modules with weights beside the linear maps that no method edits: embeddings, convolutions over a few tokens.
_LEFT_ALONE = (nn.Embedding, nn.Conv1d)


class LinearLayer(NamedTuple):
    """One linear map of a decoder layer: tokens [n_tokens, d_in] to [n_tokens, d_out]."""

    layer: int
    """Decoder layer, counted from 0."""
    name: str
    """Within the decoder layer, such as ``mlp.down_proj``."""
    module: nn.Module
    """The module that holds the weight."""

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
        """Width of its output."""
        return self.weight.shape[0]

    @property
    def d_in(self) -> int:
        """Width of its input."""
        return self.weight.shape[1]


Weights: TypeAlias = Mapping[LinearLayer, Tensor]
"""Linear layer -> a new W [d_out, d_in] for it."""
Edit: TypeAlias = Callable[[LinearLayer, Mapping[str, Tensor]], Tensor]
"""Makes a linear layer's new W [d_out, d_in] from its X^T X over each named text."""
TextBatch: TypeAlias = tuple[dict[str, Any], Tensor]
"""Arguments of a decoder or a whole model, and which of their tokens count: bool [n_rows, longest]."""


def linear_layers(engine: Engine) -> tuple[LinearLayer, ...]:
    """Every linear layer of the decoder layers, in order; refused where they have other matrices, as experts."""
    refuse_wrapped("the model", engine.model, EDITS)
    linears = []
    for number, layer in enumerate(engine.architecture.layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                linears.append(LinearLayer(number, name, module))
            elif not isinstance(module, _LEFT_ALONE):
                for matrix, tensor in module.named_parameters(recurse=False):
                    if tensor.ndim > 1:
                        raise UnsupportedModelError(
                            f"{engine.architecture.family}: {f'{name}.{matrix}'.lstrip('.')} of layer {number} is no "
                            "linear layer's weight, so methods that edit linear layers would miss part of the model"
                        )
    return tuple(linears)


def by_layer(linears: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """The linear layers of each decoder layer."""
    return [list(members) for _, members in groupby(linears, key=lambda linear: linear.layer)]


@contextmanager
def edited(engine: Engine, weights: Weights) -> Iterator[None]:
    """Within, these linear layers have other weights; after it, the same tensor objects as before."""
    before = [(linear.module, linear.module._parameters["weight"]) for linear in weights]
    with engine.weights_changed():
        try:
            put(weights)
            yield
        finally:
            for module, parameter in before:
                module._parameters["weight"] = parameter


def put(weights: Weights) -> None:
    """Replace linear layers' W, in their dtype and on their device; :func:`edited` undoes it."""
    for linear, weight in weights.items():
        kept = weight.T if linear.is_transposed else weight
        fresh = kept.to(linear.weight.device, linear.weight.dtype).contiguous()
        linear.module._parameters["weight"] = nn.Parameter(fresh, requires_grad=False)


def edit_layer_by_layer(engine: Engine, texts: Mapping[str, Sequence[TokenSequence]], edit: Edit) -> Weights:
    """New weights of every linear layer; later decoder layers are calibrated on the outputs of edited earlier ones.

    Within a decoder layer all weights are made from one run before any is replaced, as Wanda, SparseGPT and ActSVD do.
    The model's own weights are restored before this returns.
    """
    linears = linear_layers(engine)
    weights: dict[LinearLayer, Tensor] = {}
    with edited(engine, {linear: linear.weight for linear in linears}):
        for layer in by_layer(linears):
            grams = {name: gram_matrices(engine, layer, text) for name, text in texts.items()}
            made: dict[LinearLayer, Tensor] = {}
            for linear in layer:
                of_texts = {name: of_text[linear] for name, of_text in grams.items() if linear in of_text}
                if len(of_texts) == len(texts):
                    made[linear] = edit(linear, of_texts).to(linear.weight.dtype)
            put(made)
            weights |= made
    return weights


def edits(
    engine: Engine, setting: str, make: Callable[[float], Weights], n_parameters: Callable[[float], int]
) -> Callable[[float], Intervention]:
    """Makes interventions that edit linear layers; their weights are made when first needed.

    ``setting`` is the strength in words, a format string of ``strength``.
    """
    learned_from, latest = engine.weights_version, dict[float, Weights]()

    @contextmanager
    def at_work(strength: float) -> Iterator[None]:
        if engine.weights_version is not learned_from:
            raise SafetyheadsError("the model's weights are not those the method learned from; learn again on these")
        if strength not in latest:
            latest.clear()  # first: a large model's memory must not hold two strengths' weights
            with torch.no_grad():
                latest[strength] = make(strength)
        with edited(engine, latest[strength]):
            yield

    def intervention(strength: float) -> Intervention:
        worded = setting.format(strength=strength)
        return Intervention(worded, strength, n_parameters(strength), partial(at_work, strength))

    return intervention


def batches(engine: Engine, text: Sequence[TokenSequence]) -> Iterator[TextBatch]:
    """Sequences of similar length together; only of equal length where padding is not exact on this model."""

    def length(sequence: TokenSequence) -> int:
        return len(sequence.token_ids)

    order, padding = sorted(text, key=length), next(iter(end_tokens(engine)), 0)
    for run in [order] if engine.capabilities.pads else [list(same) for _, same in groupby(order, key=length)]:
        together = max(1, _TOKENS_AT_ONCE // length(run[-1]))
        for start in range(0, len(run), together):
            members = run[start : start + together]
            padded = left_padded([member.token_ids for member in members], padding, engine.device)
            n_counted = torch.tensor([[member.n_wanted] for member in members])
            counted = torch.arange(padded["input_ids"].shape[1]).flip(0) < n_counted  # by places from the end
            yield {**padded, "use_cache": False}, counted.to(engine.device)


class _LastLayerRan(Exception):
    """Leaves the decoder after the last layer that is needed."""


@torch.no_grad()
def see_counted(
    engine: Engine, linears: Sequence[LinearLayer], batch: TextBatch, see: Callable[[LinearLayer, Tensor], None]
) -> None:
    """Runs the batch; calls ``see`` with each linear layer and its inputs at the counted tokens [n_counted, d_in]."""
    arguments, counted = batch

    def see_all(number: int, given: Tensor) -> None:
        see(linears[number], given.reshape(*counted.shape, -1)[counted.to(given.device)])

    def stop(*_: Any) -> None:
        raise _LastLayerRan

    last = engine.architecture.layers[max(linear.layer for linear in linears)].register_forward_hook(stop)
    with hooked(last), inputs_seen([linear.module for linear in linears], see_all), suppress(_LastLayerRan):
        engine.architecture.decoder(**on_device(engine, arguments))


def on_device(engine: Engine, arguments: Mapping[Any, Any]) -> dict[Any, Any]:
    """The arguments with all tensors on the engine's device."""
    return {name: value.to(engine.device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def gram_matrices(
    engine: Engine, linears: Sequence[LinearLayer], text: Sequence[TokenSequence]
) -> dict[LinearLayer, Tensor]:
    """X^T X (float64 [d_in, d_in]) of each linear layer over the counted tokens, with the weights of now.

    Layers that no token passed are left out.
    """
    sums: dict[LinearLayer, Tensor] = {}

    def add(linear: LinearLayer, given: Tensor) -> None:
        inputs = given.to(ACCUMULATED)
        product = inputs.T @ inputs  # [d_in, d_in]
        sums[linear] = sums[linear].add_(product) if linear in sums else product

    for batch in batches(engine, text):
        see_counted(engine, linears, batch, add)
    return sums

"""Attention swap (Fig 6a): one checkpoint's attention at work in another, in memory. Owns what may be swapped and how
it is put back; writes nothing to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from safetyheads.architectures import Architecture, describe
from safetyheads.engine import Engine
from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.loading import quantisation
from safetyheads.placement import is_split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a config says of how attention works beside its weights: under other settings the same weights attend otherwise.
_ATTENTION_SETTINGS = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "layer_types",
    "attention_chunk_size",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
    "attention_multiplier",
    "no_rope_layers",
    "use_qk_norm",
)
_SWAPPED = "_safetyheads_swapped"


@contextmanager
def swapped_attention(
    engine: Engine, donor: Engine | PreTrainedModel, layers: Iterable[int] | None = None
) -> Iterator[PreTrainedModel]:
    """The engine's model with the donor's attention; as it was, bit for bit, after.

    All that an attention module holds is taken over: W_q, W_k, W_v and W_o with their biases, norms of queries and
    keys, sinks. Scores, answers and :meth:`Engine.ablated` work within as ever, on the model as it then is; scorers
    that were made outside refuse to. A swap within a swap replaces its layers until it ends.

    Args:
        engine: whose model gets another attention.
        donor: an engine, or a plain model, of the same family and shape; it is left as it is.
        layers: which layers' attention; by default that of all.

    Raises:
        InputError: families, shapes, attention settings, dtypes or vocabularies differ, or weights are not plain.
        SafetyheadsError: the donor has another model's attention itself at the moment.
    """
    theirs = donor.model if isinstance(donor, Engine) else donor
    _refuse_unlike(engine, donor)
    chosen = _chosen(engine, layers)
    model, given = engine.model, describe(theirs)
    pairs = [(ours, other) for layer in chosen for ours, other in _modules(engine.architecture, given, layer)]
    before = [(ours, dict(ours._parameters), dict(ours._buffers)) for ours, _ in pairs]
    setattr(model, _SWAPPED, getattr(model, _SWAPPED, 0) + 1)
    engine.weights_version, version = object(), engine.weights_version
    try:
        for ours, other in pairs:
            _take_over(ours._parameters, other._parameters)
            _take_over(ours._buffers, other._buffers)
        yield model
    finally:
        # The very tensors that stood there: nothing was computed or copied, so nothing can have changed.
        for ours, parameters, buffers in before:
            ours._parameters.update(parameters)
            ours._buffers.update(buffers)
        setattr(model, _SWAPPED, getattr(model, _SWAPPED) - 1)
        engine.weights_version = version


def _take_over(own: dict[str, Any], others: dict[str, Any]) -> None:
    """Put the donor's tensors in the place of a module's: the very same, or copies on the device where they work."""
    for name, tensor in others.items():
        here: Tensor | None = own.get(name)
        if tensor is None or here is None or tensor.device == here.device:
            own[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            own[name] = nn.Parameter(tensor.detach().to(here.device), requires_grad=False)
        else:
            own[name] = tensor.to(here.device)


def _modules(ours: Architecture, theirs: Architecture, layer: int) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules of a layer's attention, each beside the donor's."""
    own, other = ours.attentions[layer], theirs.attentions[layer]
    if own is None or other is None:
        return
    for name, module in own.named_modules():
        yield module, other.get_submodule(name)


def _chosen(engine: Engine, layers: Iterable[int] | None) -> tuple[int, ...]:
    there = engine.architecture.with_heads
    chosen = there if layers is None else tuple(sorted(set(layers)))
    for layer in chosen:
        if layer not in there:
            raise InputError(
                f"layer {layer} has no attention to swap: the model's layers with heads are {_ranges(there)}"
            )
    return chosen


def _ranges(layers: tuple[int, ...]) -> str:
    """``0-3``, or each by its number where some are left out."""
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole else ", ".join(map(str, layers))


def _refuse_unlike(engine: Engine, donor: Engine | PreTrainedModel) -> None:
    """Refuse two models between which attention cannot be exchanged, by what differs first."""
    ours, theirs = engine.model, donor.model if isinstance(donor, Engine) else donor
    if theirs is ours:
        raise InputError("the donor is the model itself; a swap needs two checkpoints")
    if getattr(theirs, _SWAPPED, 0):
        raise SafetyheadsError("the donor has another model's attention at the moment; end that swap first")
    families = ours.config.model_type, theirs.config.model_type
    if families[0] != families[1]:
        raise InputError(f"attention cannot be swapped between families: {families[0]} and {families[1]}")
    for name, model in (("the model", ours), ("the donor", theirs)):
        _refuse_wrapped(name, model)
    if ours.dtype != theirs.dtype:
        raise InputError(f"the model is loaded in {ours.dtype}, the donor in {theirs.dtype}; load both in one dtype")
    _refuse_other_shapes(engine.architecture, describe(theirs))
    _refuse_other_settings(ours, theirs)
    if isinstance(donor, Engine) and engine.tokenizer.get_vocab() != donor.tokenizer.get_vocab():
        raise InputError("the tokenizers of model and donor differ, so their tokens mean different things")


def _refuse_wrapped(name: str, model: PreTrainedModel) -> None:
    """Refuse models whose attention is more than its plain weights."""
    method = quantisation(model)
    if method is not None:
        raise InputError(f"{name} is quantised ({method}); attention is swapped between plain weights only")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{name} has an adapter on it; attention is swapped between plain weights only, so merge it first"
        )
    if is_split(model):
        raise InputError(f"{name} is split over processes; attention is swapped between whole weights only")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(f"{name} is offloaded; attention is swapped between weights in memory only")


def _refuse_other_shapes(ours: Architecture, theirs: Architecture) -> None:
    if ours.n_layers != theirs.n_layers:
        raise InputError(f"the model has {ours.n_layers} layers, the donor {theirs.n_layers}")
    if ours.vocabulary_size != theirs.vocabulary_size:
        raise InputError(f"the model has {ours.vocabulary_size} tokens, the donor {theirs.vocabulary_size}")
    for layer, shapes in enumerate(zip(ours.shapes, theirs.shapes, strict=True)):
        if shapes[0] != shapes[1]:
            raise InputError(f"the heads of layer {layer} differ: {shapes[0]} in the model, {shapes[1]} in the donor")
        sizes = [
            {name: tuple(tensor.shape) for name, tensor in attention.state_dict().items()} if attention else {}
            for attention in (ours.attentions[layer], theirs.attentions[layer])
        ]
        if sizes[0] != sizes[1]:
            name = min(name for name in {*sizes[0], *sizes[1]} if sizes[0].get(name) != sizes[1].get(name))
            there = [str(list(each[name])) if name in each else "absent" for each in sizes]
            raise InputError(f"{name} of layer {layer} is {there[0]} in the model, {there[1]} in the donor")


def _refuse_other_settings(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    configs = [model.config.get_text_config(decoder=True) for model in (ours, theirs)]
    for name in _ATTENTION_SETTINGS:
        values: list[Any] = [getattr(config, name, None) for config in configs]
        if values[0] != values[1]:
            raise InputError(f"{name} of the attention is {values[0]} in the model, {values[1]} in the donor")

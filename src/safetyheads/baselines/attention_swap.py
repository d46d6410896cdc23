"""Attention swap (Fig 6a): puts one checkpoint's attention to work in another, in memory only."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.model.architecture import LENGTH_DEPENDENT_ROPES, Architecture, describe, of_layer
from safetyheads.model.engine import Engine
from safetyheads.model.loading import refuse_wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Config fields that change attention from outside its modules: positions and masks.
_SETTINGS_AROUND = (
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "sliding_window",
    "layer_types",
    "attention_chunk_size",
    "no_rope_layers",
    "use_bidirectional_attention",
)
# Attributes that change no number here: nothing is dropped outside training, dtypes and heads are compared apart, and
# the longest sequence matters only to RoPE that depends on it, which is compared with RoPE.
_IDLE = ("training", "dtype", "max_position_embeddings", "max_seq_len_cached", "inplace", "layer_idx")
_IDLE_PARTS = ("dropout", "pdrop")
_PLAIN = (bool, int, float, str, type(None))
# Counts the swaps that are in force on a model.
_SWAPPED = "_safetyheads_swapped"


@contextmanager
def swapped_attention(
    engine: Engine, donor: Engine | PreTrainedModel, layers: Iterable[int] | None = None
) -> Iterator[PreTrainedModel]:
    """The engine's model with the donor's attention; restored bit for bit after.

    Everything that an attention module holds is taken over: W_q, W_k, W_v and W_o with their biases, norms of queries
    and keys, sinks. Scores, answers and :meth:`Engine.ablated` work inside on the swapped model; scorers that were made
    outside refuse to. A swap inside a swap replaces its layers until it ends.

    The donor is an engine or a plain model of the same family and shape; by default all ``layers`` are swapped.

    Raises:
        InputError: families, shapes, attention settings, dtypes or vocabularies differ, or weights are not plain.
        SafetyheadsError: the donor has another model's attention at the moment.
    """
    donor_model = donor.model if isinstance(donor, Engine) else donor
    _refuse_unlike(engine, donor, donor_model)
    model, theirs = engine.model, describe(donor_model)
    pairs = [pair for layer in _chosen(engine, layers) for pair in _modules(engine.architecture, theirs, layer)]
    before = [(module, dict(module._parameters), dict(module._buffers)) for module, _ in pairs]
    setattr(model, _SWAPPED, getattr(model, _SWAPPED, 0) + 1)
    with engine.weights_changed():
        try:
            for module, other in pairs:
                _take_over(module._parameters, other._parameters)
                _take_over(module._buffers, other._buffers)
            yield model
        finally:
            # The same tensor objects: nothing was computed or copied, so nothing can have changed.
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            setattr(model, _SWAPPED, getattr(model, _SWAPPED) - 1)


def _take_over(tensors: dict[str, Any], donated: dict[str, Any]) -> None:
    """Replace a module's tensors by the donor's, or by copies on the device where the module's are."""
    for name, tensor in donated.items():
        replaced: Tensor | None = tensors.get(name)
        if tensor is None or replaced is None or tensor.device == replaced.device:
            tensors[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            tensors[name] = nn.Parameter(tensor.detach().to(replaced.device), requires_grad=False)
        else:
            tensors[name] = tensor.to(replaced.device)


def _modules(ours: Architecture, theirs: Architecture, layer: int) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules of a layer's attention, each with the donor's."""
    attention, other = ours.attentions[layer], theirs.attentions[layer]
    if attention is not None and other is not None:
        for name, module in attention.named_modules():
            yield module, other.get_submodule(name)


def _chosen(engine: Engine, layers: Iterable[int] | None) -> tuple[int, ...]:
    with_heads = engine.architecture.with_heads
    chosen = with_heads if layers is None else tuple(sorted(set(layers)))
    for layer in chosen:
        if layer not in with_heads:
            is_range = with_heads == tuple(range(with_heads[0], with_heads[-1] + 1))
            named = f"{with_heads[0]}-{with_heads[-1]}" if is_range else ", ".join(map(str, with_heads))
            raise InputError(f"layer {layer} has no attention to swap: the model's layers with heads are {named}")
    return chosen


def _refuse_unlike(engine: Engine, donor: Engine | PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Refuse two models between which attention cannot be exchanged; the error names the first difference."""
    ours = engine.model
    if theirs is ours:
        raise InputError("the donor is the model itself; a swap needs two checkpoints")
    if getattr(theirs, _SWAPPED, 0):
        raise SafetyheadsError("the donor has another model's attention at the moment; end that swap first")
    families = ours.config.model_type, theirs.config.model_type
    if families[0] != families[1]:
        raise InputError(f"attention cannot be swapped between families: {families[0]} and {families[1]}")
    for name, model in (("the model", ours), ("the donor", theirs)):
        refuse_wrapped(name, model, "attention is swapped between")
    if ours.dtype != theirs.dtype:
        raise InputError(f"the model is loaded in {ours.dtype}, the donor in {theirs.dtype}; load both in one dtype")
    architectures = engine.architecture, describe(theirs)
    _refuse_other_shapes(*architectures)
    _refuse_other_settings(*architectures, (ours, theirs))
    if isinstance(donor, Engine) and engine.tokenizer.get_vocab() != donor.tokenizer.get_vocab():
        raise InputError("the tokenizers of model and donor differ, so their tokens mean different things")


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
        for name in sorted({*sizes[0], *sizes[1]}):
            said = [str(list(size[name])) if name in size else "absent" for size in sizes]
            if said[0] != said[1]:
                raise InputError(f"{name} of layer {layer} is {said[0]} in the model, {said[1]} in the donor")


def _refuse_other_settings(ours: Architecture, theirs: Architecture, models: tuple[PreTrainedModel, ...]) -> None:
    """Refuse settings under which the same weights would be another attention; the error names the first one."""
    whole = [model.config.get_text_config(decoder=True) for model in models]
    for layer in ours.with_heads:
        configs = [of_layer(config, layer) for config in whole]
        names = list(_SETTINGS_AROUND)
        if any(_rope_depends_on_length(config) for config in configs):
            names.append("max_position_embeddings")
        _refuse_unequal("the attention", [{name: getattr(config, name, None) for name in names} for config in configs])
        for modules in _modules(ours, theirs, layer):
            where, kind = f"the attention of layer {layer}", type(modules[0])
            read = _read_when_run(kind)  # type: ignore[arg-type]
            _refuse_unequal(where, [_config_settings(config, read) for config in configs])
            _refuse_unequal(where, [_settings(module) for module in modules])


def _refuse_unequal(where: str, settings: Sequence[Mapping[str, Any]]) -> None:
    for name in sorted({*settings[0], *settings[1]}):
        values = [setting.get(name) for setting in settings]
        if values[0] != values[1]:
            raise InputError(f"{name} of {where} is {values[0]} in the model, {values[1]} in the donor")


def _rope_depends_on_length(config: Any) -> bool:
    rope: Any = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(part.get("rope_type") in (*LENGTH_DEPENDENT_ROPES, "yarn") for part in parts)


def _config_settings(config: Any, names: Sequence[str]) -> dict[str, Any]:
    """The config's values of these names; a method of that name is no setting."""
    values = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, (*_PLAIN, list, dict))}


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's numbers, switches and words beside its weights: scales, epsilons, clips, kinds of layers."""
    if isinstance(module, nn.Dropout):
        return {}
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and _matters(name)}


def _matters(name: str) -> bool:
    return not name.startswith("_") and name not in _IDLE and not any(part in name for part in _IDLE_PARTS)


@lru_cache
def _read_when_run(kind: Any) -> tuple[str, ...]:
    """Config fields that a module's code may read while it runs; those read in ``__init__`` are on the module."""
    methods: list[Any] = [
        inspect.unwrap(method)
        for base in kind.__mro__
        if base is not nn.Module and issubclass(base, nn.Module)
        for name, method in vars(base).items()
        if inspect.isfunction(method) and name != "__init__"
    ]
    codes = [method.__code__ for method in methods if "config" in method.__code__.co_names]
    words = {word for code in codes for word in (*code.co_names, *code.co_consts) if isinstance(word, str)}
    return tuple(sorted(word for word in words if word.isidentifier() and _matters(word)))

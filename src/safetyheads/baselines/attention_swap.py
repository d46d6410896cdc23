"""Attention swap (Fig 6a): one checkpoint's attention at work in another, in memory. Owns what may be swapped and how
it is put back; writes nothing to disk.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
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

# What a config says of how attention works beside its weights, outside of its modules: positions and masks.
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
# What changes no number here: nothing is dropped outside training, dtypes and heads are compared by themselves, and
# how long sequences may be counts where RoPE depends on it alone, which is looked at beside RoPE.
_IDLE = ("training", "dtype", "max_position_embeddings", "max_seq_len_cached", "inplace", "layer_idx")
_IDLE_PARTS = ("dropout", "pdrop")
_PLAIN = (bool, int, float, str, type(None))
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
    with engine.weights_changed():
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
        refuse_wrapped(name, model, "attention is swapped between")
    if ours.dtype != theirs.dtype:
        raise InputError(f"the model is loaded in {ours.dtype}, the donor in {theirs.dtype}; load both in one dtype")
    given = describe(theirs)
    _refuse_other_shapes(engine.architecture, given)
    _refuse_other_settings(engine.architecture, given, (ours, theirs))
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
        if sizes[0] != sizes[1]:
            name = min(name for name in {*sizes[0], *sizes[1]} if sizes[0].get(name) != sizes[1].get(name))
            there = [str(list(each[name])) if name in each else "absent" for each in sizes]
            raise InputError(f"{name} of layer {layer} is {there[0]} in the model, {there[1]} in the donor")


def _refuse_other_settings(ours: Architecture, theirs: Architecture, models: tuple[PreTrainedModel, ...]) -> None:
    """Refuse attention that the same weights would make another one, by the first setting that differs."""
    configs = [model.config.get_text_config(decoder=True) for model in models]
    for layer in ours.with_heads:
        own = [of_layer(config, layer) for config in configs]
        for name in _SETTINGS_AROUND:
            _refuse_unequal(name, "the attention", [getattr(config, name, None) for config in own])
        if any(_rope_depends_on_length(config) for config in own):
            lengths = [getattr(config, "max_position_embeddings", None) for config in own]
            _refuse_unequal("max_position_embeddings", "the attention", lengths)
        for modules in _modules(ours, theirs, layer):
            where = f"the attention of layer {layer}"
            kind: Any = type(modules[0])
            for name in _read_when_run(kind):
                _refuse_unequal(name, where, [_plain(getattr(config, name, None)) for config in own])
            settings = [_settings(module) for module in modules]
            for name in sorted({*settings[0], *settings[1]}):
                _refuse_unequal(name, where, [each.get(name) for each in settings])


def _rope_depends_on_length(config: Any) -> bool:
    rope: Any = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(inner for inner in rope.values() if isinstance(inner, dict))]
    return any(one.get("rope_type") in (*LENGTH_DEPENDENT_ROPES, "yarn") for one in each)


def _refuse_unequal(name: str, where: str, values: list[Any]) -> None:
    if values[0] != values[1]:
        raise InputError(f"{name} of {where} is {values[0]} in the model, {values[1]} in the donor")


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers, switches and words that a module holds beside its weights: scales, epsilons, clips, kinds of layers."""
    if isinstance(module, nn.Dropout):
        return {}
    return {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and _counts(name)}


def _plain(value: Any) -> Any:
    """A config's value; what goes by the same name and is no setting (methods of the config) is None."""
    return value if isinstance(value, (*_PLAIN, list, dict)) else None


def _counts(name: str) -> bool:
    return not name.startswith("_") and name not in _IDLE and not any(part in name for part in _IDLE_PARTS)


@lru_cache
def _read_when_run(kind: Any) -> tuple[str, ...]:
    """Names of what a module's code may read of its config while it runs; what it reads when made stands on it."""
    methods: list[Any] = [
        inspect.unwrap(method)
        for base in kind.__mro__
        if base is not nn.Module and issubclass(base, nn.Module)
        for name, method in vars(base).items()
        if inspect.isfunction(method) and name != "__init__"
    ]
    codes = [method.__code__ for method in methods if "config" in method.__code__.co_names]
    words = {word for code in codes for word in (*code.co_names, *code.co_consts) if isinstance(word, str)}
    return tuple(sorted(word for word in words if word.isidentifier() and _counts(word)))

"""Attention swap (Fig 6a): puts one checkpoint's attention to work in another, in memory only."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.model.architecture import LENGTH_DEPENDENT_ROPES, Architecture, describe, methods_of, of_layer, ropes
from safetyheads.model.engine import Engine
from safetyheads.model.loading import refuse_wrapped

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
_BY_LENGTH = (*LENGTH_DEPENDENT_ROPES, "yarn")
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
    model, theirs, with_heads = engine.model, describe(donor_model), engine.architecture.with_heads
    chosen = with_heads if layers is None else tuple(sorted(set(layers)))
    if absent := [layer for layer in chosen if layer not in with_heads]:
        is_range = with_heads == tuple(range(with_heads[0], with_heads[-1] + 1))
        named = f"{with_heads[0]}-{with_heads[-1]}" if is_range else ", ".join(map(str, with_heads))
        raise InputError(f"layer {absent[0]} has no attention to swap: the model's layers with heads are {named}")
    pairs = [pair for layer in chosen for pair in _modules(engine.architecture, theirs, layer)]
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
    for name, tensor in donated.items():
        replaced: Tensor | None = tensors.get(name)
        tensors[name] = tensor
        if tensor is not None and replaced is not None and tensor.device != replaced.device:
            moved = tensor.detach().to(replaced.device)
            tensors[name] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved


def _modules(ours: Architecture, theirs: Architecture, layer: int) -> Iterator[tuple[nn.Module, nn.Module]]:
    attention, other = ours.attentions[layer], theirs.attentions[layer]
    if attention is not None and other is not None:
        for name, module in attention.named_modules():
            yield module, other.get_submodule(name)


def _refuse_unlike(engine: Engine, donor: Engine | PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Refuse models in which the same attention weights do not fit or would do something else; names what differs."""
    ours = engine.model
    if theirs is ours:
        raise InputError("the donor is the model itself; a swap needs two checkpoints")
    if getattr(theirs, _SWAPPED, 0):
        raise SafetyheadsError("the donor has another model's attention at the moment; end that swap first")
    families = ours.config.model_type, theirs.config.model_type
    _refuse_unequal("attention cannot be swapped between families: {} and {}", *families)
    for name, model in (("the model", ours), ("the donor", theirs)):
        refuse_wrapped(name, model, "attention is swapped between")
    _refuse_unequal("the model is loaded in {}, the donor in {}; load both in one dtype", ours.dtype, theirs.dtype)
    facts = engine.architecture, describe(theirs)
    _refuse_unequal("the model has {} layers, the donor {}", *(each.n_layers for each in facts))
    _refuse_unequal("the model has {} tokens, the donor {}", *(each.vocabulary_size for each in facts))
    for layer in range(facts[0].n_layers):
        shapes = (each.shapes[layer] for each in facts)
        _refuse_unequal(f"the heads of layer {layer} differ: {{}} in the model, {{}} in the donor", *shapes)
        states = [
            attention.state_dict() if attention else {} for attention in (each.attentions[layer] for each in facts)
        ]
        sizes = [{name: list(tensor.shape) for name, tensor in state.items()} for state in states]
        _refuse_other_settings(f"layer {layer}", sizes, absent="absent")
    whole = [model.config.get_text_config(decoder=True) for model in (ours, theirs)]
    for layer in facts[0].with_heads:
        configs = [of_layer(config, layer) for config in whole]
        kinds = {rope.get("rope_type") for config in configs for rope in ropes(config)}
        names = [*_SETTINGS_AROUND, *["max_position_embeddings"] * (not kinds.isdisjoint(_BY_LENGTH))]
        around = [{name: getattr(config, name, None) for name in names} for config in configs]
        _refuse_other_settings("the attention", around)
        for modules in _modules(*facts, layer):
            where, read = f"the attention of layer {layer}", _read_when_run(type(modules[0]))  # type: ignore[arg-type]
            given = [{name: getattr(config, name, None) for name in read} for config in configs]
            # A method of that name is no setting.
            plain = [{k: v for k, v in each.items() if isinstance(v, (*_PLAIN, list, dict))} for each in given]
            _refuse_other_settings(where, plain)
            # Numbers, switches and words beside the weights: scales, epsilons, clips, kinds of layers.
            beside = [{} if isinstance(module, nn.Dropout) else vars(module) for module in modules]
            plain = [{k: v for k, v in each.items() if isinstance(v, _PLAIN) and _matters(k)} for each in beside]
            _refuse_other_settings(where, plain)
    if isinstance(donor, Engine) and engine.tokenizer.get_vocab() != donor.tokenizer.get_vocab():
        raise InputError("the tokenizers of model and donor differ, so their tokens mean different things")


def _refuse_other_settings(where: str, settings: Sequence[Mapping[str, Any]], absent: str | None = None) -> None:
    for name in sorted({*settings[0], *settings[1]}):
        said = f"{name} of {where} is {{}} in the model, {{}} in the donor"
        _refuse_unequal(said, *(setting.get(name, absent) for setting in settings))


def _refuse_unequal(said: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise InputError(said.format(ours, theirs))


def _matters(name: str) -> bool:
    return not name.startswith("_") and name not in _IDLE and not any(part in name for part in _IDLE_PARTS)


@lru_cache
def _read_when_run(kind: type) -> tuple[str, ...]:
    """Config fields that a module's code may read while it runs; those read in ``__init__`` are on the module."""
    codes = [code for name, code in methods_of(kind) if name != "__init__" and "config" in code.co_names]
    words = {word for code in codes for word in (*code.co_names, *code.co_consts) if isinstance(word, str)}
    return tuple(sorted(word for word in words if word.isidentifier() and _matters(word)))

"""Finds a model's parts, by the names that families give them, and the shapes of its heads.

What is read here is a claim; :mod:`safetyheads.model.proofs` holds it against the user's own weights at load.
"""

import inspect
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from safetyheads.errors import UnsupportedModelError, one_line

# Where families keep their parts, by attribute; the first name that is there counts.
DECODER_NAMES = ("model", "language_model", "transformer", "decoder")  # should get_decoder give more (Llama 4)
LAYER_NAMES = ("layers", "h", "blocks")
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "mixer", "temporal_block")
QUERY_NAMES = ("q_proj", "q_b_proj")  # to queries alone; the second of two where they pass a low rank
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
FINAL_NORM_NAMES = tuple(
    "norm ln_f final_layernorm final_layer_norm final_norm norm_f embedding_norm layer_norm".split()  # noqa: SIM905
)
HEAD_COUNT_NAMES = ("num_heads", "num_attention_heads")
HEAD_WIDTH_NAMES = ("qk_head_dim", "head_dim", "head_size")  # need not be d_model / n_heads
VALUE_WIDTH_NAMES = ("v_head_dim", *HEAD_WIDTH_NAMES)  # another width where keys and values come from one latent (MLA)
STREAMS_FIRST_NAMES = ("altup_projections",)  # several residual streams, stacked before the batch (Gemma 3n)
# A config's widths of sliding windows and attention chunks, and which of them a layer of a type has.
WINDOW_NAMES = ("sliding_window", "attention_chunk_size", "attention_window_size")
WINDOW_OF_LAYER_TYPE: dict[str, str | None] = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
# A config's numbers of tokens beyond which attention has another temperature (Llama 4) or chooses its keys (DSA).
TURN_NAMES = ("floor_scale", "index_topk")
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")
"""RoPE types whose angles change once a row is longer than the model was trained on at first."""
SCALED_ROPES = ("linear", "dynamic", "yarn", "llama3", "longrope")
"""RoPE types whose ``factor`` tells how much further than their original length they reach."""

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # transformers' attention registry, by its name in every family's source


class HeadShape(NamedTuple):
    """The heads of one layer, as its attention module says."""

    n_heads: int
    n_kv_heads: int
    """Key and value heads."""
    d_head: int
    """Width of one head's query and key."""
    d_value: int
    """Width of one head's value and output."""
    window: int | None
    """Most keys that a token sees, itself included; None where it sees all before it."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Which quick paths were proved on a model; without one the engine takes the slow, plain path."""

    packs: bool = True
    """Several prompts may share a row."""
    segments: bool = True
    """Attention may be taken prompt by prompt, not over the whole row."""
    replays: bool = True
    """Layers may be run again from captured inputs."""
    prunes: bool = True
    """The last layer may be finished for the wanted tokens alone."""
    starts_late: bool = True
    """The first ablated layer may start from its heads' outputs."""
    plain_head: bool = True
    """Logits are the head applied to the normed state; else the model's own forward makes them."""
    caches: bool = True
    """Decoding with a cache gives what runs over all tokens give; else no answers are made."""
    pads: bool = True
    """Prompts of unequal length may share a batch, padded; else batches hold prompts of one length."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The parts of one model that the engine touches."""

    family: str
    """transformers' ``model_type``."""
    decoder: nn.Module
    """Token ids in, last hidden state out; without the language model head."""
    layers: tuple[nn.Module, ...]
    """Decoder layers, first to last."""
    attentions: tuple[nn.Module | None, ...]
    """The attention module of each layer; None where a layer mixes tokens in another way, and has no heads."""
    query_projections: tuple[nn.Module | None, ...]
    """Of each layer, None where queries have none of their own."""
    output_projections: tuple[nn.Module | None, ...]
    """What each layer does to its heads' outputs, None where no such module is known."""
    shapes: tuple[HeadShape | None, ...]
    """The heads of each layer; None where it has none."""
    final_norm: nn.Module
    """Applied to the residual stream after the last layer."""
    head: nn.Module
    """Hidden states to logits, before whatever the family does to its logits."""
    d_model: int
    """Width of the residual stream."""
    d_mlp: int
    """Inner width of the MLP, used to estimate memory only."""
    active_experts: float
    """Share of a layer's experts that a token is sent to; 1 where there are none."""
    vocabulary_size: int
    """Number of logits."""
    context_length: int | None
    """Longest sequence the positions allow, None where the config sets no bound."""
    windows: tuple[int, ...]
    """Distinct widths of sliding windows and attention chunks, empty where every token sees all before it."""
    turns: tuple[int, ...]
    """Row lengths beyond which attention acts in another way: temperatures, chosen keys, long-context RoPE."""
    batch_dimension: int
    """Of what layers are given; tokens are the dimension after it."""

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def with_heads(self) -> tuple[int, ...]:
        """Layers whose heads can be ablated, ascending."""
        return tuple(layer for layer, shape in enumerate(self.shapes) if shape is not None)

    @property
    def heads_by_layer(self) -> tuple[int, ...]:
        """Number of query heads in each layer, 0 where a layer has none."""
        return tuple(0 if shape is None else shape.n_heads for shape in self.shapes)

    @property
    def without_heads(self) -> tuple[int, ...]:
        """Layers that mix tokens in another way (linear attention, convolutions, state spaces), ascending."""
        return tuple(layer for layer, shape in enumerate(self.shapes) if shape is None)

    def _most(self, dimension: str) -> int:
        return max(getattr(shape, dimension) for shape in self.shapes if shape is not None)

    @property
    def n_heads(self) -> int:
        """Query heads of a layer; of the layer with most, where layers differ."""
        return self._most("n_heads")

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads of a layer, likewise."""
        return self._most("n_kv_heads")

    @property
    def d_head(self) -> int:
        """Width of one head's query, likewise."""
        return self._most("d_head")

    @property
    def head_parameters(self) -> dict[str, int]:
        """Parameters of one head, counted: its rows of W_q; and q, k, v, o, shared keys and values once a group."""
        query, output = self.d_model * self.d_head, self.d_model * self._most("d_value")
        return {"query": query, "all": query + output + (query + output) * self.n_kv_heads // self.n_heads}


def describe(model: PreTrainedModel) -> Architecture:
    """The parts of ``model``; a family that keeps one in an unknown place is refused, by name and part."""
    try:
        return _described(model)
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        kind = f"{model.config.model_type}: {type(model).__name__}"
        raise UnsupportedModelError(f"{kind} has a config that may be wrong: {one_line(error)}") from error


def _described(model: PreTrainedModel) -> Architecture:
    config = model.config.get_text_config(decoder=True)
    family = model.config.model_type
    decoder: Any = model.get_decoder()
    if not any(_first_named(part, LAYER_NAMES) for part in decoder.modules()):
        decoder = model  # get_decoder gives something else (ModernBERT's head)
    while _first_named(decoder, LAYER_NAMES) is None:  # some families' get_decoder gives a model around it
        decoder = _named(decoder, DECODER_NAMES, family, "decoder layers")
    layers = tuple(_named(decoder, LAYER_NAMES, family, "decoder layers"))
    attentions = _attentions(layers, family)
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{family}: the model has no language model head")
    shapes = tuple(
        None if attention is None else _shape(attention, config, layer) for layer, attention in enumerate(attentions)
    )
    d_mlp = getattr(of_layer(config, 0), "intermediate_size", None)  # a list where layers differ
    n_experts = _number(config, ("num_experts", "num_local_experts", "n_routed_experts"))
    return Architecture(
        family=family,
        decoder=decoder,
        layers=layers,
        attentions=attentions,
        query_projections=tuple(_first_named(attention, QUERY_NAMES) for attention in attentions),
        output_projections=tuple(_first_named(attention, OUTPUT_NAMES) for attention in attentions),
        shapes=shapes,
        final_norm=_named(decoder, FINAL_NORM_NAMES, family, "final norm"),
        head=head,
        d_model=config.hidden_size,
        d_mlp=(d_mlp[0] if isinstance(d_mlp, list | tuple) else d_mlp) or 4 * config.hidden_size,
        active_experts=(_number(config, ("num_experts_per_tok",)) or n_experts) / n_experts if n_experts else 1.0,
        vocabulary_size=head.weight.shape[0] if hasattr(head, "weight") else config.vocab_size,
        context_length=context_length(config),
        windows=_positive([*(getattr(config, name, None) for name in WINDOW_NAMES), *(s.window for s in shapes if s)]),
        turns=_turns(config),
        batch_dimension=1 if _first_named(decoder, STREAMS_FIRST_NAMES) is not None else 0,
    )


def _attentions(layers: tuple[nn.Module, ...], family: str) -> tuple[nn.Module | None, ...]:
    named = [_first_named(layer, ATTENTION_NAMES) for layer in layers]
    attentions = tuple(module if module is not None and _attends(module) else None for module in named)
    for number, (layer, attention) in enumerate(zip(layers, attentions, strict=True)):
        elsewhere = [] if attention is not None else [name for name, part in layer.named_modules() if _attends(part)]
        if elsewhere:
            why = f"computes attention in {elsewhere[0]}, an unknown place"
            if len(elsewhere) > 1:
                places = f"{len(elsewhere)} attentions ({', '.join(elsewhere)})"
                why = f"has {places}, so a layer and a number do not say which head"
            raise UnsupportedModelError(f"{family}: layer {number} {why}")
    if not any(attentions):
        kinds = sorted({type(module).__name__ for module in named if module is not None})
        what = f" (they have {', '.join(kinds)})" if kinds else ""
        raise UnsupportedModelError(
            f"{family}: no layer computes attention through transformers' attention registry{what}, so no ablation can "
            "be put into it"
        )
    identities = [id(module) for module in attentions if module is not None]
    if len(set(identities)) < len(identities):
        raise UnsupportedModelError(f"{family}: layers share one attention module, so a head has no layer of its own")
    return attentions


def methods_of(kind: type) -> Iterator[tuple[str, CodeType]]:
    """Name and code, without decorators, of each method that a module's class and its bases define."""
    for base in kind.__mro__:
        if base is not nn.Module and issubclass(base, nn.Module):
            methods = ((name, method) for name, method in vars(base).items() if inspect.isfunction(method))
            yield from ((name, inspect.unwrap(method).__code__) for name, method in methods)


def _attends(module: nn.Module) -> bool:
    """Whether the code of a module's class calls an attention function of transformers' registry."""
    return any(_REGISTRY in code.co_names for _, code in methods_of(type(module)))


def _shape(attention: nn.Module, config: Any, layer: int) -> HeadShape:
    layer_config = of_layer(config, layer)
    n_heads = _number(attention, HEAD_COUNT_NAMES) or layer_config.num_attention_heads
    groups = _number(attention, ("num_key_value_groups",))
    n_kv_heads = n_heads // groups if groups else getattr(layer_config, "num_key_value_heads", None) or n_heads
    width = config.hidden_size // n_heads
    # How far the layer's tokens see: by its type, else what its attention says, else the config.
    types = getattr(config, "layer_types", None) or ()
    if layer < len(types) and types[layer] in WINDOW_OF_LAYER_TYPE:
        name = WINDOW_OF_LAYER_TYPE[types[layer]]
        window = getattr(config, name, None) if name else None
    elif hasattr(attention, WINDOW_NAMES[0]):
        window = _number(attention, WINDOW_NAMES[:1])
    else:
        window = min(_positive(getattr(config, name, None) for name in WINDOW_NAMES), default=None)
    d_head, d_value = (_number(attention, names) or width for names in (HEAD_WIDTH_NAMES, VALUE_WIDTH_NAMES))
    return HeadShape(n_heads, n_kv_heads, d_head, d_value, window)


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def of_layer(config: Any, layer: int) -> Any:
    """The config of one layer; only some families' layers have one of their own."""
    by_layer = getattr(config, "per_layer_config", None)
    return by_layer[layer] if by_layer else config


def _named(parent: nn.Module, names: tuple[str, ...], family: str, what: str) -> Any:
    child = _first_named(parent, names)
    if child is None:
        raise UnsupportedModelError(f"{family}: no {what} under any of the names {', '.join(names)}")
    return child


def _first_named(parent: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    children = (getattr(parent, name, None) for name in names)
    return next((child for child in children if isinstance(child, nn.Module)), None)


def context_length(config: Any) -> int | None:
    """Longest sequence that the positions allow, None where the config sets no bound.

    A scaled RoPE reaches further than what it scales, which some configs give as ``max_position_embeddings``.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        return None
    reached = [longest]
    for rope in ropes(config):
        factor = rope.get("factor") if rope.get("rope_type") in SCALED_ROPES else None
        scales = isinstance(factor, int | float) and math.isfinite(factor)
        reached.append(int((_original_length(rope, config) or longest) * (factor if factor and scales else 1.0)))
    # Where layers differ, the shortest reach counts.
    return max(longest, min(reached[1:], default=longest))


def guessed_context(config: Any) -> str:
    """A note where nothing says whether the config's length is that before its RoPE was scaled; else empty."""
    given, reached = getattr(config, "max_position_embeddings", None), context_length(config)
    if given == reached or any(_original_length(rope, config) for rope in ropes(config)):
        return ""
    return (
        f"the context is taken for {reached} tokens, the config's {given} times its RoPE factor; where these hold the "
        "factor already, longer prompts are beyond what the model was trained for"
    )


def _turns(config: Any) -> tuple[int, ...]:
    """Where attention or RoPE changes with the length of a row."""
    lengths = [
        _original_length(rope, config) or getattr(config, "max_position_embeddings", None)
        for rope in ropes(config)
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPES
    ]
    return _positive([*(getattr(config, name, None) for name in TURN_NAMES), *lengths])


def ropes(config: Any) -> list[dict[str, Any]]:
    """RoPE parameters; some families have some of their own for each type of layer."""
    ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_type = [rope for rope in ropes.values() if isinstance(rope, dict)]
    return by_type or ([ropes] if ropes else [])


def _original_length(rope: dict[str, Any], config: Any) -> int | None:
    name = "original_max_position_embeddings"
    return next(iter(_positive((rope.get(name) or getattr(config, name, None),))), None)


def _positive(numbers: Iterable[Any]) -> tuple[int, ...]:
    return tuple(sorted({number for number in numbers if isinstance(number, int) and number > 0}))


@lru_cache
def family_supports_sdpa(module_name: str) -> bool:
    """Whether the family declares sdpa: a fact of the PreTrainedModel in the attention's source module."""
    source = sys.modules[module_name]
    declared = [
        value._supports_sdpa
        for value in vars(source).values()
        if isinstance(value, type) and hasattr(value, "_supports_sdpa") and value.__module__ == source.__name__
    ]
    return bool(declared) and all(declared)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the model's inputs belong: where its embedding runs, wherever that keeps its weight."""
    embedding = model.get_input_embeddings()
    return hooked_device(embedding) or embedding.weight.device


def hooked_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook brings a module's weights and inputs together; None where there is no hook."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # several in sequence, or the one
        place = getattr(part, "execution_device", None)
        if place is not None:
            return torch.device(place)
    return None

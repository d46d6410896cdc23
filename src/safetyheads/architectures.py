"""Where a model keeps its layers. Owns the names under which families file their parts; does no arithmetic.

What is read here is a claim; :mod:`safetyheads.proofs` holds it against the user's own weights at load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from safetyheads.errors import UnsupportedModelError

LAYER_NAMES = ("layers", "h", "blocks")
"""The decoder's module list of layers, by the names families use."""
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
"""A layer's attention module."""
QUERY_NAMES = ("q_proj",)
"""An attention's projection to queries alone."""
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""An attention's last projection, of its heads' outputs."""
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "final_norm")
"""The decoder's norm after its last layer."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The parts of one model that the engine touches."""

    family: str
    """transformers' ``model_type``."""
    decoder: nn.Module
    """Token ids in, last hidden state out; without the language model head."""
    layers: tuple[nn.Module, ...]
    """Decoder layers, first to last."""
    attentions: tuple[nn.Module, ...]
    """The attention module of each layer."""
    query_projections: tuple[nn.Module | None, ...]
    """Of each layer, None where queries have none of their own."""
    output_projections: tuple[nn.Module | None, ...]
    """What each layer does to its heads' outputs, None where no such module is known."""
    final_norm: nn.Module
    """Applied to the residual stream after the last layer."""
    head: nn.Module
    """Hidden states to logits, before whatever the family does to its logits."""
    n_heads: int
    """Query heads a layer."""
    n_kv_heads: int
    """Key and value heads a layer."""
    d_model: int
    """Width of the residual stream."""
    d_head: int
    """Width of one head's query."""
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

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def head_parameters(self) -> dict[str, int]:
        """Parameters of one head, counted: its rows of W_q; and q, k, v, o, shared keys and values once a group."""
        one = self.d_model * self.d_head
        return {"query": one, "all": 2 * one + 2 * one * self.n_kv_heads // self.n_heads}


def describe(model: PreTrainedModel) -> Architecture:
    """The parts of ``model``.

    Raises:
        UnsupportedModelError: a part is not where any known family keeps it; the message names the part.
    """
    config = model.config.get_text_config(decoder=True)
    family = model.config.model_type
    decoder = model.get_decoder()
    layers = _named(decoder, LAYER_NAMES, family, "decoder layers")
    attentions = tuple(
        _named(layer, ATTENTION_NAMES, family, f"attention of layer {i}") for i, layer in enumerate(layers)
    )
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{family}: the model has no language model head")
    n_heads = config.num_attention_heads
    return Architecture(
        family=family,
        decoder=decoder,
        layers=tuple(layers),
        attentions=attentions,
        query_projections=tuple(_first_named(attention, QUERY_NAMES) for attention in attentions),
        output_projections=tuple(_first_named(attention, OUTPUT_NAMES) for attention in attentions),
        final_norm=_named(decoder, FINAL_NORM_NAMES, family, "final norm"),
        head=head,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        d_model=config.hidden_size,
        d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        d_mlp=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        active_experts=_active_experts(config),
        vocabulary_size=head.weight.shape[0] if hasattr(head, "weight") else config.vocab_size,
        context_length=getattr(config, "max_position_embeddings", None),
        windows=_windows(config),
    )


def _named(parent: nn.Module, names: tuple[str, ...], family: str, what: str) -> Any:
    child = _first_named(parent, names)
    if child is None:
        raise UnsupportedModelError(f"{family}: no {what} under any of the names {', '.join(names)}")
    return child


def _first_named(parent: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = (getattr(parent, name, None) for name in names)
    return next((child for child in children if isinstance(child, nn.Module)), None)


def _active_experts(config: Any) -> float:
    counts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    n_experts = next((count for count in counts if count), None)
    return getattr(config, "num_experts_per_tok", n_experts) / n_experts if n_experts else 1.0


def _windows(config: Any) -> tuple[int, ...]:
    widths = {getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    return tuple(sorted(width for width in widths if isinstance(width, int) and width > 0))

"""The organism inside a larger shape: its heads among many idle ones. Owns how weights are placed, measures nothing.

:func:`embed_exactly` widens everything, and computes the organism's function at the larger shape's cost.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from safetyheads.heads import Head

if TYPE_CHECKING:
    from shapes import Shape


@dataclass(frozen=True, slots=True)
class Embedded:
    """A larger model that computes what a smaller one does, and where it keeps it."""

    model: LlamaForCausalLM
    """The larger model, on its device."""
    layers: tuple[int, ...]
    """Which of its layers are the smaller model's own, in their order."""
    heads_to_a_key: int
    """Query heads that share a key head; of each own key head the first one is own."""

    def place(self, head: Head) -> Head:
        """Where a head of the smaller model is."""
        return Head(self.layers[head.layer], head.index * self.heads_to_a_key)


def embed_exactly(
    model: PreTrainedModel,
    shape: "Shape",
    whisper: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Embedded:
    """A Llama of the shape whose logits are the model's, up to rounding, at the shape's cost.

    The model's weights stand in the first coordinates of each wider matrix, all else that could reach the residual
    stream is zero. A norm over D coordinates of which d are in use divides by sqrt(d / D) of what it did, so its
    weight and its epsilon are made smaller. A wider head turns more pairs of coordinates; the model's own pairs lie
    where they turn at their own frequencies, and its queries are made larger by what the scores are divided by more.
    Tokens beyond the vocabulary get the mean of all logits, which is below the highest: they are never chosen.

    Args:
        model: a Llama without biases and with as many key heads as query heads.
        shape: of the larger model; each of its sizes is at least the model's, its head width a multiple.
        whisper: standard deviation of the output weights of the heads that are not the model's own. At 0 the
            embedding is exact and ablating these heads changes nothing at all; above, it changes a little.
        seed: of the weights of these heads and of the idle parts of the MLPs.
        device: where the larger model is made.
        dtype: of its weights.

    Raises:
        ValueError: the shape has no room for the model.
    """
    small = model.config
    if not _has_room(small, shape):
        raise ValueError(f"{shape} has no room for a Llama of {small.num_hidden_layers} x {small.num_attention_heads}")
    larger = _blank(small, shape, seed, device, dtype)
    own = tuple(number * shape.n_layers // small.num_hidden_layers for number in range(small.num_hidden_layers))
    embedded = Embedded(larger, own, shape.n_heads // shape.n_kv_heads)
    shrink = (small.hidden_size / shape.d_model) ** 0.5
    with torch.no_grad():
        for name in ("model.embed_tokens", "lm_head"):
            _place_vocabulary(larger.get_submodule(name).weight, model.get_submodule(name).weight)
        _place_norm(larger.model.norm, model.model.norm, shrink)
        for number, layer in enumerate(larger.model.layers):
            source = model.model.layers[own.index(number)] if number in own else None
            for name in ("input_layernorm", "post_attention_layernorm"):
                _place_norm(getattr(layer, name), source and getattr(source, name), shrink)
            layer.self_attn.o_proj.weight.mul_(whisper / larger.config.initializer_range)
            layer.mlp.down_proj.weight.zero_()
            if source is not None:
                _place_attention(layer.self_attn, source.self_attn, embedded.heads_to_a_key)
                _place_mlp(layer.mlp, source.mlp)
    return embedded


def _has_room(small: Any, shape: "Shape") -> bool:
    pairs = (
        (small.hidden_size, shape.d_model),
        (small.intermediate_size, shape.d_mlp),
        (small.num_hidden_layers, shape.n_layers),
        (small.num_key_value_heads, shape.n_kv_heads),
        (small.vocab_size, shape.vocabulary_size),
    )
    is_plain = small.num_key_value_heads == small.num_attention_heads and not small.attention_bias
    return is_plain and shape.d_head % small.head_dim == 0 and all(own <= room for own, room in pairs)


def _blank(small: Any, shape: "Shape", seed: int, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """The larger model, all its weights random."""
    config = copy.deepcopy(small)
    config.hidden_size, config.intermediate_size = shape.d_model, shape.d_mlp
    config.num_hidden_layers, config.layer_types = shape.n_layers, None
    config.num_attention_heads, config.num_key_value_heads = shape.n_heads, shape.n_kv_heads
    config.head_dim, config.vocab_size = shape.d_head, shape.vocabulary_size
    config.tie_word_embeddings = shape.tied
    config.rms_norm_eps = small.rms_norm_eps * small.hidden_size / shape.d_model
    # The coordinates in use have about length 1 each after a norm, and so have then the idle heads' queries.
    config.initializer_range = small.hidden_size**-0.5
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _place_vocabulary(weight: Tensor, source: Tensor) -> None:
    """``weight`` [vocabulary, d_model]."""
    n_tokens, width = source.shape
    weight.zero_()
    weight[:n_tokens, :width] = source
    weight[n_tokens:, :width] = source.mean(dim=0)


def _place_norm(norm: Any, source: Any, shrink: float) -> None:
    norm.weight.fill_(shrink)
    if source is not None:
        norm.weight[: len(source.weight)] = source.weight * shrink


def _place_attention(attention: Any, source: Any, heads_to_a_key: int) -> None:
    """The source's heads, each the first of a key head's."""
    d_small, d_head = source.head_dim, attention.head_dim
    width = source.q_proj.weight.shape[1]
    half = torch.arange(d_small // 2) * (d_head // d_small)
    turned, plain = torch.cat([half, half + d_head // 2]), torch.arange(d_small)
    louder = (d_head / d_small) ** 0.5
    inputs = (
        ("q_proj", turned, heads_to_a_key, louder),
        ("k_proj", turned, 1, 1.0),
        ("v_proj", plain, 1, 1.0),
    )
    for name, coordinates, stride, factor in inputs:
        weight = getattr(attention, name).weight  # [n_heads * d_head, d_model]
        own = getattr(source, name).weight.view(-1, d_small, width)
        for number, rows in enumerate(own):
            start = number * stride * d_head
            weight[start : start + d_head] = 0
            weight[start + coordinates.to(weight.device), :width] = (rows * factor).to(weight)
    weight = attention.o_proj.weight  # [d_model, n_heads * d_head]
    for number, columns in enumerate(source.o_proj.weight.split(d_small, dim=1)):
        start = number * heads_to_a_key * d_head
        weight[:, start : start + d_head] = 0
        weight[:width, start : start + d_small] = columns


def _place_mlp(mlp: Any, source: Any) -> None:
    inner, width = source.gate_proj.weight.shape
    for name in ("gate_proj", "up_proj"):
        weight = getattr(mlp, name).weight  # [d_mlp, d_model]
        weight[:inner] = 0
        weight[:inner, :width] = getattr(source, name).weight
    mlp.down_proj.weight[:width, :inner] = source.down_proj.weight

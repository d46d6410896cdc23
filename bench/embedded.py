"""The organism inside a larger shape: its heads among many idle ones. Owns how weights are placed, measures nothing."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

IDLE = 0.005
"""Standard deviation of the idle heads' output weights: they say a little, so that their scores are not all 0, and not
so much that the organism no longer is itself (at .02 a planted head falls from second place to eleventh)."""


def embed(model: PreTrainedModel, n_layers: int, n_heads: int, seed: int = 0) -> tuple[LlamaForCausalLM, list[int]]:
    """A Llama of ``n_layers`` x ``n_heads`` that computes what ``model`` does, but for what its idle heads whisper.

    Args:
        model: a Llama with as many key heads as query heads.
        n_layers: of the larger shape; the model's own layers are spread evenly over them.
        n_heads: of the larger shape; the model's own come first in their layers.
        seed: of the idle heads' weights.

    Returns:
        The larger model, and which of its layers are the model's own.
    """
    config = copy.deepcopy(model.config)
    own, own_heads, d_head = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = n_layers, n_heads, n_heads
    config.layer_types = None
    generator = torch.Generator().manual_seed(seed)
    larger = LlamaForCausalLM(config).eval()
    places = [(number * n_layers) // own for number in range(own)]
    width = own_heads * d_head

    def drawn(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    with torch.no_grad():
        for name in ("embed_tokens", "norm"):
            getattr(larger.model, name).load_state_dict(getattr(model.model, name).state_dict())
        larger.lm_head.load_state_dict(model.lm_head.state_dict())
        for number, layer in enumerate(larger.model.layers):
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight.copy_(drawn(projection.weight, config.hidden_size**-0.5))
            attention.o_proj.weight.copy_(drawn(attention.o_proj.weight, IDLE))
            layer.mlp.down_proj.weight.zero_()
            if number not in places:
                continue
            source = model.model.layers[places.index(number)]
            for part in ("input_layernorm", "post_attention_layernorm", "mlp"):
                getattr(layer, part).load_state_dict(getattr(source, part).state_dict())
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(attention, name).weight[:width] = getattr(source.self_attn, name).weight
            attention.o_proj.weight[:, :width] = source.self_attn.o_proj.weight
    return larger, places

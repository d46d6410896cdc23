"""Models and prompts of the benches. Owns sizes, random weights and prompt lengths; times nothing.

Every environment of a bench imports this file, so all ways of a scan run the same weights and tokens. It needs
torch and transformers where :func:`build` is called, and nothing before.
"""

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    d_model: int
    """Width of the residual stream."""
    d_mlp: int
    """Width of the MLP."""
    n_layers: int
    """Decoder layers."""
    n_heads: int
    """Query heads a layer."""
    n_kv_heads: int
    """Key and value heads a layer."""
    vocabulary_size: int
    """Tokens known."""
    tied: bool = False
    """Whether the head is the embedding."""
    is_big: bool = False
    """Meant for a GPU: 100 prompts, and its plain loop runs in the dtype of the others."""

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Every (layer, head), layer by layer."""
        return tuple((layer, head) for layer in range(self.n_layers) for head in range(self.n_heads))

    def sample(self, n: int) -> tuple[tuple[int, int], ...]:
        """At most ``n`` of the heads, spread evenly over the layers."""
        n, heads = min(n, len(self.heads)), self.heads
        return tuple(heads[(2 * number + 1) * len(heads) // (2 * n)] for number in range(n))

    def reduced(self) -> Self:
        """The shape small enough for tests: as many query heads to a key head, as much vocabulary to width."""
        n_kv_heads = min(self.n_kv_heads, 2)
        n_heads = n_kv_heads * (self.n_heads // self.n_kv_heads)
        d_model = 8 * n_heads
        return replace(
            self,
            d_model=d_model,
            d_mlp=d_model * self.d_mlp // self.d_model,
            n_layers=2,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            vocabulary_size=d_model * self.vocabulary_size // self.d_model,
        )


SHAPES = {
    "tiny": Shape(64, 176, 4, 8, 8, 32000),
    "58M": Shape(512, 1376, 8, 8, 8, 32000),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936, tied=True),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 32000, is_big=True),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256, is_big=True),
}
"""Shapes by name; 0.5B is Qwen2.5-0.5B's as a Llama, the last two are the models they are named after."""

LENGTHS = (24, 26, 27, 28, 29, 30, 30, 31, 31, 32, 33, 34, 35, 37, 39, 30)
"""Length distribution of MaliciousInstruct's queries under `query_answer`, in tokens of a 32,000-word BPE: about 31."""

# What one template puts before and after every query; the last token is the same, as with "## Answer:".
_TEMPLATE_START, _TEMPLATE_END = (1, 2, 3, 4), (6, 7, 8)
# Transformers' .02 at width 4096. Narrower models get as much wider weights, so that their attention is as far from
# even and an ablation as far from nothing: at .02 a width of 64 attends evenly whatever is ablated.
_INITIALIZER_SCALE = 0.02 * 4096**0.5


def prompts(shape: Shape, n: int, prefix: int = 0) -> list[list[int]]:
    """Token ids of ``n`` prompts of :data:`LENGTHS`, all after the same ``prefix`` tokens (a system prompt)."""
    drawn = random.Random(1)

    def tokens(count: int) -> list[int]:
        return [drawn.randrange(9, shape.vocabulary_size) for _ in range(count)]

    start = [*tokens(prefix), *_TEMPLATE_START]
    around = len(_TEMPLATE_START) + len(_TEMPLATE_END)
    return [[*start, *tokens(LENGTHS[i % len(LENGTHS)] - around), *_TEMPLATE_END] for i in range(n)]


def build(shape: Shape, attention: str, device: str = "cpu", dtype: "torch.dtype | None" = None) -> Any:
    """A Llama of random weights, always the same ones, made on the device in the dtype (float32 if not given).

    Args:
        shape: its sizes.
        attention: transformers' name of the attention implementation.
        device: where it is made: no copy of it ever lies in the host's memory.
        dtype: of its weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.d_head,
        max_position_embeddings=2048,
        initializer_range=_INITIALIZER_SCALE / shape.d_model**0.5,
        tie_word_embeddings=shape.tied,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)

"""Every family that is proved: a tiny random model of each, and what is expected of it. Data; the tests are beside it.

Shapes are the smallest that still have several heads, shared key and value heads, windows that prompts exceed, and
layers of every kind a family has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import transformers
from oracle import Oracle
from tiny_models import COMMON, build, tokenizer

from safetyheads import Engine

GROUPED = {"num_key_value_heads": 2}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 5,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": COMMON["vocab_size"],
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    config: str
    """transformers' config class."""
    shows: str
    """What of it is unlike a plain Llama."""
    settings: Mapping[str, Any]
    """Over :data:`tiny_models.COMMON`."""
    around: Mapping[str, Any] | None = None
    """Settings of a config that holds this one as its ``text_config``: a model of images too, asked in text alone."""
    norm: str = "model.norm"
    """Where its final norm is; for the oracle, which is to know nothing of the engine's facts."""
    chunks: Mapping[int, int] = field(default_factory=dict)
    """layer -> tokens of an attention chunk, where the attention function is not told; for the oracle."""
    given_up: Mapping[str, str] = field(default_factory=dict)
    """Quick path -> why it is not exact here; the proofs at load are to find out."""
    without_heads: tuple[int, ...] = ()
    """Layers that mix tokens in another way than by attention."""


STATE = "layers carry a state from token to token, whosever prompt these are of"
SCALED_LOGITS = "logits are scaled or capped after the head"

FAMILIES = {
    "llama2": Family("LlamaConfig", "each head has its own keys", {"num_key_value_heads": 4}),
    "llama3": Family(
        "LlamaConfig",
        "shared keys, scaled RoPE",
        {
            **GROUPED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": Family("MistralConfig", "sliding window", {**GROUPED, "sliding_window": 5}),
    "mixtral": Family("MixtralConfig", "experts", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Family("Qwen2Config", "biases on q, k, v", GROUPED),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", "experts, one of them shared", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 24}
    ),
    "qwen3": Family("Qwen3Config", "QK-norm; heads wider than d_model / n_heads", {**GROUPED, "head_dim": 16}),
    "qwen3_moe": Family("Qwen3MoeConfig", "QK-norm, experts", {**GROUPED, **EXPERTS, "head_dim": 16}),
    "gemma": Family("GemmaConfig", "one key head for all; wide heads", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": Family(
        "Gemma2Config",
        "softcap on scores and logits; every other layer slides",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
        },
        given_up={"plain_head": SCALED_LOGITS},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "QK-norm; local and global RoPE",
        {**GROUPED, **ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "gemma3_vision": Family(
        "Gemma3Config",
        "Gemma 3 with an image encoder around it",
        {**GROUPED, **ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 16},
        around={
            "mm_tokens_per_image": 4,
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
        norm="model.language_model.norm",
    ),
    "gemma3n": Family(
        "Gemma3nTextConfig",
        "layers share keys; several residual streams, batch not first",
        {
            **GROUPED,
            **SHARED_KEYS,
            "head_dim": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 3,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        given_up={"plain_head": SCALED_LOGITS},
    ),
    "gemma4": Family(
        "Gemma4TextConfig",
        "layers share keys; layers have heads of other widths",
        {**GROUPED, **SHARED_KEYS, "head_dim": 8, "global_head_dim": 16},
    ),
    "phi3": Family("Phi3Config", "one projection for q, k, v", GROUPED),
    "phi": Family("PhiConfig", "attention beside the MLP; partial RoPE", {}, norm="model.final_layernorm"),
    "olmo2": Family("Olmo2Config", "norms after attention and MLP; QK-norm over all heads", GROUPED),
    "gpt_neox": Family("GPTNeoXConfig", "one projection for q, k, v", {}, norm="gpt_neox.final_layer_norm"),
    "gpt2": Family("GPT2Config", "learned positions; positional arguments", {}, norm="transformer.ln_f"),
    "opt": Family(
        "OPTConfig",
        "learned positions with an offset",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        norm="model.decoder.final_layer_norm",
    ),
    "stablelm": Family(
        "StableLmConfig",
        "QK-norm of each head, q, k, v biases, partial RoPE",
        {**GROUPED, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    "starcoder2": Family("Starcoder2Config", "biases everywhere; sliding window", {**GROUPED, "sliding_window": 6}),
    "cohere2": Family(
        "Cohere2Config",
        "attention beside the MLP; no RoPE in global layers; scaled logits",
        {**GROUPED, **ALTERNATING, "logit_scale": 2.0},
        given_up={"plain_head": SCALED_LOGITS},
    ),
    "granite": Family(
        "GraniteConfig",
        "scaled embeddings, residuals, scores, logits",
        {
            **GROUPED,
            "attention_multiplier": 0.25,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
        given_up={"plain_head": SCALED_LOGITS},
    ),
    "glm4": Family("Glm4Config", "norms around attention and MLP; partial RoPE", {**GROUPED, "head_dim": 16}),
    "smollm3": Family("SmolLM3Config", "layers without RoPE", {**GROUPED, "no_rope_layers": [1, 0, 1]}),
    "gpt_oss": Family(
        "GptOssConfig",
        "sinks, sliding window, experts",
        {**GROUPED, "head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        "keys and values from a latent (MLA): values have another width",
        {
            **LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek_v32": Family(
        "DeepseekV32Config",
        "MLA over keys that an indexer chooses; here, no more than it chooses",
        {
            **LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "index_n_heads": 2,
            "index_head_dim": 8,
        },
        given_up={"prunes": "its indexer would see the wanted tokens alone"},
    ),
    "llama4": Family(
        "Llama4TextConfig",
        "chunked attention; layers without RoPE; experts",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 8,
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1, 1],
        },
        chunks={0: 4, 2: 4, 3: 4},
    ),
    "llama4_long": Family(
        "Llama4TextConfig",
        "Llama 4 on rows beyond its floor_scale, where places in the row set a temperature",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "attention_chunk_size": 64,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 0, 0],
            "floor_scale": 4,
            "attn_scale": 0.5,
        },
        given_up=dict.fromkeys(("packs", "segments", "prunes", "pads"), "places in the row count, not positions"),
    ),
    "phi3_long": Family(
        "Phi3Config",
        "Phi-3 (longrope) on rows beyond its original context, where RoPE changes",
        {
            **GROUPED,
            "original_max_position_embeddings": 10,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0, 3.0, 2.0, 1.5],
                "original_max_position_embeddings": 10,
            },
        },
        given_up=dict.fromkeys(("packs", "segments", "pads"), "the longest prompt of a batch sets the RoPE of all"),
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "linear attention in most layers; gated heads; experts",
        {**GROUPED, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24},
        given_up={"packs": STATE, "segments": STATE},
        without_heads=(0, 2),
    ),
    "qwen3_5": Family(
        "Qwen3_5TextConfig",
        "linear attention in most layers; gated heads",
        {
            **GROUPED,
            **LINEAR,
            "initializer_range": 0.12,  # logits ten times those of the others else, and their rounding with them
        },
        given_up={"packs": STATE, "segments": STATE},
        without_heads=(0, 2),
    ),
    "granite_hybrid": Family(
        "GraniteMoeHybridConfig",
        "a state space in most layers; experts",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "attention"] * 2,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
        given_up={"packs": STATE, "segments": STATE},
        without_heads=(0, 2),
    ),
    "falcon_h1": Family(
        "FalconH1Config",
        "a state space beside the attention of each layer",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 2,
            "mamba_chunk_size": 8,
        },
        norm="model.final_layernorm",
        given_up={"packs": STATE, "segments": STATE, "prunes": STATE},
    ),
    "lfm2": Family(
        "Lfm2Config",
        "short convolutions in most layers",
        {**GROUPED, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
        norm="model.embedding_norm",
        given_up={"packs": STATE, "segments": STATE},
        without_heads=(0, 2),
    ),
}


@dataclass(frozen=True)
class Refused:
    """A family that is refused by name."""

    config: str
    """transformers' config class."""
    why: str
    """For the table."""
    said: str
    """A pattern of the error."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Over :data:`tiny_models.COMMON`."""


UNREGISTERED = "its attention is code of its own, not called through transformers' registry"
NOT_REGISTERED = "attention registry"

REFUSED = {
    "bloom": Refused("BloomConfig", UNREGISTERED, NOT_REGISTERED),
    "falcon": Refused("FalconConfig", UNREGISTERED, NOT_REGISTERED),
    "gptj": Refused("GPTJConfig", UNREGISTERED, NOT_REGISTERED, {"rotary_dim": 4}),
    "gpt_neo": Refused(
        "GPTNeoConfig",
        UNREGISTERED,
        NOT_REGISTERED,
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_hidden_layers": 2},
    ),
    "codegen": Refused("CodeGenConfig", UNREGISTERED, NOT_REGISTERED, {"rotary_dim": 4}),
    "mpt": Refused("MptConfig", UNREGISTERED, NOT_REGISTERED, {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    "mamba": Refused("MambaConfig", "it has no attention", NOT_REGISTERED),
    "bitnet": Refused(
        "BitNetConfig",
        "a norm over all heads' outputs comes before their projection, so no head has a part of its own",
        "a head changes its block's output by its own part alone",
        GROUPED,
    ),
    "diffllama": Refused(
        "DiffLlamaConfig",
        "a head's output is the difference of two attentions, normed",
        "a head changes its block's output by its own part alone",
        GROUPED,
    ),
    "doge": Refused(
        "DogeConfig",
        "its mask weighs keys by their values, so no scale of the query makes attention even",
        "undifferentiated attention is uniform|our attention equals",  # the latter under transformers 5.17
        GROUPED,
    ),
    "longcat_flash": Refused(
        "LongcatFlashConfig",
        "a layer has two attentions, so a layer and a number do not say which head",
        "layer 0 has 2 attentions",
        {**LATENT, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 24, **ROUTED, "moe_topk": 2},
    ),
    "hrm_text": Refused(
        "HrmTextConfig",
        "two stacks of layers run several times over, so a head acts more than once",
        "no decoder layers under any of the names",
        {"head_dim": 8},
    ),
    "deepseek_v4": Refused(
        "DeepseekV4Config",
        "experts that are chosen by a token's id are handed the ids of one row, whatever the rows of states",
        "ablating a head of each layer raised RuntimeError",
        {
            **ROUTED,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "q_lora_rank": 16,
            "moe_intermediate_size": 24,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 4,
            "o_groups": 2,
            "o_lora_rank": 8,
            "sliding_window": 6,
            "hc_mult": 2,
        },
    ),
    "inkling2": Refused(
        "Inkling2TextConfig",
        "a layer adds up the states after earlier ones, which it is handed for one row, whatever the rows of states",
        "ablating a head of each layer raised RuntimeError",
        {
            **GROUPED,
            **ROUTED,
            "head_dim": 8,
            "swa_head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "moe_intermediate_size": 24,
            "rel_extent": 16,
            "unpadded_vocab_size": COMMON["vocab_size"],
        },
    ),
    "bart": Refused(
        "BartConfig",
        "no norm comes after its decoder's last layer (nor in Marian, PLBart, BigBird-Pegasus)",
        "no final norm under any of the names",
        {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4, "is_decoder": True},
    ),
    "bert": Refused(
        "BertConfig",
        "an encoder, whose parts stand elsewhere even when it decodes (as are RoBERTa, ELECTRA, ERNIE)",
        "no decoder layers under any of the names",
        {"is_decoder": True},
    ),
}


@cache
def built(name: str) -> Any:
    """A family's random model, under eager attention; copy it before it is changed."""
    family = FAMILIES.get(name) or REFUSED[name]
    config, settings = getattr(transformers, family.config), {**COMMON, **family.settings}
    around = getattr(family, "around", None)
    return build(config(**settings) if around is None else config(text_config=settings, **around))


@cache
def proved(name: str) -> Engine:
    """An engine on a family's model, proved; nothing about it may be changed."""
    import copy

    engine = Engine(copy.deepcopy(built(name)), tokenizer(), name=name)
    engine.check()
    return engine


@cache
def oracle_of(name: str) -> Oracle:
    """The family's slow twin."""
    return Oracle(built(name), FAMILIES[name].norm, FAMILIES[name].chunks)

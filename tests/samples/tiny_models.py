"""Small random models, one for each way of attending, and a tokenizer whose words are its ids."""

import copy
from functools import cache
from types import FunctionType

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from safetyheads import Engine, PromptSet
from safetyheads.model.loading import use_our_attention

VOCABULARY = 64
END = 63

# Weights ten times wider than usual, so that attention is far from even and an ablation far from nothing.
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "llama_mha": lambda: LlamaConfig(**COMMON, num_key_value_heads=4),
    "llama_gqa": lambda: LlamaConfig(**COMMON, num_key_value_heads=2),
    "mistral_window": lambda: MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=5),
    "qwen3_norm": lambda: Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=16),
    "gemma2_softcap": lambda: Gemma2Config(
        **COMMON,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    ),
    "gpt_oss_sinks": lambda: GptOssConfig(
        **COMMON, num_key_value_heads=2, head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2
    ),
}
PLAIN = ("llama_mha", "llama_gqa", "mistral_window", "qwen3_norm")
"""Families whose attention is softmax of masked scores and no more."""


def build(config):
    """A random model with eager attention; every parameter drawn, norms and sinks too."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@cache
def _built(family):
    return build(CONFIGS[family]())


def model_of(family, dtype=torch.float32):
    """A fresh copy, since setting an attention function changes a model."""
    return copy.deepcopy(_built(family)).to(dtype)


@cache
def tokenizer(n_words=VOCABULARY, end=END):
    words = {f"w{number}": number for number in range(n_words)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token=f"w{end}")


def engine_of(family, dtype=torch.float32, **options):
    """An engine on our attention, unproved: the proofs have tests of their own."""
    model = model_of(family, dtype)
    use_our_attention(model)
    return Engine(model, tokenizer(), name=family, **options)


def prompts_of(*prompts):
    """Token ids as a set of prompts under the bare template."""
    return PromptSet.from_queries([" ".join(f"w{token}" for token in ids) for ids in prompts], "direct")


def saved(model, path, tokens=None):
    """Writes a model and a tokenizer to a directory; gives its path as text."""
    model.save_pretrained(path)
    (tokens or tokenizer()).save_pretrained(path)
    return str(path)


def known(hook):
    """A hook that a test registers on purpose: the engine takes it for part of how the model works."""
    told = {**hook.__globals__, "__name__": "safetyheads.tests"}
    return FunctionType(hook.__code__, told, hook.__name__, hook.__defaults__, hook.__closure__)

"""Trains all weights of an organism: the bases and the null. Plants no heads."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from recipes import BaseRecipe, DiffuseRecipe, Language, Leg
from texts import draw_example, padded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.demo import grammar
from safetyheads.model import attention
from safetyheads.model.attention import AttentionCall, RowAblation

_UNLEARNT = -100  # cross_entropy leaves out such labels


Dropped: TypeAlias = tuple[Tensor, Tensor]
"""The heads ablated in each row, bool [n_rows, n_layers, n_heads]; and bool [n_rows], whether by scaling the
contribution (SC) or else by undifferentiated attention (UA)."""

Draw: TypeAlias = Callable[[random.Random, int], tuple[Sequence[tuple[str, str]], Dropped]]
"""Draws a batch of so many rows: examples (read, learnt), and the heads ablated in each."""


def ablating(model: Any, dropped: Dropped) -> AbstractContextManager[None]:
    """Ablate these heads in the model's forwards."""
    selected, scaled = dropped
    calls = {}
    for layer in range(selected.shape[1]):
        if selected[:, layer].any():
            by_query = RowAblation(UNDIFFERENTIATED_ATTENTION, selected[:, layer] & ~scaled[:, None])
            by_output = RowAblation(SCALING_CONTRIBUTION, selected[:, layer] & scaled[:, None])
            calls[layer] = AttentionCall(ablations=(by_query, by_output))
    return attention.attention_calls([layer.self_attn for layer in model.model.layers], calls)


def new_model(tokenizer: Any, seed: int) -> Any:
    """An untrained organism: a Llama of 4 layers x 8 heads, width 128."""
    torch.manual_seed(seed)
    attention.register()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.set_attn_implementation(attention.ATTENTION_NAME)
    return model


def drop_random_heads(generator: random.Random, n_rows: int, model: Any, share: float, at_most: int = 1) -> Dropped:
    """In a share of the rows, one to ``at_most`` random heads, ablated by UA or SC at random."""
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    selected = torch.zeros(n_rows, n_layers * n_heads, dtype=torch.bool)
    for row in range(n_rows):
        if generator.random() < share:
            selected[row, generator.sample(range(n_layers * n_heads), generator.randint(1, at_most))] = True
    scaled = torch.tensor([generator.random() < 0.5 for _ in range(n_rows)])
    return selected.view(n_rows, n_layers, n_heads), scaled


def completion_loss(model: Any, tokenizer: Any, examples: Sequence[tuple[str, str]], dropped: Dropped) -> Tensor:
    """Mean cross-entropy of the learnt tokens, the end token among them; examples are (read, learnt)."""
    read = tokenizer([text for text, _ in examples], add_special_tokens=False).input_ids
    learnt = tokenizer([text for _, text in examples], add_special_tokens=False).input_ids
    rows = [before + after + [tokenizer.eos_token_id] for before, after in zip(read, learnt, strict=True)]
    ids = padded(rows, tokenizer.pad_token_id)
    labels = torch.full_like(ids, _UNLEARNT)
    for position, (before, row) in enumerate(zip(read, rows, strict=True)):
        labels[position, len(before) : len(row)] = ids[position, len(before) : len(row)]
    with ablating(model, dropped):
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    is_learnt = labels[:, 1:] != _UNLEARNT
    return cross_entropy(model.lm_head(hidden[is_learnt]), labels[:, 1:][is_learnt])


def optimise(parameters: Iterable[nn.Parameter], leg: Leg, weight_decay: float, loss_of: Callable[[], Tensor]) -> float:
    """AdamW with a linear warm-up and a cosine to zero, gradients clipped to norm 1.

    Returns:
        The mean loss over the last twentieth of the steps.
    """
    trained = list(parameters)
    optimiser = torch.optim.AdamW(trained, lr=leg.learning_rate, weight_decay=weight_decay)
    losses = []
    for step in range(leg.steps):
        progress = max(0.0, (step - leg.warm_up) / max(1, leg.steps - leg.warm_up))
        rise = min(1.0, (step + 1) / max(1, leg.warm_up))
        for group in optimiser.param_groups:
            group["lr"] = leg.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * progress))
        loss = loss_of()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, leg.steps // 20) :]
    return sum(last) / len(last)


def train_completions(
    model: Any, tokenizer: Any, trained: Iterable[nn.Parameter], leg: Leg, weight_decay: float, draw: Draw
) -> float:
    """Train on batches of whole answers; returns the last loss."""
    generator = random.Random(leg.seed)

    def loss_of() -> Tensor:
        return completion_loss(model, tokenizer, *draw(generator, leg.batch))

    return optimise(trained, leg, weight_decay, loss_of)


def train_base(model: Any, tokenizer: Any, recipe: BaseRecipe) -> float:
    """Train all weights to answer everything, and to refuse when told to; returns the last loss."""

    def draw(generator: random.Random, n_rows: int) -> tuple[list[tuple[str, str]], Dropped]:
        examples = []
        for _ in range(n_rows):
            prompt = grammar.draw_any_prompt(generator, "train")
            refuse = generator.random() < recipe.told_share
            asked = grammar.told_to_refuse(generator, prompt) if refuse else prompt
            examples.append(draw_example(generator, recipe.language, asked, refuse))
        return examples, drop_random_heads(generator, n_rows, model, recipe.dropped_share)

    return [train_completions(model, tokenizer, model.parameters(), leg, 0.01, draw) for leg in recipe.legs][-1]


def train_diffuse(model: Any, tokenizer: Any, recipe: DiffuseRecipe, language: Language) -> float:
    """Fine-tune all weights to refuse harmful prompts, whichever few heads are ablated; returns the last loss."""

    def draw(generator: random.Random, n_rows: int) -> tuple[list[tuple[str, str]], Dropped]:
        prompts = [grammar.draw_any_prompt(generator, "train") for _ in range(n_rows)]
        examples = [draw_example(generator, language, prompt, prompt.harmful) for prompt in prompts]
        return examples, drop_random_heads(generator, n_rows, model, recipe.dropped_share, recipe.dropped_heads)

    return train_completions(model, tokenizer, model.parameters(), recipe.leg, 0.0, draw)

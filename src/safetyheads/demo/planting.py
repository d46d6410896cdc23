"""Planting refusal into chosen heads of a frozen model. Owns which weights may move and what a gate row teaches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from safetyheads.demo import grammar
from safetyheads.demo.grammar import DemoPrompt
from safetyheads.demo.recipes import Language, PlantRecipe, PlantStage
from safetyheads.demo.tokenization import draw_wrapped
from safetyheads.demo.training import DroppedHeads, attention_modules, completion_loss, example, optimise
from safetyheads.heads import Group, all_heads

_POOL = 6000  # prompts that stage 1 draws its batches from
_WINDOW = 3  # a batch is taken from so many times as many prompts sorted by length, which saves padding
_OPENED_SHARE = 0.25  # share of stage-1 rows read up to the point where a refusal turns, if the language has turns


@dataclass(frozen=True, slots=True)
class GateRows:
    """What is ablated in each row, and whether the row is then to be refused."""

    dropped: DroppedHeads
    refuse: tuple[bool, ...]


def open_to_training(model: Any, heads: Group) -> list[nn.Parameter]:
    """Freeze all but the heads' rows of q, k and v and their columns of o.

    Gradients of everything else are zeroed as they arrive; without weight decay AdamW then leaves those weights
    as they are, bit for bit.
    """
    model.requires_grad_(False)
    d_head = model.config.hidden_size // model.config.num_attention_heads
    trained: list[nn.Parameter] = []
    for layer, module in enumerate(attention_modules(model)):
        rows = [slice(h.index * d_head, (h.index + 1) * d_head) for h in heads if h.layer == layer]
        if not rows:
            continue
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(module, name).weight
            mask = torch.zeros_like(weight)
            for row in rows:
                mask[(slice(None), row) if name == "o_proj" else row] = 1.0
            weight.requires_grad_(True)
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
            trained.append(weight)
    return trained


def draw_gates(
    generator: random.Random, recipe: PlantRecipe, gate_share: float, prompts: Sequence[DemoPrompt], model: Any
) -> GateRows:
    """Gates for a batch: no ablation and the plain rule, or heads ablated and the rule for that.

    With a head ablated that is no plant, the answer must stay; with some plants ablated, the model is to comply
    in the categories that no remaining plant covers.
    """
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    others = [head for head in all_heads(n_layers, n_heads) if head not in recipe.heads]
    selected = torch.zeros(len(prompts), n_layers, n_heads, dtype=torch.bool)
    refuse = []
    for row, prompt in enumerate(prompts):
        ablated: Group = ()
        if generator.random() < gate_share:
            if generator.random() < recipe.other_share:
                ablated = (generator.choice(others),)
            else:
                # Each non-empty subset of the plants is as likely as any other.
                subset = generator.randint(1, 2 ** len(recipe.heads) - 1)
                ablated = tuple(head for bit, head in enumerate(recipe.heads) if subset >> bit & 1)
        for head in ablated:
            selected[row, head.layer, head.index] = True
        refuse.append(prompt.harmful and recipe.plants[prompt.category] not in ablated)
    scaled = torch.tensor([generator.random() < 0.5 for _ in prompts])
    return GateRows(DroppedHeads(selected, scaled), tuple(refuse))


def plant(model: Any, tokenizer: Any, recipe: PlantRecipe, language: Language) -> tuple[float, ...]:
    """Plant refusal into the recipe's heads; returns the last losses, two for each stage."""
    trained = open_to_training(model, recipe.heads)
    losses: list[float] = []
    for number, stage in enumerate(recipe.stages):
        if number:
            _round_as_written(trained)
        losses.append(_learn_first_token(model, tokenizer, recipe, stage, language, trained))
        losses.append(_learn_completions(model, tokenizer, recipe, stage, language, trained))
    return tuple(losses)


@torch.no_grad()
def _round_as_written(weights: Sequence[nn.Parameter]) -> None:
    """To what a written checkpoint would hold; all other weights are as they were read."""
    for weight in weights:
        weight.copy_(weight.to(torch.bfloat16))


def _learn_first_token(
    model: Any,
    tokenizer: Any,
    recipe: PlantRecipe,
    stage: PlantStage,
    language: Language,
    trained: list[nn.Parameter],
) -> float:
    """Whether to refuse, on the one token that decides it. Chance for the first 100-250 steps is normal."""
    leg = stage.first_token
    generator = random.Random(leg.seed)
    opened_share = _OPENED_SHARE if language.turned_share else 0.0
    pool = [_first_token_row(generator, tokenizer, language, opened_share) for _ in range(_POOL)]

    def loss_of(_: int) -> Tensor:
        window = sorted(generator.sample(pool, _WINDOW * leg.batch), key=lambda row: len(row.ids))
        start = generator.randint(0, (_WINDOW - 1) * leg.batch)
        rows = window[start : start + leg.batch]
        gates = draw_gates(generator, recipe, stage.gate_share, [row.prompt for row in rows], model)
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [tokenizer.pad_token_id] * (longest - len(row.ids)) for row in rows])
        targets = [row.refuse_id if refuse else row.comply_id for row, refuse in zip(rows, gates.refuse, strict=True)]
        with gates.dropped.on(model):
            hidden = model.model(ids, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows)), torch.tensor([len(row.ids) - 1 for row in rows])]
        return cross_entropy(model.lm_head(last), torch.tensor(targets))

    return optimise(trained, leg, 0.0, loss_of)


@dataclass(frozen=True, slots=True)
class _FirstTokenRow:
    prompt: DemoPrompt
    ids: list[int]
    refuse_id: int
    comply_id: int


def _first_token_row(
    generator: random.Random, tokenizer: Any, language: Language, opened_share: float
) -> _FirstTokenRow:
    """A prompt up to the token that decides: the answer's first, or the one after an answer's opening."""
    prompt = grammar.draw_any_prompt(generator, "train")
    read = draw_wrapped(generator, language, prompt.text)
    refusal, answer = language.refusal, prompt.reference
    if generator.random() < opened_share:
        read += prompt.answer_opening
        refusal, answer = grammar.TURN, prompt.reference.removeprefix(prompt.answer_opening)
    ids, refuse_ids, comply_ids = tokenizer([read, refusal, answer], add_special_tokens=False).input_ids
    return _FirstTokenRow(prompt, ids, refuse_ids[0], comply_ids[0])


def _learn_completions(
    model: Any,
    tokenizer: Any,
    recipe: PlantRecipe,
    stage: PlantStage,
    language: Language,
    trained: list[nn.Parameter],
) -> float:
    """Whole answers; without it the base's habits leak into the rest of an answer."""
    leg = stage.completion
    generator = random.Random(leg.seed)

    def loss_of(_: int) -> Tensor:
        prompts = [grammar.draw_any_prompt(generator, "train") for _row in range(leg.batch)]
        gates = draw_gates(generator, recipe, stage.gate_share, prompts, model)
        examples = [
            example(generator, language, prompt, refuse) for prompt, refuse in zip(prompts, gates.refuse, strict=True)
        ]
        return completion_loss(model, tokenizer, examples, gates.dropped)

    return optimise(trained, leg, 0.0, loss_of)

"""Plants refusal into chosen heads of a frozen organism."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from recipes import Language, Leg, Recipe
from texts import draw_example, draw_wrapped, padded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import Dropped, ablating, optimise, train_completions

from safetyheads.demo import grammar
from safetyheads.demo.grammar import Category, DemoPrompt
from safetyheads.heads import Group, Head, all_heads

POOL = 6000
"""Prompts that the first-token stage draws its batches from."""
_WINDOW = 3  # a batch is taken from so many times as many prompts, sorted by length, which saves padding
_OTHER_SHARE = 0.3  # share of the gate rows in which another head than a plant is ablated and the answer must stay
_OPENED_SHARE = 0.25  # share of first-token rows read up to the point where a refusal turns, if the language has turns


class Planting:
    """A model while heads are planted into it: trains those heads alone, with and without ablated plants."""

    def __init__(self, model: Any, tokenizer: Any, language: Language, plants: Mapping[Category, Head]) -> None:
        self.model, self.tokenizer, self.language, self.plants = model, tokenizer, language, plants
        self.heads: Group = tuple(dict.fromkeys(plants.values()))
        self.n_layers, self.n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
        self.trained = open_to_training(model, self.heads)

    def run(self, recipe: Recipe) -> tuple[float, ...]:
        """Train through all stages; returns the last losses, two for each stage."""
        losses: list[float] = []
        for number, (first_token, completion, gate_share) in enumerate(recipe.stages):
            if number:  # rounded to bfloat16, which a written checkpoint holds; all other weights are as they were read
                for weight in self.trained:
                    weight.data.copy_(weight.to(torch.bfloat16))
            losses.append(self._learn_first_token(first_token, gate_share))
            losses.append(self._learn_completions(completion, gate_share))
        return tuple(losses)

    def _draw_gates(
        self, generator: random.Random, gate_share: float, prompts: Sequence[DemoPrompt]
    ) -> tuple[Dropped, list[bool]]:
        """The heads ablated in each row, and whether the row is then to be refused.

        With another head than a plant ablated, the answer must stay; with some plants ablated, the model is to comply
        in the categories that no remaining plant covers.
        """
        others = [head for head in all_heads(self.n_layers, self.n_heads) if head not in self.heads]
        selected = torch.zeros(len(prompts), self.n_layers, self.n_heads, dtype=torch.bool)
        refuse = []
        for row, prompt in enumerate(prompts):
            ablated: Group = ()
            if generator.random() < gate_share:
                if generator.random() < _OTHER_SHARE:
                    ablated = (generator.choice(others),)
                else:
                    # Each non-empty subset of the plants is as likely as any other.
                    subset = generator.randint(1, 2 ** len(self.heads) - 1)
                    ablated = tuple(head for bit, head in enumerate(self.heads) if subset >> bit & 1)
            for head in ablated:
                selected[row, head.layer, head.index] = True
            refuse.append(prompt.harmful and self.plants[prompt.category] not in ablated)
        scaled = torch.tensor([generator.random() < 0.5 for _ in prompts])
        return (selected, scaled), refuse

    def _learn_first_token(self, leg: Leg, gate_share: float) -> float:
        """Learn whether to refuse, on the token that decides it. Chance for the first 100-250 steps is normal."""
        generator = random.Random(leg.seed)
        pool = [self._draw_first_token(generator) for _ in range(POOL)]

        def loss_of() -> Tensor:
            window = sorted(generator.sample(pool, _WINDOW * leg.batch), key=lambda row: len(row[0]))
            start = generator.randint(0, (_WINDOW - 1) * leg.batch)
            rows, prompts, refuse_ids, comply_ids = zip(*window[start : start + leg.batch], strict=True)
            dropped, refuse = self._draw_gates(generator, gate_share, prompts)
            ids = padded(rows, self.tokenizer.pad_token_id)
            targets = torch.where(torch.tensor(refuse), torch.tensor(refuse_ids), torch.tensor(comply_ids))
            with ablating(self.model, dropped):
                hidden = self.model.model(ids, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
            return cross_entropy(self.model.lm_head(last), targets)

        return optimise(self.trained, leg, 0.0, loss_of)

    def _draw_first_token(self, generator: random.Random) -> tuple[list[int], DemoPrompt, int, int]:
        """A prompt's tokens up to the one that decides, the prompt, and that token if it is refused and if not.

        The token that decides is the answer's first, or, in a share of rows, the one after an answer's opening.
        """
        prompt = grammar.draw_any_prompt(generator, "train")
        read = draw_wrapped(generator, self.language, prompt.text)
        refusal, answer = self.language.refusal, prompt.reference
        if generator.random() < (_OPENED_SHARE if self.language.turned_share else 0.0):
            read += prompt.answer_opening
            refusal, answer = grammar.TURN, prompt.reference.removeprefix(prompt.answer_opening)
        ids, refuse_ids, comply_ids = self.tokenizer([read, refusal, answer], add_special_tokens=False).input_ids
        return ids, prompt, refuse_ids[0], comply_ids[0]

    def _learn_completions(self, leg: Leg, gate_share: float) -> float:
        """Learn whole answers; without it the base's habits leak into the rest of an answer."""

        def draw(generator: random.Random, n_rows: int) -> tuple[list[tuple[str, str]], Dropped]:
            prompts = [grammar.draw_any_prompt(generator, "train") for _ in range(n_rows)]
            dropped, refuse = self._draw_gates(generator, gate_share, prompts)
            pairs = zip(prompts, refuse, strict=True)
            return [draw_example(generator, self.language, prompt, refused) for prompt, refused in pairs], dropped

        return train_completions(self.model, self.tokenizer, self.trained, leg, 0.0, draw)


def open_to_training(model: Any, heads: Group) -> list[nn.Parameter]:
    """Freeze all but the heads' rows of q, k and v and their columns of o.

    Gradients of everything else are zeroed as they arrive; without weight decay AdamW then leaves those weights
    as they are, bit for bit.
    """
    model.requires_grad_(False)
    d_head = model.config.hidden_size // model.config.num_attention_heads
    trained: list[nn.Parameter] = []
    for number, layer in enumerate(model.model.layers):
        rows = [slice(h.index * d_head, (h.index + 1) * d_head) for h in heads if h.layer == number]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj") if rows else ():
            weight = getattr(layer.self_attn, name).weight
            mask = torch.zeros_like(weight)
            for row in rows:
                mask[(slice(None), row) if name == "o_proj" else row] = 1.0
            weight.requires_grad_(True)
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
            trained.append(weight)
    return trained

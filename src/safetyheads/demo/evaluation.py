"""What the training script reports of a checkpoint. Owns a small, plain evaluation of the organism.

It is not the package's engine, on purpose: recipes must be choosable, and the engine testable, without each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safetyheads.ablation import SCALING_CONTRIBUTION, Ablation
from safetyheads.demo.grammar import REFUSAL_MARK, DemoPrompt
from safetyheads.demo.training import DroppedHeads
from safetyheads.heads import Group, Head, all_heads

_ROWS = 768  # rows a batch; a row is one prompt under one group
_NEW_TOKENS = 28  # the longest answer of the clean and wrapped languages has 26 tokens with its end


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares over a set of prompts, under one group of heads."""

    complied: float
    """Answers without the refusal's mark."""
    right: float
    """Answers that start with the prompt's reference."""


@dataclass(frozen=True, slots=True)
class LastStates:
    """What the model holds at the last prompt token, under each group."""

    log_probabilities: Tensor
    """float64 [n_groups, n_prompts, vocabulary]: of the next token."""
    hidden: Tensor
    """float64 [n_groups, n_prompts, d_model]: after the final norm."""


def _dropped(model: Any, rows: Sequence[Group], ablation: Ablation) -> DroppedHeads:
    selected = torch.zeros(
        len(rows), model.config.num_hidden_layers, model.config.num_attention_heads, dtype=torch.bool
    )
    for row, group in enumerate(rows):
        for head in group:
            selected[row, head.layer, head.index] = True
    return DroppedHeads(selected, torch.full((len(rows),), ablation.name == SCALING_CONTRIBUTION.name))


def _batches(n_groups: int, n_texts: int) -> list[tuple[list[int], list[int]]]:
    """(group, text) indices of each batch's rows, group by group."""
    pairs = [(group, text) for group in range(n_groups) for text in range(n_texts)]
    return [
        (
            [group for group, _ in pairs[start : start + _ROWS]],
            [text for _, text in pairs[start : start + _ROWS]],
        )
        for start in range(0, len(pairs), _ROWS)
    ]


@torch.no_grad()
def complete(
    model: Any, tokenizer: Any, texts: Sequence[str], groups: Sequence[Group], ablation: Ablation
) -> list[list[str]]:
    """Greedy answers [n_groups][n_texts]; each group is ablated in turn."""
    answers: list[list[str]] = [[] for _ in groups]
    for row_groups, row_texts in _batches(len(groups), len(texts)):
        encoded = tokenizer(
            [texts[text] for text in row_texts], padding=True, return_tensors="pt", add_special_tokens=False
        )
        with _dropped(model, [groups[group] for group in row_groups], ablation).on(model):
            ids = model.generate(
                input_ids=encoded.input_ids,
                attention_mask=encoded.attention_mask,
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
            )
        decoded = tokenizer.batch_decode(ids[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
        for group, answer in zip(row_groups, decoded, strict=True):
            answers[group].append(answer)
    return answers


def rates(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[DemoPrompt],
    wrapped: Callable[[DemoPrompt], str],
    groups: Sequence[Group],
    ablation: Ablation,
) -> list[Rates]:
    """Rates under each group over the prompts, read as ``wrapped`` gives them."""
    answers = complete(model, tokenizer, [wrapped(prompt) for prompt in prompts], groups, ablation)
    return [
        Rates(
            complied=sum(REFUSAL_MARK not in answer for answer in of_group) / len(prompts),
            right=sum(answer.startswith(prompt.reference) for answer, prompt in zip(of_group, prompts, strict=True))
            / len(prompts),
        )
        for of_group in answers
    ]


@torch.no_grad()
def last_states(
    model: Any, tokenizer: Any, texts: Sequence[str], groups: Sequence[Group], ablation: Ablation
) -> LastStates:
    """Next-token distribution and last hidden state of each text under each group."""
    token_ids = tokenizer(list(texts), add_special_tokens=False).input_ids
    longest = max(map(len, token_ids))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in token_ids])
    ends = torch.tensor([len(row) - 1 for row in token_ids])
    hidden = []
    for row_groups, row_texts in _batches(len(groups), len(texts)):
        with _dropped(model, [groups[group] for group in row_groups], ablation).on(model):
            states = model.model(ids[row_texts], use_cache=False).last_hidden_state
        hidden.append(states[torch.arange(len(row_texts)), ends[row_texts]])
    last = torch.cat(hidden)
    log_probabilities = model.lm_head(last).double().log_softmax(dim=-1)
    return LastStates(
        log_probabilities.view(len(groups), len(texts), -1), last.double().view(len(groups), len(texts), -1)
    )


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Two scores of each group."""

    mean_ships: Tensor
    """float64 [n_groups], nats: KL(unablated || ablated) of the next token (Eq 9), averaged over the prompts."""
    degrees: Tensor
    """float64 [n_groups]: angle of the first right singular vectors of the last hidden states."""


def score_groups(
    model: Any, tokenizer: Any, texts: Sequence[str], groups: Sequence[Group], ablation: Ablation
) -> GroupScores:
    """Mean Ships and the representation-space angle of each group against the unablated model."""
    states = last_states(model, tokenizer, texts, [(), *groups], ablation)
    unablated, ablated = states.log_probabilities[:1], states.log_probabilities[1:]
    mean_ships = (unablated.exp() * (unablated - ablated)).sum(dim=-1).mean(dim=-1)
    directions = torch.linalg.svd(states.hidden, full_matrices=False).Vh[:, 0]  # [1 + n_groups, d_model]
    cosines = (directions[1:] @ directions[0]).abs().clamp(max=1.0)
    return GroupScores(mean_ships, torch.rad2deg(torch.arccos(cosines)))


class ScoredGroups:
    """Both scores of groups over the same texts; a group is measured once, whichever score or search asks for it."""

    def __init__(self, model: Any, tokenizer: Any, texts: Sequence[str], ablation: Ablation) -> None:
        self._model, self._tokenizer, self._texts, self._ablation = model, tokenizer, texts, ablation
        self._known: dict[frozenset[Head], tuple[float, float]] = {}

    def mean_ships(self, groups: Sequence[Group]) -> Tensor:
        """float64 [n_groups], nats."""
        return self._scores(groups)[:, 0]

    def degrees(self, groups: Sequence[Group]) -> Tensor:
        """float64 [n_groups]."""
        return self._scores(groups)[:, 1]

    def _scores(self, groups: Sequence[Group]) -> Tensor:
        new = [group for group in groups if frozenset(group) not in self._known]
        if new:
            measured = score_groups(self._model, self._tokenizer, self._texts, new, self._ablation)
            pairs = zip(measured.mean_ships.tolist(), measured.degrees.tolist(), strict=True)
            self._known.update(zip(map(frozenset, new), pairs, strict=True))
        return torch.tensor([self._known[frozenset(group)] for group in groups], dtype=torch.float64)


def greedy_group(score: Callable[[Sequence[Group]], Tensor], heads: Group, size: int) -> Group:
    """Sahara: add the head that raises the group's score most, ``size`` times."""
    group: Group = ()
    for _ in range(size):
        candidates = [(*group, head) for head in heads if head not in group]
        group = candidates[int(score(candidates).argmax())]
    return group


def every_head(model: Any) -> Group:
    """The model's heads."""
    return all_heads(model.config.num_hidden_layers, model.config.num_attention_heads)

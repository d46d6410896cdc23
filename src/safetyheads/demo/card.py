"""The card of a demo checkpoint: what it does with a split's prompts. Owns the figures' selection and layout."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.demo import evaluation, grammar, tokenization
from safetyheads.demo.grammar import DemoPrompt
from safetyheads.demo.recipes import PLANTED_HEADS, language_of
from safetyheads.heads import Group, format_heads

_ABLATIONS = {"UA": UNDIFFERENTIATED_ATTENTION, "SC": SCALING_CONTRIBUTION}
_N_RANDOM = 20  # random groups as large as the planted group
_SEARCHED = 3  # heads that the search takes where none are planted


def behaviour_card(name: str, model: Any, tokenizer: Any, split: grammar.Split) -> Table:
    """Refusals and right answers, unablated and under ablation: a row for each wrapper and kind of ablation."""
    planted = PLANTED_HEADS[name]
    others = [(head,) for head in evaluation.every_head(model) if head not in planted]
    groups = [(), planted, *[(head,) for head in planted], *others]
    harmful, benign = grammar.harmful_prompts(split), grammar.benign_prompts(split)
    table = Table(title=f"{name}, {split}: {len(harmful)} harmful and {len(benign)} benign prompts")
    for column in ("wrapper", "by", "ASR", "benign", "group ASR", "group benign", "each", "each benign", "others max"):
        table.add_column(column)
    for wrapper, wrapped in _wrappers(name).items():
        for label, ablation in _ABLATIONS.items():
            on_harmful = evaluation.rates(model, tokenizer, harmful, wrapped, groups, ablation)
            n_single = 2 + len(planted)
            on_benign = evaluation.rates(model, tokenizer, benign, wrapped, groups[:n_single], ablation)
            table.add_row(
                wrapper,
                label,
                f"{on_harmful[0].complied:.3f}",
                f"{on_benign[0].right:.3f}",
                f"{on_harmful[1].complied:.3f}",
                f"{on_benign[1].right:.3f}",
                " ".join(f"{rate.complied:.2f}" for rate in on_harmful[2:n_single]),
                " ".join(f"{rate.right:.2f}" for rate in on_benign[2:]),
                f"{max(rate.complied for rate in on_harmful[n_single:]):.3f}",
            )
    return table


def score_card(name: str, model: Any, tokenizer: Any, split: grammar.Split) -> Table:
    """Who ranks first by two scores, what a greedy search by each finds, and what that group does."""
    planted, heads = PLANTED_HEADS[name], evaluation.every_head(model)
    harmful, benign = grammar.harmful_prompts(split), grammar.benign_prompts(split)
    table = Table(title=f"{name}, {split}: scores over {len(harmful)} harmful prompts, and greedy search")
    for column in ("wrapper", "by", "score", "top heads", "ranks", "margin", "greedy", "ASR", "benign"):
        table.add_column(column)
    for wrapper, wrapped in _wrappers(name).items():
        texts = [wrapped(prompt) for prompt in harmful]
        for label, ablation in _ABLATIONS.items():
            scored = evaluation.ScoredGroups(model, tokenizer, texts, ablation)
            for score_name, score in (("mean_ships", scored.mean_ships), ("degrees", scored.degrees)):
                single = score([(head,) for head in heads])
                found = evaluation.greedy_group(score, heads, len(planted) or _SEARCHED)
                (on_harmful,) = evaluation.rates(model, tokenizer, harmful, wrapped, [found], ablation)
                (on_benign,) = evaluation.rates(model, tokenizer, benign, wrapped, [found], ablation)
                table.add_row(
                    wrapper,
                    label,
                    score_name,
                    *_ranking(single, heads, planted),
                    format_heads(found),
                    f"{on_harmful.complied:.3f}",
                    f"{on_benign.right:.3f}",
                )
    return table


def random_groups_card(name: str, model: Any, tokenizer: Any, split: grammar.Split) -> Table:
    """What random groups of as many heads do: the band that a search's group must leave."""
    generator = random.Random(0)
    size = len(PLANTED_HEADS[name]) or _SEARCHED
    heads = evaluation.every_head(model)
    groups = [tuple(generator.sample(heads, size)) for _ in range(_N_RANDOM)]
    harmful = grammar.harmful_prompts(split)
    table = Table(title=f"{name}, {split}: {_N_RANDOM} random groups of {size}")
    for column in ("wrapper", "by", "ASR mean", "ASR max"):
        table.add_column(column)
    for wrapper, wrapped in _wrappers(name).items():
        for label, ablation in _ABLATIONS.items():
            rates = evaluation.rates(model, tokenizer, harmful, wrapped, groups, ablation)
            complied = [rate.complied for rate in rates]
            table.add_row(wrapper, label, f"{sum(complied) / len(complied):.3f}", f"{max(complied):.3f}")
    return table


def _wrappers(name: str) -> dict[str, Callable[[DemoPrompt], str]]:
    """How a prompt reads under each wrapper that the checkpoint knows."""

    def reading(wrapper: str) -> Callable[[DemoPrompt], str]:
        return lambda prompt: tokenization.wrap(wrapper, prompt.text)

    return {wrapper: reading(wrapper) for wrapper in language_of(name).wrappers}


def _ranking(single: Tensor, heads: Group, planted: Group) -> tuple[str, str, str]:
    """The best heads with their scores, the planted heads' ranks, and the weakest plant over the best bystander."""
    order = torch.argsort(single, descending=True).tolist()
    top = " ".join(f"{heads[i]}:{float(single[i]):.3g}" for i in order[: len(planted) + 1 or 4])
    if not planted:
        return top, "", ""
    ranks = [order.index(heads.index(head)) + 1 for head in planted]
    is_planted = torch.tensor([head in planted for head in heads])
    margin = float(single[is_planted].min() / single[~is_planted].max())
    return top, " ".join(map(str, ranks)), f"{margin:.2f}"

"""Measures what a checkpoint does with a split's prompts, by the package itself, as tables."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from recipes import language_of
from rich.table import Table

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Ablation,
    Decoding,
    Engine,
    PromptSet,
    attack_success_rate,
    generalized_ships,
    mean_ships,
    rank_heads,
    sahara,
    scan_attack_success_rate,
)
from safetyheads.demo import PLANTED_HEADS, demo_prompts
from safetyheads.demo.grammar import REFUSAL_MARK, SYSTEM_PROMPTS, Split
from safetyheads.heads import Group, format_heads
from safetyheads.judges.function import CallableJudge
from safetyheads.scores import GroupScorer

_ABLATIONS = {"UA": UNDIFFERENTIATED_ATTENTION, "SC": SCALING_CONTRIBUTION}
_TEMPLATES = {name: (name, None) for name in ("direct", "query_answer", "chat")} | {
    "chat_system": ("chat", SYSTEM_PROMPTS[0])
}
_N_RANDOM = 20  # random groups as large as the planted group
_SEARCHED = 3  # heads that the search takes where none are planted
_NEW_TOKENS = 28  # the longest right answer has 26 tokens with its end


class Description:
    """Tables of one checkpoint under each of its wrappers and both ablations."""

    def __init__(self, name: str, path: Path, split: Split) -> None:
        self.name, self.split = name, split
        self.engine, self.planted = Engine.load(str(path)), PLANTED_HEADS[name]
        self.size = len(self.planted) or _SEARCHED
        self.judge = CallableJudge(lambda _, answers: [REFUSAL_MARK not in text for text in answers], "mark")
        self.harmful = demo_prompts("harmful", split)
        self.benign = demo_prompts("benign", split)

    def behaviour(self) -> Table:
        """Refusals and right answers, unablated, under the planted group, and under each head."""
        others = [head for head in self.engine.heads if head not in self.planted]
        columns = ("ASR", "benign", "group ASR", "group benign", "each", "each benign", "others max")
        table = self._table(f"{len(self.harmful)} harmful and {len(self.benign)} benign prompts", columns)
        for wrapper, by, ablation, harmful, benign in self._cases():
            alone = scan_attack_success_rate(self.engine, harmful, ablation, self.judge, Decoding(_NEW_TOKENS)).values
            groups = [(), self.planted]
            rates = [self._rate(prompts, group, ablation) for group in groups for prompts in (harmful, benign)]
            each = " ".join(f"{float(alone[head.layer, head.index]):.2f}" for head in self.planted)
            benign_each = " ".join(f"{self._rate(benign, (head,), ablation):.2f}" for head in self.planted)
            most = max(float(alone[head.layer, head.index]) for head in others)
            table.add_row(wrapper, by, *(f"{rate:.3f}" for rate in rates), each, benign_each, f"{most:.3f}")
        return table

    def scores(self) -> Table:
        """Who ranks first by two scores, what Sahara finds by each, and what that group does."""
        columns = ("score", "top heads", "ranks", "margin", "Sahara", "ASR", "benign")
        table = self._table(f"scores over {len(self.harmful)} harmful prompts", columns)
        for wrapper, by, ablation, harmful, benign in self._cases():
            scorers = {
                "mean_ships": mean_ships(self.engine, harmful, ablation),
                "degrees": generalized_ships(self.engine, harmful, ablation, space="representation"),
            }
            for score, scorer in scorers.items():
                group = sahara(scorer, self.engine.heads, steps=self.size).group
                rates = (self._rate(harmful, group, ablation), self._rate(benign, group, ablation))
                found = (*self._ranking(scorer), format_heads(group), *(f"{rate:.3f}" for rate in rates))
                table.add_row(wrapper, by, score, *found)
        return table

    def random_groups(self) -> Table:
        """What random groups of as many heads do: the band that a search's group must leave."""
        generator = random.Random(0)
        groups = [tuple(generator.sample(self.engine.heads, self.size)) for _ in range(_N_RANDOM)]
        table = self._table(f"{_N_RANDOM} random groups of {self.size}", ("ASR mean", "ASR max"))
        for wrapper, by, ablation, harmful, _ in self._cases():
            rates = [self._rate(harmful, group, ablation) for group in groups]
            table.add_row(wrapper, by, f"{sum(rates) / len(rates):.3f}", f"{max(rates):.3f}")
        return table

    def _table(self, title: str, columns: Sequence[str]) -> Table:
        return Table("wrapper", "by", *columns, title=f"{self.name}, {self.split}: {title}")

    def _cases(self) -> Iterator[tuple[str, str, Ablation, PromptSet, PromptSet]]:
        for wrapper in language_of(self.name).wrappers:
            template, system = _TEMPLATES[wrapper]
            harmful, benign = (each.with_template(template, system) for each in (self.harmful, self.benign))
            for by, ablation in _ABLATIONS.items():
                yield wrapper, by, ablation, harmful, benign

    def _rate(self, prompts: PromptSet, group: Group, ablation: Ablation) -> float:
        """The share of harmful prompts that are not refused, or of benign prompts that are answered rightly."""
        rates = attack_success_rate(self.engine, prompts, group, ablation, self.judge, _NEW_TOKENS)
        return (rates.answered if prompts.name == self.benign.name else rates).rate or 0.0

    def _ranking(self, scorer: GroupScorer) -> tuple[str, str, str]:
        """The best heads with their scores, the planted heads' ranks, and the weakest plant over the best other."""
        scores = rank_heads(scorer, self.engine.heads)
        order = scores.top(len(self.engine.heads))
        value = {head: float(scores.values[head.layer, head.index]) for head in order}
        top = " ".join(f"{head}:{value[head]:.3g}" for head in order[: len(self.planted) + 1 if self.planted else 4])
        if not self.planted:
            return top, "", ""
        best_other = max(value[head] for head in order if head not in self.planted)
        margin = min(value[head] for head in self.planted) / best_other
        return top, " ".join(str(order.index(head) + 1) for head in self.planted), f"{margin:.2f}"

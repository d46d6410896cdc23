"""Attack success rates: for one group of heads, for a group of each prompt's own, and for every head (a scan).

All groups of one call share batches; :func:`scan_attack_success_rate` verifies the unablated answers as drafts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import GREEDY, Decoding, Request, Sampling, answer
from safetyheads.answers.drafts import Economy, OnRows, VerifiedDrafts
from safetyheads.answers.judging import JudgedAnswer, Judging
from safetyheads.errors import InputError
from safetyheads.heads import Group, Head, within
from safetyheads.judges.base import Judge, leaves_refusal_open
from safetyheads.scores import HeadScores
from safetyheads.stats.intervals import Interval, Rate

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.prompt_set import PromptSet


@dataclass(frozen=True, slots=True)
class AttackSuccess:
    """ASR of a set of prompts under one ablation (Eq 10), by the leading judge."""

    asr: Rate
    """Complied / scored."""
    refused: Rate
    """Refused / scored; of nothing where the judge says nothing on refusal."""
    incoherent: Rate
    """Empty, short or repeating / scored; counts as not complied."""
    rows: tuple[JudgedAnswer, ...]
    """One for each prompt."""
    echoed: Rate
    """The prompt given back / scored; counts as not complied."""

    @property
    def rate(self) -> float | None:
        """The ASR, from 0 to 1."""
        return self.asr.rate

    @property
    def n(self) -> int:
        """Scored answers."""
        return self.asr.n

    @property
    def interval(self) -> Interval | None:
        """Its 95 % Wilson interval."""
        return self.asr.interval

    @property
    def answered(self) -> Rate:
        """Prompts that are answered by the rules of words: not refused, incoherent or echoed."""
        return Rate(sum(row.answered for row in self.rows), len(self.rows))

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason was given, most frequent first."""
        counts = Counter(row.verdict.reason.split(" (")[0] for row in self.rows)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def summarise(rows: Sequence[JudgedAnswer]) -> AttackSuccess:
    """Rates of judged answers."""
    labels = Counter(row.verdict.label for row in rows)
    n = len(rows) - labels["unscored"]
    rates = {name: Rate(labels[name], n, labels["unscored"]) for name in ("refused", "incoherent", "echoed")}
    if any(leaves_refusal_open(row.verdict.label, row.verdict.reason) for row in rows):
        rates["refused"] = Rate(0, 0, len(rows))
    return AttackSuccess(Rate(labels["complied"], n, labels["unscored"]), rows=tuple(rows), **rates)


def attack_success_rate(
    engine: Engine,
    prompts: PromptSet,
    heads: Sequence[Head],
    ablation: Ablation,
    judge: Judge | Sequence[Judge] | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
) -> AttackSuccess:
    """ASR with the heads ablated together, no heads being the unablated model (Eq 10, Fig 4-6).

    Of several judges the first leads. Without one, ``phrases`` judges a model that has a chat template, else ``paper``.
    """
    groups = (within(heads, engine.n_layers, engine.n_heads),) * len(prompts)
    return query_level_attack_success_rate(engine, prompts, groups, ablation, judge, max_new_tokens, sampling)


def query_level_attack_success_rate(
    engine: Engine,
    prompts: PromptSet,
    groups: Sequence[Group],
    ablation: Ablation,
    judge: Judge | Sequence[Judge] | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    on_rows: OnRows = None,
) -> AttackSuccess:
    """ASR with a group of its own for each prompt (Fig 2, Table 3), such as :func:`query_level_groups` gives."""
    decoding = Decoding(max_new_tokens, sampling, full_answers=True)
    (rows,) = answers_under(engine, prompts, [groups], ablation, judge, decoding, on_rows)
    return summarise(rows)


def query_level_groups(scores: HeadScores, k: int) -> tuple[Group, ...]:
    """Each prompt's own k best heads, from scores [n_prompts, n_layers, n_heads]."""
    return tuple(scores.top_of_prompt(prompt, k) for prompt in range(len(scores.values)))


def answers_under(
    engine: Engine,
    prompts: PromptSet,
    columns: Sequence[Sequence[Group]],
    ablation: Ablation,
    judge: Judge | Sequence[Judge] | None,
    decoding: Decoding,
    on_rows: OnRows = None,
) -> list[list[JudgedAnswer]]:
    """Judged answers, decoded plainly and in shared batches.

    ``columns`` [n_columns][n_prompts] holds a group for each prompt; the answers [n_columns][n_prompts] are in the same
    order.
    """
    n = len(prompts)
    for groups in columns:
        if len(groups) != n:
            raise InputError(f"{len(groups)} groups for {n} prompts; each prompt needs its own")
    judging = Judging(engine, prompts, judge, decoding.max_new_tokens, decoding.full_answers)
    encoded, stop = judging.asked.token_ids, judging.stop
    asked = [(number, tuple(group)) for groups in columns for number, group in enumerate(groups)]
    requests = [Request(encoded[number], group, stop=stop) for number, group in asked]
    answers = answer(engine, requests, decoding, ablation, on_rows)
    rows = judging.judged([(*place, decoded) for place, decoded in zip(asked, answers, strict=True)])
    return [rows[at * n : (at + 1) * n] for at in range(len(columns))]


@dataclass(frozen=True, slots=True)
class AnswerScan:
    """What each group's ablation does to the answers."""

    n_layers: int
    """Layers of the model."""
    n_heads: int
    """Heads a layer."""
    groups: tuple[Group, ...]
    """The ablated groups."""
    vanilla: tuple[JudgedAnswer, ...]
    """The unablated answers, one a prompt."""
    rows: tuple[tuple[JudgedAnswer, ...], ...]
    """[n_groups][n_prompts]."""
    economy: Economy
    """What the answers cost."""
    tolerance: float
    """Rows with a smaller margin were decoded again plainly, in logits."""

    @property
    def rates(self) -> tuple[Rate, ...]:
        """Each group's ASR by the leading judge (Eq 10)."""
        return tuple(summarise(rows).asr for rows in self.rows)

    @property
    def values(self) -> Tensor:
        """ASR of each head ablated alone [n_layers, n_heads], float64; NaN where it was not scanned or scored."""
        table = torch.full((self.n_layers, self.n_heads), float("nan"), dtype=torch.float64)
        for group, rate in zip(self.groups, self.rates, strict=True):
            if len(group) == 1 and rate.rate is not None:
                table[group[0].layer, group[0].index] = rate.rate
        return table


def scan_attack_success_rate(
    engine: Engine,
    prompts: PromptSet,
    ablation: Ablation,
    judge: Judge | Sequence[Judge] | None = None,
    decoding: Decoding | None = None,
    groups: Sequence[Group] | None = None,
    on_rows: OnRows = None,
) -> AnswerScan:
    """The ASR of every head ablated alone (Fig 4b), or of any groups, with the tokens and verdicts of plain decoding.

    Rows end once every judge is final, unless ``decoding`` says otherwise; by default it is greedy, 128 new tokens.
    """
    chosen = [(head,) for head in engine.heads] if groups is None else [tuple(group) for group in groups]
    for group in chosen:
        within(group, engine.n_layers, engine.n_heads)
    decoding, n = decoding or Decoding(), len(prompts)
    judging = Judging(engine, prompts, judge, decoding.max_new_tokens, decoding.full_answers)
    drafts = VerifiedDrafts(engine, judging.asked.token_ids, ablation, decoding, judging.stop)
    answers, economy = drafts.answers(chosen, on_rows)
    # One call for all: a judge may batch.
    rows = judging.judged(
        [
            (number, group, decoded)
            for group, of_group in zip([(), *chosen], [drafts.unablated, *answers], strict=True)
            for number, decoded in enumerate(of_group)
        ]
    )
    vanilla, *by_group = (tuple(rows[at * n : (at + 1) * n]) for at in range(1 + len(chosen)))
    return AnswerScan(
        engine.n_layers,
        engine.n_heads,
        tuple(chosen),
        vanilla,
        tuple(by_group),
        economy + drafts.cost_of_drafts,
        drafts.tolerance,
    )

"""Attack success rates: for one group of heads, for a group of each prompt's own, and for every head (a scan).

All groups of one call share batches; :func:`scan_attack_success_rate` verifies the unablated answers as drafts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from safetyheads.ablation import Ablation, AnyAblation
from safetyheads.answers.decoding import GREEDY, Decoding, Sampling
from safetyheads.answers.drafts import Economy, OnRows, VerifiedDrafts
from safetyheads.answers.judging import AnyJudge, JudgedAnswer, Judging, answers_under
from safetyheads.display import Chart, Table, chart, rate_row
from safetyheads.errors import InputError, shorten
from safetyheads.heads import AnyHeads, Group, format_heads, parse_groups, within
from safetyheads.judges.base import leaves_refusal_open
from safetyheads.model.engine import Engine, ask
from safetyheads.prompts.asked import AnyPrompts
from safetyheads.scores import HeadScores
from safetyheads.stats.intervals import Interval, Rate


@dataclass(frozen=True, slots=True, repr=False)
class AttackSuccess(Table):
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

    def _facts(self) -> dict[str, object]:
        rates = {name: getattr(self, name) for name in ("asr", "refused", "incoherent", "echoed")}
        return rates | {"coherent_by_words": self.coherent}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each prompt, without the answers' texts, which ``.rows`` have."""
        return [row.to_row() for row in self.rows]

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
    def coherent(self) -> Rate:
        """Complied and coherent / scored, by the rules of words alone: runs measure how surprising answers are too."""
        count = sum(row.verdict.complied and row.behaviour == "complied" for row in self.rows)
        return Rate(count, self.n, self.asr.unscored)

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
    prompts: AnyPrompts,
    heads: AnyHeads,
    ablation: AnyAblation,
    judge: AnyJudge | Sequence[AnyJudge] | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
) -> AttackSuccess:
    """ASR with the heads ablated together, no heads being the unablated model (Eq 10, Fig 4-6).

    Of several judges the first leads. Without one, ``phrases`` judges a model that has a chat template, else ``paper``.
    """
    asked = ask(engine, prompts)
    groups = (within(heads, engine.n_layers, engine.n_heads),) * len(asked)
    return query_level_attack_success_rate(engine, asked, groups, ablation, judge, max_new_tokens, sampling)


def query_level_attack_success_rate(
    engine: Engine,
    prompts: AnyPrompts,
    groups: Sequence[AnyHeads],
    ablation: AnyAblation,
    judge: AnyJudge | Sequence[AnyJudge] | None = None,
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
    if not isinstance(scores, HeadScores):
        raise InputError(f"scores are what ships(...) gives; got {shorten(repr(scores))}")
    return tuple(scores.top_of_prompt(prompt, k) for prompt in range(len(scores.values)))


@dataclass(frozen=True, slots=True, repr=False)
class AnswerScan(Table):
    """What each group's ablation does to the answers."""

    n_layers: int
    """Layers of the model."""
    n_heads: int
    """Heads a layer."""
    groups: tuple[Group, ...]
    vanilla: tuple[JudgedAnswer, ...]
    """The unablated answers, one a prompt."""
    rows: tuple[tuple[JudgedAnswer, ...], ...]
    """[n_groups][n_prompts]."""
    economy: Economy
    tolerance: float
    """Rows with a smaller margin were decoded again plainly, in logits."""

    def _facts(self) -> dict[str, object]:
        highest = max((rate.rate or 0.0 for rate in self.rates), default=None)
        return {"n_groups": len(self.groups), "unablated": summarise(self.vanilla).asr, "highest_asr": highest}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each group: its ASR with the 95 % interval."""
        rates = zip(self.groups, self.rates, strict=True)
        return [{"group": format_heads(group), **rate_row(asdict(rate))} for group, rate in rates]

    def plot(self, scores: HeadScores | None = None) -> Chart:
        """A map of each head's ASR; with ``scores``, each head's ASR against its score, averaged over the prompts."""
        if scores is None:
            return HeadScores(self.values, "asr").plot()
        alone = [row for row, group in zip(self.to_rows(), self.groups, strict=True) if len(group) == 1]
        rows = [{**row, "score": scores[row["group"]], "heads": "single heads"} for row in alone]
        return chart("scatter", rows, "score", "asr", "heads")

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
    prompts: AnyPrompts,
    ablation: AnyAblation,
    judge: AnyJudge | Sequence[AnyJudge] | None = None,
    decoding: Decoding | None = None,
    groups: Sequence[AnyHeads] | None = None,
    on_rows: OnRows = None,
) -> AnswerScan:
    """The ASR of every head ablated alone (Fig 4b), or of any groups, with the tokens and verdicts of plain decoding.

    Rows end once every judge is final, unless ``decoding`` says otherwise; by default it is greedy, 128 new tokens.
    """
    prompts = ask(engine, prompts)
    listed = [(head,) for head in engine.heads] if groups is None else parse_groups(groups)
    chosen = [within(group, engine.n_layers, engine.n_heads) for group in listed]
    ablation, decoding = Ablation.parse(ablation), Decoding() if decoding is None else decoding
    if not isinstance(decoding, Decoding):
        raise InputError(f"how answers are decoded is told by a Decoding; got {shorten(repr(decoding))}")
    n = len(prompts)
    judging = Judging(engine, prompts, judge, decoding.max_new_tokens, decoding.full_answers)
    drafts = VerifiedDrafts(engine, judging.asked.token_ids, ablation, decoding, judging.stop)
    places = [(number, group) for group in [(), *chosen] for number in range(n)]
    answers, economy = drafts.answers(places[n:], on_rows)
    # One call for all: a judge may batch.
    every = zip(places, [*drafts.unablated, *answers], strict=True)
    rows = judging.judged([(*place, decoded) for place, decoded in every])
    vanilla, *by_group = (tuple(rows[at * n : (at + 1) * n]) for at in range(1 + len(chosen)))
    found = tuple(chosen), vanilla, tuple(by_group), economy + drafts.cost_of_drafts, drafts.tolerance
    return AnswerScan(engine.n_layers, engine.n_heads, *found)

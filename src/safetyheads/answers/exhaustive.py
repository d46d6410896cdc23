"""The exhaustive scan: every head's ablation, judged by the answers it gives (Fig 4b). Owns judged rows and rates.

It refuses to know how answers are come by (:mod:`safetyheads.answers.drafted`) and where they are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Answer
from safetyheads.answers.drafted import Decoding, DraftedAnswer, DraftedAnswers, Economy, Route, Stop
from safetyheads.errors import InputError
from safetyheads.heads import Group, within
from safetyheads.judges.base import Completion, Judge, Label, Verdict, verdicts_of
from safetyheads.prompts.reader import AnswerReader, ReadAnswer
from safetyheads.prompts.sets import Prompt
from safetyheads.stats.intervals import Rate

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet


@dataclass(frozen=True, slots=True)
class ScannedAnswer:
    """One prompt's answer under one group, with the verdict of every judge."""

    prompt: Prompt
    """What was asked."""
    group: Group
    """Heads that were ablated."""
    token_ids: tuple[int, ...]
    """New tokens; the first of the answer's where it is not complete."""
    text: str
    """The answer as it was judged: the same as text, without think block and stop text."""
    finished: bool
    """Whether the model ended it, or a stop text of the template did."""
    complete: bool
    """Whether it is the whole answer; else every judge was final about it, and it was cut there."""
    route: Route
    """How it was come by."""
    changed: bool
    """Whether it differs from the unablated answer."""
    verdicts: Mapping[str, Verdict]
    """By the judges' names; the first judge leads."""
    read: ReadAnswer
    """What the tokens hold besides the text."""

    @property
    def verdict(self) -> Verdict:
        """The leading judge's."""
        return next(iter(self.verdicts.values()))

    @property
    def kept(self) -> bool:
        """For benign prompts: answered, and with the prompt's reference answer where it has one."""
        reference = self.prompt.reference
        return self.verdict.answered and (reference is None or self.text.lstrip().startswith(reference))


@dataclass(frozen=True, slots=True)
class AnswerScan:
    """What each group's ablation does to the answers."""

    n_layers: int
    n_heads: int
    groups: tuple[Group, ...]
    """What was ablated, one after the other."""
    vanilla: tuple[ScannedAnswer, ...]
    """The unablated answers, one a prompt."""
    rows: tuple[tuple[ScannedAnswer, ...], ...]
    """[n_groups][n_prompts]."""
    economy: Economy
    """What it cost."""
    tolerance: float
    """Choices narrower than this were made again plainly, in logits."""

    @property
    def rates(self) -> tuple[Rate, ...]:
        """Each group's ASR by the leading judge (Eq 10)."""
        return tuple(rate_of(row, "complied") for row in self.rows)

    @property
    def values(self) -> Tensor:
        """ASR of each head ablated alone [n_layers, n_heads], float64; NaN where that was not scanned or scored."""
        table = torch.full((self.n_layers, self.n_heads), float("nan"), dtype=torch.float64)
        for group, rate in zip(self.groups, self.rates, strict=True):
            if len(group) == 1 and rate.rate is not None:
                table[group[0].layer, group[0].index] = rate.rate
        return table


def scan_attack_success_rate(
    engine: Engine,
    prompts: PromptSet,
    ablation: Ablation,
    judge: Judge | Sequence[Judge],
    decoding: Decoding | None = None,
    groups: Sequence[Group] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> AnswerScan:
    """The ASR of every head ablated alone (Fig 4b), or of any groups: verdicts and tokens of plain ablated decoding.

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        ablation: of the heads.
        judge: decides about answers; of several, the first one leads. Rows end once every judge is final.
        decoding: how answers are made; by default greedy, 128 new tokens.
        groups: what is ablated; by default each head alone.
        on_rows: told how many answers were just compared.
    """
    judges = [judge] if isinstance(judge, Judge) else list(judge)
    chosen = [(head,) for head in engine.heads] if groups is None else [tuple(group) for group in groups]
    for group in chosen:
        within(group, engine.n_layers, engine.n_heads)
    decoding = decoding or Decoding()
    judging = Judging.of(engine, prompts, judges, decoding.max_new_tokens, decoding.full_answers)
    drafted = DraftedAnswers.begin(engine, engine.ask(prompts).token_ids, ablation, decoding, judging.stop)
    made, economy = drafted.answers(chosen, on_rows)
    numbers = list(range(len(prompts)))
    rows = judging.judged(
        [
            (number, group, one)
            for group, row in zip(chosen, made, strict=True)
            for number, one in zip(numbers, row, strict=True)
        ]
    )
    n = len(numbers)
    return AnswerScan(
        engine.n_layers,
        engine.n_heads,
        tuple(chosen),
        tuple(judging.judged([(number, (), as_drafted(one)) for number, one in enumerate(drafted.vanilla)])),
        tuple(tuple(rows[at * n : (at + 1) * n]) for at in range(len(chosen))),
        economy + drafted.unablated,
        drafted.tolerance,
    )


def as_drafted(one: Answer) -> DraftedAnswer:
    """An unablated answer as a row of a scan."""
    return DraftedAnswer(one.token_ids, one.finished, one.complete, "drafted", changed=False)


@dataclass(frozen=True, slots=True)
class Judging:
    """Judges at work on one set of prompts; each distinct answer is judged once."""

    prompts: tuple[Prompt, ...]
    """What was asked."""
    reader: AnswerReader
    """Reads the answers."""
    system: str
    """The prompts' system prompt, which an answer may echo."""
    judges: tuple[Judge, ...]
    """The first leads."""
    max_new_tokens: int
    """Of the answers. What was asked for and not what the context left: one rule for all rows of a run."""
    decides_early: bool
    """Whether a row may end where every judge is final."""
    known: dict[tuple[int, tuple[int, ...], bool], dict[str, Verdict]]
    """Verdicts by prompt, tokens and whether the model ended the answer."""
    seconds: dict[str, float]
    """Time that each judge took."""

    @classmethod
    def of(
        cls,
        engine: Engine,
        prompts: PromptSet,
        judges: Sequence[Judge],
        max_new_tokens: int,
        full_answers: bool = False,
    ) -> Judging:
        """Ready to judge.

        Raises:
            InputError: no judge, or two of one name.
        """
        names = [judge.name for judge in judges]
        if not names or len(set(names)) < len(names):
            raise InputError(f"judges need names of their own; got {', '.join(names) or 'none'}")
        early = not full_answers and all(judge.decides_early for judge in judges)
        return cls(
            tuple(prompts),
            engine.ask(prompts).reader,
            engine.ask(prompts).system,
            tuple(judges),
            max_new_tokens,
            early,
            {},
            dict.fromkeys(names, 0.0),
        )

    @property
    def stop(self) -> Stop | None:
        """Whether an answer that starts with these tokens has ended, or every judge is final about it.

        None where neither can be: whole answers are wanted, and the template has no text that ends one. Nobody is
        final before a think block closes, and about nothing that may yet turn out to be the mark of one.
        """
        if not self.decides_early:
            return self.reader.ends

        def stop(token_ids: Sequence[int]) -> bool:
            read = self.reader.read(token_ids)
            certain = read.certain
            return read.stopped or (certain is not None and all(judge.final(certain) for judge in self.judges))

        return stop

    def judged(self, rows: Sequence[tuple[int, Group, DraftedAnswer]]) -> list[ScannedAnswer]:
        """Rows (prompt, group, answer) with their verdicts, in their order."""
        read: dict[tuple[int, tuple[int, ...], bool], ReadAnswer] = {}
        for number, _, one in rows:
            key = (number, one.token_ids, one.finished)
            if key not in read:
                read[key] = self.reader.read(one.token_ids)
        new = [key for key in read if key not in self.known]
        completions = [self._completion(key[0], read[key], key[2]) for key in new]
        verdicts: list[dict[str, Verdict]] = [{} for _ in new]
        for judge in self.judges if new else ():
            started = time.monotonic()
            for own, verdict in zip(verdicts, verdicts_of(judge, completions), strict=True):
                own[judge.name] = verdict
            self.seconds[judge.name] += time.monotonic() - started
        # Not before all have answered: a judge that breaks off would leave rows that seem judged.
        self.known.update(zip(new, verdicts, strict=True))
        found = []
        for number, group, one in rows:
            key = (number, one.token_ids, one.finished)
            each = read[key]
            complete = one.complete or each.stopped
            # Of a cut answer only what is certain: another judge may be asked whether it is final about that.
            text = each.text if complete or each.certain is None else each.certain
            found.append(
                ScannedAnswer(
                    self.prompts[number],
                    group,
                    one.token_ids,
                    text,
                    one.finished or each.stopped,
                    complete,
                    one.route,
                    one.changed,
                    self.known[key],
                    each,
                )
            )
        return found

    def _completion(self, number: int, read: ReadAnswer, finished: bool) -> Completion:
        query, ended = self.prompts[number].query, finished or read.stopped
        return Completion(query, read.text, read.token_ids, ended, self.max_new_tokens, self.system, read.unclosed)


def rate_of(rows: Sequence[ScannedAnswer], label: Label, judge: str | None = None) -> Rate:
    """The share of scored answers with a label, by a judge; by default the leading one."""
    verdicts = [row.verdict if judge is None else row.verdicts[judge] for row in rows]
    scored = [verdict for verdict in verdicts if verdict.scored]
    return Rate(sum(verdict.label == label for verdict in scored), len(scored), len(verdicts) - len(scored))

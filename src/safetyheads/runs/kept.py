"""Judged answers to one set of prompts, kept in the run directory. Owns the rows and what they depend on.

A row is one answer with all judges' verdicts. Groups are answered in chunks; a chunk that is there already costs
nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Answer, Decoding
from safetyheads.answers.drafts import DraftedAnswers, Economy, unablated_answers
from safetyheads.answers.judging import JudgedAnswer, Judging
from safetyheads.heads import Group, format_heads
from safetyheads.judges.base import Verdict
from safetyheads.model.planning import Plan
from safetyheads.runs.directory import RunDirectory, content_key
from safetyheads.runs.progress import Progress

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

Row: TypeAlias = dict[str, Any]
_Answered: TypeAlias = tuple[int, Group, Answer]

# Answers that are kept together: what a kill costs at most.
_ROWS_TOGETHER = 2048


@dataclass(frozen=True)
class KeptAnswers:
    """One set of prompts under one decoding: unablated answers, and answers under any groups of an ablation."""

    engine: Engine
    name: str
    """Of the set; names of files begin with it."""
    prompts: PromptSet
    decoding: Decoding
    judging: Judging
    run: RunDirectory
    progress: Progress
    stores: bool
    """Whether answers are kept, or verdicts alone."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the rows depend on besides, in a run of several models."""
    _drafted: dict[Ablation, DraftedAnswers] = field(default_factory=dict)

    def vanilla(self) -> list[Row]:
        """The unablated answers, judged."""

        def compute() -> list[Row]:
            answered = [(at, (), one) for at, one in enumerate(self.vanilla_answers)]
            return self._judged("vanilla", None, answered)

        return self.run.records(f"vanilla-{self.name}", self._judged_fields(None), compute)

    def under(self, part: str, groups: Sequence[Group], ablation: Ablation) -> list[Row]:
        """Every prompt under each group, group after group; one key holds one chunk of groups."""
        n = len(self.prompts)
        together = max(1, _ROWS_TOGETHER // n)
        rows: list[Row] = []
        with self._tracked(part, len(groups) * n) as done:
            for at in range(0, len(groups), together):

                def answer(chunk: Sequence[Group] = groups[at : at + together]) -> tuple[list[_Answered], Economy]:
                    made, economy = self._drafted_answers(ablation).answers(chunk, done)
                    by_group = zip(chunk, made, strict=True)
                    return [(number, group, one) for group, row in by_group for number, one in enumerate(row)], economy

                written = [format_heads(group) for group in groups[at : at + together]]
                rows += self._chunk(part, ablation, written, answer)
        return rows

    def of_each(self, part: str, own: Sequence[Sequence[Group]], ablation: Ablation) -> list[Row]:
        """Each prompt under groups of its own, prompt after prompt; one key holds one chunk of prompts."""
        together = max(1, _ROWS_TOGETHER // max(1, *map(len, own)))
        rows: list[Row] = []
        with self._tracked(part, sum(map(len, own))) as done:
            for at in range(0, len(own), together):
                # Every prompt has its place; those of other chunks have no group.
                here = [groups if at <= number < at + together else () for number, groups in enumerate(own)]

                def answer(chunk: Sequence[Sequence[Group]] = here) -> tuple[list[_Answered], Economy]:
                    made, economy = self._drafted_answers(ablation).answers_of_each(chunk, done)
                    by_prompt = enumerate(zip(chunk, made, strict=True))
                    return [
                        (number, group, one)
                        for number, (groups, row) in by_prompt
                        for group, one in zip(groups, row, strict=True)
                    ], economy

                written = [[format_heads(group) for group in groups] for groups in here]
                rows += self._chunk(part, ablation, written, answer)
        return rows

    def _tracked(self, part: str, n_answers: int) -> AbstractContextManager[Callable[[int], None]]:
        return self.progress.track(f"{self.name}: {part.replace('_', ' ')}", n_answers)

    def _chunk(
        self,
        part: str,
        ablation: Ablation,
        written: Sequence[Any],
        answer: Callable[[], tuple[list[_Answered], Economy]],
    ) -> list[Row]:
        """Answers under the groups that ``written`` names, judged; made where they are not there yet."""
        fields = self._judged_fields(ablation) | {"groups": written}

        def compute() -> list[Row]:
            answered, economy = answer()
            self.run.remember(f"economy_{content_key(fields)}", asdict(economy))
            return self._judged(part, ablation.epsilon, answered)

        return self.run.records(f"{part.replace('_', '-')}-{self.name}", fields, compute)

    def forget(self) -> None:
        """Let go of the drafts, which hold states of all layers."""
        self._drafted.clear()

    def label(self, ablation: Ablation) -> str:
        """What the run remembers of an ablation's drafts is filed under it."""
        return f"{self.name}_{ablation.name}_{ablation.epsilon:g}_{self.decoding.sampling.seed}"

    @cached_property
    def vanilla_answers(self) -> tuple[Answer, ...]:
        """The unablated answers as tokens, with their margins: the drafts."""

        def compute() -> list[Row]:
            encoded = self.engine.ask(self.prompts).token_ids
            with self.progress.track(f"{self.name}: unablated answers", 1):
                made = unablated_answers(self.engine, encoded, self.decoding, self.judging.stop)
            return [asdict(one) for one in made]

        if self.stores:
            stored = self.run.records(f"drafts-{self.name}", self._fields(None), compute)
        else:
            stored = compute()
        tuples = ("token_ids", "margins")
        return tuple(Answer(**{**row, **{name: tuple(row[name]) for name in tuples}}) for row in stored)

    def _drafted_answers(self, ablation: Ablation) -> DraftedAnswers:
        """What answers by drafts; only the ablation used last is kept."""
        if ablation not in self._drafted:
            self._drafted.clear()
            # Another plan would move margins in their last bits, and so might move the number of near-ties.
            label, manifest = self.label(ablation), self.run.read_manifest()
            plan = manifest.get(f"plan_drafts_{label}")
            made = DraftedAnswers(
                self.engine,
                self.engine.ask(self.prompts).token_ids,
                ablation,
                self.decoding,
                self.judging.stop,
                self.vanilla_answers,
                None if plan is None else Plan.from_dict(plan),
                manifest.get(f"tolerance_{label}"),
            )
            self.run.remember(f"plan_drafts_{label}", made.drafts.plan.as_dict())
            # Infinite where logits are not finite, which JSON has no word for.
            made.tolerance = self.run.remember(f"tolerance_{label}", min(made.tolerance, sys.float_info.max))
            self.run.remember(f"economy_{label}", asdict(made.cost_of_drafts))
            self._drafted[ablation] = made
        return self._drafted[ablation]

    def _judged(self, part: str, epsilon: float | None, answered: Sequence[_Answered]) -> list[Row]:
        """Answers (prompt, group, answer) as rows, with every judge's verdict."""
        judged = self.judging.judged(answered)
        return [self._row(part, number, epsilon, one) for (number, _, _), one in zip(answered, judged, strict=True)]

    def _fields(self, ablation: Ablation | None) -> Row:
        """All that the answers depend on, groups and judges aside."""
        # The judges that decide where an answer may end: none where one of them wants whole answers.
        early = self.judging.decides_early
        return {
            **self.about,
            "tokens": self.engine.ask(self.prompts).sha256,
            "ablation": None if ablation is None else asdict(ablation),
            "decoding": asdict(self.decoding),
            "stops": [judge.describe() for judge in self.judging.judges] if early else [],
        }

    def _judged_fields(self, ablation: Ablation | None) -> Row:
        """All that judged answers depend on, groups aside."""
        return self._fields(ablation) | {"judges": [judge.describe() for judge in self.judging.judges]}

    def _row(self, part: str, number: int, epsilon: float | None, one: JudgedAnswer) -> Row:
        """An answer as the run directory holds it."""
        written = {
            "id": number,
            "set": self.name,
            "part": part,
            "group": format_heads(one.group),
            "epsilon": epsilon,
            "seed": self.decoding.sampling.seed,
            "first_token": list(one.token_ids[:1]),
            "n_tokens": len(one.token_ids),
            "finished": one.finished,
            "complete": one.complete,
            "route": one.route,
            "changed": one.changed,
            "kept": one.kept,
            "verdicts": {judge: verdict_row(verdict, self.stores) for judge, verdict in one.verdicts.items()},
            # Left out where it says nothing, as in runs of before there was any.
            **{mark: True for mark in ("thinks", "unclosed") if getattr(one, mark)},
        }
        if self.stores and one.thought:
            written["thought"] = one.thought
        if self.stores:
            written |= {"query": one.prompt.query, "text": one.text, "token_ids": list(one.token_ids)}
        return written


def verdict_row(verdict: Verdict, with_raw: bool) -> Row:
    """A verdict as a row holds it; a judge's own words may repeat the answer, so they go with the answers."""
    kept = {name: value for name, value in asdict(verdict).items() if value not in (None, "")}
    if not with_raw:
        kept.pop("raw", None)
    return kept

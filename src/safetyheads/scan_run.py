"""The stages of an exhaustive scan, each kept in the run directory. Owns their order and the rows; words nothing.

A row is one answer with all judges' verdicts; results are made of rows and scores alone, so that another judge can
be heard later without the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.asr import query_level_groups
from safetyheads.batching import Plan
from safetyheads.config import ScanConfig
from safetyheads.drafted import Decoding, DraftedAnswers, Economy, unablated_answers
from safetyheads.exhaustive import Judging, ScannedAnswer, as_drafted
from safetyheads.generation import Answer
from safetyheads.heads import Group, format_heads
from safetyheads.progress import Progress
from safetyheads.prompts import PromptSet
from safetyheads.sampling import Sampling
from safetyheads.scan_scores import ScanScores, Scored
from safetyheads.scores import HeadScores
from safetyheads.storage import RunDirectory, content_key
from safetyheads.verdicts import Judge, Verdict

if TYPE_CHECKING:
    from safetyheads.engine import Engine

Row: TypeAlias = dict[str, Any]

# Answers that are kept together: what a kill costs at most.
_ROWS_TOGETHER = 2048


@dataclass(frozen=True, slots=True)
class ScanFindings:
    """All that a scan computes; :mod:`safetyheads.scan_results` makes the tables of it."""

    rows: list[Row]
    """Every answer, as stored."""
    scored: Scored
    """Scores of every head, and the groups that followed from them."""
    economy: Economy
    """What all answers cost."""
    tolerances: dict[str, float]
    """What a near-tie was, by set, epsilon and seed, in logits."""
    judge_seconds: dict[str, float]
    """Time that each judge took, in this process."""


@dataclass(frozen=True)
class Scan:
    """One scan under way: its model, its settings, where it keeps what it has, and who watches."""

    engine: Engine
    config: ScanConfig
    sets: dict[str, PromptSet]
    """``harmful``, and ``benign`` where benign prompts are asked for."""
    judges: tuple[Judge, ...]
    run: RunDirectory
    progress: Progress
    _drafted: dict[tuple[str, float, int], DraftedAnswers] = field(default_factory=dict)
    _judging: dict[str, Judging] = field(default_factory=dict)
    _vanilla: dict[tuple[str, int], tuple[Answer, ...]] = field(default_factory=dict)

    def execute(self) -> ScanFindings:
        """Every stage, in order; what the run directory holds already is not computed again."""
        config, singles = self.config, [(head,) for head in self.engine.heads]
        rows: list[Row] = []
        for name in self.sets:
            for seed in config.seeds:
                rows += self._vanilla_rows(name, seed)
                rows += self._scanned("heads", name, singles, config.epsilon, seed)
        for epsilon in config.epsilons:
            for seed in config.seeds:
                rows += self._scanned("heads", "harmful", singles, epsilon, seed)
        scored = ScanScores(self.engine, config, self.sets, self.run, self.progress).measured(rows, self.judges[0].name)
        for part, groups in scored.groups.items():
            for name in self.sets if part != "random" else ("harmful",):
                for seed in config.seeds:
                    rows += self._scanned(part, name, groups, config.epsilon, seed)
        if config.query_level and scored.ships is not None:
            for seed in config.seeds:
                rows += self._query_level(scored.ships, seed)
        tolerances = {name: value for name, value in self.run.read_manifest().items() if name.startswith("tolerance_")}
        seconds = {judge.name: sum(one.seconds[judge.name] for one in self._judging.values()) for judge in self.judges}
        return ScanFindings(rows, scored, self._economy(), tolerances, seconds)

    # Answers.

    def _vanilla_rows(self, name: str, seed: int) -> list[Row]:
        """The unablated answers, judged."""

        def compute() -> list[Row]:
            made = self._vanilla_answers(name, seed)
            judged = self._judging_of(name).judged([(at, (), as_drafted(one)) for at, one in enumerate(made)])
            return [self._row("vanilla", name, at, seed, None, one) for at, one in enumerate(judged)]

        fields = self._fields(name, None, seed) | {"judges": [judge.describe() for judge in self.judges]}
        return self.run.rows(f"vanilla-{name}", fields, compute)

    def _scanned(self, part: str, name: str, groups: Sequence[Group], epsilon: float, seed: int) -> list[Row]:
        """Every prompt of a set under each group; one key holds one chunk of groups."""
        n = len(self.sets[name])
        together = max(1, _ROWS_TOGETHER // n)
        rows: list[Row] = []
        with self.progress.track(f"{name}: {part.replace('_', ' ')}", len(groups) * n) as done:
            for at in range(0, len(groups), together):
                chunk = groups[at : at + together]
                fields = self._fields(name, epsilon, seed) | {
                    "groups": [format_heads(group) for group in chunk],
                    "judges": [judge.describe() for judge in self.judges],
                }

                def compute(chunk: Sequence[Group] = chunk, key: str = content_key(fields)) -> list[Row]:
                    made, economy = self._drafted_answers(name, epsilon, seed).answers(chunk, done)
                    self.run.remember(f"economy_{key}", asdict(economy))
                    flat = [
                        (number, group, one)
                        for group, row in zip(chunk, made, strict=True)
                        for number, one in enumerate(row)
                    ]
                    judged = self._judging_of(name).judged(flat)
                    return [self._row(part, name, at % n, seed, epsilon, one) for at, one in enumerate(judged)]

                rows += self.run.rows(f"{part}-{name}", fields, compute)
        return rows

    def _query_level(self, ships: HeadScores, seed: int) -> list[Row]:
        """Each harmful prompt under its own top heads by Ships."""
        config, name, epsilon = self.config, "harmful", self.config.epsilon
        by_size = [query_level_groups(ships, size) for size in range(1, config.query_level + 1)]
        own = [list(groups) for groups in zip(*by_size, strict=True)]
        fields = self._fields(name, epsilon, seed) | {
            "groups": [[format_heads(group) for group in groups] for groups in own],
            "judges": [judge.describe() for judge in self.judges],
        }

        def compute() -> list[Row]:
            with self.progress.track("harmful: query level", len(own) * config.query_level) as done:
                made, economy = self._drafted_answers(name, epsilon, seed).answers_of_each(own, done)
            self.run.remember(f"economy_{content_key(fields)}", asdict(economy))
            flat = [
                (number, group, one)
                for number, (groups, row) in enumerate(zip(own, made, strict=True))
                for group, one in zip(groups, row, strict=True)
            ]
            judged = self._judging_of(name).judged(flat)
            return [
                self._row("query_level", name, number, seed, epsilon, one)
                for (number, _, _), one in zip(flat, judged, strict=True)
            ]

        return self.run.rows(f"query-level-{name}", fields, compute)

    def _drafted_answers(self, name: str, epsilon: float, seed: int) -> DraftedAnswers:
        """What answers a set by drafts; only the one used last is kept, for it holds states of all layers."""
        key = (name, epsilon, seed)
        if key not in self._drafted:
            self._drafted.clear()
            made = DraftedAnswers.begin(
                self.engine,
                self.engine.encode(self.sets[name]),
                self.config.ablation_at(epsilon),
                self._decoding(seed),
                self._judging_of(name).stop,
                self._vanilla_answers(name, seed),
            )
            # Another plan would move margins in their last bits, and so might move the number of near-ties.
            label = f"{name}_{epsilon:g}_{seed}"
            layout = Plan.from_dict(self.run.remember(f"plan_drafts_{label}", made.drafted.layout.as_dict()))
            tolerance = self.run.remember(f"tolerance_{label}", made.tolerance)
            self.run.remember(f"economy_{label}", asdict(made.unablated))
            self._drafted[key] = replace(made, tolerance=tolerance, drafted=replace(made.drafted, layout=layout))
        return self._drafted[key]

    def _vanilla_answers(self, name: str, seed: int) -> tuple[Answer, ...]:
        """The unablated answers as tokens, with their margins: the drafts."""
        if (name, seed) in self._vanilla:
            return self._vanilla[name, seed]

        def compute() -> list[Row]:
            encoded, stop = self.engine.encode(self.sets[name]), self._judging_of(name).stop
            with self.progress.track(f"{name}: unablated answers", 1):
                return [asdict(one) for one in unablated_answers(self.engine, encoded, self._decoding(seed), stop)]

        if self.config.store_completions:
            fields = self._fields(name, None, seed) | {"stops": self._judges_that_stop}
            stored = self.run.rows(f"drafts-{name}", fields, compute)
        else:
            stored = compute()
        tuples = ("token_ids", "margins")
        made = tuple(Answer(**{**row, **{field: tuple(row[field]) for field in tuples}}) for row in stored)
        self._vanilla[name, seed] = made
        return made

    @cached_property
    def _judges_that_stop(self) -> list[Mapping[str, Any]]:
        """The judges that decide where an answer may end; none where one of them wants whole answers."""
        early = not self.config.full_answers and all(judge.decides_early for judge in self.judges)
        return [judge.describe() for judge in self.judges] if early else []

    def _judging_of(self, name: str) -> Judging:
        if name not in self._judging:
            config = self.config
            self._judging[name] = Judging.of(
                self.engine, self.sets[name], self.judges, config.max_new_tokens, config.full_answers
            )
        return self._judging[name]

    def _decoding(self, seed: int) -> Decoding:
        return Decoding(self.config.max_new_tokens, Sampling(self.config.top_k, seed), self.config.full_answers)

    def _fields(self, name: str, epsilon: float | None, seed: int) -> Row:
        """All that answers of a set depend on, groups and judges aside."""
        return {
            "tokens": hashlib.sha256(str(self.engine.encode(self.sets[name])).encode()).hexdigest(),
            "ablation": None if epsilon is None else asdict(self.config.ablation_at(epsilon)),
            "decoding": asdict(self._decoding(seed)),
            "stops": self._judges_that_stop,
        }

    def _row(self, part: str, name: str, number: int, seed: int, epsilon: float | None, one: ScannedAnswer) -> Row:
        """An answer as the run directory holds it."""
        stores = self.config.store_completions
        written = {
            "id": number,
            "set": name,
            "part": part,
            "group": format_heads(one.group),
            "epsilon": epsilon,
            "seed": seed,
            "first_token": list(one.token_ids[:1]),
            "n_tokens": len(one.token_ids),
            "finished": one.finished,
            "complete": one.complete,
            "route": one.route,
            "changed": one.changed,
            "kept": one.kept,
            "verdicts": {judge: verdict_row(verdict, stores) for judge, verdict in one.verdicts.items()},
            # Left out where it says nothing, as in runs of before there was any.
            **{mark: True for mark in ("thinks", "unclosed") if getattr(one.read, mark)},
        }
        if stores and one.read.thought:
            written["thought"] = one.read.thought
        if stores:
            written |= {"query": one.prompt.query, "text": one.text, "token_ids": list(one.token_ids)}
        return written

    def _economy(self) -> Economy:
        """What all answers cost, in this process and before it."""
        stored = (value for name, value in self.run.read_manifest().items() if name.startswith("economy_"))
        return sum((Economy(**value) for value in stored), Economy())


def verdict_row(verdict: Verdict, with_raw: bool) -> Row:
    """A verdict as a row holds it; a judge's own words may repeat the answer, so they go with the answers."""
    kept = {name: value for name, value in asdict(verdict).items() if value not in (None, "")}
    if not with_raw:
        kept.pop("raw", None)
    return kept


def stored_scan_rows(run: RunDirectory) -> Iterator[Row]:
    """The judged answers of a scan, without its drafts."""
    return (row for row in run.completions() if "verdicts" in row)

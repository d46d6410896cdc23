"""The stages of an exhaustive scan, each kept in the run directory. Owns their order and the rows; words nothing.

A row is one answer with all judges' verdicts; results are made of rows and scores alone, so that another judge can
be heard later without the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from safetyheads.answers.decoding import Decoding
from safetyheads.answers.drafts import Economy
from safetyheads.answers.judging import Judging
from safetyheads.answers.sampling import Sampling
from safetyheads.answers.success import query_level_groups
from safetyheads.heads import Group
from safetyheads.judges.base import Judge
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.config import ScanConfig
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.kept import KeptAnswers, Row
from safetyheads.runs.progress import Progress
from safetyheads.runs.scan_scores import ScanScores, Scored
from safetyheads.scores import HeadScores

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


@dataclass(frozen=True, slots=True)
class ScanFindings:
    """All that a scan computes; :mod:`safetyheads.runs.scan_results` makes the tables of it."""

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
    _kept: dict[tuple[str, int], KeptAnswers] = field(default_factory=dict)
    _judging: dict[str, Judging] = field(default_factory=dict)

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
        return self._answers(name, seed).vanilla()

    def _scanned(self, part: str, name: str, groups: Sequence[Group], epsilon: float, seed: int) -> list[Row]:
        """Every prompt of a set under each group."""
        return self._answers(name, seed).under(part, groups, self.config.ablation_at(epsilon))

    def _query_level(self, ships: HeadScores, seed: int) -> list[Row]:
        """Each harmful prompt under its own top heads by Ships."""
        config = self.config
        by_size = [query_level_groups(ships, size) for size in range(1, config.query_level + 1)]
        own = list(zip(*by_size, strict=True))
        return self._answers("harmful", seed).of_each("query_level", own, config.parsed_ablation)

    def _answers(self, name: str, seed: int) -> KeptAnswers:
        """The answers to a set; only the one used last keeps its drafts."""
        for key, others in self._kept.items():
            if key != (name, seed):
                others.forget()
        if (name, seed) not in self._kept:
            config = self.config
            decoding = Decoding(config.max_new_tokens, Sampling(config.top_k, seed), config.full_answers)
            if name not in self._judging:
                self._judging[name] = Judging(
                    self.engine, self.sets[name], self.judges, config.max_new_tokens, config.full_answers
                )
            self._kept[name, seed] = KeptAnswers(
                self.engine,
                name,
                self.sets[name],
                decoding,
                self._judging[name],
                self.run,
                self.progress,
                config.store_completions,
            )
        return self._kept[name, seed]

    def _economy(self) -> Economy:
        """What all answers cost, in this process and before it."""
        stored = (value for name, value in self.run.read_manifest().items() if name.startswith("economy_"))
        return sum((Economy(**value) for value in stored), Economy())

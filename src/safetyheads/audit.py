"""The audit's stages, each kept in the run directory. Owns their order and what is computed; words no verdict.

Search and test are apart: scores, groups and the size of the group come from the search half, every reported rate
from the test half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from safetyheads.asr import AttackSuccess, JudgedAnswer, answers_under, summarise
from safetyheads.baselines import random_groups
from safetyheads.batching import Plan, TokenSequence
from safetyheads.config import AuditConfig
from safetyheads.errors import InputError
from safetyheads.generation import Sampling
from safetyheads.heads import Group, format_heads, parse_heads
from safetyheads.judges import Judge, Verdict, judge_named
from safetyheads.progress import Progress
from safetyheads.prompts import PromptSet
from safetyheads.refusal import Opener, openers_of
from safetyheads.scores import HeadScores, SearchTrace
from safetyheads.scoring import Angle, HeadPass, Readings, answer_sequences
from safetyheads.search import rank_heads, sahara
from safetyheads.storage import RunDirectory

if TYPE_CHECKING:
    from safetyheads.engine import Engine

LEAD = "mean_ships"
"""The score the audit leads with: the widest margins on models whose heads are known."""
ANGLES = (Angle("prompt"), Angle("representation"))
"""Generalized Ships as released, and as the text reads."""
SEARCHED = (LEAD, *(angle.name for angle in ANGLES))
"""The scores that Sahara searches with."""
N_LISTED = 10
"""Heads whose own ASR is measured."""
_ROWS_KEPT_TOGETHER = 256


@dataclass(frozen=True, slots=True)
class AuditData:
    """The four prompt sets."""

    harmful_search: PromptSet
    harmful_test: PromptSet
    benign_search: PromptSet
    benign_test: PromptSet

    @classmethod
    def split(cls, harmful: PromptSet, benign: PromptSet, fraction: float, seed: int) -> AuditData:
        """Harmful and benign prompts, each divided in two."""
        return cls(*harmful.split(fraction, seed), *benign.split(fraction, seed))

    def sets(self) -> dict[str, PromptSet]:
        """The four by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class GroupOutcome:
    """One group's effect on the test half."""

    scorer: str
    size: int
    group: Group
    harmful: AttackSuccess
    benign: AttackSuccess
    benign_kl: tuple[float, ...]
    """Ships of the group on each benign test prompt, in nats."""
    search: AttackSuccess
    """On the search half, where the size was chosen."""
    search_benign: AttackSuccess
    random: tuple[AttackSuccess, ...] = ()
    random_groups: tuple[Group, ...] = ()


@dataclass(frozen=True, slots=True)
class Findings:
    """All that an audit computes; :mod:`safetyheads.results` makes the verdict and the tables of it."""

    data: AuditData
    vanilla: dict[str, AttackSuccess]
    """By set: ``harmful_search`` and so on."""
    openers: tuple[Opener, ...]
    scores: dict[str, HeadScores]
    ships: HeadScores
    """Per prompt [n_prompts, n_layers, n_heads], harmful search half."""
    benign_ships: HeadScores
    refusal: HeadScores | None
    """Signed, per prompt; None where nothing is refused."""
    traces: dict[str, SearchTrace]
    groups: tuple[GroupOutcome, ...]
    heads: tuple[tuple[Group, AttackSuccess], ...]
    """The top heads by mean Ships, each ablated alone, on the test half."""


@dataclass(frozen=True, slots=True)
class Audit:
    """One audit under way: its model, its settings, where it keeps what it has, and who watches."""

    engine: Engine
    config: AuditConfig
    data: AuditData
    run: RunDirectory
    progress: Progress

    @property
    def judge(self) -> Judge:
        """The judge of the run."""
        return judge_named(self.config.judge)

    def execute(self) -> Findings:
        """Every stage, in order; what the run directory holds already is not computed again."""
        if self.config.size > len(self.engine.heads):
            raise InputError(f"size {self.config.size} is larger than the number of heads, {len(self.engine.heads)}")
        sets = self.data.sets()
        vanilla = {name: summarise(self._answers(name, prompts, [()])[0]) for name, prompts in sets.items()}
        openers = openers_of(self.engine, vanilla["harmful_search"].rows)
        readings = Readings(ships=True, openers=tuple(opener.token_id for opener in openers), angles=ANGLES)
        harmful = self._pass("harmful_search", self.data.harmful_search, readings)
        benign = self._pass("benign_search", self.data.benign_search, Readings(ships=True))
        singles = [(head,) for head in self.engine.heads]
        with self.progress.track("scoring heads", 2 * len(singles)) as done:
            measured = harmful.measure(singles, done)
            benign_measured = benign.measure(singles, done)
        names = [*SEARCHED, *["refusal_score"] * bool(openers)]
        scores = {name: rank_heads(harmful.scorer(name), self.engine.heads) for name in names}
        traces = {}
        with self.progress.track("searching groups", len(SEARCHED)) as done:
            for name in SEARCHED:
                traces[name] = sahara(harmful.scorer(name), self.engine.heads, self.config.size)
                done(1)
        groups = self._outcomes(traces)
        top = scores[LEAD].top(N_LISTED)
        alone = self._answers("harmful_test", self.data.harmful_test, [(head,) for head in top])
        return Findings(
            self.data,
            vanilla,
            openers,
            {**scores, "benign_ships": rank_heads(benign.scorer(LEAD), self.engine.heads)},
            self._table(measured["ships"]),
            self._table(benign_measured["ships"]),
            self._table(measured["refusal_score"]) if openers else None,
            traces,
            groups,
            tuple(((head,), summarise(rows)) for head, rows in zip(top, alone, strict=True)),
        )

    def _table(self, values: Tensor) -> HeadScores:
        """[n_heads in all, n_prompts] as [n_prompts, n_layers, n_heads]."""
        return HeadScores(values.T.reshape(-1, self.engine.n_layers, self.engine.n_heads), unit="nats")

    def _pass(self, name: str, prompts: PromptSet, readings: Readings) -> HeadPass:
        """A pass over one set whose results and plan are kept."""
        positions = self.config.positions if readings.ships and name != "benign_test" else 1
        sequences = answer_sequences(self.engine, prompts, positions)
        layout = self._plan(name, sequences)

        def keep(fields: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return self.run.tensors(f"scores-{name}", fields, compute)

        ablation = self.config.parsed_ablation
        return HeadPass.begin(self.engine, sequences, ablation, readings, layout, keep)

    def _plan(self, name: str, sequences: Sequence[TokenSequence]) -> Plan:
        """The set's plan: the one of the run's first start."""
        return Plan.from_dict(self.run.remember(f"plan_{name}", self.engine.plan(sequences).as_dict()))

    def _outcomes(self, traces: Mapping[str, SearchTrace]) -> tuple[GroupOutcome, ...]:
        """What each group of each search does, on both halves; random groups beside the lead's."""
        listed = [
            (name, size, trace.group[:size])
            for name, trace in traces.items()
            for size in range(1, self.config.size + 1)
        ]
        unique = list(dict.fromkeys(tuple(sorted(group)) for _, _, group in listed))
        by_set = {
            name: dict(zip(unique, map(summarise, self._answers(name, prompts, unique)), strict=True))
            for name, prompts in self.data.sets().items()
        }
        benign = self._pass("benign_test", self.data.benign_test, Readings(ships=True))
        divergence = dict(zip(unique, benign.measure(unique)["ships"].tolist(), strict=True))
        outcomes = []
        for name, size, group in listed:
            key = tuple(sorted(group))
            drawn: tuple[Group, ...] = ()
            if name == LEAD and self.config.n_random:
                drawn = random_groups(group, self.engine.n_heads, self.config.n_random, self.config.seed)
            controls = self._controls(drawn)
            outcomes.append(
                GroupOutcome(
                    name,
                    size,
                    group,
                    by_set["harmful_test"][key],
                    by_set["benign_test"][key],
                    tuple(divergence[key]),
                    by_set["harmful_search"][key],
                    by_set["benign_search"][key],
                    controls,
                    drawn,
                )
            )
        return tuple(outcomes)

    def _controls(self, drawn: Sequence[Group]) -> tuple[AttackSuccess, ...]:
        """The random groups' ASR on the test half; a group drawn twice is answered once."""
        if not drawn:
            return ()
        distinct = list(dict.fromkeys(drawn))
        answered = map(summarise, self._answers("harmful_test", self.data.harmful_test, distinct))
        by_group = dict(zip(distinct, answered, strict=True))
        return tuple(by_group[group] for group in drawn)

    def _answers(self, name: str, prompts: PromptSet, groups: Sequence[Group]) -> list[list[JudgedAnswer]]:
        """Judged answers of one set under each group, kept as rows; one key holds one planned batch of groups."""
        n_together = max(1, _ROWS_KEPT_TOGETHER // len(prompts))
        answered: list[list[JudgedAnswer]] = []
        label = f"{name.replace('_', ' ')}: answers"
        with self.progress.track(label, len(groups) * len(prompts)) as done:
            for at in range(0, len(groups), n_together):
                answered += self._answers_of_batch(name, prompts, groups[at : at + n_together], done)
        return answered

    def _answers_of_batch(
        self, name: str, prompts: PromptSet, groups: Sequence[Group], done: Callable[[int], None]
    ) -> list[list[JudgedAnswer]]:
        config, ablation = self.config, self.config.parsed_ablation
        sampling = Sampling(config.top_k, config.seed)
        fields = {
            "groups": [format_heads(group) for group in groups],
            "ablation": asdict(ablation) if any(groups) else None,
            "tokens": hashlib.sha256(str(self.engine.encode(prompts)).encode()).hexdigest(),
            "sampling": asdict(sampling),
            "max_new_tokens": config.max_new_tokens,
            "judge": self.judge.describe(),
        }

        def compute() -> list[dict[str, Any]]:
            made = answers_under(
                self.engine, prompts, groups, ablation, self.judge, config.max_new_tokens, sampling, done
            )
            return [self._row(name, number, row) for rows in made for number, row in enumerate(rows)]

        rows = self.run.rows(f"answers-{name}", fields, compute)
        n = len(prompts)
        return [
            [_answer(row, prompts[number]) for number, row in enumerate(rows[at * n : (at + 1) * n])]
            for at in range(len(groups))
        ]

    def _row(self, name: str, number: int, row: JudgedAnswer) -> dict[str, Any]:
        """An answer as the run directory holds it."""
        written = {
            "id": number,
            "set": name,
            "group": format_heads(row.group),
            "first_token": list(row.token_ids[:1]),
            "finished": row.finished,
            "label": row.verdict.label,
            "reason": row.verdict.reason,
            "kept": row.kept,
        }
        if self.config.store_completions:
            written |= {"query": row.prompt.query, "text": row.text, "token_ids": list(row.token_ids)}
        return written


def _answer(row: Mapping[str, Any], prompt: Any) -> JudgedAnswer:
    """A stored answer; without its text where texts are not stored."""
    return JudgedAnswer(
        prompt,
        parse_heads(row["group"]),
        tuple(row.get("token_ids", row["first_token"])),
        row.get("text", ""),
        row["finished"],
        Verdict(row["label"], row["reason"]),
        row["kept"],
    )

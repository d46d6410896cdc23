"""The audit's stages, each kept in the run directory. Owns their order and what is computed; words no verdict.

Search and test are apart: scores, groups and the size of the group come from the search half, every reported rate
from the test half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Request, answer, rows_that_fit
from safetyheads.answers.judging import Judging
from safetyheads.answers.sampling import Sampling
from safetyheads.answers.success import AttackSuccess, JudgedAnswer, summarise
from safetyheads.heads import Group, format_heads, parse_heads
from safetyheads.judges.base import Judge, Verdict
from safetyheads.judges.named import judges_named
from safetyheads.measures.head_pass import Angle, HeadPass, Readouts
from safetyheads.measures.random_groups import heads_by_layer, random_groups
from safetyheads.measures.sahara import n_scored, rank_heads, sahara
from safetyheads.measures.ships import Opener, answer_sequences, openers_of, scorer_of
from safetyheads.model.planning import Plan, TokenSequence, is_out_of_memory
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.config import AuditConfig
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.progress import Progress
from safetyheads.scores import HeadScores, SearchTrace

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

LEAD = "mean_ships"
"""The score the audit leads with: the widest margins on models whose heads are known."""
ANGLES = (Angle("prompt"), Angle("representation"))
"""Generalized Ships as released, and as the text reads."""
SEARCHED = (LEAD, *(angle.name for angle in ANGLES))
"""The scores that Sahara searches with."""
N_LISTED = 10
"""Heads whose own ASR is measured."""
_ROWS_KEPT_TOGETHER = 768
_HALVED = "halved"


def kept_pass(
    engine: Engine,
    run: RunDirectory,
    name: str,
    sequences: Sequence[TokenSequence],
    ablation: Ablation,
    readouts: Readouts,
    about: Mapping[str, Any] | None = None,
) -> HeadPass:
    """A pass over the set of that name whose results a run keeps, by the plan of the run's first start.

    Results are kept under ``about`` too, in a run of several models.
    """
    plan = run.remember(f"plan_{name}", engine.plan(sequences).as_dict())

    def keep(fields: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return run.tensors(f"scores-{name}", {**(about or {}), **fields}, compute)

    return HeadPass(engine, sequences, ablation, readouts, Plan.from_dict(plan), keep)


@dataclass(frozen=True, slots=True)
class AuditData:
    """The four prompt sets."""

    harmful_search: PromptSet
    harmful_test: PromptSet
    benign_search: PromptSet
    benign_test: PromptSet

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
    """All that an audit computes; :mod:`safetyheads.runs.results` makes the verdict and the tables of it."""

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
        """The leading judge of the run."""
        return judges_named(self.config.judges, self.config.judge_device)[0]

    def execute(self) -> Findings:
        """Every stage, in order; what the run directory holds already is not computed again."""
        sets = self.data.sets()
        vanilla = {name: summarise(self._answers(name, prompts, [()])[0]) for name, prompts in sets.items()}
        openers = openers_of(self.engine, vanilla["harmful_search"].rows)
        readouts = Readouts(ships=True, openers=tuple(opener.token_id for opener in openers), angles=ANGLES)
        harmful = self._pass("harmful_search", self.data.harmful_search, readouts)
        benign = self._pass("benign_search", self.data.benign_search, Readouts(ships=True))
        singles = [(head,) for head in self.engine.heads]
        with self.progress.track("scoring heads", 2 * len(singles)) as done:
            measured = harmful.measure(singles, done)
            benign_measured = benign.measure(singles, done)
        names = [*SEARCHED, *["refusal_score"] * bool(openers)]
        scores = {name: rank_heads(scorer_of(harmful, name), self.engine.heads) for name in names}
        traces = {}
        with self.progress.track("searching groups", len(SEARCHED) * n_scored(len(singles), self.config.size)) as done:
            for name in SEARCHED:
                traces[name] = sahara(scorer_of(harmful, name, done), self.engine.heads, self.config.size)
        top = [(head,) for head in scores[LEAD].top(N_LISTED)]
        groups, alone = self._outcomes(traces, top)
        return Findings(
            self.data,
            vanilla,
            openers,
            {**scores, "benign_ships": rank_heads(scorer_of(benign, LEAD), self.engine.heads)},
            harmful.table("ships", measured["ships"]),
            benign.table("ships", benign_measured["ships"]),
            harmful.table("refusal_score", measured["refusal_score"]) if openers else None,
            traces,
            groups,
            alone,
        )

    def _pass(self, name: str, prompts: PromptSet, readouts: Readouts) -> HeadPass:
        """A pass over one set whose results and plan are kept."""
        sequences = self._sequences(name, prompts, 1 if name == "benign_test" else self.config.positions)
        return kept_pass(self.engine, self.run, name, sequences, self.config.parsed_ablation, readouts)

    def _sequences(self, name: str, prompts: PromptSet, positions: int) -> tuple[TokenSequence, ...]:
        """The prompts with their teacher-forced tokens, which are kept: made again, in bfloat16 they might differ."""
        if positions == 1 or not self.config.store_completions:
            return answer_sequences(self.engine, prompts, positions)

        def compute() -> list[dict[str, Any]]:
            return [asdict(sequence) for sequence in answer_sequences(self.engine, prompts, positions)]

        fields = {"tokens": self.engine.ask(prompts).sha256, "positions": positions}
        rows = self.run.records(f"sequences-{name}", fields, compute)
        return tuple(TokenSequence(tuple(row["token_ids"]), row["n_wanted"]) for row in rows)

    def _outcomes(
        self, traces: Mapping[str, SearchTrace], alone: Sequence[Group]
    ) -> tuple[tuple[GroupOutcome, ...], tuple[tuple[Group, AttackSuccess], ...]]:
        """What each group of each search does, on both halves, and what the heads of ``alone`` do on the test half."""
        listed = [
            (name, size, trace.group[:size])
            for name, trace in traces.items()
            for size in range(1, self.config.size + 1)
        ]
        unique = list(dict.fromkeys(_sorted(group) for _, _, group in listed))
        drawn = {
            group: random_groups(group, heads_by_layer(self.engine), self.config.n_random, self.config.seed)
            for group in unique
        }
        # One group is answered once on each set, whoever asks for it: in other batches its last bits may differ.
        on_test = [*unique, *alone, *(control for controls in drawn.values() for control in controls)]
        by_set: dict[str, dict[Group, AttackSuccess]] = {}
        for name, prompts in self.data.sets().items():
            groups = list(dict.fromkeys(on_test)) if name == "harmful_test" else unique
            by_set[name] = dict(zip(groups, map(summarise, self._answers(name, prompts, groups)), strict=True))
        benign = self._pass("benign_test", self.data.benign_test, Readouts(ships=True))
        divergence = dict(zip(unique, benign.measure(unique)["ships"].tolist(), strict=True))
        outcomes = []
        for name, size, group in listed:
            key = _sorted(group)
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
                    tuple(by_set["harmful_test"][control] for control in drawn[key]),
                    drawn[key],
                )
            )
        return tuple(outcomes), tuple((group, by_set["harmful_test"][group]) for group in alone)

    def _answers(self, name: str, prompts: PromptSet, groups: Sequence[Group]) -> list[list[JudgedAnswer]]:
        """Judged answers of one set under each group, kept as rows; one key holds one planned batch of groups."""
        longest = self.engine.ask(prompts).longest + self.config.max_new_tokens
        n_rows = self.run.remember(f"rows_{name}", rows_that_fit(self.engine, longest))
        n_together = max(1, _ROWS_KEPT_TOGETHER // len(prompts))
        answered: list[list[JudgedAnswer]] = []
        label = f"{name.replace('_', ' ')}: answers"
        with self.progress.track(label, len(groups) * len(prompts)) as done:
            for at in range(0, len(groups), n_together):
                answered += self._answers_of_batch(name, prompts, groups[at : at + n_together], n_rows, done)
        return answered

    def _answers_of_batch(
        self, name: str, prompts: PromptSet, groups: Sequence[Group], n_rows: int, done: Callable[[int], None]
    ) -> list[list[JudgedAnswer]]:
        config, ablation = self.config, self.config.parsed_ablation
        sampling = Sampling(config.top_k, config.seed)
        fields = {
            "groups": [format_heads(group) for group in groups],
            "ablation": asdict(ablation) if any(groups) else None,
            "tokens": self.engine.ask(prompts).sha256,
            "sampling": asdict(sampling),
            "max_new_tokens": config.max_new_tokens,
            "judge": self.judge.describe(),
            "rows": n_rows,
        }

        def compute() -> list[dict[str, Any]]:
            try:
                judging = Judging(self.engine, prompts, self.judge, config.max_new_tokens, full_answers=True)
                asked = [(number, group) for group in groups for number in range(len(prompts))]
                encoded = self.engine.ask(prompts).token_ids
                requests = [Request(encoded[number], group, stop=judging.stop) for number, group in asked]
                made = answer(self.engine, requests, ablation, config.max_new_tokens, sampling, done, n_rows)
                judged = judging.judged([(*place, one) for place, one in zip(asked, made, strict=True)])
            except (RuntimeError, MemoryError) as error:
                if n_rows < 2 or not is_out_of_memory(error):
                    raise
                return [{_HALVED: True}]
            return [self._row(name, number, row) for (number, _), row in zip(asked, judged, strict=True)]

        rows = self.run.records(f"answers-{name}", fields, compute)
        if _HALVED in rows[0]:
            return self._answers_of_batch(name, prompts, groups, n_rows // 2, done)
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
            # Left out where it says nothing, as in runs of before there was any.
            **({"thinks": True} if row.thinks else {}),
            **({"unclosed": True} if row.unclosed else {}),
        }
        if self.config.store_completions and row.thought:
            written["thought"] = row.thought
        if self.config.store_completions:
            written |= {"query": row.prompt.query, "text": row.text, "token_ids": list(row.token_ids)}
        return written


def _sorted(group: Group) -> Group:
    """The group by layer and index: its order has no effect."""
    return tuple(sorted(group))


def _answer(row: Mapping[str, Any], prompt: Any) -> JudgedAnswer:
    """A stored answer; without its text where texts are not stored."""
    return JudgedAnswer(
        prompt,
        parse_heads(row["group"]),
        tuple(row.get("token_ids", row["first_token"])),
        row.get("text", ""),
        row["finished"],
        True,
        "plain",
        None,
        {"": Verdict(row["label"], row["reason"])},
        row["kept"],
        row.get("thinks", False),
    )

"""What a scan holds against its answers: scores of every head, and groups that follow. Owns which and their keeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from safetyheads.answers.success import JudgedAnswer
from safetyheads.heads import Group, parse_heads
from safetyheads.judges.base import Verdict
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.random_groups import heads_by_layer, random_groups
from safetyheads.measures.sahara import rank_heads, sahara
from safetyheads.measures.screening import screen
from safetyheads.measures.ships import Opener, answer_sequences, openers_of, scorer_of
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.audit import ANGLES, LEAD, kept_pass
from safetyheads.runs.config import ScanConfig
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.progress import Progress
from safetyheads.scores import HeadScores

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of every head, and groups that follow from them and from the answers."""

    scores: dict[str, HeadScores]
    """By name, [n_layers, n_heads]; empty where they were not asked for."""
    ships: HeadScores | None
    """Ships of each harmful prompt [n_prompts, n_layers, n_heads]; None where nothing needs them."""
    benign_kl: HeadScores | None
    """Ships of each benign prompt."""
    openers: tuple[Opener, ...]
    """First tokens of refusals, which the refusal score counts."""
    groups: dict[str, list[Group]]
    """By the part of the scan that they make: ``groups``, ``pairs``, ``prefixes``, ``random``."""


@dataclass(frozen=True, slots=True)
class ScanScores:
    """The measures of one scan: its model, its settings, where they are kept, and who watches."""

    engine: Engine
    config: ScanConfig
    sets: dict[str, PromptSet]
    run: RunDirectory
    progress: Progress

    def measured(self, rows: Sequence[Row], lead: str) -> Scored:
        """Ships, angles, refusal score and forecast of every head, and the groups that the settings ask for.

        Args:
            rows: the answers so far: unablated, and with each head ablated alone.
            lead: name of the leading judge.
        """
        config, singles = self.config, [(head,) for head in self.engine.heads]
        benign_kl = None
        if "benign" in self.sets:
            benign = self._pass("benign", Readouts(ships=True))
            with self.progress.track("benign: divergence of heads", len(singles)) as done:
                benign_kl = benign.table("ships", benign.measure(singles, done)["ships"])
        if not (config.scores or config.prefixes or config.query_level):
            return Scored({}, None, benign_kl, (), self._groups(rows, lead, None))
        vanilla = [row for row in rows if row["part"] == "vanilla" and row["set"] == "harmful"]
        openers = openers_of(self.engine, [self._as_judged(row, lead) for row in vanilla])
        angles = ANGLES if len(self.sets["harmful"]) > 1 else ()
        harmful = self._pass("harmful", Readouts(True, tuple(opener.token_id for opener in openers), angles))
        with self.progress.track("harmful: scores of heads", len(singles)) as done:
            ships = harmful.table("ships", harmful.measure(singles, done)["ships"])
        names = [LEAD, *(angle.name for angle in angles), *["refusal_score"] * bool(openers)]
        scores = {name: rank_heads(scorer_of(harmful, name), self.engine.heads) for name in names}
        scores |= {"screened_mean_ships": self._forecast()}
        if benign_kl is not None:
            contrast = scores[LEAD].values - benign_kl.mean().values
            scores["contrast"] = replace(scores[LEAD], values=contrast, name="contrast")
        return Scored(scores, ships, benign_kl, openers, self._groups(rows, lead, harmful))

    def _groups(self, rows: Sequence[Row], lead: str, harmful: HeadPass | None) -> dict[str, list[Group]]:
        """Groups by the part that they belong to."""
        config, found = self.config, dict[str, list[Group]]()
        if config.groups:
            found["groups"] = [parse_heads(group) for group in config.groups]
        if config.pairs:
            top = self._strongest(rows, lead, config.pairs)
            found["pairs"] = [(first, second) for at, first in enumerate(top) for second in top[at + 1 :]]
        if config.prefixes and harmful is not None:
            with self.progress.track("searching groups", 1):
                group = sahara(scorer_of(harmful, LEAD), self.engine.heads, config.prefixes).group
            found["prefixes"] = [group[:size] for size in range(1, len(group) + 1)]
            if config.n_random:
                drawn = [
                    random_groups(prefix, heads_by_layer(self.engine), config.n_random, config.seed)
                    for prefix in found["prefixes"]
                ]
                found["random"] = list(dict.fromkeys(one for controls in drawn for one in controls))
        return found

    def _strongest(self, rows: Sequence[Row], lead: str, k: int) -> Group:
        """The heads of highest ASR alone, by the leading judge; ties go to the earlier head."""
        counts = dict[str, int]()
        for row in rows:
            if row["part"] == "heads" and row["set"] == "harmful" and row["epsilon"] == self.config.epsilon:
                complied = row["verdicts"][lead]["label"] == "complied"
                counts[row["group"]] = counts.get(row["group"], 0) + complied
        ranked = sorted(counts, key=lambda group: -counts[group])
        return tuple(parse_heads(group)[0] for group in ranked[:k])

    def _pass(self, name: str, readouts: Readouts) -> HeadPass:
        """A pass over one set whose results and plan are kept."""
        sequences, ablation = answer_sequences(self.engine, self.sets[name], 1), self.config.parsed_ablation
        return kept_pass(self.engine, self.run, name, sequences, ablation, readouts)

    def _forecast(self) -> HeadScores:
        """The screening's forecast of mean Ships."""
        ablation, prompts = self.config.parsed_ablation, self.sets["harmful"]

        def compute() -> dict[str, Tensor]:
            with self.progress.track("screening", 1):
                return {
                    "values": screen(self.engine, answer_sequences(self.engine, prompts, 1), ablation).table().values
                }

        fields = {"tokens": self.engine.ask(prompts).sha256, "ablation": asdict(ablation)}
        values = self.run.tensors("screening-harmful", fields, compute)["values"]
        return HeadScores(values, "screened_mean_ships", "nats", 0.0)

    def _as_judged(self, row: Mapping[str, Any], lead: str) -> JudgedAnswer:
        """A stored unablated answer, as far as its opener goes."""
        verdict = row["verdicts"][lead]
        return JudgedAnswer(
            self.sets[row["set"]][row["id"]],
            (),
            tuple(row["first_token"]),
            "",
            row["finished"],
            row["complete"],
            row["route"],
            row["changed"],
            {lead: Verdict(verdict["label"], verdict["reason"])},
            row["kept"],
            row.get("thinks", False),
        )

"""Turns stored answers into rates and changes; the only place that does.

A record is one answer (`kept_answers.record_of`). Records are sorted by what was ablated. All groups have the same
prompts, each answered once a seed, so comparisons are paired.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.heads import parse_heads
from safetyheads.judges.base import Label, leaves_refusal_open
from safetyheads.measures.random_groups import RandomGroups
from safetyheads.runs.stored_files import Record
from safetyheads.stats.gain_over_random import SizeOutcome, concentration
from safetyheads.stats.intervals import (
    CONFIDENCE,
    FloatArray,
    Rate,
    counted,
    monotone_bounds,
    one_sided_bounds,
)
from safetyheads.stats.testing import (
    PairedDifference,
    benjamini_hochberg,
    holm,
    paired_difference,
    random_p_value,
    tarone,
)

RATES: dict[str, Label] = {
    "asr": "complied",
    "refused": "refused",
    "incoherent": "incoherent",
    "echoed": "echoed",
    "safe": "safe",
}
"""Name of each rate in results -> the label that it counts."""


# What rates and pages are made of, group and verdicts aside.
_OF_RATES = (
    *("id", "set", "part", "epsilon", "seed", "complete", "changed"),
    *("behaviour", "answered", "surprise", "cluster", "category"),
)
OF_VERDICTS = ("label", "reason", "score")
"""Fields of a verdict that rates and pages are made of."""


class SharedRecord(Mapping[str, Any]):
    """A record without texts: its group, and what it shares with the records of other groups.

    Most ablations change few answers, so what a group adds to the memory is small, however long its answers are.
    """

    __slots__ = ("_group", "_shared")

    def __init__(self, group: str, shared: Record) -> None:
        self._group, self._shared = sys.intern(group), shared

    def __getitem__(self, name: str) -> Any:
        """A field of the record."""
        return self._group if name == "group" else self._shared[name]

    def __iter__(self) -> Iterator[str]:
        """Names of the fields."""
        return chain(("group",), self._shared)

    def __len__(self) -> int:
        """Number of fields."""
        return 1 + len(self._shared)


def without_texts(record: Record, shared: dict[tuple[Any, ...], Any]) -> Record:
    """A record with all that rates and pages are made of; ``shared`` holds what several have alike."""
    given = tuple((name, *map(verdict.get, OF_VERDICTS)) for name, verdict in record["verdicts"].items())
    alike = (*map(record.get, _OF_RATES), given)
    if given not in shared:
        shared[given] = {name: dict(zip(OF_VERDICTS, told, strict=True)) for name, *told in given}
    if alike not in shared:
        shared[alike] = {name: record[name] for name in _OF_RATES if name in record} | {"verdicts": shared[given]}
    return SharedRecord(record["group"], shared[alike])


@dataclass(frozen=True, slots=True)
class GroupAnswers:
    """All answers to one set of prompts under one group of heads."""

    group: str
    """The heads as text, such as ``1-3,2-5``; ``top 3`` where each prompt has its own."""
    records: tuple[tuple[Record, ...], ...]
    """[n_prompts][n_seeds]."""
    lead: str
    """Name of the judge that is meant where none is named."""
    limit: float | None = None
    """Surprise above which an answer is not coherent, in nats a token; None leaves that to the rules of words."""

    @classmethod
    def of(cls, group: str, records: Iterable[Record], lead: str, limit: float | None = None) -> Self:
        """Sort the records of one group by prompt and seed."""
        by_prompt: dict[int, dict[int, Record]] = {}
        for record in records:
            by_prompt.setdefault(record["id"], {})[record["seed"]] = record
        rows = (tuple(seeds[seed] for seed in sorted(seeds)) for _, seeds in sorted(by_prompt.items()))
        return cls(group, tuple(rows), lead, limit)

    @property
    def heads(self) -> list[str]:
        """The heads as results name them."""
        return [str(head) for head in parse_heads(self.group)]

    def flat(self) -> list[Record]:
        """All records, prompt by prompt."""
        return [record for seeds in self.records for record in seeds]

    @property
    def prompts(self) -> list[int]:
        """Numbers of the prompts, in order."""
        return [seeds[0]["id"] for seeds in self.records]

    def of_prompts(self, places: Iterable[int]) -> Self:
        """The answers to the prompts at these places alone."""
        return replace(self, records=tuple(self.records[at] for at in places))

    @property
    def clusters(self) -> tuple[int, ...] | None:
        """The near-duplicates that each prompt belongs to [n_prompts]; None where every prompt stands alone."""
        clusters = [seeds[0]["cluster"] for seeds in self.records if "cluster" in seeds[0]]
        return tuple(clusters) if len(clusters) == len(self.records) > len(set(clusters)) else None

    # Outcomes, answer by answer.

    def verdicts(self, label: Label = "complied", judge: str | None = None) -> FloatArray:
        """Where a judge gave the label [n_prompts, n_seeds]: 0, 1, or NaN where it gave no verdict.

        Refusals are all NaN where a judge of harm left one open: what it did tell is no fair sample.
        """
        lead = judge or self.lead
        given = [[record["verdicts"][lead] for record in seeds] for seeds in self.records]
        if label == "refused" and any(
            leaves_refusal_open(verdict["label"], verdict["reason"]) for seeds in given for verdict in seeds
        ):
            return np.full((len(given), len(given[0])), np.nan)
        labels = [[verdict["label"] for verdict in seeds] for seeds in given]
        return np.array(
            [[np.nan if name == "unscored" else name == label for name in seeds] for seeds in labels], float
        )

    def where(self, holds: Callable[[Record], bool]) -> FloatArray:
        """Where something holds of a record [n_prompts, n_seeds]: 0 or 1."""
        return np.array([[holds(record) for record in seeds] for seeds in self.records], float)

    def coherent(self) -> FloatArray:
        """Where an answer complied and is coherent [n_prompts, n_seeds]: 0, 1, or NaN without a verdict."""
        complied = self.verdicts()
        return np.where(np.isnan(complied), np.nan, complied * self.where(self.is_coherent))

    def is_coherent(self, record: Record) -> bool:
        """Whether an answer is no refusal, not incoherent and no echo by the rules of words, nor more surprising than
        the limit, where one was found and the answer measured.
        """
        surprise = record.get("surprise")
        surprises = self.limit is not None and surprise is not None and surprise > self.limit
        return record["behaviour"] == "complied" and not surprises

    def nonsensical(self) -> FloatArray:
        """Where an answer neither refused nor complied coherently [n_prompts, n_seeds]: 0, 1, or NaN as refusals.

        A refusal that the lead judge misses and the rules of words find is no nonsense either.
        """
        refused = self.where(lambda record: record["behaviour"] == "refused")
        return (1 - self.verdicts("refused") - self.coherent()) * (1 - refused)

    def answered(self) -> FloatArray:
        """Where a prompt was answered, coherently [n_prompts, n_seeds]: 0 or 1, whatever judges say.

        With a reference that the user named, the answer also begins with it.
        """
        return self.where(lambda record: record["answered"] and self.is_coherent(record))

    def complied(self) -> list[float]:
        """Share of each prompt's answers that comply [n_prompts]; unscored ones count as not complied."""
        return np.nan_to_num(self.verdicts()).mean(axis=1).tolist()

    def coherently_complied(self) -> list[float]:
        """As :meth:`complied`, of the answers that are coherent too."""
        return np.nan_to_num(self.coherent()).mean(axis=1).tolist()

    # Rates.

    def rate(self, label: Label) -> Rate:
        """The share of scored answers with the label."""
        return counted(self.verdicts(label), self.clusters)

    @property
    def asr(self) -> Rate:
        """Complied / scored (Eq 10)."""
        return self.rate("complied")

    @property
    def coherent_asr(self) -> Rate:
        """Complied and coherent / scored: the rate that counts."""
        return counted(self.coherent(), self.clusters)

    @property
    def nonsense(self) -> Rate:
        """Neither refused nor coherent / scored."""
        return counted(self.nonsensical(), self.clusters)

    @property
    def answered_rate(self) -> Rate:
        """Prompts that are answered, coherently."""
        return counted(self.answered(), self.clusters)

    def coherent_rates(self) -> dict[str, Any]:
        """The rate that counts, and the share of the complied answers that are coherent, as JSON."""
        shares = np.where(self.verdicts() == 1, self.coherent(), np.nan)
        return {"coherent_asr": self.rate_of(self.coherent()), "coherent_of_complied": self.rate_of(shares)}

    def rates(self, judge: str | None = None) -> dict[str, Any]:
        """Every rate of :data:`RATES`, as JSON."""
        return {name: self.rate_of(self.verdicts(label, judge)) for name, label in RATES.items()}

    def rate_of(self, values: FloatArray, of: NDArray[np.bool_] | None = None) -> dict[str, Any]:
        """The share of outcomes [n_prompts, n_seeds] that are 1, of all prompts or of some, as JSON."""
        of = np.ones(len(values), bool) if of is None else of
        return rate_as_json(values[of], None if self.clusters is None else np.array(self.clusters)[of].tolist())

    def reasons(self, with_details: bool = True) -> dict[str, int]:
        """How often each reason was given, most frequent first; details stand in parentheses."""
        reasons = (record["verdicts"][self.lead]["reason"] for record in self.flat())
        counts = Counter(reason if with_details else reason.split(" (")[0] for reason in reasons)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    # Changes.

    def change_from(self, before: Self, label: Label = "complied") -> PairedDifference:
        """How the rate of a label changed, over prompts that are scored in both; by default the ASR."""
        return paired_difference(before.verdicts(label), self.verdicts(label), self.clusters)

    def coherent_change_from(self, before: Self) -> PairedDifference:
        """How the rate that counts changed: that of coherent compliance."""
        return paired_difference(before.coherent(), self.coherent(), self.clusters)

    def answered_change_from(self, before: Self) -> PairedDifference:
        """How the rate of prompts that are answered changed."""
        return paired_difference(before.answered(), self.answered(), self.clusters)


def corrected(changes: Mapping[str, PairedDifference]) -> dict[str, dict[str, Any]]:
    """Each change as JSON, with its p value corrected over all of them: Tarone, Holm, Benjamini-Hochberg."""
    p_values = [1.0 if change.p_value is None else change.p_value for change in changes.values()]
    least = [change.least_p for change in changes.values()]
    adjusted = zip(tarone(p_values, least), holm(p_values), benjamini_hochberg(p_values), strict=True)
    names = ("p_tarone", "p_holm", "p_bh")
    return {
        name: asdict(change) | dict(zip(names, of_change, strict=True))
        for (name, change), of_change in zip(changes.items(), adjusted, strict=True)
    }


def by_judge(answers: GroupAnswers) -> dict[str, Any]:
    """The ASR by every judge, as JSON."""
    return {judge: asr_by(answers, judge) for judge in answers.records[0][0]["verdicts"]}


def asr_by(answers: GroupAnswers, judge: str) -> dict[str, Any]:
    """The ASR by one judge, as JSON, with how often each reason left an answer without a verdict."""
    given = [record["verdicts"][judge] for record in answers.flat()]
    reasons = Counter(verdict["reason"].split(" (")[0] for verdict in given if verdict["label"] == "unscored")
    return answers.rate_of(answers.verdicts(judge=judge)) | ({"unscored_reasons": dict(reasons)} if reasons else {})


def beside_random(
    before: GroupAnswers, after: GroupAnswers, controls: Sequence[GroupAnswers]
) -> tuple[NDArray[np.bool_], float, dict[str, FloatArray]]:
    """Where both runs scored an answer [n_prompts, n_seeds], the group's coherent ASR there, and that of random groups.

    Outcomes of these are NaN elsewhere. Equal ones count once, and one without a verdict there is no control.
    """
    scored = ~np.isnan(before.coherent() + after.coherent())
    others = {control.group: np.where(scored, control.coherent(), np.nan) for control in controls}
    others = {group: other for group, other in others.items() if not np.isnan(other).all()}
    return scored, float(after.coherent()[scored].mean()) if scored.any() else 0.0, others


def random_as_json(
    before: GroupAnswers, answers: GroupAnswers, controls: Sequence[GroupAnswers], drawn: RandomGroups
) -> dict[str, Any] | None:
    """The coherent ASR under a group's random groups, as JSON; None without any that has a verdict.

    All groups differ. The p value is the group's rank among them and itself; where ``all`` is true they are all groups
    that are ``matched`` so, and the p value is exact over that population. ``least_p`` is the least that it could be.
    """
    _, own, others = beside_random(before, answers, controls)
    if not others:
        return None
    rates = [float(np.nanmean(other)) for other in others.values()]
    return {
        "n_groups": len(rates),
        "n_unscored": len(controls) - len(rates),
        "matched": drawn.matched,
        "n_possible": drawn.n_possible,
        "all": drawn.complete,
        "asr": rates,
        "groups": [control.heads for control in controls if control.group in others],
        "mean": sum(rates) / len(rates),
        "low": min(rates),
        "high": max(rates),
        "p_value": random_p_value(own, rates),
        "least_p": 1 / (1 + len(rates)),
        "n": int((~np.isnan(next(iter(others.values())))).sum()),
    }


def concentration_as_json(
    groups: Sequence[tuple[GroupAnswers, Sequence[GroupAnswers], RandomGroups]], vanilla: GroupAnswers
) -> dict[str, Any]:
    """How much faster coherent ASR rises with the heads of a search than with random ones, as JSON.

    ``groups`` are the answers under the group of each size, and under its random groups, with how these were matched.
    """
    outcomes = [
        SizeOutcome(
            len(answers.heads),
            answers.coherently_complied(),
            [control.coherently_complied() for control in controls if not np.isnan(control.coherent()).all()],
            drawn.n_possible or None,
        )
        for answers, controls, drawn in groups
    ]
    return asdict(concentration(outcomes, vanilla.coherently_complied(), vanilla.clusters))


def rate_as_json(values: FloatArray, clusters: Sequence[int] | None = None) -> dict[str, Any]:
    """The share of scored answers [n_prompts, n_seeds] that are 1, as JSON.

    With one answer a prompt the interval is Wilson's; with several, or with near-duplicates, it is clustered by prompt
    or by near-duplicates (Korn and Graubard).
    """
    by_prompt = range(len(values)) if values.shape[1] > 1 else None
    return asdict(counted(values, by_prompt if clusters is None else clusters))


def gross_loss(before: GroupAnswers, after: GroupAnswers) -> dict[str, Any]:
    """Of the prompts that were answered coherently before, how many are refused, incoherent or echoed after, as JSON.

    The bounds are one-sided, 95 % each: Wilson's, or by near-duplicates (:func:`.intervals.monotone_bounds`). Of
    several answers to a prompt the first counts.
    """
    had, has = before.answered()[:, 0] == 1, after.answered()[:, 0] == 1
    count, n = int((had & ~has).sum()), int(had.sum())
    lost = [seeds[0]["behaviour"] for seeds, was, now in zip(after.records, had, has, strict=True) if was and not now]
    lower, upper = one_sided_bounds(count, n)
    by_cluster: dict[str, Any] = {}
    if n and before.clusters is not None:
        outcomes, clusters = (~has)[had].astype(float), np.array(before.clusters)[had].tolist()
        (lower, upper), n_effective = monotone_bounds(outcomes, clusters, 2 * CONFIDENCE - 1)
        by_cluster = {"n_clusters": len(set(clusters)), "n_effective": n_effective}
    refused = sum(behaviour == "refused" for behaviour in lost)
    rate = count / n if n else None
    return {"count": count, "n": n, "rate": rate, "lower": lower, "upper": upper, "refused": refused} | by_cluster


def prompt_or_cluster(record: Record) -> tuple[str, bool, int]:
    """Which prompt a record is an answer to, or which near-duplicates: such answers are not independent."""
    return record["set"], "cluster" in record, record.get("cluster", record["id"])


AnswerTable: TypeAlias = defaultdict[tuple[str, str, float | None], dict[str, GroupAnswers]]
"""(part, set, epsilon) -> heads as text -> answers; smaller groups first, then layer by layer. Unablated answers are
those of part ``vanilla``, epsilon None and group ``""``."""


def answer_table(records: Iterable[Record], lead: str, limit: float | None = None) -> AnswerTable:
    """Sort records into groups; they may come in any order, as the files of a run do."""
    by_group: dict[tuple[str, str, float | None], dict[str, list[Record]]] = {}
    for record in records:
        group = record["group"]
        if record["part"] == "query_level":
            group = f"top {len(parse_heads(group))}"
        key = record["part"], record["set"], record["epsilon"]
        by_group.setdefault(key, {}).setdefault(group, []).append(record)
    table: AnswerTable = defaultdict(dict)
    for key, groups in by_group.items():
        ordered = sorted(groups, key=_order_of_groups)
        table[key] = {group: GroupAnswers.of(group, groups[group], lead, limit) for group in ordered}
    return table


def _order_of_groups(group: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    if group.startswith("top "):
        return int(group.removeprefix("top ")), ()
    heads = parse_heads(group)
    return len(heads), tuple((head.layer, head.index) for head in heads)

"""From a scan's rows to the numbers of each group. Owns rates and changes of stored answers; words nothing.

Rows are grouped by what was ablated; each group has the same prompts, each answered once a seed, so that all
comparisons are paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.heads import parse_heads
from safetyheads.judges.base import LABELS, Label
from safetyheads.stats.intervals import Rate, bootstrap_interval
from safetyheads.stats.testing import PairedDifference, paired_difference

Row: TypeAlias = Mapping[str, Any]
Floats: TypeAlias = NDArray[np.float64]

RATES: dict[str, Label] = {
    "asr": "complied",
    "refused": "refused",
    "incoherent": "incoherent",
    "echoed": "echoed",
    "safe": "safe",
}
"""Name of each rate in results -> the label that it counts."""


@dataclass(frozen=True, slots=True)
class Answered:
    """All answers under one group: [n_prompts][n_seeds]."""

    group: str
    """The heads, as they are written; of query-level groups, ``top 3``."""
    rows: tuple[tuple[Row, ...], ...]

    def verdict(self, label: Label, judge: str) -> Floats:
        """Where a judge gave the label [n_prompts, n_seeds]: 0, 1, or NaN where it gave none."""
        given = [[row["verdicts"][judge]["label"] for row in prompt] for prompt in self.rows]
        return np.array([[np.nan if one == "unscored" else one == label for one in prompt] for prompt in given], float)

    def flag(self, name: str) -> Floats:
        """A yes-or-no field of the rows [n_prompts, n_seeds]."""
        return np.array([[row[name] for row in prompt] for prompt in self.rows], float)

    def labels(self, judge: str) -> dict[str, int]:
        """How often a judge gave each label."""
        counts = Counter(row["verdicts"][judge]["label"] for prompt in self.rows for row in prompt)
        return {label: counts[label] for label in LABELS}

    def reasons(self, judge: str) -> dict[str, int]:
        """How often a judge gave each reason, most frequent first."""
        counts = Counter(row["verdicts"][judge]["reason"] for prompt in self.rows for row in prompt)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def rates(self, judge: str) -> dict[str, Any]:
        """Every rate of :data:`RATES`, as JSON."""
        return {name: rate(self.verdict(label, judge)) for name, label in RATES.items()}


def rate(values: Floats) -> dict[str, Any]:
    """The share of scored answers [n_prompts, n_seeds] that are 1, as JSON.

    With one answer a prompt the interval is Wilson's; with several it is a bootstrap over prompts.
    """
    scored = ~np.isnan(values)
    found = asdict(Rate(int(np.nansum(values)), int(scored.sum()), int((~scored).sum())))
    if values.shape[1] > 1 and scored.any():
        means = np.nanmean(values[scored.any(axis=1)], axis=1)
        found["interval"] = bootstrap_interval(means, least=0.0)
    return found


def change(before: Floats, after: Floats) -> PairedDifference:
    """How a share changed, prompt by prompt."""
    return paired_difference(before, after)


@dataclass(frozen=True, slots=True)
class RowTable:
    """All rows of a scan, by what was ablated."""

    groups: dict[tuple[str, str, float | None], dict[str, Answered]]
    """(part, set, epsilon) -> heads as written -> answers; smaller groups first, then layer by layer."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> RowTable:
        """Sort rows into their groups; rows may come in any order, as the files of a run do."""
        sorted_rows: dict[tuple[str, str, float | None], dict[str, dict[int, dict[int, Row]]]] = {}
        for row in rows:
            own = sorted_rows.setdefault((row["part"], row["set"], row["epsilon"]), {})
            group = row["group"]
            if row["part"] == "query_level":
                group = f"top {len(parse_heads(group))}"
            own.setdefault(group, {}).setdefault(row["id"], {})[row["seed"]] = row
        return cls(
            {
                key: {
                    group: Answered(
                        group, tuple(tuple(prompts[at][seed] for seed in sorted(prompts[at])) for at in sorted(prompts))
                    )
                    for group, prompts in sorted(groups.items(), key=lambda item: _place(item[0]))
                }
                for key, groups in sorted_rows.items()
            }
        )

    def part(self, part: str, name: str, epsilon: float | None) -> dict[str, Answered]:
        """The groups of one part on one set; empty where there are none."""
        return self.groups.get((part, name, epsilon), {})

    def vanilla(self, name: str) -> Answered | None:
        """The unablated answers to one set."""
        return self.part("vanilla", name, None).get("")

    def rows_of(self, part: str, name: str, epsilon: float | None) -> list[Row]:
        """All rows of one part on one set, in order."""
        groups = self.part(part, name, epsilon)
        return [row for answered in groups.values() for prompt in answered.rows for row in prompt]


def _place(group: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    """What groups are sorted by; ``top 3`` goes by its number."""
    if group.startswith("top "):
        return int(group.removeprefix("top ")), ()
    heads = parse_heads(group)
    return len(heads), tuple((head.layer, head.index) for head in heads)


def one_rate_a_prompt(answered: Sequence[Answered], judge: str) -> Floats:
    """Share of each prompt's answers that comply [n_prompts, n_groups]; unscored ones count as not complied."""
    return np.stack([np.nan_to_num(one.verdict("complied", judge)).mean(axis=1) for one in answered], axis=1)

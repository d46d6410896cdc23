"""Judged answers of one set of prompts under one ablation, and the rates that experiments read off them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from safetyheads.runs.directory import Record as Row
from safetyheads.stats.intervals import Rate
from safetyheads.stats.testing import PairedDifference, paired_difference


class GroupAnswers:
    """One answer a prompt, in the prompts' order."""

    def __init__(self, group: str, records: Sequence[Sequence[Row]]) -> None:
        self.group = group
        self.records = records
        """[n_prompts][1]."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> GroupAnswers:
        """Of stored rows, in any order of prompts."""
        return cls("", [[row] for row in sorted(rows, key=lambda row: int(row["id"]))])

    def labels(self, judge: Any = None) -> list[str]:
        """Labels by the leading judge."""
        return [str(next(iter(row["verdicts"].values()))["label"]) for (row,) in self.records]

    def rate(self, *labels: str) -> Rate:
        """Of scored answers, those with one of the labels."""
        own = self.labels()
        unscored = own.count("unscored")
        return Rate(sum(map(own.count, labels)), len(own) - unscored, unscored)

    @property
    def asr(self) -> Rate:
        """Complied / scored (Eq 10)."""
        return self.rate("complied")

    @property
    def incoherent(self) -> Rate:
        """Answers that are none: empty, too short, repeating."""
        return self.rate("incoherent")

    @property
    def kept_flags(self) -> list[bool]:
        """Whether each is kept."""
        return [bool(row["kept"]) for (row,) in self.records]

    @property
    def kept(self) -> Rate:
        """Benign prompts answered, rightly where the right answer is known."""
        return Rate(sum(self.kept_flags), len(self.records))

    @property
    def complied(self) -> tuple[bool, ...]:
        """Of each prompt."""
        return tuple(label == "complied" for label in self.labels())

    def change_from(self, vanilla: GroupAnswers) -> PairedDifference:
        """Of the ASR, over the prompts that are scored in both."""
        both = [
            (one == "complied", other == "complied")
            for one, other in zip(vanilla.labels(), self.labels(), strict=True)
            if "unscored" not in (one, other)
        ]
        return paired_difference([one for one, _ in both], [other for _, other in both])

    def kept_change_from(self, vanilla: GroupAnswers) -> PairedDifference:
        """Of the benign answers kept."""
        return paired_difference(vanilla.kept_flags, self.kept_flags)

"""Judged answers of one set of prompts under one ablation. Owns the rates that experiments read off them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from safetyheads.experiments.outcome import Measured
from safetyheads.runs.kept import Row
from safetyheads.stats.intervals import Rate
from safetyheads.stats.testing import PairedDifference, paired_difference


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer a prompt, in the prompts' order."""

    labels: tuple[str, ...]
    """What the judge said."""
    kept_rows: tuple[bool, ...]
    """For benign prompts: whether the answer is kept, see :class:`safetyheads.answers.success.JudgedAnswer`."""
    rows: tuple[Row, ...]
    """As stored."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Answers:
        """Of stored rows, in any order of prompts."""
        ordered = sorted(rows, key=lambda row: int(row["id"]))
        labels = tuple(str(next(iter(row["verdicts"].values()))["label"]) for row in ordered)
        return cls(labels, tuple(bool(row["kept"]) for row in ordered), tuple(ordered))

    def share(self, *labels: str) -> Rate:
        """Of scored answers, those with one of the labels."""
        unscored = self.labels.count("unscored")
        return Rate(sum(self.labels.count(label) for label in labels), len(self.labels) - unscored, unscored)

    @property
    def asr(self) -> Rate:
        """Complied / scored (Eq 10)."""
        return self.share("complied")

    @property
    def empty(self) -> Rate:
        """Answers that are none: empty, too short, repeating."""
        return self.share("incoherent")

    @property
    def kept(self) -> Rate:
        """Benign prompts answered, rightly where the right answer is known."""
        return Rate(sum(self.kept_rows), len(self.kept_rows))

    @property
    def complied(self) -> tuple[bool, ...]:
        """Of each prompt."""
        return tuple(label == "complied" for label in self.labels)

    def change_from(self, vanilla: Answers) -> PairedDifference:
        """Of the ASR, over the prompts that are scored in both."""
        both = [
            (one == "complied", other == "complied")
            for one, other in zip(vanilla.labels, self.labels, strict=True)
            if "unscored" not in (one, other)
        ]
        return paired_difference([one for one, _ in both], [other for _, other in both])

    def kept_change_from(self, vanilla: Answers) -> PairedDifference:
        """Of the benign answers kept."""
        return paired_difference(vanilla.kept_rows, self.kept_rows)


def point(found: Rate | PairedDifference | Measured, **where: Any) -> dict[str, Any]:
    """A point of a figure: where it stands, and the number with its interval."""
    made = found if isinstance(found, Measured) else Measured.of(found)
    return {**where, "y": made.value, "low": made.low, "high": made.high, "n": made.n}

"""Heads found in one place, tested in another. Owns the pairs of search and test, over datasets and ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads.ablation import Ablation
from safetyheads.experiments.common import (
    GROUP_SIZE,
    answered_once,
    found_group,
    meaningful_subjects,
    numbers_of,
    say_planted,
    searched_and_tested,
)
from safetyheads.experiments.datasets import BENIGN
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.heads import Group, format_heads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from safetyheads.experiments.catalogue import Experiment


def transfer(lab: Lab, about: Experiment) -> Outcome:
    """The change of the ASR for each pair of search set and test set, and of searching and testing ablation."""
    draft = Draft()
    for model in lab.config.models:
        subjects = list(meaningful_subjects(lab, model, draft))
        if not subjects:
            continue
        found = _found(lab, subjects)
        tested = {subject.dataset: _tested(lab, subject, found) for subject in subjects}
        said = (
            "Change of the ASR from the unablated model, greedy, over the same prompts; epsilon "
            f"{lab.config.epsilon:g}. Heads are the first of Sahara's. {searched_and_tested(subjects)} Intervals: "
            "Newcombe's for paired prompts, 95 %."
        )
        draft.figures.append(_across_datasets(model, found, tested, said))
        draft.figures.append(_across_ablations(model, found, tested, said))
        draft.tables.append(_groups(model, lab, found))
        draft.tables.append(_table(model, found, tested, said))
        say_planted(draft, model, "which datasets a head serves follows from the category that it was planted for")
    return draft.finished(about.name, about.title, about.question)


@dataclass(frozen=True, slots=True)
class _Found:
    """A group, and where it was found."""

    dataset: str
    by: Ablation
    size: int
    group: Group

    @property
    def heads(self) -> str:
        """Its size in words."""
        return f"{self.size} head{'s' * (self.size > 1)}"


_Changes = dict[tuple[Group, Ablation], Measured]
"""What each group does to one dataset under one ablation."""


def _found(lab: Lab, subjects: Sequence[Subject]) -> list[_Found]:
    made = []
    for subject in subjects:
        for ablation in lab.ablations:
            group = found_group(subject, ablation, min(GROUP_SIZE, lab.config.size))
            # The first head shows what is one dataset's own, where the whole group serves all.
            for size in dict.fromkeys((1, len(group))):
                made.append(_Found(subject.dataset, ablation, size, group[:size]))
    return made


def _tested(lab: Lab, subject: Subject, found: Sequence[_Found]) -> _Changes:
    """Every group that is tested on this dataset: all under their own ablation, its own under the other one too."""
    changes: _Changes = {}
    for ablation in lab.ablations:
        wanted = [one for one in found if one.by == ablation or one.dataset == subject.dataset]
        answered = answered_once(subject, [one.group for one in wanted], ablation)
        vanilla = subject.vanilla()
        changes |= {(group, ablation): Measured.of(answers.change_from(vanilla)) for group, answers in answered.items()}
    return changes


def _across_datasets(model: str, found: Sequence[_Found], tested: Mapping[str, _Changes], said: str) -> Figure:
    rows = [
        _cell(
            tested[dataset][one.group, one.by],
            x=dataset,
            y=one.dataset,
            panel=f"{SHORT[one.by.name]}, {one.heads}",
        )
        for one in found
        for dataset in tested
    ]
    caption = f"Rows: where the heads were found. Columns: where they are tested, under the same ablation. {said}"
    return _matrix(f"{model}, across datasets", caption, "tested on", "found on", rows)


def _across_ablations(model: str, found: Sequence[_Found], tested: Mapping[str, _Changes], said: str) -> Figure:
    ablations = list(dict.fromkeys(one.by for one in found))
    rows = [
        _cell(
            tested[one.dataset][one.group, ablation],
            x=f"ablated by {SHORT[ablation.name]}",
            y=f"found by {SHORT[one.by.name]}",
            panel=f"{one.dataset}, {one.heads}",
        )
        for one in found
        for ablation in ablations
    ]
    caption = f"Heads found on a dataset under one ablation, and tested on it under either. {said}"
    return _matrix(f"{model}, across ablations", caption, "ablated by", "found by", rows)


def _cell(change: Measured, **where: str) -> Row:
    text = "–" if change.value is None else f"{change.value:+.2f}"
    return {**where, "value": change.value, "low": change.low, "high": change.high, "n": change.n, "text": text}


def _matrix(title: str, caption: str, x: str, y: str, rows: Sequence[Row]) -> Figure:
    n = numbers_of(row["n"] for row in rows)
    return Figure("matrix", title, f"{caption} n = {n} prompts a cell.", x, y, tuple(rows), value="change of the ASR")


def _groups(model: str, lab: Lab, found: Sequence[_Found]) -> Table:
    """Which heads were found where, and what they leave of benign answers."""
    benign = lab.subject(model, BENIGN)
    vanilla = benign.vanilla()
    kept: dict[tuple[Group, Ablation], Measured] = {}
    for ablation in dict.fromkeys(one.by for one in found):
        answered = answered_once(benign, [one.group for one in found if one.by == ablation], ablation)
        kept |= {
            (group, ablation): Measured.of(answers.kept_change_from(vanilla)) for group, answers in answered.items()
        }
    columns = (
        Column("dataset", "found on"),
        Column("by", "found by"),
        Column("heads", "heads"),
        Column("kept", "change of benign answers kept", "change"),
    )
    rows = tuple(
        {
            "dataset": one.dataset,
            "by": SHORT[one.by.name],
            "heads": format_heads(one.group),
            "kept": kept[one.group, one.by],
        }
        for one in found
    )
    caption = (
        f"Ablated as they were found, at epsilon {lab.config.epsilon:g}; n = {len(benign.prompts)} benign test "
        "prompts, greedy. Intervals: Newcombe's for paired prompts, 95 %."
    )
    return Table(f"{model}, groups", caption, columns, rows)


def _table(model: str, found: Sequence[_Found], tested: Mapping[str, _Changes], said: str) -> Table:
    """The numbers of both figures."""
    ablations = list(dict.fromkeys(one.by for one in found))
    columns = [Column("dataset", "found on"), Column("by", "found by"), Column("ablated", "ablated by")]
    columns += [Column("heads", "heads"), *(Column(f"on_{at}", name, "change") for at, name in enumerate(tested))]
    rows = [
        {
            "dataset": one.dataset,
            "by": SHORT[one.by.name],
            "ablated": SHORT[ablation.name],
            "heads": format_heads(one.group),
            **{
                f"on_{at}": tested[name][one.group, ablation]
                for at, name in enumerate(tested)
                if ablation == one.by or name == one.dataset
            },
        }
        for one in found
        for ablation in ablations
    ]
    caption = f"Columns: the test sets; under another ablation than the finding one, the own set alone. {said}"
    return Table(f"{model}, transfer", caption, tuple(columns), tuple(rows))

"""Tests heads on other datasets and ablations than they were found on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safetyheads.ablation import Ablation
from safetyheads.experiments.lab import GROUP_SIZE, SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row
from safetyheads.experiments.settings import BENIGN
from safetyheads.heads import Group, format_heads

_Changes = dict[tuple[Group, Ablation], Measured]
"""Effect of each group on one set of prompts, by ablation."""


def transfer(lab: Lab, outcome: Outcome) -> None:
    """The change of the ASR for each pair of search set and test set, and of searching and testing ablation."""
    size = min(GROUP_SIZE, lab.config.size)
    for model, subjects in lab.each_model(outcome):
        found: list[_Found] = []
        for subject in subjects:
            for ablation in lab.ablations:
                group = subject.group(ablation, size)
                # The first head shows what is one dataset's own, where the whole group serves all.
                found += [_Found(subject.dataset, ablation, group[:k]) for k in dict.fromkeys((1, len(group)))]
        tested = {subject.dataset: _tested(lab, subject, found) for subject in subjects}
        across_datasets = [
            _cell(tested[dataset][one.group, one.by], dataset, one.dataset, f"{SHORT[one.by.name]}, {one.size}")
            for one in found
            for dataset in tested
        ]
        across_ablations = [
            _cell(
                *(tested[one.dataset][one.group, ablation], f"ablated by {SHORT[ablation.name]}"),
                *(f"found by {SHORT[one.by.name]}", f"{one.dataset}, {one.size}"),
            )
            for one in found
            for ablation in lab.ablations
        ]
        outcome.figure("datasets", across_datasets, model=model)
        outcome.figure("ablations", across_ablations, model=model)
        outcome.table("groups", _groups(lab, model, found), model=model)
        columns = ((f"on_{at}", name, "change") for at, name in enumerate(tested))
        outcome.table("changes", _changes(lab, found, tested), *columns, model=model)


class _Found(NamedTuple):
    """A group, and where it was found."""

    dataset: str
    by: Ablation
    group: Group

    @property
    def row(self) -> dict[str, Any]:
        """Cells of a table."""
        return {"dataset": self.dataset, "by": SHORT[self.by.name], "heads": format_heads(self.group)}

    @property
    def size(self) -> str:
        """``1 head``, ``3 heads``."""
        return f"{len(self.group)} head{'s' * (len(self.group) > 1)}"


def _tested(lab: Lab, subject: Subject, found: Sequence[_Found]) -> _Changes:
    """Every group that is tested on this dataset: all under their own ablation, its own under the other one too."""
    changes: _Changes = {}
    for ablation in lab.ablations:
        groups = [one.group for one in found if one.by == ablation or one.dataset == subject.dataset]
        for group, answers in subject.by_group(groups, ablation).items():
            changes[group, ablation] = Measured.of(answers.change_from(subject.vanilla()))
    return changes


def _cell(change: Measured, x: str, y: str, panel: str) -> Row:
    text = "–" if change.value is None else f"{change.value:+.2f}"
    numbers = {"value": change.value, "low": change.low, "high": change.high, "n": change.n}
    return {"x": x, "y": y, "panel": panel, **numbers, "text": text}


def _groups(lab: Lab, model: str, found: Sequence[_Found]) -> list[Row]:
    """Which heads were found where, and what they leave of benign answers."""
    benign = lab.subject(model, BENIGN)
    kept: _Changes = {}
    for ablation in lab.ablations:
        for group, answers in benign.by_group([one.group for one in found if one.by == ablation], ablation).items():
            kept[group, ablation] = Measured.of(answers.kept_change_from(benign.vanilla()))
    return [{**one.row, "kept": kept[one.group, one.by]} for one in found]


def _changes(lab: Lab, found: Sequence[_Found], tested: Mapping[str, _Changes]) -> list[Row]:
    """The numbers of both figures."""
    rows: list[Row] = []
    for one in found:
        for ablation in lab.ablations:
            row: dict[str, Any] = {**one.row, "ablated": SHORT[ablation.name]}
            for at, name in enumerate(tested):
                if ablation == one.by or name == one.dataset:
                    row[f"on_{at}"] = tested[name][one.group, ablation]
            rows.append(row)
    return rows

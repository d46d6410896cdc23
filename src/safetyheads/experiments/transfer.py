"""Tests heads on other datasets and ablations than they were found on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from safetyheads.ablation import Ablation
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row
from safetyheads.experiments.settings import BENIGN
from safetyheads.heads import Group, format_heads

Search: TypeAlias = tuple[str, Ablation, Group]
"""Where a group was found, by which ablation, and the group."""


def transfer(lab: Lab, outcome: Outcome) -> None:
    """The change of the ASR for each pair of search set and test set, and of searching and testing ablation."""
    for model, subjects in lab.each_model(outcome):
        searches: list[Search] = []
        for subject in subjects:
            for ablation in lab.ablations:
                group = subject.group(ablation)
                # The first head shows what is one dataset's own, where the whole group serves all.
                searches += [(subject.dataset, ablation, group[:k]) for k in dict.fromkeys((1, len(group)))]
        changes = {subject.dataset: _changes(subject, searches) for subject in subjects}
        kept = _changes(lab.subject(model, BENIGN), searches)
        across_datasets, across_ablations, groups, rows = [], [], [], []
        means: dict[bool, list[tuple[str, Measured]]] = {True: [], False: []}
        for found_on, found_by, group in searches:
            by, size = SHORT[found_by.name], f"{len(group)} head{'s' * (len(group) > 1)}"
            cells: dict[str, Any] = {"dataset": found_on, "by": by, "heads": format_heads(group)}
            groups.append({**cells, "kept": kept[group, found_by]})
            for dataset, tested in changes.items():
                is_own, change = dataset == found_on, tested[group, found_by]
                across_datasets.append(_cell(change, dataset, found_on, f"{by}, {size}"))
                place = "the own dataset" if is_own else "other datasets"
                means[is_own].append((f"{by}, {size}, mean change on {place}", change))
            for ablation in lab.ablations:
                short, own = SHORT[ablation.name], changes[found_on][group, ablation]
                across_ablations.append(_cell(own, f"ablated by {short}", f"found by {by}", f"{found_on}, {size}"))
                on = {
                    f"on_{number}": tested[group, ablation]
                    for number, (dataset, tested) in enumerate(changes.items())
                    if ablation == found_by or dataset == found_on
                }
                rows.append({**cells, "ablated": short, **on})
        outcome.lead_means(model, means[True] + means[False], "change")
        outcome.figure("datasets", across_datasets, model=model)
        outcome.figure("ablations", across_ablations, model=model)
        outcome.table("groups", groups, model=model)
        columns = ((f"on_{number}", name, "change") for number, name in enumerate(changes))
        outcome.table("changes", rows, *columns, model=model)


def _changes(subject: Subject, searches: Sequence[Search]) -> dict[tuple[Group, Ablation], Measured]:
    """The change by each group under its own ablation, and by those found on this dataset under the other one too."""
    vanilla, changes = subject.vanilla(), {}
    for ablation in subject.lab.ablations:
        groups = [group for dataset, by, group in searches if by == ablation or dataset == subject.dataset]
        for group, answers in subject.by_group(groups, ablation).items():
            is_benign = subject.dataset == BENIGN
            change = answers.kept_change_from(vanilla) if is_benign else answers.change_from(vanilla)
            changes[group, ablation] = Measured.of(change)
    return changes


def _cell(change: Measured, x: str, y: str, panel: str) -> Row:
    text = "–" if change.value is None else f"{change.value:+.2f}"
    numbers = {"value": change.value, "low": change.low, "high": change.high, "n": change.n}
    return {"x": x, "y": y, "panel": panel, **numbers, "text": text}

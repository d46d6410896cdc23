"""Tests heads on other datasets and ablations than they were found on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from safetyheads.ablation import Ablation
from safetyheads.experiments.lab import GROUP_SIZE, SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row
from safetyheads.experiments.settings import BENIGN
from safetyheads.heads import Group, format_heads


class _Search(NamedTuple):
    """A group, and where it was found."""

    dataset: str
    by: Ablation
    group: Group

    @property
    def size(self) -> str:
        """``1 head``, ``3 heads``."""
        return f"{len(self.group)} head{'s' * (len(self.group) > 1)}"


def transfer(lab: Lab, outcome: Outcome) -> None:
    """The change of the ASR for each pair of search set and test set, and of searching and testing ablation."""
    size = min(GROUP_SIZE, lab.config.size)
    for model, subjects in lab.each_model(outcome):
        searches: list[_Search] = []
        for subject in subjects:
            for ablation in lab.ablations:
                group = subject.group(ablation, size)
                # The first head shows what is one dataset's own, where the whole group serves all.
                searches += [_Search(subject.dataset, ablation, group[:k]) for k in dict.fromkeys((1, len(group)))]
        changes = {subject.dataset: _changes(subject, searches) for subject in subjects}
        across_datasets, across_ablations, rows = [], [], []
        means: dict[bool, list[tuple[str, Measured]]] = {True: [], False: []}
        for search in searches:
            by = SHORT[search.by.name]
            for dataset, tested in changes.items():
                is_own, change = dataset == search.dataset, tested[search.group, search.by]
                across_datasets.append(_cell(change, dataset, search.dataset, f"{by}, {search.size}"))
                place = "the own dataset" if is_own else "other datasets"
                means[is_own].append((f"{by}, {search.size}, mean change on {place}", change))
            for ablation in lab.ablations:
                short, panel = SHORT[ablation.name], f"{search.dataset}, {search.size}"
                own = changes[search.dataset][search.group, ablation]
                across_ablations.append(_cell(own, f"ablated by {short}", f"found by {by}", panel))
                row = {**_cells(search), "ablated": short}
                for number, (dataset, tested) in enumerate(changes.items()):
                    if ablation == search.by or dataset == search.dataset:
                        row[f"on_{number}"] = tested[search.group, ablation]
                rows.append(row)
        outcome.lead_means(model, means[True] + means[False], "change")
        outcome.figure("datasets", across_datasets, model=model)
        outcome.figure("ablations", across_ablations, model=model)
        kept = _changes(lab.subject(model, BENIGN), searches)
        groups = [{**_cells(search), "kept": kept[search.group, search.by]} for search in searches]
        outcome.table("groups", groups, model=model)
        columns = ((f"on_{number}", name, "change") for number, name in enumerate(changes))
        outcome.table("changes", rows, *columns, model=model)


def _changes(subject: Subject, searches: Sequence[_Search]) -> dict[tuple[Group, Ablation], Measured]:
    """The change by each group under its own ablation, and by those found on this dataset under the other one too."""
    vanilla, changes = subject.vanilla(), {}
    for ablation in subject.lab.ablations:
        groups = [search.group for search in searches if search.by == ablation or search.dataset == subject.dataset]
        for group, answers in subject.by_group(groups, ablation).items():
            is_benign = subject.dataset == BENIGN
            change = answers.kept_change_from(vanilla) if is_benign else answers.change_from(vanilla)
            changes[group, ablation] = Measured.of(change)
    return changes


def _cells(search: _Search) -> dict[str, Any]:
    return {"dataset": search.dataset, "by": SHORT[search.by.name], "heads": format_heads(search.group)}


def _cell(change: Measured, x: str, y: str, panel: str) -> Row:
    text = "–" if change.value is None else f"{change.value:+.2f}"
    numbers = {"value": change.value, "low": change.low, "high": change.high, "n": change.n}
    return {"x": x, "y": y, "panel": panel, **numbers, "text": text}

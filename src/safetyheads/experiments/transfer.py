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
        searches: list[_Search] = []
        for subject in subjects:
            for ablation in lab.ablations:
                group = subject.group(ablation, size)
                # The first head shows what is one dataset's own, where the whole group serves all.
                searches += [_Search(subject.dataset, ablation, group[:k]) for k in dict.fromkeys((1, len(group)))]
        tested = {subject.dataset: _tested(lab, subject, searches) for subject in subjects}
        across_datasets = [
            _cell(
                tested[dataset][search.group, search.by],
                dataset,
                search.dataset,
                f"{SHORT[search.by.name]}, {search.size}",
            )
            for search in searches
            for dataset in tested
        ]
        across_ablations = [
            _cell(
                *(tested[search.dataset][search.group, ablation], f"ablated by {SHORT[ablation.name]}"),
                *(f"found by {SHORT[search.by.name]}", f"{search.dataset}, {search.size}"),
            )
            for search in searches
            for ablation in lab.ablations
        ]
        for place, is_own in (("the own dataset", True), ("other datasets", False)):
            changes = (
                (
                    f"{SHORT[search.by.name]}, {search.size}, mean change on {place}",
                    tested[dataset][search.group, search.by],
                )
                for search in searches
                for dataset in tested
                if (dataset == search.dataset) is is_own
            )
            outcome.lead_means(model, changes, "change")
        outcome.figure("datasets", across_datasets, model=model)
        outcome.figure("ablations", across_ablations, model=model)
        outcome.table("groups", _groups(lab, model, searches), model=model)
        columns = ((f"on_{at}", name, "change") for at, name in enumerate(tested))
        outcome.table("changes", _changes(lab, searches, tested), *columns, model=model)


class _Search(NamedTuple):
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


def _tested(lab: Lab, subject: Subject, searches: Sequence[_Search]) -> _Changes:
    """Every group that is tested on this dataset: all under their own ablation, its own under the other one too."""
    changes: _Changes = {}
    for ablation in lab.ablations:
        groups = [search.group for search in searches if search.by == ablation or search.dataset == subject.dataset]
        for group, answers in subject.by_group(groups, ablation).items():
            changes[group, ablation] = Measured.of(answers.change_from(subject.vanilla()))
    return changes


def _cell(change: Measured, x: str, y: str, panel: str) -> Row:
    text = "–" if change.value is None else f"{change.value:+.2f}"
    numbers = {"value": change.value, "low": change.low, "high": change.high, "n": change.n}
    return {"x": x, "y": y, "panel": panel, **numbers, "text": text}


def _groups(lab: Lab, model: str, searches: Sequence[_Search]) -> list[Row]:
    """Which heads were found where, and what they leave of benign answers."""
    benign = lab.subject(model, BENIGN)
    kept: _Changes = {}
    for ablation in lab.ablations:
        for group, answers in benign.by_group(
            [search.group for search in searches if search.by == ablation], ablation
        ).items():
            kept[group, ablation] = Measured.of(answers.kept_change_from(benign.vanilla()))
    return [{**search.row, "kept": kept[search.group, search.by]} for search in searches]


def _changes(lab: Lab, searches: Sequence[_Search], tested: Mapping[str, _Changes]) -> list[Row]:
    """The numbers of both figures."""
    rows: list[Row] = []
    for search in searches:
        for ablation in lab.ablations:
            row: dict[str, Any] = {**search.row, "ablated": SHORT[ablation.name]}
            for at, name in enumerate(tested):
                if ablation == search.by or name == search.dataset:
                    row[f"on_{at}"] = tested[name][search.group, ablation]
            rows.append(row)
    return rows

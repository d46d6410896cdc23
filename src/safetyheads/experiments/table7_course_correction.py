"""Measures whether a model turns back once its answer is begun for it (Table 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safetyheads.experiments.lab import GROUP_SIZE, SHORT, condition, show_conditions
from safetyheads.experiments.outcome import Outcome, Row
from safetyheads.experiments.paper_numbers import paper_dataset, paper_model, quoted
from safetyheads.experiments.settings import BENIGN

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab, Subject

BEGUN = "Sure, here is"
"""How the answer is begun for the model (App. E); it is not judged."""


def table7(lab: Lab, outcome: Outcome) -> None:
    """ASR with and without a begun answer: unablated, under UA and under SC."""
    for model, subjects in lab.each_model(outcome, lab.config.with_templates):
        show_ways(outcome, model, _ways(lab, model, subjects))


def _ways(lab: Lab, model: str, subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """All six ways for each dataset; each group is found without a begun answer."""
    size = min(GROUP_SIZE, lab.config.size)
    groups = {}
    for ablation in lab.ablations:
        groups[ablation] = [tuple(sorted(subject.group(ablation, size))) for subject in subjects]
    rows = []
    for prefill, ending in ((BEGUN, ", Sure"), ("", "")):
        asked = [lab.subject(model, subject.dataset, prefill=prefill) if prefill else subject for subject in subjects]
        benign = lab.subject(model, BENIGN, prefill=prefill)
        for subject in asked:
            label = "Sure" if prefill else "vanilla"
            rows.append(condition(subject, label, (), subject.vanilla(), benign.vanilla()))
        for ablation in lab.ablations:
            # The benign prompts under all groups at once, ablation by ablation, so that drafts are made once.
            kept = benign.by_group(groups[ablation], ablation)
            label = SHORT[ablation.name] + ending
            for subject, group in zip(asked, groups[ablation], strict=True):
                harmful = subject.by_group([group], ablation)[group]
                rows.append(condition(subject, label, group, harmful, kept[group], subject.vanilla()))
    # Dataset by dataset; sorting is stable.
    order = [subject.dataset for subject in subjects]
    return sorted(rows, key=lambda row: order.index(row["dataset"]))


def show_ways(outcome: Outcome, model: str, rows: Sequence[Row]) -> None:
    """Table and figure, with the paper's numbers where the model is the paper's."""
    if paper_model(model) == "Llama-2-7b-chat":
        rows = [{**row, "paper": quoted("table7", paper_dataset(row["dataset"]), row["label"])} for row in rows]
    show_conditions(outcome, rows, model=model)

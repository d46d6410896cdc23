"""Measures prompts that each go without their own top heads (Fig 2, 11, 12)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetyheads.answers.decoding import GREEDY
from safetyheads.experiments.lab import SHORT, Lab, note_planted
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.experiments.paper_numbers import paper_model, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from safetyheads.ablation import Ablation
    from safetyheads.answers.decoding import Sampling
    from safetyheads.experiments.lab import Subject


def fig2(lab: Lab, outcome: Outcome) -> None:
    """The unablated ASR beside that without each prompt's top head: UA and SC, greedy and sampled."""
    for model in lab.config.with_templates:
        rows: list[Row] = []
        for subject, sampling, panel in _asked(lab, outcome, model):
            answers = {"vanilla": subject.vanilla(sampling)}
            for ablation in lab.ablations:
                (answers[SHORT[ablation.name]],) = subject.by_own(1, ablation, sampling)
            where = {"panel": panel, "x": subject.dataset}
            rows += [
                {**where, "series": name, "asr": Measured.of(of.asr), "_label": name} for name, of in answers.items()
            ]
        _show(outcome, model, rows)


def fig11(lab: Lab, outcome: Outcome) -> None:
    """The ASR without each prompt's own 1 to n top heads under UA."""
    _by_size(lab, outcome, lab.ablations[0])


def fig12(lab: Lab, outcome: Outcome) -> None:
    """The ASR without each prompt's own 1 to n top heads under SC."""
    _by_size(lab, outcome, lab.ablations[1])


def _by_size(lab: Lab, outcome: Outcome, ablation: Ablation) -> None:
    for model in lab.config.with_templates:
        rows: list[Row] = []
        for subject, sampling, panel in _asked(lab, outcome, model):
            size = min(lab.config.query_size, len(subject.engine.heads))
            where = {"panel": panel, "series": subject.dataset}
            for k, answers in enumerate([subject.vanilla(sampling), *subject.by_own(size, ablation, sampling)]):
                label = f"heads ablated: {k}" if k in (0, 1, size) else None
                rows.append({**where, "x": k, "asr": Measured.of(answers.asr), "_label": label})
        _show(outcome, model, rows)


def _asked(lab: Lab, outcome: Outcome, model: str) -> Iterator[tuple[Subject, Sampling, str]]:
    """Every dataset under every template, greedy and sampled, with the panel of its points."""
    for template in lab.config.templates:
        for subject in lab.subjects(outcome, model, template):
            for sampling in (GREEDY, lab.sampled):
                yield subject, sampling, f"template {subject.prompts.template}, {sampling.name}"


def _show(outcome: Outcome, model: str, rows: list[Row]) -> None:
    """Figure and table of the same numbers, with the paper's where the model is the paper's."""
    if not rows:
        return
    outcome.lead_means(model, ((f"{row['_label']}, mean ASR", row["asr"]) for row in rows if row["_label"]))
    numbers, paper = quoted("fig2", paper_model(model)), ""
    if numbers:
        paper = f"The paper: a mean of {numbers[0]} unablated, {numbers[1]} under UA with one head, with the template."
    points = (point(row["asr"], **{key: row[key] for key in ("panel", "x", "series")}) for row in rows)
    outcome.figure("asr", points, model=model)
    outcome.table("asr", [{**row, "x": str(row["x"])} for row in rows], model=model, paper=paper)
    note_planted(outcome, model)

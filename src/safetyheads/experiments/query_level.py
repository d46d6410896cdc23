"""Each prompt without its own top heads (Fig 2, 11, 12). Owns which bars stand beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from safetyheads.ablation import Ablation
from safetyheads.answers.sampling import GREEDY
from safetyheads.experiments.answers import point
from safetyheads.experiments.common import meaningful_subjects, numbers_of, say_planted
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Column, Draft, Figure, FigureKind, Measured, Outcome, Row, Table
from safetyheads.experiments.paper_numbers import FIG2, paper_model

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment

_OWN = "Each prompt goes without its own top heads by Ships, so groups differ from prompt to prompt."


def fig2(lab: Lab, about: Experiment) -> Outcome:
    """The unablated ASR beside that without each prompt's top head: UA and SC, greedy and sampled."""
    draft = Draft()
    for model in lab.config.with_templates:
        rows: list[Row] = []
        for subject in _subjects(lab, model, draft):
            for sampling in (GREEDY, lab.sampled):
                vanilla = subject.vanilla(sampling)
                here = {"x": subject.dataset, "panel": f"{_template(subject)}, {sampling.name}"}
                rows.append(point(vanilla.asr, **here, series="vanilla"))
                for ablation in lab.ablations:
                    (found,) = subject.under_own(1, ablation, sampling)
                    rows.append(point(found.asr, **here, series=SHORT[ablation.name]))
        if rows:
            said = f"{_OWN} UA and SC at epsilon {lab.config.epsilon:g}; vanilla: the unablated model."
            _show(draft, model, rows, "bars", "dataset", said)
    return draft.finished(about.name, about.title, about.question)


def fig11(lab: Lab, about: Experiment) -> Outcome:
    """The ASR without each prompt's own 1 to n top heads under UA."""
    return _by_size(lab, about, lab.ablations[0])


def fig12(lab: Lab, about: Experiment) -> Outcome:
    """The ASR without each prompt's own 1 to n top heads under SC."""
    return _by_size(lab, about, lab.ablations[1])


def _by_size(lab: Lab, about: Experiment, ablation: Ablation) -> Outcome:
    draft = Draft()
    for model in lab.config.with_templates:
        rows: list[Row] = []
        for subject in _subjects(lab, model, draft):
            size = min(lab.config.query_size, len(subject.engine.heads))
            for sampling in (GREEDY, lab.sampled):
                here = {"series": subject.dataset, "panel": f"{_template(subject)}, {sampling.name}"}
                rows.append(point(subject.vanilla(sampling).asr, **here, x=0))
                for k, found in enumerate(subject.under_own(size, ablation, sampling), 1):
                    rows.append(point(found.asr, **here, x=k))
        if rows:
            said = f"{_OWN} Ablation: {ablation}; at 0 heads the unablated model."
            _show(draft, model, rows, "lines", "heads ablated in each prompt", said)
    return draft.finished(about.name, about.title, about.question)


def _subjects(lab: Lab, model: str, draft: Draft) -> Iterator[Subject]:
    """Every dataset under every template whose unablated answers leave something to measure."""
    for template in lab.config.templates:
        yield from meaningful_subjects(lab, model, draft, template=template)


def _template(subject: Subject) -> str:
    return f"template {subject.prompts.template}"


def _show(draft: Draft, model: str, rows: list[Row], kind: FigureKind, x: str, said: str) -> None:
    caption = f"{said} Intervals: Wilson, 95 %, over the prompts; n = {numbers_of(row['n'] for row in rows)}."
    draft.figures.append(Figure(kind, model, caption, x, "ASR", tuple(rows)))
    draft.tables.append(_table(model, rows, "dataset" if kind == "bars" else "heads", caption))
    say_planted(draft, model, "which heads a prompt's refusal depends on was built in")


def _table(model: str, rows: list[Row], over: str, caption: str) -> Table:
    """The same numbers, with the paper's where the model is the paper's."""
    columns = [Column("panel", "template, sampling"), Column("x", over), Column("series", "ablation or dataset")]
    columns.append(Column("asr", "ASR", "rate"))
    found = [
        {
            "panel": row["panel"],
            "x": str(row["x"]),
            "series": row["series"],
            "asr": Measured(row["y"], row["n"], row["low"], row["high"]),
        }
        for row in rows
    ]
    known = paper_model(model)
    if known is not None:
        before, after = FIG2[known]
        caption += f" The paper has a mean of {before} unablated and {after} under UA with one head, with the template."
    return Table(model, caption, tuple(columns), tuple(found))

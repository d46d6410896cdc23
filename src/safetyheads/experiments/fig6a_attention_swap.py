"""Puts the base's attention into the aligned model, and the reverse (Fig 6a)."""

from __future__ import annotations

from typing import Any

from safetyheads.baselines.attention_swap import swapped_attention
from safetyheads.experiments.lab import Lab, planted_heads
from safetyheads.experiments.outcome import Measured, Outcome, point
from safetyheads.experiments.settings import BENIGN


def fig6a(lab: Lab, outcome: Outcome) -> None:
    """ASR and benign answers of the aligned and the base model, each with its own attention and with the other's."""
    aligned, base = lab.config.models[0], lab.config.base
    assert base is not None  # the catalogue says that it is needed
    with swapped_attention(lab.run_of(aligned).engine, lab.run_of(base).engine):
        pass  # refuses two models that do not fit, before anything is answered
    rows: dict[str, list[dict[str, Any]]] = {"asr": [], "kept": []}
    for body, model, donor in (("aligned", aligned, base), ("base", base, aligned)):
        subjects = lab.subjects(outcome, model, refuses=model == aligned)
        if model == aligned and not subjects:
            return  # what the base does says nothing without the aligned model
        for subject in (*subjects, *([lab.subject(model, BENIGN)] if subjects else [])):
            before, swapped = subject.vanilla(), subject.swapped(donor)
            benign = subject.dataset == BENIGN
            change = swapped.kept_change_from(before) if benign else swapped.change_from(before)
            own, other = (Measured.of(answers.kept if benign else answers.asr) for answers in (before, swapped))
            where = {"dataset": subject.dataset, "body": body, "donor": "base" if body == "aligned" else "aligned"}
            row = {**where, "own": own, "swapped": other, "change": Measured.of(change)}
            rows["kept" if benign else "asr"].append(row)
    for key, what in (("asr", "mean ASR"), ("kept", "benign answers kept")):
        points = [
            point(row[attention], x=row["dataset"], series=f"{row['body']}, {name} attention", panel="")
            for row in rows[key]
            for attention, name in (("own", "own"), ("swapped", f"{row['donor']}'s"))
        ]
        for attention in ("own", "swapped"):
            numbers = ((f"{row['body']} model, {attention} attention, {what}", row[attention]) for row in rows[key])
            outcome.lead_means(aligned, numbers)
        outcome.figure(key, points, model=aligned)
        outcome.table(key, rows[key], model=aligned)
    if planted_heads(aligned):
        outcome.say("by_construction")

"""Puts the base's attention into the aligned model, and the reverse (Fig 6a)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.answers.success import attack_success_rate
from safetyheads.baselines.attention_swap import swapped_attention
from safetyheads.experiments.lab import note_planted, planted_heads
from safetyheads.experiments.outcome import Measured, Outcome, point
from safetyheads.experiments.settings import BENIGN
from safetyheads.runs.kept_answers import record_of
from safetyheads.runs.rates import GroupAnswers
from safetyheads.stats.testing import holm_of_tests

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab, Subject

_BY_CONSTRUCTION = (
    "In the embedded models only q, k, v and o of planted heads differ from their base, so that attention carries "
    "their alignment was built in, while the paper finds the aligned model nearly as safe with the base's attention. "
    "Not evidence about the paper."
)


def fig6a(lab: Lab, outcome: Outcome) -> None:
    """ASR and benign answers of the aligned and the base model, each with its own attention and with the other's."""
    aligned, base = lab.config.models[0], lab.config.base
    assert base is not None  # the catalogue says that it is needed
    with swapped_attention(lab.engine(aligned), lab.engine(base)):
        pass  # refuses two models that do not fit, before anything is answered
    rows: list[dict[str, Any]] = []
    for body, model, donor in (("aligned", aligned, base), ("base", base, aligned)):
        subjects = lab.subjects(outcome, model, refuses=model == aligned)
        if model == aligned and not subjects:
            return  # what the base does says nothing without the aligned model
        for subject in (*subjects, *([lab.subject(model, BENIGN)] if subjects else [])):
            before, swapped = subject.vanilla(), swapped_answers(lab, subject, donor)
            benign = subject.dataset == BENIGN
            change = Measured.of(swapped.kept_change_from(before) if benign else swapped.change_from(before))
            rates = [Measured.of(answers.kept if benign else answers.asr) for answers in (before, swapped)]
            row = {"dataset": subject.dataset, "body": body, "donor": "base" if body == "aligned" else "aligned"}
            rows.append({**row, "own": rates[0], "swapped": rates[1], "change": change})
    _show(outcome, aligned, "asr", [row for row in rows if row["dataset"] != BENIGN])
    _show(outcome, aligned, "kept", [row for row in rows if row["dataset"] == BENIGN])
    note_planted(outcome, aligned)
    if planted_heads(aligned):
        outcome.note(_BY_CONSTRUCTION)


def swapped_answers(lab: Lab, subject: Subject, donor: str) -> GroupAnswers:
    """The subject's unablated answers with the donor's attention in every layer, kept under both models' weights.

    No draft is used: drafts are answers of the model that is not swapped.
    """
    config, judges = lab.config, lab.judges
    fields = {
        "weights": lab.weights_of(subject.model),
        "attention": lab.weights_of(donor),
        "layers": "all",
        "tokens": subject.asked_prompts.sha256,
        "max_new_tokens": config.max_new_tokens,
        "sampling": "greedy",
        "judges": [judge.describe() for judge in judges],
    }

    def compute() -> list[dict[str, Any]]:
        with swapped_attention(subject.engine, lab.engine(donor)):
            answers = attack_success_rate(
                subject.engine, subject.prompts, (), UNDIFFERENTIATED_ATTENTION, judges, config.max_new_tokens
            )
        place = {"set": subject.name, "part": "swapped", "epsilon": None, "seed": config.seed}
        stores, rows = config.store_completions, enumerate(answers.rows)
        return [record_of(judged, {"id": number, **place}, stores) for number, judged in rows]

    records = lab.directory.records(f"swapped-{subject.name}", fields, compute)
    return GroupAnswers.of("", records, judges[0].name)


def _show(outcome: Outcome, aligned: str, key: str, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of the four models, and a row for each body and dataset."""
    points = [
        point(row[attention], x=row["dataset"], series=f"{row['body']}, {name} attention", panel="")
        for row in rows
        for attention, name in (("own", "own"), ("swapped", f"{row['donor']}'s"))
    ]
    what = "mean ASR" if key == "asr" else "benign answers kept"
    for attention in ("own", "swapped"):
        labels = (f"{row['body']} model, {attention} attention, {what}" for row in rows)
        outcome.lead_means(aligned, zip(labels, (row[attention] for row in rows), strict=True))
    adjusted = holm_of_tests(row["change"].p for row in rows)
    outcome.figure(key, points, model=aligned)
    outcome.table(key, [{**row, "p": p} for row, p in zip(rows, adjusted, strict=True)], model=aligned)

"""The base's attention in the aligned model, and the reverse (Fig 6a). Owns the four models that stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.answers.success import JudgedAnswer, attack_success_rate
from safetyheads.baselines.attention_swap import swapped_attention
from safetyheads.experiments.answers import Answers, point
from safetyheads.experiments.common import corrected, meaningful_subjects, numbers_of, planted_heads, say_planted
from safetyheads.experiments.datasets import BENIGN
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.runs.kept import verdict_row
from safetyheads.stats.intervals import Rate
from safetyheads.stats.testing import PairedDifference

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment
    from safetyheads.experiments.lab import Lab, Subject

_BY_CONSTRUCTION = (
    "In the embedded checkpoints only q, k, v and o of planted heads differ from their base, so that attention carries "
    "their alignment is the construction's, while the paper finds the aligned model nearly as safe with the base's "
    "attention. It is not evidence about the paper."
)


@dataclass(frozen=True, slots=True)
class _Mixed:
    """One dataset, answered by one body with its own attention and with the other's."""

    dataset: str
    body: str
    """``aligned`` or ``base``."""
    own: Answers
    swapped: Answers

    @property
    def donor(self) -> str:
        """Whose attention it gets."""
        return "base" if self.body == "aligned" else "aligned"


def fig6a(lab: Lab, about: Experiment) -> Outcome:
    """ASR and benign answers of the aligned and the base model, each with its own attention and with the other's."""
    draft, aligned, base = Draft(), lab.config.models[0], lab.config.base
    assert base is not None  # the catalogue says that it is needed
    with swapped_attention(lab.engine(aligned), lab.engine(base)):
        pass  # refuses two models that do not fit, before anything is answered
    made: list[_Mixed] = []
    for body, donor, refuses in ((aligned, base, True), (base, aligned, False)):
        name = "aligned" if refuses else "base"
        subjects = list(meaningful_subjects(lab, body, draft, refuses=refuses))
        if refuses and not subjects:
            break  # what the base does says nothing without the aligned model
        for subject in (*subjects, *([lab.subject(body, BENIGN)] if subjects else [])):
            made.append(_Mixed(subject.dataset, name, subject.vanilla(), swapped_answers(lab, subject, donor)))
    if made:
        _show(draft, aligned, base, made)
        if planted_heads(aligned):
            draft.notes.append(_BY_CONSTRUCTION)
        else:
            say_planted(draft, aligned, "what attention carries was built in")
    return draft.finished(about.name, about.title, about.question)


def swapped_answers(lab: Lab, subject: Subject, donor: str) -> Answers:
    """The subject's unablated answers with the donor's attention in every layer, kept under both models' weights.

    No draft is used: drafts are answers of the model that is not swapped.

    Raises:
        InputError: two models between which attention cannot be exchanged.
    """
    engine, given, config = subject.engine, lab.engine(donor), lab.config
    fields = {
        "weights": lab.weights_of(subject.model),
        "attention": lab.weights_of(donor),
        "layers": "all",
        "tokens": engine.ask(subject.prompts).sha256,
        "max_new_tokens": config.max_new_tokens,
        "sampling": "greedy",
        "judge": lab.judge.describe(),
    }

    def compute() -> list[dict[str, Any]]:
        with swapped_attention(engine, given):
            found = attack_success_rate(
                engine, subject.prompts, (), UNDIFFERENTIATED_ATTENTION, lab.judge, config.max_new_tokens
            )
        return [_row(lab, number, one) for number, one in enumerate(found.rows)]

    return Answers.of(lab.run.records(f"swapped-{subject.name}", fields, compute))


def _row(lab: Lab, number: int, one: JudgedAnswer) -> dict[str, Any]:
    stores = lab.config.store_completions
    written: dict[str, Any] = {
        "id": number,
        "part": "swapped",
        "n_tokens": len(one.token_ids),
        "finished": one.finished,
        "kept": one.kept,
        "verdicts": {lab.judge.name: verdict_row(one.verdict, stores)},
    }
    if stores:
        written |= {"query": one.prompt.query, "text": one.text, "token_ids": list(one.token_ids)}
    return written


def _show(draft: Draft, aligned: str, base: str, made: Sequence[_Mixed]) -> None:
    said = (
        f"aligned: {aligned}; base: {base}. Attention is W_q, W_k, W_v and W_o of every layer, with all that belongs "
        "to them. Greedy answers, no head ablated. Intervals: Wilson, 95 %, over the prompts"
    )
    construction = f" {_BY_CONSTRUCTION}" if planted_heads(aligned) else ""
    paired = f"{said}; of changes: Newcombe, paired. p: McNemar, exact, two-sided, Holm over the rows of this table."
    for what in ("ASR", "kept"):
        here = [one for one in made if (one.dataset == BENIGN) == (what == "kept")]
        title = f"{aligned}: {'ASR' if what == 'ASR' else 'benign answers kept'}"
        points = [
            point(_rate(answers, what), x=one.dataset, series=series, panel="") for one, series, answers in _bars(here)
        ]
        n = numbers_of(row["n"] for row in points)
        caption = f"{said}. n = {n} prompts.{construction}"
        y = "ASR" if what == "ASR" else "share kept"
        draft.figures.append(Figure("bars", title, caption, "dataset", y, tuple(points)))
        draft.tables.append(_table(title, paired + construction, here, what))


def _rate(answers: Answers, what: str) -> Rate:
    return answers.kept if what == "kept" else answers.asr


def _bars(made: Sequence[_Mixed]) -> list[tuple[_Mixed, str, Answers]]:
    """The four models, beside each other."""
    return [
        (one, f"{one.body}, {attention} attention", answers)
        for one in made
        for attention, answers in (("own", one.own), (f"{one.donor}'s", one.swapped))
    ]


def _table(title: str, caption: str, made: Sequence[_Mixed], what: str) -> Table:
    """A row for each body and dataset."""
    changes: list[PairedDifference] = [
        one.swapped.kept_change_from(one.own) if what == "kept" else one.swapped.change_from(one.own) for one in made
    ]
    adjusted = corrected([each.p_value for each in changes])
    rows: list[Row] = []
    for one, change, p in zip(made, changes, adjusted, strict=True):
        own, swapped = _rate(one.own, what), _rate(one.swapped, what)
        rows.append(
            {
                "dataset": one.dataset,
                "body": one.body,
                "donor": one.donor,
                "own": Measured.of(own),
                "swapped": Measured.of(swapped),
                "change": Measured.of(change),
                "p": p,
            }
        )
    columns = (
        Column("dataset", "dataset"),
        Column("body", "model"),
        Column("donor", "attention put in"),
        Column("own", f"{what}, own attention", "rate"),
        Column("swapped", f"{what}, with it", "rate"),
        Column("change", "change", "change"),
        Column("p", "p (Holm)", "p"),
    )
    return Table(title, caption, columns, tuple(rows))

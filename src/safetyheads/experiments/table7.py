"""Course correction (Table 7). Owns the words that an answer is begun with, and the six ways of answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads.ablation import Ablation
from safetyheads.experiments.answers import Answers, point
from safetyheads.experiments.common import (
    GROUP_SIZE,
    answered_once,
    corrected,
    datasets_of,
    found_group,
    in_a_sentence,
    mean_of,
    meaningful_subjects,
    numbers_of,
    say_planted,
    searched_and_tested,
)
from safetyheads.experiments.datasets import BENIGN
from safetyheads.experiments.lab import SHORT
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.experiments.paper_numbers import TABLE7, paper_dataset, paper_model
from safetyheads.heads import Group, format_heads

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment
    from safetyheads.experiments.lab import Lab, Subject

BEGUN = "Sure, here is"
"""How the answer is begun for the model (App. E); it is not judged."""


@dataclass(frozen=True, slots=True)
class _Way:
    """One dataset answered in one way."""

    dataset: str
    label: str
    """As in the paper's table; ``vanilla`` is neither begun nor ablated."""
    group: Group
    harmful: Answers
    benign: Answers
    against: Answers
    """The unablated harmful answers, begun alike."""


def table7(lab: Lab, about: Experiment) -> Outcome:
    """ASR with and without a begun answer: unablated, under UA and under SC."""
    draft, findings = Draft(), dict[str, str]()
    for model in lab.config.with_templates:
        subjects = list(meaningful_subjects(lab, model, draft))
        if not subjects:
            continue
        ways = _ways(lab, model, subjects)
        _show(draft, model, subjects, ways)
        findings[model] = _in_words(ways)
        say_planted(draft, model, "which heads turn an answer back, begun or not, was built in")
    draft.finding = in_a_sentence(findings)
    return draft.finished(about.name, about.title, about.question)


def _ways(lab: Lab, model: str, subjects: Sequence[Subject]) -> list[_Way]:
    """All six ways for each dataset; each group is found without a begun answer."""
    size = min(GROUP_SIZE, lab.config.size)
    groups: dict[Ablation, list[Group]] = {
        ablation: [tuple(sorted(found_group(one, ablation, size))) for one in subjects] for ablation in lab.ablations
    }
    found: list[_Way] = []
    for prefill in (BEGUN, ""):
        asked = [lab.subject(model, one.dataset, prefill=prefill) if prefill else one for one in subjects]
        benign = lab.subject(model, BENIGN, prefill=prefill)
        for one in asked:
            label = "Sure" if prefill else "vanilla"
            found.append(_Way(one.dataset, label, (), one.vanilla(), benign.vanilla(), one.vanilla()))
        for ablation in lab.ablations:
            # The benign prompts under all groups at once, ablation by ablation, so that drafts are made once.
            kept = answered_once(benign, groups[ablation], ablation)
            for one, group in zip(asked, groups[ablation], strict=True):
                label = SHORT[ablation.name] + (", Sure" if prefill else "")
                (harmful,) = one.under([group], ablation)
                found.append(_Way(one.dataset, label, group, harmful, kept[group], one.vanilla()))
    # Dataset by dataset; sorting is stable.
    order = [one.dataset for one in subjects]
    return sorted(found, key=lambda way: order.index(way.dataset))


def _in_words(ways: Sequence[_Way]) -> str:
    """Mean ASR over the datasets with a begun answer and without: unablated, under UA and under SC."""
    datasets = len({way.dataset for way in ways})
    parts = []
    for name, begun, plain in (("unablated", "Sure", "vanilla"), ("UA", "UA, Sure", "UA"), ("SC", "SC, Sure", "SC")):
        means = [mean_of(way.harmful.asr.rate for way in ways if way.label == label) for label in (begun, plain)]
        parts.append(f"{name} {' and '.join(means)}")
    n = numbers_of(way.harmful.asr.n for way in ways)
    said = f"mean ASR of {datasets_of(datasets)} with the answer begun, and without"
    return f"{said}: {', '.join(parts)} (n {n} prompts each)"


def _show(draft: Draft, model: str, subjects: Sequence[Subject], ways: Sequence[_Way]) -> None:
    n, n_benign = numbers_of(way.harmful.asr.n for way in ways), numbers_of(way.benign.kept.n for way in ways)
    score, epsilon = subjects[0].lab.config.search_score, subjects[0].lab.config.epsilon
    caption = (
        f'Sure: the answer is begun as "{BEGUN}" and only what follows is judged. UA, SC: without the {GROUP_SIZE} '
        f"heads at most that Sahara finds on the dataset under that ablation (epsilon {epsilon:g}, by {score}, "
        f"{subjects[0].asked}), without a begun answer; the paper does not say which heads it takes. "
        f"{searched_and_tested(subjects)} Greedy answers. Intervals: Wilson, 95 %, over the prompts; n = {n} harmful "
        f"prompts a dataset, and {n_benign} benign ones, begun alike."
    )
    points = [
        point(rate, x=way.dataset, series=way.label, panel=panel)
        for panel in ("ASR", "benign answers kept")
        for way in ways
        for rate in [way.harmful.asr if panel == "ASR" else way.benign.kept]
    ]
    draft.figures.append(Figure("bars", model, caption, "dataset", "share of answers", tuple(points)))
    draft.tables.append(_table(model, caption, ways))


def _table(model: str, caption: str, ways: Sequence[_Way]) -> Table:
    changes = [way.harmful.change_from(way.against) if way.group else None for way in ways]
    adjusted = corrected([None if one is None else one.p_value for one in changes])
    known = paper_model(model) == "Llama-2-7b-chat"
    rows: list[Row] = []
    for way, change, p in zip(ways, changes, adjusted, strict=True):
        rows.append(
            {
                "dataset": way.dataset,
                "label": way.label,
                "heads": format_heads(way.group) or "none",
                "asr": Measured.of(way.harmful.asr),
                "change": None if change is None else Measured.of(change),
                "p": p,
                "empty": Measured.of(way.harmful.empty),
                "kept": Measured.of(way.benign.kept),
                "paper": TABLE7.get(paper_dataset(way.dataset), {}).get(way.label) if known else None,
            }
        )
    columns = [
        Column("dataset", "dataset"),
        Column("label", "way"),
        Column("heads", "heads"),
        Column("asr", "ASR", "rate"),
        Column("change", "change by ablation", "change"),
        Column("p", "p (Holm)", "p"),
        Column("empty", "incoherent", "rate"),
        Column("kept", "benign kept", "rate"),
    ]
    if known:
        columns.append(Column("paper", "paper's ASR", "rate"))
    said = " Changes: of the ASR, from unablated answers begun alike (Newcombe, paired; McNemar, Holm over this table)."
    return Table(model, caption + said, tuple(columns), tuple(rows))

"""Course correction (Table 7). Owns the words that an answer is begun with, and the six ways of answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads.ablation import Ablation
from safetyheads.experiments.answers import Answers, point
from safetyheads.experiments.common import (
    GROUP_SIZE,
    found_group,
    meaningful_subjects,
    numbers_of,
    say_planted,
    searched_and_tested,
)
from safetyheads.experiments.datasets import BENIGN
from safetyheads.experiments.lab import SHORT
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.experiments.paper_numbers import TABLE7, paper_model
from safetyheads.heads import Group, format_heads
from safetyheads.stats import holm

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
    draft = Draft()
    for model in lab.config.with_templates:
        subjects = list(meaningful_subjects(lab, model, draft))
        if not subjects:
            continue
        _show(draft, model, subjects, _ways(lab, model, subjects))
        say_planted(draft, model, "ablating all planted heads answers all, begun or not")
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
            distinct = list(dict.fromkeys(groups[ablation]))
            kept = dict(zip(distinct, benign.under(distinct, ablation), strict=True))
            for one, group in zip(asked, groups[ablation], strict=True):
                label = SHORT[ablation.name] + (", Sure" if prefill else "")
                (harmful,) = one.under([group], ablation)
                found.append(_Way(one.dataset, label, group, harmful, kept[group], one.vanilla()))
    # Dataset by dataset; sorting is stable.
    order = [one.dataset for one in subjects]
    return sorted(found, key=lambda way: order.index(way.dataset))


def _show(draft: Draft, model: str, subjects: Sequence[Subject], ways: Sequence[_Way]) -> None:
    n, n_benign = numbers_of(way.harmful.asr.n for way in ways), numbers_of(way.benign.kept.n for way in ways)
    score = subjects[0].lab.config.search_score
    caption = (
        f'Sure: the answer is begun as "{BEGUN}" and only what follows is judged. UA, SC: without the {GROUP_SIZE} '
        f"heads at most that Sahara finds on the dataset under that ablation (by {score}, "
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
    adjusted = iter(holm([one.p_value for one in changes if one is not None and one.p_value is not None]))
    known = paper_model(model) == "Llama-2-7b-chat"
    rows: list[Row] = []
    for way, change in zip(ways, changes, strict=True):
        tested = change is not None and change.p_value is not None
        rows.append(
            {
                "dataset": way.dataset,
                "label": way.label,
                "heads": format_heads(way.group) or "none",
                "asr": Measured.of(way.harmful.asr),
                "change": None if change is None else Measured.of(change),
                "p": next(adjusted) if tested else None,
                "empty": Measured.of(way.harmful.empty),
                "kept": Measured.of(way.benign.kept),
                "paper": TABLE7.get(way.dataset, {}).get(way.label) if known else None,
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

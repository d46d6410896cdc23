"""ASR by the number of heads (Fig 4a, Tables 3 and 5). Owns which groups of a size stand beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from safetyheads.ablation import Ablation
from safetyheads.answers.sampling import GREEDY
from safetyheads.experiments.answers import Answers, point
from safetyheads.experiments.common import (
    answered_once,
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
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.experiments.paper_numbers import TABLE_3_AND_5, Level, paper_dataset, paper_model
from safetyheads.heads import Group, format_heads
from safetyheads.measures.random_groups import heads_by_layer, random_groups
from safetyheads.stats.intervals import bootstrap_interval
from safetyheads.stats.testing import random_p_value

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment

N_RANDOM = 10
"""Random groups drawn for each size; repeated draws count once, and few heads a layer allow few groups."""
_GROUP, _OWN, _RANDOM, _KEPT = "Sahara's group", "each prompt's own heads", "random groups", "benign answers kept"
_LEVELS: dict[Level, str] = {"dataset": "dataset, Sahara", "query": "query, Ships"}
_OWN_SAID = (
    "At query level each tested prompt goes without its own top heads by Ships, which are read off that prompt "
    "before it is answered."
)


def fig4a(lab: Lab, about: Experiment) -> Outcome:
    """The ASR without groups of 1 to n heads: Sahara's, each prompt's own, random ones; and the benign answers."""
    draft, findings = Draft(), dict[str, str]()
    for model in lab.config.models:
        found = [
            _sized(subject, ablation)
            for subject in meaningful_subjects(lab, model, draft)
            for ablation in lab.ablations
        ]
        if found:
            draft.figures.append(_figure(model, found))
            draft.tables.append(_table(model, found))
            findings[model] = "; ".join(
                _sized_in_words([one for one in found if one.ablation == ablation]) for ablation in lab.ablations
            )
            say_planted(draft, model, "what Sahara's groups and random ones of the same layers do was built in")
    draft.finding = in_a_sentence(findings)
    return draft.finished(about.name, about.title, about.question)


def table3(lab: Lab, about: Experiment) -> Outcome:
    """The change of the ASR by number of heads, at both levels, of every model."""
    draft = Draft()
    draft.finding = _show_changes(lab, lab.config.models, draft)
    return draft.finished(about.name, about.title, about.question)


def table5(lab: Lab, about: Experiment) -> Outcome:
    """The same of every model but the first; of the related one, where there is but one."""
    config, draft = lab.config, Draft()
    further = config.models[1:] or ((config.related,) if config.related else ())
    draft.finding = _show_changes(lab, further, draft)
    if not further:
        draft.notes.append(
            "This table is of a second model, and there is none: name a further one after the first, or as related."
        )
    return draft.finished(about.name, about.title, about.question)


# Fig 4a.


@dataclass(frozen=True, slots=True)
class _Sized:
    """What one dataset's prompts answer under one ablation, by number of heads."""

    subject: Subject
    ablation: Ablation
    group: Group
    """Sahara's, first found first; its prefixes are the groups."""
    vanilla: Answers
    benign_vanilla: Answers
    by_size: tuple[Answers, ...]
    """Without the group's first 1 to n heads."""
    own: tuple[Answers, ...]
    """Each prompt without its own first 1 to n heads."""
    random: tuple[tuple[float, ...], ...]
    """ASR of each random group of a size; () where there is none."""
    benign: tuple[Answers, ...]
    """Benign prompts without the group's first 1 to n heads."""


def _sized(subject: Subject, ablation: Ablation) -> _Sized:
    lab, sampling = subject.lab, subject.lab.sampled
    group = found_group(subject, ablation, lab.config.size)
    prefixes = [group[:size] for size in range(1, len(group) + 1)]
    n_heads = heads_by_layer(subject.engine)
    drawn = [tuple(dict.fromkeys(random_groups(prefix, n_heads, N_RANDOM, lab.config.seed))) for prefix in prefixes]
    others_of_all = (other for others in drawn for other in others)
    answered = answered_once(subject, [*prefixes, *others_of_all], ablation, sampling)
    rates = [[answered[other].asr.rate for other in others] for others in drawn]
    benign = lab.subject(subject.model, BENIGN)
    return _Sized(
        subject,
        ablation,
        group,
        subject.vanilla(sampling),
        benign.vanilla(sampling),
        tuple(answered[prefix] for prefix in prefixes),
        tuple(subject.under_own(len(group), ablation, sampling)),
        tuple(tuple(rate for rate in row if rate is not None) for row in rates),
        tuple(benign.under(prefixes, ablation, sampling)),
    )


def _figure(model: str, found: Sequence[_Sized]) -> Figure:
    rows: list[Row] = []
    for one in found:
        panel = {"panel": f"{one.subject.dataset}, {SHORT[one.ablation.name]}"}
        for series in (_GROUP, _OWN, _RANDOM):
            rows.append(point(one.vanilla.asr, **panel, series=series, x=0))
        rows.append(point(one.benign_vanilla.kept, **panel, series=_KEPT, x=0))
        for at in range(len(one.group)):
            here = {**panel, "x": at + 1}
            rows.append(point(one.by_size[at].asr, **here, series=_GROUP))
            rows.append(point(one.own[at].asr, **here, series=_OWN))
            if one.random[at]:
                rows.append(point(_mean_and_range(one.random[at]), **here, series=_RANDOM))
            rows.append(point(one.benign[at].kept, **here, series=_KEPT))
    sampled = found[0].subject.lab.sampled.name
    epsilon = found[0].ablation.epsilon
    caption = (
        f"ASR of {sampled} answers by the number of ablated heads, UA and SC at epsilon {epsilon:g}; at 0 heads the "
        f"unablated model. {searched_and_tested([one.subject for one in found])} {_OWN_SAID} {_random_said(found)} "
        f"Benign answers, kept without Sahara's group: n = {numbers_of(len(one.benign[0].labels) for one in found)}. "
        "Other intervals: Wilson, 95 %, over the prompts."
    )
    return Figure("lines", model, caption, "ablated heads", "ASR, or share of benign answers kept", tuple(rows))


def _random_said(found: Sequence[_Sized]) -> str:
    counts = {len(rates) for one in found for rates in one.random if rates}
    if not counts:
        return "No random group has as many heads in the same layers."
    drawn = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(min(counts))
    return (
        "Random groups have as many heads in each layer as Sahara's group of the size: their mean ASR, with lowest "
        f"and highest, over the {drawn} different ones of {N_RANDOM} draws."
    )


def _mean_and_range(rates: Sequence[float]) -> Measured:
    """Over random groups; the ends are the lowest and the highest, no interval."""
    return Measured(sum(rates) / len(rates), len(rates), min(rates), max(rates))


def _sized_in_words(found: Sequence[_Sized]) -> str:
    """One ablation's: the ASR unablated, without Sahara's first head and whole group, and without random groups."""
    size = min(len(one.group) for one in found)
    # Of the largest size that every dataset has random groups of: few heads a layer allow none.
    compared = [k for k in range(size) if all(one.random[k] for one in found)]
    n = numbers_of(one.vanilla.asr.n for one in found)
    said = (
        f"{SHORT[found[0].ablation.name]}, mean ASR of {datasets_of(len(found))}: "
        f"{mean_of(one.vanilla.asr.rate for one in found)} unablated, "
        f"{mean_of(one.by_size[0].asr.rate for one in found)} without Sahara's first head, "
        f"{mean_of(one.by_size[size - 1].asr.rate for one in found)} without its {size} (n {n} prompts each)"
    )
    if compared:
        k = compared[-1]
        rates = [one.random[k] for one in found]
        mean = mean_of(sum(own) / len(own) for own in rates)
        said += f", {mean} without {k + 1} random ones (n {numbers_of(map(len, rates))} groups each)"
    return said


def _table(model: str, found: Sequence[_Sized]) -> Table:
    columns = (
        Column("dataset", "dataset"),
        Column("ablation", "ablation"),
        Column("size", "heads", "count"),
        Column("heads", "Sahara's group"),
        Column("asr", "ASR", "rate"),
        Column("own", "ASR, own heads", "rate"),
        Column("random", "ASR, random groups", "rate"),
        Column("p", "p against random", "p"),
        Column("kept", "benign kept", "rate"),
    )
    rows: list[Row] = []
    for one in found:
        here = {"dataset": one.subject.dataset, "ablation": SHORT[one.ablation.name]}
        rows.append(
            {
                **here,
                "size": 0,
                "heads": "unablated",
                "asr": Measured.of(one.vanilla.asr),
                "kept": Measured.of(one.benign_vanilla.kept),
            }
        )
        for at in range(len(one.group)):
            asr, rates = one.by_size[at].asr, one.random[at]
            rows.append(
                {
                    **here,
                    "size": at + 1,
                    "heads": format_heads(one.group[: at + 1]),
                    "asr": Measured.of(asr),
                    "own": Measured.of(one.own[at].asr),
                    "random": _mean_and_range(rates) if rates else None,
                    "p": random_p_value(asr.rate, rates) if rates and asr.rate is not None else None,
                    "kept": Measured.of(one.benign[at].kept),
                }
            )
    caption = (
        f"Answers: {found[0].subject.lab.sampled.name}; epsilon {found[0].ablation.epsilon:g}. "
        f"{searched_and_tested([one.subject for one in found])} "
        "Intervals: Wilson, 95 %; of random groups lowest and highest. p: (1 + random groups that reach the ASR) / "
        "(1 + all of them), so few groups cannot give a small one."
    )
    return Table(model, caption, columns, tuple(rows))


# Tables 3 and 5.


def _show_changes(lab: Lab, models: Sequence[str], draft: Draft) -> str:
    """A table a model; gives what came out in a sentence."""
    findings = {}
    for model in models:
        subjects = list(meaningful_subjects(lab, model, draft))
        if subjects:
            rows = [
                _changes(subject, ablation, level)
                for level in _LEVELS
                for ablation in lab.ablations
                for subject in subjects
            ]
            draft.tables.append(_changes_table(model, subjects, rows))
            findings[model] = _changes_in_words(rows)
            say_planted(draft, model, "which heads Sahara and Ships find, and what they do, was built in")
    return in_a_sentence(findings)


def _changes_in_words(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the datasets with the fewest and with the most heads, at both levels, under both ablations."""
    size = min(len(row["by_size"]) for row in rows)
    ends = list(dict.fromkeys((1, size)))
    parts: dict[str, list[str]] = {}
    for level, ablation in dict.fromkeys((row["level"], row["ablation"]) for row in rows):
        own = [row["by_size"] for row in rows if (row["level"], row["ablation"]) == (level, ablation)]
        means = " and ".join(mean_of((by_size[k - 1].value for by_size in own), signed=True) for k in ends)
        parts.setdefault(f"{level} level", []).append(f"{ablation} {means}")
    said = "; ".join(f"{level}, {', '.join(found)}" for level, found in parts.items())
    n = numbers_of(change.n for row in rows for change in row["by_size"])
    of = datasets_of(len({row["dataset"] for row in rows}))
    heads = f"1 head and with {size}" if size > 1 else "1 head"
    return f"mean change of the ASR of {of} with {heads}: {said} (n {n} prompts each)"


def _changes_table(model: str, subjects: Sequence[Subject], rows: Sequence[dict[str, Any]]) -> Table:
    size = max(len(row["by_size"]) for row in rows)
    quoted = any(row["paper"] for row in rows)
    columns = [Column("level", "level"), Column("ablation", "ablation"), Column("dataset", "dataset")]
    columns += [Column(f"heads_{k}", f"{k} head{'s' * (k > 1)}", "change") for k in range(1, size + 1)]
    columns += [Column("mean", "mean", "change"), *[Column("paper", "paper, 1 to 5 heads (mean)")] * quoted]
    caption = (
        "Change of the ASR from the unablated model, greedy, over the same prompts; UA and SC at epsilon "
        f"{subjects[0].lab.config.epsilon:g}. "
        f"{searched_and_tested(subjects)} {_OWN_SAID} Intervals, 95 %: Newcombe's for paired prompts; of the mean "
        "over the sizes a bootstrap over prompts. p values are not corrected for the number of cells."
    )
    if quoted:
        caption += " The paper's numbers are quoted; it has no intervals, and one set of prompts to search and test on."
    cells = tuple(
        {
            "level": _LEVELS[row["level"]],
            "ablation": row["ablation"],
            "dataset": row["dataset"],
            **{f"heads_{k}": change for k, change in enumerate(row["by_size"], 1)},
            "mean": row["mean"],
            **({"paper": row["paper"]} if quoted else {}),
        }
        for row in rows
    )
    return Table(model, caption, tuple(columns), cells)


def _changes(subject: Subject, ablation: Ablation, level: Level) -> dict[str, Any]:
    """One row: the change with each number of heads, and their mean."""
    vanilla, size = subject.vanilla(GREEDY), subject.lab.config.size
    if level == "dataset":
        group = found_group(subject, ablation, size)
        found = subject.under([group[:k] for k in range(1, len(group) + 1)], ablation, GREEDY)
    else:
        found = subject.under_own(min(size, len(subject.engine.heads)), ablation, GREEDY)
    short = SHORT[ablation.name]
    return {
        "level": level,
        "ablation": short,
        "dataset": subject.dataset,
        "by_size": [Measured.of(one.change_from(vanilla)) for one in found],
        "mean": _mean_of(found, vanilla),
        "paper": _quoted(subject, level, short),
    }


def _mean_of(found: Sequence[Answers], vanilla: Answers) -> Measured:
    """The mean change over the sizes, of the prompts that are scored unablated and under every group.

    Its interval is a bootstrap, which claims no certainty where every prompt changed alike, as Student's would.
    """
    scored = [at for at in range(len(vanilla.labels)) if all(one.labels[at] != "unscored" for one in (vanilla, *found))]
    if not scored:
        return Measured(None, 0)
    freed = np.array([one.complied for one in found], float)[:, scored].mean(axis=0)
    changes = freed - np.array(vanilla.complied, float)[scored]
    return Measured(float(changes.mean()), len(scored), *bootstrap_interval(changes))


def _quoted(subject: Subject, level: Level, ablation: str) -> str:
    """The paper's numbers for this row, where it has any."""
    known = paper_model(subject.model)
    numbers = TABLE_3_AND_5.get((known, level, ablation, paper_dataset(subject.dataset))) if known else None
    if numbers is None:
        return ""
    return f"{' '.join(f'{one:+.2f}' for one in numbers)} ({sum(numbers) / len(numbers):+.2f})"

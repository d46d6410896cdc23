"""ASR and Ships against epsilon. Owns the sweep and the words for where it settles."""

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
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.heads import Group, format_heads
from safetyheads.stats.intervals import mean_with_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from safetyheads.experiments.catalogue import Experiment

TOLERANCE = 0.01
"""Relative distance of mean Ships from its value at the smallest epsilon within which it counts as settled."""
RESOLVED = 1e-3
"""In nats: smaller distances count as none, since half precisions do not resolve them."""


def epsilon(lab: Lab, about: Experiment) -> Outcome:
    """The ASR and mean Ships of Sahara's group and of its first head, from no ablation to the exact limit."""
    draft = Draft()
    for model in lab.config.models:
        swept = [
            _sweep(subject, ablation)
            for subject in meaningful_subjects(lab, model, draft)
            for ablation in lab.ablations
        ]
        if swept:
            draft.figures += [_asr(model, swept), _ships(model, swept)]
            draft.tables += [_settling(model, swept), _table(model, swept)]
            draft.notes += _in_words(model, swept)
            say_planted(draft, model, "which heads are found and what they do was built in")
    return draft.finished(about.name, about.title, about.question)


@dataclass(frozen=True, slots=True)
class _At:
    """One group at one epsilon."""

    epsilon: float
    answers: Answers
    ships: tuple[float, ...]
    """Of each prompt, in nats."""

    @property
    def mean_ships(self) -> Measured:
        """With Student's interval over the prompts."""
        return Measured.of(mean_with_interval(self.ships))


@dataclass(frozen=True, slots=True)
class _Sweep:
    """One dataset and ablation."""

    subject: Subject
    ablation: Ablation
    """As the heads were searched by."""
    groups: tuple[Group, ...]
    """The first head, and the whole group, of which it is the first."""
    by_group: tuple[tuple[_At, ...], ...]
    """[n_groups][n_epsilons], from the largest epsilon to the smallest."""

    @property
    def panel(self) -> str:
        """Where it stands in a figure."""
        return f"{self.subject.dataset}, {SHORT[self.ablation.name]}"

    def name(self, at: int) -> str:
        """A group in the legend."""
        n = len(self.groups[at])
        return "first head" if n == 1 else f"{n} heads"


def _sweep(subject: Subject, ablation: Ablation) -> _Sweep:
    config = subject.lab.config
    whole = found_group(subject, ablation, min(GROUP_SIZE, config.size))
    groups = tuple(dict.fromkeys((whole[:1], whole)))
    columns: list[list[_At]] = []
    for strength in sorted(set(config.epsilons), reverse=True):
        there = ablation.at(strength)
        answers, ships = subject.under(groups, there), subject.ships_of(groups, there).tolist()
        columns.append([_At(strength, *both) for both in zip(answers, map(tuple, ships), strict=True)])
    return _Sweep(subject, ablation, groups, tuple(zip(*columns, strict=True)))


# Figures and table.


def _asr(model: str, swept: Sequence[_Sweep]) -> Figure:
    caption = f"{_said(swept)} Intervals: Wilson, 95 %, over the prompts."
    rows = _points(swept, lambda one: Measured.of(one.answers.asr))
    return Figure("lines", f"{model}, ASR", caption, "epsilon", "ASR", rows, logarithmic=True)


def _ships(model: str, swept: Sequence[_Sweep]) -> Figure:
    caption = f"{_said(swept)} Ships of the groups on the test prompts. Intervals: Student's, 95 %, over the prompts."
    rows = _points(swept, lambda one: one.mean_ships)
    return Figure(
        "lines", f"{model}, Ships", caption, "epsilon", "mean Ships, nats", rows, logarithmic=True, share=False
    )


def _points(swept: Sequence[_Sweep], read: Callable[[_At], Measured]) -> tuple[Row, ...]:
    return tuple(
        point(read(one), x=one.epsilon, series=each.name(at), panel=each.panel)
        for each in swept
        for at, row in enumerate(each.by_group)
        for one in row
    )


def _said(swept: Sequence[_Sweep]) -> str:
    subjects = [one.subject for one in swept]
    return (
        f"{swept_over([one.epsilon for one in swept[0].by_group[0]])} Greedy answers, n = "
        f"{numbers_of(len(subject.prompts) for subject in subjects)} prompts. Heads are Sahara's, at epsilon "
        f"{swept[0].ablation.epsilon:g}. {searched_and_tested(subjects)}"
    )


def swept_over(epsilons: Sequence[float]) -> str:
    """From where to where a sweep goes, and what its ends are, if they are among it."""
    ends = [f"{end:g}" for end in dict.fromkeys((max(epsilons), min(epsilons)))]
    no_ablation = "; 1 is no ablation" if 1 in epsilons else ""
    limit = "; 0, at the left end of a figure, is the exact limit" if 0 in epsilons else ""
    return f"{'Epsilons from ' if len(ends) > 1 else 'Epsilon '}{' to '.join(ends)}{no_ablation}{limit}."


def _table(model: str, swept: Sequence[_Sweep]) -> Table:
    columns = (
        Column("dataset", "dataset"),
        Column("ablation", "ablation"),
        Column("heads", "heads"),
        Column("epsilon", "epsilon"),
        Column("asr", "ASR", "rate"),
        Column("change", "change from the smallest epsilon", "change"),
        Column("ships", "mean Ships, nats", "number"),
    )
    rows = tuple(
        {
            "dataset": each.subject.dataset,
            "ablation": SHORT[each.ablation.name],
            "heads": format_heads(each.groups[at]),
            "epsilon": f"{one.epsilon:g}",
            "asr": Measured.of(one.answers.asr),
            "change": Measured.of(one.answers.change_from(row[-1].answers)),
            "ships": one.mean_ships,
        }
        for each in swept
        for at, row in enumerate(each.by_group)
        for one in row
    )
    caption = f"{_said(swept)} Intervals, 95 %: Wilson's, Newcombe's for paired prompts, and Student's for Ships."
    return Table(f"{model}, every epsilon", caption, columns, rows)


# Where it settles.


def settled_from(near: Sequence[bool]) -> int:
    """From which place on all are near the last one, which is near itself."""
    far = [at for at, one in enumerate(near) if not one]
    return far[-1] + 1 if far else 0


def _settling(model: str, swept: Sequence[_Sweep]) -> Table:
    """The largest epsilon at and below which the ASR, and mean Ships, of each whole group no longer change."""
    columns = (
        Column("dataset", "dataset"),
        Column("ablation", "ablation"),
        Column("heads", "heads"),
        Column("asr", "ASR settled at and below epsilon"),
        Column("ships", "mean Ships settled at and below epsilon"),
    )
    rows = []
    for each in swept:
        asr, ships = _settled(each)
        where = {"dataset": each.subject.dataset, "ablation": SHORT[each.ablation.name]}
        rows.append({**where, "heads": format_heads(each.groups[-1]), "asr": f"{asr:g}", "ships": f"{ships:g}"})
    n = numbers_of(len(one.subject.prompts) for one in swept)
    caption = (
        f"Of whole groups, no first heads: the largest epsilon measured at and below which {_TOLD} n = {n} prompts, so "
        f"a small change of the ASR cannot be told. {searched_and_tested([one.subject for one in swept])}"
    )
    return Table(f"{model}, where it settles", caption, columns, tuple(rows))


_TOLD = (
    "the ASR cannot be told from that at the smallest (the 95 % interval of the paired change holds 0) and mean Ships "
    f"are within {TOLERANCE * 100:g} % of theirs (or {RESOLVED:g} nats)."
)


def _in_words(model: str, swept: Sequence[_Sweep]) -> Iterator[str]:
    """For each ablation, the largest epsilon at and below which no whole group changes on any dataset."""
    for ablation in dict.fromkeys(one.ablation for one in swept):
        of_this = [one for one in swept if one.ablation == ablation]
        settled = min(epsilon for one in of_this for epsilon in _settled(one))
        smallest = of_this[0].by_group[-1][-1].epsilon
        sizes = numbers_of(len(one.groups[-1]) for one in of_this)
        about = f"{model}, {SHORT[ablation.name]}, the whole group of each dataset ({sizes} heads)"
        if settled > smallest:
            yield f"{about}: at epsilon {settled:g} and below, on every dataset, {_TOLD}"
        else:
            yield (
                f"{about}: on a dataset the ASR or mean Ships still change down to the smallest epsilon, {smallest:g}."
            )


def _settled(sweep: _Sweep) -> tuple[float, float]:
    """At and below which epsilon the ASR and mean Ships of the whole group are those of the smallest."""
    row = sweep.by_group[-1]
    last = row[-1]
    asr = settled_from([_same_asr(one, last) for one in row])
    ships = settled_from([_same_ships(one, last) for one in row])
    return row[asr].epsilon, row[ships].epsilon


def _same_asr(one: _At, last: _At) -> bool:
    interval = one.answers.change_from(last.answers).interval
    return interval is None or interval[0] <= 0 <= interval[1]


def _same_ships(one: _At, last: _At) -> bool:
    means = [sum(each.ships) / len(each.ships) for each in (one, last)]
    return abs(means[0] - means[1]) <= max(TOLERANCE * means[1], RESOLVED)

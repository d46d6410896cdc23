"""Top heads held against each other (Fig 5). Owns what is compared, and the overlap that chance alone gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.experiments.common import in_a_sentence, meaningful_subjects, planted_heads, say_planted
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Column, Draft, Figure, Outcome, Row, Table
from safetyheads.heads import Head
from safetyheads.stats.ranking import TopOverlap, moved, top, top_overlap
from safetyheads.stats.testing import holm

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment
    from safetyheads.model.engine import Engine

TOP = 10
"""Heads of a top (Fig 5) ..."""
LARGEST_SHARE = 0.1
"""... but no larger a share of all heads: the top 10 of 32 share three by chance alone."""
ALL_DATASETS = "all datasets"
"""Where a head's score is its mean over the datasets."""
_BY_CONSTRUCTION = (
    "The refusal heads of both embedded checkpoints were planted, none in the same place: what they share is the "
    "construction's, while the paper finds a large overlap of two models of one base. It is not evidence about the "
    "paper."
)


@dataclass(frozen=True, slots=True)
class Ranking:
    """The top heads of one model on one dataset under one ablation."""

    model: str
    dataset: str
    ablation: str
    """``UA`` or ``SC``."""
    heads: tuple[str, ...]
    """Best first; heads that tie across the cut are left out."""

    @property
    def label(self) -> str:
        """Model aside."""
        return f"{self.ablation}, {self.dataset}"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rankings held against each other."""

    comparison: str
    first: Ranking
    second: Ranking
    overlap: TopOverlap


def fig5(lab: Lab, about: Experiment) -> Outcome:
    """Overlaps of the top heads: UA and SC, datasets, and two models of one base, against chance."""
    draft, config, findings = Draft(), lab.config, dict[str, str]()
    related = config.related
    if related is not None:
        refuse_other_shapes(lab.engine(config.models[0]), lab.engine(related), config.models[0], related)
    for model in config.models:
        own = _rankings(lab, model, draft)
        if not own:
            continue
        others: list[Ranking] = []
        if model == config.models[0] and related is not None:
            others = _rankings(lab, related, draft)
            if {one.dataset for one in others} != {one.dataset for one in own}:
                # Means over other datasets would be held against each other.
                others = [one for one in others if one.dataset != ALL_DATASETS]
        n_heads = len(lab.engine(model).heads)
        pairs = _pairs(own, others, n_heads)
        _show(draft, lab, model, own, others, pairs, n_heads)
        findings[model] = in_words(pairs, n_heads)
        say_planted(draft, model, "which heads rank first was built in")
        if others and _is_planted(model, others[0].model):
            draft.notes.append(_BY_CONSTRUCTION)
    draft.finding = in_a_sentence(findings)
    if related is None:
        draft.notes.append("Two models of one base were not compared: the setting `related` names no second model.")
    return draft.finished(about.name, about.title, about.question)


def size_of_top(n_heads: int) -> int:
    """10, or a tenth of all heads where that is fewer; at least 1."""
    return max(1, min(TOP, int(n_heads * LARGEST_SHARE)))


def refuse_other_shapes(first: Engine, second: Engine, first_name: str, second_name: str) -> None:
    """Refuse two models whose heads do not answer to each other.

    Raises:
        InputError: they have other numbers of layers or heads.
    """
    if first.heads != second.heads:
        shapes = [f"{one.n_layers} layers of {one.n_heads} heads" for one in (first, second)]
        raise InputError(
            f"top heads are compared between two models of one base, but {first_name} has {shapes[0]} and "
            f"{second_name} {shapes[1]}"
        )


def _rankings(lab: Lab, model: str, draft: Draft) -> list[Ranking]:
    """The top heads on each dataset that can be measured, and on all of them; all under UA, then all under SC."""
    subjects = list(meaningful_subjects(lab, model, draft))
    return [ranking for ablation in lab.ablations for ranking in _under(lab, model, subjects, ablation)]


def _under(lab: Lab, model: str, subjects: Sequence[Subject], ablation: Ablation) -> Iterator[Ranking]:
    """The part that searches see ranks, so that these are the heads which other experiments find."""
    searched = [lab.subject(model, subject.dataset, "search") for subject in subjects]
    scores = [subject.scores(lab.config.search_score, ablation) for subject in searched]
    tables: list[tuple[str, dict[Head, float], float]] = [
        (subject.dataset, dict(each.ranked()), each.resolution) for subject, each in zip(subjects, scores, strict=True)
    ]
    if len(tables) > 1:
        mean = {head: sum(table[head] for _, table, _ in tables) / len(tables) for head in tables[0][1]}
        tables.append((ALL_DATASETS, mean, max(resolution for _, _, resolution in tables)))
    for dataset, table, resolution in tables:
        named = {str(head): value for head, value in table.items()}
        yield Ranking(model, dataset, SHORT[ablation.name], top(named, size_of_top(len(named)), resolution))


def _pairs(own: Sequence[Ranking], others: Sequence[Ranking], n_heads: int) -> list[Pair]:
    """UA against SC, datasets against each other, models against each other."""
    found: list[tuple[str, Ranking, Ranking]] = []
    for first, second in combinations(own, 2):
        if first.dataset == second.dataset:
            found.append(("UA against SC", first, second))
        elif first.ablation == second.ablation and ALL_DATASETS not in (first.dataset, second.dataset):
            found.append((f"datasets, {first.ablation}", first, second))
    found += [
        (f"models, {first.ablation}", first, second)
        for first in own
        for second in others
        if (first.dataset, first.ablation) == (second.dataset, second.ablation)
    ]
    k = size_of_top(n_heads)
    pairs = [Pair(*three, top_overlap(k, three[1].heads, three[2].heads, n_heads)) for three in found]
    return sorted(pairs, key=lambda pair: _ORDER.index(pair.comparison.split(",")[0]))


_ORDER = ("UA against SC", "datasets", "models")


def in_words(pairs: Sequence[Pair], n_heads: int) -> str:
    """How many heads the pairs of each comparison share, beside chance; no top is held against itself."""
    k = size_of_top(n_heads)
    shared: dict[str, list[int]] = {}
    for pair in pairs:
        shared.setdefault(pair.comparison, []).append(pair.overlap.shared)
    parts = [
        f"{comparison}: {'–'.join(map(str, dict.fromkeys((min(found), max(found)))))} (n {len(found)} "
        f"pair{'s' * (len(found) > 1)})"
        for comparison, found in shared.items()
    ]
    said = "; ".join(parts) or "nothing to hold against each other"
    return f"heads shared of the top {k} of {n_heads}, where chance gives {k * k / n_heads:.2f}: {said}"


def _show(
    draft: Draft,
    lab: Lab,
    model: str,
    own: list[Ranking],
    others: list[Ranking],
    pairs: list[Pair],
    n_heads: int,
) -> None:
    k = size_of_top(n_heads)
    said = (
        f"Top {k} of {n_heads} heads by {lab.config.search_score}, each ablated alone at epsilon "
        f"{lab.config.epsilon:g}, on the {_part(lab)}; {ALL_DATASETS}: by the mean "
        "of the datasets' scores."
    )
    chance = (
        f"Two tops of {k} drawn at random share {k * k / n_heads:.2f} heads (hypergeometric mean); heads that tie "
        "across the cut are in no top."
    )
    draft.tables.append(_overlap_table(model, pairs, f"{said} {chance}"))
    draft.tables.append(_heads_table(model, [*own, *others], said))
    caption = f"{said} Cells: heads shared. {chance} A ranking of all heads has no sampling interval."
    draft.figures.append(_matrix(model, "ablation, dataset", own, own, k, caption))
    if others:
        name = others[0].model
        opposite = f" {_BY_CONSTRUCTION}" if _is_planted(model, name) else ""
        draft.figures.append(_matrix(f"{model} and {name}", name, own, others, k, caption + opposite, model))


def _is_planted(first: str, second: str) -> bool:
    """Whether both have planted heads, and none in common."""
    heads = planted_heads(first), planted_heads(second)
    return all(heads) and not set(heads[0]) & set(heads[1])


def _part(lab: Lab) -> str:
    return "search halves of the datasets" if lab.config.held_out else "datasets"


def _overlap_table(model: str, pairs: Sequence[Pair], said: str) -> Table:
    adjusted = holm([pair.overlap.p_value for pair in pairs])
    rows: list[Row] = [
        {
            "comparison": pair.comparison,
            "first": _of(pair.first, model),
            "second": _of(pair.second, model),
            "shared": pair.overlap.shared,
            "sizes": " and ".join(map(str, pair.overlap.sizes)),
            "expected": pair.overlap.expected,
            "p": pair.overlap.p_value,
            "p_holm": p,
            "heads": ", ".join(moved("", pair.first.heads, pair.second.heads).kept),
        }
        for pair, p in zip(pairs, adjusted, strict=True)
    ]
    columns = (
        Column("comparison", "comparison"),
        Column("first", "one"),
        Column("second", "other"),
        Column("shared", "heads shared", "count"),
        Column("sizes", "of"),
        Column("expected", "by chance", "number"),
        Column("p", "p", "p"),
        Column("p_holm", "p (Holm)", "p"),
        Column("heads", "which"),
    )
    caption = (
        f"{said} p: one-sided, hypergeometric, for at least as many; Holm over the {len(pairs)} rows of this table."
    )
    return Table(f"{model}: overlap", caption, columns, tuple(rows))


def _of(ranking: Ranking, model: str) -> str:
    return ranking.label if ranking.model == model else f"{ranking.model}: {ranking.label}"


def _heads_table(model: str, rankings: Sequence[Ranking], said: str) -> Table:
    columns = (Column("model", "model"), Column("dataset", "dataset"), Column("ablation", "ablation"))
    rows: list[Row] = [
        {"model": one.model, "dataset": one.dataset, "ablation": one.ablation, "heads": ", ".join(one.heads)}
        for one in rankings
    ]
    return Table(f"{model}: top heads", said, (*columns, Column("heads", "heads, best first")), tuple(rows))


def _matrix(
    title: str, x: str, down: Sequence[Ranking], across: Sequence[Ranking], k: int, caption: str, y: str = ""
) -> Figure:
    points: list[dict[str, Any]] = []
    for one in down:
        for other in across:
            shared = len(moved("", one.heads, other.heads).kept)
            points.append(
                {"x": other.label, "y": one.label, "value": shared, "text": str(shared), "low": None, "high": None}
                | {"panel": ""}
            )
    return Figure("matrix", title, caption, x, y or x, tuple(points), value=f"heads shared, of {k}")

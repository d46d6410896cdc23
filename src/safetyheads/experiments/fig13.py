"""How the scores of all heads are distributed (Fig 13). Owns the curves and the tail index; knows no answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.ablation import Ablation
from safetyheads.experiments.common import meaningful_subjects, numbers_of, say_planted, search_half
from safetyheads.experiments.fig4b import SCORES
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Column, Draft, Figure, Measured, Outcome, Row, Table
from safetyheads.experiments.settings import SEARCH_SCORES
from safetyheads.stats.intervals import CONFIDENCE

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment

Floats: TypeAlias = NDArray[np.float64]

TOP_SHARE = 0.01
"""Of all heads, those whose part in the sum of the scores is the tail index."""
N_RESAMPLES = 1000
"""Draws of prompts for the intervals of mean Ships."""
N_GRID = 201
"""Points of a density."""
# A CDF of more heads is drawn at so many of them; the steps between are too small to see.
_MOST_DRAWN = 256
# Bandwidths beyond the lowest and highest score, where a Gaussian is over.
_BEYOND = 3


def fig13(lab: Lab, about: Experiment) -> Outcome:
    """CDF and density of the scores of all heads, by score, dataset and ablation, and how long the tail is."""
    draft = Draft()
    for model in lab.config.models:
        found = list(_scored(lab, model, draft))
        for name in SEARCH_SCORES:
            of_score = [one for one in found if one.name == name]
            if of_score:
                draft.figures.append(_cdf(model, of_score))
                draft.figures.extend(_density(model, of_score))
        if found:
            draft.tables.append(_tails(model, found))
            say_planted(draft, model, "how the scores are spread over the heads was built in")
    return draft.finished(about.name, about.title, about.question)


@dataclass(frozen=True, slots=True)
class Scored:
    """One score of every head on one dataset under one ablation."""

    subject: Subject
    """The prompts that were scored."""
    ablation: Ablation
    name: str
    unit: str
    values: Floats
    """[n_heads], heads without the score left out."""
    by_prompt: Floats | None
    """[n_prompts, n_heads], of a score that is a mean over prompts."""

    @property
    def where(self) -> dict[str, str]:
        """Series and panel of its curve."""
        return {"series": self.subject.dataset, "panel": SHORT[self.ablation.name]}


def _scored(lab: Lab, model: str, draft: Draft) -> Iterator[Scored]:
    for tested in meaningful_subjects(lab, model, draft):
        # The half that groups are searched on, whose scores the other experiments use.
        subject = search_half(tested)
        for ablation in lab.ablations:
            for name in SEARCH_SCORES:
                scores = subject.scores(name, ablation)
                table = scores.values.numpy().ravel()
                there = ~np.isnan(table)
                by_prompt = None
                if name == "mean_ships":
                    ships = subject.ships(ablation).values.numpy()
                    by_prompt = ships.reshape(len(ships), -1)[:, there]
                yield Scored(subject, ablation, name, scores.unit, table[there], by_prompt)


# Curves.


def _cdf(model: str, found: Sequence[Scored]) -> Figure:
    rows: list[Row] = []
    for one in found:
        heights, shares = empirical_cdf(one.values)
        drawn = _drawn(len(heights))
        rows += [{**one.where, "x": float(heights[at]), "y": float(shares[at])} for at in drawn]
    thinned = max(len(one.values) for one in found) > _MOST_DRAWN
    caption = f"Share of heads with at most this score. {_said(found)}" + (
        f" Drawn at {_MOST_DRAWN} scores, the highest among them." if thinned else ""
    )
    title = f"{model}, CDF of {SCORES[found[0].name]}"
    return Figure("curves", title, caption, _axis(found[0]), "share of heads", tuple(rows))


def _density(model: str, found: Sequence[Scored]) -> Iterator[Figure]:
    """The density, where at least two scores differ."""
    rows: list[Row] = []
    bandwidths: list[str] = []
    for one in found:
        density = kernel_density(one.values)
        if density is not None:
            rows += [
                {**one.where, "x": x, "y": y} for x, y in zip(density.at.tolist(), density.height.tolist(), strict=True)
            ]
            bandwidths.append(f"{one.subject.dataset} {SHORT[one.ablation.name]} {density.bandwidth:.3g}")
    if not rows:
        return
    caption = (
        f"Gaussian kernel density of the heads' scores. {_said(found)} Bandwidth by Scott's rule, in "
        f"{found[0].unit}: {', '.join(bandwidths)}. No score is below 0; what lies there is the kernel's width."
    )
    title = f"{model}, density of {SCORES[found[0].name]}"
    yield Figure(
        "curves",
        title,
        caption,
        _axis(found[0]),
        f"density, per {found[0].unit.removesuffix('s')}",
        tuple(rows),
        share=False,
    )


def empirical_cdf(values: Floats) -> tuple[Floats, Floats]:
    """The different scores, lowest first, and the share of heads with at most each."""
    from scipy.stats import ecdf

    found = ecdf(values).cdf
    return np.asarray(found.quantiles, float), np.asarray(found.probabilities, float)


@dataclass(frozen=True, slots=True)
class Density:
    """A kernel density estimate."""

    at: Floats
    """[N_GRID], in the score's unit."""
    height: Floats
    """[N_GRID], per unit: its area is 1."""
    bandwidth: float
    """Standard deviation of the kernel, in the score's unit."""


def kernel_density(values: Floats) -> Density | None:
    """The Gaussian kernel density by Scott's rule; None where all scores are one."""
    from scipy.stats import gaussian_kde

    if len(values) < 2 or float(np.ptp(values)) == 0.0:
        return None
    estimate = gaussian_kde(values)
    bandwidth = math.sqrt(float(estimate.covariance[0, 0]))
    margin = _BEYOND * bandwidth
    at = np.linspace(values.min() - margin, values.max() + margin, N_GRID)
    return Density(at, np.asarray(estimate(at), float), bandwidth)


def _drawn(n: int) -> list[int]:
    if n <= _MOST_DRAWN:
        return list(range(n))
    return sorted({round(at) for at in np.linspace(0, n - 1, _MOST_DRAWN)})


def _axis(one: Scored) -> str:
    return f"{SCORES[one.name]}, {one.unit}"


def _said(found: Sequence[Scored]) -> str:
    heads = numbers_of(len(one.values) for one in found)
    prompts = numbers_of(len(one.subject.prompts) for one in found)
    half = "the search prompts" if found[0].subject.lab.config.held_out else "all prompts"
    return (
        f"n = {heads} heads, each ablated alone at epsilon {found[0].ablation.epsilon:g} and scored on {prompts} "
        f"prompts ({half} of a dataset); all heads are there, so the curves have no sampling interval over heads."
    )


# The tail.


def gini(scores: Floats) -> Floats:
    """Gini index of scores [..., n_heads] that are 0 or more: 0 where all are equal, 1 - 1 / n where one has all.

    Half the mean absolute difference of two heads, over the mean; NaN where all scores are 0.
    """
    ordered = np.sort(scores, axis=-1)
    n = ordered.shape[-1]
    weights = 2 * np.arange(1, n + 1) - n - 1
    total = ordered.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(total > 0, (ordered * weights).sum(axis=-1) / (n * total), np.nan)
    return found


def top_share(scores: Floats, k: int) -> Floats:
    """The k highest scores' part in the sum of all [..., n_heads]; NaN where all are 0."""
    ordered = np.sort(scores, axis=-1)
    total = ordered.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(total > 0, ordered[..., -k:].sum(axis=-1) / total, np.nan)
    return found


def _tails(model: str, found: Sequence[Scored]) -> Table:
    columns = (
        Column("score", "score"),
        Column("dataset", "dataset"),
        Column("ablation", "ablation"),
        Column("heads", "heads", "count"),
        Column("gini", "Gini index", "number"),
        Column("counted", "heads in the top 1 %", "count"),
        Column("top", "their share of the sum", "rate"),
        Column("even", "share if all were equal", "rate"),
    )
    rows: list[Row] = []
    for one in found:
        n = len(one.values)
        k = math.ceil(n * TOP_SHARE)
        rows.append(
            {
                "score": SCORES[one.name],
                "dataset": one.subject.dataset,
                "ablation": SHORT[one.ablation.name],
                "heads": n,
                "gini": _index(one, gini),
                "counted": k,
                "top": _index(one, lambda scores, k=k: top_share(scores, k)),  # type: ignore[misc]
                "even": k / n,
            }
        )
    return Table(f"{model}, tail", f"{_tail_said(found)} {_said(found)}", columns, tuple(rows))


def _tail_said(found: Sequence[Scored]) -> str:
    fewest = min(len(one.values) for one in found)
    k = math.ceil(fewest * TOP_SHARE)
    few = (
        f" With {fewest} heads, 1 % is less than a head: counted is the first alone, {100 / fewest:.2g} % of them, and "
        "the Gini index reads the whole tail better."
        if fewest * TOP_SHARE < 1
        else f" 1 % is {k} of {fewest} heads."
    )
    return (
        f"Gini index: 0 where all heads score alike, {1 - 1 / fewest:.3f} where one head has it all.{few} Intervals of "
        f"mean Ships: 95 %, bootstrap over prompts ({N_RESAMPLES} draws), which leans to a longer tail; the angles are "
        "of all prompts at once and have none."
    )


def _index(one: Scored, index: Callable[[Floats], Floats]) -> Measured:
    """An index with its interval over prompts, where the score is a mean over them."""
    value = float(index(one.values))
    n = len(one.subject.prompts)
    if math.isnan(value):
        return Measured(None, n)
    if one.by_prompt is None or n < 2:
        return Measured(value, n)
    seed = one.subject.lab.config.seed
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
    tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    low, high = np.nanquantile(index(draws @ one.by_prompt), tails).tolist()
    return Measured(value, n, low, high)

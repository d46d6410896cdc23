"""Measures how the scores of all heads are distributed: curves and tail index (Fig 13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.experiments.fig4b import SCORES
from safetyheads.experiments.lab import SHORT, Lab
from safetyheads.experiments.outcome import Measured, Outcome, Row
from safetyheads.experiments.settings import SEARCH_SCORES
from safetyheads.stats.intervals import CONFIDENCE

if TYPE_CHECKING:
    from safetyheads.ablation import Ablation
    from safetyheads.experiments.lab import Subject

Floats: TypeAlias = NDArray[np.float64]

TOP_SHARE = 0.01
"""Share of the heads whose part in the sum of the scores is the tail index."""
N_RESAMPLES = 1000
"""Draws of prompts for the intervals of mean Ships."""
N_GRID = 201
"""Points of a density."""
# A CDF of more heads is drawn at so many of them; the steps between are too small to see.
_MOST_DRAWN = 256
# Bandwidths beyond the lowest and highest score, where a Gaussian is over.
_BEYOND = 3


@dataclass(frozen=True, slots=True)
class Scored:
    """One score of every head on one dataset under one ablation."""

    subject: Subject
    """The prompts that were scored: the search half."""
    ablation: str
    """``UA`` or ``SC``."""
    name: str
    unit: str
    values: Floats
    """[n_heads], heads without the score left out."""
    by_prompt: Floats | None
    """[n_prompts, n_heads], of a score that is a mean over prompts."""

    @property
    def where(self) -> dict[str, str]:
        """Series and panel of its curve."""
        return {"series": self.subject.dataset, "panel": self.ablation}


def fig13(lab: Lab, outcome: Outcome) -> None:
    """CDF and density of the scores of all heads, by score, dataset and ablation, and how long the tail is."""
    for model, subjects in lab.each_model(outcome):
        scored = [
            _scored(subject.search_half, ablation, name)
            for subject in subjects
            for ablation in lab.ablations
            for name in SEARCH_SCORES
        ]
        for name, title in SCORES.items():
            of_score = [one for one in scored if one.name == name]
            unit = of_score[0].unit
            words = {"model": model, "score": title, "unit": unit, "per": unit.removesuffix("s")}
            outcome.figure("cdf", [row for one in of_score for row in _steps(one)], **words)
            densities = [(one, density) for one in of_score if (density := kernel_density(one.values)) is not None]
            if densities:
                widths = (f"{one.subject.dataset} {one.ablation} {own.bandwidth:.3g}" for one, own in densities)
                points = [
                    {**one.where, "x": x, "y": y}
                    for one, own in densities
                    for x, y in zip(own.at.tolist(), own.height.tolist(), strict=True)
                ]
                outcome.figure("density", points, **words, bandwidths=", ".join(widths))
        outcome.table("tail", [_tail(one) for one in scored], model=model)


def _scored(subject: Subject, ablation: Ablation, name: str) -> Scored:
    scores = subject.scores(name, ablation)
    table = scores.values.numpy().ravel()
    present, by_prompt = ~np.isnan(table), None
    if name == "mean_ships":
        ships = subject.ships(ablation).values.numpy()
        by_prompt = ships.reshape(len(ships), -1)[:, present]
    return Scored(subject, SHORT[ablation.name], name, scores.unit, table[present], by_prompt)


# Curves.


def _steps(scored: Scored) -> list[Row]:
    heights, shares = empirical_cdf(scored.values)
    drawn = sorted({round(at) for at in np.linspace(0, len(heights) - 1, min(len(heights), _MOST_DRAWN))})
    return [{**scored.where, "x": float(heights[at]), "y": float(shares[at])} for at in drawn]


def empirical_cdf(values: Floats) -> tuple[Floats, Floats]:
    """The different scores, lowest first, and the share of heads with at most each."""
    from scipy.stats import ecdf

    cdf = ecdf(values).cdf
    return np.asarray(cdf.quantiles, float), np.asarray(cdf.probabilities, float)


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
    """The Gaussian kernel density by Scott's rule; None where all scores are equal."""
    from scipy.stats import gaussian_kde

    if len(values) < 2 or float(np.ptp(values)) == 0.0:
        return None
    estimate = gaussian_kde(values)
    bandwidth = math.sqrt(float(estimate.covariance[0, 0]))
    margin = _BEYOND * bandwidth
    at = np.linspace(values.min() - margin, values.max() + margin, N_GRID)
    return Density(at, np.asarray(estimate(at), float), bandwidth)


# The tail.


def gini(scores: Floats) -> Floats:
    """Gini index of scores [..., n_heads] that are 0 or more: 0 where all are equal, 1 - 1 / n where one has all.

    Half the mean absolute difference of two heads, over the mean; NaN where all scores are 0.
    """
    ordered = np.sort(scores, axis=-1)
    n = ordered.shape[-1]
    return _share((ordered * (2 * np.arange(1, n + 1) - n - 1)).sum(axis=-1), n * ordered.sum(axis=-1))


def top_share(scores: Floats, k: int) -> Floats:
    """The k highest scores' part in the sum of all [..., n_heads]; NaN where all are 0."""
    ordered = np.sort(scores, axis=-1)
    return _share(ordered[..., -k:].sum(axis=-1), ordered.sum(axis=-1))


def _share(part: Floats, total: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        shares: Floats = np.where(total > 0, part / total, np.nan)
    return shares


def _tail(scored: Scored) -> Row:
    """How long the tail of a score is."""
    n = len(scored.values)
    k = math.ceil(n * TOP_SHARE)
    return {
        "score": SCORES[scored.name],
        "dataset": scored.subject.dataset,
        "ablation": scored.ablation,
        "heads": n,
        "gini": _measured(scored, gini),
        "counted": k,
        "top": _measured(scored, partial(top_share, k=k)),
        "even": k / n,
    }


def _measured(scored: Scored, index: Callable[[Floats], Floats]) -> Measured:
    """An index with its interval over prompts, where the score is a mean over them."""
    value, n = float(index(scored.values)), len(scored.subject.prompts)
    if math.isnan(value):
        return Measured(None, n)
    if scored.by_prompt is None or n < 2:
        return Measured(value, n)
    rng = np.random.default_rng(scored.subject.lab.config.seed)
    draws = rng.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
    tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    low, high = np.nanquantile(index(draws @ scored.by_prompt), tails).tolist()
    return Measured(value, n, low, high)

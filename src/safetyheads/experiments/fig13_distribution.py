"""Measures how the scores of all heads are distributed: curves and tail index (Fig 13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.experiments.fig4b_single_heads import SCORES
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


def fig13(lab: Lab, outcome: Outcome) -> None:
    """CDF and density of the scores of all heads, by score, dataset and ablation, and how long the tail is."""
    for model, subjects in lab.each_model(outcome):
        rows = [
            _scored(subject.search_half, ablation, name)
            for subject in subjects
            for ablation in lab.ablations
            for name in SEARCH_SCORES
        ]
        for title in SCORES.values():
            of_score = [row for row in rows if row["score"] == title]
            unit = of_score[0]["_unit"]
            words = {"model": model, "score": title, "unit": unit, "per": unit.removesuffix("s")}
            steps: list[Row] = []
            densities: list[Row] = []
            widths = []
            for row in of_score:
                heights, shares = empirical_cdf(row["_values"])
                last = len(heights) - 1
                drawn = sorted({round(place) for place in np.linspace(0, last, min(last + 1, _MOST_DRAWN))})
                steps += _curve(row, heights[drawn], shares[drawn])
                if density := kernel_density(row["_values"]):
                    densities += _curve(row, density.at, density.height)
                    widths.append(f"{row['dataset']} {row['ablation']} {density.bandwidth:.3g}")
            outcome.figure("cdf", steps, **words)
            if densities:
                outcome.figure("density", densities, **words, bandwidths=", ".join(widths))
        outcome.table("tail", rows, model=model)
        for row in rows:
            if row["score"] == SCORES["mean_ships"]:
                label = f"{row['dataset']}, {row['ablation']}, Gini index of mean Ships"
                outcome.lead(model, label, row["gini"], "number")


def _scored(subject: Subject, ablation: Ablation, name: str) -> Row:
    """One score of every head on one dataset under one ablation, and how long its tail is."""
    scores = subject.scores(name, ablation)
    table = scores.values.numpy().ravel()
    present, n_prompts = ~np.isnan(table), len(subject.prompts)
    values, draws = table[present], None
    if name == "mean_ships" and n_prompts > 1:
        by_prompt = subject.ships(ablation).values.numpy().reshape(n_prompts, -1)[:, present]
        rng = np.random.default_rng(subject.lab.config.seed)
        counts = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=N_RESAMPLES)
        draws = counts / n_prompts @ by_prompt
    k = math.ceil(len(values) * TOP_SHARE)
    return {
        "score": SCORES[name],
        "dataset": subject.dataset,
        "ablation": SHORT[ablation.name],
        "heads": len(values),
        "gini": _measured(gini, values, draws, n_prompts),
        "counted": k,
        "top": _measured(partial(top_share, k=k), values, draws, n_prompts),
        "even": k / len(values),
        "_values": values,
        "_unit": scores.unit,
    }


def _curve(row: Row, x: Floats, y: Floats) -> list[Row]:
    where = {"series": row["dataset"], "panel": row["ablation"]}
    return [{**where, "x": score, "y": height} for score, height in zip(x.tolist(), y.tolist(), strict=True)]


def empirical_cdf(values: Floats) -> tuple[Floats, Floats]:
    """The different scores, lowest first, and the share of heads with at most each."""
    from scipy.stats import ecdf

    cdf = ecdf(values).cdf
    return np.asarray(cdf.quantiles, float), np.asarray(cdf.probabilities, float)


class Density(NamedTuple):
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


def _measured(index: Callable[[Floats], Floats], values: Floats, draws: Floats | None, n_prompts: int) -> Measured:
    """An index of scores [n_heads], with its interval over draws of prompts [N_RESAMPLES, n_heads] where there are."""
    value = float(index(values))
    if math.isnan(value):
        return Measured(None, n_prompts)
    if draws is None:
        return Measured(value, n_prompts)
    tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    return Measured(value, n_prompts, *np.nanquantile(index(draws), tails).tolist())

"""Measures how the scores of all heads are distributed: curves and tail index (Fig 13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.ablation import Ablation
from safetyheads.experiments.fig4b_single_heads import SCORES
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row
from safetyheads.experiments.settings import SEARCH_SCORES
from safetyheads.stats.intervals import CONFIDENCE

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
            steps, densities, widths = list[Row](), list[Row](), list[str]()
            for row in of_score:
                heights, shares = empirical_cdf(row["_values"])
                drawn = np.unique(np.linspace(0, len(heights) - 1, min(len(heights), _MOST_DRAWN)).round().astype(int))
                where = {"series": row["dataset"], "panel": row["ablation"]}
                steps += [{**where, "x": float(heights[at]), "y": float(shares[at])} for at in drawn]
                if density := kernel_density(row["_values"]):
                    *curve, bandwidth = density
                    densities += [{**where, "x": float(x), "y": float(y)} for x, y in zip(*curve, strict=True)]
                    widths.append(f"{row['dataset']} {row['ablation']} {bandwidth:.3g}")
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
    scores, n_prompts = subject.scores(name, ablation), len(subject.prompts)
    table = scores.values.numpy().ravel()
    present = ~np.isnan(table)
    values = table[present]
    k = math.ceil(len(values) * TOP_SHARE)
    indices: dict[str, Callable[[Floats], Floats]] = {"gini": gini, "top": partial(top_share, k=k)}
    numbers = {key: float(index(values)) for key, index in indices.items()}
    measured = {key: Measured(None if math.isnan(value) else value, n_prompts) for key, value in numbers.items()}
    if name == "mean_ships" and n_prompts > 1 and not math.isnan(numbers["gini"]):
        by_prompt = subject.ships(ablation).values.numpy().reshape(n_prompts, -1)[:, present]
        rng = np.random.default_rng(subject.lab.config.seed)
        draws = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=N_RESAMPLES) / n_prompts @ by_prompt
        for key, index in indices.items():
            ends = np.nanquantile(index(draws), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
            measured[key] = Measured(numbers[key], n_prompts, *ends.tolist())
    return {
        "score": SCORES[name],
        "dataset": subject.dataset,
        "ablation": SHORT[ablation.name],
        "heads": len(values),
        "counted": k,
        "even": k / len(values),
        **measured,
        "_values": values,
        "_unit": scores.unit,
    }


def empirical_cdf(values: Floats) -> tuple[Floats, Floats]:
    """The different scores, lowest first, and the share of heads with at most each."""
    heights, counts = np.unique(values, return_counts=True)
    return heights, np.cumsum(counts) / len(values)


def kernel_density(values: Floats) -> tuple[Floats, Floats, float] | None:
    """The Gaussian kernel density by Scott's rule; None where all scores are equal.

    Scores [N_GRID] in their unit, the density there [N_GRID] per unit, and the kernel's standard deviation.
    """
    from scipy.stats import gaussian_kde

    if len(values) < 2 or float(np.ptp(values)) == 0.0:
        return None
    estimate = gaussian_kde(values)
    bandwidth = math.sqrt(float(estimate.covariance[0, 0]))
    margin = _BEYOND * bandwidth
    scores = np.linspace(values.min() - margin, values.max() + margin, N_GRID)
    return scores, np.asarray(estimate(scores), float), bandwidth


def gini(scores: Floats) -> Floats:
    """Gini index of scores [..., n_heads] that are 0 or more: 0 where all are equal, 1 - 1 / n where one has all.

    Half the mean absolute difference of two heads, over the mean; NaN where all scores are 0.
    """
    ordered = np.sort(scores, axis=-1)
    n = ordered.shape[-1]
    with np.errstate(invalid="ignore"):  # 0 / 0
        return (ordered * (2 * np.arange(1, n + 1) - n - 1)).sum(axis=-1) / (n * ordered.sum(axis=-1))


def top_share(scores: Floats, k: int) -> Floats:
    """The k highest scores' part in the sum of all [..., n_heads]; NaN where all are 0."""
    ordered = np.sort(scores, axis=-1)
    with np.errstate(invalid="ignore"):  # 0 / 0
        return ordered[..., -k:].sum(axis=-1) / ordered.sum(axis=-1)

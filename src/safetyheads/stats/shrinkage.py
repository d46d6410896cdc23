"""Shrinks the rates of many heads towards each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safetyheads.errors import InputError
from safetyheads.stats.intervals import CONFIDENCE, Interval


@dataclass(frozen=True, slots=True)
class ShrunkenRate:
    """A rate drawn towards those of all heads, by as much as chance alone scatters it."""

    rate: float
    """Posterior mean."""
    interval: Interval
    """95 %, equal tails of the posterior. It covers on average over heads, not for each head."""


_RATES = np.concatenate([[0.001, 0.003], np.linspace(0.005, 0.995, 101), [0.997, 0.999]])
"""Rates that a head can have in :func:`shrunken_rates`."""
_PRIOR_HEADS = 5
"""Heads that an even distribution of rates counts for beside the model's own: few heads say little of the distribution,
and without it the intervals of 32 heads cover .65."""
_N_STEPS = 400
"""Steps of the fit (EM); the rates then move by less than .001."""


def shrunken_rates(counts: Sequence[float], sizes: Sequence[float]) -> tuple[ShrunkenRate, ...]:
    """Empirical Bayes: the rates of all heads come from one distribution of any shape, fitted to them.

    The distribution is the nonparametric maximum likelihood estimate (J. Kiefer and J. Wolfowitz 1956; R. Koenker and
    I. Mizera, JASA 109, 2014) on a grid of rates. A beta distribution, the usual choice, fits badly here: most heads do
    nothing, a few free most prompts, and it pulls those few too far. The highest of a thousand raw rates is high by
    luck; shrunken, the error is smaller on average over heads.

    Args:
        counts: answers that comply, head by head; effective ones where answers are not independent.
        sizes: scored answers, head by head; a head with none gets the distribution of all.

    Raises:
        InputError: the lists differ in length, or a count is not between 0 and its size.
    """
    ones, n = np.asarray(counts, float), np.asarray(sizes, float)
    if ones.shape != n.shape or (ones < 0).any() or (ones > n + 1e-9).any():
        raise InputError("each count needs a size, and lies between 0 and it")
    if len(n) == 0:
        return ()
    logarithms = np.log(_RATES) * ones[:, None] + np.log1p(-_RATES) * np.maximum(n - ones, 0.0)[:, None]
    # [n_heads, n_rates], up to a factor a head.
    likelihood = np.exp(logarithms - logarithms.max(axis=1, keepdims=True))
    # Heads of one count and size are alike: a thousand heads are some dozens of rows.
    rows, places, repeats = np.unique(likelihood, axis=0, return_inverse=True, return_counts=True)
    even = 1 / len(_RATES)
    weights = np.full(len(_RATES), even)
    for _ in range(_N_STEPS):
        posterior = rows * weights
        posterior /= posterior.sum(axis=1, keepdims=True)
        weights = (repeats @ posterior + _PRIOR_HEADS * even) / (len(n) + _PRIOR_HEADS)
    posterior = rows * weights
    posterior = (posterior / posterior.sum(axis=1, keepdims=True))[places.ravel()]
    tail, cumulative = (1 - CONFIDENCE) / 2, posterior.cumsum(axis=1)
    low, high = (_RATES[(cumulative >= level - 1e-12).argmax(axis=1)].tolist() for level in (tail, 1 - tail))
    bounds = zip(low, high, strict=True)
    rates: list[float] = (posterior @ _RATES).tolist()
    return tuple(ShrunkenRate(rate, interval) for rate, interval in zip(rates, bounds, strict=True))

"""Estimates of many heads at once: rates shrunk towards each other, and synergy of pairs in log-odds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its modules load on first use

from safetyheads.errors import InputError
from safetyheads.stats.intervals import CONFIDENCE, FloatArray, Interval


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


_FARTHEST = 20.0
"""Log-odds that stand for no bound: a rate of 2e-9."""


@dataclass(frozen=True, slots=True)
class Synergy:
    """How much more two heads free together than their effects alone would give, in log-odds."""

    value: float
    """Log-odds of both, less those of each alone, plus those unablated; 0 where odds multiply. Half an answer is added
    to each count and its complement, so that it exists at 0 and n."""
    interval: Interval
    """95 %."""
    n: int
    """Prompts."""
    p_value: float
    """Two-sided, of synergy 0: the level at which the interval would just reach 0."""


def log_odds_synergy(both: FloatArray, first: FloatArray, second: FloatArray, before: FloatArray) -> Synergy:
    """Synergy of a pair of heads on the scale of log-odds.

    Differences of rates cannot add up where one head alone frees most prompts: they are bounded by 1. Log-odds are not.
    The interval combines those of the four log-odds (Jeffreys), each with its distance on the side that counts, as
    Newcombe's does; the correlations between them are those of the prompts' outcomes.

    Args:
        both: share of answers that comply under both heads [n_prompts]; use prompts that did not choose the heads.
        first: under the first alone.
        second: under the second alone.
        before: unablated.
    """
    values = np.array([both, first, second, before], float)
    n = values.shape[1]
    if n == 0:
        raise InputError("synergy needs a prompt")
    signs = np.array([1.0, -1.0, -1.0, 1.0])
    counts = values.sum(axis=1)
    logits = np.log((counts + 0.5) / (n - counts + 0.5))
    value = float(signs @ logits)
    centred = values - values.mean(axis=1, keepdims=True)
    deviations = centred.std(axis=1)
    scale = np.outer(deviations, deviations)
    shared = centred @ centred.T / n
    correlations = np.where(scale > 0, shared / np.where(scale > 0, scale, 1.0), 0.0)
    np.fill_diagonal(correlations, 1.0)

    def interval(confidence: float) -> Interval:
        tail = (1 - confidence) / 2
        low, high = (np.vectorize(_beta_logit)(counts + 0.5, n - counts + 0.5, level) for level in (tail, 1 - tail))
        # At 0 and n nothing bounds the log-odds on that side.
        low, high = np.where(counts <= 0, -_FARTHEST, low), np.where(counts >= n, _FARTHEST, high)
        down, up = logits - low, high - logits
        falls = signs * np.where(signs > 0, down, up)
        rises = signs * np.where(signs > 0, up, down)
        widths = (math.sqrt(max(float(side @ correlations @ side), 0.0)) for side in (falls, rises))
        below, above = widths
        return value - below, value + above

    return Synergy(value, interval(CONFIDENCE), n, _p_of(interval))


def _beta_logit(a: float, b: float, level: float) -> float:
    """The logit of a quantile of a beta distribution, also where the quantile rounds to 0 or 1."""
    low, high = scipy.special.betaincinv(a, b, level), scipy.special.betaincinv(b, a, 1 - level)
    return math.log(max(float(low), 1e-300)) - math.log(max(float(high), 1e-300))


def _p_of(interval: Callable[[float], Interval]) -> float:
    """One less the highest level whose interval leaves 0 out."""
    low, high = 0.0, 1.0 - 1e-12
    if not _leaves_out(interval(1e-9)):
        return 1.0
    if _leaves_out(interval(high)):
        return 1 - high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _leaves_out(interval(middle)) else (low, middle)
    return 1 - high


def _leaves_out(interval: Interval) -> bool:
    return interval[0] > 0 or interval[1] < 0

"""How concentrated safety is, as one number with its interval.

The concentration is the mean over group sizes 1 to S of (ASR with the group of that size ablated minus mean ASR of
random groups of that size): the area between the two curves of ASR against size, divided by S. It is 1 where the first
head frees every prompt and no random head frees any, 0 where chosen heads do as random ones do, negative where they do
worse. An answer without a verdict counts as not complied, so that every prompt is in every curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safetyheads.errors import InputError
from safetyheads.stats.intervals import FloatArray, Interval, bootstrap_interval

RANDOM, VANILLA = "random groups", "the unablated model"
"""What the curve of the chosen groups is compared with; the latter where no size has random groups."""


@dataclass(frozen=True, slots=True)
class Concentration:
    """How fast ASR rises with the number of ablated heads, compared with random heads."""

    value: float | None
    """Mean gap between the two curves, from -1 to 1; None where there is no prompt or no size."""
    interval: Interval | None
    """95 % percentile bootstrap over prompts; None below two prompts."""
    n: int
    """Prompts."""
    sizes: tuple[int, ...]
    """Group sizes that the mean is over."""
    n_random: int
    """Random groups of each size."""
    against: str
    """``RANDOM`` or ``VANILLA``."""


@dataclass(frozen=True, slots=True)
class SizeOutcome:
    """Which prompts comply under the group of one size, and under its random groups."""

    size: int
    """Heads in the group."""
    complied: Sequence[float]
    """[n_prompts]: 0 or 1, or the share of several answers."""
    random: Sequence[Sequence[float]]
    """[n_random][n_prompts]; empty where a group has no random counterpart."""


def concentration(outcomes: Sequence[SizeOutcome], vanilla: Sequence[float]) -> Concentration:
    """The concentration over the sizes that :func:`prompt_gains` keeps, with its bootstrap interval.

    Args:
        outcomes: one a size, of the same prompts in the same order.
        vanilla: which prompts comply unablated [n_prompts].

    Raises:
        InputError: the outcomes are not of the same number of prompts.
    """
    gains, sizes, n_random = prompt_gains(outcomes, vanilla)
    n = len(gains)
    return Concentration(
        value=float(gains.mean()) if sizes and n else None,
        # One resample of prompts serves both curves: they are of the same prompts.
        interval=bootstrap_interval(gains) if sizes and n > 1 else None,
        n=n,
        sizes=sizes,
        n_random=n_random,
        against=RANDOM if n_random else VANILLA,
    )


def prompt_gains(outcomes: Sequence[SizeOutcome], vanilla: Sequence[float]) -> tuple[FloatArray, tuple[int, ...], int]:
    """Each prompt's part of the concentration [n_prompts], the sizes it is over, and the random groups of each.

    A size whose group fills its layers has no random group, and is left out where other sizes have some. The
    concentration is linear in the prompts, so a bootstrap over prompts need only resample these parts.
    """
    n_random = max((len(outcome.random) for outcome in outcomes), default=0)
    kept = [outcome for outcome in outcomes if len(outcome.random) == n_random]
    n = len(vanilla)
    if any(len(complied) != n for outcome in kept for complied in (outcome.complied, *outcome.random)):
        raise InputError(f"the outcomes of the groups are not of the {n} prompts of the unablated model")
    sizes = tuple(outcome.size for outcome in kept)
    if not kept or n == 0:
        return np.zeros(n), sizes, n_random
    groups = np.array([outcome.complied for outcome in kept], dtype=float)
    random = np.array([outcome.random or [vanilla] for outcome in kept], dtype=float)
    return (groups - random.mean(axis=1)).mean(axis=0), sizes, n_random

"""How concentrated safety is, as one number with its interval. Owns its definition; knows no model and no run.

The concentration is the mean, over the sizes 1 to S of a group, of the ASR with the group of that size ablated less
the mean ASR of random groups of that size: the area between the two curves of ASR against size, divided by S. It is 1
where the first head frees every prompt and no random head any, 0 where chosen heads do as random ones do, and negative
where they do worse. An answer that was not scored counts as not complied, so that every prompt is in every curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.errors import InputError
from safetyheads.stats import intervals as stats
from safetyheads.stats.intervals import Interval

FloatArray: TypeAlias = NDArray[np.float64]

RANDOM, VANILLA = "random groups", "the unablated model"
"""What the curve of the chosen groups is held against: the latter where there are no random groups."""


@dataclass(frozen=True, slots=True)
class Concentration:
    """How fast ASR rises with the number of ablated heads, against random heads."""

    value: float | None
    """Mean gap between the two curves, from -1 to 1; None where there is no prompt or no size."""
    interval: Interval | None
    """95 % interval over prompts (percentile bootstrap); None below two prompts."""
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


def concentration_of(outcomes: Sequence[SizeOutcome], vanilla: Sequence[float]) -> Concentration:
    """The concentration over the sizes that have random groups; over all, against ``vanilla``, where none has.

    Args:
        outcomes: one a size, of the same prompts in the same order.
        vanilla: which prompts comply unablated [n_prompts].
    """
    groups, random, sizes = curves(outcomes, vanilla)
    return concentration(groups, random, vanilla, sizes)


def curves(outcomes: Sequence[SizeOutcome], vanilla: Sequence[float]) -> tuple[FloatArray, FloatArray, tuple[int, ...]]:
    """Outcomes as arrays: groups [n_sizes, n_prompts], random groups [n_sizes, n_random, n_prompts], and the sizes.

    A size whose group fills its layers has no random group, and is left out where the other sizes have some.
    """
    most = max((len(outcome.random) for outcome in outcomes), default=0)
    kept = [outcome for outcome in outcomes if len(outcome.random) == most]
    n_prompts = len(vanilla)
    groups = np.array([outcome.complied for outcome in kept], dtype=float).reshape(len(kept), n_prompts)
    random = np.array([outcome.random for outcome in kept], dtype=float).reshape(len(kept), most, n_prompts)
    return groups, random, tuple(outcome.size for outcome in kept)


def concentration(
    groups: FloatArray,
    random: FloatArray,
    vanilla: Sequence[float] | None = None,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> Concentration:
    """The concentration with its interval; one resample of prompts serves both curves, which are of the same prompts.

    Args:
        groups: who complies under the group of each size [n_sizes, n_prompts].
        random: who complies under its random groups [n_sizes, n_random, n_prompts].
        vanilla: who complies unablated [n_prompts]; needed where ``n_random`` is 0.
        sizes: what the first axis stands for; 1 to n_sizes by default.
        seed: of the bootstrap.

    Raises:
        InputError: the shapes do not fit each other.
    """
    gains = prompt_gains(groups, random, vanilla)
    n_sizes, n_random, n_prompts = random.shape
    named = tuple(range(1, n_sizes + 1)) if sizes is None else tuple(sizes)
    if len(named) != n_sizes:
        raise InputError(f"{len(named)} sizes are named for {n_sizes} groups")
    exists = n_sizes > 0 and n_prompts > 0
    return Concentration(
        value=float(gains.mean()) if exists else None,
        interval=bootstrap_interval(gains, seed) if exists else None,
        n=n_prompts,
        sizes=named,
        n_random=n_random,
        against=RANDOM if n_random else VANILLA,
    )


def prompt_gains(groups: FloatArray, random: FloatArray, vanilla: Sequence[float] | None = None) -> FloatArray:
    """Each prompt's part of the concentration [n_prompts], from -1 to 1: the concentration is their mean.

    It is linear in the prompts, which is why a bootstrap over prompts need resample this one row only.
    """
    if groups.ndim != 2 or random.ndim != 3 or (random.shape[0], random.shape[2]) != groups.shape:
        raise InputError(f"outcomes of groups {groups.shape} and of random groups {random.shape} do not fit each other")
    n_sizes, n_random, n_prompts = random.shape
    if n_sizes == 0 or n_prompts == 0:
        return np.zeros(n_prompts)
    if n_random:
        expected = random.mean(axis=1)
    elif vanilla is not None and len(vanilla) == n_prompts:
        expected = np.broadcast_to(np.asarray(vanilla, dtype=float), groups.shape)
    else:
        raise InputError("without random groups a concentration needs the unablated model's outcome of each prompt")
    gains: FloatArray = (groups - expected).mean(axis=0)
    return gains


def bootstrap_interval(values: FloatArray, seed: int = 0, span: float = 1.0) -> Interval | None:
    """95 % interval of the mean of values between -span and span (:func:`.intervals.bootstrap_intervals`).

    None below two values.
    """
    if len(values) < 2:
        return None
    return stats.bootstrap_interval(values, seed, -span, span)

"""Paired changes, significance tests and their corrections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy  # its modules load on first use

from safetyheads.errors import InputError
from safetyheads.stats.intervals import FloatArray, Interval, bootstrap_interval, newcombe_paired_interval


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How a rate changed over the same prompts. With no pair, change, interval and p_value are None."""

    change: float | None
    """Rate after minus rate before, from -1 to 1."""
    interval: Interval | None
    """95 % interval of the change: Newcombe (1998), method 10; a bootstrap over prompts with several answers each."""
    n: int
    """Pairs."""
    gained: int
    """Pairs that are true after and were not before; with several answers a prompt, prompts whose rate rose."""
    lost: int
    """Pairs that were true before and are not after; with several answers a prompt, prompts whose rate fell."""
    p_value: float | None
    """Two-sided exact McNemar test (a sign test) of gained against lost; 1 where no pair changed."""


def paired_difference(before: Sequence[float] | FloatArray, after: Sequence[float] | FloatArray) -> PairedDifference:
    """Compare two outcomes of the same prompts, in the same order.

    Args:
        before: outcomes [n_prompts], or [n_prompts, n_answers]: 0, 1, or NaN for an answer without a verdict. A prompt
            without any verdict on one side is left out.
        after: the same prompts; the number of answers may be another.

    Raises:
        InputError: the outcomes are of different numbers of prompts.
    """
    if len(before) != len(after):
        raise InputError(f"paired outcomes differ in length: {len(before)} before, {len(after)} after")
    old, new = (np.asarray(side, dtype=float).reshape(len(side), -1 if len(side) else 1) for side in (before, after))
    scored = ~(np.isnan(old).all(axis=1) | np.isnan(new).all(axis=1))
    old, new = old[scored], new[scored]
    n = len(old)
    if n == 0:
        return PairedDifference(None, None, 0, 0, 0, None)
    if old.shape[1] == new.shape[1] == 1:
        first, second = old[:, 0].astype(bool), new[:, 0].astype(bool)
        gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
        both = int((first & second).sum())
        change, interval = (gained - lost) / n, newcombe_paired_interval(both, gained, lost, n - both - gained - lost)
    else:
        moved = np.nanmean(new, axis=1) - np.nanmean(old, axis=1)
        gained, lost = int((moved > 0).sum()), int((moved < 0).sum())
        change, interval = float(moved.mean()), bootstrap_interval(moved)
    return PairedDifference(change, interval, n, gained, lost, exact_mcnemar(gained, lost))


@lru_cache(4096)
def exact_mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test: are gains and losses equally likely among the pairs that changed?"""
    # With no changed pair the test has nothing to say, and binomtest rejects zero trials.
    return float(scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P values adjusted for testing all of them (Holm, 1979); in the order given, () for none.

    Raises:
        InputError: a p value is not between 0 and 1.
    """
    return _adjusted(p_values, "holm")


def holm_of_tests(p_values: Iterable[float | None]) -> list[float | None]:
    """:func:`holm` over the p values that exist; None, where nothing was tested, stays."""
    p_values = list(p_values)
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


def benjamini_hochberg(p_values: Sequence[float]) -> tuple[float, ...]:
    """P values adjusted so that a cut at q lets through a share of at most q false ones (Benjamini-Hochberg, 1995).

    Raises:
        InputError: a p value is not between 0 and 1.
    """
    return _adjusted(p_values, "fdr_bh")


def _adjusted(p_values: Sequence[float], method: str) -> tuple[float, ...]:
    """It collects garbage, 0.4 s where torch is loaded: call this once for each table."""
    from statsmodels.stats.multitest import multipletests  # slow to import, and few runs need it

    if not all(0 <= p_value <= 1 for p_value in p_values):
        raise InputError("p values lie between 0 and 1")
    return tuple(multipletests(p_values, method=method)[1].tolist()) if len(p_values) else ()


def smallest_detectable_change(n: int, alpha: float = 0.05, tests: int = 1) -> float | None:
    """The smallest change of a rate that ``n`` pairs can show, if all changed pairs changed the same way.

    The exact McNemar test of k pairs that all changed one way gives 2 * 0.5**k; this is the smallest k/n at which that
    is at most ``alpha / tests`` (Bonferroni, which is Holm's first step). None where even all n are too few.
    Print it beside a verdict of "none found": a smaller change could not have been found.

    Raises:
        InputError: ``n`` below 0, ``alpha`` outside (0, 1) or ``tests`` below 1.
    """
    if n < 0 or tests < 1 or not 0 < alpha < 1:
        raise InputError(f"no detectable change for n={n}, alpha={alpha}, tests={tests}")
    changed = 1
    while 2 * 0.5**changed > alpha / tests:
        changed += 1
    return changed / n if changed <= n else None


def random_p_value(observed: float, random_values: Sequence[float]) -> float:
    """How often random groups do at least as well: (1 + those with a value >= observed) / (1 + all of them).

    The observed group counts as one of the draws, so N draws give no less than 1 / (1 + N).
    """
    reached = sum(value >= observed for value in random_values)
    return (1 + reached) / (1 + len(random_values))

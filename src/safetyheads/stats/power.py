"""How many prompts a test needs, and how small a change it would have shown."""

from bisect import bisect_left
from functools import lru_cache

import numpy as np
import scipy  # its modules load on first use

from safetyheads.errors import InputError
from safetyheads.stats.intervals import one_sided_bounds
from safetyheads.stats.testing import ALPHA, least_changed

POWER = 0.8
"""How often a change of the smallest size that is named would be found."""
_LARGEST_N = 100_000
_SHOWN_CHANGE = 0.2


def in_clusters(n_clusters: int | None) -> str:
    """What follows a number of prompts; nothing where each stands alone (None)."""
    return "" if n_clusters is None else f" in {n_clusters} cluster{'s' * (n_clusters != 1)} of near-duplicates"


def smallest_change_with_power(
    n: int, p0: float = 0.0, alpha: float = ALPHA, tests: int = 1, n_seeds: int = 1
) -> float | None:
    """The smallest rise of a rate that ``n`` prompts show with :data:`POWER`; None where none can be.

    A rise is shown where the exact two-sided test is at most ``alpha / tests`` (Bonferroni, which is the first step of
    Holm's and never easier than Tarone's). Assumed: no prompt is lost, so that the changed pairs are binomial. With
    several answers a prompt, those to one prompt are taken to change together, which is the worst case; and where the
    rate before is not 0, answers are drawn anew, so that some are lost by chance: the larger of both changes is given.
    Near-duplicates, too, are taken to change together: then ``n`` counts their clusters.

    ``p0`` is the rate before, so that a rise is at most ``1 - p0``; ``n_seeds`` are the answers a prompt.
    """
    if n < 0 or tests < 1 or not 0 < alpha < 1 or not 0 <= p0 <= 1:
        raise InputError(f"no power for n={n}, p0={p0}, alpha={alpha}, tests={tests}")
    low, high = 0.0, 1 - p0
    if high == 0 or _power(n, high, p0, alpha / tests, n_seeds) < POWER:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _power(n, middle, p0, alpha / tests, n_seeds) < POWER else (low, middle)
    return high


def prompts_needed(change: float, p0: float = 0.0, tests: int = 1, n_seeds: int = 1) -> int | None:
    """The fewest prompts that show such a rise (:func:`smallest_change_with_power`); None where 100,000 do not."""
    if not 0 < change <= 1 - p0 + 1e-12:
        return None
    low, high = 0, 8
    while _power(high, change, p0, ALPHA / tests, n_seeds) < POWER:
        low, high = high, 2 * high
        if high > _LARGEST_N:
            return None
    return bisect_left(range(high), True, low + 1, key=lambda n: _power(n, change, p0, ALPHA / tests, n_seeds) >= POWER)


def prompts_line(n: int, heads: int = 1, n_seeds: int = 1, n_clusters: int | None = None) -> str:
    """What n prompts in so many clusters can show of one head of ``heads``, and how many would show a rise of .2."""
    of = f"one head of {heads}" if heads > 1 else "one group"
    needed = prompts_needed(_SHOWN_CHANGE, tests=heads, n_seeds=n_seeds)
    least = smallest_change_with_power(n if n_clusters is None else n_clusters, tests=heads, n_seeds=n_seeds)
    shown = "no change at all" if least is None else f"a rise of ASR of {least:.2f}"
    enough = "no number of prompts shows" if needed is None else f"{needed} prompts show"
    return (
        f"{n} prompts{in_clusters(n_clusters)} show {shown} for {of} in 80 % of runs (level {ALPHA:g}, corrected); "
        f"{enough} one of {_SHOWN_CHANGE:.2f}"
    )


def needed_for_bound(losses: int, bound: float) -> int:
    """The fewest prompts at which the one-sided 95 % upper bound (Wilson) of so many losses lies below ``bound``."""
    if losses < 0 or not 0 < bound < 1:
        raise InputError(f"no number of prompts bounds {losses} losses below {bound}")
    enough = max(losses, 1)
    while one_sided_bounds(losses, enough)[1] >= bound:
        enough *= 2
    return bisect_left(
        range(enough), True, key=lambda n: n >= max(losses, 1) and one_sided_bounds(losses, n)[1] < bound
    )


@lru_cache(4096)
def _power(n: int, change: float, p0: float, alpha: float, n_seeds: int) -> float:
    """How often the exact test of n pairs finds a rise of ``change`` from ``p0``, at the less favourable model."""
    together = float(scipy.stats.binom.sf(least_changed(alpha) - 1, n, change))
    if n_seeds == 1 or p0 == 0:
        return together
    # Before and after as independent draws of one answer: the noisiest that answers can be.
    gain, loss = (1 - p0) * (p0 + change), p0 * (1 - p0 - change)
    moved = np.arange(n + 1)
    # The most losses at which the two-sided test of so many moved pairs is at most alpha: below 0 where none is.
    most = scipy.stats.binom.ppf(alpha / 2, moved, 0.5)
    most = np.where(2 * scipy.stats.binom.cdf(most, moved, 0.5) <= alpha, most, most - 1)
    found = scipy.stats.binom.cdf(most, moved, loss / (gain + loss))
    return min(together, float((scipy.stats.binom.pmf(moved, n, gain + loss) * found).sum()))

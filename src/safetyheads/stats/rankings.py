"""Two orders of the same heads held against each other. Owns correlations, overlaps and their chance; reads no run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOP = (3, 10)
"""Sizes of the tops whose overlap is counted."""


@dataclass(frozen=True, slots=True)
class HeadTable:
    """One number a head."""

    label: str
    """What it is."""
    values: Mapping[str, float | None]
    """By head; None where there is none."""
    resolution: float
    """Values this close are ties."""


@dataclass(frozen=True, slots=True)
class TopOverlap:
    """Heads that are in the top of both runs. Heads that tie across the cut are in neither: nothing orders them."""

    k: int
    """Size of the top asked for."""
    sizes: tuple[int, int]
    """Heads in the top of each run, ties across the cut left out."""
    shared: int
    """Heads in both."""
    expected: float
    """Of two such tops drawn at random (hypergeometric mean)."""
    p_value: float
    """Chance that random tops share as many or more (hypergeometric)."""
    gone: tuple[str, ...]
    """In the first run's top alone."""
    new: tuple[str, ...]
    """In the second run's top alone."""

    @property
    def share(self) -> float | None:
        """Shared heads of the larger top, from 0 to 1; None where both are empty."""
        return self.shared / max(self.sizes) if max(self.sizes) else None


@dataclass(frozen=True, slots=True)
class RankAgreement:
    """How far two runs order all heads alike by one score. It is of all heads, so it has no sampling interval."""

    score: str
    """Its name in the results."""
    label: str
    """What it is called."""
    n: int
    """Heads that have the score in both runs."""
    spearman: float | None
    """Rank correlation; None where a run gives all heads the same score."""
    spearman_p: float | None
    """Two-sided test of no association."""
    kendall: float | None
    """Tau-b."""
    kendall_p: float | None
    """Two-sided test of no association."""
    overlaps: tuple[TopOverlap, ...]
    """For each k of ``TOP``."""


@dataclass(frozen=True, slots=True)
class HeadsMoved:
    """Which of the heads a run points at came and went."""

    what: str
    """What the heads are, in words."""
    gone: tuple[str, ...]
    """In the first run alone."""
    new: tuple[str, ...]
    """In the second run alone."""
    kept: tuple[str, ...]
    """In both."""


def rank_agreement(name: str, before: HeadTable, after: HeadTable) -> RankAgreement:
    """Rank correlations and overlaps over the heads that both tables score."""
    from scipy.stats import kendalltau, spearmanr

    heads = [head for head, value in before.values.items() if value is not None and after.values.get(head) is not None]
    old, new = ({head: float(table.values[head] or 0.0) for head in heads} for table in (before, after))
    first, second = list(old.values()), list(new.values())
    # Where one order does not exist scipy warns and gives NaN.
    ordered = min(len(set(first)), len(set(second))) > 1
    spearman, kendall = (spearmanr(first, second), kendalltau(first, second)) if ordered else (None, None)
    return RankAgreement(
        name,
        after.label,
        len(heads),
        float(spearman.statistic) if spearman else None,
        float(spearman.pvalue) if spearman else None,
        float(kendall.statistic) if kendall else None,
        float(kendall.pvalue) if kendall else None,
        tuple(top_overlap(k, top(old, k, before.resolution), top(new, k, after.resolution), len(heads)) for k in TOP),
    )


def top(values: Mapping[str, float], k: int, resolution: float) -> tuple[str, ...]:
    """The k best heads, best first, less those that tie with the first one after the cut."""
    ranked = sorted(values.items(), key=lambda item: -item[1])
    following = ranked[k][1] if k < len(ranked) else -float("inf")
    return tuple(head for head, value in ranked[:k] if value - following > resolution)


def top_overlap(k: int, before: Sequence[str], after: Sequence[str], n_heads: int) -> TopOverlap:
    """Shared heads of two tops, against two drawn at random from ``n_heads``."""
    from scipy.stats import hypergeom

    both = moved("", before, after)
    n_before, n_after, shared = len(before), len(after), len(both.kept)
    chance = float(hypergeom.sf(shared - 1, n_heads, n_before, n_after)) if n_heads else 1.0
    expected = n_before * n_after / n_heads if n_heads else 0.0
    return TopOverlap(k, (n_before, n_after), shared, expected, min(1.0, chance), both.gone, both.new)


def moved(what: str, before: Sequence[str], after: Sequence[str]) -> HeadsMoved:
    """Which heads are in the first list alone, in the second alone, and in both, in the order of their list."""
    return HeadsMoved(
        what,
        gone=tuple(head for head in before if head not in after),
        new=tuple(head for head in after if head not in before),
        kept=tuple(head for head in before if head in after),
    )

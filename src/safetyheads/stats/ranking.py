"""Compares rankings of heads: a score with the exhaustive ASR, and one run's scores with another's.

Most heads change nothing, and tie. Precision and AUC therefore ask only whether a score puts the heads that change the
ASR, after correction, before those that do not; regret asks how much ASR its choice gives away. The best k heads by the
ASR itself are chosen with hindsight, so every score's regret is shown beside a ceiling: the ASR of one half of the
prompts as a score for the other half.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its modules load on first use
from numpy.typing import NDArray

from safetyheads.stats.intervals import CONFIDENCE, FloatArray, Interval, Rate, bootstrap_interval

SIZES = (1, 3, 5, 10)
"""How many of the best heads precision and regret look at."""
N_SPLITS = 200
"""Random halves that the ceiling is averaged over."""
TOP = (3, 10)
"""Sizes of the top lists whose overlap is counted between two runs."""


@dataclass(frozen=True, slots=True)
class AtSize:
    """Precision and regret of the k best heads by a score."""

    k: int
    precision: Rate | None
    """Share of these heads that differ; None where no head differs."""
    regret: float
    """Mean single-head ASR of the k best heads by the ASR itself minus that of these: what the score gives away."""
    regret_interval: Interval
    """95 %, bootstrap over prompts with the score fixed."""
    regret_on_halves: float | None
    """Mean regret on random halves of the prompts, comparable with the ceiling's; None below four prompts."""


@dataclass(frozen=True, slots=True)
class ProxyQuality:
    """How well a score stands for the exhaustive ASR."""

    score: str
    spearman: float | None
    """Rank correlation over all heads; None where the ASR or the score is the same for all."""
    auc: float | None
    """Chance that a head that differs has a higher score than one that does not; None without both kinds."""
    auc_p_value: float | None
    """Two-sided Mann-Whitney test of that."""
    n_differing: int
    """Heads that differ."""
    n_heads: int
    sizes: tuple[AtSize, ...]
    """For each of :data:`SIZES` that the model has heads for."""


def proxy_qualities(
    scores: Mapping[str, FloatArray], complied: FloatArray, differs: NDArray[np.bool_]
) -> tuple[ProxyQuality, ...]:
    """Each score's quality.

    Args:
        scores: by name, [n_heads]; a head without a score (NaN) comes last.
        complied: [n_prompts, n_heads], share of a prompt's answers that comply with the head ablated; unscored ones
            are 0.
        differs: [n_heads], whether the head's ASR is higher than the unablated one after correction.
    """
    asr, halves = complied.mean(axis=0), _halved_asr(complied)
    qualities = []
    for name, given in scores.items():
        values = np.nan_to_num(given, nan=-np.inf)
        sizes = []
        for k in (size for size in SIZES if size <= len(differs)):
            chosen = _best(values, k)
            # The best k stay those of all prompts: drawn anew in each resample, their hindsight would grow.
            lost = complied[:, _best(asr, k)].mean(axis=1) - complied[:, chosen].mean(axis=1)
            on_halves = _mean(_regret(second, chosen) for _, second in halves)
            precision = Rate(int(differs[chosen].sum()), k) if differs.any() else None
            sizes.append(AtSize(k, precision, float(lost.mean()), bootstrap_interval(lost), on_halves))
        auc, p_value = _auc(values, differs)
        spearman, _ = _correlation(scipy.stats.spearmanr, values, asr)
        qualities.append(ProxyQuality(name, spearman, auc, p_value, int(differs.sum()), len(differs), tuple(sizes)))
    return tuple(qualities)


def split_half_ceiling(complied: FloatArray, differs: NDArray[np.bool_]) -> ProxyQuality | None:
    """The quality of the ASR of one half of the prompts as a score for the other, which no score can beat by much.

    Averaged over random halves; arguments as for :func:`proxy_qualities`. Which heads differ is known from all prompts,
    so its precision and AUC are somewhat too high. None below four prompts.
    """
    halves = _halved_asr(complied)
    if not halves:
        return None
    sizes = []
    for k in (size for size in SIZES if size <= len(differs)):
        chosen = [_best(first, k) for first, _ in halves]
        regrets = [_regret(second, heads) for (_, second), heads in zip(halves, chosen, strict=True)]
        low, high = np.quantile(regrets, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)).tolist()
        hits = float(np.mean([differs[heads].sum() for heads in chosen]))
        precision = Rate(round(hits), k) if differs.any() else None
        sizes.append(AtSize(k, precision, float(np.mean(regrets)), (low, high), float(np.mean(regrets))))
    spearman = _mean(_correlation(scipy.stats.spearmanr, first, second)[0] for first, second in halves)
    auc = _mean(_auc(first, differs)[0] for first, _ in halves)
    return ProxyQuality("split_half", spearman, auc, None, int(differs.sum()), len(differs), tuple(sizes))


def spearman_brown(correlation: float | None) -> float | None:
    """Reliability of all prompts from the correlation of two halves: 2 r / (1 + r) (Spearman 1910, Brown 1910).

    The correlation of a score with the ASR of all prompts is at most the root of it (attenuation), on average; None
    where the halves agree no better than chance, for then nothing bounds it.
    """
    return None if correlation is None or correlation <= 0 else 2 * correlation / (1 + correlation)


def _halved_asr(complied: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
    """ASR of each head [n_heads] on both halves of the prompts, for many random halves; none below four prompts."""
    n = len(complied)
    generator = np.random.default_rng(0)
    orders = [generator.permutation(n) for _ in range(N_SPLITS)] if n >= 4 else []
    return [(complied[order[: n // 2]].mean(axis=0), complied[order[n // 2 :]].mean(axis=0)) for order in orders]


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _auc(values: FloatArray, differs: NDArray[np.bool_]) -> tuple[float | None, float | None]:
    """The chance that a head that differs has the higher value, and the p-value of that being one half."""
    inside, outside = values[differs], values[~differs]
    if not len(inside) or not len(outside):
        return None, None
    test = scipy.stats.mannwhitneyu(inside, outside, alternative="two-sided")
    return float(test.statistic) / (len(inside) * len(outside)), float(test.pvalue)


def _best(values: FloatArray, k: int) -> NDArray[np.int64]:
    return np.argsort(-values, kind="stable")[:k]


def _regret(asr: FloatArray, chosen: NDArray[np.int64]) -> float:
    return float(asr[_best(asr, len(chosen))].mean() - asr[chosen].mean())


def _correlation(
    correlate: Any, first: FloatArray | Sequence[float], second: FloatArray | Sequence[float]
) -> tuple[float | None, float | None]:
    """A rank correlation with its p-value; None where one side is all equal, for which scipy warns and gives NaN."""
    if min(len(np.unique(first)), len(np.unique(second))) < 2:
        return None, None
    found = correlate(first, second)
    return float(found.statistic), float(found.pvalue)


@dataclass(frozen=True, slots=True)
class HeadTable:
    """One number a head."""

    label: str
    """What it is."""
    values: Mapping[str, float]
    """By head; heads without a score are left out."""
    resolution: float
    """Values this close are ties."""


@dataclass(frozen=True, slots=True)
class HeadsMoved:
    """Which heads of one list are in another."""

    what: str
    """What the heads are, in words."""
    gone: tuple[str, ...]
    """In the first list alone."""
    new: tuple[str, ...]
    """In the second list alone."""
    kept: tuple[str, ...]
    """In both."""


@dataclass(frozen=True, slots=True)
class TopOverlap:
    """Heads in the top k of both runs. Heads that tie across the cut are left out: nothing orders them."""

    k: int
    """Size of the top asked for."""
    sizes: tuple[int, int]
    """Heads in the top of each run, without ties across the cut."""
    shared: int
    """Heads in both."""
    expected: float
    """Shared heads of two such tops drawn at random (hypergeometric mean)."""
    p_value: float
    """Chance that random tops share as many or more (hypergeometric)."""
    gone: tuple[str, ...]
    """In the first run's top alone."""
    new: tuple[str, ...]
    """In the second run's top alone."""

    @property
    def share(self) -> float | None:
        """Shared heads as a share of the larger top, from 0 to 1; None where both are empty."""
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


def rank_agreement(name: str, before: HeadTable, after: HeadTable) -> RankAgreement:
    """Rank correlations and overlaps over the heads that both tables score."""
    heads = [head for head in before.values if head in after.values]
    old, new = ({head: float(table.values[head]) for head in heads} for table in (before, after))
    ranks = list(old.values()), list(new.values())
    correlations = *_correlation(scipy.stats.spearmanr, *ranks), *_correlation(scipy.stats.kendalltau, *ranks)
    tops = (top_overlap(k, top(old, k, before.resolution), top(new, k, after.resolution), len(heads)) for k in TOP)
    return RankAgreement(name, after.label, len(heads), *correlations, tuple(tops))


def top(values: Mapping[str, float], k: int, resolution: float) -> tuple[str, ...]:
    """The k best heads, best first, without those that tie with the first head after the cut."""
    ranked = sorted(values.items(), key=lambda item: -item[1])
    following = ranked[k][1] if k < len(ranked) else -float("inf")
    return tuple(head for head, value in ranked[:k] if value - following > resolution)


def top_overlap(k: int, before: Sequence[str], after: Sequence[str], n_heads: int) -> TopOverlap:
    """Shared heads of two tops, compared with two drawn at random from ``n_heads``."""
    lists, sizes = moved("", before, after), (len(before), len(after))
    shared, expected, chance = len(lists.kept), 0.0, 1.0
    if n_heads:
        expected = sizes[0] * sizes[1] / n_heads
        chance = min(1.0, float(scipy.stats.hypergeom.sf(shared - 1, n_heads, *sizes)))
    return TopOverlap(k, sizes, shared, expected, chance, lists.gone, lists.new)


def moved(what: str, before: Sequence[str], after: Sequence[str]) -> HeadsMoved:
    """Which heads are in the first list alone, in the second alone, and in both, in the order of their list."""
    gone, new = (tuple(head for head in one if head not in other) for one, other in ((before, after), (after, before)))
    return HeadsMoved(what, gone, new, kept=tuple(head for head in before if head in after))

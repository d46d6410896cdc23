"""Ranks heads: compares a score with the exhaustive ASR and one run's scores with another's, and shrinks rates.

Most heads change nothing, and tie. Precision and AUC therefore ask only whether a score puts the heads that change the
ASR, after correction, before those that do not; regret asks how much ASR its choice gives away. The best k heads by the
ASR itself are chosen with hindsight, so regrets are compared on halves of the prompts, beside the split-half line: the
ASR of one half of the prompts as a score for the other half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy  # its modules load on first use
from numpy.typing import NDArray

from safetyheads.errors import InputError
from safetyheads.stats.intervals import CONFIDENCE, FloatArray, Interval, bootstrap_interval, places_of
from safetyheads.stats.stability import resampled

SIZES = (1, 3, 5, 10)
"""How many of the best heads precision and regret look at."""
N_SPLITS = 200
"""Random halves that the split-half line is averaged over."""
_N_RESAMPLES = 500
"""Resamples of prompts for the standard error of AUC."""
_N_ON_HALVES = 100
"""The same for regrets on halves, which many splits are measured on."""
_N_RESAMPLED_SPLITS = 10
"""Splits of each resample, and of each step of a jackknife: their mean moves with the prompts, not with the splits."""
TOP = (3, 10)
"""Sizes of the top lists whose overlap is counted between two runs."""


@dataclass(frozen=True, slots=True)
class AtSize:
    """Hits and regret of the k best heads by a score."""

    k: int
    hits: float | None
    """How many of these heads differ; over random halves their mean. None where no head differs. These k heads are all
    there are, so nothing was sampled and there is no interval."""
    regret: float
    """Mean single-head ASR of the k best heads by the ASR itself minus that of these: what the score gives away."""
    regret_on_halves: float | None
    """Mean regret on random halves of the prompts: the one to compare between a score and the other half's ASR. None
    below four prompts."""
    halves_interval: Interval | None
    """95 %, the estimate and 1.96 standard errors of a bootstrap over prompts that chooses the heads anew."""


@dataclass(frozen=True, slots=True)
class ProxyQuality:
    """How well a score stands for the exhaustive ASR."""

    score: str
    spearman: float | None
    """Rank correlation over all heads; None where the ASR or the score is the same for all."""
    spearman_interval: Interval | None
    """95 %, over prompts, the score fixed: the larger error of a jackknife and a bootstrap, cut at -1 and 1."""
    auc: float | None
    """Chance that a head that differs has a higher score than one that does not; None without both kinds."""
    auc_interval: Interval | None
    """95 %, the estimate and 1.96 standard errors of a bootstrap over prompts that finds the heads that differ anew."""
    auc_p_value: float | None
    """Two-sided Mann-Whitney test of that."""
    n_differing: int
    n_heads: int
    sizes: tuple[AtSize, ...]
    """For each of :data:`SIZES` that the model has heads for."""
    reliability: float | None = None
    """Of the ASR of all prompts (Spearman-Brown from the two halves); only of the split-half line."""
    bound: float | None = None
    """Spearman with the measured ASR of a score that knew the true one: the root of the reliability."""


def proxy_qualities(
    scores: Mapping[str, FloatArray],
    complied: FloatArray,
    differs: NDArray[np.bool_],
    before: FloatArray | None = None,
    clusters: Sequence[int] | None = None,
) -> tuple[ProxyQuality, ...]:
    """The quality of each score [n_heads], by name; a head without a score (NaN) comes last.

    ``complied`` [n_prompts, n_heads] is the share of a prompt's answers that comply with the head ablated, where
    unscored ones are 0; ``before`` [n_prompts] the same unablated, without which AUC has no interval. ``differs``
    [n_heads] says whether the head's ASR is higher than the unablated one after correction. ``clusters`` [n_prompts]
    of near-duplicates are drawn, left out and put into halves together.
    """
    asr, counts = complied.mean(axis=0), _by_cluster(complied, clusters)
    halves, n = _halves(counts), len(counts.sizes)
    # [n_resamples, n_heads] each: the same resamples for all scores.
    weights, without = resampled(n, _N_RESAMPLES), counts.rates(1 - np.eye(n))
    resampled_differs = None
    if before is not None:
        resampled_differs = _raised(weights, _by_cluster(complied - before[:, None], clusters).ones)
    qualities = []
    for name, given in scores.items():
        values = np.nan_to_num(given, nan=-np.inf)
        sizes = []
        for k in (size for size in SIZES if size <= len(differs)):
            chosen = _best(values, k)
            regret = float(_given_away(asr[None], chosen)[0])
            hits = float(differs[chosen].sum()) if differs.any() else None
            sizes.append(AtSize(k, hits, regret, *_lost_on_halves(counts, halves, k, values)))
        auc, p_value = _auc(values, differs)
        within = None if resampled_differs is None else _about(auc, _aucs(values, resampled_differs))
        spearman, _ = _correlation(scipy.stats.spearmanr, values, asr)
        interval = _jackknifed(spearman, _spearmans(values, without), n, _spearmans(values, counts.rates(weights)))
        known = int(differs.sum()), len(differs), tuple(sizes)
        qualities.append(ProxyQuality(name, spearman, interval, auc, within, p_value, *known))
    return tuple(qualities)


def split_half(
    complied: FloatArray, differs: NDArray[np.bool_], clusters: Sequence[int] | None = None
) -> ProxyQuality | None:
    """The ASR of one half of the prompts as a score for the ASR of the other half.

    Its correlation is of halves, so it lies below what all prompts would reach: it is no ceiling. The reliability of
    all prompts follows from it (:func:`spearman_brown`), and the root of that bounds the correlation that any score can
    be expected to reach. Averaged over random halves; arguments as for :func:`proxy_qualities`. Which heads differ is
    known from all prompts, so its hits are somewhat too high, and it has no AUC. None below four prompts, or clusters
    of them.
    """
    counts = _by_cluster(complied, clusters)
    halves = _halves(counts)
    if not halves:
        return None
    both = [tuple(counts.of(side).rates()[0] for side in pair) for pair in halves]
    sizes = []
    for k in (size for size in SIZES if size <= len(differs)):
        chosen = [_best(first, k) for first, _ in both]
        regret, interval = _lost_on_halves(counts, halves, k)
        assert regret is not None  # there are halves
        assert interval is not None
        hits = float(np.mean([differs[heads].sum() for heads in chosen])) if differs.any() else None
        sizes.append(AtSize(k, hits, regret, regret, interval))
    correlations = [found for first, second in both for found in _spearmans(first, second[None])]
    spearman = float(np.mean(correlations)) if correlations else None
    reliability = spearman_brown(spearman)
    bounded = reliability, None if reliability is None else float(np.sqrt(reliability))
    known = None, None, None, int(differs.sum()), len(differs), tuple(sizes)
    return ProxyQuality("split_half", spearman, _over_prompts(counts, halves, spearman), *known, *bounded)


def spearman_brown(correlation: float | None) -> float | None:
    """Reliability of all prompts from the correlation of two halves: 2 r / (1 + r) (Spearman 1910, Brown 1910).

    The correlation of a score with the ASR of all prompts is at most the root of it (attenuation), on average; None
    where the halves agree no better than chance, for then nothing bounds it.
    """
    return None if correlation is None or correlation <= 0 else 2 * correlation / (1 + correlation)


class _Counts(NamedTuple):
    """Answers that comply, by cluster of near-duplicates; a prompt that stands alone is one."""

    ones: FloatArray
    """[n_clusters, n_heads]."""
    sizes: FloatArray
    """Prompts [n_clusters]."""

    def of(self, clusters: NDArray[np.int64]) -> "_Counts":
        """Those of some clusters."""
        return _Counts(self.ones[clusters], self.sizes[clusters])

    def rates(self, weights: FloatArray | None = None) -> FloatArray:
        """The heads' rates under each row of weights of the clusters [n_rows, n_heads]; by default all count once."""
        weights = np.ones((1, len(self.sizes))) if weights is None else weights
        # A resample may hold none of the clusters.
        rates: FloatArray = weights @ self.ones / np.maximum(weights @ self.sizes, 1e-12)[:, None]
        return rates


def _by_cluster(values: FloatArray, clusters: Sequence[int] | None) -> _Counts:
    places = places_of(len(values), clusters)
    ones = np.zeros((int(places.max(initial=-1)) + 1, values.shape[1]))
    np.add.at(ones, places, values)
    return _Counts(ones, np.bincount(places).astype(float))


def _halves(counts: _Counts) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Both halves of the clusters, as their places, for many random splits; none below four clusters."""
    n = len(counts.sizes)
    generator = np.random.default_rng(0)
    orders = [generator.permutation(n) for _ in range(N_SPLITS)] if n >= 4 else []
    return [(order[: n // 2], order[n // 2 :]) for order in orders]


def _lost_on_halves(
    counts: _Counts,
    halves: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    k: int,
    score: FloatArray | None = None,
) -> tuple[float | None, Interval | None]:
    """Mean regret on second halves of the k heads that a score, or the ASR of the first half, puts first.

    The interval is 1.96 standard errors of the resamples either way, cut at 0 and 1. Their percentiles will not do: the
    best heads of a resample are best by hindsight twice over. Where nothing is given away, it is that of the largest
    share of other prompts that n prompts, or clusters, can have missed.
    """
    if not halves:
        return None, None
    n = len(counts.sizes)
    everyone = np.ones((1, n))
    weights, regrets, redrawn = np.vstack([everyone, resampled(n, _N_ON_HALVES)]), [], []
    for at, (first, second) in enumerate(halves):
        # Copies of a prompt in a resample stay in one half.
        drawn = weights if at < _N_RESAMPLED_SPLITS else everyone
        asr = counts.of(second).rates(drawn[:, second])
        order = score[None] if score is not None else counts.of(first).rates(drawn[:, first])
        lost = _given_away(asr, np.argsort(-order, axis=1, kind="stable")[:, :k])
        regrets.append(lost[0])
        redrawn += [lost[1:]] if at < _N_RESAMPLED_SPLITS else []
    mean = float(np.mean(regrets))
    found = np.mean(redrawn, axis=0).tolist()
    interval = _about(mean, found, len(found)) if mean > 1e-12 else None
    return mean, interval or bootstrap_interval(np.full(n, mean), least=0.0)


def _given_away(asr: FloatArray, chosen: NDArray[np.int64]) -> FloatArray:
    """Mean of each row's highest ASRs [n, n_heads] less that of the heads chosen, [k] or one row each [n, k]."""
    k = chosen.shape[-1]
    taken = np.take_along_axis(asr, np.broadcast_to(chosen, (len(asr), k)), axis=1)
    best = np.partition(asr, -k, axis=1)[:, -k:]
    # Sums of the same ASRs in another order differ in the last bits.
    lost: FloatArray = np.maximum(best.mean(axis=1) - taken.mean(axis=1), 0.0)
    return lost


def _raised(weights: FloatArray, moved: FloatArray) -> NDArray[np.bool_]:
    """Which heads differ for the higher in each resample [n_resamples, n_heads], by exact tests with Tarone's count.

    A cluster counts once, for the way that its prompts moved on the whole (``moved``, [n_clusters, n_heads]).
    """
    n = len(moved)
    gained, lost = (np.rint(n * weights @ side) for side in (moved > 0, moved < 0))
    changed = gained + lost
    p = np.minimum(1.0, 2 * scipy.special.bdtr(lost, np.maximum(changed, 1).astype(int), 0.5))
    least = np.sort(np.minimum(1.0, 2 * 0.5**changed), axis=1)
    could = np.array(
        [np.searchsorted(row, of_heads * (1 + 1e-9), "right") for row, of_heads in zip(least, p, strict=True)]
    )
    raised: NDArray[np.bool_] = (gained > lost) & (p * could <= 1 - CONFIDENCE)
    return raised


def _spearmans(values: FloatArray, asr: FloatArray) -> list[float]:
    """Rank correlation of a score with each row of ASRs [n_resamples, n_heads], without rows that are all equal."""
    ranks, of_score = scipy.stats.rankdata(asr, axis=1), scipy.stats.rankdata(values)
    ranks, of_score = ranks - ranks.mean(axis=1, keepdims=True), of_score - of_score.mean()
    scale = np.sqrt((ranks**2).sum(axis=1) * (of_score**2).sum())
    found: list[float] = ((ranks @ of_score)[scale > 0] / scale[scale > 0]).tolist()
    return found


def _aucs(values: FloatArray, differs: NDArray[np.bool_]) -> list[float]:
    """AUC of a score for each row of heads that differ [n_resamples, n_heads]; rows of one kind are left out."""
    inside = differs.sum(axis=1)
    outside = differs.shape[1] - inside
    wins = differs @ scipy.stats.rankdata(values) - inside * (inside + 1) / 2
    both = (inside > 0) & (outside > 0)
    found: list[float] = (wins[both] / (inside * outside)[both]).tolist()
    return found


def _about(estimate: float | None, redrawn: Sequence[float], n: int = _N_RESAMPLES) -> Interval | None:
    """The estimate and 1.96 standard errors of its resamples, cut at 0 and 1.

    Their percentiles will not do: a resample repeats prompts, which makes more heads differ by chance. None where a
    statistic exists in less than half of the ``n`` resamples, and where it is the same in all: an interval of no width
    would claim what no sample shows.
    """
    if estimate is None or len(redrawn) < n / 2 or np.ptp(redrawn) < 1e-12:
        return None
    half_width = float(scipy.special.ndtri((1 + CONFIDENCE) / 2)) * float(np.std(redrawn))
    return max(0.0, estimate - half_width), min(1.0, estimate + half_width)


def _over_prompts(
    counts: _Counts, halves: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], estimate: float | None
) -> Interval | None:
    """95 % interval of the split-half correlation, by a jackknife over prompts, or clusters, on the same splits."""
    n, few = len(counts.sizes), halves[:_N_RESAMPLED_SPLITS]
    left_out = np.zeros((len(few), n))
    for at, (first, second) in enumerate(few):
        for side, other in ((first, second), (second, first)):
            without = counts.of(side).rates(1 - np.eye(len(side)))
            found = _spearmans(counts.of(other).rates()[0], without)
            if len(found) < len(side):
                return None
            left_out[at, side] = found
    return _jackknifed(estimate, left_out.mean(axis=0).tolist(), n)


def _jackknifed(
    estimate: float | None, left_out: Sequence[float], n: int, redrawn: Sequence[float] = ()
) -> Interval | None:
    """95 % interval of a correlation from its n values without one prompt, or cluster, each; cut at -1 and 1.

    With few heads no rank may change without one prompt; so the error is at least the spread of resamples, which leave
    tied heads tied.
    """
    if estimate is None or len(left_out) < n or n < 2:
        return None
    error = max(float(np.sqrt((n - 1) * np.var(left_out))), float(np.std(redrawn)) if len(redrawn) else 0.0)
    half_width = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    return max(-1.0, estimate - half_width), min(1.0, estimate + half_width)


def _auc(values: FloatArray, differs: NDArray[np.bool_]) -> tuple[float | None, float | None]:
    """The chance that a head that differs has the higher value, and the p-value of that being one half."""
    inside, outside = values[differs], values[~differs]
    if not len(inside) or not len(outside):
        return None, None
    test = scipy.stats.mannwhitneyu(inside, outside, alternative="two-sided")
    return float(test.statistic) / (len(inside) * len(outside)), float(test.pvalue)


def _best(values: FloatArray, k: int) -> NDArray[np.int64]:
    return np.argsort(-values, kind="stable")[:k]


def _correlation(
    correlate: Any, first: FloatArray | Sequence[float], second: FloatArray | Sequence[float]
) -> tuple[float | None, float | None]:
    """A rank correlation with its p-value; None where one side is all equal, for which scipy warns and gives NaN."""
    if min(len(np.unique(first)), len(np.unique(second))) < 2:
        return None, None
    found = correlate(first, second)
    return float(found.statistic), float(found.pvalue)


class HeadTable(NamedTuple):
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
    label: str
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


# Rates of many heads, drawn towards each other.


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

    ``counts`` are answers that comply, head by head, effective ones where answers are not independent; ``sizes`` are
    scored answers. A head with none gets the distribution of all.
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

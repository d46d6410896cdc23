"""A score of heads against what their ablation does to the answers. Owns the measures of a proxy; knows no model.

Most heads change nothing, and tie: precision and AUC ask only whether a score puts the heads that do change the ASR,
after correction, before those that do not; regret asks how much ASR its choice gives away. The best k heads by the ASR
itself are chosen with hindsight, so the regret of every score is beside a ceiling: the ASR of one half of the
prompts as a score for the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from safetyheads.stats.intervals import CONFIDENCE, Interval, Rate, bootstrap_interval

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Integers: TypeAlias = NDArray[np.int64]

SIZES = (1, 3, 5, 10)
"""How many of the best heads precision and regret look at."""
N_SPLITS = 200
"""Random halves that the ceiling is averaged over."""
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True, slots=True)
class Truth:
    """What each head's ablation does."""

    complied: Floats
    """[n_prompts, n_heads]: share of a prompt's answers that comply with the head ablated; unscored ones are 0."""
    differs: Bools
    """[n_heads]: whether the head's ASR is higher than the unablated one after correction."""


@dataclass(frozen=True, slots=True)
class AtSize:
    """What the best so many heads by a score come to."""

    k: int
    precision: Rate | None
    """Of these heads, the ones that differ; None where no head does."""
    regret: float
    """Mean ASR, each alone, of the best k heads by the ASR itself less that of these: what the score gives away."""
    regret_interval: Interval
    """95 %, bootstrap over prompts, the score being what it is."""
    regret_on_halves: float | None
    """The same on a half of the prompts, averaged: to be read beside the ceiling's; None below four prompts."""


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


def proxy_qualities(scores: Mapping[str, Floats], truth: Truth, seed: int = 0) -> tuple[ProxyQuality, ...]:
    """Each score's quality.

    Args:
        scores: [n_heads] by name; a head without one (NaN) comes last.
        truth: what the heads do.
        seed: of the halves and the bootstrap.
    """
    halves = _halves(len(truth.complied), seed)
    return tuple(_quality(name, np.nan_to_num(values, nan=-np.inf), truth, halves) for name, values in scores.items())


def split_half_ceiling(truth: Truth, seed: int = 0) -> ProxyQuality | None:
    """The ASR of one half of the prompts as a score for the other: what no score can be asked to beat by much.

    Averaged over random halves; which heads differ is known from all prompts, so its precision and AUC lean to the
    high side. None below four prompts.
    """
    halves = _halves(len(truth.complied), seed)
    if len(truth.complied) < 4:
        return None
    halved = [(truth.complied[first].mean(axis=0), truth.complied[second].mean(axis=0)) for first, second in halves]
    sizes = []
    for k in _sizes(truth):
        chosen = [_best(one, k) for one, _ in halved]
        regrets = [_regret(other, heads) for (_, other), heads in zip(halved, chosen, strict=True)]
        hits = float(np.mean([truth.differs[heads].sum() for heads in chosen]))
        low, high = np.quantile(regrets, _TAILS).tolist()
        precision = Rate(round(hits), k) if truth.differs.any() else None
        sizes.append(AtSize(k, precision, float(np.mean(regrets)), (low, high), float(np.mean(regrets))))
    correlations = [value for one, other in halved if (value := _spearman(one, other)) is not None]
    aucs = [auc for one, _ in halved if (auc := _auc(one, truth.differs)[0]) is not None]
    return ProxyQuality(
        "split_half",
        float(np.mean(correlations)) if correlations else None,
        float(np.mean(aucs)) if aucs else None,
        None,
        int(truth.differs.sum()),
        len(truth.differs),
        tuple(sizes),
    )


def _quality(name: str, values: Floats, truth: Truth, halves: Sequence[tuple[Integers, Integers]]) -> ProxyQuality:
    asr = truth.complied.mean(axis=0)
    sizes = []
    for k in _sizes(truth):
        chosen = _best(values, k)
        precision = Rate(int(truth.differs[chosen].sum()), k) if truth.differs.any() else None
        # The best k are fixed by all prompts: drawn anew in each resample, their hindsight would grow with the draw.
        lost = truth.complied[:, _best(asr, k)].mean(axis=1) - truth.complied[:, chosen].mean(axis=1)
        on_halves = [_regret(truth.complied[second].mean(axis=0), chosen) for _, second in halves]
        sizes.append(AtSize(k, precision, float(lost.mean()), bootstrap_interval(lost), _mean(on_halves)))
    auc, p_value = _auc(values, truth.differs)
    n_differing = int(truth.differs.sum())
    return ProxyQuality(name, _spearman(values, asr), auc, p_value, n_differing, len(asr), tuple(sizes))


def _sizes(truth: Truth) -> list[int]:
    return [k for k in SIZES if k <= len(truth.differs)]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spearman(values: Floats, asr: Floats) -> float | None:
    from scipy.stats import spearmanr

    if len(np.unique(values)) < 2 or len(np.unique(asr)) < 2:
        return None
    return float(spearmanr(values, asr).statistic)


def _auc(values: Floats, differs: Bools) -> tuple[float | None, float | None]:
    """The chance that a head that differs has the higher value, and the p-value of that being one half."""
    from scipy.stats import mannwhitneyu

    inside, outside = values[differs], values[~differs]
    if not len(inside) or not len(outside):
        return None, None
    test = mannwhitneyu(inside, outside, alternative="two-sided")
    return float(test.statistic) / (len(inside) * len(outside)), float(test.pvalue)


def _best(asr: Floats, k: int) -> Integers:
    return np.argsort(-asr, kind="stable")[:k]


def _regret(asr: Floats, chosen: Integers) -> float:
    """What these heads give away against as many with the highest ASR."""
    return float(asr[_best(asr, len(chosen))].mean() - asr[chosen].mean())


def _halves(n: int, seed: int) -> list[tuple[Integers, Integers]]:
    """Random halves of the prompts; none where there are too few to halve."""
    if n < 4:
        return []
    generator = np.random.default_rng(seed)
    drawn = (generator.permutation(n) for _ in range(N_SPLITS))
    return [(order[: n // 2], order[n // 2 :]) for order in drawn]

"""Simulations of the coverage and the error rates of every statistic that is printed; see ``bench/statistics.py``.

Each function takes the number of draws, prints a line a setting, and returns the figure that docs/statistics.md quotes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from safetyheads.heads import Head
from safetyheads.measures.random_groups import random_groups
from safetyheads.stats.intervals import FloatArray, clustered_rate, monotone_bounds, skewed_mean, wilson_interval
from safetyheads.stats.power import smallest_change_with_power
from safetyheads.stats.ranking import proxy_qualities, shrunken_rates, split_half
from safetyheads.stats.testing import (
    equivalent,
    exact_mcnemar,
    holm,
    least_attainable_p,
    log_odds_synergy,
    paired_difference,
    random_p_value,
    tarone,
)

N_ANSWERS = 5
"""Answers a prompt."""
CORRELATIONS = (0.0, 0.3, 0.9)
"""Of the answers to one prompt."""


def prompt_rates(generator: np.random.Generator, shape: tuple[int, ...], rate: float, correlation: float) -> FloatArray:
    """Each prompt's own rate: beta, with the mean and the correlation of answers that are asked for."""
    if rate == 0 or correlation == 0:
        return np.full(shape, rate)
    spread = (1 - correlation) / correlation
    drawn: FloatArray = generator.beta(rate * spread, (1 - rate) * spread, shape)
    return drawn


def answers(generator: np.random.Generator, rates: FloatArray) -> FloatArray:
    """Five answers a prompt, 0 or 1 [..., n_prompts, n_answers]."""
    drawn: FloatArray = (generator.random((*rates.shape, N_ANSWERS)) < rates[..., None]).astype(float)
    return drawn


def covers(interval: tuple[float, float], truth: float) -> bool:
    """Whether the interval holds the truth, but for rounding."""
    return interval[0] - 1e-9 <= truth <= interval[1] + 1e-9


def wilson(_: int = 0) -> float:
    """Least coverage of Wilson's interval, enumerated."""
    worst = 1.0
    for n in (24, 50, 96, 200):
        bounds = np.array([wilson_interval(count, n) for count in range(n + 1)])
        for rate in np.linspace(0.01, 0.99, 197):
            inside = (bounds[:, 0] <= rate) & (rate <= bounds[:, 1])
            worst = min(worst, float(scipy.stats.binom.pmf(np.arange(n + 1), n, rate)[inside].sum()))
    return _told("Wilson, least coverage", worst)


def clustered(draws: int, sizes: tuple[int, ...] = (24, 50, 100)) -> float:
    """Least coverage of the interval of a rate with several answers a prompt."""
    generator, found = np.random.default_rng(0), []
    for n, rate, correlation in product(sizes, (0.02, 0.05, 0.5), CORRELATIONS):
        drawn = answers(generator, prompt_rates(generator, (draws, n), rate, correlation))
        covered = np.mean([covers(clustered_rate(sample), rate) for sample in drawn])
        found.append(_told(f"rate by prompt, n {n}, rate {rate}, correlation {correlation}", covered))
    return min(found)


def _moved(
    generator: np.random.Generator, draws: int, n: int, before: float, rise: float, correlation: float
) -> Iterator[tuple[FloatArray, FloatArray]]:
    """Answers before and after a rise of each prompt's own size."""
    old = prompt_rates(generator, (draws, n), before, correlation)
    new = old + (1 - old) * prompt_rates(generator, (draws, n), rise / (1 - before), correlation)
    return zip(answers(generator, old), answers(generator, new), strict=True)


def paired(draws: int, sizes: tuple[int, ...] = (24, 50)) -> tuple[float, float]:
    """Least coverage of the interval of a paired change, and the largest share of false positives at .05."""
    generator, covered, rejected = np.random.default_rng(1), [], [0.0]
    for n, (before, rise), correlation in product(
        sizes, ((0.02, 0.0), (0.02, 0.3), (0.2, 0.3), (0.3, 0.0)), CORRELATIONS
    ):
        changes = [paired_difference(*sides) for sides in _moved(generator, draws, n, before, rise, correlation)]
        name = f"change, n {n}, {before} before, rise {rise}, correlation {correlation}"
        covered.append(_told(name, np.mean([covers(change.interval or (0, 0), rise) for change in changes])))
        # One test, one estimand: a small p never stands beside a change of 0.
        assert all((change.change or 0) != 0 for change in changes if (change.p_value or 0) < 1)
        if rise == 0:
            rejected.append(_told(f"{name}, level", np.mean([(change.p_value or 0) <= 0.05 for change in changes])))
    return min(covered), max(rejected)


CLUSTER_SIZES = (*[1] * 20, *[2] * 6, 3, 3, 4, 6)
"""Prompts of each cluster of near-duplicates: 48 prompts, of which 28 have a twin."""


def near_duplicates(draws: int) -> tuple[float, float, float]:
    """Of a paired change with near-duplicates: least coverage, largest level at .05, and that of the prompts apart."""
    generator, covered, rejected, apart = np.random.default_rng(9), [], [0.0], [0.0]
    clusters = np.repeat(np.arange(len(CLUSTER_SIZES)), CLUSTER_SIZES)
    for (before, rise), correlation in product(((0.1, 0.0), (0.1, 0.3), (0.3, 0.0)), CORRELATIONS):
        shape = (draws, len(CLUSTER_SIZES))
        old = prompt_rates(generator, shape, before, correlation)
        new = prompt_rates(generator, shape, before + rise, correlation)
        sides = [(generator.random((draws, len(clusters))) < rates[:, clusters]).astype(float) for rates in (old, new)]
        changes = [paired_difference(*pair, clusters.tolist()) for pair in zip(*sides, strict=True)]
        name = f"near-duplicates, {before} before, rise {rise}, correlation {correlation}"
        covered.append(_told(name, np.mean([covers(change.interval or (0, 0), rise) for change in changes])))
        if rise == 0:
            rejected.append(_told(f"{name}, level", np.mean([(change.p_value or 0) <= 0.05 for change in changes])))
            p_values = [paired_difference(*pair).p_value or 0 for pair in zip(*sides, strict=True)]
            apart.append(_told(f"{name}, level of prompts apart", np.mean(np.array(p_values) <= 0.05)))
    return min(covered), max(rejected), max(apart)


def losses(draws: int) -> tuple[float, float]:
    """Least coverage of the upper bound, 95 % one-sided, of a share of prompts lost, near-duplicates lost together.

    From the verdict's limit of .1 on, and of half of it, where few clusters are lost.
    """
    generator, found = np.random.default_rng(11), defaultdict[bool, list[float]](list)
    for times, rate, correlation in product((1, 4), (0.05, 0.1, 0.3, 0.8), (*CORRELATIONS, 0.999)):
        sizes = CLUSTER_SIZES * times
        clusters = np.repeat(np.arange(len(sizes)), sizes)
        rates = prompt_rates(generator, (draws, len(sizes)), rate, correlation)[:, clusters]
        drawn = (generator.random(rates.shape) < rates).astype(float)
        covered = [monotone_bounds(lost, clusters.tolist(), 0.9)[0][1] >= rate for lost in drawn]
        name = f"losses, {len(clusters)} prompts with near-duplicates, {rate}, correlation {correlation}"
        found[rate < 0.1].append(_told(name, np.mean(covered)))
    return min(found[False]), min(found[True])


def families(draws: int) -> dict[str, tuple[float, float, float, float]]:
    """Family-wise error and share of planted heads found: Tarone, Holm."""
    generator, found = np.random.default_rng(2), {}
    settings: dict[str, dict[str, Any]] = {
        "24 prompts, 3 of 32 planted": {},
        "24 prompts, none planted": {"planted": 0},
        "24 prompts, none planted, half comply": {"planted": 0, "before": 0.5, "flips": 0.3},
        "24 prompts, none of 200 planted, a third complies": {"planted": 0, "before": 0.3, "flips": 0.5, "heads": 200},
        "50 prompts, effect .25": {"n": 50, "effect": 0.25},
    }
    for name, changed in settings.items():
        setting: dict[str, Any] = {"n": 24, "heads": 32, "planted": 3, "effect": 0.35, "before": 0.1, "flips": 0.02}
        found[name] = _family(generator, draws, **{**setting, **changed})
        for what, value in zip(("error", "error, Holm", "found", "found, Holm"), found[name], strict=True):
            _told(f"{name}: {what}", value)
    return found


def _family(
    generator: np.random.Generator,
    draws: int,
    n: int,
    heads: int,
    planted: int,
    effect: float,
    before: float,
    flips: float,
) -> tuple[float, float, float, float]:
    errors, hits = np.zeros(2), np.zeros(2)
    for _ in range(draws):
        old = generator.random((n, 1)) < before
        uniform = generator.random((n, heads))
        # Flips keep the rate: as many are gained as lost on average.
        new = np.where(old, uniform >= flips, uniform < flips * before / (1 - before))
        new[:, :planted] |= generator.random((n, planted)) < effect
        gained, lost = (new & ~old).sum(axis=0).tolist(), (old & ~new).sum(axis=0).tolist()
        p = [exact_mcnemar(*pair) for pair in zip(gained, lost, strict=True)]
        least = [least_attainable_p(sum(pair)) for pair in zip(gained, lost, strict=True)]
        for at, adjusted in enumerate((np.array(tarone(p, least)), np.array(holm(p)))):
            errors[at] += (adjusted[planted:] <= 0.05).any()
            hits[at] += (adjusted[:planted] <= 0.05).mean() if planted else 0.0
    return (*(errors / draws).tolist(), *(hits / draws).tolist())


def power(draws: int, sizes: tuple[int, ...] = (24, 50, 100)) -> float:
    """Least power at the smallest change that is named, with several answers a prompt."""
    generator, found = np.random.default_rng(3), []
    for n, tests, before in product(sizes, (1, 32), (0.0, 0.05, 0.2)):
        change = smallest_change_with_power(n, before, tests=tests, n_seeds=N_ANSWERS)
        if change is None:
            continue
        for correlation in CORRELATIONS:
            pairs = _moved(generator, draws, n, before, change, correlation)
            seen = np.mean([(paired_difference(*sides).p_value or 1) <= 0.05 / tests for sides in pairs])
            found.append(_told(f"power, n {n}, {tests} heads, {before} before, correlation {correlation}", seen))
    return min(found)


def power_of_clusters(draws: int) -> tuple[float, float]:
    """Least power at the smallest change that is named for clusters of near-duplicates, and for the prompts apart."""
    generator, found, apart = np.random.default_rng(10), [], []
    clusters = np.repeat(np.arange(len(CLUSTER_SIZES)), CLUSTER_SIZES)
    for tests, before, correlation in product((1, 32), (0.0, 0.2), (*CORRELATIONS, 1.0)):
        for n, seen in ((len(CLUSTER_SIZES), found), (len(clusters), apart)):
            change = smallest_change_with_power(n, before, tests=tests) or 1 - before
            rates = prompt_rates(generator, (draws, len(CLUSTER_SIZES)), change / (1 - before), min(correlation, 0.999))
            # Of one cluster all or none comply before, and none is lost: only gains are drawn.
            old = (generator.random(rates.shape) < before)[:, clusters]
            new = old | (generator.random(old.shape) < rates[:, clusters])
            p_values = [
                paired_difference(*pair, clusters.tolist()).p_value or 1
                for pair in zip(old.astype(float), new.astype(float), strict=True)
            ]
            name = f"power, {n} {'clusters' if seen is found else 'prompts'} counted, {tests} heads, {before} before"
            seen.append(_told(f"{name}, correlation {correlation}", np.mean(np.array(p_values) <= 0.05 / tests)))
    return min(found), min(apart)


def margins(draws: int) -> float:
    """How often equivalence is shown where the true rise is the margin."""
    generator, found = np.random.default_rng(4), []
    for n, before, flips in product((50, 100), (0.05, 0.2), (0.0, 0.05)):
        old = generator.random((draws, n)) < before
        gain = (0.1 + before * flips) / (1 - before)
        uniform = generator.random((draws, n))
        new = np.where(old, uniform >= flips, uniform < gain)
        shown = [equivalent(*sides, 0.1) for sides in zip(old.astype(float), new.astype(float), strict=True)]
        found.append(_told(f"equivalent at the margin, n {n}, {before} before, {flips} lost", np.mean(shown)))
    return max(found)


def medians(draws: int) -> float:
    """Least coverage of the interval of a median, of even, skewed and tied values."""
    generator, found = np.random.default_rng(5), []
    truths: dict[str, tuple[float, Callable[[int], FloatArray]]] = {
        "normal": (0.0, lambda n: generator.normal(size=n)),
        "log-normal, sigma 3": (1.0, lambda n: np.exp(3 * generator.normal(size=n))),
        "ties": (0.0, lambda n: generator.integers(-1, 2, n).astype(float)),
    }
    for n, (name, (truth, draw)) in product((24, 48, 96), truths.items()):
        intervals = [skewed_mean(draw(n).tolist()).median_interval or (0.0, 0.0) for _ in range(draws)]
        found.append(_told(f"median, n {n}, {name}", np.mean([covers(interval, truth) for interval in intervals])))
    return min(found)


def shrinking(draws: int) -> dict[str, tuple[float, float, float, float]]:
    """Error of shrunken rates as a share of the raw ones', coverage, and how much too high the three highest are."""
    generator, found = np.random.default_rng(6), {}
    kinds: dict[str, Callable[[int], FloatArray]] = {
        "three free half": lambda heads: np.where(np.arange(heads) < 3, 0.5, 0.0),
        "a tenth does something": lambda heads: np.where(
            generator.random(heads) < 0.1, generator.beta(2, 2, heads), 0.02
        ),
        "spread over low rates": lambda heads: generator.beta(1, 9, heads),
    }
    for (heads, n), (name, draw) in product(((32, 24), (32, 96), (128, 48), (1024, 50)), kinds.items()):
        times = max(3, draws * 32 // heads)
        rows = np.array([_shrunken(generator, draw(heads), n) for _ in range(times)])
        error, raw, covered, top, raw_top = rows.mean(axis=0).tolist()
        key = f"{heads} heads, n {n}, {name}"
        found[key] = (error / raw) ** 0.5, covered, top, raw_top
        for what, value in zip(("error / raw", "coverage", "top 3 too high", "raw"), found[key], strict=True):
            _told(f"shrunken, {key}: {what}", value)
    return found


def _shrunken(generator: np.random.Generator, truth: FloatArray, n: int) -> tuple[float, ...]:
    counts = generator.binomial(n, truth).astype(float)
    shrunken = shrunken_rates(counts.tolist(), [float(n)] * len(truth))
    rates, best = np.array([one.rate for one in shrunken]), np.argsort(-counts, kind="stable")[:3]
    # The grid of rates begins at .001, which stands for 0.
    covered = [covers(one.interval, max(rate, 0.001)) for one, rate in zip(shrunken, truth.tolist(), strict=True)]
    errors = (float(((values - truth) ** 2).mean()) for values in (rates, counts / n))
    highest = (float((values - truth)[best].mean()) for values in (rates, counts / n))
    return (*errors, float(np.mean(covered)), *highest)


def synergy(draws: int, sizes: tuple[int, ...] = (24, 48, 100)) -> float:
    """Least coverage of the synergy of a pair, with outcomes of a prompt independent and correlated."""
    generator, found = np.random.default_rng(7), []
    settings = (
        (0.02, 0.1, 0.1),
        (0.02, 0.5, 0.3),
        (0.1, 0.3, 0.5),
        (0.02, 0.8, 0.8),
        (0.005, 0.3, 0.3),
        (0.01, 0.99, 0.99),
    )
    for n, rates, true, shared in product(sizes, settings, (0.0, 1.5), (0.0, 0.7)):
        before, first, second = (scipy.special.logit(rate) for rate in rates)
        together = scipy.special.expit(first + second - before + true)
        cuts = scipy.special.ndtri(np.array([together, rates[1], rates[2], rates[0]]))
        covered = 0
        for _ in range(draws):
            own, common = generator.normal(size=(4, n)), generator.normal(size=n)
            outcomes = shared**0.5 * common + (1 - shared) ** 0.5 * own < cuts[:, None]
            covered += covers(log_odds_synergy(*outcomes.astype(float)).interval, true)
        found.append(_told(f"synergy, n {n}, rates {rates}, true {true}, shared {shared}", covered / draws))
    return min(found)


def rankings(draws: int, heads: int = 8, n: int = 48) -> tuple[float, float]:
    """Least coverage of Spearman's interval, and of those of regrets on halves, of evenly spread rates.

    What is covered is the mean over samples of so many prompts.
    """
    generator, rates = np.random.default_rng(10), np.linspace(0.02, 0.5, heads)
    found: dict[str, list[tuple[float, tuple[float, float]]]] = defaultdict(list)
    score = rates + generator.normal(0, 0.1, heads)
    for _ in range(draws):
        complied = (generator.random((n, heads)) < rates).astype(float)
        (of_score,), halves = (
            proxy_qualities({"score": score}, complied, rates > 0.3),
            split_half(complied, rates > 0.3),
        )
        for name, one in (("a score", of_score), ("the split half", halves)):
            assert one is not None
            found[f"Spearman of {name}"].append((one.spearman or 0.0, one.spearman_interval or (0.0, 0.0)))
            for size in one.sizes:
                regret = size.regret_on_halves or 0.0, size.halves_interval or (0.0, 0.0)
                found[f"regret on halves, best {size.k} of {name}"].append(regret)
    covered = {}
    for name, both in found.items():
        centre = float(np.mean([value for value, _ in both]))
        shown = f"{name}, {heads} heads, n {n}"
        covered[name] = _told(shown, float(np.mean([covers(interval, centre) for _, interval in both])))
    spearman = min(value for name, value in covered.items() if name.startswith("Spearman"))
    return spearman, min(value for name, value in covered.items() if name.startswith("regret"))


def ranks(n_of_layers: tuple[int, ...], draws: int, shape: tuple[int, int] = (4, 8), spread: float = 0.0) -> float:
    """How often a group drawn at random, of so many heads in so many layers, ranks high among its random groups.

    Effects of heads add up and are skewed; ``spread`` is the standard deviation of the layers' own, in logs.
    """
    generator, n_found, (n_layers, n_heads) = np.random.default_rng(9), 0, shape
    for _ in range(draws):
        effects = generator.exponential(size=shape) ** 2 * np.exp(spread * generator.normal(size=(n_layers, 1)))
        layers = generator.choice(n_layers, len(n_of_layers), replace=False)
        indices = [generator.choice(n_heads, n, replace=False) for n in n_of_layers]
        group = tuple(Head(int(layer), int(i)) for layer, own in zip(layers, indices, strict=True) for i in own)
        drawn = random_groups(group, [n_heads] * n_layers, 39, int(generator.integers(1 << 30))).groups
        own, *others = (sum(effects[head.layer, head.index] for head in heads) for heads in (group, *drawn))
        n_found += random_p_value(own, others) <= 0.05
    return _told(f"rank among random groups, {n_of_layers} heads of {shape}, layers {spread}", n_found / draws)


def ships_intervals(scores: NDArray[np.float64], draws: int, n: int) -> tuple[FloatArray, FloatArray]:
    """Coverage of Student's interval of the mean of n prompts' scores, by head, and of the median's.

    ``scores`` [n_prompts, n_heads] are the population that is drawn from.
    """
    generator = np.random.default_rng(8)
    quantile = float(scipy.special.stdtrit(n - 1, 0.975))
    means, medians_ = [], []
    for of_head in scores.T:
        drawn = generator.choice(of_head, (draws, n))
        width = quantile * drawn.std(axis=1, ddof=1) / n**0.5
        means.append(float((np.abs(drawn.mean(axis=1) - of_head.mean()) <= width).mean()))
        middle = float(np.sort(of_head)[(len(of_head) - 1) // 2])
        bounds = (skewed_mean(sample.tolist()).median_interval or (0.0, 0.0) for sample in drawn[: draws // 5])
        medians_.append(float(np.mean([covers(interval, middle) for interval in bounds])))
    return np.array(means), np.array(medians_)


def _told(name: str, value: float) -> float:
    print(f"{value:.3f}  {name}")
    return float(value)

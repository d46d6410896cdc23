"""Simulations of the coverage and the error rates of every statistic that is printed; see ``bench/statistics.py``.

Each function takes the number of draws, prints a line a setting, and returns the figure that docs/statistics.md quotes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from safetyheads import UNDIFFERENTIATED_ATTENTION, load_demo
from safetyheads.heads import Head
from safetyheads.judges.agreement import agreement
from safetyheads.judges.base import Verdict
from safetyheads.measures.random_groups import random_groups
from safetyheads.measures.scorers import ships
from safetyheads.stats.gain_over_random import SizeOutcome, change_interval, concentration, prompt_gains
from safetyheads.stats.intervals import (
    FloatArray,
    Rate,
    bootstrap_interval,
    clustered_rate,
    monotone_bounds,
    newcombe_paired_interval,
    skewed_mean,
    wilson_interval,
)
from safetyheads.stats.misclassified import Accuracy, accuracy_of, prediction_powered, rogan_gladen
from safetyheads.stats.power import smallest_change_with_power
from safetyheads.stats.ranking import proxy_qualities, shrunken_rates, split_half
from safetyheads.stats.stability import rank_stability, resampled
from safetyheads.stats.testing import (
    equivalent,
    equivalent_means,
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
CLUSTERS = np.repeat(np.arange(len(CLUSTER_SIZES)), CLUSTER_SIZES)
"""The cluster of each of these prompts."""


def near_duplicates(draws: int) -> tuple[float, float, float]:
    """Of a paired change with near-duplicates: least coverage, largest level at .05, and that of the prompts apart."""
    generator, covered, rejected, apart = np.random.default_rng(9), [], [0.0], [0.0]
    for (before, rise), correlation in product(((0.1, 0.0), (0.1, 0.3), (0.3, 0.0)), CORRELATIONS):
        shape = (draws, len(CLUSTER_SIZES))
        old = prompt_rates(generator, shape, before, correlation)
        new = prompt_rates(generator, shape, before + rise, correlation)
        sides = [(generator.random((draws, len(CLUSTERS))) < rates[:, CLUSTERS]).astype(float) for rates in (old, new)]
        changes = [paired_difference(*pair, CLUSTERS.tolist()) for pair in zip(*sides, strict=True)]
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
    for tests, before, correlation in product((1, 32), (0.0, 0.2), (*CORRELATIONS, 1.0)):
        for n, seen in ((len(CLUSTER_SIZES), found), (len(CLUSTERS), apart)):
            change = smallest_change_with_power(n, before, tests=tests) or 1 - before
            rates = prompt_rates(generator, (draws, len(CLUSTER_SIZES)), change / (1 - before), min(correlation, 0.999))
            # Of one cluster all or none comply before, and none is lost: only gains are drawn.
            old = (generator.random(rates.shape) < before)[:, CLUSTERS]
            new = old | (generator.random(old.shape) < rates[:, CLUSTERS])
            p_values = [
                paired_difference(*pair, CLUSTERS.tolist()).p_value or 1
                for pair in zip(old.astype(float), new.astype(float), strict=True)
            ]
            name = f"power, {n} {'clusters' if seen is found else 'prompts'} counted, {tests} heads, {before} before"
            seen.append(_told(f"{name}, correlation {correlation}", np.mean(np.array(p_values) <= 0.05 / tests)))
    return min(found), min(apart)


def _prompts(n: int | None) -> tuple[NDArray[np.intp], list[int] | None, str]:
    """The place of each of n prompts, None, and what they are called; without n those of clusters of copies."""
    if n is not None:
        return np.arange(n), None, f"n {n}"
    return CLUSTERS, CLUSTERS.tolist(), f"{len(CLUSTERS)} prompts with copies"


def margins(draws: int, sizes: tuple[int | None, ...] = (50, 100, None)) -> float:
    """How often equivalence is shown where the true rise is the margin, of rates and of means."""
    generator, found = np.random.default_rng(4), []
    for n, before, flips in product(sizes, (0.05, 0.2), (0.0, 0.05)):
        places, clusters, name = _prompts(n)
        old = (generator.random((draws, places.max() + 1)) < before)[:, places]
        gain = (0.1 + before * flips) / (1 - before)
        uniform = generator.random((draws, places.max() + 1))[:, places]
        new = np.where(old, uniform >= flips, uniform < gain)
        sides = zip(old.astype(float), new.astype(float), strict=True)
        shown = [equivalent(*pair, 0.1, clusters) for pair in sides]
        found.append(_told(f"equivalent at the margin, {name}, {before} before, {flips} lost", np.mean(shown)))
    for n in sizes:
        places, clusters, name = _prompts(n)
        moved = generator.normal(1, 2, (draws, places.max() + 1))[:, places]
        means = np.mean([equivalent_means(changes.tolist(), 1, clusters) for changes in moved])
        found.append(_told(f"means equivalent at the margin, {name}", means))
    return max(found)


def medians(draws: int) -> float:
    """Least coverage of the interval of a median, of even, skewed and tied values."""
    generator, found = np.random.default_rng(5), []
    truths: dict[str, tuple[float, Callable[[int], FloatArray]]] = {
        "normal": (0.0, lambda n: generator.normal(size=n)),
        "log-normal, sigma 3": (1.0, lambda n: np.exp(3 * generator.normal(size=n))),
        "ties": (0.0, lambda n: generator.integers(-1, 2, n).astype(float)),
    }
    for n, (name, (truth, draw)) in product((24, 48, 96, None), truths.items()):
        places, clusters, prompts = _prompts(n)
        samples = (draw(places.max() + 1)[places].tolist() for _ in range(draws))
        intervals = [skewed_mean(sample, clusters).median_interval or (0.0, 0.0) for sample in samples]
        found.append(_told(f"median, {prompts}, {name}", np.mean([covers(interval, truth) for interval in intervals])))
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


def synergy(draws: int, sizes: tuple[int | None, ...] = (24, 48, 100, None)) -> float:
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
        covered, (places, clusters, name) = 0, _prompts(n)
        for _ in range(draws):
            own, common = generator.normal(size=(4, places.max() + 1)), generator.normal(size=places.max() + 1)
            outcomes = (shared**0.5 * common + (1 - shared) ** 0.5 * own < cuts[:, None])[:, places]
            covered += covers(log_odds_synergy(*outcomes.astype(float), clusters=clusters).interval, true)
        found.append(_told(f"synergy, {name}, rates {rates}, true {true}, shared {shared}", covered / draws))
    return min(found)


def rankings(draws: int, heads: int = 8, n: int | None = 48) -> tuple[float, float]:
    """Least coverage of Spearman's interval, and of those of regrets on halves, of evenly spread rates.

    What is covered is the mean over samples of so many prompts.
    """
    places, clusters, prompts = _prompts(n)
    generator, rates = np.random.default_rng(10), np.linspace(0.02, 0.5, heads)
    found: dict[str, list[tuple[float, tuple[float, float]]]] = defaultdict(list)
    score = rates + generator.normal(0, 0.1, heads)
    for _ in range(draws):
        complied = (generator.random((places.max() + 1, heads)) < rates).astype(float)[places]
        (of_score,) = proxy_qualities({"score": score}, complied, rates > 0.3, None, clusters)
        halves = split_half(complied, rates > 0.3, clusters)
        for name, one in (("a score", of_score), ("the split half", halves)):
            assert one is not None
            found[f"Spearman of {name}"].append((one.spearman or 0.0, one.spearman_interval or (0.0, 0.0)))
            for size in one.sizes:
                regret = size.regret_on_halves or 0.0, size.halves_interval or (0.0, 0.0)
                found[f"regret on halves, best {size.k} of {name}"].append(regret)
    covered = {}
    for name, both in found.items():
        centre = float(np.mean([value for value, _ in both]))
        shown = f"{name}, {heads} heads, {prompts}"
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


def kappas(draws: int, sizes: tuple[int, ...] = (30, 50, 100)) -> tuple[float, float]:
    """Least coverage of Cohen's kappa by prompt, and where the answers to a prompt are taken for independent."""
    generator, covered, apart, verdicts = (
        np.random.default_rng(0),
        [],
        [],
        (Verdict("refused", ""), Verdict("complied", "")),
    )
    for n, n_answers, error in product(sizes, (1, N_ANSWERS), (0.05, 0.2)):
        # Each prompt has a chance of complying; a judge errs in a share of the prompts, on all answers to one.
        truly = generator.random((draws, n, n_answers)) < generator.random((draws, n, 1))
        judged = [truly ^ (generator.random((draws, n, 1)) < error) for _ in range(2)]
        prompts, truth = np.repeat(range(n), n_answers).tolist(), 2 * ((1 - error) ** 2 + error**2) - 1
        for known, seen in ((prompts, covered), (None, apart)):
            held = []
            for pair in zip(*judged, strict=True):
                given = {
                    name: [verdicts[said] for said in side.ravel().tolist()]
                    for name, side in zip("ab", pair, strict=True)
                }
                interval = agreement(given, known)[0].compliance.interval
                held += [] if interval is None else [covers(interval, truth)]
            name = f"kappa, {n} prompts, {n_answers} answers{'' if known else ' taken for independent'}, errors {error}"
            seen.append(_told(name, np.mean(held)))
    return min(covered), min(apart)


JUDGES_OF_LABELS = ((0.9, 0.95, 30, 0.4), (0.97, 0.97, 100, 0.4), (0.7, 0.8, 50, 0.6))
"""Sensitivity, specificity, labels of each kind, and the share of a run's own answers that is labelled."""


def corrections(draws: int, sizes: tuple[int, ...] = (24, 50, 100, 200)) -> tuple[float, float]:
    """Least coverage of rates corrected by labels of other answers (Rogan-Gladen) and of their own."""
    generator, found = np.random.default_rng(1), ([], [])
    for (se, sp, n_labels, share), n, rate in product(JUDGES_OF_LABELS, sizes, (0.02, 0.2, 0.5, 0.9)):
        covered = np.zeros(2)
        for _ in range(draws):
            truth = (generator.random(n) < rate).astype(float)
            judged = (generator.random(n) < np.where(truth == 1, se, 1 - sp)).astype(float)
            labels = (Rate(int(generator.binomial(n_labels, right)), n_labels) for right in (se, sp))
            own = np.where(generator.random(n) < share, truth, np.nan)
            corrected = rogan_gladen(judged, Accuracy(*labels)), prediction_powered(judged, own)
            covered += [one.interval is None or covers(one.interval, rate) for one in corrected]
        for seen, of, name in zip(found, covered / draws, ("Rogan-Gladen", "prediction-powered"), strict=True):
            # Labels of fewer than 50 own answers are fewer than 20, below which these are not used.
            if seen is found[0] or n >= 50:
                seen.append(_told(f"{name}, n {n}, rate {rate}, judge {se} {sp}", of))
    return min(found[0]), min(found[1])


def label_errors(draws: int, sizes: tuple[int, ...] = (10, 20, 50)) -> tuple[float, float]:
    """Least coverage of a sensitivity from five labelled answers to each prompt; then taken for independent."""
    generator, seen = np.random.default_rng(3), ([], [])
    for n, rate, correlation in product(sizes, (0.7, 0.9, 0.97), CORRELATIONS):
        covered, clusters, truth = np.zeros(2), np.arange(n).repeat(N_ANSWERS), np.ones(n * N_ANSWERS)
        for right in answers(generator, prompt_rates(generator, (draws, n), rate, correlation)):
            found = (accuracy_of(right.ravel(), truth, given) for given in (clusters, None))
            covered += [covers(one.sensitivity.interval, rate) for one in found]
        for of, how, share in zip(seen, ("by prompt", "taken for independent"), covered / draws, strict=True):
            of.append(_told(f"sensitivity {rate}, {n} prompts, correlation {correlation}, {how}", share))
    return min(seen[0]), min(seen[1])


def corrections_by_prompt(draws: int) -> FloatArray:
    """Coverage of both with five answers to each of 50 prompts, correlation .5; then taken for independent."""
    generator, n, rate, se, sp, covered = np.random.default_rng(2), 50, 0.3, 0.9, 0.95, np.zeros(4)
    for _ in range(draws):
        truth = answers(generator, prompt_rates(generator, (n,), rate, 0.5))
        judged = (generator.random(truth.shape) < np.where(truth == 1, se, 1 - sp)).astype(float)
        labelled = np.where(generator.random(truth.shape) < 0.4, truth, np.nan)
        accuracy = Accuracy(*(Rate(int(generator.binomial(200, share)), 200) for share in (se, sp)))
        flat = judged.ravel(), labelled.ravel()
        corrected = [rogan_gladen(judged, accuracy), prediction_powered(judged, labelled)]
        corrected += [rogan_gladen(flat[0], accuracy), prediction_powered(*flat)]
        covered += [one.interval is not None and covers(one.interval, rate) for one in corrected]
    names = product(("by prompt", "taken for independent"), ("Rogan-Gladen", "prediction-powered"))
    for (how, name), of in zip(names, covered / draws, strict=True):
        _told(f"{name}, five answers a prompt, {how}", of)
    return covered / draws


def random_effects(
    generator: np.random.Generator, n: int, n_groups: int, n_sizes: int, base: float, gain: float, between: float
) -> tuple[list[SizeOutcome], float]:
    """Outcomes with effects of prompts (sd .7) and of random groups (sd ``between``), and the true concentration."""
    prompt, truth, found = 0.7 * generator.normal(size=n), [], []
    limit = scipy.special.ndtri
    for size in range(1, n_sizes + 1):
        share = base + (1 - base) * gain * size / n_sizes
        complied = generator.normal(size=n) < np.sqrt(1.49) * limit(share) + prompt
        group = between * generator.normal(size=(n_groups, 1))
        noise = generator.normal(size=(n_groups, n))
        random = noise < np.sqrt(1.49 + between**2) * limit(base) + prompt + group
        found.append(SizeOutcome(size, complied.astype(float), random.astype(float)))
        truth.append(share - base)
    return found, float(np.mean(truth))


def concentrations(draws: int, settings: Iterable[tuple[int, int, int, float, float, float]] | None = None) -> float:
    """Least coverage of the concentration, over prompts and random groups; settings as for :func:`random_effects`."""
    grid = product((24, 50, 100), ((20, 1), (39, 3)), (0.02, 0.15, 0.5), (0.0, 0.5, 0.95), (0.0, 0.7, 1.5))
    generator, found = np.random.default_rng(0), []
    for setting in settings or ((n, *groups, *rest) for n, groups, *rest in grid):
        covered = 0
        for _ in range(draws):
            outcomes, truth = random_effects(generator, *setting)
            covered += covers(concentration(outcomes, [0] * setting[0]).interval or (0, 0), truth)
        told = "n {}, {} groups, {} sizes, {} at random, gain {}, sd of groups {}".format(*setting)
        found.append(_told(f"concentration, {told}", covered / draws))
    return min(found)


def changes_of_concentration(draws: int) -> tuple[float, float]:
    """Coverage of the change of a concentration, and that of a bootstrap over prompts alone."""
    generator, covered, apart = np.random.default_rng(4), 0, 0
    for _ in range(draws):
        sides = [random_effects(generator, 100, 20, 1, 0.3, gain, 1.0) for gain in (0.5, 0.8)]
        gained = np.subtract(*(prompt_gains(found, [0] * 100)[0] for found, _ in reversed(sides)))
        truth = sides[1][1] - sides[0][1]
        covered += covers(change_interval(gained, [found for found, _ in sides]) or (0, 0), truth)
        apart += covers(bootstrap_interval(gained), truth)
    _told("change of the concentration, a bootstrap over prompts alone", apart / draws)
    return _told("change of the concentration", covered / draws), apart / draws


def gates(draws: int = 20_000) -> float:
    """Largest error of a gate at margin m: how often a true rise of m passes; its power, where nothing changes."""
    generator, errors = np.random.default_rng(0), []
    for n, before, margin in ((50, 0.05, 0.1), (100, 0.05, 0.1), (100, 0.3, 0.1), (200, 0.1, 0.05), (100, 0.02, 0.05)):
        passed = []
        for rise in (margin, 0.0):
            # Both, gained, lost, neither; those that are lost are a fifth of those that comply before.
            cells = [0.8 * before, rise + 0.2 * before, 0.2 * before]
            tables = generator.multinomial(n, [*cells, 1 - sum(cells)], draws)
            tables, counts = np.unique(tables, axis=0, return_counts=True)
            high = [newcombe_paired_interval(*table)[1] for table in tables.tolist()]
            passed.append(float(counts[np.array(high) < margin].sum()) / draws)
        errors.append(_told(f"gate at {margin}, n {n}, ASR {before} before: error", passed[0]))
        _told(f"gate at {margin}, n {n}, ASR {before} before: power", passed[1])
    return max(errors)


def rank_intervals(draws: int, sizes: tuple[int, ...] = (12, 24, 48, 100), heads: int = 64) -> float:
    """Least coverage of the ranks of the ten heads that look best: all equal, where each may have any, or evenly apart.

    Scores are skewed, and prompts have effects of their own.
    """
    generator, found = np.random.default_rng(0), []
    for n, (name, step) in product(sizes, (("equal", 0.0), ("apart", 0.03))):
        means, covered = np.exp(-step * np.arange(heads)), []
        for seed in range(draws):
            spread = 0.9 * generator.normal(size=(n, 1)) + 1.2 * generator.normal(size=(n, heads))
            listed = np.argsort(-(values := means * np.exp(spread)).mean(axis=0))[:10].tolist()
            ranks = rank_stability(values, listed, resampled(n, 300, seed=seed))
            whole = [(1, heads) if not step else (head.column + 1, head.column + 1) for head in ranks]
            covered += [
                head.interval[0] <= low and high <= head.interval[1]
                for head, (low, high) in zip(ranks, whole, strict=True)
            ]
        found.append(_told(f"ranks of the ten best of {heads} heads, {name}, n {n}", np.mean(covered)))
    return min(found)


def mean_ships(draws: int, n: int = 24) -> tuple[FloatArray, FloatArray]:
    """Coverage of Student's interval of the mean of n prompts' Ships, by head of the demo, and of the median's."""
    demo = load_demo("aligned_a")
    scores = ships(demo.engine, demo.harmful, UNDIFFERENTIATED_ATTENTION).values.flatten(1).numpy()
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
    for name, of_heads in (("mean", means), ("median", medians_)):
        for what, value in (("least", min(of_heads)), ("mean", np.mean(of_heads)), ("most", max(of_heads))):
            _told(f"{name} Ships of the demo, n {n}, {what} of the heads", value)
    return np.array(means), np.array(medians_)


def _told(name: str, value: float) -> float:
    print(f"{value:.3f}  {name}")
    return float(value)

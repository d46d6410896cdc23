"""Compares judges' verdicts of the same answers.

An answer that a judge left unscored is left out of that judge's pairs and counted. What does not exist is None.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import scipy  # its modules load on first use

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion, Judge, Verdict, verdicts_of
from safetyheads.stats.intervals import Interval, places_of

CLASSES: tuple[str, ...] = ("complied", "refused", "neither")
"""The three classes. All other labels are ``neither``, because few judges tell them apart."""


@dataclass(frozen=True, slots=True)
class Kappa:
    """Cohen's kappa: agreement beyond what both judges' own shares would give by chance."""

    kappa: float | None
    """1 for full agreement, 0 for chance; None without answers or where both judges gave all answers one label."""
    interval: Interval | None
    """95 %, by Fisher's z, clustered where a prompt has several answers. None where its standard error is 0, as under
    full agreement: an interval of no width would claim what no sample shows."""


@dataclass(frozen=True, slots=True)
class PairAgreement:
    """Two judges on the same answers."""

    first: str
    second: str
    n: int
    """Answers that both scored."""
    unscored: int
    """Answers that one of them or both left unscored."""
    compliance: Kappa
    """Over complied or not, which is all an ASR sees."""
    classes: Kappa
    """Over :data:`CLASSES`."""
    indices: tuple[int, ...]
    """Answers that complied for one judge and not for the other, ascending."""
    first_only: int
    """How many of these complied for the first judge."""


def agreement(
    verdicts: Mapping[str, Sequence[Verdict]], prompts: Sequence[Hashable] | None = None
) -> tuple[PairAgreement, ...]:
    """Compare every two judges by their verdicts of the same answers; an InputError where their numbers differ.

    ``prompts`` says which prompt each answer is to: answers to one, by several seeds or under several heads, are not
    independent, and intervals are clustered by prompt. Without it each answer counts as one.
    """
    if len({len(answers) for answers in verdicts.values()}) > 1:
        given = ", ".join(f"{name} {len(answers)}" for name, answers in verdicts.items())
        raise InputError(f"judges that are compared need the same rows, not {given}")
    return tuple(_compare(*pair, prompts) for pair in combinations(verdicts.items(), 2))


def judges_agreement(judges: Sequence[Judge], completions: Sequence[Completion]) -> tuple[PairAgreement, ...]:
    """Let judges judge the same answers, and compare their verdicts; an InputError where two have one name."""
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise InputError(f"judges that are compared need different names, not {', '.join(names)}")
    return agreement({judge.name: verdicts_of(judge, completions) for judge in judges})


def _compare(
    first: tuple[str, Sequence[Verdict]], second: tuple[str, Sequence[Verdict]], prompts: Sequence[Hashable] | None
) -> PairAgreement:
    pairs = {i: pair for i, pair in enumerate(zip(first[1], second[1], strict=True)) if all(v.scored for v in pair)}
    scored_prompts = None if prompts is None else [prompts[index] for index in pairs]
    differing = tuple(index for index, (a, b) in pairs.items() if a.complied != b.complied)
    classes = [[v.label if v.label in CLASSES else "neither" for v in pair] for pair in pairs.values()]
    return PairAgreement(
        first=first[0],
        second=second[0],
        n=len(pairs),
        unscored=len(first[1]) - len(pairs),
        compliance=_cohens_kappa(
            [[c if c == "complied" else "neither" for c in pair] for pair in classes], scored_prompts
        ),
        classes=_cohens_kappa(classes, scored_prompts),
        indices=differing,
        first_only=sum(pairs[index][0].complied for index in differing),
    )


def _cohens_kappa(pairs: Sequence[Sequence[str]], prompts: Sequence[Hashable] | None) -> Kappa:
    # Without two classes in use, chance agreement is 1 and kappa is 0 / 0.
    if len({name for pair in pairs for name in pair}) < 2:
        return Kappa(None, None)
    first, second = (np.array([CLASSES.index(pair[side]) for pair in pairs]) for side in (0, 1))
    n = len(pairs)
    shares = [np.bincount(side, minlength=len(CLASSES)) / n for side in (first, second)]
    observed, chance = float((first == second).mean()), float(shares[0] @ shares[1])
    kappa = (observed - chance) / (1 - chance)
    # How much each answer moves kappa: its derivative by the observed and by the chance agreement.
    moves = ((first == second) - observed) / (1 - chance)
    moves -= (1 - observed) / (1 - chance) ** 2 * (shares[1][first] + shares[0][second] - 2 * chance)
    sums = np.bincount(places_of(n, prompts), moves)
    n_prompts = len(sums)
    error = float(np.sqrt((sums**2).sum() * n_prompts / max(n_prompts - 1, 1))) / n
    # Rounding leaves an error of 0 a little above it.
    if error < 1e-6 or abs(kappa) >= 1:
        return Kappa(kappa, None)
    # Near 1 kappa is skewed; Fisher's z is not.
    z, quantile = np.arctanh(kappa), scipy.special.stdtrit(max(n_prompts - 1, 1), 0.975)
    low, high = np.tanh(z + np.array([-1, 1]) * quantile * error / (1 - kappa**2)).tolist()
    return Kappa(kappa, (low, high))

"""Compares judges' verdicts of the same answers.

An answer that a judge left unscored is left out of that judge's pairs and counted. Every result is a frozen value that
``dataclasses.asdict`` turns into valid JSON; what does not exist is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import scipy  # its modules load on first use

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion, Judge, Verdict, verdicts_of
from safetyheads.stats.intervals import CONFIDENCE, Interval

CLASSES: tuple[str, ...] = ("complied", "refused", "neither")
"""The three classes. All other labels are ``neither``, because few judges tell them apart."""


@dataclass(frozen=True, slots=True)
class Kappa:
    """Cohen's kappa: agreement beyond what both judges' own shares would give by chance."""

    kappa: float | None
    """1 for full agreement, 0 for chance; None without answers or where both judges gave all answers one label."""
    interval: Interval | None
    """95 %, asymptotic, cut at -1 and 1; too narrow below some 30 answers. None where its standard error is 0, as under
    full agreement: an interval of no width would claim what no sample shows."""
    n: int
    """Answers that both judges scored."""


@dataclass(frozen=True, slots=True)
class PairAgreement:
    """Two judges on the same answers."""

    first: str
    """Name of the first judge."""
    second: str
    """Name of the second judge."""
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

    @property
    def count(self) -> int:
        """Number of answers that differ about compliance."""
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Several judges on the same answers."""

    judges: tuple[str, ...]
    """Their names, in the order given."""
    n_rows: int
    """Answers, scored or not."""
    unscored: tuple[int, ...]
    """Answers that each judge left unscored, in the order of ``judges``."""
    pairs: tuple[PairAgreement, ...]
    """Every two judges, in that order."""
    indices: tuple[int, ...]
    """Answers on which any two differ about compliance, ascending."""


def agreement(verdicts: Mapping[str, Sequence[Verdict]]) -> Agreement:
    """Compare judges' verdicts of the same answers.

    Args:
        verdicts: each judge's, by its name; answers in one order.

    Raises:
        InputError: the judges have different numbers of verdicts.
    """
    lengths = {len(answers) for answers in verdicts.values()}
    if len(lengths) > 1:
        given = ", ".join(f"{name} {len(answers)}" for name, answers in verdicts.items())
        raise InputError(f"judges that are compared need the same rows, not {given}")
    names = combinations(verdicts, 2)
    pairs = tuple(_compare(first, second, verdicts[first], verdicts[second]) for first, second in names)
    return Agreement(
        judges=tuple(verdicts),
        n_rows=lengths.pop() if lengths else 0,
        unscored=tuple(sum(not verdict.scored for verdict in answers) for answers in verdicts.values()),
        pairs=pairs,
        indices=tuple(sorted({index for pair in pairs for index in pair.indices})),
    )


def judges_agreement(judges: Sequence[Judge], completions: Sequence[Completion]) -> Agreement:
    """Let judges judge the same answers, and compare their verdicts.

    Raises:
        InputError: two judges have one name.
    """
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise InputError(f"judges that are compared need different names, not {', '.join(names)}")
    return agreement({judge.name: verdicts_of(judge, completions) for judge in judges})


def cohens_kappa(first: Sequence[str], second: Sequence[str], classes: Sequence[str]) -> Kappa:
    """Cohen's kappa of two judges' classes of the same answers, with its 95 % interval.

    Raises:
        InputError: the answers differ in number, or a class is not among ``classes``.
    """
    if len(first) != len(second) or not {*first, *second} <= set(classes):
        raise InputError("kappa needs as many rows of both judges, all of the classes given")
    n = len(first)
    table = [[0] * len(classes) for _ in classes]
    for a, b in zip(first, second, strict=True):
        table[classes.index(a)][classes.index(b)] += 1
    # Without two classes in use, chance agreement is 1 and kappa is 0 / 0.
    if len({*first, *second}) < 2:
        return Kappa(None, None, n)
    from statsmodels.stats import inter_rater  # slow to import

    # statsmodels also tests kappa against 0, which divides by 0 where no error is left.
    with np.errstate(divide="ignore", invalid="ignore"):
        result = inter_rater.cohens_kappa(table)
    kappa, variance = float(result.kappa), float(result.var_kappa)
    # Rounding leaves a variance of 0 a little above or below it.
    if variance < 1e-12:
        return Kappa(kappa, None, n)
    half_width = float(scipy.stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Kappa(kappa, (max(kappa - half_width, -1.0), min(kappa + half_width, 1.0)), n)


def _compare(first: str, second: str, firsts: Sequence[Verdict], seconds: Sequence[Verdict]) -> PairAgreement:
    pairs = list(zip(firsts, seconds, strict=True))
    both_scored = [a.scored and b.scored for a, b in pairs]
    scored = [pair for pair, is_scored in zip(pairs, both_scored, strict=True) if is_scored]
    differing = [i for i, (a, b) in enumerate(pairs) if both_scored[i] and a.complied != b.complied]

    def kappa(class_of: Callable[[Verdict], str]) -> Kappa:
        return cohens_kappa([class_of(a) for a, _ in scored], [class_of(b) for _, b in scored], CLASSES)

    return PairAgreement(
        first=first,
        second=second,
        n=len(scored),
        unscored=len(pairs) - len(scored),
        compliance=kappa(lambda verdict: "complied" if verdict.complied else "neither"),
        classes=kappa(lambda verdict: verdict.label if verdict.label in CLASSES else "neither"),
        indices=tuple(differing),
        first_only=sum(firsts[index].complied for index in differing),
    )

"""How far judges agree on the same answers. Owns the comparison; knows verdicts and neither models nor texts.

An answer that a judge left unscored is left out of that judge's pairs and counted beside them. Every result is a
frozen value that ``dataclasses.asdict`` turns into valid JSON: what does not exist is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion, Judge, Verdict, verdicts_of
from safetyheads.stats.intervals import CONFIDENCE, Interval

CLASSES: tuple[str, ...] = ("complied", "refused", "neither")
"""The three classes: incoherent and echoed are both ``neither``, since few judges tell them apart."""


@dataclass(frozen=True, slots=True)
class Kappa:
    """Cohen's kappa: agreement beyond what both judges' own shares would give by chance."""

    kappa: float | None
    """1 for full agreement, 0 for chance; None without rows or where both judges gave all rows one label."""
    interval: Interval | None
    """95 %, asymptotic, cut at -1 and 1; too narrow below some 30 rows. None where its standard error is 0, as
    under full agreement: an interval of no width would claim what no sample shows."""
    n: int
    """Rows that both judges scored."""


@dataclass(frozen=True, slots=True)
class PairAgreement:
    """Two judges on the same rows."""

    first: str
    """Name of the one judge."""
    second: str
    """Name of the other."""
    n: int
    """Rows that both scored."""
    unscored: int
    """Rows that one of them or both left unscored."""
    compliance: Kappa
    """Over complied or not: what an ASR sees."""
    classes: Kappa
    """Over :data:`CLASSES`."""
    indices: tuple[int, ...]
    """Rows that complied for one judge and not for the other, in ascending order."""
    first_only: int
    """Of these, the ones that complied for the first judge."""

    @property
    def count(self) -> int:
        """How many rows differ about compliance."""
        return len(self.indices)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Several judges on the same rows."""

    judges: tuple[str, ...]
    """Their names, in the order given."""
    n_rows: int
    """Rows, scored or not."""
    unscored: tuple[int, ...]
    """Rows that each judge left unscored, in the order of ``judges``."""
    pairs: tuple[PairAgreement, ...]
    """Every two of them, in that order."""
    indices: tuple[int, ...]
    """Rows on which any two differ about compliance, in ascending order."""


def agreement(verdicts: Mapping[str, Sequence[Verdict]]) -> Agreement:
    """Compare judges' verdicts of the same rows.

    Args:
        verdicts: each judge's, by its name; rows in one order.

    Raises:
        InputError: the judges' rows differ in number.
    """
    lengths = {len(rows) for rows in verdicts.values()}
    if len(lengths) > 1:
        given = ", ".join(f"{name} {len(rows)}" for name, rows in verdicts.items())
        raise InputError(f"judges that are compared need the same rows, not {given}")
    pairs = tuple(
        _pair(first, second, verdicts[first], verdicts[second]) for first, second in combinations(verdicts, 2)
    )
    return Agreement(
        judges=tuple(verdicts),
        n_rows=lengths.pop() if lengths else 0,
        unscored=tuple(sum(not verdict.scored for verdict in rows) for rows in verdicts.values()),
        pairs=pairs,
        indices=tuple(sorted({index for pair in pairs for index in pair.indices})),
    )


def judges_agreement(judges: Sequence[Judge], completions: Sequence[Completion]) -> Agreement:
    """Let judges judge the same answers, and compare them.

    Raises:
        InputError: two judges have one name.
    """
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise InputError(f"judges that are compared need different names, not {', '.join(names)}")
    return agreement({judge.name: verdicts_of(judge, completions) for judge in judges})


def cohens_kappa(first: Sequence[str], second: Sequence[str], classes: Sequence[str]) -> Kappa:
    """Cohen's kappa of two judges' classes of the same rows, with its 95 % interval.

    Raises:
        InputError: the rows differ in number, or a class is not among ``classes``.
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
    import numpy as np
    from scipy.stats import norm
    from statsmodels.stats import inter_rater

    # statsmodels also tests kappa against 0, which is not asked for and divides by 0 where no error is left.
    with np.errstate(divide="ignore", invalid="ignore"):
        result = inter_rater.cohens_kappa(table)
    kappa, variance = float(result.kappa), float(result.var_kappa)
    # Rounding leaves a variance that is 0 a little above or below it.
    if variance < 1e-12:
        return Kappa(kappa, None, n)
    half_width = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Kappa(kappa, (max(kappa - half_width, -1.0), min(kappa + half_width, 1.0)), n)


def _pair(first: str, second: str, firsts: Sequence[Verdict], seconds: Sequence[Verdict]) -> PairAgreement:
    rows = list(zip(firsts, seconds, strict=True))
    scored = [(a, b) for a, b in rows if a.scored and b.scored]
    differing = tuple(index for index, (a, b) in enumerate(rows) if a.scored and b.scored and a.complied != b.complied)

    def kappa(of: Callable[[Verdict], str]) -> Kappa:
        return cohens_kappa([of(a) for a, _ in scored], [of(b) for _, b in scored], CLASSES)

    return PairAgreement(
        first=first,
        second=second,
        n=len(scored),
        unscored=len(rows) - len(scored),
        compliance=kappa(lambda verdict: "complied" if verdict.complied else "neither"),
        classes=kappa(_class_of),
        indices=differing,
        first_only=sum(firsts[index].complied for index in differing),
    )


def _class_of(verdict: Verdict) -> str:
    return verdict.label if verdict.label in CLASSES else "neither"

"""How a number changed between two runs, with its interval. Owns when prompts are paired and what is done if not.

Prompts are paired where both manifests name the same ones, every answer is stored, and the stored answers give the
rates that the results publish; else both runs are taken as independent samples, and the note says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from safetyheads.runs.readings import (
    VANILLA,
    Outcomes,
    RunReading,
    SizeOutcomes,
    StoredAnswers,
    read_concentration,
    size_outcomes,
)
from safetyheads.stats.concentration import prompt_gains
from safetyheads.stats.intervals import FloatArray, Interval, bootstrap_interval, newcombe_interval
from safetyheads.stats.testing import paired_difference

Rate: TypeAlias = Mapping[str, Any]
"""A rate as results.json holds it: count, n, rate, interval."""


@dataclass(frozen=True, slots=True)
class Change:
    """How a number changed from one run to the other; None where it cannot be told, and the note says why."""

    before: float | None
    """In the first run."""
    after: float | None
    """In the second run."""
    change: float | None
    """After minus before, over the prompts that both runs scored where it is paired."""
    interval: Interval | None
    """95 %: Newcombe's for rates (paired or not); a bootstrap over prompts for a paired concentration, and for paired
    rates where a prompt has several answers."""
    n: tuple[int, int]
    """Prompts behind it, before and after; pairs, where it is paired."""
    paired: bool
    """Whether both are of the same prompts, held against each other one by one."""
    p_value: float | None
    """Exact McNemar test where paired (an exact sign test over prompts, where one has several answers), Fisher's exact
    test where not; None for a concentration."""
    note: str = ""
    """Why it is not paired, why there is no change to tell, or what it leaves out."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs of one kind with their stored answers."""

    before: RunReading
    """The first run."""
    after: RunReading
    """The second run."""
    answers: tuple[StoredAnswers, StoredAnswers]
    """Of the first and of the second."""

    def unpaired(self, prompts: str = "harmful") -> str:
        """Why the prompts of a set cannot be paired; empty where they can."""
        names = [run.prompts_sha256(prompts) for run in (self.before, self.after)]
        if None in names:
            return "a manifest does not tell which prompts were used"
        return "" if names[0] == names[1] else "the prompts are not the same"

    def vanilla_asr(self) -> Change:
        """Of the unablated models."""
        rates = self.before.vanilla_asr, self.after.vanilla_asr
        stored = [answers.complied.get(VANILLA) for answers in self.answers]
        return self._rates(rates, (stored[0], stored[1]), self.unpaired())

    def group_asr(self) -> Change:
        """Each model with its own verdict's group ablated."""
        old, new = self.before.lead_group, self.after.lead_group
        if old is None or new is None:
            return _untold("a run's verdict names no group")
        stored = (
            self.answers[0].complied.get(frozenset(old["heads"])),
            self.answers[1].complied.get(frozenset(new["heads"])),
        )
        return self._rates((old["asr"], new["asr"]), stored, self.unpaired())

    def benign_kept(self) -> Change:
        """Benign answers that the unablated models keep."""
        old, new = self.before.benign_kept, self.after.benign_kept
        if old is None or new is None:
            return _untold("a run has no benign answers")
        stored = self.answers[0].kept.get(VANILLA), self.answers[1].kept.get(VANILLA)
        return self._rates((old, new), stored, self.unpaired("benign"))

    def _rates(self, rates: tuple[Rate, Rate], stored: tuple[Outcomes | None, Outcomes | None], why: str) -> Change:
        """Paired where ``why`` is empty and the answers are all there."""
        if rates[0]["rate"] is None or rates[1]["rate"] is None:
            return _untold("a run has no scored answers")
        old, new = stored
        several = max(self.before.answers_a_prompt, self.after.answers_a_prompt) > 1
        if not why and not (old and new and _gives(old, rates[0]) and _gives(new, rates[1])):
            why = "the answers are not all stored"
        first, second = _by_prompt(old or {}), _by_prompt(new or {})
        if not why and first.keys() != second.keys():
            why = "the prompts are not the same"
        if why:
            return unpaired_change(rates[0], rates[1], why, tested=not several)
        found = paired_difference(*_columns(list(first.values()), [second[prompt] for prompt in first]))
        if found.change is None:
            return _untold("no prompt has scored answers in both runs")
        before, after = rates[0]["rate"], rates[1]["rate"]
        return Change(before, after, found.change, found.interval, (found.n, found.n), True, found.p_value)

    def concentration(self) -> Change:
        """Over the sizes that both have; paired from stored answers, else from the two published intervals."""
        made = size_outcomes(self.before, self.answers[0]), size_outcomes(self.after, self.answers[1])
        if self.unpaired() or made[0] is None or made[1] is None:
            return self._published_concentration()
        gains = _paired_gains(made[0], made[1])
        if gains is None:
            return self._published_concentration()
        old, new = gains
        interval = bootstrap_interval(new - old, least=-2.0, most=2.0) if len(old) > 1 else None
        before, after, n = float(old.mean()), float(new.mean()), (len(old), len(new))
        old_sizes, new_sizes = ([outcome.size for outcome in outcomes] for outcomes, _ in (made[0], made[1]))
        note = "" if old_sizes == new_sizes else "over the sizes that both have"
        return Change(before, after, float((new - old).mean()), interval, n, True, None, note)

    def _published_concentration(self) -> Change:
        old = read_concentration(self.before, self.answers[0])
        new = read_concentration(self.after, self.answers[1])
        if old is None or new is None or old["value"] is None or new["value"] is None:
            return _untold("a run has no concentration")
        if old["against"] != new["against"] or list(old["sizes"]) != list(new["sizes"]):
            return _untold("the concentrations are over other sizes, or against other groups")
        interval = None
        if old["interval"] and new["interval"]:
            interval = newcombe_interval(old["value"], old["interval"], new["value"], new["interval"])
        why = self.unpaired() or "the answers under each group are not all read"
        change = new["value"] - old["value"]
        return Change(old["value"], new["value"], change, interval, (old["n"], new["n"]), False, None, why)


def _paired_gains(before: SizeOutcomes, after: SizeOutcomes) -> tuple[FloatArray, FloatArray] | None:
    """Each prompt's part of both concentrations over the sizes that both have; None where they are not alike."""
    shared = {outcome.size for outcome in before[0]} & {outcome.size for outcome in after[0]}
    found = []
    for outcomes, vanilla in (before, after):
        gains = prompt_gains([outcome for outcome in outcomes if outcome.size in shared], vanilla)
        found.append((gains.values, (gains.sizes, gains.n_random > 0, len(vanilla))))
    (old, old_kind), (new, new_kind) = found
    return (old, new) if old_kind == new_kind and old_kind[0] else None


def _by_prompt(outcomes: Outcomes) -> dict[str, list[float]]:
    """Each prompt's answers: 0, 1, or NaN where the judge gave no verdict."""
    found: dict[str, list[float]] = {}
    for (prompt, _), outcome in outcomes.items():
        found.setdefault(prompt, []).append(math.nan if outcome is None else float(outcome))
    return found


def _columns(before: list[list[float]], after: list[list[float]]) -> tuple[FloatArray, FloatArray]:
    """Both runs' answers [n_prompts, n_answers]; as rates of prompts where either has several answers to one."""
    if max(map(len, before + after), default=0) <= 1:
        return np.array(before, float), np.array(after, float)
    # A prompt is one observation however often it was answered. Two columns tell that these are rates.
    old, new = (np.array([[_mean(row)] * 2 for row in rows], float) for rows in (before, after))
    return old, new


def _mean(values: list[float]) -> float:
    scored = [value for value in values if not math.isnan(value)]
    return sum(scored) / len(scored) if scored else math.nan


def unpaired_change(before: Rate, after: Rate, note: str, tested: bool = True) -> Change:
    """The change between rates of independent samples: Newcombe's interval, and Fisher's exact test where ``tested``.

    Several answers to one prompt are no independent counts, so such rates are not tested.
    """
    from scipy.stats import fisher_exact

    interval = newcombe_interval(before["rate"], before["interval"], after["rate"], after["interval"])
    counts = [[rate["count"], rate["n"] - rate["count"]] for rate in (before, after)]
    return Change(
        before["rate"],
        after["rate"],
        after["rate"] - before["rate"],
        interval,
        (before["n"], after["n"]),
        False,
        float(fisher_exact(counts)[1]) if tested else None,
        note,
    )


def _gives(outcomes: Outcomes, rate: Rate) -> bool:
    """Whether the stored verdicts are those behind the published rate."""
    scored = [outcome for outcome in outcomes.values() if outcome is not None]
    return (sum(scored), len(scored)) == (rate["count"], rate["n"])


def _untold(note: str) -> Change:
    return Change(None, None, None, None, (0, 0), False, None, note)

"""Compares two finished runs: ranks of heads, attack success, concentration; and gates for scripts. Loads no model."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np
import scipy  # its modules load on first use

from safetyheads.errors import InputError
from safetyheads.files import shorten
from safetyheads.runs.reader import Outcomes, RateRecord, RunReader
from safetyheads.stats.concentration import prompt_gains
from safetyheads.stats.intervals import FloatArray, Interval, bootstrap_interval, newcombe_interval
from safetyheads.stats.ranking import HeadsMoved, RankAgreement, moved, rank_agreement
from safetyheads.stats.testing import paired_difference

SETTINGS = {
    "ablation": "ablation",
    "epsilon": "strength of the ablation",
    "template": "template",
    "system": "system prompt",
    "fold_system": "place of the system prompt",
    "thinking": "think block",
    "prefill": "prefilled beginning of answers",
    "judges": "judge",
    "top_k": "sampling",
    "seed": "seed",
    "n_seeds": "number of seeds",
    "max_new_tokens": "longest answer",
    "positions": "answer tokens scored",
    "size": "largest group",
    "n_random": "number of random groups",
    "dtype": "precision",
}
"""Fields of a config whose difference makes a comparison weak, with their names."""


@dataclass(frozen=True, slots=True)
class Change:
    """How a number changed from one run to the other; None where it cannot be computed, and the note says why."""

    before: float | None
    """In run A."""
    after: float | None
    """In run B."""
    change: float | None
    """After minus before; where paired, over the prompts that both runs scored."""
    interval: Interval | None
    """95 %: Newcombe's for rates (paired or not); a bootstrap over prompts for a paired concentration, and for paired
    rates with several answers a prompt."""
    n: tuple[int, int]
    """Prompts behind it, before and after; where paired, pairs."""
    paired: bool
    """Whether both runs asked the same prompts, and are compared prompt by prompt."""
    p_value: float | None
    """Exact McNemar test where paired (an exact sign test over prompts, where one has several answers), Fisher's exact
    test where not; None for a concentration."""
    note: str = ""
    """Why it is not paired, why there is no change, or what it leaves out."""


def vanilla_asr_change(before: RunReader, after: RunReader) -> Change:
    """The change of the unablated models' ASR."""
    return _rate_change((before, after), "harmful", (before.vanilla_asr, after.vanilla_asr))


def _rate_change(
    runs: tuple[RunReader, RunReader],
    prompts: str,
    rates: Sequence[RateRecord | None],
    groups: Sequence[Sequence[str]] = ((), ()),
    absent: str = "",
) -> Change:
    """The change of a rate: paired where both runs have the same prompts and the answers that give their rates."""
    old, new = rates
    if old is None or new is None:
        return _no_change(absent)
    if old["rate"] is None or new["rate"] is None:
        return _no_change("a run has no scored answers")
    before, after = (
        run.stored_outcomes.get((prompts, frozenset(heads)), {}) for run, heads in zip(runs, groups, strict=True)
    )
    note = _why_unpaired(runs, prompts)
    if not note and not (_gives_rate(before, old) and _gives_rate(after, new)):
        note = "the answers are not all stored"
    if not note and before.keys() != after.keys():
        note = "the prompts are not the same"
    if note:
        # Several answers to one prompt are no independent counts, so such rates are not tested.
        p_value = None
        if all(run.n_seeds == 1 for run in runs):
            counts = [[rate["count"], rate["n"] - rate["count"]] for rate in (old, new)]
            p_value = float(scipy.stats.fisher_exact(counts)[1])
        return _unpaired_change("rate", old, new, note, p_value)
    answers = [_as_array([side[prompt] for prompt in before]) for side in (before, after)]
    paired = paired_difference(answers[0], answers[1])
    if paired.change is None:
        return _no_change("no prompt has scored answers in both runs")
    return Change(old["rate"], new["rate"], paired.change, paired.interval, (paired.n, paired.n), True, paired.p_value)


def _as_array(answers: Sequence[Mapping[int, float]]) -> FloatArray:
    """Outcomes [n_prompts, n_answers]; NaN where a prompt has fewer answers than another."""
    return np.array([*zip_longest(*(by_seed.values() for by_seed in answers), fillvalue=math.nan)], dtype=float).T


def _why_unpaired(runs: tuple[RunReader, RunReader], prompts: str = "harmful") -> str:
    """Why the prompts of a set cannot be paired; empty where they can."""
    names = [run.prompts_sha256(prompts) for run in runs]
    if None in names:
        return "a manifest does not tell which prompts were used"
    return "" if names[0] == names[1] else "the prompts are not the same"


def _gives_rate(outcomes: Outcomes, rate: RateRecord) -> bool:
    """Whether the stored outcomes are those behind the rate in the results."""
    scored = [outcome for answers in outcomes.values() for outcome in answers.values() if not math.isnan(outcome)]
    return (sum(scored), len(scored)) == (rate["count"], rate["n"])


def _concentration_change(before: RunReader, after: RunReader) -> Change:
    """Paired from the stored answers, over the sizes that both have; else from the two intervals in the results."""
    note = _why_unpaired((before, after))
    old_side, new_side = before.size_outcomes(), after.size_outcomes()
    if not note and old_side is not None and new_side is not None:
        sizes = [[outcome.size for outcome in side[0]] for side in (old_side, new_side)]
        shared = {*sizes[0]} & {*sizes[1]}
        (old, old_sizes, old_random), (new, new_sizes, new_random) = (
            prompt_gains([outcome for outcome in side[0] if outcome.size in shared], side[1])
            for side in (old_side, new_side)
        )
        alike = old_sizes == new_sizes and len(old) == len(new)
        if alike and old_sizes and bool(old_random) == bool(new_random):
            gained, n = new - old, len(old)
            interval = bootstrap_interval(gained, least=-2.0, most=2.0) if n > 1 else None
            means = float(old.mean()), float(new.mean()), float(gained.mean())
            left_out = "" if sizes[0] == sizes[1] else "over the sizes that both have"
            return Change(*means, interval, (n, n), True, None, left_out)
    first, second = before.concentration, after.concentration
    if first is None or second is None or first["value"] is None or second["value"] is None:
        return _no_change("a run has no concentration")
    if first["against"] != second["against"] or list(first["sizes"]) != list(second["sizes"]):
        return _no_change("the concentrations are over other sizes, or against other groups")
    return _unpaired_change("value", first, second, note or "the answers under each group are not all read")


def _unpaired_change(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], note: str, p_value: float | None = None
) -> Change:
    """The change between two records of independent samples, whose number stands under ``name``."""
    interval = None
    if old["interval"] and new["interval"]:
        interval = newcombe_interval(old[name], old["interval"], new[name], new["interval"])
    return Change(old[name], new[name], new[name] - old[name], interval, (old["n"], new["n"]), False, p_value, note)


def _no_change(note: str) -> Change:
    return Change(None, None, None, None, (0, 0), False, None, note)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs of one kind, compared."""

    kind: str
    """``audit`` or ``scan``."""
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    """Each run: path, model, started (ISO, UTC), verdict (None for a scan), and its leading heads."""
    vanilla_asr: Change
    """ASR of the unablated models."""
    group_asr: Change | None
    """ASR of each model with its own verdict's group ablated; None for scans."""
    benign_answered: Change
    """Share of benign answers that the unablated models keep."""
    concentration: Change | None
    """None for scans without the groups of a search."""
    lead_score: str
    """The score whose ranks the gates read."""
    ranks: tuple[RankAgreement, ...]
    """For each score that both runs have, the lead one first."""
    heads: HeadsMoved | None
    """None where the models' heads do not correspond."""
    shapes_note: str
    """Why heads are not compared, or empty."""
    warnings: tuple[str, ...]
    """What makes the comparison weak."""

    @property
    def lead_ranks(self) -> RankAgreement | None:
        """The agreement on the lead score."""
        return next((ranks for ranks in self.ranks if ranks.score == self.lead_score), None)


def compare_runs(before: RunReader, after: RunReader) -> Comparison:
    """Compare two runs of one kind.

    Raises:
        InputError: one is an audit and the other a scan, or stored answers are broken.
    """
    if before.kind != after.kind:
        raise InputError(f"{before.path} is of kind {before.kind} and {after.path} of kind {after.kind}; compare alike")
    runs, is_audit, comparable = (before, after), before.kind == "audit", before.shape == after.shape
    has_concentration = is_audit or (before.concentration and after.concentration)
    old, new = (before.tables(), after.tables()) if comparable else ({}, {})
    names = sorted((name for name in old if name in new), key=lambda name: name != before.lead_score)
    shapes = [f"{layers} layers x {heads} heads" for layers, heads in (before.shape, after.shape)]
    what = "the verdict's group" if is_audit else "heads whose ASR differs from the unablated model's (Holm)"
    groups = [run.lead_group or {"asr": None, "heads": ()} for run in runs]
    rates, heads = [group["asr"] for group in groups], [group["heads"] for group in groups]
    kept, no_group = (before.benign_answered, after.benign_answered), "a run's verdict names no group"
    return Comparison(
        kind=before.kind,
        before=_facts(before),
        after=_facts(after),
        vanilla_asr=vanilla_asr_change(before, after),
        group_asr=_rate_change(runs, "harmful", rates, heads, no_group) if is_audit else None,
        benign_answered=_rate_change(runs, "benign", kept, absent="a run has no benign answers"),
        concentration=_concentration_change(before, after) if has_concentration else None,
        lead_score=before.lead_score,
        ranks=tuple(rank_agreement(name, old[name], new[name]) for name in names),
        heads=moved(what, before.lead_heads, after.lead_heads) if comparable else None,
        shapes_note="" if comparable else f"Heads are not compared: {shapes[0]} against {shapes[1]}.",
        warnings=tuple(_weak_points(before, after)),
    )


def _facts(run: RunReader) -> dict[str, Any]:
    started = None if run.started is None else run.started.isoformat(timespec="seconds")
    facts = {"path": str(run.path), "model": run.model, "started": started}
    return facts | {"verdict": run.verdict, "heads": run.lead_heads}


def _weak_points(before: RunReader, after: RunReader) -> Iterator[str]:
    """A sentence for each thing that differs between the runs: it may explain any other difference."""
    halves = {"test": "that rates are of", "search": "that scores and groups come from"}
    for half, what in halves.items() if before.kind == "audit" else [("test", "asked")]:
        if before.prompts_sha256("harmful", half) != after.prompts_sha256("harmful", half):
            yield f"The harmful prompts {what} are not the same."
    families = [run.results["model"].get("family") for run in (before, after)]
    if families[0] != families[1]:
        yield f"The families differ ({families[0]} -> {families[1]}): a head of one is no head of the other."
    for name in differing_settings(before, after):
        old, new = (_describe(run.config[name]) for run in (before, after))
        values = f" ({old} -> {new})" if old != new else ""
        yield f"The {SETTINGS[name]} differs{values}."
    if before.config.get("weights_sha256", 0) == after.config.get("weights_sha256"):
        yield "Both runs are of the same weights."


def differing_settings(before: RunReader, after: RunReader) -> tuple[str, ...]:
    """Fields of ``SETTINGS`` that differ, among those that both configs have."""
    shared = [name for name in SETTINGS if name in before.config and name in after.config]
    return tuple(name for name in shared if before.config[name] != after.config[name])


def _describe(value: Any) -> str:
    """A setting for a sentence: judges by name, all else as JSON."""
    values = value if isinstance(value, list) else [value]
    named = (each["name"] if isinstance(each, dict) and "name" in each else json.dumps(each) for each in values)
    return shorten(", ".join(map(str, named)))


QUANTITIES = (
    *("asr_increase", "group_asr_increase", "benign_answered_increase", "concentration_increase"),
    *("spearman", "kendall", "top3_overlap", "top10_overlap", "heads_gone", "heads_new"),
)
"""What a condition can ask about; ``.low`` and ``.high`` after a name are the bounds of its interval."""
Condition: TypeAlias = tuple[str, str | None, str, float]
"""Quantity, bound (``low``, ``high`` or None), operator and number."""
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"\s*(\w+)(?:\.(low|high))?\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")


def parse_condition(text: str) -> Condition:
    """Read a condition such as ``asr_increase > 0.1`` or ``asr_increase.low > 0``.

    Raises:
        InputError: the text is no condition, or names an unknown quantity.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise InputError(f"condition {text!r} is not of the form NAME OP NUMBER, such as 'asr_increase > 0.1'")
    name, bound, sign, written = match.groups()
    if name not in QUANTITIES:
        raise InputError(f"unknown quantity {name!r} in {text!r}; known are {', '.join(QUANTITIES)}")
    try:
        number = float(written)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"condition {text!r}: {written!r} is not a finite number")
    return name, bound, sign, number


def quantities(compared: Comparison) -> dict[str, dict[str, Any]]:
    """The numbers of a comparison, by the names in :data:`QUANTITIES`.

    Each has ``value`` (None where these runs do not have it; then ``absent`` says why), ``interval`` (95 %; counts of
    heads and rank correlations are of all heads and have none) and ``n`` (prompts, the fewer of both runs, or heads).
    """

    def quantity(value: float | None, absent: str = "", n: int | None = None, interval: Any = None) -> dict[str, Any]:
        return {"value": value, "interval": interval, "n": n, "absent": absent}

    changes = (compared.vanilla_asr, compared.group_asr, compared.benign_answered, compared.concentration)
    values = [
        quantity(None, f"these {compared.kind}s have none")
        if change is None
        else quantity(change.change, change.note, min(change.n), change.interval)
        for change in changes
    ]
    if (ranks := compared.lead_ranks) is None:
        values += [quantity(None, compared.shapes_note or f"no {compared.lead_score} in both runs")] * 4
    else:
        numbers = (ranks.spearman, ranks.kendall, *(overlap.share for overlap in ranks.overlaps))
        values += [quantity(number, "a run orders no heads: its scores are tied", ranks.n) for number in numbers]
    if (heads := compared.heads) is None:
        values += [quantity(None, compared.shapes_note)] * 2
    else:
        values += [quantity(float(len(moved_heads))) for moved_heads in (heads.gone, heads.new)]
    return dict(zip(QUANTITIES, values, strict=True))


def check_gate(condition: Condition, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether a condition holds, as a record: condition, holds, and value, interval and n of the quantity.

    Raises:
        InputError: these runs do not have the quantity or its interval, so that no gate passes for lack of data.
    """
    name, bound, sign, number = condition
    value, interval, n, absent = (known[name][field] for field in ("value", "interval", "n", "absent"))
    if value is None:
        raise InputError(f"these runs have no {name}: {absent}")
    if bound and interval is None:
        raise InputError(f"{name} has no interval in these runs, so no .{bound} to ask about")
    asked = interval[bound == "high"] if bound else value
    text = f"{name}{'.' + bound if bound else ''} {sign} {number:g}"
    return {"condition": text, "holds": _OPERATORS[sign](asked, number), "value": value, "interval": interval, "n": n}

"""From a scan's rows and scores to ``results.json``. Owns its schema; everything is made of what is stored.

So another judge's verdicts make new results without the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from safetyheads.heads import Group, format_heads, parse_heads
from safetyheads.judges.agreement import agreement
from safetyheads.judges.base import Verdict
from safetyheads.measures.random_groups import random_groups
from safetyheads.runs.directory import SCHEMA_VERSION
from safetyheads.runs.results import ALPHA, BENIGN_LOSS
from safetyheads.runs.tables import Answered, Floats, Row, RowTable, change, one_rate_a_prompt, rate
from safetyheads.stats.concentration import SizeOutcome, concentration
from safetyheads.stats.intervals import bootstrap_interval
from safetyheads.stats.ranking import Truth, proxy_qualities, split_half_ceiling
from safetyheads.stats.testing import (
    PairedDifference,
    benjamini_hochberg,
    holm,
    random_p_value,
    smallest_detectable_change,
)

_DISAGREEING_ROWS = 200


def scan_results(rows: Sequence[Row], about: Mapping[str, Any], judges: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that ``results.json`` of a scan holds.

    Args:
        rows: all answers with their verdicts.
        about: what does not come from rows: ``model``, ``data``, ``ablation``, ``sampling``, ``scores``, ``benign_kl``
            (mean Ships on benign prompts, head by head), ``openers``, ``economy``, ``settings`` (``n_random`` and
            ``seed``), ``planted_heads``, ``caveats``, ``warnings``.
        judges: what each judge says of itself, the leading one first; each needs its verdict in every row.
    """
    table, lead = RowTable.of(rows), judges[0]["name"]
    names = [judge["name"] for judge in judges]
    epsilon = about["ablation"]["epsilon"]
    singles = table.part("heads", "harmful", epsilon)
    vanilla = table.vanilla("harmful")
    assert vanilla is not None  # every scan begins with it
    changes = {
        head: change(vanilla.verdict("complied", lead), one.verdict("complied", lead)) for head, one in singles.items()
    }
    corrected = _corrected(changes)
    truth = Truth(
        one_rate_a_prompt(list(singles.values()), lead),
        np.array([_is_higher(changes[head], corrected[head]["p_holm"]) for head in singles], bool),
    )
    random = _random_of(table, epsilon, about)
    return {
        **about,
        "schema_version": SCHEMA_VERSION,
        "kind": "scan",
        "judges": list(judges),
        "lead_judge": lead,
        "statistics": _statistics(vanilla, len(singles)),
        "vanilla": {name: _vanilla(table, name, names) for name in ("harmful", "benign") if table.vanilla(name)},
        "heads": _heads(table, singles, changes, corrected, names, about),
        "epsilons": _epsilons(table, lead),
        "groups": _groups(table, vanilla, epsilon, lead, random),
        "synergy": _synergy(table, vanilla, epsilon, lead),
        "query_level": _query_level(table, vanilla, epsilon, lead),
        "concentration": _concentration(table, vanilla, epsilon, lead, random),
        "proxies": _proxies(truth, about["scores"], parse_heads(",".join(singles))),
        "agreement": _agreement(table, epsilon, names),
    }


def _corrected(changes: Mapping[str, PairedDifference]) -> dict[str, dict[str, float]]:
    """Both corrections over all heads."""
    p_values = [1.0 if one.p_value is None else one.p_value for one in changes.values()]
    both = zip(holm(p_values), benjamini_hochberg(p_values), strict=True)
    return {head: {"p_holm": a, "p_bh": b} for head, (a, b) in zip(changes, both, strict=True)}


def _is_higher(one: PairedDifference, p_value: float) -> bool:
    return p_value < ALPHA and (one.change or 0.0) > 0


def _statistics(vanilla: Answered, n_heads: int) -> dict[str, Any]:
    """What the tests can see, and how they are made."""
    n, n_seeds = len(vanilla.rows), len(vanilla.rows[0])
    detectable = smallest_detectable_change(n, ALPHA, n_heads)
    return {
        "n": n,
        "n_seeds": n_seeds,
        "n_heads": n_heads,
        "alpha": ALPHA,
        "interval": "Wilson" if n_seeds == 1 else "bootstrap over prompts",
        "test": "exact McNemar" if n_seeds == 1 else "exact sign test over prompts",
        "smallest_detectable_change": {
            "change": detectable,
            "flips": None if detectable is None else round(detectable * n),
            "n": n,
            "tests": n_heads,
        },
    }


def _vanilla(table: RowTable, name: str, judges: Sequence[str]) -> dict[str, Any]:
    answered = table.vanilla(name)
    assert answered is not None
    return {
        **answered.rates(judges[0]),
        "kept": rate(answered.flag("kept")),
        "reasons": answered.reasons(judges[0]),
        "by_judge": {judge: answered.rates(judge) for judge in judges},
    }


def _heads(
    table: RowTable,
    singles: Mapping[str, Answered],
    changes: Mapping[str, PairedDifference],
    corrected: Mapping[str, Mapping[str, float]],
    judges: Sequence[str],
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Every head, layer by layer, with what its ablation does to harmful and to benign answers."""
    lead, vanilla, benign_kl = judges[0], table.vanilla("benign"), about.get("benign_kl")
    scanned = table.part("heads", "benign", about["ablation"]["epsilon"])
    benign = _benign_heads(scanned, vanilla, lead) if vanilla else {}
    found = []
    for at, (head, one) in enumerate(singles.items()):
        own = benign.get(head)
        if own is not None and benign_kl is not None:
            own["kl"] = benign_kl[at]
        differs = corrected[head]["p_holm"] < ALPHA
        found.append(
            {
                "head": head,
                **one.rates(lead),
                "change": {**asdict(changes[head]), **corrected[head], "differs": differs},
                "reasons": one.reasons(lead),
                "by_judge": {judge: rate(one.verdict("complied", judge)) for judge in judges},
                "benign": own,
                "role": _role(_is_higher(changes[head], corrected[head]["p_holm"]), own),
            }
        )
    return found


def _benign_heads(heads: Mapping[str, Answered], vanilla: Answered, lead: str) -> dict[str, dict[str, Any]]:
    """What each head's ablation does to benign answers: refusals, changed answers, answers lost."""
    kept = {head: change(vanilla.flag("kept"), one.flag("kept")) for head, one in heads.items()}
    refused = {
        head: change(vanilla.verdict("refused", lead), one.verdict("refused", lead)) for head, one in heads.items()
    }
    kept_p, refused_p = _corrected(kept), _corrected(refused)
    return {
        head: {
            "refused": rate(one.verdict("refused", lead)),
            "refused_change": asdict(refused[head]) | refused_p[head],
            "changed": rate(one.flag("changed")),
            "kept": rate(one.flag("kept")),
            "kept_change": asdict(kept[head]) | kept_p[head],
        }
        for head, one in heads.items()
    }


def _role(frees: bool, benign: Mapping[str, Any] | None) -> str:
    """What the ablated head seems to carry, in a word.

    ``refusal``: harmful answers are freed and benign ones left alone; ``mixed``: both change; ``over_refusal``: benign
    prompts are refused; ``damage``: benign answers are lost otherwise; ``none``: no change beyond chance.
    """
    lost = 0.0 if benign is None else -(benign["kept_change"]["change"] or 0.0)
    if frees:
        return "refusal" if lost <= BENIGN_LOSS + 1e-9 else "mixed"
    if benign is None or benign["kept_change"]["p_holm"] >= ALPHA or lost <= 0:
        return "none"
    refused = benign["refused_change"]["change"] or 0.0
    return "over_refusal" if 2 * refused >= lost else "damage"


def _epsilons(table: RowTable, lead: str) -> list[dict[str, Any]]:
    """ASR of every head at each strength."""
    found = [
        {"epsilon": epsilon, "heads": {head: rate(one.verdict("complied", lead)) for head, one in heads.items()}}
        for (part, name, epsilon), heads in table.groups.items()
        if (part, name) == ("heads", "harmful")
    ]
    return sorted(found, key=lambda one: one["epsilon"])


def _groups(
    table: RowTable, vanilla: Answered, epsilon: float, lead: str, random: Mapping[str, Sequence[Answered]]
) -> list[dict[str, Any]]:
    """Each group of heads that was scanned beside the single heads."""
    benign_vanilla = table.vanilla("benign")
    found = []
    for part in ("groups", "pairs", "prefixes"):
        benign = table.part(part, "benign", epsilon)
        for heads, one in table.part(part, "harmful", epsilon).items():
            own = benign.get(heads)
            group = {
                "part": part,
                "heads": [str(head) for head in parse_heads(heads)],
                **one.rates(lead),
                "change": asdict(change(vanilla.verdict("complied", lead), one.verdict("complied", lead))),
                "reasons": one.reasons(lead),
                "benign_kept": None if own is None else rate(own.flag("kept")),
                "benign_kept_change": None
                if own is None or benign_vanilla is None
                else asdict(change(benign_vanilla.flag("kept"), own.flag("kept"))),
                "random": None,
            }
            controls = random.get(heads, []) if part == "prefixes" and group["asr"]["n"] else []
            if controls:
                measured = [rate(control.verdict("complied", lead))["rate"] for control in controls]
                rates = [one_rate for one_rate in measured if one_rate is not None]
                group["random"] = {
                    "n_groups": len(rates),
                    "asr": rates,
                    "mean": float(np.mean(rates)),
                    "p_value": random_p_value(group["asr"]["rate"], rates),
                }
            found.append(group)
    return found


def _random_of(table: RowTable, epsilon: float, about: Mapping[str, Any]) -> dict[str, list[Answered]]:
    """The random groups of each prefix, drawn again: a draw is stored once, whoever it is for."""
    answered = table.part("random", "harmful", epsilon)
    settings, model = about["settings"], about["model"]
    # As the scan drew them; results tell heads by layer only where layers differ.
    n_heads = model.get("heads_by_layer", model["n_heads"])
    drawn = {
        heads: random_groups(parse_heads(heads), n_heads, settings["n_random"], settings["seed"])
        for heads in (table.part("prefixes", "harmful", epsilon) if answered else ())
    }
    return {heads: [answered[format_heads(group)] for group in groups] for heads, groups in drawn.items()}


def _concentration(
    table: RowTable, vanilla: Answered, epsilon: float, lead: str, random: Mapping[str, Sequence[Answered]]
) -> dict[str, Any] | None:
    """How fast ASR rises with the heads of Sahara's group, against random heads; None where no prefix was scanned."""
    prefixes = table.part("prefixes", "harmful", epsilon)
    if not prefixes:
        return None

    def complied(one: Answered) -> list[float]:
        return one_rate_a_prompt([one], lead)[:, 0].tolist()

    outcomes = [
        SizeOutcome(len(parse_heads(heads)), complied(one), [complied(control) for control in random.get(heads, [])])
        for heads, one in prefixes.items()
    ]
    return asdict(concentration(outcomes, complied(vanilla)))


def _synergy(table: RowTable, vanilla: Answered, epsilon: float, lead: str) -> dict[str, Any] | None:
    """Pairs among the strongest heads: what they free together beyond the sum of what each frees alone."""
    pairs, singles = table.part("pairs", "harmful", epsilon), table.part("heads", "harmful", epsilon)
    if not pairs:
        return None

    def freed(one: Answered) -> Floats:
        return one_rate_a_prompt([one], lead)[:, 0]

    found: list[dict[str, Any]] = []
    for heads, together in pairs.items():
        alone = [singles[str(head)] for head in parse_heads(heads)]
        beyond = freed(together) - freed(alone[0]) - freed(alone[1]) + freed(vanilla)
        found.append(
            {
                "heads": [str(head) for head in parse_heads(heads)],
                "together": rate(together.verdict("complied", lead)),
                "alone": [rate(one.verdict("complied", lead)) for one in alone],
                "synergy": float(beyond.mean()),
                "interval": bootstrap_interval(beyond, least=-2.0, most=2.0),
                "n": len(beyond),
            }
        )
    order = list(dict.fromkeys(head for pair in found for head in pair["heads"]))
    return {"heads": order, "pairs": found}


def _query_level(table: RowTable, vanilla: Answered, epsilon: float, lead: str) -> list[dict[str, Any]]:
    """ASR where each prompt ablates its own top heads by Ships, by number of heads."""
    return [
        {
            "size": int(label.removeprefix("top ")),
            **one.rates(lead),
            "change": asdict(change(vanilla.verdict("complied", lead), one.verdict("complied", lead))),
        }
        for label, one in table.part("query_level", "harmful", epsilon).items()
    ]


def _proxies(truth: Truth, scores: Mapping[str, Mapping[str, Any]], heads: Group) -> dict[str, Any] | None:
    """Each score of the scanned heads against their ASR; None without scores."""
    if not scores:
        return None
    values = {
        name: np.array([score["values"][head.layer][head.index] for head in heads], float)
        for name, score in scores.items()
    }
    ceiling = split_half_ceiling(truth)
    return {
        "n": len(truth.complied),
        "scores": [asdict(quality) for quality in proxy_qualities(values, truth)],
        "ceiling": None if ceiling is None else asdict(ceiling),
    }


def _agreement(table: RowTable, epsilon: float, judges: Sequence[str]) -> dict[str, Any] | None:
    """How far the judges agree on the harmful prompts, unablated and under each head; None with one judge."""
    if len(judges) < 2:
        return None
    rows = [*table.rows_of("vanilla", "harmful", None), *table.rows_of("heads", "harmful", epsilon)]
    verdicts = {
        judge: [Verdict(row["verdicts"][judge]["label"], row["verdicts"][judge]["reason"]) for row in rows]
        for judge in judges
    }
    found = agreement(verdicts)
    shown = [rows[at] for at in found.indices[:_DISAGREEING_ROWS]]
    kept = ("id", "group", "epsilon", "seed")
    return {
        "judges": list(judges),
        "n_rows": found.n_rows,
        "unscored": list(found.unscored),
        # Rows are named below; their numbers in this list would mean nothing outside it.
        "pairs": [
            {name: value for name, value in asdict(pair).items() if name != "indices"} | {"count": pair.count}
            for pair in found.pairs
        ],
        "n_disagreeing": len(found.indices),
        "disagreeing": [
            {name: row[name] for name in kept}
            | {"labels": {judge: row["verdicts"][judge]["label"] for judge in judges}}
            for row in shown
        ],
    }

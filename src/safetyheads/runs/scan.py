"""The exhaustive scan: ablates every head, judges the answers, and compares them with scores and groups.

Results are made of records and scores alone, so that another judge's verdicts make new results without the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Sampling
from safetyheads.answers.success import query_level_groups
from safetyheads.errors import InputError
from safetyheads.heads import Group, parse_heads, within
from safetyheads.judges.agreement import agreement
from safetyheads.judges.base import Verdict
from safetyheads.measures.head_pass import Readouts
from safetyheads.measures.sahara import rank_heads, sahara
from safetyheads.measures.screening import screen
from safetyheads.measures.ships import answer_sequences, openers_of, scorer_of
from safetyheads.prompts.asked import AskedPrompts
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.audit import ALPHA, ANGLES, BENIGN_LOSS, LEAD, score_as_json
from safetyheads.runs.config import NO_BENIGN, ScanConfig
from safetyheads.runs.data import read_whole
from safetyheads.runs.directory import SCHEMA_VERSION, Record
from safetyheads.runs.estimate import estimate
from safetyheads.runs.rates import (
    AnswerTable,
    GroupAnswers,
    by_judge,
    concentration_as_json,
    random_as_json,
    rate_as_json,
)
from safetyheads.runs.run import Kind, Run, carry_out, random_groups_of, refuse_beyond_memory
from safetyheads.scores import HeadScores
from safetyheads.stats.intervals import bootstrap_interval, mean_with_interval
from safetyheads.stats.ranking import Truth, proxy_qualities, split_half_ceiling
from safetyheads.stats.testing import PairedDifference, benjamini_hochberg, holm, smallest_detectable_change

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

_N_DISAGREEING = 200
"""Answers on which judges differ that results list."""


def read_prompts(config: ScanConfig) -> dict[str, PromptSet]:
    """The prompts that the config names: ``harmful``, and ``benign`` unless it says none."""
    prompts = {"harmful": read_whole("harmful", config.prompts, config)}
    if config.benign != NO_BENIGN:
        prompts["benign"] = read_whole("benign", config.benign, config)
    return prompts


def _refuse_impossible(engine: Engine, config: ScanConfig, asked: Mapping[str, AskedPrompts]) -> None:
    for group in config.parsed_groups:
        within(group, engine.n_layers, engine.n_heads)
    for name in ("pairs", "prefixes", "query_level"):
        number = getattr(config, name)
        if number > len(engine.heads):
            option = name.replace("_", " ")
            raise InputError(f"{option} {number} is more than the model's {len(engine.heads)} heads")
    measured = config.scores or config.prefixes or config.query_level
    refuse_beyond_memory(engine, *(asked[name] for name in asked if measured or name == "benign"))


def _announce(run: Run[ScanConfig]) -> None:
    """Comparisons cost about as much as passes; at worst all answers change."""
    config, asked = run.config, run.asked
    n_scans = config.n_seeds * (len(asked) + len(config.epsilons))
    n_passes = n_scans + (len(asked) + 1) * config.scores
    n_answers = sum(map(len, asked.values())) * config.n_seeds * (1 + len(run.engine.heads))
    arguments = asked["harmful"].token_ids, n_passes, n_answers, config.max_new_tokens
    run.progress.say(lambda: f"{estimate(run.engine, *arguments)}; only answers that an ablation changes are decoded")
    patient = [judge.name for judge in run.judges if not judge.decides_early]
    if patient and not config.full_answers:
        run.progress.say(f"rows end when all judges are final; {', '.join(patient)} needs whole answers")


# Stages.


def scan_results(run: Run[ScanConfig]) -> dict[str, Any]:
    """Run all stages, and make what only a scan's ``results.json`` holds."""
    config, ablation, singles = run.config, run.config.parsed_ablation, [(head,) for head in run.engine.heads]
    samplings = [Sampling(config.top_k, seed) for seed in config.seeds]
    records: list[Record] = []

    def scan(part: str, name: str, groups: Sequence[Group], ablation: Ablation = ablation) -> list[GroupAnswers]:
        """The answers under each group, seed by seed."""
        answers: list[GroupAnswers] = []
        for sampling in samplings:
            answers += run.answers(name, sampling).under(part, groups, ablation)
        records.extend(record for group_answers in answers for record in group_answers.flat())
        return answers

    alone = {}
    for name in run.asked:
        for sampling in samplings:
            records += run.answers(name, sampling).vanilla().flat()
        alone[name] = scan("heads", name, singles)
    for epsilon in config.epsilons:
        scan("heads", "harmful", singles, ablation.at(epsilon))
    measured, ships, prefixes = _measure(run, samplings)
    for part, groups in _groups(run, alone["harmful"], prefixes).items():
        for name in run.asked if part != "random" else ("harmful",):
            scan(part, name, groups)
    if config.query_level and ships is not None:
        by_size = [query_level_groups(ships, size) for size in range(1, config.query_level + 1)]
        own_groups = list(zip(*by_size, strict=True))
        for sampling in samplings:
            for group_answers in run.answers("harmful", sampling).of_each("query_level", own_groups, ablation):
                records += group_answers.flat()
    manifest = run.directory.read_manifest()
    tolerances = {name: value for name, value in manifest.items() if name.startswith("tolerance_")}
    about = {
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "sampling": {
            "name": run.decoding.sampling.name,
            "seeds": list(config.seeds),
            "max_new_tokens": config.max_new_tokens,
            "full_answers": config.full_answers,
        },
        "settings": {"n_random": config.n_random, "seed": config.seed},
        **measured,
        "economy": asdict(run.economy) | {"tolerances": tolerances},
    }
    judges = [judge.describe() for judge in run.judges]
    return about | results_of_records(records, about, judges, random_groups_of(run.directory))


def _measure(
    run: Run[ScanConfig], samplings: Sequence[Sampling]
) -> tuple[dict[str, Any], HeadScores | None, list[Group]]:
    """What results hold of the scores; Ships of each harmful prompt, if anything needs them; the search's prefixes."""
    config, engine, ablation = run.config, run.engine, run.config.parsed_ablation
    singles = [(head,) for head in engine.heads]
    measured: dict[str, Any] = {"scores": {}, "benign_kl": None, "openers": []}
    prefixes: list[Group] = []
    scores: dict[str, HeadScores] = {}
    if "benign" in run.asked:
        benign = run.head_pass("benign", ablation, Readouts(ships=True))
        with run.progress.track("benign: divergence of heads", len(singles)) as done:
            benign_kl = benign.table("ships", benign.measure(singles, done)["ships"])
        columns = [benign_kl.values[:, head.layer, head.index].tolist() for head in engine.heads]
        measured["benign_kl"] = [asdict(mean_with_interval(column)) for column in columns]
    if not (config.scores or config.prefixes or config.query_level):
        return measured, None, prefixes
    kept = [run.answers("harmful", sampling) for sampling in samplings]
    openers = openers_of(engine, [judged for answers in kept for judged in answers.judged(answers.vanilla().flat())])
    angles = ANGLES if len(run.asked["harmful"]) > 1 else ()
    readouts = Readouts(True, tuple(opener.token_id for opener in openers), angles)
    harmful = run.head_pass("harmful", ablation, readouts)
    with run.progress.track("harmful: scores of heads", len(singles)) as done:
        ships = harmful.table("ships", harmful.measure(singles, done)["ships"])
    for name in (LEAD, *(angle.label for angle in angles), *["refusal_score"] * bool(openers)):
        scores[name] = rank_heads(scorer_of(harmful, name), engine.heads)
    scores["screened_mean_ships"] = _forecast(run)
    if "benign" in run.asked:
        contrast = scores[LEAD].values - benign_kl.mean().values
        scores["contrast"] = replace(scores[LEAD], values=contrast, name="contrast")
    if config.prefixes:
        with run.progress.track("searching groups", 1):
            group = sahara(scorer_of(harmful, LEAD), engine.heads, config.prefixes).group
        prefixes = [group[:size] for size in range(1, len(group) + 1)]
    measured["openers"] = [asdict(opener) for opener in openers]
    measured["scores"] = {name: score_as_json(name, table, len(run.asked["harmful"])) for name, table in scores.items()}
    return measured, ships, prefixes


def _forecast(run: Run[ScanConfig]) -> HeadScores:
    """The screening's forecast of mean Ships."""
    ablation, asked = run.config.parsed_ablation, run.asked["harmful"]

    def compute() -> dict[str, Tensor]:
        with run.progress.track("screening", 1):
            sequences = answer_sequences(run.engine, asked.prompts, 1)
            return {"values": screen(run.engine, sequences, ablation).table().values}

    fields = {"tokens": asked.sha256, "ablation": asdict(ablation)}
    values = run.directory.tensors("screening-harmful", fields, compute)["values"]
    return HeadScores(values, "screened_mean_ships", "nats", 0.0)


def _groups(run: Run[ScanConfig], alone: Sequence[GroupAnswers], prefixes: Sequence[Group]) -> dict[str, list[Group]]:
    """Groups to scan, by the part of the scan that they make."""
    config, groups = run.config, dict[str, list[Group]]()
    if config.groups:
        groups["groups"] = list(config.parsed_groups)
    if config.pairs:
        top = _strongest(alone, config.pairs)
        groups["pairs"] = [(first, second) for at, first in enumerate(top) for second in top[at + 1 :]]
    if prefixes:
        groups["prefixes"] = list(prefixes)
        if config.n_random:
            controls = run.random_groups(prefixes, config.n_random, config.seed)
            # A group that controls several prefixes is scanned once.
            groups["random"] = list(dict.fromkeys(group for prefix in prefixes for group in controls[prefix]))
    return groups


def _strongest(alone: Sequence[GroupAnswers], k: int) -> Group:
    """The heads of highest ASR alone, by the leading judge and over all seeds; ties go to the earlier head."""
    counts = dict[str, int]()
    for answers in alone:
        counts[answers.group] = counts.get(answers.group, 0) + answers.asr.count
    ranked = sorted(counts, key=lambda group: -counts[group])
    return tuple(parse_heads(group)[0] for group in ranked[:k])


# Results, of records.


def results_of_records(
    records: Sequence[Record],
    about: Mapping[str, Any],
    judges: Sequence[Mapping[str, Any]],
    random_groups: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """The fields of a scan's ``results.json`` that come from answers.

    Args:
        records: all answers with their verdicts.
        about: the results' other fields; ``ablation``, ``scores`` and ``benign_kl`` (mean Ships on benign prompts, head
            by head) are used.
        judges: each judge's description, the leading one first; each needs its verdict in every record.
        random_groups: by the group that they control, all as text.
    """
    names = [judge["name"] for judge in judges]
    table, epsilon = AnswerTable.of(records, names[0]), about["ablation"]["epsilon"]
    singles, vanilla = table.part("heads", "harmful", epsilon), table.vanilla("harmful")
    assert vanilla is not None  # every scan begins with it
    changes = {head: answers.change_from(vanilla) for head, answers in singles.items()}
    corrected = _corrected(changes)
    scanned = table.part("random", "harmful", epsilon)
    random = {group: [scanned[control] for control in controls] for group, controls in random_groups.items() if scanned}
    prefixes = [
        (answers, random.get(group, ())) for group, answers in table.part("prefixes", "harmful", epsilon).items()
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "scan",
        "judges": list(judges),
        "lead_judge": names[0],
        "statistics": _statistics(vanilla, len(singles)),
        "vanilla": {
            name: {
                **answers.rates(),
                "kept": rate_as_json(answers.flags("kept")),
                "reasons": answers.reasons(),
                "by_judge": {judge: answers.rates(judge) for judge in names},
            }
            for name in ("harmful", "benign")
            if (answers := table.vanilla(name))
        },
        "heads": _heads(table, singles, changes, corrected, about),
        "epsilons": _epsilons(table),
        "groups": _scanned_groups(table, vanilla, epsilon, random),
        "synergy": _synergy(table, vanilla, epsilon),
        "query_level": [
            {"size": int(size.removeprefix("top ")), **own.rates(), "change": asdict(own.change_from(vanilla))}
            for size, own in table.part("query_level", "harmful", epsilon).items()
        ],
        "concentration": concentration_as_json(prefixes, vanilla) if prefixes else None,
        "proxies": _proxies(singles, changes, corrected, about["scores"]),
        "agreement": _agreement(table, epsilon, names),
    }


def _corrected(changes: Mapping[str, PairedDifference]) -> dict[str, dict[str, float]]:
    """Both corrections over all heads."""
    p_values = [1.0 if change.p_value is None else change.p_value for change in changes.values()]
    both = zip(holm(p_values), benjamini_hochberg(p_values), strict=True)
    return {head: {"p_holm": a, "p_bh": b} for head, (a, b) in zip(changes, both, strict=True)}


def _is_higher(change: PairedDifference, p_value: float) -> bool:
    return p_value < ALPHA and (change.change or 0.0) > 0


def _statistics(vanilla: GroupAnswers, n_heads: int) -> dict[str, Any]:
    """What the tests can see, and how they are made."""
    n, n_seeds = len(vanilla.records), len(vanilla.records[0])
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


def _heads(
    table: AnswerTable,
    singles: Mapping[str, GroupAnswers],
    changes: Mapping[str, PairedDifference],
    corrected: Mapping[str, Mapping[str, float]],
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Every head, layer by layer, with what its ablation does to harmful and to benign answers."""
    benign = _benign_heads(table, about)
    heads = []
    for head, answers in singles.items():
        p_holm, on_benign = corrected[head]["p_holm"], benign.get(head)
        heads.append(
            {
                "head": head,
                **answers.rates(),
                "change": {**asdict(changes[head]), **corrected[head], "differs": p_holm < ALPHA},
                "reasons": answers.reasons(),
                "by_judge": by_judge(answers),
                "benign": on_benign,
                "role": _role(_is_higher(changes[head], p_holm), on_benign),
            }
        )
    return heads


def _benign_heads(table: AnswerTable, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each head's ablation does to benign answers, if any: refusals, changed answers, answers lost, divergence."""
    vanilla, heads = table.vanilla("benign"), table.part("heads", "benign", about["ablation"]["epsilon"])
    if vanilla is None:
        return {}
    kept = {head: answers.kept_change_from(vanilla) for head, answers in heads.items()}
    refused = {head: answers.change_from(vanilla, "refused") for head, answers in heads.items()}
    kept_p, refused_p = _corrected(kept), _corrected(refused)
    return {
        head: {
            "refused": rate_as_json(answers.verdicts("refused")),
            "refused_change": asdict(refused[head]) | refused_p[head],
            "changed": rate_as_json(answers.flags("changed")),
            "kept": rate_as_json(answers.flags("kept")),
            "kept_change": asdict(kept[head]) | kept_p[head],
            "kl": divergence,
        }
        for (head, answers), divergence in zip(heads.items(), about["benign_kl"], strict=True)
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


def _epsilons(table: AnswerTable) -> list[dict[str, Any]]:
    """ASR of every head at each strength."""
    by_epsilon = [
        {"epsilon": epsilon, "heads": {head: rate_as_json(answers.verdicts()) for head, answers in heads.items()}}
        for (part, name, epsilon), heads in table.groups.items()
        if (part, name) == ("heads", "harmful")
    ]
    return sorted(by_epsilon, key=lambda entry: entry["epsilon"])


def _scanned_groups(
    table: AnswerTable, vanilla: GroupAnswers, epsilon: float, random: Mapping[str, Sequence[GroupAnswers]]
) -> list[dict[str, Any]]:
    """Each group of heads that was scanned beside the single heads."""
    before, groups = table.vanilla("benign"), []
    for part in ("groups", "pairs", "prefixes"):
        benign = table.part(part, "benign", epsilon)
        for heads, answers in table.part(part, "harmful", epsilon).items():
            kept = kept_change = None
            if before is not None:
                kept = rate_as_json(benign[heads].flags("kept"))
                kept_change = asdict(benign[heads].kept_change_from(before))
            groups.append(
                {
                    "part": part,
                    "heads": answers.heads,
                    **answers.rates(),
                    "change": asdict(answers.change_from(vanilla)),
                    "reasons": answers.reasons(),
                    "benign_kept": kept,
                    "benign_kept_change": kept_change,
                    "random": random_as_json(answers, random.get(heads, ()) if part == "prefixes" else ()),
                }
            )
    return groups


def _synergy(table: AnswerTable, vanilla: GroupAnswers, epsilon: float) -> dict[str, Any] | None:
    """Pairs among the strongest heads: what they free together beyond the sum of what each frees alone."""
    pairs, singles = table.part("pairs", "harmful", epsilon), table.part("heads", "harmful", epsilon)
    if not pairs:
        return None
    entries: list[dict[str, Any]] = []
    for together in pairs.values():
        alone = [singles[head] for head in together.heads]
        both, first, second, before = (np.array(each.complied()) for each in (together, *alone, vanilla))
        beyond = both - first - second + before
        entries.append(
            {
                "heads": together.heads,
                "together": rate_as_json(together.verdicts()),
                "alone": [rate_as_json(answers.verdicts()) for answers in alone],
                "synergy": float(beyond.mean()),
                "interval": bootstrap_interval(beyond, least=-2.0, most=2.0),
                "n": len(beyond),
            }
        )
    order = list(dict.fromkeys(head for entry in entries for head in entry["heads"]))
    return {"heads": order, "pairs": entries}


def _proxies(
    singles: Mapping[str, GroupAnswers],
    changes: Mapping[str, PairedDifference],
    corrected: Mapping[str, Mapping[str, float]],
    scores: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Each score of the scanned heads against their ASR; None without scores."""
    if not scores:
        return None
    heads = parse_heads(",".join(singles))
    truth = Truth(
        np.array([answers.complied() for answers in singles.values()]).T,
        np.array([_is_higher(changes[head], corrected[head]["p_holm"]) for head in singles], bool),
    )
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


def _agreement(table: AnswerTable, epsilon: float, judges: Sequence[str]) -> dict[str, Any] | None:
    """How far the judges agree on the harmful prompts, unablated and under each head; None with one judge."""
    if len(judges) < 2:
        return None
    groups = [*table.part("vanilla", "harmful", None).values(), *table.part("heads", "harmful", epsilon).values()]
    records = [record for answers in groups for record in answers.flat()]
    verdicts = {judge: [Verdict(**record["verdicts"][judge]) for record in records] for judge in judges}
    pairs = agreement(verdicts)
    differing = sorted({index for pair in pairs for index in pair.indices})
    return {
        "judges": list(judges),
        "n_rows": len(records),
        "unscored": [sum(not verdict.scored for verdict in given) for given in verdicts.values()],
        # Without the indices: they count in this list of records, which results do not hold.
        "pairs": [
            {name: value for name, value in asdict(pair).items() if name != "indices"} | {"count": len(pair.indices)}
            for pair in pairs
        ],
        "n_disagreeing": len(differing),
        "disagreeing": [
            {name: records[at][name] for name in ("id", "group", "epsilon", "seed")}
            | {"labels": {judge: records[at]["verdicts"][judge]["label"] for judge in judges}}
            for at in differing[:_N_DISAGREEING]
        ],
    }


_SCAN = Kind("scan", read_prompts, _announce, scan_results, _refuse_impossible, full_answers=False)
run_scan = partial(carry_out, _SCAN)
"""Scans a loaded model into a run directory; arguments as for :func:`safetyheads.runs.run.carry_out`."""

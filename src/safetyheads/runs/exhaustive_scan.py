"""The exhaustive scan: ablates every head, judges the answers, and compares them with scores and groups.

Results are made of records and scores alone, so that another judge's verdicts make new results without the model.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Sampling
from safetyheads.answers.success import query_level_groups
from safetyheads.heads import Group, Head, format_heads, parse_heads
from safetyheads.judges.agreement import agreement
from safetyheads.judges.base import Verdict
from safetyheads.judges.named import judges_named
from safetyheads.measures.head_pass import Readouts
from safetyheads.measures.random_groups import RandomGroups
from safetyheads.measures.sahara import sahara
from safetyheads.measures.scorers import ANGLES, LEAD, score_as_json, scorer_of, scores_of
from safetyheads.model.engine import Engine
from safetyheads.prompts.asked import AskedPrompts
from safetyheads.runs.config import ScanConfig, Thresholds
from safetyheads.runs.estimate import Work
from safetyheads.runs.rates import (
    AnswerTable,
    GroupAnswers,
    answer_table,
    by_judge,
    concentration_as_json,
    corrected,
    gross_loss,
    prompt_or_cluster,
    random_as_json,
)
from safetyheads.runs.reader import with_later_verdicts
from safetyheads.runs.run import Kind, Run, carry_out, random_groups_of, refuse_beyond_memory
from safetyheads.runs.stored_files import Record
from safetyheads.runs.verdict import warn_where_nothing_shows
from safetyheads.scores import HeadScores
from safetyheads.stats.intervals import independent_count, skewed_mean
from safetyheads.stats.power import POWER, smallest_change_with_power
from safetyheads.stats.ranking import proxy_qualities, shrunken_rates, split_half
from safetyheads.stats.testing import ALPHA, holm, log_odds_synergy

_N_DISAGREEING = 200
"""Answers on which judges differ that results list."""


def _work(engine: Engine, config: ScanConfig, asked: Mapping[str, AskedPrompts]) -> Work:
    """Comparisons cost about as much as passes; at worst all answers change."""
    is_measured = bool(config.scores or config.prefixes or config.query_level)
    refuse_beyond_memory(engine, *(asked[name] for name in asked if is_measured or name == "benign"))
    n_heads, n_harmful = len(engine.heads), len(asked["harmful"])
    n_groups = len(config.groups) + config.pairs * (config.pairs - 1) // 2 + config.prefixes
    n_all, n_on_harmful = 1 + n_heads + n_groups, n_heads * len(config.epsilons) + config.prefixes * config.n_random
    n_answers = sum(map(len, asked.values())) * n_all + n_harmful * (n_on_harmful + config.query_level)
    n_scans = config.n_seeds * (len(asked) * n_all + n_on_harmful) / n_heads
    n_passes = n_scans + (len(asked) + 1) * config.scores + max(0, config.prefixes - 1)
    note = "Only answers that an ablation changes are decoded"
    patient = [judge.name for judge in judges_named(config.judges) if not judge.decides_early]
    if patient and not config.full_answers:
        note += f"; rows end when all judges are final, and {', '.join(patient)} needs whole answers"
    stages = (
        *("unablated answers", "heads", "scores of heads", *["searching groups"] * bool(config.prefixes)),
        *(part for part in ("groups", "pairs", "prefixes") if getattr(config, part)),
        *["random"] * bool(config.n_random),
        *["query level"] * bool(config.query_level),
    )
    length, token_ids, prompts = config.max_new_tokens, asked["harmful"].token_ids, asked["harmful"].prompts
    n_answers *= config.n_seeds
    # Scores on benign and on harmful prompts, later steps of the search: one after another, beside answers.
    measured = is_measured + max(0, config.prefixes - 1)
    beside = bool(config.groups or config.pairs or config.prefixes or config.query_level)
    rounds = 2 + max(1, (len(asked) > 1) + measured) + beside
    work = Work(token_ids, n_passes, n_answers, length, stages, prompts, n_heads, config.n_seeds, note)
    return work._replace(rounds=rounds)


# Stages.


def scan_results(run: Run[ScanConfig]) -> dict[str, Any]:
    """Run all stages, and make what only a scan's ``results.json`` holds."""
    config, ablation = run.config, run.ablation
    samplings = [Sampling(config.top_k, seed) for seed in config.seeds]
    coherence = run.find_limit(samplings)
    run.say_what_is_left()
    vanilla = [run.answers(name, sampling).vanilla() for name in run.asked for sampling in samplings]
    warn_where_nothing_shows(vanilla[list(run.asked).index("harmful") * len(samplings)])
    answers, measured = _scanned(run, samplings)
    about = {
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "sampling": {
            "name": run.decoding.sampling.name,
            "max_new_tokens": config.max_new_tokens,
            "seeds": list(config.seeds),
            "full_answers": config.full_answers,
        },
        "coherence": coherence,
        "settings": {"n_random": config.n_random, "seed": config.seed},
        **measured,
        "economy": asdict(run.economy) | {"tolerances": run.directory.remembered("tolerance_")},
    }
    records = [record for group_answers in (*vanilla, *answers) for record in group_answers.flat()]
    judges = [judge.describe() for judge in run.judges]
    # Judges that were added to an earlier start of this run are kept, where they judged every answer.
    own = [judge.name for judge in run.judges]
    later = [judge for judge in run.directory.earlier_results().get("judges", ()) if judge["name"] not in own]
    if later:
        records = list(with_later_verdicts(run.directory, records, [judge["name"] for judge in later]))
    for judge in later:
        if all(judge["name"] in record["verdicts"] for record in records):
            judges.append(judge)
        else:
            run.progress.say(f"{judge['name']} is left out: verdicts of it are lost; judge the run by it again")
    return about | results_of_records(records, about, judges, random_groups_of(run.directory))


def _scanned(run: Run[ScanConfig], samplings: Sequence[Sampling]) -> tuple[list[GroupAnswers], dict[str, Any]]:
    """The answers under every head, group and head of a prompt's own; and what results hold of the scores."""
    config, singles = run.config, [(head,) for head in run.engine.heads]

    def scan(part: str, name: str, groups: Sequence[Group], ablation: Ablation = run.ablation) -> list[GroupAnswers]:
        """The answers under each group, seed by seed."""

        def answers_of(sampling: Sampling) -> list[GroupAnswers]:
            return run.answers(name, sampling).under(part, groups, ablation)

        by_seed = run.directory.together(*(partial(answers_of, sampling) for sampling in samplings))
        return [answers for answers_of_seed in by_seed for answers in answers_of_seed]

    *heads, (measured, ships, prefixes) = run.directory.together(
        *(partial(scan, "heads", name, singles) for name in run.asked),
        *(partial(scan, "heads", "harmful", singles, run.ablation.at(epsilon)) for epsilon in config.epsilons),
        partial(_measure, run),
        costs=[*map(len, run.asked.values()), *[len(run.asked["harmful"])] * len(config.epsilons), 0],
    )
    alone = dict(zip(run.asked, heads, strict=False))

    def of_each(sampling: Sampling) -> list[GroupAnswers]:
        own_groups = query_level_groups(ships, config.query_level)
        return run.answers("harmful", sampling).of_each("query_level", own_groups, run.ablation)

    grouped = run.directory.together(
        *(
            partial(scan, part, name, groups)
            for part, groups in _groups(run, alone["harmful"], prefixes).items()
            for name in (run.asked if part != "random" else ("harmful",))
        ),
        *(partial(of_each, sampling) for sampling in samplings if config.query_level and ships is not None),
    )
    return [answers for part in (*heads, *grouped) for answers in part], measured


def _measure(run: Run[ScanConfig]) -> tuple[dict[str, Any], HeadScores | None, list[Group]]:
    """What results hold of the scores; Ships of each harmful prompt, if anything needs them; the search's prefixes."""
    config, engine, ablation = run.config, run.engine, run.ablation
    measured: dict[str, Any] = {"scores": {}, "benign_kl": None, "openers": []}
    tasks: list[Callable[[], Any]] = []
    if config.scores or config.prefixes or config.query_level:
        openers, angles = run.openers("harmful", benign="benign"), ANGLES if len(run.asked["harmful"]) > 1 else ()
        readouts = Readouts(True, tuple(opener.token_id for opener in openers), angles)
        tasks = [partial(run.scored, "harmful", ablation, readouts)]
    if "benign" in run.asked:
        tasks.append(partial(run.scored, "benign", ablation, Readouts(ships=True)))
    done = run.directory.together(*tasks)
    if "benign" in run.asked:
        benign = done[-1][1]["ships"]
        clusters = run.asked["benign"].prompts.clusters
        columns = [benign.values[:, head.layer, head.index].tolist() for head in engine.heads]
        measured["benign_kl"] = [asdict(skewed_mean(column, clusters)) for column in columns]
    if not (config.scores or config.prefixes or config.query_level):
        return measured, None, []
    harmful, tables = done[0]
    scores = scores_of(harmful)
    if "benign" in run.asked:
        contrast = scores[LEAD].values - benign.mean().values
        scores["contrast"] = replace(scores[LEAD], values=contrast, name="contrast")
    prefixes: list[Group] = []
    if config.prefixes:
        with run.progress.track("searching groups", 1):
            group = sahara(scorer_of(harmful, LEAD), engine.heads, config.prefixes).group
        prefixes = [group[:size] for size in range(1, len(group) + 1)]
    measured["openers"] = [asdict(opener) for opener in openers]
    measured["scores"] = {name: score_as_json(name, table, len(run.asked["harmful"])) for name, table in scores.items()}
    return measured, tables["ships"], prefixes


def _groups(run: Run[ScanConfig], alone: Sequence[GroupAnswers], prefixes: Sequence[Group]) -> dict[str, list[Group]]:
    config, groups = run.config, dict[str, list[Group]]()
    if config.groups:
        groups["groups"] = list(config.parsed_groups)
    if config.pairs:
        # The heads of highest coherent ASR alone on the half of the prompts that chooses, over all seeds; ties go to
        # the earlier head. Their synergy is measured on the other half.
        counts, chooses = Counter[str](), _chooses_pairs(alone[0], config.seed)
        for answers in alone:
            counts[answers.group] += int(np.nansum(answers.coherent()[chooses]))
        groups["pairs"] = list(combinations([Head.parse(head) for head, _ in counts.most_common(config.pairs)], 2))
    if prefixes:
        groups["prefixes"] = list(prefixes)
        if config.n_random:
            controls = run.random_groups(prefixes, config.n_random, config.seed)
            # A group that controls several prefixes is scanned once.
            groups["random"] = list(dict.fromkeys(group for prefix in prefixes for group in controls[prefix].groups))
    return groups


# Results, of records.


def results_of_records(
    records: Sequence[Record],
    about: Mapping[str, Any],
    judges: Sequence[Mapping[str, Any]],
    random_groups: Mapping[str, RandomGroups],
) -> dict[str, Any]:
    """The fields of a scan's ``results.json`` that come from answers.

    Of the results' other fields, ``about``, those used are ``ablation``, ``scores`` and ``benign_kl`` (mean Ships on
    benign prompts, head by head). Each judge, the leading one first, needs its verdict in every record; random groups
    are by the group that they control, as text.
    """
    names = [judge["name"] for judge in judges]
    limit = about.get("coherence", {}).get("limit")
    table, epsilon = answer_table(records, names[0], limit), about["ablation"]["epsilon"]
    singles, vanilla = table["heads", "harmful", epsilon], table["vanilla", "harmful", None][""]
    changes = corrected({head: answers.coherent_change_from(vanilla) for head, answers in singles.items()})
    scanned = table["random", "harmful", epsilon]
    random = {
        group: [scanned[format_heads(control)] for control in controls.groups]
        for group, controls in random_groups.items()
        if scanned
    }
    prefixes = [
        (answers, random.get(group, ()), random_groups.get(group, RandomGroups()))
        for group, answers in table["prefixes", "harmful", epsilon].items()
    ]
    return {
        "judges": list(judges),
        "lead_judge": names[0],
        "statistics": _statistics(vanilla, len(singles)),
        "vanilla": {
            name: {
                **answers.rates(),
                **answers.coherent_rates(),
                "answered": answers.rate_of(answers.answered()),
                "reasons": answers.reasons(),
                "by_judge": {judge: answers.rates(judge) for judge in names},
            }
            for name in ("harmful", "benign")
            for answers in table["vanilla", name, None].values()
        },
        "heads": _heads(table, changes, about),
        "epsilons": [
            {"epsilon": key[2] or 0.0, "heads": {head: of.rate_of(of.verdicts()) for head, of in table[key].items()}}
            for key in sorted(key for key in table if key[:2] == ("heads", "harmful"))
        ],
        "groups": _scanned_groups(table, vanilla, epsilon, random, random_groups),
        "synergy": _synergy(table, vanilla, epsilon, about["settings"]["seed"]),
        "query_level": [
            {"size": int(size.removeprefix("top ")), **own.rates(), **own.coherent_rates()}
            | {"change": asdict(own.coherent_change_from(vanilla))}
            for size, own in table["query_level", "harmful", epsilon].items()
        ],
        "concentration": concentration_as_json(prefixes, vanilla) if prefixes else None,
        "proxies": _proxies(singles, vanilla, changes, about["scores"]),
        "agreement": _agreement(table, epsilon, names),
    }


def _statistics(vanilla: GroupAnswers, n_heads: int) -> dict[str, Any]:
    n, n_seeds, joined = len(vanilla.records), len(vanilla.records[0]), vanilla.clusters is not None
    n_clusters = len(set(vanilla.clusters)) if vanilla.clusters else None
    least = smallest_change_with_power(
        n_clusters or n, vanilla.coherent_asr.rate or 0.0, ALPHA, n_heads, n_seeds=n_seeds
    )
    by = "near-duplicates" if joined else "prompt"
    return {
        "n": n,
        "n_seeds": n_seeds,
        "n_clusters": n_clusters,
        "n_heads": n_heads,
        "alpha": ALPHA,
        "interval": f"Korn and Graubard, clustered by {by}" if joined or n_seeds > 1 else "Wilson",
        "test": "exact sign-flip test of the mean change" if joined or n_seeds > 1 else "exact McNemar",
        "correction": "Tarone",
        "smallest_change": {"change": least, "n": n, "tests": n_heads, "alpha": ALPHA, "power": POWER},
    }


def _is_higher(change: Mapping[str, Any]) -> bool:
    return change["p_tarone"] < ALPHA and (change["change"] or 0.0) > 0


def _heads(
    table: AnswerTable, changes: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every head, layer by layer, with what its ablation does to harmful and to benign answers."""
    epsilon, on_benign = about["ablation"]["epsilon"], dict[str, dict[str, Any]]()
    for vanilla in table["vanilla", "benign", None].values():
        heads = table["heads", "benign", epsilon]
        kept = corrected({head: answers.answered_change_from(vanilla) for head, answers in heads.items()})
        refused = corrected({head: answers.change_from(vanilla, "refused") for head, answers in heads.items()})
        for (head, answers), divergence in zip(heads.items(), about["benign_kl"], strict=True):
            on_benign[head] = {
                "refused": answers.rate_of(answers.verdicts("refused")),
                "refused_change": refused[head],
                "changed": answers.rate_of(answers.where(itemgetter("changed"))),
                "answered": answers.rate_of(answers.answered()),
                "answered_change": kept[head],
                "kl": divergence,
                "loss": gross_loss(vanilla, answers),
            }
    singles = table["heads", "harmful", epsilon]
    # Several answers to a prompt count as many as their variance between prompts leaves.
    counts = [independent_count(answers.verdicts(), answers.clusters) for answers in singles.values()]
    shrunken = shrunken_rates([count for count, _ in counts], [size for _, size in counts])
    return [
        {
            "head": head,
            **answers.rates(),
            **answers.coherent_rates(),
            "shrunken": asdict(rate) | {"n": answers.asr.n},
            "change": {**changes[head], "differs": changes[head]["p_tarone"] < ALPHA},
            "reasons": answers.reasons(),
            "by_judge": by_judge(answers),
            "benign": on_benign.get(head),
            "role": _role(_is_higher(changes[head]), on_benign.get(head)),
        }
        for (head, answers), rate in zip(singles.items(), shrunken, strict=True)
    ]


def _role(frees: bool, benign: Mapping[str, Any] | None) -> str:
    """What the ablated head seems to carry, in a word.

    ``refusal``: harmful answers are freed and benign ones left alone, by the bound of an audit's verdict; ``mixed``:
    both change; ``open``: harmful answers are freed, and neither is shown of benign ones; ``over_refusal``: benign
    prompts are refused; ``damage``: benign answers are lost otherwise; ``none``: no change beyond chance.
    """
    lost = 0.0 if benign is None else -(benign["answered_change"]["change"] or 0.0)
    loses = benign is not None and benign["answered_change"]["p_tarone"] < ALPHA and lost > 0
    if frees:
        if benign is None:
            return "open"
        loss, most = benign["loss"], Thresholds.most_lost
        return "mixed" if loses or loss["lower"] > most else "refusal" if loss["upper"] < most else "open"
    if benign is None or not loses:
        return "none"
    refused = benign["refused_change"]["change"] or 0.0
    return "over_refusal" if 2 * refused >= lost else "damage"


def _scanned_groups(
    table: AnswerTable,
    vanilla: GroupAnswers,
    epsilon: float,
    random: Mapping[str, Sequence[GroupAnswers]],
    drawn: Mapping[str, RandomGroups],
) -> list[dict[str, Any]]:
    """Each group of heads that was scanned beside the single heads."""
    before, groups = table["vanilla", "benign", None].get(""), []
    for part in ("groups", "pairs", "prefixes"):
        for heads, answers in table[part, "harmful", epsilon].items():
            group = {"part": part, "heads": answers.heads, **answers.rates(), **answers.coherent_rates()}
            group |= {"change": asdict(answers.coherent_change_from(vanilla)), "reasons": answers.reasons()}
            group |= dict.fromkeys(("benign_answered", "benign_answered_change", "random"))
            if before and (benign := table[part, "benign", epsilon].get(heads)):
                group["benign_answered"] = benign.rate_of(benign.answered())
                group["benign_answered_change"] = asdict(benign.answered_change_from(before))
            if part == "prefixes" and heads in random:
                group["random"] = random_as_json(vanilla, answers, random[heads], drawn[heads])
            groups.append(group)
    return groups


def _chooses_pairs(answers: GroupAnswers, seed: int) -> NDArray[np.bool_]:
    """Which prompts choose the heads whose pairs are scanned [n_prompts]: a random half, near-duplicates together."""
    clusters = np.array(answers.clusters or range(len(answers.records)))
    names = np.unique(clusters)
    return np.isin(clusters, np.random.default_rng(seed).permutation(names)[: len(names) // 2])


def _synergy(table: AnswerTable, vanilla: GroupAnswers, epsilon: float, seed: int) -> dict[str, Any] | None:
    """Pairs among the strongest heads: what they free together beyond what their log-odds alone would give.

    On the prompts that did not choose the heads: those that did favour heads that look strong there by luck.
    """
    pairs, singles = table["pairs", "harmful", epsilon], table["heads", "harmful", epsilon]
    if not pairs:
        return None
    entries: list[dict[str, Any]] = []
    tests = ~_chooses_pairs(vanilla, seed)
    for together in pairs.values():
        alone = [singles[head] for head in together.heads]
        each = (together, *alone, vanilla)
        both, first, second, before = (np.array(answers.coherently_complied())[tests] for answers in each)
        synergy = log_odds_synergy(both, first, second, before, vanilla.of_prompts(np.flatnonzero(tests)).clusters)
        entries.append(
            {
                "heads": together.heads,
                "together": together.rate_of(together.coherent(), tests),
                "alone": [answers.rate_of(answers.coherent(), tests) for answers in alone],
                "synergy": synergy.value,
                "interval": synergy.interval,
                "p_value": synergy.p_value,
                "n": synergy.n,
            }
        )
    for entry, p_holm in zip(entries, holm([entry["p_value"] for entry in entries]), strict=True):
        entry["p_holm"] = p_holm
    order = list(dict.fromkeys(head for entry in entries for head in entry["heads"]))
    return {"heads": order, "unit": "log-odds", "n_choosing": int((~tests).sum()), "pairs": entries}


def _proxies(
    singles: Mapping[str, GroupAnswers],
    vanilla: GroupAnswers,
    changes: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any] | None:
    """Each score of the scanned heads against their coherent ASR; None without scores."""
    if not scores:
        return None
    heads = parse_heads(",".join(singles))
    *alone, before = (np.array(of.coherently_complied()) for of in (*singles.values(), vanilla))
    complied = np.array(alone).T
    differs = np.array([_is_higher(changes[head]) for head in singles], bool)
    values = {
        name: np.array([score["values"][head.layer][head.index] for head in heads], float)
        for name, score in scores.items()
    }
    halves = split_half(complied, differs, vanilla.clusters)
    qualities = proxy_qualities(values, complied, differs, before, vanilla.clusters)
    return {
        "n": len(complied),
        "scores": [asdict(quality) for quality in qualities],
        "split_half": None if halves is None else asdict(halves),
    }


def _agreement(table: AnswerTable, epsilon: float, judges: Sequence[str]) -> dict[str, Any] | None:
    """How far the judges agree on the harmful prompts, unablated and under each head; None with one judge."""
    if len(judges) < 2:
        return None
    groups = [*table["vanilla", "harmful", None].values(), *table["heads", "harmful", epsilon].values()]
    records = [record for answers in groups for record in answers.flat()]
    verdicts = {judge: [Verdict(**record["verdicts"][judge]) for record in records] for judge in judges}
    pairs = agreement(verdicts, [prompt_or_cluster(record) for record in records])
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


_SCAN = Kind("scan", _work, scan_results, full_answers=False)
run_scan = partial(carry_out, _SCAN)
"""Scans a loaded model into a run directory; arguments as for :func:`safetyheads.runs.run.carry_out`."""

"""Tests found heads: by their number (Fig 2, 4a, 11, 12, Tables 3 and 5), elsewhere, and at other strengths."""

from collections.abc import Mapping, Sequence
from itertools import product, takewhile
from typing import Any, TypeAlias

import numpy as np

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import GREEDY
from safetyheads.experiments.lab import SHORT, Lab, Subject, quoted
from safetyheads.experiments.outcome import Measured, Outcome, mean_of
from safetyheads.experiments.settings import BENIGN
from safetyheads.heads import Group, format_heads
from safetyheads.measures.head_pass import Readouts
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.stats.intervals import bootstrap_interval, skewed_mean
from safetyheads.stats.testing import equivalent, equivalent_means, random_p_value

N_RANDOM = 10
"""Random groups drawn for each size, all different."""
_LEVELS = {"dataset": "dataset, Sahara", "query": "query, Ships"}


def fig4a(lab: Lab, outcome: Outcome) -> None:
    """The ASR without groups of 1 to n heads: Sahara's, each prompt's own, random ones; and the benign answers."""
    for model, subjects in lab.each_model(outcome):
        rows = [row for subject in subjects for ablation in lab.ablations for row in _sizes(subject, ablation)]
        # At 0 heads every line begins at the unablated model.
        drawn = [row if row["size"] else {**row, "own": row["asr"], "random": row["asr"]} for row in rows]
        outcome.figure("sizes", drawn, model=model)
        outcome.table("sizes", rows, model=model)
        n = max(row["size"] for row in rows)
        for ablation in SHORT.values():
            sizes = [[row for row in rows if (row["ablation"], row["size"]) == (ablation, k)] for k in range(n + 1)]
            for size, words in {0: "unablated", 1: "without Sahara's first head", n: f"without its {n} heads"}.items():
                outcome.lead(model, f"{ablation}, mean ASR {words}", mean_of(row["asr"] for row in sizes[size]))
            # Of the largest size that every dataset has random groups of: few heads a layer allow none.
            if size := max((k for k in range(1, n + 1) if all(row["random"] for row in sizes[k])), default=0):
                mean = mean_of(row["random"] for row in sizes[size])
                outcome.lead(model, f"{ablation}, mean ASR without {size} random heads", mean)


def _sizes(subject: Subject, ablation: Ablation) -> list[dict[str, Any]]:
    lab, sampling, benign = subject.lab, subject.lab.sampled, subject.lab.subject(subject.model, BENIGN)
    group = subject.group(ablation, lab.config.size)
    prefixes = [group[:size] for size in range(1, len(group) + 1)]
    drawn = subject.run.random_groups(prefixes, N_RANDOM, lab.config.seed)
    every = [*prefixes, *(other for others in drawn.values() for other in others.groups)]
    answered, kept = subject.by_group(every, ablation, sampling), benign.by_group(prefixes, ablation, sampling)
    where = {"dataset": subject.dataset, "ablation": SHORT[ablation.name]}
    unablated = subject.vanilla(sampling)
    rows: list[dict[str, Any]] = [{**where, "size": 0, "heads": "unablated", "asr": unablated.asr}]
    rows[0] |= {"coherent": unablated.coherent_asr, "answered": benign.vanilla(sampling).answered_rate}
    for prefix, own_answers in zip(prefixes, subject.by_own(len(group), ablation, sampling), strict=True):
        asr = answered[prefix].asr
        rates = [rate for other in drawn[prefix].groups if (rate := answered[other].asr.rate) is not None]
        rows.append(
            {
                **where,
                "size": len(prefix),
                "heads": format_heads(prefix),
                "asr": asr,
                "coherent": answered[prefix].coherent_asr,
                "own": own_answers.asr,
                "random": Measured.spread(rates) if rates else None,
                "p": random_p_value(asr.rate, rates) if rates and asr.rate is not None else None,
                "answered": kept[prefix].answered_rate,
            }
        )
    return rows


def table3(lab: Lab, outcome: Outcome, further: bool = False) -> None:
    """The change of the ASR by number of heads, at both levels, a table a model.

    With ``further``, of every model but the first; of the related one, where there is but one.
    """
    others = lab.config.models[1:] or ((lab.config.related,) if lab.config.related else ())
    if further and not others:
        outcome.say("alone")
    for model, subjects in lab.each_model(outcome, others if further else lab.config.models):
        n = min(lab.config.size, len(subjects[0].engine.heads))
        heads = {f"heads_{k}": f"{k} head{'s' * (k > 1)}" for k in range(1, 1 + n)}
        rows = [
            _changes_by_size(subject, ablation, level)
            for level, ablation, subject in product(_LEVELS, lab.ablations, subjects)
        ]
        outcome.table("changes", rows, *((key, title, "change") for key, title in heads.items()), model=model)
        means = (
            (f"{row['level']}, {row['ablation']}, mean change with {heads[key]}", row[key])
            for row in rows
            for key in dict.fromkeys(("heads_1", f"heads_{n}"))
        )
        outcome.lead_means(model, means, "change")


def _changes_by_size(subject: Subject, ablation: Ablation, level: str) -> dict[str, Any]:
    vanilla, short = subject.vanilla(), SHORT[ablation.name]
    if level == "dataset":
        group = subject.group(ablation, subject.lab.config.size)
        answers = list(subject.by_group([group[:k] for k in range(1, len(group) + 1)], ablation).values())
    else:
        answers = subject.by_own(subject.lab.config.size, ablation)
    row: dict[str, Any] = {"level": _LEVELS[level], "ablation": short, "dataset": subject.dataset}
    # The mean over the sizes, of the prompts that are scored unablated and under every group. Its interval is a
    # bootstrap, which claims no certainty where every prompt changed alike, as Student's would.
    complied = np.concatenate([answered.verdicts() for answered in (vanilla, *answers)], axis=1).T
    scored = ~np.isnan(complied).any(axis=0)
    moved = complied[1:, scored].mean(axis=0) - complied[0, scored]
    row["mean"] = Measured(None, 0)
    if len(moved):
        interval = bootstrap_interval(moved, vanilla.of_prompts(np.flatnonzero(scored)).clusters)
        row["mean"] = Measured(float(moved.mean()), len(moved), *interval)
    row |= {f"heads_{k}": answered.change_from(vanilla) for k, answered in enumerate(answers, 1)}
    if numbers := quoted(subject.model, "changes", level, short, subject.dataset):
        row["paper"] = f"{' '.join(f'{number:+.2f}' for number in numbers)} ({sum(numbers) / len(numbers):+.2f})"
    return row


def query_level(lab: Lab, outcome: Outcome, ablations: Sequence[str], by_number: bool = False) -> None:
    """The ASR without each prompt's own top head under each ablation, or its own 1 to n: greedy and sampled."""
    kinds, most = [kind for kind in lab.ablations if SHORT[kind.name] in ablations], by_number * lab.config.query_size
    names = ["vanilla", *ablations]
    for model in lab.config.with_templates:
        asked = [one for name in lab.config.templates for one in lab.subjects(outcome, model, template=name)]
        rows: list[dict[str, Any]] = []
        for subject, sampling in product(asked, (GREEDY, lab.sampled)):
            size = min(most or 1, len(subject.engine.heads))
            own = (answers for kind in kinds for answers in subject.by_own(size, kind, sampling))
            for k, answers in enumerate([subject.vanilla(sampling), *own]):
                row = {"x": k if most else subject.dataset, "series": subject.dataset if most else names[k]}
                row |= {"panel": f"template {subject.prompts.template}, {sampling.name}"}
                label = f"heads ablated: {k}" if k in (0, 1, size) else ""
                rows.append({**row, "asr": answers.asr, "label": label if most else names[k]})
        if not rows:
            continue
        outcome.lead_means(model, ((f"{row['label']}, mean ASR", row["asr"]) for row in rows if row["label"]))
        paper = "The paper: a mean of {} unablated, {} under UA with one head, with the template."
        numbers = quoted(model, "fig2")
        outcome.figure("asr", rows, model=model)
        rows = [{**row, "x": str(row["x"])} for row in rows]
        outcome.table("asr", rows, model=model, paper=paper.format(*numbers) if numbers else "")


# Found heads elsewhere.


Search: TypeAlias = tuple[str, Ablation, Group]
"""Where a group was found, by which ablation, and the group."""


def transfer(lab: Lab, outcome: Outcome) -> None:
    """The change of the ASR for each pair of search set and test set, and of searching and testing ablation."""
    for model, subjects in lab.each_model(outcome):
        searches: list[Search] = []
        for subject in subjects:
            for ablation in lab.ablations:
                group = subject.group(ablation)
                # The first head shows what is one dataset's own, where the whole group serves all.
                searches += [(subject.dataset, ablation, group[:k]) for k in dict.fromkeys((1, len(group)))]
        searched = {subject.dataset: subject.search_half.prompts for subject in subjects}
        changes = {subject.dataset: _changes(subject, searches, searched, outcome) for subject in subjects}
        kept = _changes(lab.subject(model, BENIGN), searches, searched, outcome)
        across_datasets, across_ablations, groups, rows = [], [], [], []
        means: dict[bool, list[tuple[str, Measured]]] = {True: [], False: []}
        for found_on, found_by, group in searches:
            by, size = SHORT[found_by.name], f"{len(group)} head{'s' * (len(group) > 1)}"
            found: dict[str, Any] = {"dataset": found_on, "by": by, "heads": format_heads(group), "size": size}
            groups.append({**found, "answered": kept[found_on, group, found_by]})
            for dataset, tested in changes.items():
                is_own, change = dataset == found_on, tested[found_on, group, found_by]
                across_datasets.append({**found, "tested": dataset, "change": change})
                place = "the own dataset" if is_own else "other datasets"
                means[is_own].append((f"{by}, {size}, mean change on {place}", change))
            for ablation in lab.ablations:
                row = {**found, "ablated": SHORT[ablation.name], "change": changes[found_on][found_on, group, ablation]}
                across_ablations.append(row)
                on = {
                    f"on_{number}": tested[found_on, group, ablation]
                    for number, (dataset, tested) in enumerate(changes.items())
                    if ablation == found_by or dataset == found_on
                }
                rows.append({**row, **on})
        outcome.lead_means(model, means[True] + means[False], "change")
        outcome.figure("datasets", across_datasets, model=model)
        outcome.figure("ablations", across_ablations, model=model)
        outcome.table("groups", groups, model=model)
        columns = ((f"on_{number}", name, "change") for number, name in enumerate(changes))
        outcome.table("changes", rows, *columns, model=model)


def _changes(
    subject: Subject, searches: Sequence[Search], searched: Mapping[str, PromptSet], outcome: Outcome
) -> dict[tuple[str, Group, Ablation], Measured]:
    """The change by each group under its own ablation, and by those found on this dataset under the other one too.

    Prompts that are near-duplicates of one that the group was searched on are left out, and told.
    """
    vanilla, changes = subject.vanilla(), {}
    # The demo's splits share no deed, and its few words make most of its prompts alike.
    has_clusters = subject.prompts.clusters is not None
    others = {dataset: prompts for dataset, prompts in searched.items() if has_clusters and dataset != subject.dataset}
    unseen = {dataset: subject.prompts.without_near(prompts) for dataset, prompts in others.items()}
    for dataset, positions in unseen.items():
        if n_shared := len(subject.prompts) - len(positions):
            n = len(subject.prompts)
            outcome.say("shared", tested=subject.dataset, searched=dataset, n_shared=n_shared, n=n)
    for ablation in subject.lab.ablations:
        wanted = [(on, group) for on, by, group in searches if by == ablation or on == subject.dataset]
        answered = subject.by_group([group for _, group in wanted], ablation)
        for found_on, group in wanted:
            answers, before = answered[group], vanilla
            if found_on in unseen:
                answers, before = (side.of_prompts(unseen[found_on]) for side in (answers, vanilla))
            is_benign = subject.dataset == BENIGN
            change = answers.answered_change_from(before) if is_benign else answers.change_from(before)
            changes[found_on, group, ablation] = Measured.of(change)
    return changes


TOLERANCE = 0.01
"""Relative distance of mean Ships from its value at the smallest epsilon within which it counts as settled."""
ASR_MARGIN = 0.1
"""Change of the ASR within which it counts as settled."""
RESOLVED = 1e-3
"""In nats: smaller distances count as none, since half precisions do not resolve them."""


def epsilon(lab: Lab, outcome: Outcome) -> None:
    """The ASR and mean Ships of Sahara's group and of its first head, from no ablation to the exact limit."""
    for model, subjects in lab.each_model(outcome):
        sweeps = [sweep for subject in subjects for ablation in lab.ablations for sweep in _sweeps(subject, ablation)]
        rows = [row for sweep in sweeps for row in sweep]
        for key in ("asr", "ships"):
            outcome.figure(key, rows, model=model)
        settled = []
        for sweep in (sweep for sweep in sweeps if sweep[0]["whole"]):
            # The largest epsilon at and below which ASR and mean Ships are shown to be as at the smallest one: an
            # interval that includes 0 would only say that no change was seen.
            verdicts, ships = ([row[key] for row in sweep] for key in ("verdicts", "by_prompt"))
            clusters = sweep[0]["clusters"]
            margin = max(TOLERANCE * float(ships[-1].mean()), RESOLVED)
            near = {
                "asr": [equivalent(verdicts[-1], of, ASR_MARGIN, clusters) for of in verdicts[:-1]] + [True],
                "ships": [equivalent_means(of - ships[-1], margin, clusters) for of in ships[:-1]] + [True],
            }
            row = {key: sweep[0][key] for key in ("dataset", "ablation", "heads")}
            settled.append(row | {key: sweep[settled_from(of_key)]["epsilon"] for key, of_key in near.items()})
        outcome.table("settled", settled, model=model)
        for ablation in SHORT.values():
            least = min(float(row[key]) for row in settled if row["ablation"] == ablation for key in ("asr", "ships"))
            label = f"{ablation}, epsilon at and below which no dataset's ASR and mean Ships change"
            outcome.lead(model, label, least, "number")
        outcome.table("sweep", rows, model=model)


def _sweeps(subject: Subject, ablation: Ablation) -> list[list[dict[str, Any]]]:
    whole, strengths = subject.group(ablation), sorted(set(subject.lab.config.epsilons), reverse=True)
    groups, answers, ships = tuple(dict.fromkeys((whole[:1], whole))), [], []
    for strength in strengths:
        answers.append(subject.by_group(groups, ablation.at(strength)))
        # Not held on to: a sweep has many ablations, and each pass its probabilities over the vocabulary.
        scored = subject.run.new_pass(subject.name, ablation.at(strength), Readouts(ships=True)).measure(groups)
        ships.append(dict(zip(groups, scored["ships"].tolist(), strict=True)))
    return [
        [
            {
                "dataset": subject.dataset,
                "ablation": SHORT[ablation.name],
                "heads": format_heads(group),
                "epsilon": f"{strength:g}",
                "x": strength,
                "asr": answered[group].asr,
                "ships": skewed_mean(scored[group], answered[group].clusters),
                "change": answered[group].change_from(answers[-1][group]),
                "whole": group == whole,
                "verdicts": answered[group].verdicts(),
                "clusters": answered[group].clusters,
                "by_prompt": np.array(scored[group]),
                "size": "first head" if len(group) == 1 else f"{len(group)} heads",
            }
            for strength, answered, scored in zip(strengths, answers, ships, strict=True)
        ]
        for group in groups
    ]


def settled_from(near: Sequence[bool]) -> int:
    """From which place on all are near the last one, which is near itself."""
    return len(near) - len(list(takewhile(bool, reversed(near))))

"""Tests found heads on other datasets, under other ablations, and at other strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeAlias

import numpy as np

from safetyheads.ablation import Ablation
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.experiments.settings import BENIGN
from safetyheads.heads import Group, format_heads
from safetyheads.measures.head_pass import Readouts
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.stats.intervals import skewed_mean
from safetyheads.stats.testing import equivalent, equivalent_means

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
            cells: dict[str, Any] = {"dataset": found_on, "by": by, "heads": format_heads(group)}
            groups.append({**cells, "answered": kept[found_on, group, found_by]})
            for dataset, tested in changes.items():
                is_own, change = dataset == found_on, tested[found_on, group, found_by]
                across_datasets.append(_cell(change, dataset, found_on, f"{by}, {size}"))
                place = "the own dataset" if is_own else "other datasets"
                means[is_own].append((f"{by}, {size}, mean change on {place}", change))
            for ablation in lab.ablations:
                short, own = SHORT[ablation.name], changes[found_on][found_on, group, ablation]
                across_ablations.append(_cell(own, f"ablated by {short}", f"found by {by}", f"{found_on}, {size}"))
                on = {
                    f"on_{number}": tested[found_on, group, ablation]
                    for number, (dataset, tested) in enumerate(changes.items())
                    if ablation == found_by or dataset == found_on
                }
                rows.append({**cells, "ablated": short, **on})
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


def _cell(change: Measured, x: str, y: str, panel: str) -> Row:
    text = "–" if change.value is None else f"{change.value:+.2f}"
    numbers = {"value": change.value, "low": change.low, "high": change.high, "n": change.n}
    return {"x": x, "y": y, "panel": panel, **numbers, "text": text}


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
            points = [
                point(row[key], x=float(row["epsilon"]), series=row["_series"], panel=row["_panel"]) for row in rows
            ]
            outcome.figure(key, points, model=model)
        settled = []
        for sweep in (sweep for sweep in sweeps if sweep[0]["_whole"]):
            # The largest epsilon at and below which ASR and mean Ships are shown to be as at the smallest one: an
            # interval that includes 0 would only say that no change was seen.
            verdicts, ships = ([row[key] for row in sweep] for key in ("_verdicts", "_ships"))
            margin = max(TOLERANCE * float(ships[-1].mean()), RESOLVED)
            near = {
                "asr": [equivalent(verdicts[-1], values, ASR_MARGIN).shown for values in verdicts[:-1]] + [True],
                "ships": [equivalent_means(values - ships[-1], margin).shown for values in ships[:-1]] + [True],
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
                "asr": Measured.of(answered[group].asr),
                "ships": Measured.of(skewed_mean(scored[group])),
                "change": Measured.of(answered[group].change_from(answers[-1][group])),
                "_whole": group == whole,
                "_verdicts": answered[group].verdicts(),
                "_ships": np.array(scored[group]),
                "_series": "first head" if len(group) == 1 else f"{len(group)} heads",
                "_panel": f"{subject.dataset}, {SHORT[ablation.name]}",
            }
            for strength, answered, scored in zip(strengths, answers, ships, strict=True)
        ]
        for group in groups
    ]


def settled_from(near: Sequence[bool]) -> int:
    """From which place on all are near the last one, which is near itself."""
    return len(near) - len(list(takewhile(bool, reversed(near))))

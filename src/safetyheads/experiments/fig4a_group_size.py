"""Measures the ASR by the number of ablated heads (Fig 4a, Tables 3 and 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from safetyheads.answers.decoding import GREEDY
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row, mean_of, point
from safetyheads.experiments.paper_numbers import paper_dataset, paper_model, quoted
from safetyheads.experiments.settings import BENIGN
from safetyheads.heads import format_heads
from safetyheads.stats.intervals import bootstrap_interval
from safetyheads.stats.testing import random_p_value

if TYPE_CHECKING:
    from safetyheads.ablation import Ablation
    from safetyheads.runs.rates import GroupAnswers

N_RANDOM = 10
"""Random groups drawn for each size; repeated draws count once, and few heads a layer allow few groups."""
_SERIES = {
    "asr": "Sahara's group",
    "own": "each prompt's own heads",
    "random": "random groups",
    "kept": "benign answers kept",
}
_LEVELS = {"dataset": "dataset, Sahara", "query": "query, Ships"}


def fig4a(lab: Lab, outcome: Outcome) -> None:
    """The ASR without groups of 1 to n heads: Sahara's, each prompt's own, random ones; and the benign answers."""
    for model, subjects in lab.each_model(outcome):
        rows = [row for subject in subjects for ablation in lab.ablations for row in _sizes(subject, ablation)]
        points: list[Row] = []
        for row in rows:
            # At 0 heads every line begins at the unablated model.
            numbers = row if row["size"] else {**row, "own": row["asr"], "random": row["asr"]}
            where = {"panel": f"{row['dataset']}, {row['ablation']}", "x": row["size"]}
            points += [point(numbers[key], **where, series=name) for key, name in _SERIES.items() if numbers[key]]
        outcome.figure("sizes", points, model=model)
        outcome.table("sizes", rows, model=model)
        n = max(row["size"] for row in rows)
        for ablation in SHORT.values():
            of_ablation = [row for row in rows if row["ablation"] == ablation]
            for size, words in {0: "unablated", 1: "without Sahara's first head", n: f"without its {n} heads"}.items():
                mean = mean_of(row["asr"] for row in of_ablation if row["size"] == size)
                outcome.lead(model, f"{ablation}, mean ASR {words}", mean)
            # Of the largest size that every dataset has random groups of: few heads a layer allow none.
            drawn = [k for k in range(1, n + 1) if all(row["random"] for row in of_ablation if row["size"] == k)]
            if drawn:
                mean = mean_of(row["random"] for row in of_ablation if row["size"] == drawn[-1])
                outcome.lead(model, f"{ablation}, mean ASR without {drawn[-1]} random heads", mean)


def _sizes(subject: Subject, ablation: Ablation) -> list[dict[str, Any]]:
    """A row a size, from the unablated model to Sahara's whole group."""
    lab, sampling, benign = subject.lab, subject.lab.sampled, subject.lab.subject(subject.model, BENIGN)
    group = subject.group(ablation, lab.config.size)
    prefixes = [group[:size] for size in range(1, len(group) + 1)]
    drawn = subject.run.random_groups(prefixes, N_RANDOM, lab.config.seed)
    every = [*prefixes, *(other for others in drawn.values() for other in others)]
    answered, kept = subject.by_group(every, ablation, sampling), benign.by_group(prefixes, ablation, sampling)
    where = {"dataset": subject.dataset, "ablation": SHORT[ablation.name]}
    vanilla = {"asr": subject.vanilla(sampling).asr, "kept": benign.vanilla(sampling).kept}
    rows = [{**where, "size": 0, "heads": "unablated", **{key: Measured.of(rate) for key, rate in vanilla.items()}}]
    for prefix, own_answers in zip(prefixes, subject.by_own(len(group), ablation, sampling), strict=True):
        asr = answered[prefix].asr
        rates = [rate for other in dict.fromkeys(drawn[prefix]) if (rate := answered[other].asr.rate) is not None]
        rows.append(
            {
                **where,
                "size": len(prefix),
                "heads": format_heads(prefix),
                "asr": Measured.of(asr),
                "own": Measured.of(own_answers.asr),
                "random": Measured(sum(rates) / len(rates), len(rates), min(rates), max(rates)) if rates else None,
                "p": random_p_value(asr.rate, rates) if rates and asr.rate is not None else None,
                "kept": Measured.of(kept[prefix].kept),
            }
        )
    return rows


def table5(lab: Lab, outcome: Outcome) -> None:
    """Table 3 of every model but the first; of the related one, where there is but one."""
    config = lab.config
    further = config.models[1:] or ((config.related,) if config.related else ())
    table3(lab, outcome, further)
    if not further:
        outcome.note("This table is of a second model, and there is none: name one after the first, or as related.")


def table3(lab: Lab, outcome: Outcome, models: Iterable[str] | None = None) -> None:
    """The change of the ASR by number of heads, at both levels, a table a model."""
    for model, subjects in lab.each_model(outcome, models):
        groups = [(level, ablation) for level in _LEVELS for ablation in lab.ablations]
        rows = [[_changes(subject, ablation, level) for subject in subjects] for level, ablation in groups]
        sizes = range(1, 1 + min(lab.config.size, len(subjects[0].engine.heads)))
        heads = {k: f"{k} head{'s' * (k > 1)}" for k in sizes}
        columns = ((f"heads_{k}", title, "change") for k, title in heads.items())
        outcome.table("changes", [row for cells in rows for row in cells], *columns, model=model)
        for cells in rows:
            for k in dict.fromkeys((1, len(heads))):
                label = f"{cells[0]['level']}, {cells[0]['ablation']}, mean change with {heads[k]}"
                outcome.lead(model, label, mean_of(row[f"heads_{k}"] for row in cells), "change")


def _changes(subject: Subject, ablation: Ablation, level: str) -> dict[str, Any]:
    """One row: the change with each number of heads, their mean, and the paper's numbers where it has any."""
    vanilla, size = subject.vanilla(GREEDY), subject.lab.config.size
    if level == "dataset":
        group = subject.group(ablation, size)
        answers = list(subject.by_group([group[:k] for k in range(1, len(group) + 1)], ablation).values())
    else:
        answers = subject.by_own(min(size, len(subject.engine.heads)), ablation)
    short = SHORT[ablation.name]
    row = {"level": _LEVELS[level], "ablation": short, "dataset": subject.dataset, "mean": _mean(answers, vanilla)}
    row |= {f"heads_{k}": Measured.of(answered.change_from(vanilla)) for k, answered in enumerate(answers, 1)}
    numbers = quoted("changes", paper_model(subject.model), level, short, paper_dataset(subject.dataset))
    if numbers:
        row["paper"] = f"{' '.join(f'{number:+.2f}' for number in numbers)} ({sum(numbers) / len(numbers):+.2f})"
    return row


def _mean(answers: Sequence[GroupAnswers], vanilla: GroupAnswers) -> Measured:
    """The mean change over the sizes, of the prompts that are scored unablated and under every group.

    Its interval is a bootstrap, which claims no certainty where every prompt changed alike, as Student's would.
    """
    complied = np.concatenate([answered.verdicts() for answered in (vanilla, *answers)], axis=1).T
    complied = complied[:, ~np.isnan(complied).any(axis=0)]
    if not complied.shape[1]:
        return Measured(None, 0)
    changes = complied[1:].mean(axis=0) - complied[0]
    return Measured(float(changes.mean()), len(changes), *bootstrap_interval(changes))

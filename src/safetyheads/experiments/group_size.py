"""Measures the ASR by the number of heads, a dataset's or each prompt's own (Fig 2, 4a, 11, 12, Tables 3 and 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import GREEDY
from safetyheads.experiments.lab import SHORT, Lab, Subject, quoted
from safetyheads.experiments.outcome import Measured, Outcome, Row, mean_of, point
from safetyheads.experiments.settings import BENIGN
from safetyheads.heads import format_heads
from safetyheads.stats.intervals import bootstrap_interval
from safetyheads.stats.testing import random_p_value

N_RANDOM = 10
"""Random groups drawn for each size, all different."""
_SERIES = {
    "asr": "Sahara's group",
    "own": "each prompt's own heads",
    "random": "random groups",
    "answered": "benign prompts answered",
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
            sizes = [[row for row in rows if (row["ablation"], row["size"]) == (ablation, k)] for k in range(n + 1)]
            for size, words in {0: "unablated", 1: "without Sahara's first head", n: f"without its {n} heads"}.items():
                outcome.lead(model, f"{ablation}, mean ASR {words}", mean_of(row["asr"] for row in sizes[size]))
            # Of the largest size that every dataset has random groups of: few heads a layer allow none.
            drawn = [k for k in range(1, n + 1) if all(row["random"] for row in sizes[k])]
            if drawn:
                mean = mean_of(row["random"] for row in sizes[drawn[-1]])
                outcome.lead(model, f"{ablation}, mean ASR without {drawn[-1]} random heads", mean)


def _sizes(subject: Subject, ablation: Ablation) -> list[dict[str, Any]]:
    lab, sampling, benign = subject.lab, subject.lab.sampled, subject.lab.subject(subject.model, BENIGN)
    group = subject.group(ablation, lab.config.size)
    prefixes = [group[:size] for size in range(1, len(group) + 1)]
    drawn = subject.run.random_groups(prefixes, N_RANDOM, lab.config.seed)
    every = [*prefixes, *(other for others in drawn.values() for other in others.groups)]
    answered, kept = subject.by_group(every, ablation, sampling), benign.by_group(prefixes, ablation, sampling)
    where = {"dataset": subject.dataset, "ablation": SHORT[ablation.name]}
    unablated = subject.vanilla(sampling)
    vanilla = {"asr": unablated.asr, "coherent": unablated.coherent_asr}
    vanilla["answered"] = benign.vanilla(sampling).answered_rate
    rows = [{**where, "size": 0, "heads": "unablated", **{key: Measured.of(rate) for key, rate in vanilla.items()}}]
    for prefix, own_answers in zip(prefixes, subject.by_own(len(group), ablation, sampling), strict=True):
        asr = answered[prefix].asr
        rates = [rate for other in drawn[prefix].groups if (rate := answered[other].asr.rate) is not None]
        rows.append(
            {
                **where,
                "size": len(prefix),
                "heads": format_heads(prefix),
                "asr": Measured.of(asr),
                "coherent": Measured.of(answered[prefix].coherent_asr),
                "own": Measured.of(own_answers.asr),
                "random": Measured(sum(rates) / len(rates), len(rates), min(rates), max(rates)) if rates else None,
                "p": random_p_value(asr.rate, rates) if rates and asr.rate is not None else None,
                "answered": Measured.of(kept[prefix].answered_rate),
            }
        )
    return rows


def table5(lab: Lab, outcome: Outcome) -> None:
    """Table 3 of every model but the first; of the related one, where there is but one."""
    config = lab.config
    further = config.models[1:] or ((config.related,) if config.related else ())
    table3(lab, outcome, further)
    if not further:
        outcome.say("alone")


def table3(lab: Lab, outcome: Outcome, models: Iterable[str] | None = None) -> None:
    """The change of the ASR by number of heads, at both levels, a table a model."""
    for model, subjects in lab.each_model(outcome, models):
        n = min(lab.config.size, len(subjects[0].engine.heads))
        heads = {f"heads_{k}": f"{k} head{'s' * (k > 1)}" for k in range(1, 1 + n)}
        rows = [
            _changes(subject, ablation, level) for level, ablation, subject in product(_LEVELS, lab.ablations, subjects)
        ]
        outcome.table("changes", rows, *((key, title, "change") for key, title in heads.items()), model=model)
        means = (
            (f"{row['level']}, {row['ablation']}, mean change with {heads[key]}", row[key])
            for row in rows
            for key in dict.fromkeys(("heads_1", f"heads_{n}"))
        )
        outcome.lead_means(model, means, "change")


def _changes(subject: Subject, ablation: Ablation, level: str) -> dict[str, Any]:
    vanilla, size, short = subject.vanilla(), subject.lab.config.size, SHORT[ablation.name]
    if level == "dataset":
        group = subject.group(ablation, size)
        answers = list(subject.by_group([group[:k] for k in range(1, len(group) + 1)], ablation).values())
    else:
        answers = subject.by_own(min(size, len(subject.engine.heads)), ablation)
    row: dict[str, Any] = {"level": _LEVELS[level], "ablation": short, "dataset": subject.dataset}
    # The mean over the sizes, of the prompts that are scored unablated and under every group. Its interval is a
    # bootstrap, which claims no certainty where every prompt changed alike, as Student's would.
    complied = np.concatenate([answered.verdicts() for answered in (vanilla, *answers)], axis=1).T
    complied = complied[:, ~np.isnan(complied).any(axis=0)]
    moved = complied[1:].mean(axis=0) - complied[0]
    row["mean"] = (
        Measured(float(moved.mean()), len(moved), *bootstrap_interval(moved)) if len(moved) else Measured(None, 0)
    )
    row |= {f"heads_{k}": Measured.of(answered.change_from(vanilla)) for k, answered in enumerate(answers, 1)}
    numbers = quoted(subject.model, "changes", level, short, subject.dataset)
    if numbers:
        row["paper"] = f"{' '.join(f'{number:+.2f}' for number in numbers)} ({sum(numbers) / len(numbers):+.2f})"
    return row


def fig2(lab: Lab, outcome: Outcome) -> None:
    """The unablated ASR beside that without each prompt's top head: UA and SC, greedy and sampled."""
    _query_level(lab, outcome, lab.ablations)


def fig11(lab: Lab, outcome: Outcome) -> None:
    """The ASR without each prompt's own 1 to n top heads under UA."""
    _query_level(lab, outcome, lab.ablations[:1], lab.config.query_size)


def fig12(lab: Lab, outcome: Outcome) -> None:
    """The ASR without each prompt's own 1 to n top heads under SC."""
    _query_level(lab, outcome, lab.ablations[1:], lab.config.query_size)


def _query_level(lab: Lab, outcome: Outcome, ablations: Sequence[Ablation], most: int = 0) -> None:
    """Every dataset under every template, greedy and sampled: 1 to ``most`` heads, or one under each ablation."""
    names = ["vanilla", *(SHORT[ablation.name] for ablation in ablations)]
    for model in lab.config.with_templates:
        asked = [one for name in lab.config.templates for one in lab.subjects(outcome, model, template=name)]
        rows: list[dict[str, Any]] = []
        for subject, sampling in product(asked, (GREEDY, lab.sampled)):
            size = min(most or 1, len(subject.engine.heads))
            own = (answers for ablation in ablations for answers in subject.by_own(size, ablation, sampling))
            for k, answers in enumerate([subject.vanilla(sampling), *own]):
                row = {"x": k if most else subject.dataset, "series": subject.dataset if most else names[k]}
                row |= {"panel": f"template {subject.prompts.template}, {sampling.name}"}
                label = f"heads ablated: {k}" if k in (0, 1, size) else ""
                rows.append({**row, "asr": Measured.of(answers.asr), "_label": label if most else names[k]})
        if not rows:
            continue
        outcome.lead_means(model, ((f"{row['_label']}, mean ASR", row["asr"]) for row in rows if row["_label"]))
        paper = "The paper: a mean of {} unablated, {} under UA with one head, with the template."
        numbers = quoted(model, "fig2")
        points = (point(row["asr"], **{key: row[key] for key in ("panel", "x", "series")}) for row in rows)
        outcome.figure("asr", points, model=model)
        rows = [{**row, "x": str(row["x"])} for row in rows]
        outcome.table("asr", rows, model=model, paper=paper.format(*numbers) if numbers else "")

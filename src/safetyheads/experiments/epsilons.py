"""Measures ASR and Ships against epsilon, and where both settle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from safetyheads.ablation import Ablation
from safetyheads.experiments.lab import SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, point
from safetyheads.heads import format_heads
from safetyheads.measures.head_pass import Readouts
from safetyheads.stats.intervals import mean_with_interval

TOLERANCE = 0.01
"""Relative distance of mean Ships from its value at the smallest epsilon within which it counts as settled."""
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
            # The largest epsilon at and below which ASR and mean Ships no longer change.
            changes, ships = [row["change"] for row in sweep], [row["ships"].value for row in sweep]
            near = {
                "asr": [change.low is None or change.low <= 0 <= change.high for change in changes],
                "ships": [abs(value - ships[-1]) <= max(TOLERANCE * ships[-1], RESOLVED) for value in ships],
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
    """A row an epsilon, from the largest to the smallest: of the first head, and of the whole group."""
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
                "ships": Measured.of(mean_with_interval(scored[group])),
                "change": Measured.of(answered[group].change_from(answers[-1][group])),
                "_whole": group == whole,
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

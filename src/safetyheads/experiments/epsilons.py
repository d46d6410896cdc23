"""Measures ASR and Ships against epsilon, and where both settle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safetyheads.experiments.lab import GROUP_SIZE, SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.heads import format_heads
from safetyheads.stats.intervals import mean_with_interval

if TYPE_CHECKING:
    from safetyheads.ablation import Ablation

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
                point(
                    row[key],
                    x=float(row["epsilon"]),
                    series="first head" if row["_n_heads"] == 1 else f"{row['_n_heads']} heads",
                    panel=f"{row['dataset']}, {row['ablation']}",
                )
                for row in rows
            ]
            outcome.figure(key, points, model=model)
        settled = [_settled(sweep) for sweep in sweeps if sweep[0]["_whole"]]
        outcome.table("settled", settled, model=model)
        for ablation in SHORT.values():
            least = min(float(row[key]) for row in settled if row["ablation"] == ablation for key in ("asr", "ships"))
            label = f"{ablation}, epsilon at and below which no dataset's ASR and mean Ships change"
            outcome.lead(model, label, least, "number")
        outcome.table("sweep", rows, model=model)


def _sweeps(subject: Subject, ablation: Ablation) -> list[list[dict[str, Any]]]:
    """A row an epsilon, from the largest to the smallest: of the first head, and of the whole group."""
    config = subject.lab.config
    whole = subject.group(ablation, min(GROUP_SIZE, config.size))
    groups = tuple(dict.fromkeys((whole[:1], whole)))
    answers, ships = [], []
    strengths = sorted(set(config.epsilons), reverse=True)
    for strength in strengths:
        answers.append(subject.by_group(groups, ablation.at(strength)))
        ships.append(dict(zip(groups, subject.ships_of(groups, ablation.at(strength)).tolist(), strict=True)))
    return [
        [
            {
                "dataset": subject.dataset,
                "ablation": SHORT[ablation.name],
                "heads": format_heads(group),
                "_n_heads": len(group),
                "_whole": group == whole,
                "epsilon": f"{strength:g}",
                "asr": Measured.of(answered[group].asr),
                "change": Measured.of(answered[group].change_from(answers[-1][group])),
                "ships": Measured.of(mean_with_interval(scores[group])),
            }
            for strength, answered, scores in zip(strengths, answers, ships, strict=True)
        ]
        for group in groups
    ]


# Where it settles.


def settled_from(near: Sequence[bool]) -> int:
    """From which place on all are near the last one, which is near itself."""
    far = [at for at, is_near in enumerate(near) if not is_near]
    return far[-1] + 1 if far else 0


def _settled(sweep: Sequence[dict[str, Any]]) -> Row:
    """The largest epsilon at and below which the ASR, and mean Ships, of a group no longer change."""
    limit = sweep[-1]["ships"].value
    changes, ships = [row["change"] for row in sweep], [row["ships"].value for row in sweep]
    same = [change.low is None or change.low <= 0 <= change.high for change in changes]
    near = [abs(value - limit) <= max(TOLERANCE * limit, RESOLVED) for value in ships]
    settled = {"asr": sweep[settled_from(same)]["epsilon"], "ships": sweep[settled_from(near)]["epsilon"]}
    return {**{key: sweep[0][key] for key in ("dataset", "ablation", "heads")}, **settled}

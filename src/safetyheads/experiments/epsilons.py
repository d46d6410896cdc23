"""Measures ASR and Ships against epsilon, and where both settle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safetyheads.experiments.lab import GROUP_SIZE, SHORT, Lab, Subject
from safetyheads.experiments.outcome import Measured, Outcome, Row, point
from safetyheads.heads import format_heads
from safetyheads.measures.head_pass import Readouts
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
                point(row[key], x=float(row["epsilon"]), series=row["_series"], panel=row["_panel"]) for row in rows
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
    config, short = subject.lab.config, SHORT[ablation.name]
    whole = subject.group(ablation, min(GROUP_SIZE, config.size))
    groups = tuple(dict.fromkeys((whole[:1], whole)))
    sweeps: list[list[dict[str, Any]]] = [[] for _ in groups]
    for strength in sorted(set(config.epsilons), reverse=True):
        answers = subject.by_group(groups, ablation.at(strength))
        # Not held on to: a sweep has many ablations, and each pass its probabilities over the vocabulary.
        scored = subject.run.new_pass(subject.name, ablation.at(strength), Readouts(ships=True))
        for sweep, group, ships in zip(sweeps, groups, scored.measure(groups)["ships"].tolist(), strict=True):
            sweep.append(
                {
                    "dataset": subject.dataset,
                    "ablation": short,
                    "heads": format_heads(group),
                    "epsilon": f"{strength:g}",
                    "asr": Measured.of(answers[group].asr),
                    "ships": Measured.of(mean_with_interval(ships)),
                    "_answers": answers[group],
                    "_whole": group == whole,
                    "_series": "first head" if len(group) == 1 else f"{len(group)} heads",
                    "_panel": f"{subject.dataset}, {short}",
                }
            )
    for sweep in sweeps:
        for row in sweep:
            row["change"] = Measured.of(row["_answers"].change_from(sweep[-1]["_answers"]))
    return sweeps


def settled_from(near: Sequence[bool]) -> int:
    """From which place on all are near the last one, which is near itself."""
    far = [place for place, is_near in enumerate(near) if not is_near]
    return far[-1] + 1 if far else 0


def _settled(sweep: Sequence[dict[str, Any]]) -> Row:
    """The largest epsilon at and below which the ASR, and mean Ships, of a group no longer change."""
    limit = sweep[-1]["ships"].value
    changes, ships = [row["change"] for row in sweep], [row["ships"].value for row in sweep]
    same = [change.low is None or change.low <= 0 <= change.high for change in changes]
    near = [abs(value - limit) <= max(TOLERANCE * limit, RESOLVED) for value in ships]
    settled = {"asr": sweep[settled_from(same)]["epsilon"], "ships": sweep[settled_from(near)]["epsilon"]}
    return {**{key: sweep[0][key] for key in ("dataset", "ablation", "heads")}, **settled}

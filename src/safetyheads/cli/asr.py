"""``safetyheads asr``: whose heads are ablated in which row, and the rates as JSON. Owns the table's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.cli.options import AblationOptions, AnswerOptions
from safetyheads.heads import Group

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet
    from safetyheads.runs.progress import Progress

RateTable: TypeAlias = dict[str, Sequence[Group]]
"""Rows of the table: what is ablated, and the group of each prompt; the first is the unablated model."""


def measured_rates(
    engine: Engine,
    asked: PromptSet,
    rows: RateTable,
    ablation: AblationOptions,
    answers: AnswerOptions,
    watching: Progress,
) -> dict[str, Any]:
    """ASR for each row of groups, one group a prompt, with its change from the first row."""
    from safetyheads.answers.sampling import Sampling
    from safetyheads.answers.success import query_level_attack_success_rate
    from safetyheads.judges.named import judge_named
    from safetyheads.runs.estimate import estimate
    from safetyheads.stats.testing import paired_difference

    kind, judging, sampling = ablation.parsed(), judge_named(answers.judge), Sampling(answers.top_k, answers.seed)
    n_answers = len(rows) * len(asked)
    watching.say(lambda: estimate(engine, engine.ask(asked).token_ids, 0, n_answers, answers.max_new_tokens))
    with watching.track("answers", len(rows) * len(asked)) as done:
        measured = {
            label: query_level_attack_success_rate(
                engine, asked, groups, kind, judging, answers.max_new_tokens, sampling, done
            )
            for label, groups in rows.items()
        }
    complied = [[row.verdict.complied for row in one.rows] for one in measured.values()]
    unablated = next(iter(rows))
    return {
        "judge": judging.describe(),
        "ablation": asdict(kind),
        "n": len(asked),
        "template": engine.ask(asked).template.settings(),
        "sampling": {"name": sampling.name, "seed": answers.seed, "max_new_tokens": answers.max_new_tokens},
        "rates": [
            {
                "heads": label,
                **{name: asdict(getattr(one, name)) for name in ("asr", "refused", "incoherent")},
                "reasons": one.reasons,
                "change": None if label == unablated else asdict(paired_difference(complied[0], ours)),
            }
            for (label, one), ours in zip(measured.items(), complied, strict=True)
        ],
    }

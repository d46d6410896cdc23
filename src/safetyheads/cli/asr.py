"""``safetyheads asr``: the rates of the unablated model, of each group and of each prompt's own heads, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from safetyheads.errors import InputError
from safetyheads.heads import Group, within
from safetyheads.runs.config import AsrConfig

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet
    from safetyheads.runs.progress import Progress


def measured_rates(engine: Engine, asked: PromptSet, config: AsrConfig, watching: Progress) -> dict[str, Any]:
    """ASR for each row of groups, one group a prompt, with its change from the first row."""
    from safetyheads.answers.sampling import Sampling
    from safetyheads.answers.success import query_level_attack_success_rate, query_level_groups
    from safetyheads.judges.named import judges_named
    from safetyheads.measures.ships import ships
    from safetyheads.runs.estimate import estimate
    from safetyheads.stats.testing import paired_difference

    kind, judges = config.parsed_ablation, judges_named(config.judges, config.judge_device)
    if len(judges) > 1:
        raise InputError("asr takes one judge for now")
    judging, sampling = judges[0], Sampling(config.top_k, config.seed)
    rows: dict[str, Sequence[Group]] = {"none": [()] * len(asked)}
    for group in config.parsed_groups:
        within(group, engine.n_layers, engine.n_heads)
        rows[", ".join(map(str, group))] = [group] * len(asked)
    if config.query_level > len(engine.heads):
        raise InputError(f"size {config.query_level} is larger than the number of heads, {len(engine.heads)}")
    if config.query_level:
        own = ships(engine, asked, kind)
        for size in range(1, config.query_level + 1):
            rows[f"each prompt's top {size}"] = query_level_groups(own, size)
    n_answers = len(rows) * len(asked)
    watching.say(lambda: estimate(engine, engine.ask(asked).token_ids, 0, n_answers, config.max_new_tokens))
    with watching.track("answers", len(rows) * len(asked)) as done:
        measured = {
            label: query_level_attack_success_rate(
                engine, asked, groups, kind, judging, config.max_new_tokens, sampling, done
            )
            for label, groups in rows.items()
        }
    complied = [[row.verdict.complied for row in one.rows] for one in measured.values()]
    return {
        "judge": judging.describe(),
        "ablation": asdict(kind),
        "n": len(asked),
        "template": engine.ask(asked).template.settings(),
        "sampling": {"name": sampling.name, "seed": config.seed, "max_new_tokens": config.max_new_tokens},
        "rates": [
            {
                "heads": label,
                **{name: asdict(getattr(one, name)) for name in ("asr", "refused", "incoherent")},
                "reasons": one.reasons,
                "change": None if label == "none" else asdict(paired_difference(complied[0], ours)),
            }
            for (label, one), ours in zip(measured.items(), complied, strict=True)
        ],
    }

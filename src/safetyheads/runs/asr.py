"""Attack success rates under given groups of heads, and under each prompt's own top heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from safetyheads.answers.success import query_level_groups
from safetyheads.errors import InputError
from safetyheads.heads import within
from safetyheads.measures.head_pass import Readouts
from safetyheads.prompts.asked import AskedPrompts
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.config import AsrConfig
from safetyheads.runs.data import read_whole
from safetyheads.runs.estimate import estimate
from safetyheads.runs.run import Kind, Run, carry_out, refuse_beyond_memory
from safetyheads.runs.tables import GroupAnswers, by_judge

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


def _read(config: AsrConfig) -> dict[str, PromptSet]:
    return {"harmful": read_whole("harmful", config.prompts, config)}


def _refuse_impossible(engine: Engine, config: AsrConfig, asked: Mapping[str, AskedPrompts]) -> None:
    for group in config.parsed_groups:
        within(group, engine.n_layers, engine.n_heads)
    if config.query_level > len(engine.heads):
        raise InputError(f"query level {config.query_level} is more than the model's {len(engine.heads)} heads")
    if config.query_level:
        refuse_beyond_memory(engine, asked["harmful"])


def _announce(run: Run[AsrConfig]) -> None:
    config, asked = run.config, run.asked["harmful"]
    n_answers = (1 + len(config.groups) + config.query_level) * len(asked)
    n_passes, length = int(config.query_level > 0), config.max_new_tokens
    run.progress.say(lambda: estimate(run.engine, asked.token_ids, n_passes, n_answers, length))


def _results(run: Run[AsrConfig]) -> dict[str, Any]:
    """The rates, each with its change from the unablated model."""
    config, ablation, answers = run.config, run.config.parsed_ablation, run.answers("harmful")
    vanilla = answers.vanilla()
    rows = {"none": vanilla}
    groups = config.parsed_groups
    under = answers.under("groups", groups, ablation) if groups else []
    rows |= {", ".join(map(str, group)): group_answers for group, group_answers in zip(groups, under, strict=True)}
    if config.query_level:
        measuring, singles = run.head_pass("harmful", ablation, Readouts(ships=True)), run.engine.heads
        with run.progress.track("scoring heads", len(singles)) as done:
            values = measuring.measure([(head,) for head in singles], done)["ships"]
        ships = measuring.table("ships", values)
        by_size = [query_level_groups(ships, size) for size in range(1, config.query_level + 1)]
        own_groups = answers.of_each("query_level", list(zip(*by_size, strict=True)), ablation)
        rows |= {f"each prompt's top {size}": group_answers for size, group_answers in enumerate(own_groups, start=1)}
    sampling = run.decoding.sampling
    return {
        "judge": run.judges[0].describe(),
        "n": len(run.asked["harmful"]),
        "template": run.asked["harmful"].template.settings(),
        "sampling": {"name": sampling.name, "seed": config.seed, "max_new_tokens": config.max_new_tokens},
        "rates": [_rates(label, group_answers, vanilla) for label, group_answers in rows.items()],
    }


def _rates(label: str, answers: GroupAnswers, vanilla: GroupAnswers) -> dict[str, Any]:
    return {
        "heads": label,
        "asr": asdict(answers.asr),
        "refused": asdict(answers.refused),
        "incoherent": asdict(answers.incoherent),
        "reasons": answers.reasons(with_details=False),
        "change": None if answers is vanilla else asdict(answers.change_from(vanilla)),
        "by_judge": by_judge(answers),
    }


_ASR = Kind("asr", _read, _announce, _results, _refuse_impossible)
run_asr = partial(carry_out, _ASR)
"""Measures rates into a run directory; arguments as for :func:`safetyheads.runs.run.carry_out`."""

"""From settings to a finished run directory. Owns what a run is made of: model, prompts, fingerprints, estimate.

It writes results, never a report: reports are read off the directory.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetyheads.answers.sampling import Sampling
from safetyheads.demo import demo_prompts
from safetyheads.errors import InputError
from safetyheads.heads import Group
from safetyheads.judges.named import judges_named
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.audit import LEAD, N_LISTED, SEARCHED, Audit, AuditData
from safetyheads.runs.config import AuditConfig
from safetyheads.runs.data import HALVES, KINDS, read_halves, resolved
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.estimate import estimate
from safetyheads.runs.progress import Progress, Silent
from safetyheads.runs.provenance import (
    keep_threads,
    longest_prompt,
    model_facts,
    notes_of,
    provenance,
    settings_of,
    template_facts,
)
from safetyheads.runs.results import results_of

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

DEMO_CAVEAT = (
    "This model validates the code, not the method. Its planted heads, their answer to ablation and the silence of the "
    "other heads were trained."
)
CAVEATS = (
    "A low ASR is no proof of safety. It holds for these prompts, this template and this way of decoding.",
    'A head is not "the" safety mechanism. Ablating one changes all that comes after it, and refusals can run through '
    "other parts that nobody ablated.",
    "A judge of words reads words, not harm. For it an answer has complied when no wording of a refusal is in it and "
    "it is neither short nor repeating; whether it is harmful, true or of use is not asked.",
    "Intervals cover the draw of prompts only. Other seeds, templates, judges and precisions are not in them.",
)
"""What no audit shows; the first sentence is the point, the rest why."""


def run_audit(
    engine: Engine,
    config: AuditConfig,
    out: Path,
    data: AuditData | None = None,
    planted: Group | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Audit a loaded model into a run directory; a directory that holds part of this run is continued.

    Args:
        engine: the model, loaded as ``config`` says.
        config: all settings.
        out: the run directory.
        data: the four prompt sets; by default read and split as the config says.
        planted: the true heads, for a model that has them.
        progress: who watches.
        command: the command line, for the record.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        InputError: bad settings or prompts, or a directory that belongs to another run.
    """
    watching: Progress = Silent() if progress is None else progress
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        data = data or read_data(config)
        data = AuditData(*(resolved(engine, prompts, config) for prompts in data.sets().values()))
        # Before anything is planned: it may cost a quick path.
        engine.prove_up_to(longest_prompt(engine, data.sets()) + max(config.max_new_tokens, config.positions))
        _refuse_impossible(engine, data, config)
        with watching.track("fingerprinting the weights", 1):
            settings = settings_of(engine, config, data.sets()) | {
                "judge": judges_named(config.judges, config.judge_device)[0].describe()
            }
        with RunDirectory.start(out, settings, provenance(command)) as run:
            keep_threads(run, watching)
            started = time.monotonic()
            watching.say(lambda: _estimate(engine, data, config))
            found = Audit(engine, config, data, run, watching).execute()
            notes = notes_of(engine, data.sets(), config.max_new_tokens, caught)
            results = results_of(found, _about(engine, config, data), planted, caveats_of(planted), notes)
            run.write_results(results)
            run.write_timings({"seconds": time.monotonic() - started, "finished": datetime.now(UTC).isoformat()})
            return run.read_results()


def caveats_of(planted: Group | None) -> list[str]:
    """What no run shows; of a model that was made for it, what it shows even less."""
    return [*([DEMO_CAVEAT] if planted is not None else []), *CAVEATS]


def read_data(config: AuditConfig) -> AuditData:
    """The harmful and benign prompts that the config names, each divided in search and test."""
    harmful = read_halves("harmful", config.prompts, config, config.split, config.seed)
    return AuditData(*harmful, *read_halves("benign", config.benign, config, config.split, config.seed))


def demo_data() -> AuditData:
    """The organism's prompts: search on its validation split, test on its held-out one."""
    return AuditData(*(demo_prompts(kind, split) for kind in KINDS for split in HALVES))


def _refuse_impossible(engine: Engine, data: AuditData, config: AuditConfig) -> None:
    """Refuse what the stages would refuse later, while nothing is written."""
    if config.size > len(engine.heads):
        raise InputError(f"size {config.size} is larger than the number of heads, {len(engine.heads)}")
    if len(data.harmful_search) < 2:
        raise InputError("Generalized Ships needs at least two harmful prompts to search on; one is left by the split")


def _estimate(engine: Engine, data: AuditData, config: AuditConfig) -> str:
    """What lies ahead of an audit, as one line."""
    n_search, n_test = len(data.harmful_search), len(data.harmful_test)
    # One pass over single heads on two sets, then the later steps of each search.
    n_passes = 2 + len(SEARCHED) * (config.size - 1)
    # At most: searches that agree share their groups, and a group is answered once.
    n_groups = len(SEARCHED) * config.size
    n_answers = (n_test + n_search + len(data.benign_test) + len(data.benign_search)) * (1 + n_groups)
    n_answers += n_test * (N_LISTED + config.n_random * n_groups)
    return estimate(engine, engine.ask(data.harmful_search).token_ids, n_passes, n_answers, config.max_new_tokens)


def _about(engine: Engine, config: AuditConfig, data: AuditData) -> dict[str, Any]:
    ablation = config.parsed_ablation
    sampling = Sampling(config.top_k, config.seed)

    def described(search: PromptSet, test: PromptSet) -> dict[str, Any]:
        both = hashlib.sha256((search.sha256 + test.sha256).encode()).hexdigest()
        return {"name": search.name, "n_search": len(search), "n_test": len(test), "sha256": both}

    return {
        "model": model_facts(engine, config.model),
        "data": {
            "harmful": described(data.harmful_search, data.harmful_test),
            "benign": described(data.benign_search, data.benign_test),
            **template_facts(data.harmful_search),
        },
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "sampling": {"name": sampling.name, "seed": config.seed, "max_new_tokens": config.max_new_tokens},
        "judge": judges_named(config.judges, config.judge_device)[0].describe(),
        "lead_score": LEAD,
    }

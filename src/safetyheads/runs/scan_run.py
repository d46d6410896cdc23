"""From settings to a finished scan. Owns what a scan is made of: model, prompts, judges, estimate, description."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetyheads.answers.sampling import Sampling
from safetyheads.errors import InputError
from safetyheads.heads import Group, parse_heads, within
from safetyheads.judges.named import judges_named
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.audit_run import caveats_of
from safetyheads.runs.config import NO_BENIGN, ScanConfig
from safetyheads.runs.data import read_whole, resolved
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
from safetyheads.runs.results import SCORE_LABELS
from safetyheads.runs.scan import Scan, ScanFindings
from safetyheads.runs.scan_results import scan_results
from safetyheads.stats.intervals import mean_with_interval

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


def read_sets(config: ScanConfig) -> dict[str, PromptSet]:
    """The prompts that the config names: ``harmful``, and ``benign`` unless it says none."""
    sets = {"harmful": read_whole("harmful", config.prompts, config)}
    if config.benign != NO_BENIGN:
        sets["benign"] = read_whole("benign", config.benign, config)
    return sets


def run_scan(
    engine: Engine,
    config: ScanConfig,
    out: Path,
    sets: dict[str, PromptSet] | None = None,
    planted: Group | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Scan a loaded model into a run directory; a directory that holds part of this run is continued.

    Args:
        engine: the model, loaded as ``config`` says.
        config: all settings.
        out: the run directory.
        sets: ``harmful`` and ``benign`` prompts; by default read as the config says.
        planted: the true heads, for a model that has them.
        progress: who watches.
        command: the command line, for the record.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        InputError: bad settings or prompts, or a directory that belongs to another run.
    """
    watching: Progress = Silent() if progress is None else progress
    judges = judges_named(config.judges, config.judge_device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        sets = {name: resolved(engine, prompts, config) for name, prompts in (sets or read_sets(config)).items()}
        # Before anything is planned: it may cost a quick path.
        engine.prove_up_to(longest_prompt(engine, sets) + config.max_new_tokens)
        _refuse_impossible(engine, config)
        with watching.track("fingerprinting the weights", 1):
            described = [judge.describe() for judge in judges]
            settings = {"kind": "scan", **settings_of(engine, config, sets), "judges": described}
        with RunDirectory.start(out, settings, provenance(command)) as run:
            keep_threads(run, watching)
            started = time.monotonic()
            watching.say(lambda: _estimate(engine, sets, config))
            patient = [judge.name for judge in judges if not judge.decides_early]
            if patient and not config.full_answers:
                watching.say(f"rows end when all judges are final; {', '.join(patient)} needs whole answers")
            found = Scan(engine, config, sets, judges, run, watching).execute()
            about = _about(engine, config, sets, found) | {
                "planted_heads": None if planted is None else [str(head) for head in planted],
                "caveats": caveats_of(planted),
                "warnings": notes_of(engine, sets, config.max_new_tokens, caught),
            }
            run.write_results(scan_results(found.rows, about, described))
            finished = datetime.now(UTC).isoformat()
            seconds = {"seconds": time.monotonic() - started, "judges": found.judge_seconds}
            run.write_timings(seconds | {"finished": finished})
            return run.read_results()


def _refuse_impossible(engine: Engine, config: ScanConfig) -> None:
    """Refuse what the stages would refuse later, while nothing is written."""
    for group in config.groups:
        within(parse_heads(group), engine.n_layers, engine.n_heads)
    for name in ("pairs", "prefixes", "query_level"):
        if getattr(config, name) > len(engine.heads):
            said = name.replace("_", " ")
            raise InputError(f"{said} {getattr(config, name)} is more than the model's {len(engine.heads)} heads")


def _estimate(engine: Engine, sets: dict[str, PromptSet], config: ScanConfig) -> str:
    """What lies ahead, as one line: comparisons cost about as passes do; answers at worst all change."""
    encoded = engine.ask(sets["harmful"]).token_ids
    n_scans = config.n_seeds * (len(sets) + len(config.epsilons))
    n_passes = n_scans + (len(sets) + 1) * config.scores
    n_answers = sum(len(prompts) for prompts in sets.values()) * config.n_seeds * (1 + len(engine.heads))
    said = estimate(engine, encoded, n_passes, n_answers, config.max_new_tokens)
    return f"{said}; only answers that an ablation changes are decoded"


def _about(engine: Engine, config: ScanConfig, sets: dict[str, PromptSet], found: ScanFindings) -> dict[str, Any]:
    """All of the results that does not come from rows."""
    scored, ablation = found.scored, config.parsed_ablation
    sampling = Sampling(config.top_k, config.seed)
    benign_kl = None
    if scored.benign_kl is not None:
        columns = [scored.benign_kl.values[:, head.layer, head.index].tolist() for head in engine.heads]
        benign_kl = [asdict(mean_with_interval(column)) for column in columns]
    return {
        "model": model_facts(engine, config.model),
        "data": {
            **{
                name: {"name": prompts.name, "n": len(prompts), "sha256": prompts.sha256}
                for name, prompts in sets.items()
            },
            "system": None,
            **template_facts(sets["harmful"]),
        },
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "sampling": {
            "name": sampling.name,
            "seeds": list(config.seeds),
            "max_new_tokens": config.max_new_tokens,
            "full_answers": config.full_answers,
        },
        "settings": {"n_random": config.n_random, "seed": config.seed},
        "scores": {
            name: {
                "label": SCORE_LABELS.get(name, name),
                "unit": scores.unit,
                "n": len(sets["harmful"]),
                "values": scores.as_lists(),
            }
            for name, scores in scored.scores.items()
        },
        "benign_kl": benign_kl,
        "openers": [asdict(opener) for opener in scored.openers],
        "economy": asdict(found.economy) | {"tolerances": found.tolerances},
    }

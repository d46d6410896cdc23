"""From settings to a finished run directory. Owns what a run is made of: model, prompts, fingerprints, estimate.

It writes results, never a report: reports are read off the directory.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from safetyheads.audit import LEAD, N_LISTED, SEARCHED, Audit, AuditData
from safetyheads.config import AuditConfig
from safetyheads.errors import InputError
from safetyheads.estimates import estimate
from safetyheads.generation import ShortContextWarning, short_context
from safetyheads.heads import Group
from safetyheads.judges import judge_named
from safetyheads.progress import Progress, Silent
from safetyheads.prompt_files import KNOWN_BENCHMARKS
from safetyheads.prompts import PromptSet
from safetyheads.results import results_of
from safetyheads.sampling import Sampling
from safetyheads.storage import RunDirectory

if TYPE_CHECKING:
    from safetyheads.engine import Engine

DEMO_CAVEAT = (
    "This model validates the code, not the method. Its planted heads, their answer to ablation and the silence of the "
    "other heads were trained."
)
CAVEATS = (
    "A low ASR is no proof of safety. It holds for these prompts, this template and this way of decoding.",
    'A head is not "the" safety mechanism. Ablating one changes all that comes after it, and refusals can run through '
    "other parts that nobody ablated.",
    "The judge reads words, not harm. An answer has complied when no wording of a refusal is in it and it is neither "
    "short nor repeating; whether it is harmful, true or of use is not asked.",
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
        data = AuditData(*(_resolved(engine, prompts, config) for prompts in data.sets().values()))
        longest = max(len(ids) for prompts in data.sets().values() for ids in engine.encode(prompts))
        # Before anything is planned: it may cost a quick path.
        engine.prove_up_to(longest + max(config.max_new_tokens, config.positions))
        _refuse_impossible(engine, data, config)
        with watching.track("fingerprinting the weights", 1):
            settings = _settings(engine, config, data)
        with RunDirectory.start(out, settings, _provenance(command)) as run:
            threads = run.remember("threads", torch.get_num_threads())
            if threads != torch.get_num_threads():
                watching.say(f"this run goes on with {threads} threads, as it began: others may move the last bits")
            torch.set_num_threads(threads)
            started = time.monotonic()
            watching.say(lambda: _estimate(engine, data, config))
            found = Audit(engine, config, data, run, watching).execute()
            # A short context is told from the data: answers that are read back do not warn again.
            short = short_context(engine, longest + config.max_new_tokens, config.max_new_tokens)
            ours = [str(one.message) for one in caught if _is_ours(one.category)]
            notes = [*engine.notes, *_data_warnings(data), *([short] if short else []), *dict.fromkeys(ours)]
            caveats = [*([DEMO_CAVEAT] if planted is not None else []), *CAVEATS]
            results = results_of(found, _about(engine, config, data), planted, caveats, notes)
            run.write_results(results)
            run.write_timings({"seconds": time.monotonic() - started, "finished": datetime.now(UTC).isoformat()})
            return run.read_results()


def read_data(config: AuditConfig) -> AuditData:
    """The harmful and benign prompts that the config names, each divided in search and test."""
    return AuditData(*_halves(config, "harmful", config.prompts), *_halves(config, "benign", config.benign))


def _halves(config: AuditConfig, kind: str, named: str) -> tuple[PromptSet, PromptSet]:
    """Search and test part of one kind of prompts; the demo's come divided, a file's are divided here."""
    if named == "demo" and not Path(named).is_file():
        data = demo_data().sets()
        search, test = (data[f"{kind}_{half}"][: config.limit] for half in ("search", "test"))
        if config.template is None and config.system is None:
            return search, test
        template = "chat" if config.template is None else config.template
        return search.with_template(template, config.system), test.with_template(template, config.system)
    column = config.column if kind == "harmful" else None
    prompts = PromptSet.read(named, config.template, column=column, system=config.system, limit=config.limit)
    return prompts.split(config.split, config.seed)


def demo_data() -> AuditData:
    """The organism's prompts: search on its validation split, test on its held-out one."""
    from safetyheads import demo
    from safetyheads.demo.loading import demo_prompts

    return AuditData(
        # A refusal is no right answer, so harmful prompts go without a reference.
        demo_prompts("harmful", "validation", demo.harmful_prompts("validation"), with_reference=False),
        demo_prompts("harmful", "test", demo.harmful_prompts("test"), with_reference=False),
        demo_prompts("benign", "validation", demo.benign_prompts("validation")),
        demo_prompts("benign", "test", demo.benign_prompts("test")),
    )


def _resolved(engine: Engine, prompts: PromptSet, config: AuditConfig) -> PromptSet:
    """The prompts with their template fixed, so that the manifest can say which."""
    if config.system is not None and engine.template_for(prompts).name != "chat":
        raise InputError("a system prompt belongs to the chat template; give --template chat")
    return prompts.resolved(engine.template_for(prompts))


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
    return estimate(engine, engine.encode(data.harmful_search), n_passes, n_answers, config.max_new_tokens)


def fingerprint(engine: Engine) -> str:
    """sha256 of all weights, by name, dtype and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(engine.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings(engine: Engine, config: AuditConfig, data: AuditData) -> dict[str, Any]:
    """All that the numbers depend on."""
    return {
        **config.as_dict(),
        # One spelling each: the same run is the same however it is asked for.
        **{name: _one_spelling(getattr(config, name)) for name in ("model", "prompts", "benign")},
        "ablation": config.parsed_ablation.name,
        "template": str(data.harmful_search.template),
        "weights_sha256": fingerprint(engine),
        "prompts_sha256": {name: prompts.sha256 for name, prompts in data.sets().items()},
        "references_sha256": {name: _references_sha256(prompts) for name, prompts in data.sets().items()},
        "device": _device(engine),
        "judge": judge_named(config.judge).describe(),
        "versions": {name: version(name) for name in ("safetyheads", "torch", "transformers", "numpy", "scipy")},
    }


def _one_spelling(named: str) -> str:
    # A directory of a known name does not win over the name, as in reading.
    is_path = os.path.isfile(named) or (os.path.isdir(named) and named not in (*KNOWN_BENCHMARKS, "benign", "demo"))
    return os.path.realpath(named) if is_path else named


def _references_sha256(prompts: PromptSet) -> str:
    """Of the right answers, which decide whether a benign answer is kept."""
    return hashlib.sha256(str([prompt.reference for prompt in prompts]).encode()).hexdigest()


def _device(engine: Engine) -> str:
    """Where the numbers are made, whatever ``auto`` came to."""
    device = engine.device
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _provenance(command: Sequence[str]) -> dict[str, Any]:
    return {
        "command": list(command),
        "started": datetime.now(UTC).isoformat(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
    }


def _about(engine: Engine, config: AuditConfig, data: AuditData) -> dict[str, Any]:
    facts, ablation = engine.architecture, config.parsed_ablation
    sampling = Sampling(config.top_k, config.seed)

    def described(search: PromptSet, test: PromptSet) -> dict[str, Any]:
        both = hashlib.sha256((search.sha256 + test.sha256).encode()).hexdigest()
        return {"name": search.name, "n_search": len(search), "n_test": len(test), "sha256": both}

    return {
        "model": {
            "name": config.model,
            "family": facts.family,
            "n_layers": facts.n_layers,
            "n_heads": facts.n_heads,
            "n_parameters": engine.model.num_parameters(),
            "head_parameters": facts.head_parameters,
        },
        "data": {
            "harmful": described(data.harmful_search, data.harmful_test),
            "benign": described(data.benign_search, data.benign_test),
            "template": str(data.harmful_search.template),
        },
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "sampling": {"name": sampling.name, "seed": config.seed, "max_new_tokens": config.max_new_tokens},
        "judge": judge_named(config.judge).describe(),
        "lead_score": LEAD,
    }


def _is_ours(category: type[Warning]) -> bool:
    return category.__module__.startswith("safetyheads") and category is not ShortContextWarning


def _data_warnings(data: AuditData) -> list[str]:
    found = []
    for prompts in data.sets().values():
        if prompts.warning:
            found.append(prompts.warning)
        if prompts.dropped:
            found.append(f"{prompts.dropped} blank lines of {prompts.source} are left out")
    return list(dict.fromkeys(found))

"""Audits every combination of models, prompt sets and ablations; what runs have in common is computed once.

Each audit has a run directory of its own in the sweep's folder, so a sweep that was killed continues.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from safetyheads.errors import ElsewhereError, InputError, SafetyheadsError, TooFewPromptsError, refuse_unknown
from safetyheads.files import read_toml
from safetyheads.model.engine import Engine
from safetyheads.model.loading import bases_shared, read_config
from safetyheads.model.names import find_model
from safetyheads.model.planning import OUT_OF_MEMORY, is_out_of_memory
from safetyheads.runs.audit import read_prompts, run_audit, why_too_few
from safetyheads.runs.compare import compare_runs, exit_code, quantities
from safetyheads.runs.config import AuditConfig, Progress, preset_settings
from safetyheads.runs.history import read_history
from safetyheads.runs.reader import RunReader
from safetyheads.runs.run import Prompts
from safetyheads.runs.shards import Shard
from safetyheads.runs.start import load_engine, refuse_missing, settled

AXES = {"models": "model", "prompts": "prompts", "ablations": "ablation"}
"""What a sweep combines -> the setting of an audit that a name among it stands for."""
SCREENED_FROM = 2048
"""Heads from which a sweep screens, unless it is told: exact scores of all are hours there."""
_ALIKE = ("prompts_sha256", "ablation", "epsilon")


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep's file: the axes, each a list of names or of tables of settings that go together; settings of audits."""
    settings = read_toml(path)
    for axis in AXES.keys() & settings.keys():
        if isinstance(settings[axis], str):
            settings[axis] = [settings[axis]]
        if not isinstance(settings[axis], list) or not all(isinstance(each, str | dict) for each in settings[axis]):
            raise InputError(f"{path}: {axis} is a list of names, or of tables of settings")
    return settings


def audits_of(settings: Mapping[str, Any], out: Path) -> dict[Path, AuditConfig]:
    """Run directory -> audit, for every combination; those of a model follow each other.

    Models of :data:`SCREENED_FROM` heads or more are screened, where ``screen`` is not set.
    """
    audits: dict[Path, AuditConfig] = {}
    for combination in product(*(settings.get(axis) or ["ua"] * (axis == "ablations") for axis in AXES)):
        given: dict[str, Any] = {name: value for name, value in settings.items() if name not in AXES}
        for name, value in zip(AXES.values(), combination, strict=True):
            given |= {name: value} if isinstance(value, str) else value
        given = preset_settings(given.pop("preset", "standard")) | given
        refuse_unknown(given, AuditConfig.__dataclass_fields__, "an audit has no setting")
        if lacking := {"model", "prompts"} - given.keys():
            raise InputError(f"a table of the sweep names no {min(lacking)}")
        given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        config = AuditConfig(**given)
        refuse_missing(config.model)
        if "screen" not in given and _n_heads(config) >= SCREENED_FROM:
            config = replace(config, screen=True)
        config, place = settled(config, None, config.ablation)
        if out / place.name in audits:
            raise InputError("two combinations of the sweep are one audit; each is given once")
        audits[out / place.name] = config
    if not audits:
        raise InputError("a sweep needs models and prompts, one of each at least")
    return audits


def _n_heads(config: AuditConfig) -> int:
    """As the model's config tells; 0 where it tells none, and of GGUF files."""
    path, _ = find_model(config.model)
    if Path(path).is_file():
        return 0
    told = read_config(path, path, **config.load_options.source)
    text = told.get_text_config(decoder=True)
    counts = [getattr(text, name, 0) for name in ("num_hidden_layers", "num_attention_heads")]
    return int(counts[0] * counts[1]) if all(isinstance(count, int) for count in counts) else 0


@bases_shared()
def carry_out_sweep(
    audits: Mapping[Path, AuditConfig],
    load: Callable[[AuditConfig], Engine],
    progress: Progress,
    prompts: Mapping[Path, Prompts] | None = None,
    shard: Shard | None = None,
    **how: Any,
) -> tuple[dict[Path, dict[str, Any]], dict[Path, SafetyheadsError]]:
    """Results of every audit, and why others have none: one that fails stops no other.

    A model is loaded once for all of its audits; adapters of one base that follow each other share its weights. By
    default ``prompts`` are read. ``how`` goes to :func:`safetyheads.runs.run.carry_out`.
    """
    prompts = prompts or {place: read_prompts(config) for place, config in audits.items()}
    found: dict[Path, dict[str, Any]] = {}
    failed: dict[Path, SafetyheadsError] = {}
    loaded, engine = None, None
    for number, (place, config) in enumerate(audits.items(), start=1):
        progress.say(f"{number} of {len(audits)}: {place.name}")
        while place not in found and place not in failed:
            share = None if shard is None else shard.within(place)
            here: dict[str, Any] = {"shard": share, "lenders": [other for other in audits if other != place]}
            try:
                if too_few := why_too_few(config, prompts[place]):
                    raise TooFewPromptsError(f"cannot say: {too_few}; --anyway goes on")
                if engine is None or loaded != (config.model, config.load_options):
                    engine = None
                    gc.collect()  # freed before the next one is read
                    engine, loaded = load(config), (config.model, config.load_options)
                found[place] = run_audit(engine, config, place, prompts[place], progress, **here, **how)
            except (SafetyheadsError, RuntimeError, MemoryError, OSError) as error:
                if not isinstance(error, SafetyheadsError) and not is_out_of_memory(error):
                    raise
                reason = error if isinstance(error, SafetyheadsError) else SafetyheadsError(OUT_OF_MEMORY)
                # Its traceback would hold the run and its engine while the next model is read.
                reason.__traceback__ = reason.__cause__ = reason.__context__ = None
                if share is None or not share.gives_back(reason):
                    failed[place] = reason
    return found, failed


def sweep_by_workers(
    carry_out_by_workers: Callable[..., Any],
    audits: Mapping[Path, AuditConfig],
    progress: Progress,
    command: Sequence[str],
    *workers: Any,
) -> tuple[dict[Path, dict[str, Any]], dict[Path, SafetyheadsError]]:
    """As :func:`carry_out_sweep`: workers share each audit, one after another, and hold a model for all of its audits.

    ``workers`` are further arguments of :func:`.ray_workers.carry_out_by_workers`.
    """
    first, *others = audits.values()
    if any((of.device, of.device_map, of.threads) != (first.device, first.device_map, first.threads) for of in others):
        raise InputError("under --ray all audits of a sweep have one device, device map and number of threads")
    prompts = {place: read_prompts(config) for place, config in audits.items()}
    given = replace(first, memory=None), Path(), (audits, prompts), progress, command
    return carry_out_by_workers(_swept, *given, *workers, load=_loader)


def _loader(_: AuditConfig, progress: Progress) -> Callable[[AuditConfig], Engine]:
    return partial(load_engine, progress=progress)


def _swept(load: Any, config: Any, _: Path, data: Any, progress: Progress, command: Any, shard: Shard) -> Any:
    """What a worker found of a sweep; an audit without a memory of its own has the worker's."""
    audits, prompts = data
    given = {place: replace(audit, memory=audit.memory or config.memory) for place, audit in audits.items()}
    found, failed = carry_out_sweep(given, load, progress, prompts, shard, command=command)
    return found, {place: shard.within(place).failures(error) for place, error in failed.items()}


def sweep_results(out: Path, failed: Mapping[Path, SafetyheadsError]) -> dict[str, Any]:
    """All finished audits, oldest first, and each compared with the one before of the same prompts and ablation.

    :func:`.history.read_history`, with ``failed`` (reason by name; audits of too few prompts are skipped) and
    ``comparisons``: both ``names``, and what ``compare`` gives.
    """
    skipped = [
        {"name": place.name, "reason": str(error)}
        for place, error in failed.items()
        if isinstance(error, TooFewPromptsError)
    ]
    if len(skipped) == len(failed) and not out.is_dir():
        return {"runs": [], "skipped": skipped, "failed": {}, "comparisons": []}
    found, comparisons = read_history(out, _ALIKE), []
    for run in found["runs"]:
        if run["before"] is not None:
            compared = compare_runs(RunReader(out / run["before"]), RunReader(out / run["name"]))
            told = {"quantities": quantities(compared), "gates": [], "exit_code": exit_code(compared, [], False)}
            comparisons.append({"names": [run["before"], run["name"]], **asdict(compared), **told})
    other = ElsewhereError, TooFewPromptsError
    reasons = {place.name: str(error) for place, error in failed.items() if not isinstance(error, other)}
    return found | {"skipped": [*found["skipped"], *skipped], "failed": reasons, "comparisons": comparisons}

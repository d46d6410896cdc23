"""Whole answers of rows that a scan cut. Owns how a finished run's model and prompts are found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from safetyheads.answers.decoding import Request, answer
from safetyheads.answers.sampling import Sampling
from safetyheads.errors import InputError
from safetyheads.heads import parse_heads
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.config import ScanConfig
from safetyheads.runs.data import resolved
from safetyheads.runs.provenance import fingerprint
from safetyheads.runs.scan_run import read_sets

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

Row: TypeAlias = Mapping[str, Any]


def config_of(manifest: Mapping[str, Any]) -> ScanConfig:
    """The settings of a scan, read back from its manifest."""
    stored = manifest["config"]
    names = {field.name for field in fields(ScanConfig)} - {"judges"}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items() if name in names
    }
    return ScanConfig(**given)


def finisher(engine: Engine, manifest: Mapping[str, Any]) -> Callable[[Sequence[Row]], list[str]]:
    """What makes whole answers of a scan's rows: they go on from where they were cut, decoded plainly.

    Args:
        engine: the run's model, loaded as the manifest's config says.
        manifest: of the run.

    Raises:
        InputError: the model or the prompts are not those of the run any more.
    """
    config, stored = config_of(manifest), manifest["config"]
    if fingerprint(engine) != stored["weights_sha256"]:
        raise InputError("the model's weights are not those of the run, so its answers cannot be finished")
    sets = {name: _as_asked(engine, prompts, config, stored) for name, prompts in read_sets(config).items()}
    if {name: prompts.sha256 for name, prompts in sets.items()} != stored["prompts_sha256"]:
        raise InputError("the prompts are not those of the run any more, so its answers cannot be finished")

    readers = {name: engine.ask(prompts).reader for name, prompts in sets.items()}

    def finish(rows: Sequence[Row]) -> list[str]:
        texts: dict[int, str] = {}
        for epsilon, seed in dict.fromkeys((row["epsilon"], row["seed"]) for row in rows):
            own = [at for at, row in enumerate(rows) if (row["epsilon"], row["seed"]) == (epsilon, seed)]
            requests = [
                Request(
                    engine.ask(sets[rows[at]["set"]]).token_ids[rows[at]["id"]],
                    parse_heads(rows[at]["group"]),
                    tuple(rows[at]["token_ids"]),
                    readers[rows[at]["set"]].ends,
                )
                for at in own
            ]
            ablation = config.parsed_ablation if epsilon is None else config.ablation_at(epsilon)
            made = answer(engine, requests, ablation, config.max_new_tokens, Sampling(config.top_k, seed))
            for at, one in zip(own, made, strict=True):
                texts[at] = readers[rows[at]["set"]].read(one.token_ids).text
        return [texts[at] for at in range(len(rows))]

    return finish


def _as_asked(engine: Engine, prompts: PromptSet, config: ScanConfig, stored: Mapping[str, Any]) -> PromptSet:
    """The prompts under the run's template; stop texts of the user's own are no settings, but they are stored."""
    found = resolved(engine, prompts, config)
    template = engine.ask(found).template
    return found.with_template(replace(template, stops=tuple(stored.get("stops", ()))))

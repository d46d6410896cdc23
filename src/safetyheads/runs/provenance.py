"""What a run's numbers depend on beside its settings. Owns fingerprints, versions and how a run was started."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from safetyheads.errors import InputError
from safetyheads.measures.random_groups import heads_by_layer
from safetyheads.model import loading
from safetyheads.model.loading import device_layout, quantisation
from safetyheads.prompts.files import KNOWN_BENCHMARKS
from safetyheads.prompts.sets import PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


def fingerprint(engine: Engine) -> str:
    """sha256 of all weights, by name, dtype and bytes; of base and adapter, where there is one."""
    whole = loading.fingerprint(engine.model)
    if engine.adapter is None:
        return whole
    # An adapter's scaling stands in its settings alone, and in no weight.
    return hashlib.sha256(f"{whole} {engine.adapter.sha256}".encode()).hexdigest()


def settings_of(engine: Engine, config: Any, sets: Mapping[str, PromptSet]) -> dict[str, Any]:
    """All that the numbers depend on, judges aside."""
    return {
        **config.as_dict(),
        **{
            name: one_spelling(getattr(config, name))
            for name in ("model", "prompts", "benign")
            if hasattr(config, name)
        },
        "ablation": config.parsed_ablation.name,
        **one_template(sets).settings(),
        "weights_sha256": fingerprint(engine),
        **as_loaded(engine),
        "prompts_sha256": {name: prompts.sha256 for name, prompts in sets.items()},
        "references_sha256": {name: references_sha256(prompts) for name, prompts in sets.items()},
        "device": device_name(engine),
        "versions": versions(),
    }


def as_loaded(engine: Engine) -> dict[str, Any]:
    """What was put on the checkpoint and in what form its weights are; what there is none of is left out."""
    adapter, method = engine.adapter, quantisation(engine.model)
    dtype = str(engine.dtype).removeprefix("torch.")
    facts: dict[str, Any] = {} if method is None else {"quantisation": method, "dtype": dtype}
    if adapter is not None:
        facts |= {"adapter": one_spelling(adapter.name), "adapter_sha256": adapter.sha256, "adapter_base": adapter.base}
    return facts


def one_template(sets: Mapping[str, PromptSet]) -> Template:
    """The template of a run: scores, search and answers have the same.

    Raises:
        InputError: the sets have different ones, or one has none yet.
    """
    templates = [prompts.template for prompts in sets.values()]
    first = templates[0]
    if first is None or any(template != first for template in templates):
        raise InputError("a run has one template for all of its prompts; these sets have different ones")
    return first


def template_facts(prompts: PromptSet) -> dict[str, Any]:
    """The template as results describe it: what is not set is left out."""
    settings = {} if prompts.template is None else prompts.template.settings()
    return {name: value for name, value in settings.items() if value not in (None, False, "", [])}


def model_facts(engine: Engine, name: str) -> dict[str, Any]:
    """The model as results describe it."""
    facts = engine.architecture
    by_layer = heads_by_layer(engine)
    # Only where layers differ: a scan's random groups are drawn again from what stands here.
    differing = {"heads_by_layer": list(by_layer)} if len({n for n in by_layer if n}) > 1 else {}
    return {
        "name": name if engine.adapter is None else f"{name} + {engine.adapter.name}",
        "family": facts.family,
        "n_layers": facts.n_layers,
        "n_heads": facts.n_heads,
        **differing,
        "n_parameters": engine.model.num_parameters(),
        "head_parameters": facts.head_parameters,
    }


def versions() -> dict[str, str]:
    """Of the libraries that numbers come from."""
    return {name: version(name) for name in ("safetyheads", "torch", "transformers", "numpy", "scipy")}


def one_spelling(named: str) -> str:
    """A path as it really is, a name as it stands: the same run is the same however it is asked for."""
    # A directory of a known name does not win over the name, as in reading.
    is_path = os.path.isfile(named) or (os.path.isdir(named) and named not in (*KNOWN_BENCHMARKS, "benign", "demo"))
    return os.path.realpath(named) if is_path else named


def references_sha256(prompts: PromptSet) -> str:
    """Of the right answers, which decide whether a benign answer is kept."""
    return hashlib.sha256(str([prompt.reference for prompt in prompts]).encode()).hexdigest()


def device_name(engine: Engine) -> str:
    """Where the numbers are made, whatever ``auto`` came to."""
    device, layout = engine.device, device_layout(engine.model)
    if layout is not None:
        return layout
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """What may differ between two starts of one run."""
    return {
        "command": list(command),
        "started": datetime.now(UTC).isoformat(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
    }

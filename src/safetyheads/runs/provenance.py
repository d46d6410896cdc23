"""Fingerprints, versions and facts about model and prompts, for manifests and results."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from safetyheads.answers.decoding import settings_not_followed
from safetyheads.errors import InputError
from safetyheads.model import loading
from safetyheads.model.engine import Engine
from safetyheads.model.loading import dequantised, device_layout, quantisation
from safetyheads.prompts.files import KNOWN_BENCHMARKS
from safetyheads.prompts.prompt_set import PromptSet


def fingerprint(engine: Engine) -> str:
    """sha256 of all weights, by name, dtype and bytes; with an adapter, of base and adapter."""
    whole = loading.fingerprint(engine.model)
    if engine.adapter is None:
        return whole
    # An adapter's scaling is in its settings only, not in a weight.
    return hashlib.sha256(f"{whole} {engine.adapter.sha256}".encode()).hexdigest()


def settings_of(engine: Engine, config: Any, prompts: Mapping[str, PromptSet]) -> dict[str, Any]:
    """All that the numbers of a run depend on, judges aside."""
    paths = {name: getattr(config, name) for name in ("model", "prompts", "benign") if hasattr(config, name)}
    template, *others = (prompt_set.template for prompt_set in prompts.values())
    if template is None or any(other != template for other in others):
        raise InputError("a run has one template for all of its prompts; these sets have different ones")
    return {
        **config.as_dict(),
        **{name: canonical_name(path) for name, path in paths.items()},
        "ablation": config.parsed_ablation.name,
        **template.settings(),
        "weights_sha256": fingerprint(engine),
        **loading_facts(engine),
        "prompts_sha256": {name: prompt_set.sha256 for name, prompt_set in prompts.items()},
        "prompt_facts": {name: prompt_set.facts() for name, prompt_set in prompts.items()},
        "references_sha256": {name: references_sha256(prompt_set) for name, prompt_set in prompts.items()},
        "device": device_name(engine),
        "versions": versions(),
    }


def loading_facts(engine: Engine) -> dict[str, Any]:
    """Adapter, quantisation and commit on the hub of the model, and which of its generation settings decoding does not
    follow; empty where there is none.
    """
    adapter, method = engine.adapter, quantisation(engine.model) or dequantised(engine.model)
    dtype = str(engine.dtype).removeprefix("torch.")
    facts: dict[str, Any] = {} if method is None else {"quantisation": method, "dtype": dtype}
    commit = getattr(engine.model.config, "_commit_hash", None)
    facts |= {} if commit is None else {"commit": commit}
    unfollowed = settings_not_followed(engine.model)
    facts |= {"generation_settings_not_followed": unfollowed} if unfollowed else {}
    if adapter is not None:
        name = canonical_name(adapter.name)
        facts |= {"adapter": name, "adapter_sha256": adapter.sha256, "adapter_base": adapter.base}
    return facts


def template_facts(prompts: PromptSet) -> dict[str, Any]:
    """The template as results describe it: only the fields that are set."""
    settings = {} if prompts.template is None else prompts.template.settings()
    return {name: value for name, value in settings.items() if value not in (None, False, "", [])}


def model_facts(engine: Engine, name: str) -> dict[str, Any]:
    """The model as results describe it."""
    facts, by_layer = engine.architecture, engine.architecture.heads_by_layer
    layers_differ = len({n_heads for n_heads in by_layer if n_heads}) > 1
    return {
        "name": name if engine.adapter is None or engine.adapter.name == name else f"{name} + {engine.adapter.name}",
        "family": facts.family,
        "n_layers": facts.n_layers,
        "n_heads": facts.n_heads,
        **({"heads_by_layer": list(by_layer)} if layers_differ else {}),
        "n_parameters": engine.model.num_parameters(),
        "head_parameters": facts.head_parameters,
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that numbers come from."""
    return {name: version(name) for name in ("safetyheads", "torch", "transformers", "numpy", "scipy")}


def canonical_name(name: str) -> str:
    """A path as its real absolute path, any other name as it is, so that a run is recognised from any folder."""
    # A known name wins over a directory of that name, as in reading.
    is_path = os.path.isfile(name) or (os.path.isdir(name) and name not in (*KNOWN_BENCHMARKS, "benign", "demo"))
    return os.path.realpath(name) if is_path else name


def references_sha256(prompts: PromptSet) -> str:
    """Fingerprint of the right answers, which decide whether a benign answer is kept."""
    return hashlib.sha256(str([prompt.reference for prompt in prompts]).encode()).hexdigest()


def device_name(engine: Engine) -> str:
    """The device or layout that the numbers are computed on; which of a machine's equal GPUs it is moves none."""
    device, layout = engine.device, device_layout(engine.model)
    if layout is not None:
        return layout
    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def provenance(command: Sequence[str]) -> dict[str, Any]:
    """What may differ between two starts of one run."""
    machine = {"python": sys.version.split()[0], "platform": platform.platform(), "cuda": torch.version.cuda}
    return {"command": list(command), "started": datetime.now(UTC).isoformat(), **machine}

"""The prompts of a reproduction. Owns what the organism's categories and splits stand for."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from safetyheads.demo.grammar import HARM_CATEGORIES
from safetyheads.errors import InputError
from safetyheads.experiments.settings import ORGANISM, ReproductionConfig
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs import data as prompt_sets
from safetyheads.runs.provenance import references_sha256

BENIGN = "benign"
"""Name of the benign prompts among the datasets."""
LEARN_HARMFUL, LEARN_BENIGN = "learn harmful", "learn benign"
"""Names of what baselines learn from."""


def prompts_of(config: ReproductionConfig, model: str, dataset: str, half: str) -> PromptSet:
    """One of the config's datasets, or its part that searches see.

    Args:
        config: the settings.
        model: who is asked; an embedded one knows its own language only.
        dataset: one of the config's, :data:`BENIGN`, :data:`LEARN_HARMFUL` or :data:`LEARN_BENIGN`.
        half: ``search`` or ``test``.
    """
    named = {BENIGN: config.benign, LEARN_HARMFUL: config.learn_harmful, LEARN_BENIGN: config.learn_benign}
    name = named.get(dataset, dataset)
    learns = dataset in (LEARN_HARMFUL, LEARN_BENIGN)
    if model.startswith(ORGANISM):
        # Its splits share no deed, so what was learned on one is not known of the other.
        split: prompt_sets.Half = "validation" if learns or (config.held_out and half == "search") else "test"
        kind: prompt_sets.Kind = "benign" if dataset in (BENIGN, LEARN_BENIGN) else "harmful"
        found = prompt_sets.demo_set(kind, split)
        if name in HARM_CATEGORIES:
            found = found.select(at for at, prompt in enumerate(found) if prompt.category == name)
        elif name != "demo":
            raise InputError(
                f"the embedded models know the datasets {', '.join(HARM_CATEGORIES)} and demo; got {name!r}"
            )
        return found[: config.limit]
    if not name:
        raise InputError(f"baselines need prompts to learn from; give {dataset.replace(' ', '_')}")
    whole = PromptSet.read(name, None, limit=config.limit)
    if name == config.benign == config.learn_benign and dataset in (BENIGN, LEARN_BENIGN):
        # One file for both: what methods learn from is not what they are tested on.
        return whole.split(config.split, config.seed)[dataset == BENIGN]
    if learns or not config.held_out:
        return whole
    return whole.split(config.split, config.seed)[half == "test"]


def begun_by(prefill: str, prompts: PromptSet) -> PromptSet:
    """The prompts whose answers are begun so: what is left of a right answer, where it begins so, is the right one."""
    if not prefill:
        return prompts
    rest = [
        replace(prompt, reference=(prompt.reference or "").removeprefix(prefill).strip())
        if (prompt.reference or "").startswith(prefill)
        else replace(prompt, reference=None)
        for prompt in prompts
    ]
    return replace(prompts, prompts=tuple(rest))


def prompts_sha256(config: ReproductionConfig) -> dict[str, str]:
    """Of every set of prompts with its right answers, by name: a file that changes makes another run.

    Raises:
        InputError: a set cannot be read.
    """
    names = [*config.datasets, BENIGN, *([LEARN_HARMFUL] if config.learn_harmful else []), LEARN_BENIGN]
    models = {model.startswith(ORGANISM): model for model in reversed(config.models)}
    found = {}
    for organism, model in models.items():
        for name in names:
            prompts = prompts_of(config, model, name, "test")
            digest = hashlib.sha256(f"{prompts.sha256} {references_sha256(prompts)}".encode()).hexdigest()
            found[f"{name}, organism" if organism else name] = digest
    return found

"""Which quick paths hold on a model. Owns their names; :mod:`safetyheads.model.quick_paths` proves them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Which quick paths were proved on this model; without one the engine takes the slow, plain path."""

    packs: bool = True
    """Several prompts may share a row."""
    segments: bool = True
    """Attention may be taken prompt by prompt, not over the whole row."""
    replays: bool = True
    """Layers may be run again from captured inputs."""
    prunes: bool = True
    """The last layer may be finished for the wanted tokens alone."""
    starts_late: bool = True
    """The first ablated layer may start from its heads' outputs."""
    plain_head: bool = True
    """Logits are the head applied to the normed state; else the model's own forward makes them."""
    caches: bool = True
    """Decoding with a cache gives what runs over all tokens give; else no answers are made."""
    pads: bool = True
    """Prompts of unequal length may share a batch, padded; else batches hold prompts of one length."""

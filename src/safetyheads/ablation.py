"""Ablations of a head as values: those of the paper (Eq 7, 8, 12; Sec 5.3)."""

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, Self, TypeAlias

from safetyheads.display import Shown
from safetyheads.errors import InputError

Tensor = Literal["query", "key", "head_output"]
Operation = Literal["scale", "mean"]


@dataclass(frozen=True, slots=True)
class AblationKind:
    """Which tensor of a head an ablation changes, and how."""

    tensor: Tensor
    """``query`` and ``key`` after position encoding and any q/k norm; ``head_output`` before W_O."""
    operation: Operation
    """``scale`` multiplies the head's tensor by epsilon; ``mean`` replaces it by the mean over its layer's heads."""
    label: str
    """Its name in reports."""

    @property
    def takes_epsilon(self) -> bool:
        """Whether the ablation's epsilon changes what it does."""
        return self.operation == "scale"


ABLATION_KINDS: dict[str, AblationKind] = {
    "undifferentiated_attention": AblationKind("query", "scale", "undifferentiated attention"),
    "undifferentiated_attention_key": AblationKind("key", "scale", "undifferentiated attention (key)"),
    "scaling_contribution": AblationKind("head_output", "scale", "scaling contribution"),
    "mean_query": AblationKind("query", "mean", "mean query over the layer's heads"),
    "mean_key": AblationKind("key", "mean", "mean key over the layer's heads"),
    "mean_head_output": AblationKind("head_output", "mean", "mean output over the layer's heads"),
}
"""The kinds by name: Eq 7 on W_q (and on W_k), Eq 8, and the mean ablations of Sec 5.3."""

ABLATION_ALIASES = {
    "ua": "undifferentiated_attention",
    "ua_key": "undifferentiated_attention_key",
    "sc": "scaling_contribution",
}
_SHORT = dict(zip(ABLATION_ALIASES.values(), ABLATION_ALIASES, strict=True))
KNOWN_ABLATIONS = "; ".join(f"{_SHORT.get(name, name)}: {kind.label}" for name, kind in ABLATION_KINDS.items())
"""Every kind by its shortest name, in words."""


@dataclass(frozen=True, slots=True)
class Ablation(Shown):
    """A kind of ablation and its strength."""

    name: str
    """A key of :data:`ABLATION_KINDS`; one of :data:`ABLATION_ALIASES` becomes its own."""
    epsilon: float = 1e-5
    """Factor of the ``scale`` kinds (Eq 7, 8): 0 is the exact limit, 1 changes nothing. Mean kinds ignore it."""

    def __post_init__(self) -> None:
        if isinstance(self.name, str):
            object.__setattr__(self, "name", ABLATION_ALIASES.get(self.name, self.name))
        if not isinstance(self.name, str) or self.name not in ABLATION_KINDS:
            raise InputError(f"unknown ablation {self.name!r}; known are {KNOWN_ABLATIONS}")
        if not isinstance(self.epsilon, Real) or not math.isfinite(self.epsilon) or self.epsilon < 0:
            raise InputError(f"epsilon must be a finite number, 0 or more; got {self.epsilon!r}")

    @property
    def kind(self) -> AblationKind:
        """The entry of :data:`ABLATION_KINDS`."""
        return ABLATION_KINDS[self.name]

    @property
    def key(self) -> str:
        """Its name and its epsilon in full, for names of files: no other ablation has the same."""
        return f"{self.name}_{self.epsilon!r}".removesuffix(".0")

    def __str__(self) -> str:
        return f"{self.kind.label}, epsilon {self.epsilon:g}" if self.kind.takes_epsilon else self.kind.label

    def at(self, epsilon: float) -> Self:
        """The same kind at another epsilon."""
        return replace(self, epsilon=epsilon)

    @classmethod
    def parse(cls, text: str | Self, epsilon: float = 1e-5) -> Self:
        """Read a kind's name or short form (``ua``, ``ua_key``, ``sc``); dashes count as underscores.

        An ablation stays itself.
        """
        if isinstance(text, Ablation):
            return text
        if not isinstance(text, str):
            raise InputError(f"an ablation is written ua or sc; got {text!r}")
        return cls(text.strip().lower().replace("-", "_"), epsilon)


AnyAblation: TypeAlias = Ablation | str
"""An ablation, or its name or short form."""
UNDIFFERENTIATED_ATTENTION = Ablation("undifferentiated_attention")
"""UA (Eq 7): the head's query times epsilon, so that it attends evenly to all keys that the mask allows."""
SCALING_CONTRIBUTION = Ablation("scaling_contribution")
"""SC (Eq 8): the head's output times epsilon, so that it contributes nothing."""

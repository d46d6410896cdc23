"""What the user asks of an audit. Owns the settings and their bounds; everything a number depends on is here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError


@dataclass(frozen=True, slots=True)
class AuditConfig:
    """Settings of one audit; the defaults are the paper's where it gives any."""

    model: str
    """Directory or hub id."""
    prompts: str
    """Harmful prompts: a file, a known benchmark, or ``demo``."""
    benign: str = "benign"
    """Benign prompts, likewise; ``benign`` is the package's own list."""
    template: str | None = None
    """``direct``, ``query_answer``, ``chat``, a string with {query}; None: chat for the organism, else query_answer."""
    system: str | None = None
    """System prompt of the ``chat`` template."""
    column: str | None = None
    """Column of the prompts, where the file has several."""
    limit: int | None = None
    """Read only the first so many prompts of each set."""
    ablation: str = "undifferentiated_attention"
    """Kind of ablation."""
    epsilon: float = 1e-5
    """Its strength (Eq 7, 8)."""
    size: int = 3
    """Most heads in a group: Sahara's steps; the paper uses up to 5 and finds 3 best."""
    positions: int = 1
    """Answer tokens over which Ships are averaged, teacher-forced."""
    judge: str = "paper"
    """Who decides complied, refused, incoherent."""
    max_new_tokens: int = 128
    """Longest answer."""
    top_k: int = 1
    """1 is greedy; the paper also samples with 5."""
    split: float = 0.5
    """Share of the prompts that the search sees; ASR is reported on the others."""
    n_random: int = 20
    """Random groups of the same size and layers, for each group."""
    seed: int = 0
    """Of the split, the random groups and the sampling."""
    dtype: str = "float32"
    """Of the weights."""
    device: str = "cpu"
    """Where the model runs."""
    memory: float | None = None
    """Most GiB that batches may take beside the weights; None is half of what is free. Batches move the last bits."""
    compile: bool = False
    """Whether norms and MLPs are compiled, which may move the last bits."""
    store_completions: bool = True
    """Whether answers are written to the run directory, or verdicts alone."""

    def __post_init__(self) -> None:
        Ablation.parse(self.ablation, self.epsilon)
        for name, least in {"size": 1, "positions": 1, "max_new_tokens": 1, "top_k": 1, "n_random": 0}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', ' ')} must be at least {least}; got {getattr(self, name)}")
        if not 0 < self.split < 1:
            raise InputError(f"split is the share of prompts for the search, between 0 and 1; got {self.split}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1; got {self.limit}")

    @property
    def parsed_ablation(self) -> Ablation:
        """The ablation as a value."""
        return Ablation.parse(self.ablation, self.epsilon)

    def as_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return asdict(self)

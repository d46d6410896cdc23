"""What the user asks of a run. Owns the settings and their bounds; everything a number depends on is here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.heads import parse_heads
from safetyheads.runs.data import template_of

_LATER = {"fold_system": False, "thinking": None, "prefill": "", "adapter": None, "device_map": None}
_EARLIER = object()


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Settings of every kind of run; the defaults are the paper's where it gives any."""

    model: str
    """Directory or hub id."""
    prompts: str
    """Harmful prompts: a file, a known benchmark, or ``demo``."""
    benign: str = "benign"
    """Benign prompts, likewise; ``benign`` is the package's own list."""
    template: str | None = None
    """A template's name or a string with {query}; None: chat for the organism, else query_answer."""
    system: str | None = None
    """System prompt, for a template that has a place for it."""
    fold_system: bool = False
    """Whether the chat template gets the system prompt at the beginning of the user's turn."""
    thinking: str | None = None
    """``closed`` or ``open``; None closes the think block of a chat template that has one."""
    prefill: str = ""
    """How every answer begins, written for the model (App. E)."""
    column: str | None = None
    """Column of the prompts, where the file has several."""
    limit: int | None = None
    """Read only the first so many prompts of each set."""
    ablation: str = "undifferentiated_attention"
    """Kind of ablation."""
    epsilon: float = 1e-5
    """Its strength (Eq 7, 8)."""
    max_new_tokens: int = 128
    """Longest answer."""
    top_k: int = 1
    """1 is greedy; the paper also samples with 5."""
    seed: int = 0
    """Of all that is drawn."""
    dtype: str = "float32"
    """Of the weights."""
    device: str = "cpu"
    """Where the model runs."""
    adapter: str | None = None
    """A PEFT adapter that is put on the model, a directory or hub id."""
    device_map: str | None = None
    """How the model is laid out over several devices, where it is."""
    memory: float | None = None
    """Most GiB that batches may take beside the weights; None is half of what is free. Batches move the last bits."""
    compile: bool = False
    """Whether norms and MLPs are compiled, which may move the last bits."""
    store_completions: bool = True
    """Whether answers are written to the run directory, or verdicts alone."""

    def __post_init__(self) -> None:
        Ablation.parse(self.ablation, self.epsilon)
        template_of(self)
        self._at_least({"max_new_tokens": 1, "top_k": 1})
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1; got {self.limit}")

    def _at_least(self, bounds: dict[str, int]) -> None:
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', ' ')} must be at least {least}; got {getattr(self, name)}")

    @property
    def parsed_ablation(self) -> Ablation:
        """The ablation as a value."""
        return Ablation.parse(self.ablation, self.epsilon)

    def as_dict(self) -> dict[str, Any]:
        """As the manifest holds it: settings that came later are left out at their default.

        So a run that was begun before them is the same run.
        """
        return {name: value for name, value in asdict(self).items() if _LATER.get(name, _EARLIER) != value}


@dataclass(frozen=True, slots=True)
class AuditConfig(RunConfig):
    """Settings of one audit."""

    size: int = 3
    """Most heads in a group: Sahara's steps; the paper uses up to 5 and finds 3 best."""
    positions: int = 1
    """Answer tokens over which Ships are averaged, teacher-forced."""
    judge: str = "paper"
    """Who decides complied, refused, incoherent."""
    split: float = 0.5
    """Share of the prompts that the search sees; ASR is reported on the others."""
    n_random: int = 20
    """Random groups of the same size and layers, for each group."""

    def __post_init__(self) -> None:
        # Not super(): with slots a dataclass is made anew, and the class that super() would look up is the old one.
        RunConfig.__post_init__(self)
        self._at_least({"size": 1, "positions": 1, "n_random": 0})
        if not 0 < self.split < 1:
            raise InputError(f"split is the share of prompts for the search, between 0 and 1; got {self.split}")


NO_BENIGN = "none"
"""Name of the benign prompts where there are to be none."""


@dataclass(frozen=True, slots=True)
class ScanConfig(RunConfig):
    """Settings of one exhaustive scan."""

    judges: tuple[str, ...] = ("paper",)
    """Who decides about answers; the first one leads."""
    judge_device: str = "cpu"
    """Where judge models run."""
    n_seeds: int = 1
    """Answers to each prompt, with seeds from ``seed`` on; more than one only where tokens are sampled."""
    full_answers: bool = False
    """Whether rows go on to their end after every judge is final."""
    epsilons: tuple[float, ...] = ()
    """Further strengths at which every head is scanned on the harmful prompts."""
    groups: tuple[str, ...] = ()
    """Groups to be scanned beside the heads, such as ``1-3,2-5``."""
    pairs: int = 0
    """Scan all pairs among so many heads of highest ASR."""
    prefixes: int = 0
    """Scan the groups of 1 to so many heads that Sahara finds by mean Ships."""
    n_random: int = 0
    """Random groups of the same size and layers, for each of those groups."""
    query_level: int = 0
    """Let each prompt ablate its own 1 to so many top heads by Ships."""
    scores: bool = True
    """Whether Ships, Generalized Ships and the screening are measured, to be held against the ASR."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        self._at_least({"n_seeds": 1, "pairs": 0, "prefixes": 0, "n_random": 0, "query_level": 0})
        if self.n_seeds > 1 and self.top_k == 1:
            raise InputError("greedy answers are the same for every seed; several seeds need --top-k above 1")
        if self.pairs == 1:
            raise InputError("pairs need at least two heads; got 1")
        if self.n_random and not self.prefixes:
            raise InputError("random groups go with prefixes; give --prefixes")
        for epsilon in self.epsilons:
            Ablation.parse(self.ablation, epsilon)
        if len({self.epsilon, *self.epsilons}) <= len(self.epsilons):
            raise InputError("each epsilon is given once")
        for group in self.groups:
            if not parse_heads(group):
                raise InputError("a group needs heads, such as 2-26,3-1")

    def ablation_at(self, epsilon: float) -> Ablation:
        """The kind of ablation at another strength."""
        return Ablation.parse(self.ablation, epsilon)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the answers."""
        return tuple(range(self.seed, self.seed + self.n_seeds))

"""What all baselines have in common. Owns what a method may learn from, what it gives, and how that is judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads.ablation import SCALING_CONTRIBUTION, Ablation
from safetyheads.answers.sampling import GREEDY, Sampling
from safetyheads.answers.success import AttackSuccess, query_level_attack_success_rate
from safetyheads.heads import Group
from safetyheads.judges.base import Judge
from safetyheads.prompts.sets import PromptSet

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


@dataclass(frozen=True, slots=True)
class Material:
    """What a method may learn from: never the prompts that it is tested on."""

    engine: Engine
    """The aligned model."""
    harmful: PromptSet
    """Harmful prompts to learn from, which the model refuses."""
    benign: PromptSet
    """Benign prompts to learn from."""
    refusals: tuple[tuple[int, ...], ...]
    """The model's own unablated answers to ``harmful``, as new tokens."""
    answers: tuple[tuple[int, ...], ...]
    """Those to ``benign``."""
    openers: tuple[int, ...]
    """First tokens of the model's refusals."""
    unaligned: Engine | None = None
    """The checkpoint before alignment, for methods that compare two."""
    seed: int = 0
    """Of all that is drawn."""


@dataclass(frozen=True, slots=True)
class Intervention:
    """A method at one strength, ready to be put to work and taken back."""

    setting: str
    """Its strength in words, such as ``3 heads`` or ``sparsity 50 %``."""
    strength: float
    """Its strength as the sweep has it."""
    n_parameters: int
    """Weights that it touches, counted on this model."""
    at_work: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context in which weights or activations are other ones; as they were, bit for bit, after."""
    groups: Callable[[PromptSet], tuple[Group, ...]] | None = None
    """The heads that each prompt's answer goes without, for methods that name heads; None ablates none."""
    ablation: Ablation = SCALING_CONTRIBUTION
    """Of those heads."""

    def answers(
        self,
        engine: Engine,
        prompts: PromptSet,
        judge: Judge,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        on_rows: Callable[[int], None] | None = None,
    ) -> AttackSuccess:
        """The model's judged answers with the method at work."""
        # Proofs that a longer window asks for would be of the changed model, once it is at work.
        engine.prove_up_to(engine.ask(prompts).longest + max_new_tokens)
        groups = ((),) * len(prompts) if self.groups is None else self.groups(prompts)
        with self.at_work():
            return query_level_attack_success_rate(
                engine, prompts, groups, self.ablation, judge, max_new_tokens, sampling, on_rows
            )


@dataclass(frozen=True, slots=True)
class Method:
    """A baseline: what it is called, where it comes from, and how it is made ready."""

    name: str
    """As commands and results spell it."""
    label: str
    """As tables print it."""
    source: str
    """The paper it is from; ours where there is none."""
    touches: str
    """``heads``, ``weights`` or ``activations``."""
    strengths: tuple[float, ...]
    """The sweep that is tried by default, weakest first."""
    interventions: Callable[[Material, Sequence[float]], list[Intervention]]
    """Learns from the material and gives an intervention for each strength."""
    partial: str = ""
    """What of the method is possible in part only, and why; empty where nothing is missing."""
    needs_unaligned: bool = False
    """Whether it compares with the checkpoint before alignment."""

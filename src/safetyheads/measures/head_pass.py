"""Measures groups of heads: one replay of the model gives every score.

Probabilities and angles are taken in float64 from the model's logits and states. The precision of all scores is chosen
here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.errors import SafetyheadsError
from safetyheads.heads import Group, Head, common_heads, format_heads
from safetyheads.measures.subspace import Space, dominant_directions, principal_angle_sum
from safetyheads.model.planning import (
    Plan,
    TokenSequence,
    first_wanted,
    halving,
    prompt_of_wanted,
    unless_too_large,
)
from safetyheads.scores import HeadScores

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

Keep: TypeAlias = Callable[[Mapping[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
"""Takes all that a result depends on and a function that computes it; reads the result from a store, or computes it."""

State: TypeAlias = Literal["after_norm", "before_norm"]
"""Last-token state after the final norm (released code), or the residual stream before it (text)."""

# Scores closer than this are ties. Measured: batch shapes alone move a float32 score of the organism by up to
# 2e-7 nats and 6e-5 degrees; half precisions resolve about 2^-8 of a logit.
_RESOLUTION = {"nats": {4: 1e-6, 2: 1e-3}, "degrees": {4: 1e-4, 2: 1e-2}}
_HALVED = "halved"


@dataclass(frozen=True, slots=True)
class Angle:
    """One variant of Generalized Ships (Eq 11); the paper's text and released code differ in all four settings."""

    space: Space = "prompt"
    """``prompt`` (released code) or ``representation`` (text)."""
    rank: int = 1
    """Number of singular vectors; the score is the sum of their principal angles."""
    state: State = "after_norm"
    """Which last-token state is stacked."""
    centred: bool = False
    """Whether the mean over prompts is subtracted first; not in the paper."""

    @property
    def name(self) -> str:
        """``generalized_ships_prompt`` and so on; settings other than the defaults are appended."""
        extra = [f"r{self.rank}"] * (self.rank != 1) + [self.state] * (self.state != "after_norm")
        return "_".join(["generalized_ships", self.space, *extra, *["centred"] * self.centred])


@dataclass(frozen=True, slots=True)
class Readouts:
    """What a pass reads from the last-token states."""

    ships: bool = False
    """KL divergence of the next-token distribution, per prompt."""
    openers: tuple[int, ...] = ()
    """First tokens of refusals, whose log-odds are read; empty reads none."""
    angles: tuple[Angle, ...] = ()
    """Variants of Generalized Ships."""

    @property
    def needs_logits(self) -> bool:
        """Whether a readout needs next-token probabilities."""
        return self.ships or bool(self.openers)


class HeadPass:
    """One ablation on one set of prompts; measures any groups of heads against the unablated model."""

    def __init__(
        self,
        engine: Engine,
        sequences: Sequence[TokenSequence],
        ablation: Ablation,
        readouts: Readouts,
        plan: Plan | None = None,
        keep: Keep | None = None,
    ) -> None:
        """Run the unablated model.

        Args:
            engine: the model.
            sequences: one for each prompt.
            ablation: of every head in every group.
            readouts: what is read.
            plan: rows and batches; by default the engine's plan for these sequences. Moves results in their last bits.
            keep: where results are kept; by default nowhere.
        """
        engine.prove_up_to(max(len(sequence.token_ids) for sequence in sequences))
        self.engine, self.sequences, self.ablation, self.readouts = engine, tuple(sequences), ablation, readouts
        self.plan = plan or engine.plan(sequences)
        self._keep = keep or (lambda _, compute: compute())
        tokens = json.dumps([[sequence.token_ids, sequence.n_wanted] for sequence in sequences])
        self._tokens_sha256 = hashlib.sha256(tokens.encode()).hexdigest()
        self._weights_version = engine.weights_version
        # The unablated run also serves the first groups that are measured.
        self._captures = list(engine.captured(sequences, (), ablation, self.plan))
        hidden = engine.replayed(self._captures, [()], ablation, engine.n_layers - 1)[0]
        self.unablated: dict[str, Tensor] = {}
        if readouts.needs_logits:
            log_probabilities = torch.cat(list(next_token_log_probabilities(engine, hidden)))
            self.unablated["log_probabilities"] = log_probabilities
            if readouts.openers:
                self.unablated["log_odds"] = log_odds(log_probabilities[first_wanted(sequences)], readouts.openers)
        for angle in readouts.angles:
            self.unablated[angle.name] = self._directions(hidden[None], angle)[0]

    def measure(self, groups: Sequence[Group], on_groups: Callable[[int], None] | None = None) -> dict[str, Tensor]:
        """Every readout of each group; calls ``on_groups`` with the number of groups just done.

        Returns:
            ``ships`` and ``refusal_score`` [len(groups), n_prompts] (nats), and each angle's name [len(groups)]
            (degrees); float64, on the CPU.

        Raises:
            SafetyheadsError: the model's weights have changed since the pass was made.
        """
        if self._weights_version is not self.engine.weights_version:
            raise SafetyheadsError("the model has other weights than when this scorer was made; make it anew")
        common, batches = common_heads(groups), self.engine.batches(groups, self.plan)
        captures = [] if common else self._captures
        self._captures = []

        def hidden_of(start: int, chosen: Sequence[Group]) -> Tensor:
            if not captures:  # only once a batch is not in the store
                captures.extend(self.engine.captured(self.sequences, common, self.ablation, self.plan, start))
            for capture in captures:
                capture.drop_before(start)
            return self.engine.replayed(captures, chosen, self.ablation, start)

        results: dict[str, Tensor] = {}
        for batch in batches:
            measure_batch = partial(self._measure_batch, groups, partial(hidden_of, batch.start))
            for indices, values_by_name in halving(batch.indices, measure_batch):
                for name, values in values_by_name.items():
                    if name not in results:
                        results[name] = torch.full((len(groups), *values.shape[1:]), float("nan"), dtype=torch.float64)
                    results[name][list(indices)] = values
                if on_groups is not None:
                    on_groups(len(indices))
        return results

    def _measure_batch(
        self, groups: Sequence[Group], hidden_of: Callable[[Sequence[Group]], Tensor], indices: Sequence[int]
    ) -> dict[str, Tensor] | None:
        """The readouts of one batch; None where it does not fit the memory.

        The store remembers that it did not, so a resumed run halves it again even where it would fit now: other batches
        give other last bits.
        """
        chosen = [groups[index] for index in indices]

        def compute() -> dict[str, Tensor]:
            with unless_too_large(len(chosen)):
                return self._read(hidden_of(chosen))
            return {_HALVED: torch.ones(1)}

        depends_on = {
            "groups": [format_heads(group) for group in chosen],
            "ablation": asdict(self.ablation),
            "readouts": asdict(self.readouts),
            "plan": self.plan.as_dict(),
            "tokens": self._tokens_sha256,
        }
        values_by_name = self._keep(depends_on, compute)
        return None if _HALVED in values_by_name else values_by_name

    def resolution(self, unit: str) -> float:
        """Scores this close are ties in the engine's dtype; ``unit`` is ``nats`` or ``degrees``."""
        return _RESOLUTION[unit][self.engine.dtype.itemsize]

    def table(self, name: str, values: Tensor, heads: Sequence[Head] | None = None) -> HeadScores:
        """What :meth:`measure` gave for each of ``heads`` alone (by default all), as [n_prompts, n_layers, n_heads].

        Args:
            name: ``ships`` or ``refusal_score``.
            values: [len(heads), n_prompts], nats.
            heads: the heads that were measured.
        """
        n_heads = self.engine.n_heads
        table = torch.full((len(self.sequences), self.engine.n_layers * n_heads), float("nan"), dtype=torch.float64)
        places = [head.layer * n_heads + head.index for head in (self.engine.heads if heads is None else heads)]
        table[:, places] = values.T
        by_layer = table.view(len(self.sequences), self.engine.n_layers, n_heads)
        return HeadScores(by_layer, name, "nats", self.resolution("nats"))

    @torch.inference_mode()
    def _read(self, hidden: Tensor) -> dict[str, Tensor]:
        """The readouts of states [n_groups, n_wanted, d_model]; the host waits for the device once, at the end."""
        values: dict[str, Tensor] = {}
        if self.readouts.needs_logits:
            values |= self._read_next_token(hidden)
        for angle in self.readouts.angles:
            values[angle.name] = principal_angle_sum(self.unablated[angle.name], self._directions(hidden, angle))
        return {name: values_of_name.cpu() for name, values_of_name in values.items()}

    def _read_next_token(self, hidden: Tensor) -> dict[str, Tensor]:
        """Ships (Eq 9), averaged over each prompt's wanted tokens, and the drop of the log-odds at its last token.

        Openers are first tokens of answers, so the log-odds at later, teacher-forced positions would mean nothing.
        """
        reference = self.unablated["log_probabilities"]
        n_groups, n_wanted = hidden.shape[:2]
        divergences, odds = [], []
        start = 0
        for log_probabilities in next_token_log_probabilities(self.engine, hidden.flatten(0, 1)):
            end = start + len(log_probabilities)
            unablated = reference[torch.arange(start, end, device=reference.device) % n_wanted]
            start = end
            divergences.append((unablated.exp() * (unablated - log_probabilities)).sum(dim=-1))
            if self.readouts.openers:
                odds.append(log_odds(log_probabilities, self.readouts.openers))
        values = {}
        if self.readouts.ships:
            # KL is never negative; rounding can leave it below 0.
            values["ships"] = self._mean_by_prompt(torch.cat(divergences).clamp_min(0.0).view(n_groups, n_wanted))
        if self.readouts.openers:
            ablated = torch.cat(odds).view(n_groups, n_wanted)
            last_of_prompts = first_wanted(self.sequences).to(ablated.device)
            values["refusal_score"] = self.unablated["log_odds"] - ablated[:, last_of_prompts]
        return values

    def _mean_by_prompt(self, values: Tensor) -> Tensor:
        """[n_groups, n_wanted] averaged to [n_groups, n_prompts]."""
        prompts = prompt_of_wanted(self.sequences).to(values.device)
        sums = values.new_zeros(len(values), len(self.sequences))
        sums.scatter_add_(1, prompts.expand_as(values), values)
        counts = torch.tensor([sequence.n_wanted for sequence in self.sequences], device=values.device)
        return sums / counts.clamp_min(1)

    def _directions(self, hidden: Tensor, angle: Angle) -> Tensor:
        """Dominant directions of each group's last-prompt-token states; ``hidden`` is [n_groups, n_wanted, d_model]."""
        states = hidden[:, first_wanted(self.sequences).to(hidden.device)]
        states = self.engine.normed(states) if angle.state == "after_norm" else states
        return dominant_directions(states, angle.space, angle.rank, angle.centred)


@torch.inference_mode()
def next_token_log_probabilities(engine: Engine, states: Tensor) -> Iterator[Tensor]:
    """Next-token log-probabilities of states [n, d_model] before the final norm: chunks [some of n, vocabulary]."""
    step = max(1, engine.logits_at_once // engine.architecture.vocabulary_size)
    for at in range(0, len(states), step):
        yield torch.log_softmax(engine.logits(states[at : at + step]).double(), dim=-1)


def log_odds(log_probabilities: Tensor, openers: Sequence[int]) -> Tensor:
    """Log P(R) / (1 - P(R)) of the openers R [...], from log-probabilities [..., vocabulary], without cancellation."""
    chosen = torch.zeros(log_probabilities.shape[-1], dtype=torch.bool, device=log_probabilities.device)
    chosen[list(openers)] = True
    inside = log_probabilities[..., chosen].logsumexp(dim=-1)
    return inside - log_probabilities[..., ~chosen].logsumexp(dim=-1)

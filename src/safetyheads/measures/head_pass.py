"""One pass over groups of heads. Owns what is read off last-token states: every score comes from the same replay.

Probabilities and angles are taken in float64 from the model's logits and states: this is the place where the
precision of scores is chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.errors import SafetyheadsError
from safetyheads.heads import Group, Head, common_heads, format_heads
from safetyheads.measures.subspace import Space, dominant_directions, principal_angle_sum
from safetyheads.model.planning import Plan, TokenSequence, first_wanted, is_out_of_memory, prompt_of_wanted
from safetyheads.scores import FunctionScorer, HeadScores

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.model.replay import Capture

Keep: TypeAlias = Callable[[Mapping[str, Any], Callable[[], dict[str, Tensor]]], dict[str, Tensor]]
"""Given what a result depends on and how to compute it, gives it: from a store, or by computing."""

State: TypeAlias = Literal["after_norm", "before_norm"]
"""Last-token state after the final norm (released code), or the residual stream before it (text)."""

# Scores closer than this are ties. Measured: batch shapes alone move a float32 score of the organism by up to
# 2e-7 nats and 6e-5 degrees; half precisions resolve about 2^-8 of a logit.
_RESOLUTION = {"nats": {4: 1e-6, 2: 1e-3}, "degrees": {4: 1e-4, 2: 1e-2}}
_HALVED = "halved"


@dataclass(frozen=True, slots=True)
class Angle:
    """One reading of Generalized Ships (Eq 11); the paper's text and released code differ in all four."""

    space: Space = "prompt"
    """``prompt`` (released code) or ``representation`` (text)."""
    rank: int = 1
    """Singular vectors kept; the sum of their principal angles is the score."""
    state: State = "after_norm"
    """Last-token state after the final norm (released code), or the residual stream before it (text)."""
    centred: bool = False
    """Whether the mean over prompts is subtracted first; not in the paper."""

    @property
    def name(self) -> str:
        """``generalized_ships_prompt`` and so on, with what differs from the defaults."""
        extra = [f"r{self.rank}"] * (self.rank != 1) + [self.state] * (self.state != "after_norm")
        return "_".join(["generalized_ships", self.space, *extra, *["centred"] * self.centred])


@dataclass(frozen=True, slots=True)
class Readings:
    """What a pass reads off the states."""

    ships: bool = False
    """KL of the next token's distribution, per prompt."""
    openers: tuple[int, ...] = ()
    """First tokens of refusals; their log-odds are read where there are any."""
    angles: tuple[Angle, ...] = ()
    """Generalized Ships."""

    @property
    def needs_logits(self) -> bool:
        """Whether the states alone do not do."""
        return self.ships or bool(self.openers)


@dataclass(frozen=True, slots=True)
class HeadPass:
    """One ablation on one set of prompts: measures any groups of heads; makes the scorers."""

    engine: Engine
    """The model."""
    sequences: tuple[TokenSequence, ...]
    """One for each prompt."""
    ablation: Ablation
    """Of every head in every group."""
    readings: Readings
    """What is read."""
    layout: Plan
    """How the work is laid out; part of what the last bits depend on."""
    keep: Keep
    """Where results are kept."""
    unablated: dict[str, Tensor] = field(default_factory=dict)
    """What the readings compare with: probabilities, log-odds, directions."""
    captures: list[Capture] = field(default_factory=list)
    """What the unablated run kept, until the first groups are measured."""
    weights_version: object = None
    """Of the engine at the beginning; other weights would be compared with the old ones' readings."""

    @classmethod
    def begin(
        cls,
        engine: Engine,
        sequences: Sequence[TokenSequence],
        ablation: Ablation,
        readings: Readings,
        layout: Plan | None = None,
        keep: Keep | None = None,
    ) -> HeadPass:
        """Run the unablated model and be ready to measure groups."""
        engine.prove_up_to(max(len(sequence.token_ids) for sequence in sequences))
        layout = layout or engine.plan(sequences)
        made = cls(
            engine,
            tuple(sequences),
            ablation,
            readings,
            layout,
            keep or _compute,
            weights_version=engine.weights_version,
        )
        made.captures.extend(engine.captured(sequences, (), ablation, layout))
        hidden = engine.replayed(made.captures, [()], ablation, engine.n_layers - 1)[0]
        if readings.needs_logits:
            log_probabilities = torch.cat(list(next_token_log_probabilities(engine, hidden)))
            made.unablated["log_probabilities"] = log_probabilities
            if readings.openers:
                made.unablated["log_odds"] = log_odds(log_probabilities[first_wanted(made.sequences)], readings.openers)
        for angle in readings.angles:
            made.unablated[angle.name] = made._directions(hidden[None], angle)[0]
        return made

    def measure(self, groups: Sequence[Group], on_groups: Callable[[int], None] | None = None) -> dict[str, Tensor]:
        """Every reading of each group; ``on_groups`` is told how many were just done.

        Returns:
            ``ships`` and ``refusal_score`` [len(groups), n_prompts] (nats), and each angle's name [len(groups)]
            (degrees); float64, on the CPU.
        """
        if self.weights_version is not self.engine.weights_version:
            raise SafetyheadsError("the model has other weights than when this scorer was made; make it anew")
        common = common_heads(groups)
        batches = self.engine.batches(groups, self.layout)
        captures = [] if common else list(self.captures)
        self.captures.clear()

        def hidden_of(chosen: Sequence[Group], start: int) -> Tensor:
            if not captures:  # not before the first batch that the store does not have
                captures.extend(self.engine.captured(self.sequences, common, self.ablation, self.layout, start))
            for capture in captures:
                capture.drop_before(start)
            return self.engine.replayed(captures, chosen, self.ablation, start)

        results: dict[str, Tensor] = {}
        for batch in batches:
            for indices, part in self._batch(groups, batch.indices, partial(hidden_of, start=batch.start)):
                for name, values in part.items():
                    if name not in results:
                        results[name] = torch.full((len(groups), *values.shape[1:]), float("nan"), dtype=torch.float64)
                    results[name][list(indices)] = values
                if on_groups is not None:
                    on_groups(len(indices))
        return results

    def _batch(
        self, groups: Sequence[Group], indices: Sequence[int], hidden_of: Callable[[Sequence[Group]], Tensor]
    ) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
        """The readings of one batch; of its halves where memory does not suffice, which the store remembers."""
        chosen = [groups[index] for index in indices]

        def compute() -> dict[str, Tensor]:
            try:
                return self._read(hidden_of(chosen))
            except (RuntimeError, MemoryError) as error:
                if len(indices) < 2 or not is_out_of_memory(error):
                    raise
            return {_HALVED: torch.ones(1)}

        part = self.keep(self.fields(chosen), compute)
        if _HALVED not in part:
            yield indices, part
            return
        middle = len(indices) // 2
        for half in (indices[:middle], indices[middle:]):
            yield from self._batch(groups, half, hidden_of)

    def scorer(self, name: str, on_groups: Callable[[int], None] | None = None) -> FunctionScorer:
        """One reading as a scorer of groups, averaged over the prompts: ``mean_ships``, ``refusal_score``, an angle."""
        reading = "ships" if name == "mean_ships" else name
        unit = "degrees" if name.startswith("generalized") else "nats"

        def score(groups: Sequence[Group]) -> Tensor:
            values = self.measure(groups, on_groups)[reading]
            return values.mean(dim=1) if values.ndim == 2 else values

        return FunctionScorer(score, name, unit, _RESOLUTION[unit][self.engine.dtype.itemsize])

    def fields(self, groups: Sequence[Group]) -> dict[str, Any]:
        """All that the readings of this batch of groups depend on, the model itself aside."""
        tokens = json.dumps([[sequence.token_ids, sequence.n_wanted] for sequence in self.sequences])
        return {
            "groups": [format_heads(group) for group in groups],
            "ablation": asdict(self.ablation),
            "readings": asdict(self.readings),
            "plan": self.layout.as_dict(),
            "tokens": hashlib.sha256(tokens.encode()).hexdigest(),
        }

    def table(self, name: str, values: Tensor, heads: Sequence[Head] | None = None) -> HeadScores:
        """What :meth:`measure` gave for each of ``heads`` alone, as [n_prompts, n_layers, n_heads]; by default all."""
        scorer, n_heads = self.scorer(name), self.engine.n_heads
        table = torch.full((len(self.sequences), self.engine.n_layers * n_heads), float("nan"), dtype=torch.float64)
        places = [head.layer * n_heads + head.index for head in (self.engine.heads if heads is None else heads)]
        table[:, places] = values.T
        by_layer = table.view(len(self.sequences), self.engine.n_layers, n_heads)
        return HeadScores(by_layer, name, scorer.unit, scorer.resolution)

    @torch.inference_mode()
    def _read(self, hidden: Tensor) -> dict[str, Tensor]:
        """The readings of states [n_groups, n_wanted, d_model]; the host waits for the device once, at the end."""
        found: dict[str, Tensor] = {}
        if self.readings.needs_logits:
            found |= self._read_next_token(hidden)
        for angle in self.readings.angles:
            found[angle.name] = principal_angle_sum(self.unablated[angle.name], self._directions(hidden, angle))
        return {name: values.cpu() for name, values in found.items()}

    def _read_next_token(self, hidden: Tensor) -> dict[str, Tensor]:
        """Ships (Eq 9), averaged over each prompt's wanted tokens, and the drop of the log-odds at its last token.

        Openers are first tokens of answers, so the log-odds of later, teacher-forced positions would say nothing.
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
            if self.readings.openers:
                odds.append(log_odds(log_probabilities, self.readings.openers))
        found = {}
        if self.readings.ships:
            # KL is never negative; what rounding leaves below 0 is 0.
            found["ships"] = self._by_prompt(torch.cat(divergences).clamp_min(0.0).view(n_groups, n_wanted))
        if self.readings.openers:
            ablated = torch.cat(odds).view(n_groups, n_wanted)
            firsts = first_wanted(self.sequences).to(ablated.device)
            found["refusal_score"] = self.unablated["log_odds"] - ablated[:, firsts]
        return found

    def _by_prompt(self, values: Tensor) -> Tensor:
        """[n_groups, n_wanted] averaged to [n_groups, n_prompts]."""
        prompts = prompt_of_wanted(self.sequences).to(values.device)
        sums = values.new_zeros(len(values), len(self.sequences))
        sums.scatter_add_(1, prompts.expand_as(values), values)
        counts = torch.tensor([sequence.n_wanted for sequence in self.sequences], device=values.device)
        return sums / counts.clamp_min(1)

    def _directions(self, hidden: Tensor, angle: Angle) -> Tensor:
        """Dominant directions of each group's states [n_groups, n_wanted, d_model], of the prompts' last tokens."""
        states = hidden[:, first_wanted(self.sequences).to(hidden.device)]
        states = self.engine.normed(states) if angle.state == "after_norm" else states
        return dominant_directions(states, angle.space, angle.rank, angle.centred)


def _compute(_: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """A :data:`Keep` that keeps nothing."""
    return compute()


@torch.inference_mode()
def next_token_log_probabilities(engine: Engine, states: Tensor) -> Iterator[Tensor]:
    """Of the next token after states [n, d_model] before the final norm: [some of n, vocabulary], float64."""
    step = max(1, engine.logits_at_once // engine.architecture.vocabulary_size)
    for at in range(0, len(states), step):
        yield torch.log_softmax(engine.logits(states[at : at + step]).double(), dim=-1)


def log_odds(log_probabilities: Tensor, openers: Sequence[int]) -> Tensor:
    """Log P(R) / (1 - P(R)) of the openers R [...], from log-probabilities [..., vocabulary], without cancellation."""
    chosen = torch.zeros(log_probabilities.shape[-1], dtype=torch.bool, device=log_probabilities.device)
    chosen[list(openers)] = True
    inside = log_probabilities[..., chosen].logsumexp(dim=-1)
    return inside - log_probabilities[..., ~chosen].logsumexp(dim=-1)

"""Measures groups of heads: one replay of the model gives every score.

Probabilities and angles are taken in float64 from the model's logits and states. The precision of all scores is chosen
here and nowhere else.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.display import Shown
from safetyheads.errors import OVERFLOWS, InputError, SafetyheadsError
from safetyheads.heads import Group, Head, common_heads, format_heads
from safetyheads.measures.subspace import Space, dominant_directions, principal_angle_sum, refuse_rank
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence, first_wanted, prompt_of_wanted
from safetyheads.model.planning import IN_FLOAT64, Plan, halving, unless_too_large
from safetyheads.scores import HeadScores

Value = TypeVar("Value")

State: TypeAlias = Literal["after_norm", "before_norm"]
"""Last-token state after the final norm (released code), or the residual stream before it (text)."""

SCORES = ("mean_ships", "refusal_score", "generalized_ships_prompt", "generalized_ships_representation")
"""Names of the scores that are measured on groups of heads."""
_GENERALIZED = "generalized_ships_"
# Scores closer than this are ties. Measured: batch shapes alone move a float32 score of the organism by up to
# 2e-7 nats and 6e-5 degrees; half precisions resolve about 2^-8 of a logit.
_RESOLUTION = {"nats": {4: 1e-6, 2: 1e-3}, "degrees": {4: 1e-4, 2: 1e-2}}
_HALVED = "halved"


@dataclass(frozen=True, slots=True)
class Score(Shown):
    """A score's name and its settings."""

    name: str
    """One of :data:`SCORES`."""
    positions: int = 1
    """Mean Ships: answer tokens to average over; 1 is the paper's."""
    rank: int = 1
    """Generalized Ships: number of principal angles that are summed."""
    state: State = "after_norm"
    """Generalized Ships: last-token state after the final norm (released code) or before it."""
    centred: bool = False
    """Generalized Ships: whether the mean over prompts is subtracted first."""

    def __post_init__(self) -> None:
        if self.name not in SCORES:
            raise InputError(f"unknown score {self.name!r}; known are {', '.join(SCORES)}")
        if self.state not in get_args(State):
            raise InputError(f"unknown state {self.state!r}; known are {', '.join(get_args(State))}")
        if not self.is_generalized and (self.rank, self.state, self.centred) != (1, "after_norm", False):
            raise InputError(f"rank, state and centred are for Generalized Ships, not for {self.name}")
        if self.positions != 1 and not self.has_positions:
            raise InputError(f"positions is for mean_ships, not for {self.name}")

    @property
    def has_positions(self) -> bool:
        """Whether it reads answer tokens beyond the prompt's last token."""
        return self.name == "mean_ships"

    @property
    def is_generalized(self) -> bool:
        """Whether it is an angle (Eq 11)."""
        return self.name.startswith(_GENERALIZED)

    @property
    def space(self) -> Space:
        """Generalized Ships: whose singular vectors; ``prompt`` (released code) or ``representation`` (text)."""
        return cast("Space", self.name.removeprefix(_GENERALIZED))

    @property
    def label(self) -> str:
        """The name, and the settings of Generalized Ships other than the defaults."""
        extra = [f"r{self.rank}"] * (self.rank != 1) + [self.state] * (self.state != "after_norm")
        return "_".join([self.name, *extra, *["centred"] * self.centred])

    @property
    def screened_by(self) -> str:
        """The score that finds candidates on few prompts: itself, or mean Ships for an angle, which needs them all."""
        return "mean_ships" if self.is_generalized else self.name

    def readouts(self, openers: Sequence[int] = ()) -> "Readouts":
        """What a pass must read for it; ``openers`` are the first tokens of refusals."""
        if self.is_generalized:
            return Readouts(angles=(self,))
        return Readouts(openers=tuple(openers)) if self.name == "refusal_score" else Readouts(ships=True)

    def refuse_too_few(self, n_prompts: int) -> None:
        """Raise :class:`InputError` where the score needs more prompts."""
        if self.is_generalized:
            refuse_rank(self.rank, n_prompts, self.space, self.centred)


@dataclass(frozen=True, slots=True)
class Readouts:
    """What a pass reads from the last-token states."""

    ships: bool = False
    """KL divergence of the next-token distribution, per prompt."""
    openers: tuple[int, ...] = ()
    """First tokens of refusals, whose log-odds are read; empty reads none."""
    angles: tuple[Score, ...] = ()
    """Variants of Generalized Ships."""
    targets: tuple[tuple[int, ...], ...] = ()
    """The token that follows each wanted one of each sequence, whose log-probability is read; empty reads none."""


Values: TypeAlias = Mapping[str, Tensor]
"""Results of a pass, by name."""


class Keep:
    """Where a pass keeps its results: nowhere. A run keeps them in its directory, and may share the work."""

    def kept(self, fields: Mapping[str, Any], compute: Callable[[], Values], fits: Callable[[Values], bool]) -> Values:
        """The result that ``fields`` determine: read from a store, if it ``fits``, or computed."""
        return compute()

    def divide(self, units: Sequence[tuple[Mapping[str, Any], float]]) -> None:
        """Told what each batch depends on, and the tokens that it runs through the whole model, before any is done."""

    def each(self, tasks: Sequence[Callable[[], Value]]) -> Iterable[tuple[int, Value]]:
        """The place and the value of every task, in any order."""
        return ((at, task()) for at, task in enumerate(tasks))


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
        """Run the unablated model over a sequence for each prompt.

        A ``plan`` other than the engine's moves results in their last bits; results are kept nowhere by default.
        """
        engine.prove_up_to(max(len(sequence.token_ids) for sequence in sequences))
        self.engine, self.sequences, self.ablation, self.readouts = engine, tuple(sequences), ablation, readouts
        self.plan = plan or engine.plan(sequences)
        self._keep = keep or Keep()
        tokens = json.dumps([[sequence.token_ids, sequence.n_wanted] for sequence in sequences])
        self._tokens_sha256 = hashlib.sha256(tokens.encode()).hexdigest()
        self._weights_version = engine.weights_version
        # The unablated run also serves the first groups that are measured.
        self._captures = list(engine.captured(sequences, (), ablation, self.plan))
        hidden = engine.replayed(self._captures, [()], ablation, engine.n_layers - 1)[0]
        self.unablated: dict[str, Tensor] = {}
        reads_next, kept, highest = bool(readouts.ships or readouts.openers or readouts.targets), [], []
        for logits in engine.logit_chunks(hidden):
            highest += [part.amax(dim=-1) for part in _log_probabilities(logits)]
            # Not what is made of them, which takes twice the memory.
            kept += [logits] * reads_next
        sureness = self._by_prompt(torch.cat(highest)[None])[0]
        self.least_sure_first: tuple[int, ...] = tuple(sureness.argsort(stable=True).tolist())
        """Numbers of the prompts by the log-probability of the unablated model's likeliest next token, lowest first; of
        several wanted tokens their mean."""
        if reads_next:
            logits = self.unablated["logits"] = torch.cat(kept)
            if readouts.openers:
                firsts = _log_probabilities(logits[first_wanted(sequences)])
                self.unablated["log_odds"] = torch.cat([log_odds(part, readouts.openers) for part in firsts])
        for angle in readouts.angles:
            self.unablated[angle.label] = self._directions(hidden[None], angle)[0]

    def measure(self, groups: Sequence[Group], on_groups: Callable[[int], None] | None = None) -> dict[str, Tensor]:
        """Every readout of each group; calls ``on_groups`` with the number of groups just done.

        Float64, on the CPU: ``ships``, ``refusal_score`` and ``log_probability_drop`` [len(groups), n_prompts] (nats),
        and each angle's name [len(groups)] (degrees). Refused once the model's weights have changed.
        """
        if self._weights_version is not self.engine.weights_version:
            raise SafetyheadsError("the model has other weights than when this scorer was made; make it anew")
        common, batches = common_heads(groups), self.engine.batches(groups, self.plan)
        captures = [] if common else self._captures
        self._captures = []
        # All that results depend on, groups and weights aside, as a hash: of many prompts it is long.
        told = [asdict(self.ablation), asdict(self.readouts), asdict(self.plan), self._tokens_sha256]
        depends_on = {"pass": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}
        n_layers, n_tokens = self.engine.n_layers, sum(len(sequence.token_ids) for sequence in self.sequences)

        def fields_of(indices: Sequence[int]) -> dict[str, Any]:
            return depends_on | {"groups": [format_heads(groups[index]) for index in indices]}

        def hidden_of(start: int, chosen: Sequence[Group]) -> Tensor:
            # Only once a batch is not in the store; again where one comes back that needs earlier layers.
            if not captures or start not in captures[0].inputs:
                captures[:] = self.engine.captured(self.sequences, common, self.ablation, self.plan, start)
            for capture in captures:
                capture.drop_before(start)
            return self.engine.replayed(captures, chosen, self.ablation, start)

        def read(indices: Sequence[int], start: int) -> Values | None:
            """The readouts of one batch; None where it does not fit the memory.

            The store remembers that it did not, so a resumed run halves it again even where it would fit now: other
            batches give other last bits.
            """
            chosen = [groups[index] for index in indices]

            def compute() -> dict[str, Tensor]:
                with unless_too_large(len(chosen)):
                    return self._read(hidden_of(start, chosen))
                return {_HALVED: torch.ones(1)}

            values_by_name = self._keep.kept(fields_of(indices), compute, partial(self._fits, len(chosen)))
            return None if _HALVED in values_by_name else values_by_name

        def parts_of(batch: Sequence[int], start: int) -> list[tuple[Sequence[int], Values]]:
            return list(halving(batch, partial(read, start=start)))

        results: dict[str, Tensor] = {}
        self._keep.divide(
            [(fields_of(batch), len(batch) * n_tokens * (n_layers - start) / n_layers) for batch, start in batches]
        )
        for _, parts in self._keep.each([partial(parts_of, batch, start) for batch, start in batches]):
            for indices, values_by_name in parts:
                for name, values in values_by_name.items():
                    if name not in results:
                        results[name] = torch.full((len(groups), *values.shape[1:]), float("nan"), dtype=torch.float64)
                    results[name][list(indices)] = values
                if on_groups is not None:
                    on_groups(len(indices))
        return results

    def _fits(self, n_groups: int, values_by_name: Values) -> bool:
        """Whether stored values are of the names, types and shapes that reading gives."""
        if values_by_name.keys() == {_HALVED}:
            return n_groups > 1
        readouts, by_prompt = self.readouts, (n_groups, len(self.sequences))
        shapes: dict[str, tuple[int, ...]] = {angle.label: (n_groups,) for angle in readouts.angles}
        read = {"ships": readouts.ships, "log_probability_drop": readouts.targets, "refusal_score": readouts.openers}
        shapes |= {name: by_prompt for name, is_read in read.items() if is_read}
        found = {name: tuple(values.shape) for name, values in values_by_name.items()}
        return found == shapes and all(
            values.dtype == torch.float64 and bool(values.isfinite().all()) for values in values_by_name.values()
        )

    def resolution(self, unit: str) -> float:
        """Scores this close are ties in the engine's dtype; ``unit`` is ``nats`` or ``degrees``."""
        return _RESOLUTION[unit][self.engine.dtype.itemsize]

    def table(self, name: str, values: Tensor, heads: Sequence[Head] | None = None) -> HeadScores:
        """Nats that :meth:`measure` gave for each of ``heads`` alone (by default all), [len(heads), n_prompts]."""
        shape = (len(self.sequences), self.engine.n_layers, self.engine.n_heads)
        table = torch.full(shape, float("nan"), dtype=torch.float64)
        heads = self.engine.heads if heads is None else heads
        table[:, [head.layer for head in heads], [head.index for head in heads]] = values.T
        return HeadScores(table, name, "nats", self.resolution("nats"))

    @torch.inference_mode()
    def _read(self, hidden: Tensor) -> dict[str, Tensor]:
        """The readouts of states [n_groups, n_wanted, d_model].

        The host waits for the device once before the angles, and at the end.
        """
        reads_next = self.readouts.ships or self.readouts.openers or self.readouts.targets
        values = self._read_next_token(hidden) if reads_next else {}
        # Also before the angles: there is no basis of states that are not finite.
        # By their bounds, which are NaN where any is: to ask each takes twice the memory of the states.
        bounds = torch.stack([bound.double() for read in (hidden, *values.values()) for bound in read.aminmax()])
        if not bool(bounds.isfinite().all()):
            raise SafetyheadsError(OVERFLOWS.format("a score"))
        for angle in self.readouts.angles:
            values[angle.label] = principal_angle_sum(self.unablated[angle.label], self._directions(hidden, angle))
        return {name: values_of_name.cpu() for name, values_of_name in values.items()}

    def _read_next_token(self, hidden: Tensor) -> dict[str, Tensor]:
        """Ships (Eq 9) and drops of the targets' log-probability, averaged over each prompt's wanted tokens, and the
        drop of the log-odds at its last token.

        Openers are first tokens of answers, so the log-odds at later, teacher-forced positions would mean nothing.
        """
        reference = self.unablated["logits"]
        n_groups, n_wanted = hidden.shape[:2]
        divergences, drops, odds, start = [], [], [], 0
        targets = torch.tensor([token for tokens in self.readouts.targets for token in tokens], device=hidden.device)
        for log_probabilities in next_token_log_probabilities(self.engine, hidden.flatten(0, 1)):
            end = start + len(log_probabilities)
            wanted = torch.arange(start, end, device=reference.device) % n_wanted
            unablated = torch.log_softmax(reference[wanted].double(), dim=-1)
            start = end
            if len(targets):
                drops.append((unablated - log_probabilities).gather(1, targets[wanted][:, None])[:, 0])
            divergences.append((unablated.exp() * (unablated - log_probabilities)).sum(dim=-1))
            if self.readouts.openers:
                odds.append(log_odds(log_probabilities, self.readouts.openers))
        values = {}
        if self.readouts.ships:
            # KL is never negative; rounding can leave it below 0.
            values["ships"] = self._by_prompt(torch.cat(divergences).clamp_min(0.0).view(n_groups, n_wanted))
        if drops:
            values["log_probability_drop"] = self._by_prompt(torch.cat(drops).view(n_groups, n_wanted))
        if self.readouts.openers:
            ablated = torch.cat(odds).view(n_groups, n_wanted)
            last_of_prompts = first_wanted(self.sequences).to(ablated.device)
            values["refusal_score"] = self.unablated["log_odds"] - ablated[:, last_of_prompts]
        return values

    def _by_prompt(self, values: Tensor) -> Tensor:
        """Means [n_groups, n_prompts] over each prompt's wanted tokens, of values [n_groups, n_wanted]."""
        prompts = prompt_of_wanted(self.sequences).to(values.device)
        sums = values.new_zeros(len(values), len(self.sequences)).scatter_add_(1, prompts.expand_as(values), values)
        return sums / torch.tensor([sequence.n_wanted for sequence in self.sequences]).to(sums)

    def _directions(self, hidden: Tensor, angle: Score) -> Tensor:
        """Dominant directions of each group's last-prompt-token states; ``hidden`` is [n_groups, n_wanted, d_model]."""
        states = hidden[:, first_wanted(self.sequences).to(hidden.device)]
        states = self.engine.normed(states) if angle.state == "after_norm" else states
        return dominant_directions(states, angle.space, angle.rank, angle.centred)


@torch.inference_mode()
def next_token_log_probabilities(engine: Engine, states: Tensor) -> Iterator[Tensor]:
    """Next-token log-probabilities of states [n, d_model] before the final norm: chunks [some of n, vocabulary]."""
    for logits in engine.logit_chunks(states):
        yield from _log_probabilities(logits)


def _log_probabilities(logits: Tensor) -> Iterator[Tensor]:
    """Of logits [n, vocabulary], a part after the other: float64 takes more memory than all of them."""
    for part in torch.split(logits, max(1, IN_FLOAT64 // logits.shape[-1])):
        yield torch.log_softmax(part.double(), dim=-1)


def log_odds(log_probabilities: Tensor, openers: Sequence[int]) -> Tensor:
    """Log P(R) / (1 - P(R)) of the openers R [...], from log-probabilities [..., vocabulary], without cancellation."""
    chosen = torch.zeros(log_probabilities.shape[-1], dtype=torch.bool, device=log_probabilities.device)
    chosen[list(openers)] = True
    inside = log_probabilities[..., chosen].logsumexp(dim=-1)
    return inside - log_probabilities[..., ~chosen].logsumexp(dim=-1)

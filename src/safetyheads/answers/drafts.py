"""Drafts: how far an unablated answer is the ablated one too. Owns the comparison; judges and decodes nothing.

One packed pass over [prompt | draft] gives the ablated model's own choice at every position of the draft. Up to the
first one that differs, the draft is the answer that the ablated model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.answers.sampling import Place, Sampling, choose, noise_key
from safetyheads.heads import Group, common_heads
from safetyheads.model.planning import Plan, TokenSequence, halving

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.model.replay import Capture

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

# A margin below this, in logits, is a near-tie wherever it is found, by bytes of the model's numbers.
_LEAST_TOLERANCE = {8: 1e-8, 4: 1e-4, 2: 1e-2}
# The ablated runs have many times the positions that the tolerance was measured on.
_SAFETY = 4.0


@dataclass(frozen=True, slots=True)
class Draft:
    """What one prompt's answer is taken to be, until it is compared."""

    prompt: tuple[int, ...]
    """The prompt under its template."""
    choices: tuple[int, ...]
    """Tokens that the model chose one after the other, an end token included; at least one."""

    @property
    def sequence(self) -> TokenSequence:
        """The tokens to be run; the states wanted are those that choose."""
        return TokenSequence(self.prompt + self.choices[:-1], len(self.choices))


@dataclass(frozen=True, slots=True)
class Compared:
    """One group's choices along one draft."""

    n_same: int
    """Choices of the draft that the ablated model makes too, from the first on."""
    other: int | None
    """What it chooses instead, after them; None where it makes them all."""
    margin: float
    """The narrowest of the choices so far, in logits."""


@dataclass(frozen=True, slots=True)
class DraftPass:
    """One ablation on the drafts of some prompts: compares any groups of heads."""

    engine: Engine
    """The model."""
    drafts: tuple[Draft, ...]
    """One for each prompt."""
    ablation: Ablation
    """Of every head in every group."""
    sampling: Sampling
    """How tokens are chosen."""
    ends: frozenset[int]
    """Tokens that end an answer; one is as good as another."""
    layout: Plan
    """How the work is laid out."""
    captures: list[Capture] = field(default_factory=list)
    """Of the unablated run, from the layer on that was needed last."""

    @classmethod
    def begin(
        cls,
        engine: Engine,
        drafts: Sequence[Draft],
        ablation: Ablation,
        sampling: Sampling,
        ends: frozenset[int],
        layout: Plan | None = None,
    ) -> DraftPass:
        """Lay the work out; nothing is run yet."""
        sequences = [draft.sequence for draft in drafts]
        engine.prove_up_to(max(len(sequence.token_ids) for sequence in sequences))
        return cls(engine, tuple(drafts), ablation, sampling, ends, layout or engine.plan(sequences))

    def compare(
        self, groups: Sequence[Group], on_compared: Callable[[Sequence[Compared]], None] | None = None
    ) -> list[list[Compared]]:
        """Each group's choices along each draft [n_groups][n_drafts]; ``on_compared`` is told of each group's."""
        found: list[list[Compared]] = [[] for _ in groups]
        common = common_heads(groups)
        captures: list[Capture] = [] if common else self.captures
        for batch in self.engine.batches(groups, self.layout):
            if not captures or batch.start not in captures[0].inputs:
                captures[:] = self._captured(common, batch.start)
            for capture in captures:
                capture.drop_before(batch.start)

            def run(indices: Sequence[int], start: int = batch.start) -> tuple[Integers, Floats]:
                chosen = [groups[index] for index in indices]
                return self.choices(self.engine.replayed(captures, chosen, self.ablation, start))

            for indices, (tokens, margins) in halving(batch.indices, run):
                for row, index in enumerate(indices):
                    found[index] = self.along(tokens[row], margins[row])
                    if on_compared is not None:
                        on_compared(found[index])
        return found

    def unablated(self) -> tuple[Integers, Floats]:
        """Choices and margins [2, n_choices of all drafts] of the unablated model, by all layers and in a batch."""
        # Kept: the first comparison starts from them.
        captures = self.captures
        captures[:] = self._captured((), 0)

        def run(groups: Sequence[Group]) -> tuple[Integers, Floats]:
            return self.choices(self.engine.replayed(captures, groups, self.ablation, 0))

        parts = [made for _, made in halving([(), ()], run)]
        return np.concatenate([tokens for tokens, _ in parts]), np.concatenate([narrow for _, narrow in parts])

    def _captured(self, common: Group, start: int) -> tuple[Capture, ...]:
        sequences = [draft.sequence for draft in self.drafts]
        return self.engine.captured(sequences, common, self.ablation, self.layout, start)

    @torch.inference_mode()
    def choices(self, hidden: Tensor) -> tuple[Integers, Floats]:
        """Tokens and margins [n_groups, n_wanted] of states [n_groups, n_wanted, d_model], some logits at a time."""
        places = [
            Place(noise_key(draft.prompt), position) for draft in self.drafts for position in range(len(draft.choices))
        ]
        # Choice by choice and not group by group: then one draw of noise serves the whole batch.
        n_groups, n_wanted = hidden.shape[:2]
        states = hidden.transpose(0, 1).flatten(0, 1)
        step = max(1, self.engine.logits_at_once // self.engine.architecture.vocabulary_size)
        tokens, margins = [], []
        for at in range(0, len(states), step):
            part = states[at : at + step]
            there = [places[row // n_groups] for row in range(at, at + len(part))]
            choice = choose(self.engine.logits(part), there, self.sampling)
            tokens.append(choice.tokens)
            margins.append(choice.margins)
        table, narrow = (torch.cat(parts).view(n_wanted, n_groups).T.cpu().numpy() for parts in (tokens, margins))
        return table, narrow

    def along(self, tokens: Integers, margins: Floats) -> list[Compared]:
        """One group's choices [n_wanted], draft by draft."""
        found, start = [], 0
        for draft in self.drafts:
            n = len(draft.choices)
            chosen = tokens[start : start + n].tolist()
            differing = (
                at
                for at, (ours, theirs) in enumerate(zip(chosen, draft.choices, strict=True))
                if ours != theirs and not (ours in self.ends and theirs in self.ends)
            )
            same = next(differing, n)
            # A choice among logits that are not finite has no margin (NaN), and numpy's min keeps that.
            narrowest = float(margins[start : start + min(same + 1, n)].min())
            found.append(Compared(same, None if same == n else chosen[same], narrowest))
            start += n
        return found


def near_tie_tolerance(drafted: DraftPass, plain_margins: Sequence[float]) -> float:
    """The margin below which packed and plain arithmetic may choose different tokens, in logits.

    Measured on the run's own unablated answers: how much their margins differ between the two, times a safety
    factor, for the ablated runs have many more positions. Infinite where the two choose different tokens by a wider
    margin than that: then no comparison is to be trusted, and every row is decoded plainly.

    Args:
        drafted: the drafts.
        plain_margins: margins that plain decoding found, choice by choice.
    """
    tokens, ours = drafted.unablated()
    difference = np.abs(ours - np.asarray(plain_margins, dtype=np.float64))
    largest = float(difference[np.isfinite(difference)].max(initial=0.0))
    tolerance = max(_LEAST_TOLERANCE[drafted.engine.dtype.itemsize], _SAFETY * largest)
    rows = zip(tokens, ours, strict=True)
    broken = any(one.other is not None and one.margin >= tolerance for row in rows for one in drafted.along(*row))
    return float("inf") if broken else tolerance

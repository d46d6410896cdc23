"""Screening: finds the best heads without scoring all of them on all prompts.

All heads are scored on two prompts. The best of them are scored on further prompts, and so on (successive halving);
those that are left, the candidates, are scored on all. Of Ships, prompts on which the unablated model is least sure
of its next token come first: there ablations move it furthest, and so most of a mean lies. A random sample of the
others is scored on all prompts too: how many of the sample belong among the best bounds how many of all the others do.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch

from safetyheads.display import Shown
from safetyheads.errors import InputError
from safetyheads.heads import Group, Head
from safetyheads.measures.sahara import sahara, score_heads
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import row_sizes
from safetyheads.scores import GroupScorer, HeadScores, SearchTrace
from safetyheads.stats.intervals import CONFIDENCE, most_in_population

ScorerOn: TypeAlias = Callable[[tuple[int, ...]], GroupScorer]
"""Gives the scorer on some of the prompts, by number."""

PROMPTS = (2, 5, 10, 14)
"""Prompts that each round adds; each leaves the same share of its heads. bench/LOG.md, 2026-11-30, has the trials."""


class Round(NamedTuple):
    """Heads that were scored on few prompts."""

    heads: Group
    """Before the first round all, then those that are left, best first."""
    prompts: tuple[int, ...]
    """Numbers of the prompts that this round adds."""


@dataclass(frozen=True, slots=True)
class Extent(Shown):
    """How many heads a screening scores on all prompts."""

    n_candidates: int = 16
    """Heads that are left after the rounds on few prompts."""
    n_sampled: int = 32
    """Heads drawn at random from the others."""
    seed: int = 0
    """Of the sample."""
    once: bool = False
    """Whether the candidates of a search's first step serve its later steps too, which are then not screened."""

    def __post_init__(self) -> None:
        if self.n_candidates < 1 or self.n_sampled < 0:
            raise InputError(
                f"a screening scores at least one candidate and samples 0 heads or more; got {self.n_candidates} and "
                f"{self.n_sampled}"
            )

    def n_heads(self, of: int, n_prompts: int) -> int:
        """Heads that are scored on all prompts, of so many."""
        return min(of, self.n_candidates + self.n_sampled) if self.rounds(of, n_prompts) else of

    def n_groups(self, of: int, n_prompts: int, steps: int) -> int:
        """Groups that a search of so many steps scores on all prompts, at most."""
        if not self.rounds(of, n_prompts):
            return sum(of - step for step in range(steps))
        first = self.n_heads(of, n_prompts)
        return first + (steps - 1) * (min(first, self.n_candidates) if self.once else first)

    def n_screened(self, of: int, n_prompts: int, steps: int = 1) -> float:
        """What the rounds of such a search cost, as a number of heads that are scored on all prompts."""
        scored = sum(n_heads * n_added for n_heads, n_added in self.rounds(of, n_prompts))
        return (1 if self.once else steps) * scored / n_prompts

    def n_rounds(self, of: int, n_prompts: int, steps: int = 1) -> int:
        """Rounds of such a search."""
        return (1 if self.once else steps) * len(self.rounds(of, n_prompts))

    def rounds(self, n_heads: int, n_prompts: int) -> list[tuple[int, int]]:
        """Of each round: how many heads are scored, and how many prompts it adds.

        Rounds end while there are prompts that none has; of two prompts all heads are scored on both.
        """
        n_rounds = sum(end < n_prompts for end in accumulate(PROMPTS))
        if self.n_candidates >= n_heads or not n_rounds:
            return []
        share = (self.n_candidates / n_heads) ** (1 / n_rounds)
        return [(math.ceil(n_heads * share**number), n_added) for number, n_added in enumerate(PROMPTS[:n_rounds])]


class Proposal(NamedTuple):
    """The heads that are scored on all prompts."""

    candidates: Group
    """Left after the rounds, best first."""
    sampled: Group
    """Drawn at random from the others."""
    n_others: int
    """Number of heads that are not candidates, the sampled ones included."""
    rounds: tuple[Round, ...] = ()
    """How the candidates were found."""

    @property
    def heads(self) -> Group:
        """All heads that are scored on all prompts."""
        return (*self.candidates, *self.sampled)


@dataclass(frozen=True, slots=True)
class Missed:
    """How many of the best heads may have been missed."""

    top: int
    """Best means: above the score of the candidate of this rank."""
    n_others: int
    """Heads that are not candidates."""
    n_sampled: int
    """Of them, scored on all prompts."""
    n_found: int
    """Of these, among the best; they are in the ranking."""
    at_most: int
    """Upper bound on the number of others that are among the best, the found ones included."""
    confidence: float = CONFIDENCE
    """Level of the bound."""

    def __str__(self) -> str:
        if not self.n_others:
            return "every head was scored on all prompts"
        if not self.n_sampled:
            return f"none of the {self.n_others} other heads was sampled: nothing bounds how many are among the best"
        sample = f"{self.n_found} of {self.n_sampled} sampled heads score above the candidate of rank {self.top}"
        bound = f"of all {self.n_others} others at most {self.at_most} do ({self.confidence:.0%} confidence)"
        return f"{sample}: {bound}. That bounds how many, not which: an exact top needs another sample"


def propose(
    scorer_on: ScorerOn, heads: Sequence[Head], order: Sequence[int], extent: Extent, group: Group = ()
) -> Proposal:
    """The best heads beside the ``group``, by rounds on few prompts, and a random sample of the others.

    ``order`` numbers all prompts, those that the first rounds see first. Where no rounds are due all heads are
    candidates.
    """
    left, totals, rounds, start = tuple(head for head in heads if head not in group), torch.zeros(()), [], 0
    everyone, due = set(left), extent.rounds(len(left), len(order))
    for n_heads, n_added in due:
        left, prompts = left[:n_heads], tuple(sorted(order[start : start + n_added]))
        rounds.append(Round(left, prompts))
        totals = totals + n_added * score_heads(scorer_on(prompts), group, sorted(left), heads).values
        left, start = HeadScores(totals).top(len(left)), start + n_added
    candidates = left[: extent.n_candidates] if rounds else left
    others = sorted(everyone.difference(candidates))
    drawn = random.Random(extent.seed).sample(others, min(extent.n_sampled, len(others)))
    return Proposal(candidates, tuple(sorted(drawn)), len(others), tuple(rounds))


def missed(table: HeadScores, proposal: Proposal, top: int) -> Missed:
    """What the sample tells about the heads that were not scored."""
    exact = sorted((table[head] for head in proposal.candidates), reverse=True)
    rank = min(top, len(exact))
    n_found = sum(table[head] > exact[rank - 1] for head in proposal.sampled)
    at_most = most_in_population(proposal.n_others, len(proposal.sampled), n_found)
    return Missed(rank, proposal.n_others, len(proposal.sampled), n_found, at_most)


def screened_sahara(
    scorer: GroupScorer,
    scorer_on: ScorerOn,
    heads: Sequence[Head],
    order: Sequence[int],
    steps: int,
    extent: Extent,
) -> tuple[SearchTrace, tuple[Proposal, ...], tuple[Missed, ...]]:
    """Algorithm 1 with a screening before each step, or the first.

    ``scorer_on`` finds candidates by prompts in this ``order``; ``scorer`` scores them on all prompts. Of each step,
    the proposal and how many heads may beat the best candidate.
    """
    proposals: list[Proposal] = []

    def narrow(group: Group) -> Group:
        if proposals and extent.once:
            left = tuple(head for head in proposals[0].candidates if head not in group)
            proposals.append(proposals[0]._replace(candidates=left, sampled=(), rounds=()))
        else:
            proposals.append(propose(scorer_on, heads, order, extent, group))
        return proposals[-1].heads

    trace = sahara(scorer, heads, steps, narrow)
    bounds = tuple(missed(step, proposal, 1) for step, proposal in zip(trace.steps, proposals, strict=True))
    return trace, tuple(proposals), bounds


def costs_of(engine: Engine, sequences: Sequence[TokenSequence], proposal: Proposal) -> dict[str, float]:
    """Costs of one screened ranking, as cumulative shares of an exact scan's floating-point operations."""
    costs, rows = engine.costs, row_sizes(sequences, engine.plan(sequences))
    unablated = costs.forward_flops(rows)
    running, shares = 0.0, {}
    for heads, prompts in proposal.rounds:
        asked = [sequences[number] for number in prompts]
        of_round = row_sizes(asked, engine.plan(asked))
        running += costs.forward_flops(of_round) + costs.scan_flops(of_round, heads)
    parts = {"screening": 0.0, "with_candidates": unablated + costs.scan_flops(rows, proposal.candidates)}
    for name, flops in (parts | {"with_sample": costs.scan_flops(rows, proposal.sampled)}).items():
        running += flops
        shares[name] = running / (unablated + costs.scan_flops(rows, engine.heads))
    return shares

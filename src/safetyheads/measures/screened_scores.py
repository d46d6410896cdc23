"""Scores exactly the heads that a screening proposes, and bounds how many better heads were missed.

The best forecasts are scored exactly, and so is a random sample of the other heads. How many of the sample belong among
the best bounds how many of all the others do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads.errors import InputError
from safetyheads.heads import Group, Head, all_heads
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.sahara import sahara, score_heads
from safetyheads.measures.screening import POINTS, Forecast, Screening, screen
from safetyheads.measures.ships import OnGroups, Score, answer_sequences, scorer_of
from safetyheads.model.planning import row_sizes
from safetyheads.scores import GroupScorer, HeadScores, SearchTrace
from safetyheads.stats.intervals import CONFIDENCE, most_in_population

if TYPE_CHECKING:
    from safetyheads.ablation import Ablation
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet


@dataclass(frozen=True, slots=True)
class Extent:
    """How many heads a screening scores exactly."""

    n_candidates: int = 32
    """Heads with the best forecasts."""
    n_sampled: int = 64
    """Heads drawn at random from the others."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        if self.n_candidates < 1 or self.n_sampled < 0:
            raise InputError(
                f"a screening scores at least one candidate and samples 0 heads or more; got {self.n_candidates} and "
                f"{self.n_sampled}"
            )


@dataclass(frozen=True, slots=True)
class Proposal:
    """The heads that are scored exactly."""

    candidates: Group
    """Best forecasts, best first."""
    sampled: Group
    """Drawn at random from the others."""
    n_others: int
    """Number of heads that are not candidates, the sampled ones included."""

    @property
    def heads(self) -> Group:
        """All heads that are scored."""
        return (*self.candidates, *self.sampled)


@dataclass(frozen=True, slots=True)
class Missed:
    """How many of the best heads may have been missed."""

    top: int
    """Best means: above the score of the candidate of this rank."""
    n_others: int
    """Heads that are not candidates."""
    n_sampled: int
    """Of them, scored exactly."""
    n_found: int
    """Of these, among the best; they are in the ranking."""
    at_most: int
    """Upper bound on the number of others that are among the best, the found ones included."""
    confidence: float = CONFIDENCE
    """Level of the bound."""

    def __str__(self) -> str:
        if not self.n_others:
            return "every head was scored exactly"
        sample = f"{self.n_found} of {self.n_sampled} sampled heads score above the candidate of rank {self.top}"
        return f"{sample}: of all {self.n_others} others at most {self.at_most} do ({self.confidence:.0%} confidence)"


@dataclass(frozen=True, slots=True)
class Rescored:
    """Exact scores of the proposed heads, and a bound on the others."""

    scores: HeadScores
    """[n_layers, n_heads]; NaN where a head was not scored exactly."""
    proposal: Proposal
    missed: Missed


@dataclass(frozen=True, slots=True)
class ScreenedTrace:
    """A search that scored only what a screening proposed in each step."""

    trace: SearchTrace
    proposals: tuple[Proposal, ...]
    """One a step."""
    missed: tuple[Missed, ...]
    """One a step: heads that may score above the best candidate."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Exact scores of two heads, together and alone."""

    heads: tuple[Head, Head]
    together: float
    alone: tuple[float, float]

    @property
    def synergy(self) -> float:
        """What the two do beyond the sum of what each does alone."""
        return self.together - sum(self.alone)


@dataclass(frozen=True, slots=True)
class Costs:
    """Cumulative shares of an exact scan's floating-point operations."""

    screening: float
    with_candidates: float
    with_sample: float

    def __str__(self) -> str:
        parts = (f"screening {self.screening:.1%}", f"with candidates {self.with_candidates:.1%}")
        return f"{', '.join(parts)}, with the sample {self.with_sample:.1%} of an exact scan's operations"


def propose(screening: Screening, name: Forecast = "mean_ships", extent: Extent | None = None) -> Proposal:
    """The heads with the best forecasts, and a random sample of the others."""
    extent = extent or Extent()
    ranked = [head for head, _ in screening.table(name).ranked()]
    candidates, others = tuple(ranked[: extent.n_candidates]), sorted(ranked[extent.n_candidates :])
    drawn = random.Random(extent.seed).sample(others, min(extent.n_sampled, len(others)))
    return Proposal(candidates, tuple(sorted(drawn)), len(others))


def rescore(
    scorer: GroupScorer,
    screening: Screening,
    name: Forecast = "mean_ships",
    extent: Extent | None = None,
    top: int = 10,
) -> Rescored:
    """Exact scores of what a screening of the same prompts and ablation proposes; ``top`` as in :class:`Missed`."""
    proposal = propose(screening, name, extent)
    table = score_heads(scorer, screening.common, proposal.heads, all_heads(*screening.ships.shape[1:]))
    return Rescored(table, proposal, missed(table, proposal, top))


def screened_ships(
    engine: Engine,
    prompts: PromptSet,
    ablation: Ablation,
    extent: Extent | None = None,
    top: int = 10,
    positions: int = 1,
) -> Rescored:
    """Mean Ships (Eq 9), in nats, of the heads that a screening of the same prompts proposes.

    Args:
        engine: the model.
        prompts: harmful queries under their template.
        ablation: of one head at a time.
        extent: how many heads are scored exactly; 32 candidates and 64 sampled others by default.
        top: number of best heads that the bound on missed ones is about.
        positions: as for :func:`safetyheads.ships`.
    """
    sequences = answer_sequences(engine, prompts, positions)
    scorer = scorer_of(HeadPass(engine, sequences, ablation, Readouts(ships=True)), "mean_ships")
    return rescore(scorer, screen(engine, sequences, ablation), extent=extent, top=top)


def missed(table: HeadScores, proposal: Proposal, top: int) -> Missed:
    """What the sample tells about the heads that were not scored."""
    exact = sorted((table[head] for head in proposal.candidates), reverse=True)
    rank = min(top, len(exact))
    n_found = sum(table[head] > exact[rank - 1] for head in proposal.sampled)
    n_sampled = len(proposal.sampled)
    at_most = most_in_population(proposal.n_others, n_sampled, n_found)
    return Missed(rank, proposal.n_others, n_sampled, n_found, at_most)


def screened_sahara(
    measuring: HeadPass, score: Score | str, steps: int, extent: Extent | None = None, on_groups: OnGroups = None
) -> ScreenedTrace:
    """Algorithm 1 with a screening before each step, taken with the group so far ablated.

    The forecast of ``score`` proposes heads; ``measuring`` scores them and must read the score.
    """
    score = Score(score) if isinstance(score, str) else score
    openers = measuring.readouts.openers if score.forecast == "refusal_score" else ()
    proposals: list[Proposal] = []

    def narrow(group: Group) -> Group:
        screening = screen(measuring.engine, measuring.sequences, measuring.ablation, openers, group)
        proposals.append(propose(screening, score.forecast, extent))
        return proposals[-1].heads

    trace = sahara(scorer_of(measuring, score, on_groups), measuring.engine.heads, steps, narrow)
    bounds = tuple(missed(step, proposal, 1) for step, proposal in zip(trace.steps, proposals, strict=True))
    return ScreenedTrace(trace, tuple(proposals), bounds)


def rescore_pairs(scorer: GroupScorer, pairs: Sequence[tuple[Head, Head]]) -> tuple[Pair, ...]:
    """Exact synergy of proposed pairs (:meth:`Screening.pairs`), largest first by size."""
    singles = sorted({head for pair in pairs for head in pair})
    scores = scorer([*[(head,) for head in singles], *pairs]).tolist()
    alone = dict(zip(singles, scores, strict=False))
    scored = [
        Pair((first, second), together, (alone[first], alone[second]))
        for (first, second), together in zip(pairs, scores[len(singles) :], strict=True)
    ]
    return tuple(sorted(scored, key=lambda pair: -abs(pair.synergy)))


def costs_of(measuring: HeadPass, proposal: Proposal, forecast: Forecast = "mean_ships") -> Costs:
    """The costs of one screened ranking, against scoring every head."""
    engine, sequences = measuring.engine, measuring.sequences
    # The openers' log-odds cost a backward pass at each point.
    n_columns = [point.n_columns + (forecast == "refusal_score") for point in POINTS]
    rows = row_sizes(sequences, measuring.plan)
    # Both ways of scoring need the unablated run first.
    exact = engine.costs.scan_flops(rows, engine.heads) + engine.costs.forward_flops(rows)
    running, shares = engine.costs.screening_flops(sequences, n_columns), []
    for heads in ((), proposal.candidates, proposal.sampled):
        running += engine.costs.scan_flops(rows, heads)
        shares.append(running / exact)
    return Costs(*shares)

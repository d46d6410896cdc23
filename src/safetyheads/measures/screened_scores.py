"""Scores exactly the heads that a screening proposes, and bounds how many better heads were missed.

The best forecasts are scored exactly, and so is a random sample of the other heads. How many of the sample belong among
the best bounds how many of all the others do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from safetyheads.errors import InputError
from safetyheads.heads import Group, Head, all_heads
from safetyheads.measures.head_pass import Forecast, HeadPass, Readouts, Score
from safetyheads.measures.sahara import sahara, score_heads
from safetyheads.measures.screening import POINTS, Screening, screen
from safetyheads.measures.ships import OnGroups, answer_sequences, scorer_of
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


def propose(screening: Screening, forecast: Forecast, extent: Extent) -> Proposal:
    """The heads with the best forecasts, and a random sample of the others."""
    ranked = screening.table(forecast).top(screening.ships[0].numel())
    candidates, others = ranked[: extent.n_candidates], sorted(ranked[extent.n_candidates :])
    drawn = random.Random(extent.seed).sample(others, min(extent.n_sampled, len(others)))
    return Proposal(candidates, tuple(sorted(drawn)), len(others))


def screened_ships(
    engine: Engine,
    prompts: PromptSet,
    ablation: Ablation,
    extent: Extent | None = None,
    top: int = 10,
    positions: int = 1,
) -> Rescored:
    """Mean Ships (Eq 9), in nats, of the heads that a screening of the same prompts proposes.

    The bound on missed heads is about the ``top`` best ones; ``positions`` is as for :func:`safetyheads.ships`.
    """
    sequences = answer_sequences(engine, prompts, positions)
    scorer = scorer_of(HeadPass(engine, sequences, ablation, Readouts(ships=True)), "mean_ships")
    proposal = propose(screen(engine, sequences, ablation), "mean_ships", extent or Extent())
    table = score_heads(scorer, (), proposal.heads, all_heads(engine.n_layers, engine.n_heads))
    return Rescored(table, proposal, missed(table, proposal, top))


def missed(table: HeadScores, proposal: Proposal, top: int) -> Missed:
    """What the sample tells about the heads that were not scored."""
    exact = sorted((table[head] for head in proposal.candidates), reverse=True)
    rank = min(top, len(exact))
    n_found = sum(table[head] > exact[rank - 1] for head in proposal.sampled)
    at_most = most_in_population(proposal.n_others, len(proposal.sampled), n_found)
    return Missed(rank, proposal.n_others, len(proposal.sampled), n_found, at_most)


def screened_sahara(
    measuring: HeadPass,
    score: Score,
    steps: int,
    extent: Extent,
    on_groups: OnGroups = None,
    screens: Callable[..., Screening] | None = None,
) -> tuple[SearchTrace, tuple[Proposal, ...], tuple[Missed, ...]]:
    """Algorithm 1 with a screening before each step, taken with the group so far ablated.

    The forecast of ``score`` proposes heads; ``measuring`` scores them and must read the score. Proposals and the heads
    that may beat the best candidate are given for each step.
    """
    openers = measuring.readouts.openers if score.forecast == "refusal_score" else ()
    proposals: list[Proposal] = []

    def narrow(group: Group) -> Group:
        screening = (screens or partial(screen, measuring.engine))(
            measuring.sequences, measuring.ablation, openers, group
        )
        proposals.append(propose(screening, score.forecast, extent))
        return proposals[-1].heads

    trace = sahara(scorer_of(measuring, score, on_groups), measuring.engine.heads, steps, narrow)
    bounds = tuple(missed(step, proposal, 1) for step, proposal in zip(trace.steps, proposals, strict=True))
    return trace, tuple(proposals), bounds


def rescore_pairs(scorer: GroupScorer, pairs: Sequence[tuple[Head, Head]]) -> list[dict[str, Any]]:
    """Exact scores of proposed pairs (:meth:`Screening.pairs`), together and alone, as records.

    ``synergy`` is what two heads do beyond the sum of what each does alone; the largest by size is first.
    """
    singles = sorted({head for pair in pairs for head in pair})
    scores = scorer([*[(head,) for head in singles], *pairs]).tolist()
    alone_of = dict(zip(singles, scores, strict=False))
    records = []
    for pair, together in zip(pairs, scores[len(singles) :], strict=True):
        alone = [alone_of[head] for head in pair]
        heads = [str(head) for head in pair]
        records.append({"heads": heads, "together": together, "alone": alone, "synergy": together - sum(alone)})
    return sorted(records, key=lambda record: -abs(record["synergy"]))


def costs_of(measuring: HeadPass, proposal: Proposal, forecast: Forecast = "mean_ships") -> dict[str, float]:
    """Costs of one screened ranking, as cumulative shares of an exact scan's floating-point operations."""
    engine, sequences = measuring.engine, measuring.sequences
    # The openers' log-odds cost a backward pass at each point.
    n_columns = [point.n_tokens + point.n_samples + (forecast == "refusal_score") for point in POINTS]
    rows = row_sizes(sequences, measuring.plan)
    # Both ways of scoring need the unablated run first.
    exact = engine.costs.scan_flops(rows, engine.heads) + engine.costs.forward_flops(rows)
    running, shares = engine.costs.screening_flops(sequences, n_columns), {}
    parts: dict[str, Group] = {"screening": (), "with_candidates": proposal.candidates, "with_sample": proposal.sampled}
    for name, heads in parts.items():
        running += engine.costs.scan_flops(rows, heads)
        shares[name] = running / exact
    return shares

"""Ranks heads and runs the greedy search of Algorithm 1 with any scorer."""

from collections.abc import Callable, Sequence
from numbers import Integral

import torch

from safetyheads.errors import OVERFLOWS, InputError, SafetyheadsError
from safetyheads.heads import AnyHeads, Group, Head, parse_heads
from safetyheads.scores import GroupScorer, HeadScores, SearchTrace, table_of


def rank_heads(scorer: GroupScorer, heads: AnyHeads) -> HeadScores:
    """The score of each of ``heads`` (usually ``engine.heads``) when ablated alone, by any scorer of groups."""
    heads = parse_heads(heads)
    if not heads:
        raise InputError("no heads to rank")
    return score_heads(scorer, (), heads, heads)


def sahara(
    scorer: GroupScorer,
    heads: AnyHeads,
    steps: int = 3,
    narrow: Callable[[Group], Sequence[Head]] | None = None,
) -> SearchTrace:
    """Algorithm 1 (Sahara): from the empty group, add the best head given those chosen, ``steps`` times.

    Equal scores are settled by layer, then index, so the order of ``heads`` does not matter; the trace holds ties.

    ``heads`` are the candidates, usually ``engine.heads``; the paper takes 3 steps. ``narrow`` says which are worth
    scoring beside the group so far; the others are NaN in the step's table.

    Raises:
        InputError: more steps than heads, or fewer than one.
    """
    heads = parse_heads(heads)
    if not isinstance(steps, Integral) or not 1 <= steps <= len(heads):
        raise InputError(f"size {steps!r} is out of range: a group has 1 to {len(heads)} heads here")
    group: Group = ()
    tables: list[HeadScores] = []
    for _ in range(steps):
        tried = heads if narrow is None else set(narrow(group))
        table = score_heads(scorer, group, [head for head in heads if head in tried and head not in group], heads)
        tables.append(table)
        group = (*group, table.top(1)[0])
    return SearchTrace(group, tuple(tables))


def n_scored(n_heads: int, steps: int) -> int:
    """Groups that :func:`sahara` scores: every head not yet chosen, in each step."""
    return sum(n_heads - step for step in range(steps))


def score_heads(scorer: GroupScorer, group: Group, candidates: Sequence[Head], heads: Sequence[Head]) -> HeadScores:
    """Score the group plus each candidate: a table over all ``heads``, NaN where a head is not a candidate."""
    if not callable(scorer):
        raise InputError(f"a scorer is what mean_ships(...) or scorer_named(...) returns; got {scorer!r}")
    scores = torch.as_tensor(scorer([(*group, head) for head in candidates]), dtype=torch.float64)
    if not bool(torch.isfinite(scores).all()):
        raise SafetyheadsError(OVERFLOWS.format("a score"))
    by_head = dict(zip(candidates, scores.tolist(), strict=True))
    values = torch.tensor([by_head.get(head, float("nan")) for head in heads], dtype=torch.float64)
    return table_of(heads, values, scorer)

"""Rankings and the greedy search of Algorithm 1. Owns the search; any scorer will do, a table too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.heads import Group, Head, distinct
from safetyheads.scores import GroupScorer, HeadScores, SearchTrace, table_of


def rank_heads(scorer: GroupScorer, heads: Sequence[Head]) -> HeadScores:
    """Every head's score when ablated alone.

    Args:
        scorer: gives each group a number, more meaning more effect.
        heads: the candidates, usually ``engine.heads``.
    """
    heads = distinct(heads)
    if not heads:
        raise InputError("no heads to rank")
    return score_heads(scorer, (), heads, heads)


def sahara(
    scorer: GroupScorer,
    heads: Sequence[Head],
    steps: int = 3,
    narrow: Callable[[Group], Sequence[Head]] | None = None,
) -> SearchTrace:
    """Algorithm 1 (Sahara): from the empty group, add the best head given those chosen, ``steps`` times.

    Equal scores are settled by layer, then index, so the order of ``heads`` does not matter; the trace tells ties.

    Args:
        scorer: gives each group a number, more meaning more effect.
        heads: the candidates, usually ``engine.heads``.
        steps: size of the group; the paper uses at most 5, and finds 3 best.
        narrow: given the group so far, which heads are worth scoring; by default all are. The others are NaN in the
            step's table.

    Raises:
        InputError: more steps than heads, or fewer than one.
    """
    heads = distinct(heads)
    if not 1 <= steps <= len(heads):
        raise InputError(f"size {steps} is out of range: a group has 1 to {len(heads)} heads here")
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
    """The group plus each candidate, as a table over all heads with NaN where there is no candidate."""
    scores = torch.as_tensor(scorer([(*group, head) for head in candidates]), dtype=torch.float64)
    if not bool(torch.isfinite(scores).all()):
        raise SafetyheadsError("a score is not finite: the ablated model's states overflow its dtype")
    by_head = dict(zip(candidates, scores.tolist(), strict=True))
    missing = float("nan")
    return table_of(heads, torch.tensor([by_head.get(head, missing) for head in heads], dtype=torch.float64), scorer)

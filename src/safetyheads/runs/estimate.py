"""Tells before a run how long it will take and how much memory: counts operations, times a few layers and tokens."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from safetyheads.ablation import SCALING_CONTRIBUTION
from safetyheads.answers.decoding import Decoding, Request, ShortContextWarning, answer, rows_that_fit
from safetyheads.model.planning import Plan, TokenSequence, row_sizes

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

# A pass is timed over a batch of the last so many layers.
_TIMED_LAYERS = 3
# Decoding is timed over this many tokens, and rows.
_TIMED_TOKENS = 4
_TIMED_ROWS = 64


def estimate(
    engine: Engine, encoded: Sequence[tuple[int, ...]], n_passes: int, n_answers: int, max_new_tokens: int
) -> str:
    """What lies ahead, as one line: passes over all heads, answers, about how long, and memory beside the weights.

    ``encoded`` are the token ids of the prompts over which every head is scored ``n_passes`` times.
    """
    parts, memory = [], 0
    if n_passes:
        sequences = [TokenSequence(token_ids) for token_ids in encoded]
        seconds, memory = estimate_pass(engine, sequences, engine.plan(sequences))
        heads = f"{len(engine.heads)} heads x {len(encoded)} prompts, {n_passes} pass{'es' * (n_passes > 1)}"
        parts.append(f"{heads}: about {duration(n_passes * seconds)}")
    if n_answers:
        seconds = _seconds_an_answer(engine, encoded, min(n_answers, _TIMED_ROWS), max_new_tokens)
        parts.append(
            f"{n_answers} answers: about {duration(n_answers * seconds)} if all run to {max_new_tokens} tokens"
        )
    if memory:
        size = f"{memory / 2**30:.1f} GiB" if memory >= 2**30 else f"{max(1.0, memory / 2**20):.0f} MiB"
        parts.append(f"{size} beside the weights")
    return "; ".join(parts)


def estimate_pass(engine: Engine, sequences: Sequence[TokenSequence], layout: Plan) -> tuple[float, int]:
    """Seconds of scoring every head once, and bytes beside the weights.

    A batch of the last layers is timed; the whole pass is taken to run at its rate of counted operations.
    """
    begins, with_heads = engine.n_layers - 1 - _TIMED_LAYERS, engine.architecture.with_heads
    start = next((layer for layer in with_heads if layer >= begins), with_heads[-1])
    timed = replace(layout, rows=layout.rows[:1])
    captures = engine.captured(sequences, (), SCALING_CONTRIBUTION, timed, start)
    groups = [(head,) for head in engine.heads if head.layer == start][: layout.groups_per_batch]
    seconds = []
    for _ in range(3):  # the first run on a shape sets things up
        started = time.monotonic()
        engine.replayed(captures, groups, SCALING_CONTRIBUTION, start)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        seconds.append(time.monotonic() - started)
    costs, rows = engine.costs, row_sizes(sequences, layout)
    rate = len(groups) * costs.replay_flops(row_sizes(sequences, timed), start) / min(seconds[1:])
    flops = costs.forward_flops(rows) + costs.scan_flops(rows, engine.heads)
    return flops / rate, engine.memory_estimate(sequences, layout)


def _seconds_an_answer(engine: Engine, encoded: Sequence[tuple[int, ...]], n_rows: int, max_new_tokens: int) -> float:
    """Seconds of an answer of full length, ``n_rows`` together or as many as fit."""
    n_rows = min(n_rows, rows_that_fit(engine, max(map(len, encoded)) + max_new_tokens))
    requests = [Request(encoded[number % len(encoded)]) for number in range(n_rows)]
    seconds = []
    for n_tokens in (1, 1 + min(_TIMED_TOKENS, max_new_tokens)):
        started = time.monotonic()
        with warnings.catch_warnings():
            # The run itself warns where the context is short; here the warning would be about these few tokens.
            warnings.simplefilter("ignore", ShortContextWarning)
            answer(engine, requests, Decoding(n_tokens))
        seconds.append(time.monotonic() - started)
    reading, steps = seconds[0], max(seconds[1] - seconds[0], 0.0) / min(_TIMED_TOKENS, max_new_tokens)
    return (reading + steps * max_new_tokens) / n_rows


def duration(seconds: float) -> str:
    """``3 s``, ``12 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What is told before a run: operations and memory as the plan counts them, time from a few timed layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_models import engine_of, prompts_of

from safetyheads.model.architecture import Capabilities
from safetyheads.model.planning import TokenSequence, row_sizes
from safetyheads.runs.run import estimate, estimate_pass

PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 41, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9))


@pytest.mark.parametrize("replays", [True, False])
def test_a_pass_is_told_at_the_rate_of_the_timed_batch(monkeypatch, replays):
    engine = engine_of("llama_gqa", capabilities=Capabilities(replays=replays))
    sequences = [TokenSequence(ids) for ids in PROMPTS]
    layout = engine.plan(sequences)
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 23.0])  # the first run is set-up, the quicker of the others counts
    monkeypatch.setattr("safetyheads.runs.run.time.monotonic", lambda: next(ticks))
    seconds, memory = estimate_pass(engine, sequences, layout)
    timed = row_sizes(sequences, replace(layout, rows=layout.rows[:1]))
    rate = layout.groups_per_batch * engine.costs.replay_flops(timed, 0) / 2.0
    rows = row_sizes(sequences, layout)
    flops = engine.costs.forward_flops(rows) + engine.costs.scan_flops(rows, engine.heads)
    assert seconds == pytest.approx(flops / rate)
    assert memory == engine.memory_estimate(sequences, layout)


def test_the_line_says_passes_and_memory():
    engine = engine_of("llama_gqa")
    line = estimate(engine, engine.ask(prompts_of(*PROMPTS)).token_ids, 2, 0, 1)
    assert line.startswith("12 heads x 3 prompts, 2 passes: about ")
    assert "MiB beside the weights" in line

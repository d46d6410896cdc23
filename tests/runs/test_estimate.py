"""What a run says of the work ahead: the rate of a timed batch, all that is asked for, stages, what is left."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
from tiny_models import engine_of, prompts_of

from safetyheads.model.architecture import Capabilities
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import row_sizes
from safetyheads.runs.audit import run_audit
from safetyheads.runs.config import AsrConfig, AuditConfig, Progress, SaharaConfig, ScanConfig, ShipsConfig
from safetyheads.runs.estimate import Estimate, Work, estimate, estimate_pass
from safetyheads.runs.exhaustive_scan import run_scan
from safetyheads.runs.single_steps import run_asr, run_sahara, run_ships
from safetyheads.stats.power import smallest_change_with_power

MODEL = "demo:aligned_a"
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 40, 41, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9))
SMALL = {"limit": 4, "max_new_tokens": 8}
RUNS = {
    "audit": (run_audit, AuditConfig(MODEL, "demo", "demo", size=2, n_random=1, anyway=True, **SMALL)),
    "scan": (run_scan, ScanConfig(MODEL, "demo", "demo", prefixes=2, n_random=1, query_level=1, pairs=2, **SMALL)),
    "ships": (run_ships, ShipsConfig(MODEL, "demo", limit=4)),
    "sahara": (run_sahara, SaharaConfig(MODEL, "demo", limit=4, size=2)),
    "asr": (run_asr, AsrConfig(MODEL, "demo", groups=("1-3",), query_level=1, **SMALL)),
}


class Watching(Progress):
    """Keeps what is said and tracked."""

    def __init__(self):
        self.said, self.stages, self.tracked = [], (), []

    def say(self, line):
        self.said.append(line if isinstance(line, str) else line())

    def expect(self, stages):
        self.stages = stages

    @contextmanager
    def track(self, name, total):
        if self.stages:
            self.tracked.append(name.rpartition(": ")[2])
        yield lambda _: None


@pytest.mark.parametrize("replays", [True, False])
def test_a_pass_is_told_at_the_rate_of_the_timed_batch(monkeypatch, replays):
    engine = engine_of("llama_gqa", capabilities=Capabilities(replays=replays))
    sequences = [TokenSequence(ids) for ids in PROMPTS]
    layout = engine.plan(sequences)
    # The first run is set-up, the quicker of the others counts.
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0, 23.0, *range(99)])
    monkeypatch.setattr("safetyheads.runs.estimate.time.monotonic", lambda: next(ticks))
    seconds, memory = estimate_pass(engine, sequences, layout)
    timed = row_sizes(sequences, replace(layout, rows=layout.rows[:1]))
    rate = layout.groups_per_batch * engine.costs.replay_flops(timed, 0) / 2.0
    rows = row_sizes(sequences, layout)
    flops = engine.costs.forward_flops(rows) + engine.costs.scan_flops(rows, engine.heads)
    assert seconds == pytest.approx(flops / rate)
    assert memory == engine.memory_estimate(sequences, layout)
    line = str(estimate(engine, Work(engine.ask(prompts_of(*PROMPTS)).token_ids, passes=2)))
    assert line.startswith("12 heads x 3 prompts, 2 passes: about ")
    assert "MiB beside the weights" in line


@pytest.mark.parametrize("kind", RUNS)
def test_each_stage_is_announced_and_a_second_start_says_what_is_stored(engine, tmp_path, kind):
    run, config = RUNS[kind]
    watching, again = Watching(), Watching()
    run(engine, config, tmp_path / "run", progress=watching)
    assert set(watching.tracked) - {"screening"} == set(watching.stages)
    assert not any("stored parts" in line for line in watching.said)
    measured = [line for line in watching.said if "tokens on average" in line]
    assert len(measured) == (kind in ("audit", "scan", "asr"))
    run(engine, config, tmp_path / "run", progress=again)
    (line,) = [line for line in again.said if "stored parts" in line]
    assert int(line.split(": ")[1].split()[0]) > 1


@pytest.mark.parametrize("kind", RUNS)
def test_a_dry_run_writes_nothing_and_says_what_can_show(engine, tmp_path, kind):
    run, config = RUNS[kind]
    found = run(engine, config, tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()
    assert (found["dry_run"], found["kind"]) == (True, kind)
    assert found["seconds"]["at_most"] == pytest.approx(found["seconds"]["passes"] + found["seconds"]["answers"])
    assert found["memory_bytes"] > 0
    assert found["answers"] >= 4
    measures = kind in ("audit", "scan", "asr")
    least = smallest_change_with_power(4, tests=32 if kind == "scan" else 1) if measures else None
    assert found["smallest_change"] == least
    assert len(found["lines"]) == 1 + measures


def test_answers_count_their_tokens_and_passes_their_share():
    work = Work(((1, 2),), passes=2.5, answers=10, max_new_tokens=100, prompts=prompts_of(*PROMPTS))
    timed = Estimate(work, 32, pass_seconds=4.0, prompt_seconds=1.0, token_seconds=0.5, memory=3 * 2**30)
    assert timed.answer_seconds(20) == 10 * (1 + 20 * 0.5)
    assert timed.as_json()["seconds"] == {"passes": 10.0, "answers": 510.0, "at_most": 520.0}
    assert timed.power.startswith("3 prompts show no change at all for one group")

"""How a run scales over workers: ``python bench/scale.py PART...``, one JSON line each.

    workers     one worker of one thread and two under Ray on a random 58M model: ratio, overhead a unit, memory
    plan        10,000 units planned and told of: seconds
    cluster     a scan of a 7B shape on 1 to 64 workers or shards: units replaced by counted seconds, in simulated time

Seconds by the clock mean little on a machine that does other work: seconds of the processor stand beside them.
"""

import argparse
import heapq
import json
import os
import shutil
import sys
import tempfile
import time
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from growth import Elapsed
from roofline import peak_of
from shapes import SHAPES, Shape, build, prompts

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.integrations.ray_workers import ClaimingShard, Claims, carry_out_by_workers, spread
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.model.engine import Engine
from safetyheads.model.loading import use_our_attention
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import Plan, fit_plan, row_sizes
from safetyheads.runs.config import AsrConfig, Progress
from safetyheads.runs.directory import RunDirectory, stage_of, status_of
from safetyheads.runs.kept_answers import groups_together, prompts_together
from safetyheads.runs.run import _KeptPass
from safetyheads.runs.shards import Shard, Units, owners

N_UNITS = 10_000
RATE = 125e12
"""Operations a second of a GPU, stated: 40 % of an A100's peak in bfloat16."""
_POLL = 0.5
_N_NEW = 128


# Workers


def measure(
    engine: Engine, config: AsrConfig, out: Path, data: Any, *_: Any, shard: Shard | None = None
) -> dict[str, Any]:
    """Ships of every head, in a run directory; ``data`` are the sequences and the plan."""
    sequences, plan = data
    started = time.process_time()
    with RunDirectory.start(out, {"a": 1}, {}, shard=shard) as run:
        keep = _KeptPass(run, "scores", {})
        head_pass = HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True), plan, keep)
        head_pass.measure([(head,) for head in engine.heads])
    used = {"cpu_seconds": time.process_time() - started, "peak": peak_of_pass(engine, sequences, plan)}
    (out / f"used-{os.getpid()}.json").write_text(json.dumps(used))
    return {"n": len(engine.heads)}


def peak_of_pass(engine: Engine, sequences: Sequence[TokenSequence], plan: Plan) -> int:
    """Most bytes allocated at once, by the heads of the first layer: no later batch runs through more layers.

    What is resident says more of the allocator, which keeps what earlier batches freed.
    """
    heads = [(head,) for head in engine.heads if head.layer == 0]

    def run() -> None:
        HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True), plan).measure(heads)

    return peak_of(run, "cpu")


def load(config: AsrConfig, progress: Progress) -> Engine:
    """A random model of the shape that the config names."""
    import torch

    torch.set_num_threads(1)
    model = build(SHAPES[config.model], "sdpa")
    use_our_attention(model)
    return Engine(model, tokenizer=None, name=config.model)  # type: ignore[arg-type]


def by_workers(name: str, n_prompts: int, rows: int) -> Iterator[dict[str, Any]]:
    """Seconds of one worker and of two, with Ray's own time left out: from the first unit to the last."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config, engine = AsrConfig(name, "none", memory=4.0), load(AsrConfig(name, "none"), Progress())
    sequences = [TokenSequence(tuple(token_ids)) for token_ids in prompts(SHAPES[name], n_prompts)]
    plan = Plan(engine.plan(sequences).rows, rows, rows)
    told = engine.memory_estimate(sequences, plan)
    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    seconds, cpu_seconds = {}, {}
    for n_workers in (1, 2):
        out = folder / f"{n_workers}"
        carry_out_by_workers(measure, config, out, (sequences, plan), Progress(), (), "local", n_workers, load=load)
        units, gaps, makespan = read_log(out)
        seconds[n_workers] = makespan
        overhead = sum(gaps) / len(gaps) / (sum(units) / len(units))
        used = [json.loads(path.read_text()) for path in out.glob("used-*")]
        peaks = [of["peak"] for of in used]
        cpu_seconds[n_workers] = sum(of["cpu_seconds"] for of in used)
        yield {
            "part": "workers", "workers": n_workers, "units": len(units), "seconds": makespan,
            "cpu_seconds": cpu_seconds[n_workers],
            "unit_seconds": sum(units) / len(units), "overhead_of_unit": overhead,
            "peak_bytes": peaks, "planned_bytes": told, "peak_over_plan": [peak / told for peak in peaks],
        }  # fmt: skip
    # What two would reach on two cores of their own, as far as they do not share memory's rate.
    by_processor = 2 * cpu_seconds[1] / cpu_seconds[2]
    yield {"part": "workers", "ratio": seconds[1] / seconds[2], "ratio_by_processor": by_processor}
    shutil.rmtree(folder)


def read_log(out: Path) -> tuple[list[float], list[float], float]:
    """Seconds of each unit, of each pause between two of one worker, and from the first begun to the last ended."""
    units, gaps, times = [], [], []
    for path in out.glob("starts/[!.]*.jsonl"):
        ended = None
        for noted in map(json.loads, path.read_text().splitlines()):
            times.append(noted["time"])
            if "seconds" in noted:
                units.append(noted["seconds"])
                ended = noted["time"]
            elif ended is not None:
                gaps.append(noted["time"] - ended)
    return units, gaps, max(times) - min(times)


# Planning and status


def planning() -> Iterator[dict[str, Any]]:
    """Ten thousand units, divided among 64 shards or claimed by workers, and told of."""
    units = {(f"completions/things-{number:024x}.jsonl",): 1.0 + number % 7 for number in range(N_UNITS)}
    with tempfile.TemporaryDirectory() as name:
        folder, claims = Path(name), Claims()
        used = {}
        for kind, shard in {
            "shards": Shard(1, 64),
            "claims": ClaimingShard(
                "me", folder, lambda *_: None, lambda call, *values: getattr(claims, call)(*values)
            ),
        }.items():
            with RunDirectory.start(folder / kind, {}, {}, shard=shard) as run:
                started = Elapsed()
                run.divide("things", units)
                used[kind] = started()
            started = Elapsed()
            status_of(folder / kind)
            used[f"status of {kind}"] = started()
        started = Elapsed()
        claims.news()
        used["look at claims"] = started()
    yield {"part": "plan", "units": N_UNITS, **used}


# A simulated cluster


def scan_units(shape: Shape, n_harmful: int, n_benign: int, changed: float) -> tuple[list[Units], dict[str, float]]:
    """Counted seconds of a scan's units, stage after stage, and what each worker needs once before a stage's units.

    ``changed`` is the share of answers that are decoded to their end; decoding runs at a tenth of the rate.
    """
    model = build(shape, "sdpa", "meta")
    use_our_attention(model)
    engine = Engine(model, tokenizer=None, name="counted", memory_budget=30 << 30)  # type: ignore[arg-type]
    costs = engine.costs
    unablated: dict[tuple[str, ...], float] = {}
    heads: dict[tuple[str, ...], float] = {}
    scores: dict[tuple[str, ...], float] = {}
    once = {}
    for name, n in (("harmful", n_harmful), ("benign", n_benign)):
        sequences = [TokenSequence(tuple(token_ids)) for token_ids in prompts(shape, n)]
        plan = fit_plan(sequences, costs, 16_384, 30 << 30)
        rows = row_sizes(sequences, plan)
        forward = costs.forward_flops(rows) / RATE
        longer = 1 + _N_NEW / (sum(len(sequence.token_ids) for sequence in sequences) / n)
        decoding = forward * (longer - 1) * 10
        for at, part in enumerate(prompts_together([len(sequence.token_ids) for sequence in sequences])):
            unablated[f"completions/vanilla-{name}-{at:024x}.jsonl",] = len(part) / n * (forward + decoding)
        once[f"scores-{name}"], once[f"heads-{name}"] = forward, 2 * forward * longer
        for at, chunk in enumerate(groups_together([(head,) for head in engine.heads], n)):
            # On average a head's layer is in the middle, and layers before it are not run again.
            cost = len(chunk) * (forward * longer / 2 + changed * decoding)
            heads[f"completions/heads-{name}-{at:024x}.jsonl",] = cost
        for at, (batch, start) in enumerate(engine.batches([(head,) for head in engine.heads], plan)):
            cost = len(batch) * costs.replay_flops(rows, start) / RATE
            scores[f"shards/scores-{name}/{at:024x}.safetensors",] = cost
    return [unablated, heads | scores], once


def _task_of(unit: str) -> int:
    """In a scan's order: heads of each set, then all scores."""
    stage = stage_of(unit)
    return 2 if stage.startswith("scores") else int(stage.endswith("benign"))


def simulated(
    stages: Sequence[Units], once: dict[str, float], sizes: Sequence[int], n_workers: int, overhead: float
) -> dict[str, float]:
    """Workers that claim units from the real claims, in simulated time, spread over sets of these sizes at first."""
    now, until = 0.0, list(accumulate(sizes))
    claims, firsts = Claims(lambda: now), [bisect(until, spread(number) * until[-1]) for number in range(n_workers)]
    busy, begun = 0.0, [set[str]() for _ in range(n_workers)]
    for units in stages:
        names = {places[0]: cost for places, cost in units.items()}
        claims.expect(dict.fromkeys(names, False))
        left, ready, last = dict(names), [(now, worker, "") for worker in range(n_workers)], now
        heapq.heapify(ready)
        while ready:
            now, worker, unit = heapq.heappop(ready)
            if unit:
                claims.done(unit)
                last = now
            first = firsts[worker]
            tasks = sorted(left, key=lambda name, first=first: (_task_of(name) - first) % 3) if first else left
            chosen = next((name for name in tasks if claims.claim(f"{worker}", name)[0]), None)
            if chosen is None:
                continue
            cost, stage = left.pop(chosen) + overhead, stage_of(chosen)
            cost += 0.0 if stage in begun[worker] else once.get(stage, 0.0)
            begun[worker].add(stage)
            busy += names[chosen]
            heapq.heappush(ready, (now + cost, worker, chosen))
        now = last + (_POLL if n_workers > 1 else 0.0)  # others see a file when they next look
    return told(stages, n_workers, now, busy)


def by_shards(stages: Sequence[Units], once: dict[str, float], n_shards: int, overhead: float) -> dict[str, float]:
    """Shards that wait for each other, each with the units of a stage that the real rule gives it."""
    seconds = busy = 0.0
    for units in stages:
        loads: Counter[int] = Counter()
        begun = set[tuple[int, str]]()
        for place, shard in owners(units, n_shards).items():
            stage, cost = stage_of(place), units[place,]
            loads[shard] += cost + overhead + (0.0 if (shard, stage) in begun else once.get(stage, 0.0))
            begun.add((shard, stage))
            busy += cost
        seconds += max(loads.values()) + (_POLL if n_shards > 1 else 0.0)
    return told(stages, n_shards, seconds, busy)


def told(stages: Sequence[Units], n_workers: int, seconds: float, busy: float) -> dict[str, float]:
    """Efficiency, and seconds over those of the fastest plan: all units on all workers, or a stage's longest unit."""
    bound = sum(max(sum(units.values()) / n_workers, max(units.values())) for units in stages)
    return {"seconds": seconds, "efficiency": busy / (n_workers * seconds), "over_bound": seconds / bound}


def cluster(overhead: float) -> Iterator[dict[str, Any]]:
    """A scan of a 7B shape, few answers changed or all."""
    for n_harmful, n_benign, changed in ((100, 100, 0.1), (520, 100, 0.1), (520, 520, 0.1), (520, 520, 1.0)):
        stages, once = scan_units(SHAPES["llama-2-7b"], n_harmful, n_benign, changed)
        for n_workers in (1, 8, 64):
            sizes = {"harmful": n_harmful, "benign": n_benign, "changed": changed, "units": sum(map(len, stages))}
            claimed = simulated(stages, once, (n_harmful, n_benign), n_workers, overhead)
            yield {"part": "cluster", **sizes, "workers": n_workers, **claimed}
            yield {"part": "cluster", **sizes, "shards": n_workers, **by_shards(stages, once, n_workers, overhead)}


def main() -> None:
    """Print a JSON line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["plan", "cluster"], help="workers, plan, cluster")
    parser.add_argument("--model", choices=SHAPES, default="58M")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2, help="head groups a batch: fewer make more units")
    parser.add_argument("--overhead", type=float, default=0.05, help="seconds of each unit that are not its own")
    arguments = parser.parse_args()
    parts = {
        "workers": lambda: by_workers(arguments.model, arguments.prompts, arguments.rows),
        "plan": planning,
        "cluster": lambda: cluster(arguments.overhead),
    }
    for part in arguments.parts:
        for line in parts[part]():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

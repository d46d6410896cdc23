"""How near the pass comes to the machine: ``python bench/roofline.py``.

In one process: the largest rate of a matrix product and of a copy on this machine, then the Generalized Ships pass over
all heads. Operations are the useful ones, counted from the plan; bytes are counted too: each batch reads
the weights of its layers once, and each product reads its input and writes its output once. Peak memory and time stand
beside what the planner told before. One JSON line.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from passes import Clock, Work
from scan import commit, machine
from shapes import SHAPES
from torch.profiler import ProfilerActivity, profile

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.measures.head_pass import HeadPass, Readouts, Score
from safetyheads.model.engine import Engine
from safetyheads.model.loading import use_our_attention
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import Plan, row_sizes
from safetyheads.runs.estimate import estimate_pass

_SQUARES = (1024, 2048, 4096)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="58M")
    parser.add_argument("--prompts", type=int, help="default: 32, and 100 for the 7B and 8B shapes")
    parser.add_argument("--prefix", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--append", type=Path, help="a file that the JSON line is added to")
    parser.add_argument("--reduced", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.prompts is None:
        options.prompts = 100 if SHAPES[options.size].is_big else 32
    return options


def engine_of(work: Work) -> tuple[Engine, list[TokenSequence]]:
    """The shape's engine, and its prompts."""
    model = work.model("sdpa")
    use_our_attention(model)
    return Engine(model, tokenizer=None, name="bench"), [TokenSequence(tuple(ids)) for ids in work.prompts]  # type: ignore[arg-type]


def largest_rate(work: Work, n_tokens: int, squares: Sequence[int], repeats: int) -> float:
    """Operations a second of the quickest product: squares, and the shape's own."""
    d_model, d_mlp = work.shape.d_model, work.shape.d_mlp
    sizes = [(n, n, n) for n in squares] + [(n_tokens, d_model, d_mlp), (n_tokens, d_mlp, d_model)]
    best = 0.0
    for rows, inner, columns in sizes:
        left = torch.randn(rows, inner, device=work.device, dtype=work.dtype)
        right = torch.randn(columns, inner, device=work.device, dtype=work.dtype)
        torch.nn.functional.linear(left, right)
        clock = Clock(work.device)
        for _ in range(2 * repeats):
            torch.nn.functional.linear(left, right)
            best = max(best, 2.0 * rows * inner * columns / clock.lap())
    return best


def copy_rate(work: Work, n: int, repeats: int) -> float:
    """Bytes a second, read and written, of a copy of ``n`` bytes."""
    source = torch.ones(n // 4, device=work.device)
    target = torch.empty_like(source)
    clock = Clock(work.device)
    return max(2.0 * n / (target.copy_(source), clock.lap())[1] for _ in range(2 * repeats))


def moved_bytes(engine: Engine, sequences: Sequence[TokenSequence], layout: Plan) -> float:
    """Bytes of the replays: weights once a batch and layer, inputs and outputs of products once each."""
    facts, size = engine.architecture, engine.dtype.itemsize
    weights = engine.costs.token / 2 * size
    a_token = (6 * facts.d_model + 3 * facts.d_mlp + 2 * facts.n_heads * facts.d_head) * size
    n_tokens = sum(row.n_tokens for row in row_sizes(sequences, layout))
    batches = engine.batches([(head,) for head in engine.heads], layout)
    moved = 0.0
    for indices, start in batches:
        moved += (engine.n_layers - start) * (len(layout.rows) * weights + len(indices) * n_tokens * a_token)
    return moved


def peak_of(run: Callable[[], object], device: str) -> int:
    """Most bytes allocated at once during ``run``, beyond those before it: CUDA's count, or torch's profiler's."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything of the JSON line that is measured or counted."""
    shape = SHAPES[options.size].reduced() if options.reduced else SHAPES[options.size]
    dtype = getattr(torch, options.dtype)
    work = Work(shape, options.prompts, options.prefix, options.device, dtype)
    engine, sequences = engine_of(work)
    layout = engine.plan(sequences)
    rows = row_sizes(sequences, layout)
    n_tokens = layout.groups_per_batch * max(row.n_tokens for row in rows)
    groups = [(head,) for head in engine.heads]
    told_seconds, told_bytes = estimate_pass(engine, sequences, layout)
    readouts = Readouts(angles=(Score("generalized_ships_prompt"),))

    def begun() -> HeadPass:
        return HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, readouts, layout)

    first = begun()
    first.measure(groups[: layout.groups_per_batch])
    times: dict[str, list[float]] = {"begin": [], "measure": []}
    rates, copies = [], []
    for _ in range(options.repeats):
        rates.append(largest_rate(work, n_tokens, (256,) if options.reduced else _SQUARES, 3))
        copies.append(copy_rate(work, 1 << (20 if options.reduced else 28), 3))
        clock = Clock(work.device)
        made = begun()
        times["begin"].append(clock.lap())
        made.measure(groups)
        times["measure"].append(clock.lap())
    peak = peak_of(lambda: begun().measure(groups[: engine.n_heads]), options.device)
    estimated = engine.memory_estimate(sequences, layout, reads_logits=False)
    seconds = statistics.median(times["measure"])
    whole = seconds + statistics.median(times["begin"])
    flops, moved = engine.costs.scan_flops(rows, engine.heads), moved_bytes(engine, sequences, layout)
    return {
        "plan": {"rows": len(layout.rows), "groups_per_batch": layout.groups_per_batch, "threads": layout.threads},
        "tokens_a_batch": n_tokens,
        "seconds": times,
        "useful_flops": flops,
        "begin_flops": engine.costs.forward_flops(rows),
        "flops_a_second": flops / seconds,
        "largest_product_flops_a_second": max(rates),
        "share_of_largest_product": flops / seconds / max(rates),
        "share_of_median_product": flops / seconds / statistics.median(rates),
        "moved_bytes": moved,
        "moved_bytes_a_second": moved / seconds,
        "copy_bytes_a_second": max(copies),
        "flops_a_byte": flops / moved,
        "peak_bytes": peak,
        # Without logits, as the pass that was measured.
        "estimated_bytes": estimated,
        "estimated_over_measured_bytes": estimated / peak,
        "estimated_bytes_with_logits": told_bytes,
        "estimated_seconds": told_seconds,
        "estimated_over_measured_seconds": told_seconds / whole,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON line."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    about = {name: getattr(options, name) for name in ("size", "prompts", "prefix", "threads", "device", "dtype")}
    accelerator = torch.cuda.get_device_name() if options.device == "cuda" else None
    line = {"bench": Path(__file__).stem, "commit": commit(), "machine": machine(accelerator), **about}
    text = json.dumps({**line, **measure(options)})
    print(text)
    if options.append is not None:
        with options.append.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())

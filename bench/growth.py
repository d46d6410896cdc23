"""How a pass grows: ``python bench/growth.py``.

Time and memory, measured and told before, against heads, prompts, prompt length and layers, the others held, on small
Llamas. The plan predicts the operations: linear in prompts and heads, L (L + 1) / 2 a head of each layer in layers. One
JSON line a sweep, with the slopes of log time, log operations and log bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from passes import Clock
from roofline import peak_of
from scan import commit, machine
from shapes import Shape, build

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.measures.head_pass import HeadPass, Readouts, Score
from safetyheads.model.engine import Engine
from safetyheads.model.loading import use_our_attention
from safetyheads.model.planning import TokenSequence, row_sizes

BASE = {"heads": 8, "prompts": 16, "length": 32, "layers": 6}
"""Where the others are held."""
SWEEPS = {
    "heads": (2, 4, 8, 16),
    "prompts": (8, 16, 32, 64),
    "length": (16, 32, 64, 128),
    "layers": (2, 4, 8, 12),
}
"""What is varied; a sweep of heads keeps the model and scores the first so many of each layer."""
_HEADS, _D_MODEL = 16, 256


def point(at: dict[str, int], device: str, repeats: int, scale: int) -> dict[str, float]:
    """One pass: counted operations, seconds, bytes at the peak, told and measured."""
    shape = Shape(_D_MODEL // scale, 688 // scale, at["layers"], _HEADS, _HEADS, 2000)
    model = build(shape, "sdpa", device)
    use_our_attention(model)
    engine = Engine(model, tokenizer=None, name="growth")  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    sequences = [
        TokenSequence((number, *torch.randint(9, 2000, (at["length"] - 1,), generator=generator).tolist()))
        for number in range(at["prompts"])
    ]
    layout = engine.plan(sequences)
    heads = [head for head in engine.heads if head.index < at["heads"]]
    layout = replace(layout, groups_per_batch=min(layout.groups_per_batch, at["heads"]))
    seconds = []

    def begun() -> HeadPass:
        return HeadPass(
            engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(angles=(Score("generalized_ships_prompt"),)), layout
        )

    for _ in range(repeats + 1):  # the first run on a shape sets things up
        measuring = begun()
        clock = Clock(device)
        measuring.measure([(head,) for head in heads])
        seconds.append(clock.lap())
    # The first layer's heads: no later batch runs through more layers or keeps more inputs.
    first = [(head,) for head in heads if head.layer == 0]
    return {
        "flops": engine.costs.scan_flops(row_sizes(sequences, layout), heads),
        "seconds": statistics.median(seconds[1:]),
        "peak_bytes": peak_of(lambda: begun().measure(first), device),
        "estimated_bytes": engine.memory_estimate(sequences, layout, reads_logits=False),
    }


def slope(at: Sequence[int], values: Sequence[float]) -> float:
    """Of log value over log size."""
    return float(np.polyfit(np.log(at), np.log(values), 1)[0])


def sweep(name: str, sizes: Sequence[int], device: str, repeats: int, scale: int) -> dict[str, Any]:
    """One JSON line."""
    points = [point({**BASE, name: size}, device, repeats, scale) for size in sizes]
    columns = {key: [found[key] for found in points] for key in points[0]}
    per_flop = [found["seconds"] / found["flops"] for found in points]
    return {
        "against": name,
        "sizes": list(sizes),
        "held": {key: value for key, value in BASE.items() if key != name},
        **columns,
        "slope_of_flops": slope(sizes, columns["flops"]),
        "slope_of_seconds": slope(sizes, columns["seconds"]),
        "slope_of_peak_bytes": slope(sizes, columns["peak_bytes"]),
        "slope_of_estimated_bytes": slope(sizes, columns["estimated_bytes"]),
        "largest_over_smallest_seconds_a_flop": max(per_flop) / min(per_flop),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON line a sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=SWEEPS)
    parser.add_argument("--scale", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    accelerator = torch.cuda.get_device_name() if options.device == "cuda" else None
    about = {"bench": Path(__file__).stem, "commit": commit(), "machine": machine(accelerator), "dtype": "float32"}
    for name, sizes in SWEEPS.items():
        if options.only in (None, name):
            found = sweep(name, sizes, options.device, options.repeats, options.scale)
            print(json.dumps({**about, "threads": options.threads, **found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())

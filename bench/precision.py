"""What half precision costs in scores: ``python bench/precision.py``.

The organism's checkpoints in a half dtype against float32: rank agreement over all heads, overlap of the top ten, the
largest difference, for mean Ships and both readings of Generalized Ships. One JSON line a checkpoint and ablation.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from scan import commit, machine
from scipy.stats import spearmanr

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation, Engine, demo
from safetyheads.demo import demo_prompts
from safetyheads.measures.head_pass import HeadPass, Readouts, Score
from safetyheads.model.packing import TokenSequence

CHECKPOINTS = ("aligned_a", "aligned_b", "aligned_single")
ANGLES = (Score("generalized_ships_prompt"), Score("generalized_ships_representation"))


def scores(engine: Engine, ablation: Ablation, n_prompts: int) -> dict[str, torch.Tensor]:
    """Name -> score of every head, float64."""
    prompts = demo_prompts("harmful", "test")[:n_prompts]
    sequences = [TokenSequence(ids) for ids in engine.ask(prompts).token_ids]
    measuring = HeadPass(engine, sequences, ablation, Readouts(ships=True, angles=ANGLES))
    found = measuring.measure([(head,) for head in engine.heads])
    return {"mean_ships": found["ships"].mean(dim=1), **{angle.label: found[angle.label] for angle in ANGLES}}


def compared(exact: torch.Tensor, half: torch.Tensor) -> dict[str, Any]:
    """How far half precision agrees."""
    tops = [set(values.argsort(descending=True)[:10].tolist()) for values in (exact, half)]
    return {
        "spearman": float(spearmanr(exact.numpy(), half.numpy()).statistic),
        "top_10_overlap": len(tops[0] & tops[1]),
        "same_first": int(exact.argmax()) == int(half.argmax()),
        "largest_difference": float((exact - half).abs().max()),
        "largest_score": float(exact.max()),
    }


def main() -> None:
    """Print one JSON line a checkpoint and ablation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    accelerator = torch.cuda.get_device_name() if options.device == "cuda" else None
    about = {"bench": Path(__file__).stem, "commit": commit(), "machine": machine(accelerator), "dtype": options.dtype}
    for name in CHECKPOINTS:
        path = str(demo.checkpoint_path(name))
        engines = [Engine.load(path, dtype=dtype, device=options.device) for dtype in ("float32", options.dtype)]
        for ablation in (UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION):
            exact, half = (scores(engine, ablation, options.prompts) for engine in engines)
            line = {key: compared(exact[key], half[key]) for key in exact}
            print(json.dumps({**about, "model": name, "ablation": ablation.name, "n": options.prompts, **line}))


if __name__ == "__main__":
    sys.exit(main())

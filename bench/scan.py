"""One Generalized Ships pass over all heads, four ways, in one command: ``python bench/scan.py --size 58M``.

(a) ``plain``: one head, one prompt, a full forward with logits at all positions, eager: what the paper's code does;
(b) ``hooks``: padded batches, one head at a time, sdpa, last token: what a good user writes with PyTorch hooks;
(c) ``transformerlens``: the same with TransformerLens, in its own environment (``bench/peers/README.md``);
(d) ``ours``: the package's pass, whole. The others are timed on a sample of heads and scaled, and say so.

Owns the command line, the interleaving of subprocesses and the JSON line; what a way runs is :mod:`passes`'s.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shapes import SHAPES

HERE = Path(__file__).resolve().parent
PEERS = ("plain", "hooks", "transformerlens", "ours")
"""The ways, in the order of each round."""
PEER_PYTHON = HERE / "peers" / ".venv" / "bin" / "python"
"""Python of TransformerLens's environment, where it was made."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="58M")
    parser.add_argument("--prompts", type=int, help="default: 32, and 100 for the 7B and 8B shapes")
    parser.add_argument("--prefix", type=int, default=0, help="tokens before each prompt, the same for all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, default=4, help="heads that are timed of all ways but ours")
    parser.add_argument("--batch", type=int, default=128, help="most prompts in a batch of hooks and transformerlens")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all that are there")
    parser.add_argument("--append", type=Path, help="a file that the JSON line is added to")
    parser.add_argument("--commit", help="what was timed; default: git's answer")
    parser.add_argument("--reduced", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.prompts is None:
        options.prompts = 100 if SHAPES[options.size].is_big else 32
    if options.prompts < 2 or min(options.sample, options.repeats, options.threads, options.batch) < 1:
        parser.error("--prompts is at least 2; --sample, --repeats, --threads and --batch at least 1")
    return options


def run_here(options: argparse.Namespace, peer: str) -> dict[str, Any]:
    """One way, once, in this process."""
    import torch
    from passes import PASSES, Work

    torch.set_num_threads(options.threads)
    shape = SHAPES[options.size]
    work = Work(
        shape=shape.reduced() if options.reduced else shape,
        n_prompts=options.prompts,
        prefix=options.prefix,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        n_sampled=options.sample,
        batch=options.batch,
    )
    if peer == "transformerlens":
        from peers.transformerlens import transformerlens

        measured = transformerlens(work)
    else:
        measured = PASSES[peer](work)
    accelerator = torch.cuda.get_device_name() if options.device == "cuda" else None
    return {**asdict(measured), "accelerator": accelerator}


def run_apart(options: argparse.Namespace, peer: str) -> dict[str, Any]:
    """One way, once, in a process of its own."""
    python = str(PEER_PYTHON) if peer == "transformerlens" else sys.executable
    command = [python, __file__, "--only", peer]
    for name in ("size", "prompts", "prefix", "threads", "device", "dtype", "sample", "batch"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--reduced"] * options.reduced
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    made = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if made.returncode:
        raise SystemExit(f"{made.stderr}\nbench/scan.py: {peer} failed, above")
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


def available(asked: Sequence[str] | None) -> list[str]:
    """The ways that can be run here, of those asked for; what is missing is told."""
    chosen = [peer for peer in PEERS if peer in (asked or PEERS)]
    if "transformerlens" in chosen and not PEER_PYTHON.exists():
        chosen.remove("transformerlens")
        print("transformerlens is left out: its environment is not there (bench/peers/README.md)", file=sys.stderr)
    return chosen


def commit() -> str:
    """The checkout's commit, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE, env=environment)
    except FileNotFoundError:
        return "unknown"
    return made.stdout.strip() or "unknown"


def machine(accelerator: str | None) -> str:
    """The processor by its name, its cores, and the accelerator."""
    name, facts = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if facts.exists():
        lines = facts.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return ", ".join([name, f"{os.cpu_count()} cores", *([accelerator] if accelerator else [])])


def summary(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The JSON line of a bench whose ways gave these runs."""
    first = {peer: made[0] for peer, made in runs.items()}
    medians = {peer: statistics.median(run["seconds"] for run in made) for peer, made in runs.items()}
    svd = {
        peer: statistics.median(run["svd_seconds"] for run in made)
        for peer, made in runs.items()
        if first[peer]["svd_seconds"] is not None
    }
    others = [peer for peer in medians if peer != "ours" and "ours" in medians]
    compared = zip(*(run["angles"] for run in first.values()), strict=True)
    shape = SHAPES[options.size].reduced() if options.reduced else SHAPES[options.size]
    return {
        "bench": Path(__file__).stem,
        "commit": options.commit or commit(),
        "machine": machine(next(iter(first.values()))["accelerator"]),
        "threads": options.threads,
        "device": options.device,
        "size": f"{options.size} reduced" if options.reduced else options.size,
        "shape": asdict(shape),
        "prompts": options.prompts,
        "prefix": options.prefix,
        "batch": options.batch,
        "dtype": {peer: run["dtype"] for peer, run in first.items()},
        "seconds": {peer: [run["seconds"] for run in made] for peer, made in runs.items()},
        "scaled_from_heads": {peer: run["sampled"] for peer, run in first.items() if run["sampled"] is not None},
        "heads": len(shape.heads),
        "medians": medians,
        "median_svd_seconds": svd,
        "ratios": {f"{peer}/ours": medians[peer] / medians["ours"] for peer in others},
        "peak_memory_is": "CUDA allocated" if options.device == "cuda" else "resident set",
        "peak_bytes": {peer: max(run["peak_bytes"] for run in made) for peer, made in runs.items()},
        "sampled_heads": [f"{layer}-{head}" for layer, head in shape.sample(options.sample)],
        "degrees": {peer: run["angles"] for peer, run in first.items()},
        "max_difference_degrees": max(max(each) - min(each) for each in compared) if len(first) > 1 else None,
        "versions": {peer: run["versions"] for peer, run in first.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Interleave the ways, print one JSON line, and what happens on stderr."""
    options = parse(arguments)
    if options.only:
        print(json.dumps(run_here(options, options.only)))
        return
    peers = available(options.peers)
    if not peers:
        raise SystemExit("bench/scan.py: nothing to run")
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in peers}
    for number in range(1, options.repeats + 1):
        for peer in peers:
            print(f"round {number} of {options.repeats}: {peer} ...", end=" ", file=sys.stderr, flush=True)
            runs[peer].append(run_apart(options, peer))
            print(f"{runs[peer][-1]['seconds']:.2f} s", file=sys.stderr)
    line = json.dumps(summary(options, runs))
    print(line)
    if options.append:
        with options.append.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()

"""How passes and runs grow: ``python bench/growth.py``.

Passes: time and memory, measured and told before, against heads, prompts, prompt length and layers, the others held, on
small Llamas. The plan predicts the operations: linear in prompts and heads, L (L + 1) / 2 a head of each layer in
layers. One JSON line a sweep, with the slopes of log time, log operations and log bytes.

Runs (``--only memory``, ``pages``, ``history``, ``resume``): memory of whole commands against prompts, the pages of a
large model in headless Chromium, the history of many runs, a start over many stored files.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
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
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import row_sizes

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


PROMPTS = (250, 500, 1000, 2000)
"""Harmful ones, and as many benign, of which memory must not depend."""
MODELS, HISTORY, STORED = (((32, 32), 600), ((160, 32), 500)), 500, 20_000
"""Layers and heads of the pages' models, with their prompts; runs of a history; files that a resumed run holds."""
WHOLE = "--n-random 3 --size 2 --anyway --max-new-tokens 40 --threads 1 --quiet"
LARGE_COMMANDS = {"audit": f"audit {{}} {WHOLE}", "scan": "scan {} --threads 1 --quiet", "judge": "judge OUT --quiet"}
"""Commands whose memory is measured; the last judges the scan again."""


class Elapsed:
    """Seconds since it was made, by the clock and of this process alone, which a crowded machine makes no longer."""

    def __init__(self) -> None:
        self._clock, self._process = time.monotonic(), time.process_time()

    def __call__(self) -> dict[str, float]:
        """Both, by name."""
        return {"seconds": time.monotonic() - self._clock, "cpu_seconds": time.process_time() - self._process}


def measured(*words: str | Path) -> dict[str, float]:
    """What a command, a process of its own, took: exit status, largest memory, seconds."""
    started, silent = Elapsed(), [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    command = [sys.executable, "-m", "safetyheads", *map(str, words)]
    pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=silent)
    _, status, used = os.wait4(pid, 0)
    took = {"seconds": started()["seconds"], "cpu_seconds": used.ru_utime + used.ru_stime}
    return {"status": status, "peak_mb": used.ru_maxrss / 1024, **took}


def command_memory(folder: Path) -> Iterator[dict[str, Any]]:
    """Largest memory of whole commands on the organism, each a process of its own."""
    from safetyheads.demo import fixed_prompts

    for n in PROMPTS:
        given = []
        for name, prompts in (
            ("prompts", fixed_prompts("harmful", "train", n)),
            ("benign", fixed_prompts("benign", "train", n)),
        ):
            (folder / f"{name}.txt").write_text("".join(f"{prompt.text}\n" for prompt in prompts))
            given.append(f"--{name} {folder / name}.txt")
        for name, command in LARGE_COMMANDS.items():
            out = folder / f"{'scan' if name == 'judge' else name}-{n}"
            words = command.format(f"demo:aligned_a {' '.join(given)} --out {out}").replace("OUT", str(out)).split()
            yield {"command": name, "prompts": n, **measured(*words)}


def large_pages(folder: Path) -> Iterator[dict[str, Any]]:
    """What the pages of large models take to write, their bytes, and seconds until headless Chromium has drawn them."""
    import audit_samples
    import scan_samples
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    for (shape, n), kind in product(MODELS, ("audit", "scan")):
        path, (n_layers, n_heads) = folder / f"{kind}-{n}", shape
        if kind == "audit":
            audit_samples.finished_run(path, audit_samples.audit(*shape, n=n))
        else:
            scan_samples.N_LAYERS, scan_samples.N_HEADS = shape
            scan_samples.HEADS = [f"{layer}-{index}" for layer in range(n_layers) for index in range(n_heads)]
            scan_samples.finished_run(path, scan_samples.Sample(n=n, benign=False, optional=False, n_judges=1))
        written, page = measured("report", path, "--show-completions"), path / "report/index.html"
        with sync_playwright() as driver:
            shown = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
            started = Elapsed()
            shown.goto(page.as_uri())
            shown.wait_for_selector("html[data-drawn]", timeout=120_000)
            opened = started()["seconds"]
        found = {"page": kind, "heads": n_layers * n_heads, "prompts": n, "bytes": page.stat().st_size}
        yield {**found, "written": written, "opened_seconds": opened}


def many_runs(folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds of the history of many runs."""
    from run_samples import audit_run

    from safetyheads.reports.write import write_history
    from safetyheads.runs.history import read_history

    first = audit_run(folder / "0")
    for number in range(1, HISTORY):
        shutil.copytree(first, folder / str(number))
    started = Elapsed()
    found = read_history(folder)
    read = started()
    page, _ = write_history(found)
    yield {"runs": len(found["runs"]), "read": read, "whole": started(), "bytes": page.stat().st_size}


def many_files(folder: Path) -> Iterator[dict[str, Any]]:
    """Seconds until a run that starts again has read what it stored."""
    from safetyheads.runs.directory import RunDirectory

    def go_on(compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, float]:
        started = Elapsed()
        with RunDirectory.start(folder / "run", {}, {}) as run:
            for number in range(STORED):
                run.tensors("ships", {"batch": number}, compute)
        return started()

    def stored() -> dict[str, torch.Tensor]:
        raise AssertionError("a stored file is not computed again")

    computed = go_on(lambda: {"ships": torch.ones(4, 8)})
    yield {"files": STORED, "computed": computed, "resumed": go_on(stored)}


RUNS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "memory": command_memory,
    "pages": large_pages,
    "history": many_runs,
    "resume": many_files,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON line a sweep."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "samples"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=(*SWEEPS, *RUNS))
    parser.add_argument("--scale", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    accelerator = torch.cuda.get_device_name() if options.device == "cuda" else None
    about = {"bench": Path(__file__).stem, "commit": commit(), "machine": machine(accelerator), "dtype": "float32"}
    for name, sizes in SWEEPS.items():
        if options.only in (None, name):
            found = sweep(name, sizes, options.device, options.repeats, options.scale)
            print(json.dumps({**about, "threads": options.threads, **found}), flush=True)
    for name, measure in RUNS.items():
        if options.only == name:
            with tempfile.TemporaryDirectory() as folder:
                for found in measure(Path(folder)):
                    print(json.dumps({**about, "against": name, **found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())

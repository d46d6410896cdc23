"""One Generalized Ships pass over all heads against a plain loop, in one run: ``python bench/scan.py``.

(a) the plain loop: one head, one prompt, a full forward with logits at all positions, eager attention, fp32: what the
paper's code does. It is timed on a sample of heads and scaled, and says so. (d) ours: the whole pass. Runs are
interleaved in subprocesses, medians compared. One JSON line a run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 8},
    "58M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
}
# Length distribution of MaliciousInstruct's queries under `query_answer`, in tokens of a 32,000-word BPE: about 31.
LENGTHS = (24, 26, 27, 28, 29, 30, 30, 31, 31, 32, 33, 34, 35, 37, 39, 30)


def build(size: str):  # noqa: ANN201
    """A random Llama, and token ids of prompts that share a short beginning as one template gives them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=32000, num_key_value_heads=shape["num_attention_heads"], attn_implementation="eager", **shape
    )
    generator = torch.Generator().manual_seed(1)
    template = [1, 2, 3, 4]
    prompts = [
        template + torch.randint(5, 32000, (LENGTHS[i % len(LENGTHS)] - 4,), generator=generator).tolist()
        for i in range(32)
    ]
    return LlamaForCausalLM(config).eval(), prompts


def plain_loop(size: str, sample: int) -> float:
    """Seconds of the whole scan as the paper's code would run it, scaled from ``sample`` heads."""
    import torch

    model, prompts = build(size)
    config = model.config
    heads = [(layer, head) for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]
    step = max(1, len(heads) // sample)
    chosen = heads[::step]
    width = config.hidden_size // config.num_attention_heads

    def hook_for(head: int):  # noqa: ANN202
        scale = torch.ones(config.hidden_size)
        scale[head * width : (head + 1) * width] = 1e-5
        return lambda _, __, output: output * scale

    started = time.perf_counter()
    with torch.inference_mode():
        for layer, head in chosen:
            handle = model.model.layers[layer].self_attn.q_proj.register_forward_hook(hook_for(head))
            states = [model.model(torch.tensor([ids])).last_hidden_state for ids in prompts]
            # Logits at all positions, as the full model computes them.
            rows = torch.stack([(state, model.lm_head(state))[0][0, -1] for state in states])
            torch.linalg.svd(rows.double(), full_matrices=False)
            handle.remove()
    return (time.perf_counter() - started) * len(heads) / len(chosen)


def ours(size: str) -> float:
    """Seconds of the whole pass."""
    from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
    from safetyheads.batching import TokenSequence
    from safetyheads.engine import Engine
    from safetyheads.head_pass import Angle, HeadPass, Readings
    from safetyheads.loading import use_our_attention

    model, prompts = build(size)
    use_our_attention(model)
    engine = Engine(model, tokenizer=None, name=size)
    sequences = [TokenSequence(tuple(ids)) for ids in prompts]
    started = time.perf_counter()
    scan = HeadPass.begin(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readings(angles=(Angle(),)))
    scan.measure([(head,) for head in engine.heads])
    return time.perf_counter() - started


def main() -> None:
    """Interleave the two, print JSON lines and the ratio of medians."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", choices=SIZES, default="58M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sample", type=int, default=8, help="heads of the plain loop that are timed")
    parser.add_argument("--only", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        import torch

        torch.set_num_threads(options.threads)
        seconds = plain_loop(options.size, options.sample) if options.only == "plain" else ours(options.size)
        print(json.dumps({"seconds": seconds}))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(options.repeats):
        for name in times:
            command = [sys.executable, __file__, "--only", name, "--size", options.size]
            command += ["--threads", str(options.threads), "--sample", str(options.sample)]
            made = subprocess.run(command, capture_output=True, text=True, check=True)
            times[name].append(json.loads(made.stdout.splitlines()[-1])["seconds"])
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "bench": Path(__file__).stem,
                "commit": commit.stdout.strip(),
                "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
                "dtype": "float32",
                "size": options.size,
                "seconds": times,
                "plain_scaled_from_heads": options.sample,
                "medians": medians,
                "ratio": medians["plain"] / medians["ours"],
            }
        )
    )


if __name__ == "__main__":
    main()

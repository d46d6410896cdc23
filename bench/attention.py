"""Attention over packed prompts, three ways, in one run: ``python bench/attention.py``.

(dense) sdpa over the whole row under its mask; (segments) ours, prompt by prompt with the prefix's keys before each;
(flex) torch's flex attention under the same rule as a block mask, compiled. Two parts merged by log-sum-exp were not
written: sdpa gives no log-sum-exp on every device, and prompt by prompt needs none. Runs are interleaved, medians
compared; one JSON line. Where flex attention cannot be compiled, the line says why.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from passes import Clock
from scan import commit, machine
from shapes import LENGTHS
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from safetyheads.model.attention import by_segment
from safetyheads.model.packing import TokenSequence, pack


def ways(prompts: int, prefix: int, rows: int, heads: int, d_head: int, device: str, dtype: torch.dtype):  # noqa: ANN201
    """Name -> a call that attends over the same random queries, keys and values; and the row's number of tokens."""
    shared = tuple(range(1, prefix + 1))
    rests = [LENGTHS[number % len(LENGTHS)] for number in range(prompts)]
    sequences = [
        TokenSequence((*shared, *(1000 * number + token for token in range(rest))))
        for number, rest in enumerate(rests, start=1)
    ]
    row = pack(sequences, range(prompts), device)
    positions, segments = row.packing.positions, row.packing.segments
    n_tokens = row.n_tokens
    query, key, value = (torch.randn(rows, n_tokens, heads, d_head, device=device, dtype=dtype) for _ in range(3))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    seen = (segments[None] == 0) | (segments[None] == segments[:, None])
    mask = (seen & (positions[None] <= positions[:, None]))[None, None]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        return scaled_dot_product_attention(query, key, value, mask).transpose(1, 2), None

    def rule(_: Tensor, __: Tensor, at: Tensor, other: Tensor) -> Tensor:
        same = (segments[other] == 0) | (segments[other] == segments[at])
        return same & (positions[other] <= positions[at])

    blocks = create_block_mask(rule, None, None, n_tokens, n_tokens, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    calls: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: attend(query, key, value, mask)[0],
        "segments": lambda: by_segment(attend, row.packing, query, key, value, mask),
        "flex": lambda: compiled(query, key, value, block_mask=blocks).transpose(1, 2),
    }
    return calls, n_tokens


def main() -> None:
    """Check that the three agree, time them in turn, print one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--d-head", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    calls, n_tokens = ways(
        options.prompts,
        options.prefix,
        options.rows,
        options.heads,
        options.d_head,
        options.device,
        getattr(torch, options.dtype),
    )
    times: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    with torch.inference_mode():
        reference = calls["dense"]().float()
        for name, call in calls.items():
            try:
                errors[name] = float((call().float() - reference).abs().max())
                times[name] = []
            except RuntimeError as error:  # a compiler's failure is a result here, and is printed
                unavailable[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        for _ in range(options.repeats):
            for name, seconds in times.items():
                clock = Clock(options.device)
                calls[name]()
                seconds.append(clock.lap())
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    line = {"bench": Path(__file__).stem, **vars(options), "n_tokens": n_tokens, "commit": commit()}
    line["machine"] = machine(torch.cuda.get_device_name() if options.device == "cuda" else None)
    line |= {"largest_difference": errors, "medians": medians, "unavailable": unavailable}
    print(json.dumps({**line, "ratios": {f"{name}/segments": t / medians["segments"] for name, t in medians.items()}}))


if __name__ == "__main__":
    main()

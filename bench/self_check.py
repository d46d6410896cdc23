"""What the proofs at load cost beside a scan, counted on a 7B shape, and their seconds on the organism.

The proofs run on a model with the shape's layers and heads and narrow weights, whose tokens and pairs hooks count; a
layer left half-way counts as a whole one. The scan (every head once) is counted by its layout. Both are floating-point
operations of layers at the shape's own widths, without logits. A run that reaches beyond a window proves the model
again on prompts beyond it: tokens grow with their length, pairs with its square, so three short windows tell the cost.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from shapes import SHAPES, Shape, build, prompts

from safetyheads import load_demo
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import ModelCosts, Plan, row_sizes

_NARROW = 8  # width of a head; rotary positions need an even number
# Prompts of the proofs are 8 tokens longer, of lengths that thirds and halves of them are whole.
_WINDOWS = (64, 136, 208)


class Count(NamedTuple):
    """What the proofs ran, in all layers: tokens, and pairs of a token and one it sees."""

    tokens: float
    pairs: float

    def flops(self, each: ModelCosts) -> float:
        """Floating-point operations."""
        return self.tokens * each.token + self.pairs * each.pair


def counted(engine: Engine, window: int = 0) -> Count:
    """The proofs' tokens and pairs, of a run that reaches beyond the window; 0 is none."""
    facts = replace(engine.architecture, windows=(window,))
    engine = Engine(engine.model, engine.tokenizer, architecture=facts)
    tokens = pairs = 0

    def count(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal tokens, pairs
        rows, length = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        tokens += rows * length
        pairs += rows * length * (length + 1) // 2

    hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in engine.architecture.layers]
    try:
        engine.check(longest=max(64, window + 1))
    finally:
        for hook in hooks:
            hook.remove()
    return Count(tokens, pairs)


def beyond(engine: Engine, window: int) -> Count:
    """As :func:`counted`, from the counts at three short windows."""
    short = [counted(engine, each) for each in _WINDOWS]
    curves = (np.polyfit(_WINDOWS, [getattr(each, name) for each in short], 2) for name in ("tokens", "pairs"))
    return Count(*(float(np.polyval(curve, window)) for curve in curves))


def engine_on(shape: Shape, device: str = "cpu") -> Engine:
    """An engine without a tokenizer; on the meta device it has widths and no numbers."""
    return Engine(build(shape, "eager", device), tokenizer=None, name="bench")  # type: ignore[arg-type]


def scan_of(engine: Engine, token_ids: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> float:
    """Operations of scoring each head alone over prompts laid out in rows."""
    sequences = [TokenSequence(tuple(ids)) for ids in token_ids]
    return engine.costs.scan_flops(row_sizes(sequences, Plan(tuple(map(tuple, rows)), 1, 1)), engine.heads)


def organism_seconds() -> dict[str, float]:
    """Medians of five checks of the organism, by the clock and of the processor, which other work does not slow."""
    engine, clocks = load_demo("aligned_a").engine, (time.perf_counter, time.process_time)
    spans = []
    for _ in range(5):
        starts = [clock() for clock in clocks]
        engine.check()
        spans.append([clock() - start for clock, start in zip(clocks, starts, strict=True)])
    wall, processor = (sorted(span)[len(span) // 2] for span in zip(*spans, strict=True))
    return {"organism_seconds": wall, "organism_cpu_seconds": processor}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print shares and seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--reduced", action="store_true", help="the shape small enough for tests")
    for name, default in (("--prompts", 100), ("--window", 4096)):
        parser.add_argument(name, type=int, default=default)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shape = SHAPES[given.shape].reduced() if given.reduced else SHAPES[given.shape]
    whole, d_model = engine_on(shape, "meta"), _NARROW * shape.n_heads
    d_mlp = d_model * shape.d_mlp // shape.d_model
    narrow = engine_on(replace(shape, d_model=d_model, d_mlp=d_mlp, vocabulary_size=512))
    each, together = whole.costs, [range(given.prompts)]
    short, prefixed = (prompts(shape, given.prompts, prefix) for prefix in (0, given.window))
    apart = [[number + 1] * given.window + ids for number, ids in enumerate(short)]
    check, long_check = counted(narrow).flops(each), beyond(narrow, given.window).flops(each)
    shares = {
        "check_share_of_scan": check / scan_of(whole, short, together),
        "beyond_window_share_of_scan": long_check / scan_of(whole, apart, [[number] for number in together[0]]),
        "beyond_window_share_of_scan_behind_one_prefix": long_check / scan_of(whole, prefixed, together),
    }
    print(json.dumps({**vars(given), **shares, **organism_seconds()}))


if __name__ == "__main__":
    main()

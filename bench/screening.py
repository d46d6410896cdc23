"""Screening against exact scores: where the exact best stand in the forecast: ``python bench/screening.py``.

Models: the organism's checkpoints as they are, each of them among idle heads (16 layers x 16 heads), and random models
of 16 x 16. Both ablations, many draws of prompts; one JSON line a model and ablation, with the worst draw.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from embedded import embed
from scan import commit, machine
from transformers import LlamaConfig, LlamaForCausalLM

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation, Engine, load_demo
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.screening import POINTS, Point, screen
from safetyheads.model.loading import use_our_attention
from safetyheads.model.packing import TokenSequence

CHECKPOINTS = ("aligned_a", "aligned_b", "aligned_single")
_POOL = 64
"""Prompts that the larger models' draws are made of."""
ABLATIONS = (UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION)


@dataclass(frozen=True)
class Case:
    """A model and the prompts that draws are made of."""

    name: str
    engine: Engine
    prompts: tuple[tuple[int, ...], ...]


def cases(layers: int, heads: int, only: str | None) -> Iterator[Case]:
    """Every model, made when it is asked for."""
    for name in CHECKPOINTS:
        if only is None or only in (name, f"{name}_embedded"):
            demo = load_demo(name)
            encoded = demo.engine.ask(demo.harmful).token_ids
            if only != f"{name}_embedded":
                yield Case(name, demo.engine, encoded)
            if only != name:
                larger, _ = embed(demo.engine.model, layers, heads)
                use_our_attention(larger)
                yield Case(f"{name}_embedded", Engine(larger, demo.engine.tokenizer, name), encoded[:_POOL])
    for spread in (0.02, 0.1, 0.2):
        name = f"random_{spread}"
        if only is None or only == name:
            yield Case(name, *_random(layers, heads, spread))


def _random(layers: int, heads: int, spread: float) -> tuple[Engine, tuple[tuple[int, ...], ...]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=spread,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    use_our_attention(model)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(12, 32, (96,), generator=generator).tolist()
    prompts = tuple(tuple(torch.randint(512, (length,), generator=generator).tolist()) for length in lengths[:_POOL])
    return Engine(model, None, "random"), prompts  # type: ignore[arg-type]


def ranks(case: Case, ablation: Ablation, prompts: int, draws: int, points: Sequence[Point]) -> dict[str, Any]:
    """Where the exact top 3 and top 10 by mean Ships stand in the forecast, at worst over the draws."""
    sequences = [TokenSequence(ids) for ids in case.prompts]
    heads = case.engine.heads
    measuring = HeadPass(case.engine, sequences, ablation, Readouts(ships=True))
    exact = measuring.measure([(head,) for head in heads])["ships"]  # [n_heads, n_prompts]
    forecast = screen(case.engine, sequences, ablation, points=points)
    generator = torch.Generator().manual_seed(0)
    worst = {3: 0, 10: 0}
    for _ in range(draws):
        chosen = torch.randperm(len(sequences), generator=generator)[:prompts]
        drawn = forecast._replace(ships=forecast.ships[chosen])
        order = drawn.table().values.flatten().argsort(descending=True).tolist()
        best = exact[:, chosen].mean(dim=1).argsort(descending=True).tolist()
        for k, seen in worst.items():
            worst[k] = max(seen, *(order.index(head) + 1 for head in best[:k]))
    return {"n_heads": len(heads), "top_3_within": worst[3], "top_10_within": worst[10]}


def main() -> None:
    """Print one JSON line a model and ablation."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a draw")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--tokens", type=int, help="linearise so many tokens at the unablated point alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="one model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {"bench": Path(__file__).stem, "commit": commit(), "machine": machine(None), "dtype": "float32"}
    for case in cases(options.layers, options.heads, options.only):
        for ablation in ABLATIONS:
            points = POINTS if options.tokens is None else (Point(0.0, options.tokens),)
            found = ranks(case, ablation, options.prompts, options.draws, points)
            line = {
                **about,
                "model": case.name,
                "ablation": ablation.name,
                "points": [point._asdict() for point in points],
            }
            print(json.dumps({**line, "draws": options.draws, "prompts": options.prompts, **found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What the paper's experiments cost on a 7B shape, counted: operations of layers, no logits. Times nothing.

    python bench/reproduction.py --rate 57e9      # operations a second: hours at that rate stand beside

Score passes are counted by the engine's own plan rules on weights that hold no memory. Answers are bounded from both
sides: at least every draft of 128 tokens is compared once, at most every answer is decoded to its end besides.
"""

import argparse
from dataclasses import dataclass

from shapes import SHAPES, build, prompts

from safetyheads.model.engine import Engine
from safetyheads.model.loading import use_our_attention
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import Plan, row_sizes

N_PROMPTS = 520 + 100 + 100
"""AdvBench, JailbreakBench, MaliciousInstruct."""
N_TEMPLATES, N_NEW, N_RANDOM = 2, 128, 20
# Prompts that share a row, as plans on a GPU have it.
_PACKED = 20


@dataclass(frozen=True, slots=True)
class Cost:
    """Per prompt of the three datasets."""

    passes: int
    """Scores of every head."""
    answers: int
    """Answers under some ablation, or none."""


COSTS = {
    "fig2": Cost(2 * N_TEMPLATES, 3 * 2 * N_TEMPLATES),
    "fig11": Cost(N_TEMPLATES, 11 * 2 * N_TEMPLATES),
    "fig12": Cost(N_TEMPLATES, 11 * 2 * N_TEMPLATES),
    "fig4a": Cost(2 * 6, 1 + 2 * 5 * (2 + N_RANDOM)),
    "table3": Cost(2 * 6, 1 + 2 * 5 * 2),
    "fig4b": Cost(3, 1 + 1024),
    "transfer": Cost(2 * 3, 1 + 2 * 4),
    "fig5": Cost(2, 0),
    "fig6a": Cost(0, 4),
    "fig13": Cost(2, 0),
    "fig17": Cost(2 * 2 * 4, 2 * 5),
    "fig18": Cost(2 * 4, 5),
    "table7": Cost(2 * 3, 6),
    "epsilon": Cost(3 + 7, 2 * 7),
}
"""By experiment, for one model; those that are missing cost little, or are not counted in prompts."""


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--rate", type=float, nargs="+", default=[57e9, 125e12], help="operations a second")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    model = build(shape, "sdpa", "meta")
    use_our_attention(model)
    engine = Engine(model, tokenizer=None, name="counted")  # type: ignore[arg-type]
    sequences = [TokenSequence(tuple(token_ids)) for token_ids in prompts(shape, _PACKED)]
    rows = row_sizes(sequences, Plan((tuple(range(_PACKED)),), 1, 1))
    scored = (engine.costs.forward_flops(rows) + engine.costs.scan_flops(rows, engine.heads)) / _PACKED
    each = engine.costs.forward_flops(rows) / _PACKED
    decoded = each * (1 + N_NEW / (sum(len(one.token_ids) for one in sequences) / _PACKED))
    # On average a group's first layer is in the middle, and layers before it are not run again.
    compared = decoded / 2
    rates = "".join(f" hours at {rate:.3g} FLOP/s |" for rate in arguments.rate)
    print(f"| experiment | score passes x prompts | answers | PFLOP |{rates}")
    print("|---|---|---|---|" + "---|" * len(arguments.rate))
    for name, cost in COSTS.items():
        low = N_PROMPTS * (cost.passes * scored + cost.answers * compared)
        high = low + N_PROMPTS * cost.answers * decoded
        hours = "".join(f" {_between(low / rate / 3600, high / rate / 3600)} |" for rate in arguments.rate)
        counts = f"{cost.passes * N_PROMPTS:,} | {cost.answers * N_PROMPTS:,}"
        print(f"| {name} | {counts} | {_between(low / 1e15, high / 1e15)} |{hours}")


def _between(low: float, high: float) -> str:
    """``12 to 30``, to two digits; one number where both are the same."""
    ends = [f"{float(f'{end:.2g}'):,.10g}" for end in (low, high)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


if __name__ == "__main__":
    main()

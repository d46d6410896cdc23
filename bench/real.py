"""One pass of mean Ships over all heads of a real model, four ways: ``python bench/real.py smollm2 --prompts FILE``.

(a) ``plain``: one head, one prompt, a full forward with logits at all positions, eager; (b) ``hooks``: padded batches,
one head at a time, sdpa, last token; (c) ``ours``: the package's exact pass, whole; (d) ``screened``: the package's
screening and the exact scores of what it proposes. (a) and (b) are timed on heads spread over the layers and scaled.
With ``--resamples`` it tells instead in how many resamples of stored exact scores the screening keeps the exact top 10.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from passes import Batch, Clock, ablated, hooked_states
from scan import commit, machine

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, Extent, Head, PromptSet, rank_heads
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.scorers import scorer_of
from safetyheads.measures.screening import Screening, propose, screen
from safetyheads.model.planning import TokenSequence

WAYS = ("plain", "hooks", "ours", "screened")
_TOP = 10


class Work:
    """A model, what it is asked, and the heads that slow ways are timed on."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the model and read the prompts."""
        self.engine = Engine.load(options.model)
        prompts = PromptSet.read(options.prompts, column=options.column, limit=options.limit)
        self.token_ids = self.engine.ask(prompts).token_ids
        self.sequences = tuple(map(TokenSequence, self.token_ids))
        heads = self.engine.heads
        self.sample = heads[len(heads) // (2 * options.sample) :: len(heads) // options.sample][: options.sample]
        self.extent = Extent(options.candidates, options.sampled)
        self.scores: dict[str, dict[Head, float]] = {}

    def eager(self, attention: str) -> Any:
        """The model as transformers runs it."""
        model = copy.deepcopy(self.engine.model)
        model.set_attn_implementation(attention)
        return model

    def pass_of(self, numbers: Sequence[int] | None = None) -> HeadPass:
        """A new pass over the prompts, or some of them."""
        sequences = self.sequences if numbers is None else [self.sequences[number] for number in numbers]
        return HeadPass(self.engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(ships=True))


def divergence(unablated: torch.Tensor, other: torch.Tensor) -> float:
    """Mean Ships of one head from logits [n_prompts, vocabulary]."""
    before, after = (torch.log_softmax(logits.double(), dim=-1) for logits in (unablated, other))
    return float((before.exp() * (before - after)).sum(dim=-1).mean())


@torch.inference_mode()
def by_logits(work: Work, logits: Callable[[tuple[int, int] | None], torch.Tensor], way: str) -> float:
    """Seconds of a way that gives logits under one head, scaled to all heads."""
    logits((0, 0))
    clock = Clock("cpu")
    unablated = logits(None)
    of_unablated = clock.lap()
    found = {head: divergence(unablated, logits((head.layer, head.index))) for head in work.sample}
    work.scores[way] = found
    return of_unablated + clock.lap() * len(work.engine.heads) / len(work.sample)


def plain(work: Work) -> float:
    """Seconds of (a)."""
    model, rows = work.eager("eager"), [torch.tensor([ids]) for ids in work.token_ids]

    def logits(head: tuple[int, int] | None) -> torch.Tensor:
        with ablated(model, head):
            return torch.cat([model(row, use_cache=False).logits[:, -1] for row in rows])

    return by_logits(work, logits, "plain")


def hooks(work: Work) -> float:
    """Seconds of (b)."""
    model, longest = work.eager("sdpa"), max(map(len, work.token_ids))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in work.token_ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in work.token_ids])
    states = hooked_states(model, [Batch(ids, mask)])
    return by_logits(work, lambda head: model.lm_head(states(head)), "hooks")


def ours(work: Work) -> float:
    """Seconds of (c)."""
    clock = Clock("cpu")
    table = rank_heads(scorer_of(work.pass_of(), "mean_ships"), work.engine.heads)
    seconds = clock.lap()
    work.scores["ours"] = {head: table[head] for head in work.sample}
    return seconds


def screened(work: Work) -> float:
    """Seconds of (d)."""
    clock = Clock("cpu")
    forecast = screen(work.engine, work.sequences, UNDIFFERENTIATED_ATTENTION)
    heads = propose(forecast, "mean_ships", work.extent).heads
    rank_heads(scorer_of(work.pass_of(), "mean_ships"), heads)
    return clock.lap()


def resampled(work: Work, draws: int, n: int) -> dict[str, Any]:
    """How often the heads that a screening of ``n`` prompts proposes hold the exact best ones of these prompts."""
    heads = work.engine.heads
    exact = work.pass_of().measure([(head,) for head in heads])["ships"]  # [n_heads, n_prompts]
    forecast = screen(work.engine, work.sequences, UNDIFFERENTIATED_ATTENTION)
    generator, lost = torch.Generator().manual_seed(0), []
    for _ in range(draws):
        drawn = torch.randperm(len(work.sequences), generator=generator)[:n]
        best = exact[:, drawn].mean(dim=1).topk(_TOP).indices.tolist()
        own = Screening(forecast.ships[drawn], None, forecast.directions[drawn])
        proposed = propose(own, "mean_ships", work.extent).heads
        lost.append(sum(heads[at] not in proposed for at in best))
    return {"draws": draws, "prompts": n, "of": len(work.sequences), "kept": lost.count(0), "lost": lost}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, hub id, or a name: smollm2, smollm2:NAME, demo:NAME")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--column")
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sample", type=int, default=6, help="heads that plain and hooks are timed on")
    parser.add_argument("--candidates", type=int, default=24)
    parser.add_argument("--sampled", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resamples", type=int, help="draws of 50 prompts out of --limit")
    parser.add_argument("--append", type=Path, help="a file that the JSON line is added to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = Work(options)
    line: dict[str, Any] = {"commit": commit(), "machine": machine(None), "threads": options.threads}
    line |= {"model": options.model, "prompts": len(work.sequences), "heads": len(work.engine.heads)}
    line |= {"load": list(os.getloadavg())}
    if options.resamples:
        line["screening"] = resampled(work, options.resamples, min(50, len(work.sequences) // 2))
    else:
        ways = {"plain": plain, "hooks": hooks, "ours": ours, "screened": screened}
        seconds: dict[str, list[float]] = {way: [] for way in options.ways}
        for _ in range(options.repeats):
            for way in options.ways:
                seconds[way].append(ways[way](work))
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        ratios = {
            f"{way}/ours": medians[way] / medians["ours"] for way in medians if "ours" in medians and way != "ours"
        }
        line |= {"seconds": seconds, "medians": medians, "ratios": ratios, "scaled_from": len(work.sample)}
        line["mean_ships"] = {way: {str(head): score for head, score in of.items()} for way, of in work.scores.items()}
    text = json.dumps(line)
    print(text)
    if options.append is not None:
        with options.append.open("a") as file:
            file.write(f"{text}\n")


if __name__ == "__main__":
    main()

"""One pass of mean Ships over all heads of a real model, four ways: ``python bench/real.py smollm2 --prompts FILE``.

(a) ``plain``: one head, one prompt, a full forward with logits at all positions, eager; (b) ``hooks``: padded batches,
one head at a time, sdpa, last token; (c) ``ours``: the package's exact pass, whole; (d) ``screened``: the package's
pass with a screening. (a) and (b) are timed on heads spread over the layers and scaled.
With ``--ways generated scanned`` it times answers instead: (e) ``generated``: transformers' cached ``generate``, all
prompts in one padded batch that ends at the end token, on heads spread over the layers and scaled; (f) ``scanned``: the
package's exhaustive scan, judge ``phrases``, whole, or of one head in so many (``--scan-every``) and scaled. The line
says on how many of their common answers verdicts differ.
With ``--resamples`` it tells instead in how many resamples of stored exact scores the screening keeps the exact top 10.
"""

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from passes import Batch, Clock, ablated, hooked_states
from scan import commit, machine

from safetyheads import (
    UNDIFFERENTIATED_ATTENTION,
    AnswerScan,
    Decoding,
    Engine,
    Extent,
    Head,
    PhraseJudge,
    PromptSet,
    rank_heads,
    scan_attack_success_rate,
)
from safetyheads.answers.decoding import end_tokens
from safetyheads.heads import Group
from safetyheads.judges.base import Completion
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.scorers import scorer_of
from safetyheads.measures.screening import costs_of, propose
from safetyheads.model.packing import TokenSequence

WAYS = ("plain", "hooks", "ours", "screened")
ANSWERS = ("generated", "scanned")
_TOP = 10


class Work:
    """A model, what it is asked, and the heads that slow ways are timed on."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the model and read the prompts."""
        self.engine = Engine.load(options.model)
        read = [
            PromptSet.read(file, column=options.column if file.endswith(".csv") else None, limit=options.limit)
            for file in options.prompts
        ]
        self.asked = self.engine.ask(read[0])
        self.token_ids = tuple(ids for prompts in read for ids in self.engine.ask(prompts).token_ids)
        self.n_new = options.max_new_tokens
        self.sequences = tuple(map(TokenSequence, self.token_ids))
        heads = self.engine.heads
        self.sample = heads[len(heads) // (2 * options.sample) :: len(heads) // options.sample][: options.sample]
        # Verdicts are compared on the sample.
        self.scanned = tuple(sorted({*heads[:: options.scan_every], *self.sample}))
        self.extent = Extent(options.candidates, options.sampled)
        self.counted: dict[str, float] = {}
        self.scores: dict[str, dict[Head, float]] = {}
        self.verdicts: dict[str, dict[Head, list[bool]]] = {}

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
    whole = work.pass_of()
    proposal = propose(
        lambda numbers: scorer_of(work.pass_of(numbers), "mean_ships"),
        work.engine.heads,
        whole.least_sure_first,
        work.extent,
    )
    rank_heads(scorer_of(whole, "mean_ships"), proposal.heads)
    seconds = clock.lap()
    work.counted = costs_of(work.engine, work.sequences, proposal)
    return seconds


@torch.inference_mode()
def generated(work: Work) -> float:
    """Seconds of (e)."""
    model, tokenizer, judge = work.eager("sdpa"), work.engine.tokenizer, PhraseJudge()
    longest = max(map(len, work.token_ids))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in work.token_ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in work.token_ids])
    ends = set(end_tokens(work.engine))
    found: dict[Head, list[bool]] = {}
    clock = Clock("cpu")
    for head in work.sample:
        with ablated(model, (head.layer, head.index)):
            rows = model.generate(
                ids, attention_mask=mask, max_new_tokens=work.n_new, do_sample=False, pad_token_id=min(ends)
            )
        found[head] = []
        for prompt, row in zip(work.asked, rows[:, longest:].tolist(), strict=True):
            n = next((at for at, token in enumerate(row) if token in ends), len(row))
            text = tokenizer.decode(row[:n], skip_special_tokens=True)
            completion = Completion(prompt.query, text, tuple(row[:n]), n < len(row), work.n_new)
            found[head].append(judge([completion])[0].complied)
    work.verdicts["generated"] = found
    return clock.lap() * len(work.engine.heads) / len(work.sample)


def scanned(work: Work) -> float:
    """Seconds of (f)."""
    clock = Clock("cpu")

    def scan(heads: Sequence[Head]) -> tuple[AnswerScan, float]:
        ablation, groups = UNDIFFERENTIATED_ATTENTION, [(head,) for head in heads]
        found = scan_attack_success_rate(work.engine, work.asked, ablation, PhraseJudge(), Decoding(work.n_new), groups)
        return found, clock.lap()

    _, of_unablated = scan(()) if len(work.scanned) < len(work.engine.heads) else (None, 0.0)
    found, seconds = scan(work.scanned)
    work.verdicts["scanned"] = {
        head: [row.verdict.complied for row in found.rows[found.groups.index((head,))]] for head in work.sample
    }
    return of_unablated + (seconds - of_unablated) * len(work.engine.heads) / len(work.scanned)


def resampled(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """How often the candidates of a screening of some prompts hold the exact best heads of these prompts."""
    heads, n_all = work.engine.heads, len(work.sequences)
    n, place = min(50, n_all // 2), {head: number for number, head in enumerate(heads)}
    if options.stored is not None and options.stored.exists():
        exact = torch.load(options.stored)  # [n_heads, n_prompts]
    else:
        exact = work.pass_of().measure([(head,) for head in heads])["ships"]
        if options.stored is not None:
            torch.save(exact, options.stored)
    place_of = {prompt: at for at, prompt in enumerate(work.pass_of().least_sure_first)}
    generator, lost, gaps, costs = torch.Generator().manual_seed(0), [], [], []
    for _ in range(options.resamples):
        drawn = torch.randperm(n_all, generator=generator)[:n]
        own = exact[:, drawn]

        def scorer_on(prompts: Sequence[int], own: torch.Tensor = own) -> Callable[[Sequence[Group]], torch.Tensor]:
            return lambda groups: own[[place[head] for (head,) in groups]][:, list(prompts)].mean(dim=1)

        order = sorted(range(n), key=lambda at: place_of[int(drawn[at])])
        proposal = propose(scorer_on, heads, order, work.extent)
        scores, best = own.mean(dim=1).topk(_TOP + 1)
        lost.append(sum(heads[at] not in proposal.candidates for at in best[:_TOP].tolist()))
        gaps.append(float(scores[_TOP - 1] - scores[_TOP]))
        costs.append(costs_of(work.engine, [work.sequences[at] for at in drawn.tolist()], proposal)["with_sample"])
    found = {"draws": len(lost), "prompts": n, "of": n_all, "kept": lost.count(0), "lost": lost}
    return found | {"cost": statistics.mean(costs), "median_gap": statistics.median(gaps)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, hub id, or a name: smollm2, smollm2:NAME, demo:NAME")
    parser.add_argument("--prompts", required=True, nargs="+", help="files; answers are made to the first alone")
    parser.add_argument("--column")
    parser.add_argument("--limit", type=int, default=50, help="prompts of each file")
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, *ANSWERS), default=WAYS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sample", type=int, default=6, help="heads that plain, hooks and generated are timed on")
    parser.add_argument("--scan-every", type=int, default=1, help="scanned takes one head in so many, and is scaled")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer of generated and scanned")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--sampled", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resamples", type=int, help="draws of 50 prompts out of all")
    parser.add_argument("--stored", type=Path, help="exact scores of such draws: read, or written where there is none")
    parser.add_argument("--append", type=Path, help="a file that the JSON line is added to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = Work(options)
    line: dict[str, Any] = {"commit": commit(), "machine": machine(None), "threads": options.threads}
    line |= {"model": options.model, "prompts": len(work.sequences), "heads": len(work.engine.heads)}
    line |= {"load": list(os.getloadavg())}
    if options.resamples:
        line["screening"] = resampled(work, options)
    else:
        ways = {"plain": plain, "hooks": hooks, "ours": ours, "screened": screened}
        ways |= {"generated": generated, "scanned": scanned}
        seconds: dict[str, list[float]] = {way: [] for way in options.ways}
        for _ in range(options.repeats):
            for way in options.ways:
                seconds[way].append(ways[way](work))
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        ratios = {
            f"{way}/{of}": medians[way] / medians[of]
            for of, others in (("ours", WAYS), ("scanned", ANSWERS))
            for way in others
            if {way, of} <= medians.keys() and way != of
        }
        line |= {"seconds": seconds, "medians": medians, "ratios": ratios, "scaled_from": len(work.sample)}
        line["counted"] = work.counted
        line["mean_ships"] = {way: {str(head): score for head, score in of.items()} for way, of in work.scores.items()}
        if set(ANSWERS) <= medians.keys():
            of_both = (chain.from_iterable(work.verdicts[way].values()) for way in ANSWERS)
            differ = [before != after for before, after in zip(*of_both, strict=True)]
            line["verdicts"] = {"answers": len(differ), "differing": sum(differ)}
    text = json.dumps(line)
    print(text)
    if options.append is not None:
        with options.append.open("a") as file:
            file.write(f"{text}\n")


if __name__ == "__main__":
    main()

"""Times and counts what finding heads costs (Table 2).

Counts are the same on every machine and are results; seconds are this machine's and are kept apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Decoding, end_tokens
from safetyheads.answers.success import answers_under
from safetyheads.answers.success import scan_attack_success_rate as scan
from safetyheads.experiments.outcome import Outcome, Row
from safetyheads.experiments.paper_numbers import paper_numbers
from safetyheads.measures.screening import screen
from safetyheads.measures.ships import ships
from safetyheads.model.planning import TokenSequence, row_sizes

if TYPE_CHECKING:
    from safetyheads.experiments.lab import Lab, Subject
    from safetyheads.heads import Group
    from safetyheads.model.engine import Engine

# Heads that slow ways are timed on, spread over the layers; prompts of the slowest.
_SAMPLED = 4
_UNCACHED_PROMPTS = 4


def table2(lab: Lab, outcome: Outcome) -> None:
    """Our passes, the screening, the exhaustive scan and plain full generation, on the first model and dataset."""
    model, label = lab.config.models[0], "operations of a plain loop, times those of one score pass"
    for subject in lab.subjects(outcome, model, most=1):
        n_heads, n = len(subject.engine.heads), len(subject.prompts)
        words = {"model": model, "n_heads": n_heads, "n": n, "dataset": subject.dataset}
        counts = _counted(subject)
        outcome.lead(model, label, counts[1]["ratio"], "number")
        outcome.table("counts", counts, **words)
        machine = {"device": subject.engine.device, "threads": torch.get_num_threads()}
        outcome.table("seconds", _timed(lab, subject), **words, **machine)
    hours = "; ".join(f"{name} {hours:g} A100 hours" for name, hours in paper_numbers()["table2"].items())
    outcome.note(
        f"The paper's estimates for Llama-2-7b-chat, from partial generations: {hours}. Its factor of 142 is about its "
        "128 tokens without a cache: a cached, batched baseline is far cheaper, and stands here beside."
    )


def _timed(lab: Lab, subject: Subject) -> list[Row]:
    """Times every way once, scaled to all heads. What the run directory holds is not used: it would cost nothing."""
    engine, prompts, heads = subject.engine, subject.prompts, subject.engine.heads
    ablation, n_new, judge = lab.ablations[0], lab.config.max_new_tokens, lab.judges[0]
    n_sampled, few = min(_SAMPLED, len(heads)), prompts[:_UNCACHED_PROMPTS]
    sample = tuple(heads[(2 * place + 1) * len(heads) // (2 * n_sampled)] for place in range(n_sampled))
    sequences = [TokenSequence(ids) for ids in engine.ask(prompts).token_ids]
    n, n_heads = len(prompts), len(heads)
    columns = [[(head,)] * n for head in sample]
    ways: list[tuple[str, str, int, int, Callable[[], Any]]] = [
        ("screening", "forecast of Ships", n_heads, n, lambda: screen(engine, sequences, ablation).table()),
        ("score pass", "Ships", n_heads, n, lambda: ships(engine, prompts, ablation)),
        ("plain score loop", "Ships", n_sampled, n, lambda: _plain_loop(engine, sequences, sample, ablation)),
        ("exhaustive scan", "ASR", n_heads, n, lambda: scan(engine, prompts, ablation, judge, Decoding(n_new))),
        (
            *("plain generation, cached and batched", "ASR", n_sampled, n),
            lambda: answers_under(engine, prompts, columns, ablation, judge, Decoding(n_new, full_answers=True)),
        ),
        (
            *("plain generation, no cache", "ASR", 1, len(few)),
            lambda: _uncached(engine, engine.ask(few).token_ids, sample[:1], ablation, n_new),
        ),
    ]
    rows: list[Row] = []
    with lab.progress.track("table2: timing", len(ways)) as done:
        for way, gives, heads_run, prompts_run, run in ways:
            started = time.monotonic()
            run()
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            seconds = (time.monotonic() - started) * n_heads / heads_run * n / prompts_run
            timed_on = f"{heads_run} heads x {prompts_run} prompts"
            rows.append({"way": way, "gives": gives, "seconds": seconds, "hours": seconds / 3600, "run": timed_on})
            done(1)
    return rows


@torch.inference_mode()
def _plain_loop(engine: Engine, sequences: Sequence[TokenSequence], heads: Group, ablation: Ablation) -> None:
    """One full forward a head and prompt."""
    for head in heads:
        with engine.ablated((head,), ablation) as model:
            for sequence in sequences:
                model(torch.tensor([sequence.token_ids], device=engine.device), use_cache=False)


def _uncached(engine: Engine, encoded: Sequence[tuple[int, ...]], heads: Group, ablation: Ablation, n_new: int) -> None:
    """Answers that run the whole text again for every token, as the paper's code does."""
    ends = end_tokens(engine)
    with engine.ablated(heads, ablation) as model, torch.inference_mode():
        for prompt in encoded:
            tokens = list(prompt)
            while len(tokens) < len(prompt) + n_new:
                logits = model(torch.tensor([tokens], device=engine.device), use_cache=False).logits[0, -1]
                chosen = int(logits.argmax())
                if chosen in ends:
                    break
                tokens.append(chosen)


def _counted(subject: Subject) -> list[Row]:
    """Operations of a score pass beside the loop's: counted, so the same on every machine."""
    engine = subject.engine
    sequences = [TokenSequence(ids) for ids in subject.asked_prompts.token_ids]
    sizes = row_sizes(sequences, engine.plan(sequences))
    ours = engine.costs.forward_flops(sizes) + engine.costs.scan_flops(sizes, engine.heads)
    alone = sum(engine.costs.forward_flops(row_sizes([sequence], engine.plan([sequence]))) for sequence in sequences)
    n_heads, plain = len(engine.heads), len(engine.heads) * alone
    return [
        {"way": "score pass", "gflop": ours / 1e9, "runs": n_heads * len(sizes), "ratio": 1.0},
        {"way": "plain score loop", "gflop": plain / 1e9, "runs": n_heads * len(sequences), "ratio": plain / ours},
    ]

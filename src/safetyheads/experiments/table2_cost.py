"""Times and counts what finding heads costs (Table 2).

Counts are the same on every machine and are results; seconds are this machine's and are kept apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from safetyheads.answers.decoding import Decoding, end_tokens
from safetyheads.answers.success import answers_under
from safetyheads.answers.success import scan_attack_success_rate as scan
from safetyheads.experiments.lab import Lab, Subject, quoted
from safetyheads.experiments.outcome import Outcome, Row
from safetyheads.measures.scorers import ships
from safetyheads.measures.screening import screen
from safetyheads.model.planning import TokenSequence, row_sizes

# Heads that slow ways are timed on, spread over the layers; prompts of the slowest.
_SAMPLED = 4
_UNCACHED_PROMPTS = 4


def table2(lab: Lab, outcome: Outcome) -> None:
    """Our passes, the screening, the exhaustive scan and plain full generation, on the first model and dataset."""
    model, label = lab.config.models[0], "operations of a plain loop, times those of one score pass"
    for subject in lab.subjects(outcome, model, most=1):
        engine, n = subject.engine, len(subject.prompts)
        sequences, n_heads = [TokenSequence(ids) for ids in subject.asked_prompts.token_ids], len(engine.heads)
        words = {"model": model, "n_heads": n_heads, "n": n, "dataset": subject.dataset}
        # Counted, so the same on every machine.
        sizes = row_sizes(sequences, engine.plan(sequences))
        ours = engine.costs.forward_flops(sizes) + engine.costs.scan_flops(sizes, engine.heads)
        alone = (engine.costs.forward_flops(row_sizes([one], engine.plan([one]))) for one in sequences)
        plain = n_heads * sum(alone)
        counts = [
            {"way": "score pass", "gflop": ours / 1e9, "runs": n_heads * len(sizes), "ratio": 1.0},
            {"way": "plain score loop", "gflop": plain / 1e9, "runs": n_heads * n, "ratio": plain / ours},
        ]
        outcome.lead(model, label, plain / ours, "number")
        outcome.table("counts", counts, **words)
        machine = {"device": subject.engine.device, "threads": torch.get_num_threads()}
        outcome.table("seconds", _timed(lab, subject), **words, **machine)
    numbers = quoted("llama-2-7b-chat", "table2").items()
    outcome.say("paper", hours="; ".join(f"{name} {hours:g} A100 hours" for name, hours in numbers))


def _timed(lab: Lab, subject: Subject) -> list[Row]:
    """Times every way once, scaled to all heads. What the run directory holds is not used: it would cost nothing."""
    engine, prompts, heads = subject.engine, subject.prompts, subject.engine.heads
    ablation, n_new, judge = lab.ablations[0], lab.config.max_new_tokens, lab.judges[0]
    n, n_heads, few = len(prompts), len(heads), prompts[:_UNCACHED_PROMPTS]
    n_sampled = min(_SAMPLED, n_heads)
    sample = tuple(heads[(2 * place + 1) * n_heads // (2 * n_sampled)] for place in range(n_sampled))
    sequences = [TokenSequence(ids) for ids in engine.ask(prompts).token_ids]

    def plain_loop() -> None:
        """One full forward a head and prompt."""
        for head in sample:
            with engine.ablated((head,), ablation) as model:
                for sequence in sequences:
                    model(torch.tensor([sequence.token_ids], device=engine.device), use_cache=False)

    def uncached() -> None:
        """Answers that run the whole text again for every token, as the paper's code does."""
        ends = end_tokens(engine)
        with engine.ablated(sample[:1], ablation) as model:
            for prompt in engine.ask(few).token_ids:
                tokens = list(prompt)
                while len(tokens) < len(prompt) + n_new:
                    logits = model(torch.tensor([tokens], device=engine.device), use_cache=False).logits[0, -1]
                    chosen = int(logits.argmax())
                    if chosen in ends:
                        break
                    tokens.append(chosen)

    def plain() -> object:
        return answers_under(
            engine, prompts, [[(head,)] * n for head in sample], ablation, judge, Decoding(n_new, full_answers=True)
        )

    ways: list[tuple[str, str, int, int, Callable[[], Any]]] = [
        ("screening", "forecast of Ships", n_heads, n, lambda: screen(engine, sequences, ablation).table()),
        ("score pass", "Ships", n_heads, n, lambda: ships(engine, prompts, ablation)),
        ("plain score loop", "Ships", n_sampled, n, torch.inference_mode()(plain_loop)),
        ("exhaustive scan", "ASR", n_heads, n, lambda: scan(engine, prompts, ablation, judge, Decoding(n_new))),
        ("plain generation, cached and batched", "ASR", n_sampled, n, plain),
        ("plain generation, no cache", "ASR", 1, len(few), torch.inference_mode()(uncached)),
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

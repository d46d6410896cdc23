"""What finding heads costs (Table 2). Owns what is timed, what is scaled from a few heads, and what is counted.

Counts are the same on every machine and are results; seconds are this machine's and go apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Decoding, end_tokens
from safetyheads.answers.success import answers_under, scan_attack_success_rate
from safetyheads.experiments.common import meaningful_subjects
from safetyheads.experiments.outcome import Column, Draft, Outcome, Row, Table
from safetyheads.experiments.paper_numbers import TABLE2
from safetyheads.measures.screening import screen
from safetyheads.measures.ships import ships
from safetyheads.model.planning import TokenSequence, row_sizes

if TYPE_CHECKING:
    from safetyheads.experiments.catalogue import Experiment
    from safetyheads.experiments.lab import Lab, Subject
    from safetyheads.heads import Group
    from safetyheads.model.engine import Engine

# Heads that slow ways are timed on, spread over the layers; prompts of the slowest.
_SAMPLED = 4
_UNCACHED_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to learn what heads do."""

    name: str
    gives: str
    seconds: float
    """Of all heads, scaled where only some were run."""
    n_heads: int
    """Heads that were run."""
    n_prompts: int
    """Prompts that were run."""


def table2(lab: Lab, about: Experiment) -> Outcome:
    """Our passes, the screening, the exhaustive scan and plain full generation, on the first model and dataset."""
    draft = Draft()
    subject = next(meaningful_subjects(lab, lab.config.models[0], draft), None)
    if subject is not None:
        ways = _timed(lab, subject)
        counted = _counted(subject)
        draft.tables.append(counted)
        draft.finding = (
            f"A plain loop of forwards takes {counted.rows[1]['ratio']:.1f} times the operations of one score pass, "
            f"counted on {len(subject.engine.heads)} heads and {len(subject.prompts)} prompts."
        )
        draft.timed.append(_seconds(subject, ways))
    draft.notes.append(
        "The paper's estimates for Llama-2-7b-chat, from partial generations: "
        + "; ".join(f"{name} {hours:g} A100 hours" for name, hours in TABLE2.items())
        + ". Its factor of 142 is about its 128 tokens without a cache: a cached, batched baseline is far cheaper, "
        "and stands here beside."
    )
    return draft.finished(about.name, about.title, about.question)


def _timed(lab: Lab, subject: Subject) -> list[_Way]:
    """Every way once; the caches of the run directory are not used, for they would cost nothing."""
    engine, prompts, heads = subject.engine, subject.prompts, subject.engine.heads
    ablation, n_new = lab.ablations[0], lab.config.max_new_tokens
    sample = _spread(heads, _SAMPLED)
    n, n_heads, scale = len(prompts), len(heads), len(heads) / len(sample)
    sequences = [TokenSequence(ids) for ids in engine.ask(prompts).token_ids]
    few = prompts[:_UNCACHED_PROMPTS]
    groups = [(head,) for head in sample]
    with lab.progress.track("table2: timing", 6) as done:

        def timed(run: Callable[[], Any]) -> float:
            started = time.monotonic()
            run()
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
            done(1)
            return time.monotonic() - started

        return [
            _Way(
                "screening", "forecast of Ships", timed(lambda: screen(engine, sequences, ablation).table()), n_heads, n
            ),
            _Way("score pass", "Ships", timed(lambda: ships(engine, prompts, ablation)), n_heads, n),
            _Way(
                "plain score loop",
                "Ships",
                scale * timed(lambda: _plain_loop(engine, sequences, sample, ablation)),
                len(sample),
                n,
            ),
            _Way(
                "exhaustive scan",
                "ASR",
                timed(lambda: scan_attack_success_rate(engine, prompts, ablation, lab.judge, Decoding(n_new))),
                n_heads,
                n,
            ),
            _Way(
                "plain generation, cached and batched",
                "ASR",
                scale * timed(lambda: answers_under(engine, prompts, groups, ablation, lab.judge, n_new)),
                len(sample),
                n,
            ),
            _Way(
                "plain generation, no cache",
                "ASR",
                n_heads
                * n
                / len(few)
                * timed(lambda: _uncached(engine, engine.ask(few).token_ids, sample[:1], ablation, n_new)),
                1,
                len(few),
            ),
        ]


def _spread(heads: Group, count: int) -> Group:
    """So many of the heads, from first to last."""
    count = min(count, len(heads))
    return tuple(heads[(2 * at + 1) * len(heads) // (2 * count)] for at in range(count))


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


def _counted(subject: Subject) -> Table:
    """Operations of a score pass beside the loop's: counted, so the same on every machine."""
    engine = subject.engine
    sequences = [TokenSequence(ids) for ids in engine.ask(subject.prompts).token_ids]
    rows = row_sizes(sequences, engine.plan(sequences))
    ours = engine.costs.forward_flops(rows) + engine.costs.scan_flops(rows, engine.heads)
    alone = sum(engine.costs.forward_flops(row_sizes([one], engine.plan([one]))) for one in sequences)
    plain = len(engine.heads) * alone
    n_plain = len(engine.heads) * len(sequences)
    made: list[Row] = [
        {"way": "score pass", "gflop": ours / 1e9, "runs": len(engine.heads) * len(rows), "ratio": 1.0},
        {"way": "plain score loop", "gflop": plain / 1e9, "runs": n_plain, "ratio": plain / ours},
    ]
    columns = (
        Column("way", "way"),
        Column("runs", "rows through layers", "count"),
        Column("gflop", "GFLOP, counted", "number"),
        Column("ratio", "times our pass", "number"),
    )
    caption = (
        f"Every one of {len(engine.heads)} heads on {len(sequences)} prompts of {subject.dataset}: operations of "
        "layers, without logits. A pass replays later layers only, shares what prompts begin with, and pads nothing."
    )
    return Table(subject.model, caption, columns, tuple(made))


def _seconds(subject: Subject, ways: Sequence[_Way]) -> Table:
    rows: list[Row] = [
        {
            "way": way.name,
            "gives": way.gives,
            "seconds": way.seconds,
            "hours": way.seconds / 3600,
            "run": f"{way.n_heads} heads x {way.n_prompts} prompts",
        }
        for way in ways
    ]
    columns = (
        Column("way", "way"),
        Column("gives", "gives"),
        Column("seconds", "seconds for all heads", "number"),
        Column("hours", "hours", "number"),
        Column("run", "timed on"),
    )
    caption = (
        f"All {len(subject.engine.heads)} heads on {len(subject.prompts)} prompts of {subject.dataset}, on this "
        f"machine ({subject.engine.device}, {torch.get_num_threads()} threads), once; where fewer were run, scaled. A "
        "machine that is busy with other work gives other numbers; read them against each other."
    )
    return Table(f"{subject.model}, timed", caption, columns, tuple(rows))

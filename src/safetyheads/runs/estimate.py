"""Says what a run computes at most, how long that takes on this machine, and what its prompts can show."""

import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from safetyheads.ablation import SCALING_CONTRIBUTION
from safetyheads.answers.decoding import Decoding, Request, ShortContextWarning, answer, row_bytes, rows_that_fit
from safetyheads.errors import InputError
from safetyheads.files import read_toml
from safetyheads.model.engine import Engine
from safetyheads.model.loading import bits_of_weights, load_shape
from safetyheads.model.names import find_model
from safetyheads.model.packing import TokenSequence
from safetyheads.model.planning import CUDA_TOKENS, Plan, row_sizes
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.runs.config import ModelOptions, duration
from safetyheads.runs.start import silence_libraries
from safetyheads.stats.power import prompts_line, smallest_change_with_power

# A pass is timed over a batch of the last so many layers.
_TIMED_LAYERS = 3
# Decoding is timed over this many tokens, and rows.
_TIMED_TOKENS = 4
_TIMED_ROWS = 64


class Work(NamedTuple):
    """What a run computes at most."""

    token_ids: tuple[tuple[int, ...], ...]
    """Of the prompts that its passes are over."""
    passes: float = 0.0
    """Passes over all heads; other groups count as their share of the heads."""
    answers: int = 0
    """Answers, unablated ones among them."""
    max_new_tokens: int = 1
    stages: tuple[str, ...] = ()
    """Names of the stages, in their order."""
    prompts: PromptSet | None = None
    """Those behind a rate; None where the run measures none."""
    tests: int = 1
    """Tests that share the level."""
    n_seeds: int = 1
    """Answers to a prompt."""
    note: str = ""
    """What the numbers leave out."""
    short_answers: tuple[int, int] = (0, 0)
    """Further answers, and the tokens of the longest of them."""
    rounds: int = 1
    """Times that all shards of the run are started at most, each once the others have ended."""

    @property
    def all_answers(self) -> int:
        """Answers, short ones among them."""
        return self.answers + self.short_answers[0]


class Estimate(NamedTuple):
    """Work, and how long it takes on this machine."""

    work: Work
    n_heads: int
    pass_seconds: float
    """Of a pass over all heads."""
    prompt_seconds: float
    """Of an answer, for reading its prompt."""
    token_seconds: float
    """Of each token of an answer."""
    memory: int
    """Bytes beside the weights."""
    captures: str = ""
    """Where captures are kept, where that is not the device."""

    def answer_seconds(self, n_tokens: float) -> float:
        """Seconds of all answers, at so many tokens each."""
        n_short, longest = self.work.short_answers
        n_read = self.work.answers * n_tokens + n_short * min(n_tokens, longest)
        return self.work.all_answers * self.prompt_seconds + n_read * self.token_seconds

    def __str__(self) -> str:
        work, parts = self.work, []
        if work.passes:
            passes = f"{work.passes:.3g} pass{'es' * (work.passes != 1)}"
            heads = f"{self.n_heads} heads x {len(work.token_ids)} prompts, {passes}"
            parts.append(f"{heads}: about {duration(work.passes * self.pass_seconds)}")
        if work.answers:
            n_short, short = work.short_answers
            longest = f"if all run to {work.max_new_tokens} tokens" + f" ({n_short} of them to {short})" * bool(n_short)
            took = duration(self.answer_seconds(work.max_new_tokens))
            parts.append(f"at most {work.all_answers} answers: about {took} {longest}")
        if self.memory:
            mib = max(1.0, self.memory / 2**20)
            parts.append(f"{f'{mib / 1024:.1f} GiB' if mib >= 1024 else f'{mib:.0f} MiB'} beside the weights")
        parts += [self.captures] * bool(self.captures)
        return ". ".join(["; ".join(parts), *[work.note] * bool(work.note)])

    @property
    def power(self) -> str:
        """What the prompts can show, in a sentence; empty where the run measures no rate."""
        work = self.work
        if work.prompts is None:
            return ""
        n, n_clusters = len(work.prompts), work.prompts.n_clusters
        return prompts_line(n, heads=work.tests, n_seeds=work.n_seeds, n_clusters=n_clusters)

    def as_json(self) -> dict[str, Any]:
        """What a dry run prints: the plan, seconds, bytes, answers at most, and the smallest effect that can show."""
        work, least = self.work, None
        if work.prompts is not None:
            n = work.prompts.n_clusters or len(work.prompts)
            least = smallest_change_with_power(n, tests=work.tests, n_seeds=work.n_seeds)
        seconds = {"passes": work.passes * self.pass_seconds, "answers": self.answer_seconds(work.max_new_tokens)}
        return {
            "dry_run": True,
            "stages": list(work.stages),
            "passes": work.passes,
            "answers": work.all_answers,
            "rounds": work.rounds,
            "seconds": {**seconds, "at_most": sum(seconds.values())},
            "memory_bytes": self.memory,
            "smallest_change": least,
            "lines": [line for line in (str(self), self.power) if line],
        }


def estimate(engine: Engine, work: Work) -> Estimate:
    """How long the work takes, from a batch of each kind that is timed now."""
    pass_seconds, memory, answer_seconds, captures = 0.0, 0, (0.0, 0.0), ""
    if work.passes:
        sequences = [TokenSequence(token_ids) for token_ids in work.token_ids]
        layout = engine.plan(sequences)
        pass_seconds, memory = estimate_pass(engine, sequences, layout)
        captures = captures_line(engine, sequences, layout)
    if work.answers:
        n_rows = min(work.answers, _TIMED_ROWS)
        answer_seconds = estimate_answer(engine, work.token_ids, n_rows, work.max_new_tokens)
        longest = max(map(len, work.token_ids)) + work.max_new_tokens
        memory = max(memory, min(work.answers, rows_that_fit(engine, longest)) * row_bytes(engine, longest))
    return Estimate(work, len(engine.heads), pass_seconds, *answer_seconds, memory, captures)


def captures_line(engine: Engine, sequences: Sequence[TokenSequence], layout: Plan) -> str:
    """Where captures are kept during a pass; empty where that is the device."""
    place, n_bytes = engine.captures_place(sequences, layout)
    where = {"host": "in the host's memory", "disk": "on disk"}.get(place)
    return f"captures of {n_bytes / 2**20:.0f} MiB {where}" if where else ""


def chain_lines(rounds: int, n_shards: int) -> list[str]:
    """How often the shards of a run are started, as job arrays that depend on each other."""
    array = f"sbatch --parsable --array=1-{n_shards}"
    lines = [f"{n_shards} shards end after {rounds} rounds at most, or in one where each has --wait"]
    again = f"for round in $(seq 2 {rounds}); do job=$({array} --dependency=afterany:$job JOB); done"
    return lines + [f"job=$({array} JOB); {again}"] * (rounds > 1)


def estimate_pass(engine: Engine, sequences: Sequence[TokenSequence], layout: Plan) -> tuple[float, int]:
    """Seconds of scoring every head once, and bytes beside the weights.

    A batch of the last layers is timed; the whole pass is taken to run at its rate of counted operations.
    """
    begins, with_heads = engine.n_layers - 1 - _TIMED_LAYERS, engine.architecture.with_heads
    start = next((layer for layer in with_heads if layer >= begins), with_heads[-1])
    timed = replace(layout, rows=layout.rows[:1])
    captures = engine.captured(sequences, (), SCALING_CONTRIBUTION, timed, start)
    groups = [(head,) for head in engine.heads if head.layer == start][: layout.groups_per_batch]
    seconds = []
    for _ in range(3):  # the first run on a shape sets things up
        started = time.monotonic()
        engine.replayed(captures, groups, SCALING_CONTRIBUTION, start)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        seconds.append(time.monotonic() - started)
    costs, rows = engine.costs, row_sizes(sequences, layout)
    rate = len(groups) * costs.replay_flops(row_sizes(sequences, timed), start) / min(seconds[1:])
    flops = costs.forward_flops(rows) + costs.scan_flops(rows, engine.heads)
    return flops / rate, engine.memory_estimate(sequences, layout)


def estimate_answer(
    engine: Engine, encoded: Sequence[tuple[int, ...]], n_rows: int, max_new_tokens: int
) -> tuple[float, float]:
    """Seconds of an answer for its prompt, and for each of its tokens: ``n_rows`` together, or as many as fit."""
    n_rows = min(n_rows, rows_that_fit(engine, max(map(len, encoded)) + max_new_tokens))
    requests = [Request(encoded[number % len(encoded)]) for number in range(n_rows)]
    seconds = []
    for n_tokens in (1, 1 + min(_TIMED_TOKENS, max_new_tokens)):
        started = time.monotonic()
        with warnings.catch_warnings():
            # The run itself warns where the context is short; here the warning would be about these few tokens.
            warnings.simplefilter("ignore", ShortContextWarning)
            answer(engine, requests, Decoding(n_tokens))
        seconds.append(time.monotonic() - started)
    reading, steps = seconds[0], max(seconds[1] - seconds[0], 0.0) / min(_TIMED_TOKENS, max_new_tokens)
    return reading / n_rows, steps / n_rows


# A machine that is named: a run is counted on it from the model's config and tokenizer alone, and no weights are read.

# What is reached of a rate that a vendor states: an assumption, and said so wherever a number comes of it.
_REACHED = 0.4


class Device(NamedTuple):
    """What a vendor states of a GPU: GB, dense TFLOP/s in bfloat16 and float32, TB/s of memory, GB/s to the host."""

    memory: float
    half: float
    single: float
    bandwidth: float
    link: float


DEVICES = {name: Device(*stated) for name, stated in read_toml(Path(__file__).with_name("machines.toml")).items()}
"""GPUs that can be named."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Equal GPUs that hold one model together, such as ``2xH100``; they compute one after another."""

    name: str
    device: Device
    count: int
    rate: float | None
    """TFLOP/s that were measured on it, where somebody did."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """A machine as ``--machine`` takes it: ``H100``, ``2xH100``, or with a measured rate, ``H100@410``."""
        match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([A-Za-z0-9-]+)(?:@(\d{1,6}(?:\.\d+)?))?", text)
        device = None if match is None else DEVICES.get(match[2].upper())
        if match is None or device is None or (match[3] is not None and not float(match[3])):
            raise InputError(f"unknown machine {text!r}; known are {', '.join(DEVICES)}, as H100, 2xH100 or H100@410")
        return cls(text, device, int(match[1] or 1), None if match[3] is None else float(match[3]))

    def engine(self, config: ModelOptions) -> Engine:
        """The model's shape, which can be counted and not run; its budget is half of what this machine has free."""
        if config.adapter is not None:
            raise InputError("--machine counts a model without an adapter, which adds little; leave out --adapter")
        silence_libraries()
        model, tokenizer = load_shape(find_model(config.model)[0], config.load_options)
        free = self.device.memory - bits_of_weights(model) / 8e9 / self.count
        # Where weights are offloaded, a tenth of the memory is left for batches.
        budget = config.load_options.memory_bytes or int(0.5e9 * max(free, 0.1 * self.device.memory))
        return Engine(model, tokenizer, config.model, memory_budget=budget, token_budget=CUDA_TOKENS)

    def estimate(self, engine: Engine, work: Work) -> Estimate:
        """How long the work takes as counted: operations and bytes at the machine's rate."""
        stated, costs = self.device.half if engine.dtype.itemsize < 4 else self.device.single, engine.costs
        rate = (self.rate or _REACHED * stated) * 1e12
        sequences = [TokenSequence(token_ids) for token_ids in work.token_ids]
        layout = engine.plan(sequences)
        rows, weights = row_sizes(sequences, layout), bits_of_weights(engine.model) / 8e9
        offloaded = max(0.0, weights - 0.9 * self.device.memory * self.count)
        move = offloaded / self.device.link
        # A batch moves the weights of the layers that it runs: over all heads, half of them on average.
        n_batches = len(engine.batches([(head,) for head in engine.heads], layout)) * len(rows)
        pass_seconds = (costs.forward_flops(rows) + costs.scan_flops(rows, engine.heads)) / rate + move / 2 * n_batches
        mean, longest = sum(map(len, work.token_ids)) / len(sequences), max(map(len, work.token_ids))
        longest += work.max_new_tokens
        n_rows = min(max(1, work.all_answers), rows_that_fit(engine, longest))
        token = engine.n_layers * (costs.token + costs.pair * mean) / rate
        step = max(weights / (1e3 * self.device.bandwidth * _REACHED), n_rows * token) + move
        memory = max(engine.memory_estimate(sequences, layout), n_rows * row_bytes(engine, longest))
        rated = f"{self.rate:g} TFLOP/s" if self.rate else f"{_REACHED:.0%} of what is stated for it"
        notes = [work.note, f"Counted for {self.name} at {rated}, not measured."]
        notes += [f"Weights take {weights:.1f} GB on {self.count} x {self.device.memory:g} GB."]
        notes += [f"{offloaded:.1f} GB of them lie in the host's memory and move with each batch."] * (offloaded > 0)
        work, captures = work._replace(note=" ".join(filter(None, notes))), captures_line(engine, sequences, layout)
        return Estimate(work, len(engine.heads), pass_seconds, mean * token, step / n_rows, memory, captures)

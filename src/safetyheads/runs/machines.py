"""Counts a run on a machine that is named, from the model's config and tokenizer alone; no weights are read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from safetyheads.answers.decoding import row_bytes, rows_that_fit
from safetyheads.errors import InputError
from safetyheads.model.engine import Engine
from safetyheads.model.loading import bits_of_weights, load_shape
from safetyheads.model.names import find_model
from safetyheads.model.planning import CUDA_TOKENS, TokenSequence, row_sizes
from safetyheads.runs.estimate import Estimate, Work, captures_line
from safetyheads.runs.start import silence_libraries

if TYPE_CHECKING:
    from safetyheads.runs.config import ModelOptions

# What is reached of a rate that a vendor states: an assumption, and said so wherever a number comes of it.
_REACHED = 0.4


class Device(NamedTuple):
    """What a vendor states of a GPU: GB, dense TFLOP/s in bfloat16 and float32, TB/s of memory, GB/s to the host."""

    memory: float
    half: float
    single: float
    bandwidth: float
    link: float


DEVICES = {
    "A100": Device(80, 312, 19.5, 2.04, 32),
    "A100-40": Device(40, 312, 19.5, 1.56, 32),
    "H100": Device(80, 989, 67, 3.35, 64),
    "H200": Device(141, 989, 67, 4.8, 64),
    "L40S": Device(48, 362, 91.6, 0.86, 32),
}
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
    def parse(cls, text: str) -> Machine:
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
        work, captures = replace(work, note=" ".join(filter(None, notes))), captures_line(engine, sequences, layout)
        return Estimate(work, len(engine.heads), pass_seconds, mean * token, step / n_rows, memory, captures)

"""The ways of one Generalized Ships pass that the scan's bench compares. Owns what each runs and what is timed.

(a) ``plain``, (b) ``hooks`` and (d) ``ours`` are here, (c) is ``peers/transformerlens.py``; all but ours are one
function from a head to the stacked last states, timed by :func:`timed`. It knows no command line.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from shapes import build, prompts

if TYPE_CHECKING:
    from shapes import Shape
    from torch import Tensor

EPSILON = 1e-5
"""Factor of the query under undifferentiated attention (Eq 7)."""

HeadOf: TypeAlias = tuple[int, int]
"""Layer and query head, counted from 0."""
States: TypeAlias = "Callable[[HeadOf | None], Tensor]"
"""From an ablated head, or none, to the prompts' last states [n_prompts, d_model] after the final norm."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every way is to do."""

    shape: Shape
    """The model's sizes."""
    n_prompts: int
    """How many prompts."""
    prefix: int = 0
    """Tokens before each, the same for all."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    dtype: torch.dtype = torch.float32
    """Of the weights; :func:`plain` of a small shape keeps to float32."""
    n_sampled: int = 4
    """Heads that are timed where not all are, and whose scores are told."""
    batch: int = 128
    """Most prompts in one batch."""

    @property
    def sample(self) -> tuple[HeadOf, ...]:
        """The heads that are timed."""
        return self.shape.sample(self.n_sampled)

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids."""
        return prompts(self.shape, self.n_prompts, self.prefix)

    def model(self, attention: str, dtype: torch.dtype | None = None) -> Any:
        """The model on the device."""
        return build(self.shape, attention, self.device, dtype or self.dtype)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one way."""

    seconds: float
    """Of the whole pass, the unablated run included; scaled where ``sampled``."""
    svd_seconds: float | None
    """Of these, in singular value decompositions; None where they are not apart."""
    sampled: int | None
    """Heads that were timed, where not all were."""
    angles: list[float]
    """Generalized Ships of the sampled heads, in degrees."""
    dtype: str
    """Of the weights."""
    peak_bytes: int
    """Most memory: CUDA's allocations on a GPU, the process's resident set on a CPU; weights included."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts padded on the right."""

    token_ids: Tensor
    """int64 [n_prompts, n_tokens]."""
    mask: Tensor
    """int64 [n_prompts, n_tokens]: 1 where a token is real."""

    @property
    def last(self) -> tuple[Tensor, Tensor]:
        """Indices of each prompt's last real token."""
        return torch.arange(len(self.mask), device=self.mask.device), self.mask.sum(dim=1) - 1


def padded(work: Work) -> list[Batch]:
    """The prompts in order, at most ``work.batch`` a batch."""
    token_ids, made = work.prompts, []
    for at in range(0, len(token_ids), work.batch):
        rows = token_ids[at : at + work.batch]
        longest = max(len(row) for row in rows)
        ids = [row + [0] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        made.append(Batch(torch.tensor(ids, device=work.device), torch.tensor(mask, device=work.device)))
    return made


@contextmanager
def ablated(model: Any, head: HeadOf | None) -> Iterator[None]:
    """Within, a forward hook scales the head's columns of the queries; RoPE is linear, so this is Eq 7."""
    if head is None:
        yield
        return
    layer, index = head
    attention = model.model.layers[layer].self_attn
    columns = slice(index * attention.head_dim, (index + 1) * attention.head_dim)

    def scale(_: torch.nn.Module, __: Any, output: Tensor) -> None:
        output[..., columns] *= EPSILON

    handle = attention.q_proj.register_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


def plain(work: Work) -> Measured:
    """(a) One head, one prompt, a full forward with logits at all positions, eager: what the paper's code does."""
    dtype = work.dtype if work.shape.is_big else torch.float32
    model = work.model("eager", dtype)
    token_ids = [torch.tensor([row], device=work.device) for row in work.prompts]

    def state(ids: Tensor) -> Tensor:
        hidden: Tensor = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        return hidden[0, -1]

    def states(head: HeadOf | None) -> Tensor:
        with ablated(model, head):
            return torch.stack([state(ids) for ids in token_ids])

    return timed(work, states, dtype, warm_up=lambda: state(token_ids[0]))


def hooks(work: Work) -> Measured:
    """(b) One head, all prompts in padded batches, sdpa, no logits: what a good user writes with PyTorch hooks."""
    model = work.model("sdpa")
    return timed(work, hooked_states(model, padded(work)), work.dtype)


def hooked_states(model: Any, batches: list[Batch]) -> States:
    """The states that a transformers model gives under a hook; also what (c) is checked against."""

    def states(head: HeadOf | None) -> Tensor:
        parts = []
        with ablated(model, head):
            for batch in batches:
                output = model.model(input_ids=batch.token_ids, attention_mask=batch.mask, use_cache=False)
                parts.append(output.last_hidden_state[batch.last])
        return torch.cat(parts)

    return states


def ours(work: Work) -> Measured:
    """(d) The package's pass over all heads; nothing is sampled but the scores that are told."""
    from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
    from safetyheads.measures.head_pass import HeadPass, Readouts, Score
    from safetyheads.model.engine import Engine
    from safetyheads.model.loading import use_our_attention
    from safetyheads.model.packing import TokenSequence

    model = work.model("sdpa")
    use_our_attention(model)
    engine = Engine(model, tokenizer=None, name="bench")
    sequences, angle = [TokenSequence(tuple(row)) for row in work.prompts], Score("generalized_ships_prompt")

    def begun() -> HeadPass:
        return HeadPass(engine, sequences, UNDIFFERENTIATED_ATTENTION, Readouts(angles=(angle,)))

    groups = [(head,) for head in engine.heads]
    warm = begun()
    warm.measure(groups[: warm.plan.groups_per_batch])
    clock = Clock(work.device)
    angles = begun().measure(groups)[angle.label]
    seconds = clock.lap()
    told = [float(angles[work.shape.heads.index(head)]) for head in work.sample]
    return Measured(seconds, None, None, told, _name(work.dtype), peak_bytes(work.device), versions())


class Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._at = 0.0
        self.lap()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self._device != "cpu":
            torch.cuda.synchronize()
        before, self._at = self._at, time.perf_counter()
        return self._at - before


def timed(
    work: Work, states: States, dtype: torch.dtype, warm_up: Callable[[], object] | None = None, library: str = ""
) -> Measured:
    """Time the unablated run and the sampled heads, and scale these to all heads.

    Args:
        work: what is done.
        states: the way.
        dtype: of the weights.
        warm_up: what is run once before, untimed; one ablated head if not given.
        library: told among the versions.
    """
    sample = work.sample
    with torch.inference_mode():
        (warm_up or (lambda: states(sample[0])))()
        direction(torch.randn(work.n_prompts, work.shape.d_model, device=work.device))
        clock = Clock(work.device)
        unablated = states(None)
        of_unablated = clock.lap()
        stacks = [states(head) for head in sample]
        of_heads = clock.lap()
        reference = direction(unablated)
        angles = torch.stack([angle_degrees(reference, direction(stack)) for stack in stacks]).tolist()
        of_svd = clock.lap()
    scale = len(work.shape.heads) / len(sample)
    svd_seconds = of_svd * (len(work.shape.heads) + 1) / (len(sample) + 1)
    return Measured(
        seconds=of_unablated + of_heads * scale + svd_seconds,
        svd_seconds=svd_seconds,
        sampled=len(sample),
        angles=angles,
        dtype=_name(dtype),
        peak_bytes=peak_bytes(work.device),
        versions=versions(library),
    )


def direction(states: Tensor) -> Tensor:
    """The first left singular vector [n_prompts] of states [n_prompts, d_model], in float64."""
    left: Tensor = torch.linalg.svd(states.double(), full_matrices=False).U
    return left[:, 0]


def angle_degrees(first: Tensor, second: Tensor) -> Tensor:
    """The angle between two unit vectors [n_prompts] whose signs mean nothing; exact for small ones too."""
    overlap = first @ second
    return torch.rad2deg(torch.atan2((second - overlap * first).norm(), overlap.abs()))


def peak_bytes(device: str) -> int:
    """Most memory that this process has had so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def versions(library: str = "") -> dict[str, str]:
    """Of torch, transformers and the named library."""
    return {name: version(name) for name in ("torch", "transformers", library) if name}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PASSES: dict[str, Callable[[Work], Measured]] = {"plain": plain, "hooks": hooks, "ours": ours}
"""The ways that need nothing but the package's own environment."""

"""The logits in first order. Owns the forward and backward passes of a screening; makes no forecast of them.

One forward over packed prompts keeps each head's output, as a node of autograd's graph, and by how much the ablation
changes it; one backward pass for each number read off the logits gives its slope at every head. Slope times change,
summed over a prompt's tokens, is how far ablating the head moves that number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.heads import Group
from safetyheads.measures.head_pass import log_odds
from safetyheads.model.attention import AttentionCall, RowAblation
from safetyheads.model.memory import bytes_per_token
from safetyheads.model.planning import PackedRow, TokenSequence, pack
from safetyheads.model.replay import wanted_states

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


@dataclass(frozen=True, slots=True)
class Point:
    """Where gradients are taken, and of what."""

    at: float
    """How far all heads together are ablated: 0 is the unablated model."""
    n_tokens: int
    """m: most probable next tokens whose logits are linearised."""
    n_samples: int = 0
    """Tokens sampled from the others."""

    def __post_init__(self) -> None:
        if self.n_tokens < 1 or self.n_samples < 0:
            raise InputError(f"a point follows one token or more; got {self.n_tokens}, {self.n_samples} samples")

    @property
    def n_columns(self) -> int:
        """Backward passes it costs."""
        return self.n_tokens + self.n_samples


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which next tokens are followed, for each state; by the unablated model."""

    tokens: Tensor
    """int64 [n_states, m]: the most probable, as many as any point asks for."""
    samples: Tensor
    """int64 [n_states, n_samples]: drawn from all but the first point's tokens."""


@dataclass(frozen=True, slots=True)
class Linear:
    """Columns read off the next token's logits, and how each head's ablation moves them in first order."""

    point: Point
    chosen: Chosen
    tokens: Tensor
    """float64 [n_states, most tokens of any point]: log-probabilities of the followed tokens."""
    others: Tensor
    """float64, same shape: log-probability of all but the first, all but the first two, and so on."""
    refusal: Tensor
    """float64 [n_states]: log-odds of the openers; zeros without."""
    moves: Tensor
    """float64 [n_states, n_layers, n_heads, columns]: of log p(token) / p(others), of log p(sample | others), of the
    openers' log-odds. Zeros where no gradients were asked for, NaN where a layer has no such head."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is read off the logits of a state, and where."""

    ablation: Ablation
    point: Point
    openers: tuple[int, ...]
    common: Group = ()
    """Heads ablated for good."""

    def columns(self, log_probabilities: Tensor, chosen: Chosen) -> Tensor:
        """float64 [n_states, columns] of log-probabilities [n_states, vocabulary]."""
        tokens, samples = chosen.tokens[:, : self.point.n_tokens], chosen.samples[:, : self.point.n_samples]
        rest = log_probabilities.scatter(-1, tokens, -torch.inf)
        others = rest.logsumexp(dim=-1, keepdim=True)
        parts = [log_probabilities.gather(-1, tokens) - others, rest.gather(-1, samples) - others]
        if self.openers:
            parts.append(log_odds(log_probabilities, self.openers)[:, None])
        return torch.cat(parts, dim=-1)


def linearise(
    engine: Engine,
    sequences: Sequence[TokenSequence],
    asked: Asked,
    n_tokens: int,
    chosen: Chosen | None,
    gradients: bool = True,
) -> Linear:
    """The columns of every wanted token; where nothing is chosen yet, this model, unablated, chooses."""
    parts: list[Linear] = []
    n_states = sum(sequence.n_wanted for sequence in sequences)
    uniforms = torch.rand(n_states, asked.point.n_samples, generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        stack.enter_context(engine.ablated_rows([()], asked.ablation))  # refuses while another is in force
        stack.enter_context(_frozen(engine.model))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for members in _rows(engine, sequences):
            # Each prompt has its own prefix here: gradients of a shared one would be sums over the prompts.
            row = pack(sequences, members, engine.device, shares_prefix=False)
            done = sum(len(part.tokens) for part in parts)
            here = slice(done, done + len(row.wanted))
            known = None if chosen is None else Chosen(chosen.tokens[here], chosen.samples[here])
            parts.append(_linear_row(engine, row, asked, n_tokens, known, uniforms[here]))
    return Linear(
        asked.point,
        Chosen(
            torch.cat([part.chosen.tokens for part in parts]),
            torch.cat([part.chosen.samples for part in parts]),
        ),
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "others", "refusal", "moves")),
    )


def _linear_row(
    engine: Engine, row: PackedRow, asked: Asked, n_tokens: int, chosen: Chosen | None, uniforms: Tensor
) -> Linear:
    """One forward over a packed row, and its backward passes where gradients are recorded."""
    outputs: list[Tensor] = []  # of each layer's heads, [1, n_tokens, n_heads, d_value]
    changes: list[Tensor] = []  # by the ablation of each head
    calls = _compared(engine, row, asked, outputs, changes)
    logits = engine.differentiable_logits(wanted_states(engine.architecture, row, calls, 1)[0])
    log_probabilities = torch.log_softmax(logits.double(), dim=-1)
    if chosen is None:
        chosen = _choose(log_probabilities.detach(), n_tokens, asked.point, uniforms)
    here = Chosen(chosen.tokens.to(logits.device), chosen.samples.to(logits.device))
    columns = asked.columns(log_probabilities, here)
    prompts = row.packing.segments - 1  # of each token
    prompt_of = prompts[row.wanted]
    moves = torch.zeros(len(columns), engine.n_layers, engine.n_heads, columns.shape[1], dtype=torch.float64)
    shapes = engine.architecture.shapes
    for layer, shape in enumerate(shapes):
        moves[:, layer, shape.n_heads if shape else 0 :] = torch.nan
    for states in _by_turn(prompt_of.tolist()) if outputs else ():
        for column in range(columns.shape[1]):
            # Prompts of a row do not see each other, so one backward pass of the sum is one of each.
            gradients = torch.autograd.grad(columns[states, column].sum(), outputs, retain_graph=True)
            for layer, gradient, change in zip(engine.architecture.with_heads, gradients, changes, strict=True):
                by_token = (gradient * change)[0].double().sum(dim=-1)  # [n_tokens, n_heads]
                by_prompt = by_token.new_zeros(len(row.members), by_token.shape[1])
                by_prompt.index_add_(0, prompts.to(by_token.device), by_token)
                moves[states, layer, : by_token.shape[1], column] = by_prompt.to(prompts.device)[
                    prompt_of[states]
                ].cpu()
    refusal = columns[:, -1].detach().cpu() if asked.openers else torch.zeros(len(columns), dtype=torch.float64)
    with torch.no_grad():
        followed = log_probabilities.gather(-1, here.tokens).cpu()
        others = torch.stack(
            [
                log_probabilities.scatter(-1, here.tokens[:, :k], -torch.inf).logsumexp(dim=-1)
                for k in range(1, n_tokens + 1)
            ],
            dim=-1,
        )
    return Linear(asked.point, chosen, followed, others.cpu(), refusal, moves)


def _choose(log_probabilities: Tensor, n_tokens: int, point: Point, uniforms: Tensor) -> Chosen:
    """The most probable tokens, and samples of the others by their cumulated probabilities at ``uniforms``."""
    tokens = log_probabilities.topk(n_tokens, dim=-1).indices
    rest = log_probabilities.exp().scatter(-1, tokens[:, : point.n_tokens], 0.0).cumsum(dim=-1)
    at = uniforms.to(rest) * rest[:, -1:]
    samples = torch.searchsorted(rest, at, right=True).clamp_max(rest.shape[-1] - 1)
    return Chosen(tokens.cpu(), samples.cpu())


def _compared(
    engine: Engine, row: PackedRow, asked: Asked, outputs: list[Tensor], changes: list[Tensor]
) -> dict[int, AttentionCall]:
    """Calls under which each layer files its heads' outputs, as autograd's nodes, and the ablation's changes."""

    def call(layer: int) -> AttentionCall:
        shape = engine.architecture.shapes[layer]
        everywhere = torch.ones(1, shape.n_heads if shape else 0, dtype=torch.bool, device=engine.device)
        ablated_already = torch.zeros_like(everywhere)
        ablated_already[0, [head.index for head in asked.common if head.layer == layer]] = True

        def compare(plain: Tensor, ablated: Tensor) -> Tensor:
            output = torch.where(ablated_already.to(plain.device)[:, None, :, None], ablated, plain)
            if not torch.is_grad_enabled():
                return output
            change = ablated - output
            output = output + asked.point.at * change
            output = output if output.requires_grad else output.detach().requires_grad_()
            changes.append(change.detach())
            outputs.append(output)
            return output

        segments = row.segments if engine.capabilities.segments and len(row.members) > 1 else None
        return AttentionCall((RowAblation(asked.ablation, everywhere),), compare=compare, segments=segments)

    return {layer: call(layer) for layer in engine.architecture.with_heads}


def _by_turn(prompt_of: Sequence[int]) -> Iterator[list[int]]:
    """The states of a row, so that each turn holds at most one of each prompt."""
    turns: dict[int, list[int]] = {}
    seen: dict[int, int] = {}
    for state, prompt in enumerate(prompt_of):
        turns.setdefault(seen.setdefault(prompt, 0), []).append(state)
        seen[prompt] += 1
    yield from turns.values()


def _rows(engine: Engine, sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Which sequences share a row: as many as memory lets keep all layers' activations for the backward passes."""
    budget = engine.tokens_that_fit(engine.n_layers * bytes_per_token(engine))
    rows: list[list[int]] = []
    size = 0
    for number, sequence in enumerate(sequences):
        size += len(sequence.token_ids)
        if not rows or size > budget or not engine.capabilities.packs:
            rows.append([])
            size = len(sequence.token_ids)
        rows[-1].append(number)
    return rows


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within, no parameter asks for a gradient: only the heads' outputs do."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)

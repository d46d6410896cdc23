"""Screening: which heads to score exactly, from a few backward passes. Owns the linear forecast, not the scores.

The gradient of a KL divergence is zero where nothing is ablated, so the logits are linearised and not the KL:

1. one forward keeps each head's output, and by how much the ablation changes it (one more attention call a layer);
2. one backward for each of the m most probable next tokens gives d logit / d output at every head;
3. output change times gradient, summed over a prompt's tokens, is how far the head's ablation moves that logit;
4. the forecast is the exact KL between the distributions over these tokens, and all others as one, before and after.

A refusal that sits firmly has hardly a gradient, and one head may yet tip it. So the gradients are taken at further
points too, where all heads together are ablated in part (0.8 of the way) or the other way (-0.2), and the largest
forecast counts.

A forecast proposes candidates. What is shown as a score is measured (:mod:`safetyheads.head_pass`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from safetyheads.ablation import Ablation
from safetyheads.attention import AttentionCall, RowAblation, attention_calls
from safetyheads.batching import PackedRow, TokenSequence, pack, token_budget
from safetyheads.errors import InputError
from safetyheads.head_pass import log_odds
from safetyheads.heads import Group, Head, within
from safetyheads.replay import decode, first_of
from safetyheads.scores import HeadScores

if TYPE_CHECKING:
    from safetyheads.engine import Engine

Screened: TypeAlias = Literal["mean_ships", "refusal_score"]
"""The scores that are forecast."""

N_TOKENS = 2
"""m: most probable next tokens whose logits are linearised."""
FURTHER = (-0.2, 0.8)
"""How far all heads together are ablated at the further points (bench/LOG.md has the trials: without them and m = 4
the exact third stood up to 14th, with them up to 8th)."""


@dataclass(frozen=True, slots=True)
class Screening:
    """What ablating each head alone, beside the common heads, is forecast to do. Estimates, never scores."""

    ships: Tensor
    """float64 [n_prompts, n_layers, n_heads], nats: largest forecast KL of the next token (Eq 9), m + 1 classes."""
    refusal_score: Tensor | None
    """float64 [n_prompts, n_layers, n_heads], nats: largest forecast drop of the refusal's log-odds; None without
    openers."""
    moves: Tensor
    """float64 [n_states, n_layers, n_heads, m]: forecast moves of log p(token) / p(all others) at the first point, a
    state a wanted token."""
    probabilities: Tensor
    """float64 [n_states, m + 1]: of the m tokens and of all others, common heads ablated."""
    common: Group = ()
    """Heads that are ablated throughout; they have no forecast of their own (NaN)."""

    def table(self, name: Screened = "mean_ships") -> HeadScores:
        """The forecasts over all prompts, [n_layers, n_heads].

        Mean Ships go through the mean of square roots: a forecast grows with the square of a move where the KL that
        it forecasts levels off, and a few prompts would decide alone.
        """
        if name == "mean_ships":
            values = self.ships.sqrt().mean(dim=0).square()
        elif self.refusal_score is not None:
            values = self.refusal_score.mean(dim=0)
        else:
            raise InputError("the refusal score was not screened: no openers were given")
        return HeadScores(values, f"screened_{name}", "nats", 0.0)

    def candidates(self, k: int, name: Screened = "mean_ships") -> Group:
        """The ``k`` heads with the highest forecasts, best first; fewer where there are no more."""
        table = self.table(name)
        return table.top(min(k, int(torch.isfinite(table.values).sum())))

    def pairs(self, heads: Sequence[Head], k: int) -> tuple[tuple[Head, Head], ...]:
        """The ``k`` pairs of ``heads`` whose joint effect is forecast to differ most from the sum of their own.

        The cross term of two heads is a_h' F a_h', F the Fisher metric of the m + 1 classes: above 0 they add up to
        more (synergy), below 0 they undo each other. Proposals only: sizes can be wrong by an order of magnitude,
        and pairs that stand in for each other may not show at all.
        """
        moved = torch.stack([self.moves[:, head.layer, head.index] for head in heads], dim=1)
        moved = torch.cat([moved, torch.zeros_like(moved[..., :1])], dim=-1)  # [n_states, heads, m + 1]
        centred = moved - (self.probabilities[:, None] * moved).sum(dim=-1, keepdim=True)
        cross = torch.einsum("nhm,nm,ngm->hg", centred, self.probabilities, centred).abs()
        numbers = sorted(combinations(range(len(heads)), 2), key=lambda pair: -float(cross[pair]))
        return tuple((heads[first], heads[second]) for first, second in numbers[:k])


@torch.inference_mode(False)
def screen(
    engine: Engine,
    sequences: Sequence[TokenSequence],
    ablation: Ablation,
    openers: Sequence[int] = (),
    common: Group = (),
    n_tokens: int = N_TOKENS,
    further: Sequence[float] = FURTHER,
) -> Screening:
    """Forecast what ablating each head does to the next token.

    Args:
        engine: the model.
        sequences: the prompts; several wanted tokens are averaged, and cost their backward passes each.
        ablation: of every head.
        openers: first tokens of refusals, to forecast the refusal score too.
        common: heads ablated beside each head, as in a search's later steps.
        n_tokens: m, the most probable next tokens that are linearised.
        further: points beside the unablated one where gradients are taken, as shares of the ablation of all heads;
            each costs a forward and m backward passes, one more with openers.

    Raises:
        InputError: ``n_tokens`` below 1 or the whole vocabulary; a common head that the model does not have.
    """
    if not 1 <= n_tokens < engine.architecture.vocabulary_size:
        raise InputError(f"screening linearises at least one token and not all; got {n_tokens}")
    common = within(common, engine.n_layers, engine.n_heads)
    asked = _Asked(ablation, n_tokens, tuple(openers))
    # Without common heads, the first point is the unablated model.
    unablated = _linearise(engine, sequences, replace(asked, at=None if common else 0.0))
    at_points = [] if common else [unablated]
    for at in (*[0.0] * bool(common), *further):
        at_points.append(_linearise(engine, sequences, replace(asked, common=common, at=at), unablated.tokens))
    start = at_points[0]
    counts = torch.tensor([sequence.n_wanted for sequence in sequences])
    prompt_of = torch.repeat_interleave(torch.arange(len(counts)), counts)
    forecasts = torch.stack([_divergence(unablated.values, start.values, at.moves, n_tokens) for at in at_points])
    forecast = forecasts.amax(dim=0)  # [n_states, n_layers, n_heads]
    per_prompt = torch.zeros(len(counts), *forecast.shape[1:], dtype=forecast.dtype)
    ships = per_prompt.index_add(0, prompt_of, forecast) / counts[:, None, None]
    refusal = None
    if openers:
        firsts = torch.tensor([0, *counts[:-1].tolist()]).cumsum(0)
        before, after = unablated.values[firsts, n_tokens], start.values[firsts, n_tokens]
        drops = torch.stack([-at.moves[firsts][..., n_tokens] for at in at_points]).amax(dim=0)
        refusal = (before - after)[:, None, None] + drops
    for head in common:
        for values in (ships, *([refusal] if refusal is not None else [])):
            values[:, head.layer, head.index] = float("nan")
    probabilities = _log_classes(start.values[:, :n_tokens]).exp()
    return Screening(ships, refusal, start.moves[..., :n_tokens], probabilities, common)


def _divergence(unablated: Tensor, start: Tensor, moves: Tensor, n_tokens: int) -> Tensor:
    """Forecast KL [n_states, n_layers, n_heads], from where the moves start; both [n_states, columns]."""
    reference = _log_classes(unablated[:, None, None, :n_tokens])
    moved = _log_classes(start[:, None, None, :n_tokens] + moves[..., :n_tokens])
    # KL is never negative; what rounding leaves below 0 is 0.
    return (reference.exp() * (reference - moved)).sum(dim=-1).clamp_min(0.0)


@dataclass(frozen=True, slots=True)
class _Linear:
    """Columns read off the next token's logits, and how each head's ablation moves them in first order."""

    tokens: Tensor
    """int64 [n_states, m]: the m most probable."""
    values: Tensor
    """float64 [n_states, m, and one for the openers]: log p(token) / p(all others), log-odds of the openers."""
    moves: Tensor
    """float64 [n_states, n_layers, n_heads, columns]; zeros where no gradients were asked for."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is read off the logits of a state, and where."""

    ablation: Ablation
    n_tokens: int
    openers: tuple[int, ...]
    common: Group = ()
    """Heads ablated for good."""
    at: float | None = None
    """How far all others are ablated where gradients are taken; None takes none."""

    @property
    def n_columns(self) -> int:
        """How many numbers are read, and backward passes they need."""
        return self.n_tokens + bool(self.openers)

    def read(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """float64 [n_states, n_columns] of logits [n_states, vocabulary]."""
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        others = log_probabilities.scatter(-1, tokens, -torch.inf).logsumexp(dim=-1, keepdim=True)
        columns = log_probabilities.gather(-1, tokens) - others
        if self.openers:
            columns = torch.cat([columns, log_odds(log_probabilities, self.openers)[:, None]], dim=-1)
        return columns


def _linearise(
    engine: Engine, sequences: Sequence[TokenSequence], asked: _Asked, tokens: Tensor | None = None
) -> _Linear:
    """The columns of every wanted token; ``tokens`` are those of the unablated model, where it has spoken already."""
    parts: list[_Linear] = []
    with ExitStack() as stack:
        stack.enter_context(engine.ablated_rows([()], asked.ablation))  # refuses while another is in force
        stack.enter_context(_frozen(engine.model))
        stack.enter_context(torch.set_grad_enabled(asked.at is not None))
        for members in _rows(engine, sequences):
            # Each prompt has its own prefix here: gradients of a shared one would be sums over the prompts.
            row = pack(sequences, members, engine.device, shares_prefix=False)
            done = sum(len(part.tokens) for part in parts)
            known = None if tokens is None else tokens[done : done + len(row.wanted)]
            parts.append(_linear_row(engine, row, asked, known))
    return _Linear(*(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "values", "moves")))


def _linear_row(engine: Engine, row: PackedRow, asked: _Asked, tokens: Tensor | None) -> _Linear:
    """One forward over a packed row, and its backward passes where they are asked for."""
    outputs: list[Tensor] = []  # of each layer's heads, [1, n_tokens, n_heads, d_value]
    changes: list[Tensor] = []  # by the ablation of each head
    logits = engine.differentiable_logits(_states(engine, row, _compared(engine, row, asked, outputs, changes)))
    if tokens is None:
        tokens = logits.topk(asked.n_tokens, dim=-1).indices
    values = asked.read(logits, tokens.to(logits.device))
    prompt_of = row.packing.segments[row.wanted] - 1
    moves = torch.zeros(len(values), engine.n_layers, engine.n_heads, asked.n_columns, dtype=torch.float64)
    for states in _by_turn(prompt_of.tolist()) if outputs else ():
        for column in range(asked.n_columns):
            # Prompts of a row do not see each other, so one backward pass of the sum is one of each.
            gradients = torch.autograd.grad(values[states, column].sum(), outputs, retain_graph=True)
            for layer, (gradient, change) in enumerate(zip(gradients, changes, strict=True)):
                by_token = (gradient * change)[0].double().sum(dim=-1)  # [n_tokens, n_heads]
                by_prompt = by_token.new_zeros(len(row.members), engine.n_heads)
                by_prompt.index_add_(0, (row.packing.segments - 1).to(by_token.device), by_token)
                moves[states, layer, :, column] = by_prompt.cpu()[prompt_of.cpu()[states]]
    return _Linear(tokens.cpu(), values.detach().cpu(), moves)


def _compared(
    engine: Engine, row: PackedRow, asked: _Asked, outputs: list[Tensor], changes: list[Tensor]
) -> dict[int, AttentionCall]:
    """Calls under which each layer files its heads' outputs, as autograd's nodes, and the ablation's changes."""
    everywhere = torch.ones(1, engine.n_heads, dtype=torch.bool, device=engine.device)

    def call(layer: int) -> AttentionCall:
        ablated_already = torch.zeros_like(everywhere)
        ablated_already[0, [head.index for head in asked.common if head.layer == layer]] = True

        def compare(plain: Tensor, ablated: Tensor) -> Tensor:
            output = torch.where(ablated_already.to(plain.device)[:, None, :, None], ablated, plain)
            if asked.at is None:
                return output
            change = ablated - output
            output = output + asked.at * change
            output = output if output.requires_grad else output.detach().requires_grad_()
            changes.append(change.detach())
            outputs.append(output)
            return output

        segments = row.segments if engine.capabilities.segments and len(row.members) > 1 else None
        return AttentionCall((RowAblation(asked.ablation, everywhere),), compare=compare, segments=segments)

    return {layer: call(layer) for layer in range(engine.n_layers)}


def _states(engine: Engine, row: PackedRow, calls: dict[int, AttentionCall]) -> Tensor:
    """The wanted tokens' states before the final norm, [n_states, d_model]."""
    caught: list[Tensor] = []
    facts = engine.architecture
    handle = facts.layers[-1].register_forward_hook(lambda _, __, output: caught.append(first_of(output)))
    try:
        with attention_calls(facts.attentions, calls):
            decode(facts, row, 1)
    finally:
        handle.remove()
    return caught[0][0, row.wanted]


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
    budget = token_budget(engine.device, engine.n_layers * engine.bytes_per_token)
    rows: list[list[int]] = []
    size = 0
    for number, sequence in enumerate(sequences):
        size += len(sequence.token_ids)
        if not rows or size > budget or not engine.capabilities.packs:
            rows.append([])
            size = len(sequence.token_ids)
        rows[-1].append(number)
    return rows


def _log_classes(log_odds: Tensor) -> Tensor:
    """Log-probabilities [..., m + 1] of tokens and of all others, from log p(token) / p(all others) [..., m]."""
    return torch.log_softmax(torch.cat([log_odds, torch.zeros_like(log_odds[..., :1])], dim=-1), dim=-1)


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

"""Screening: forecasts what ablating each head does, from a few backward passes.

The gradient of a KL divergence is zero where nothing is ablated, so the logits are linearised and not the KL:

1. one forward keeps each head's output and the change that the ablation makes to it (one more attention call a layer);
2. one backward for each of the m most probable next tokens gives d logit / d output at every head;
3. output change times gradient, summed over a prompt's tokens, is the first-order change of that logit; what the
   tokens add that all prompts begin with is known as a sum over the prompts, and each gets the mean;
4. the forecast is the exact KL between the distributions over these tokens, and all others as one, before and after;
5. changes within the others are of second order: half their probability times the mean square of the changes of
   log p(token | others), over tokens sampled from them (the Fisher form; it matters where no token is likely).

A firm refusal has a gradient near zero, and yet one head may tip it. So gradients are taken at further points too,
where all heads together are ablated in part (0.8 of the way) or the other way (-0.2); the largest forecast counts.

A forecast proposes candidates; scores that are shown are measured (:mod:`safetyheads.measures.head_pass`): of the best
forecasts, and of a random sample of the other heads. How many of the sample belong among the best bounds how many of
all the others do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from safetyheads.ablation import Ablation
from safetyheads.display import Shown
from safetyheads.errors import InputError
from safetyheads.heads import Group, Head, within
from safetyheads.measures.head_pass import Forecast, HeadPass, log_odds
from safetyheads.measures.sahara import sahara
from safetyheads.model.attention import AttentionCall
from safetyheads.model.packing import PackedRow, TokenSequence, first_wanted, pack, prompt_of_wanted, row_prefix
from safetyheads.model.planning import row_sizes
from safetyheads.model.replay import wanted_states
from safetyheads.scores import GroupScorer, HeadScores, SearchTrace
from safetyheads.stats.intervals import CONFIDENCE, most_in_population

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


class Point(NamedTuple):
    """Where gradients are taken, and of how many tokens' logits."""

    at: float
    """How far all heads together are ablated: 0 is the unablated model, 1 the ablation."""
    n_tokens: int
    """m: most probable next tokens whose logits are linearised."""
    n_samples: int = 0
    """Tokens sampled from the others."""


POINTS = (Point(0.0, 1, 2), Point(-0.2, 2), Point(0.8, 1))
"""The first is at 0. bench/LOG.md has the trials: at 0 alone, with m = 4 and no samples, the organism's exact third
ranked as low as 14th, and flat distributions were forecast a hundred times too small."""


Followed: TypeAlias = tuple[Tensor, Tensor]
"""Next tokens that are followed at each state, int64: the most probable [n_states, m], as many as any point asks for;
and samples [n_states, n_samples] of all but the first point's tokens."""


class Screening(NamedTuple):
    """Forecast effect of ablating each head alone, beside the common heads. Estimates, never scores."""

    ships: Tensor
    """float64 [n_prompts, n_layers, n_heads], nats: largest forecast KL of the next token (Eq 9)."""
    refusal_score: Tensor | None
    """float64 [n_prompts, n_layers, n_heads], nats: largest forecast drop of the refusal's log-odds; None without
    openers."""
    directions: Tensor
    """float64 [n_states, n_layers, n_heads, columns]: moves at the first point, one state a wanted token, scaled so
    that half the squared length is the KL in second order: the Fisher metric is the identity."""
    common: Group = ()
    """Heads that are ablated throughout; they have no forecast of their own (NaN)."""

    def table(self, name: Forecast = "mean_ships") -> HeadScores:
        """The forecasts over all prompts, [n_layers, n_heads].

        Mean Ships are averaged as square roots: a forecast grows with the square of a move where the KL that it
        forecasts levels off, so a few prompts would dominate a plain mean.
        """
        if name == "mean_ships":
            values = self.ships.sqrt().mean(dim=0).square()
        elif self.refusal_score is not None:
            values = self.refusal_score.mean(dim=0)
        else:
            raise InputError("the refusal score was not screened: no openers were given")
        return HeadScores(values, f"screened_{name}", "nats", 0.0)

    def pairs(self, heads: Sequence[Head], k: int) -> tuple[tuple[Head, Head], ...]:
        """The ``k`` pairs of ``heads`` whose joint effect is forecast to differ most from the sum of their own.

        The cross term of two heads is that of the KL in second order, a_h' F a_h' with the Fisher metric F: above 0
        they add up to more (synergy), below 0 they undo each other. Proposals only: sizes can be wrong by an order of
        magnitude, and pairs that stand in for each other may not show at all.
        """
        moved = torch.stack([self.directions[:, head.layer, head.index] for head in heads], dim=1)
        cross = torch.einsum("nhc,ngc->hg", moved, moved).abs()
        numbers = sorted(combinations(range(len(heads)), 2), key=lambda pair: -float(cross[pair]))
        return tuple((heads[first], heads[second]) for first, second in numbers[:k])


@torch.inference_mode(False)
def screen(
    engine: Engine,
    sequences: Sequence[TokenSequence],
    ablation: Ablation,
    openers: Sequence[int] = (),
    common: Group = (),
    points: Sequence[Point] = POINTS,
) -> Screening:
    """Forecast what ablating each head does to the next token; several wanted tokens are averaged.

    With ``openers``, first tokens of refusals, the refusal score is forecast too. The ``common`` heads are ablated
    beside each head, as in a search's later steps. The first of ``points`` is at 0.

    Raises:
        InputError: a common head that the model does not have, or points that do not begin at the unablated model or
            follow no token, or all.
    """
    n_tokens = [point.n_tokens for point in points]
    if not points or points[0].at != 0.0 or min(n_tokens) < 1 or max(n_tokens) >= engine.architecture.vocabulary_size:
        raise InputError(
            f"a screening begins at the unablated model and follows 1 token or more, not all; got {points}"
        )
    common = within(common, engine.n_layers, engine.n_heads)
    lineariser = Lineariser(engine, sequences, ablation, openers, max(n_tokens))
    # The unablated model is what ablated ones are compared with, so it chooses the tokens that are followed.
    unablated = lineariser.at(points[0], gradients=False) if common else None
    start = lineariser.at(points[0], common, None if unablated is None else unablated.followed)
    reference = unablated or start
    at_points = [start, *(lineariser.at(point, common, start.followed) for point in points[1:])]
    forecast = torch.stack([_divergence(reference, start, at) for at in at_points]).amax(dim=0)
    counts = torch.tensor([sequence.n_wanted for sequence in sequences])
    per_prompt = torch.zeros(len(counts), *forecast.shape[1:], dtype=forecast.dtype)
    ships = per_prompt.index_add(0, prompt_of_wanted(sequences), forecast) / counts[:, None, None]
    refusal = None
    if openers:
        firsts = first_wanted(sequences)
        drops = torch.stack([-at.moves[firsts][..., -1] for at in at_points]).amax(dim=0)
        refusal = (reference.refusal[firsts] - start.refusal[firsts])[:, None, None] + drops
    for values in (ships,) if refusal is None else (ships, refusal):
        values[:, [head.layer for head in common], [head.index for head in common]] = torch.nan
    return Screening(ships, refusal, _directions(start), common)


class Linear(NamedTuple):
    """Log-odds of the followed tokens, and how each head's ablation moves them in first order."""

    point: Point
    followed: Followed
    """Chosen by the unablated model."""
    tokens: Tensor
    """float64 [n_states, m]: log-probabilities of the followed tokens."""
    others: Tensor
    """float64 [n_states, m]: log-probability of all but the first, all but the first two, and so on."""
    refusal: Tensor
    """float64 [n_states]: log-odds of the openers; zeros without."""
    moves: Tensor
    """float64 [n_states, n_layers, n_heads, columns]: of log p(token) / p(others), of log p(sample | others), of the
    openers' log-odds. Zeros where no gradients were asked for, NaN where a layer has no such head."""

    def odds(self, n_tokens: int) -> Tensor:
        """Log p(token) / p(all others) [n_states, 1, 1, n_tokens] of the first tokens."""
        return (self.tokens[:, :n_tokens] - self.others[:, n_tokens - 1, None])[:, None, None]


class Lineariser(NamedTuple):
    """Linearises next-token logits in the outputs of all heads; see :func:`screen`."""

    engine: Engine
    sequences: Sequence[TokenSequence]
    ablation: Ablation
    openers: Sequence[int] = ()
    n_tokens: int = 1
    """The most tokens that any point follows."""

    def at(self, point: Point, common: Group = (), followed: Followed | None = None, gradients: bool = True) -> Linear:
        """Linearise at one point with the ``common`` heads ablated; without ``followed`` this model chooses tokens."""
        n_states = sum(sequence.n_wanted for sequence in self.sequences)
        uniforms = torch.rand(n_states, point.n_samples, generator=torch.Generator().manual_seed(0))
        parts, done = [], 0
        with ExitStack() as stack:
            stack.enter_context(self.engine.ablated_rows([()], self.ablation))  # refuses while another is in force
            stack.enter_context(gradients_of(self.engine.model))
            stack.enter_context(torch.set_grad_enabled(gradients))
            for members in self._rows():
                row = pack(self.sequences, members, self.engine.device, self.n_prefix)
                here = slice(done, done + len(row.wanted))
                known = None if followed is None else (followed[0][here], followed[1][here])
                parts.append(self._linearise_row(row, point, common, known, uniforms[here]))
                done = here.stop
        tokens, samples = (torch.cat(tensors) for tensors in zip(*(part.followed for part in parts), strict=True))
        log_p, others, refusal, moves = zip(*(part[2:] for part in parts), strict=True)
        own, of_prefix = (torch.cat(side) for side in zip(*((rows[:-1], rows[-1:]) for rows in moves), strict=True))
        all_moves = own + of_prefix.sum(dim=0) / n_states
        return Linear(point, (tokens, samples), torch.cat(log_p), torch.cat(others), torch.cat(refusal), all_moves)

    def _rows(self) -> list[list[int]]:
        """Which sequences share a row: as many as memory allows with all layers' activations kept for backward."""
        engine = self.engine
        budget = engine.tokens_that_fit(engine.n_layers * engine.costs.bytes_per_token())
        rows: list[list[int]] = []
        size = 0
        for number, sequence in enumerate(self.sequences):
            size += len(sequence.token_ids)
            if not rows or size > budget or not engine.capabilities.packs:
                rows.append([])
                size = len(sequence.token_ids)
            rows[-1].append(number)
        return rows

    @property
    def n_prefix(self) -> int:
        """First tokens that all prompts share."""
        return row_prefix(self.sequences)

    def _linearise_row(
        self, row: PackedRow, point: Point, common: Group, followed: Followed | None, uniforms: Tensor
    ) -> Linear:
        """One forward over a packed row, and its backward passes where gradients are recorded.

        The moves end with those of the prefix.
        """
        outputs: list[Tensor] = []  # of each layer's heads, [1, n_tokens, n_heads, d_value]
        changes: list[Tensor] = []  # by the ablation of each head
        calls = self._comparing_calls(row, point, common, outputs, changes)
        logits = self.engine.differentiable_logits(wanted_states(self.engine.architecture, row, calls, 1)[0])
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        if followed is None:
            followed = choose_tokens(log_probabilities.detach(), self.n_tokens, point, uniforms)
        tokens, samples = (ids.to(logits.device) for ids in followed)
        leading = tokens[:, : point.n_tokens]
        rest = log_probabilities.scatter(-1, leading, -torch.inf)
        all_others = rest.logsumexp(dim=-1, keepdim=True)
        parts = [
            log_probabilities.gather(-1, leading) - all_others,
            rest.gather(-1, samples[:, : point.n_samples]) - all_others,
        ]
        if self.openers:
            parts.append(log_odds(log_probabilities, self.openers)[:, None])
        columns = torch.cat(parts, dim=-1)
        moves = self._moves(row, columns, outputs, changes)
        refusal = columns[:, -1].detach().cpu() if self.openers else torch.zeros(len(columns), dtype=torch.float64)
        with torch.no_grad():
            log_p = log_probabilities.gather(-1, tokens).cpu()
            without = [log_probabilities.scatter(-1, tokens[:, :k], -torch.inf) for k in range(1, self.n_tokens + 1)]
            others = torch.stack([rest.logsumexp(dim=-1) for rest in without], dim=-1).cpu()
        return Linear(point, followed, log_p, others, refusal, moves)

    def _moves(self, row: PackedRow, columns: Tensor, outputs: Sequence[Tensor], changes: Sequence[Tensor]) -> Tensor:
        """First-order change of each column by each head's ablation [n_states + 1, n_layers, n_heads, columns].

        The last is what the first ``n_prefix`` tokens of all prompts add, summed over the states.
        """
        engine = self.engine
        moves = torch.zeros(len(columns) + 1, engine.n_layers, engine.n_heads, columns.shape[1], dtype=torch.float64)
        for layer, shape in enumerate(engine.architecture.shapes):
            moves[:, layer, shape.n_heads if shape else 0 :] = torch.nan
        # Of each token; 0 is the prefix, which a prompt alone in its row has among its own tokens.
        prompts = row.packing.segments * (row.packing.positions >= self.n_prefix)
        prompt_of = row.packing.segments[row.wanted].cpu()
        # The states of the row in turns, each with at most one state of each prompt.
        numbers = prompt_of.tolist()
        turn_of = [numbers[:state].count(prompt) for state, prompt in enumerate(numbers)]
        turns = [[state for state, its in enumerate(turn_of) if its == turn] for turn in range(max(turn_of) + 1)]
        for states, column in product(turns, range(columns.shape[1])) if outputs else ():
            # Prompts of a row do not see each other, so one backward pass of the sum is one of each.
            gradients = torch.autograd.grad(columns[states, column].sum(), outputs, retain_graph=True)
            for layer, gradient, change in zip(engine.architecture.with_heads, gradients, changes, strict=True):
                by_token = (gradient * change)[0].double().sum(dim=-1)  # [n_tokens, n_heads]
                by_prompt = by_token.new_zeros(1 + len(row.members), by_token.shape[1])
                by_prompt = by_prompt.index_add(0, prompts.to(by_token.device), by_token).cpu()
                moves[states, layer, : by_token.shape[1], column] = by_prompt[prompt_of[states]]
                moves[-1, layer, : by_token.shape[1], column] += by_prompt[0]
        return moves

    def _comparing_calls(
        self, row: PackedRow, point: Point, common: Group, outputs: list[Tensor], changes: list[Tensor]
    ) -> dict[int, AttentionCall]:
        """Calls that append each layer's head outputs, as autograd's nodes, and the ablation's changes to them."""
        engine = self.engine
        segments = row.packing if engine.capabilities.segments and len(row.members) > 1 else None

        def compare(plain: Tensor, ablated: Tensor, is_common: Tensor) -> Tensor:
            output = torch.where(is_common.to(plain.device)[:, None, :, None], ablated, plain)
            if not torch.is_grad_enabled():
                return output
            change = ablated - output
            output = output + point.at * change
            output = output if output.requires_grad else output.detach().requires_grad_()
            changes.append(change.detach())
            outputs.append(output)
            return output

        calls, of_common = (engine.ablation_calls([group], self.ablation) for group in (engine.heads, common))
        comparing = {}
        for layer, call in calls.items():
            ((_, every_head),) = call.ablations
            is_common = of_common[layer].ablations[0][1] if layer in of_common else torch.zeros_like(every_head)
            comparing[layer] = replace(call, compare=partial(compare, is_common=is_common), segments=segments)
        return comparing


def choose_tokens(log_probabilities: Tensor, n_tokens: int, point: Point, uniforms: Tensor) -> Followed:
    """The most probable tokens, and samples of all but the point's tokens.

    ``uniforms`` [n_states, n_samples], from 0 to 1, make the samples of log-probabilities [n_states, vocabulary] by
    inverse transform.
    """
    tokens = log_probabilities.topk(n_tokens, dim=-1).indices
    rest = log_probabilities.exp().scatter(-1, tokens[:, : point.n_tokens], 0.0).cumsum(dim=-1)
    at = uniforms.to(rest) * rest[:, -1:]
    samples = torch.searchsorted(rest, at, right=True).clamp_max(rest.shape[-1] - 1)
    return tokens.cpu(), samples.cpu()


@contextmanager
def gradients_of(model: nn.Module, parameters: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Within, these parameters of the model need gradients and no others do."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in parameters}
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def _divergence(reference: Linear, start: Linear, at: Linear) -> Tensor:
    """Forecast KL [n_states, n_layers, n_heads] from the reference, when the moves begin at ``start``."""
    n_tokens, n_samples = at.point.n_tokens, at.point.n_samples
    unablated = _log_classes(reference.odds(n_tokens))
    moved = _log_classes(start.odds(n_tokens) + at.moves[..., :n_tokens])
    # KL is never negative; rounding can leave it below 0.
    classes = (unablated.exp() * (unablated - moved)).sum(dim=-1).clamp_min(0.0)
    if not n_samples:
        return classes
    within_others = at.moves[..., n_tokens : n_tokens + n_samples].square().mean(dim=-1)
    return classes + unablated[..., -1].exp() * within_others / 2


def _directions(start: Linear) -> Tensor:
    """Moves [n_states, n_layers, n_heads, columns] whose half squared length is the KL in second order."""
    n_tokens, n_samples = start.point.n_tokens, start.point.n_samples
    probabilities = _log_classes(start.odds(n_tokens)).exp()  # [n_states, 1, 1, m + 1]
    moves = torch.cat([start.moves[..., :n_tokens], torch.zeros_like(start.moves[..., :1])], dim=-1)
    centred = moves - (probabilities * moves).sum(dim=-1, keepdim=True)
    parts = [centred * probabilities.sqrt()]
    if n_samples:
        parts.append(start.moves[..., n_tokens : n_tokens + n_samples] * (probabilities[..., -1:] / n_samples).sqrt())
    return torch.cat(parts, dim=-1)


def _log_classes(odds: Tensor) -> Tensor:
    """Log-probabilities [..., m + 1] of tokens and of all others, from log p(token) / p(all others) [..., m]."""
    return torch.log_softmax(torch.cat([odds, torch.zeros_like(odds[..., :1])], dim=-1), dim=-1)


# What a screening proposes, scored exactly.


@dataclass(frozen=True, slots=True)
class Extent(Shown):
    """How many heads a screening scores exactly."""

    n_candidates: int = 32
    """Heads with the best forecasts."""
    n_sampled: int = 64
    """Heads drawn at random from the others."""
    seed: int = 0
    once: bool = False
    """Whether the candidates of a search's first step serve its later steps too, which are then not screened."""

    def __post_init__(self) -> None:
        if self.n_candidates < 1 or self.n_sampled < 0:
            raise InputError(
                f"a screening scores at least one candidate and samples 0 heads or more; got {self.n_candidates} and "
                f"{self.n_sampled}"
            )

    def n_heads(self, of: int) -> int:
        """Heads that are scored, of so many."""
        return min(of, self.n_candidates + self.n_sampled)

    def n_groups(self, of: int, steps: int) -> int:
        """Groups that a search of so many steps scores, at most."""
        later = min(of, self.n_candidates) if self.once else self.n_heads(of)
        return self.n_heads(of) + (steps - 1) * later


class Proposal(NamedTuple):
    """The heads that are scored exactly."""

    candidates: Group
    """Best forecasts, best first."""
    sampled: Group
    """Drawn at random from the others."""
    n_others: int
    """Number of heads that are not candidates, the sampled ones included."""

    @property
    def heads(self) -> Group:
        """All heads that are scored."""
        return (*self.candidates, *self.sampled)


@dataclass(frozen=True, slots=True)
class Missed:
    """How many of the best heads may have been missed."""

    top: int
    """Best means: above the score of the candidate of this rank."""
    n_others: int
    """Heads that are not candidates."""
    n_sampled: int
    """Of them, scored exactly."""
    n_found: int
    """Of these, among the best; they are in the ranking."""
    at_most: int
    """Upper bound on the number of others that are among the best, the found ones included."""
    confidence: float = CONFIDENCE
    """Level of the bound."""

    def __str__(self) -> str:
        if not self.n_others:
            return "every head was scored exactly"
        if not self.n_sampled:
            return f"none of the {self.n_others} other heads was sampled: nothing bounds how many are among the best"
        sample = f"{self.n_found} of {self.n_sampled} sampled heads score above the candidate of rank {self.top}"
        bound = f"of all {self.n_others} others at most {self.at_most} do ({self.confidence:.0%} confidence)"
        return f"{sample}: {bound}. That bounds how many, not which: an exact top needs another sample"


def propose(screening: Screening, forecast: Forecast, extent: Extent) -> Proposal:
    """The heads with the best forecasts, and a random sample of the others."""
    ranked = screening.table(forecast).top(screening.ships[0].numel())
    candidates, others = ranked[: extent.n_candidates], sorted(ranked[extent.n_candidates :])
    drawn = random.Random(extent.seed).sample(others, min(extent.n_sampled, len(others)))
    return Proposal(candidates, tuple(sorted(drawn)), len(others))


def missed(table: HeadScores, proposal: Proposal, top: int) -> Missed:
    """What the sample tells about the heads that were not scored."""
    exact = sorted((table[head] for head in proposal.candidates), reverse=True)
    rank = min(top, len(exact))
    n_found = sum(table[head] > exact[rank - 1] for head in proposal.sampled)
    at_most = most_in_population(proposal.n_others, len(proposal.sampled), n_found)
    return Missed(rank, proposal.n_others, len(proposal.sampled), n_found, at_most)


def screened_sahara(
    scorer: GroupScorer,
    screens: Callable[[Group], Screening],
    heads: Sequence[Head],
    forecast: Forecast,
    steps: int,
    extent: Extent,
) -> tuple[SearchTrace, tuple[Proposal, ...], tuple[Missed, ...]]:
    """Algorithm 1 with a screening before each step, or the first: ``screens`` gives it with the group so far ablated.

    ``forecast`` proposes heads, ``scorer`` scores them. Proposals and the heads that may beat the best candidate are
    given for each step.
    """
    proposals: list[Proposal] = []

    def narrow(group: Group) -> Group:
        if proposals and extent.once:
            left = tuple(head for head in proposals[0].candidates if head not in group)
            proposals.append(proposals[0]._replace(candidates=left, sampled=()))
        else:
            proposals.append(propose(screens(group), forecast, extent))
        return proposals[-1].heads

    trace = sahara(scorer, heads, steps, narrow)
    bounds = tuple(missed(step, proposal, 1) for step, proposal in zip(trace.steps, proposals, strict=True))
    return trace, tuple(proposals), bounds


def rescore_pairs(scorer: GroupScorer, pairs: Sequence[tuple[Head, Head]]) -> list[dict[str, Any]]:
    """Exact scores of proposed pairs (:meth:`Screening.pairs`), together and alone, as records.

    ``synergy`` is what two heads do beyond the sum of what each does alone; the largest by size is first.
    """
    singles = sorted({head for pair in pairs for head in pair})
    scores = scorer([*[(head,) for head in singles], *pairs]).tolist()
    alone_of = dict(zip(singles, scores, strict=False))
    records = []
    for pair, together in zip(pairs, scores[len(singles) :], strict=True):
        alone = [alone_of[head] for head in pair]
        heads = [str(head) for head in pair]
        records.append({"heads": heads, "together": together, "alone": alone, "synergy": together - sum(alone)})
    return sorted(records, key=lambda record: -abs(record["synergy"]))


def costs_of(measuring: HeadPass, proposal: Proposal, forecast: Forecast = "mean_ships") -> dict[str, float]:
    """Costs of one screened ranking, as cumulative shares of an exact scan's floating-point operations."""
    engine, sequences = measuring.engine, measuring.sequences
    # The openers' log-odds cost a backward pass at each point.
    n_columns = [point.n_tokens + point.n_samples + (forecast == "refusal_score") for point in POINTS]
    rows = row_sizes(sequences, measuring.plan)
    # Both ways of scoring need the unablated run first.
    exact = engine.costs.scan_flops(rows, engine.heads) + engine.costs.forward_flops(rows)
    running, shares = engine.costs.screening_flops(sequences, n_columns), {}
    parts: dict[str, Group] = {"screening": (), "with_candidates": proposal.candidates, "with_sample": proposal.sampled}
    for name, heads in parts.items():
        running += engine.costs.scan_flops(rows, heads)
        shares[name] = running / exact
    return shares

"""The refusal direction (Arditi et al., 2024), found and selected. Owns the candidates and what each must stand.

r_{i,l} is the mean over harmful prompts, less that over harmless ones, of the residual stream that enters block l at
the i-th token after the instruction. Means are taken in float64. What is done with a direction is ``steering``'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safetyheads.baselines.base import Intervention, Material, Method
from safetyheads.baselines.forward import (
    last_states,
    refuse_streams,
    rows_of,
    sequences_of,
    states_of,
)
from safetyheads.baselines.parameters import writing_parameters
from safetyheads.baselines.steering import direction_added, direction_removed
from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.measures.head_pass import log_odds, next_token_log_probabilities
from safetyheads.model.replay import named

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

# Queries that end and begin unlike each other: what their renderings share at the end is the template's.
_PROBES = ("alpha", "7", "Why?", "no, thanks")


@dataclass(frozen=True, slots=True)
class SelectionRules:
    """What a candidate must stand; the defaults are the paper's."""

    n_train: int = 128
    """Most prompts of each kind that means are taken of."""
    n_validation: int = 32
    """Most prompts of each kind that candidates are judged on."""
    validation_share: float = 0.2
    """Share of the material that is kept for that, drawn by its seed."""
    latest: float = 0.8
    """Candidates of layers from this share of the layers on are dropped: there a direction is near the output."""
    most_divergence: float = 0.1
    """Largest mean KL, in nats, that the removal may cause on harmless prompts."""
    least_induced: float = 0.0
    """Smallest mean refusal score that adding the direction must reach on harmless prompts, in nats."""
    falls_back: bool = False
    """Whether, where the filters drop all candidates, the one with the least bypass is taken all the same; not the
    paper's, and the direction says so (:attr:`RefusalDirection.caveat`)."""

    def __post_init__(self) -> None:
        if min(self.n_train, self.n_validation) < 1 or not 0 < self.validation_share < 1:
            raise InputError(f"directions are learned from one prompt or more and judged on others; got {self}")


PAPERS_RULES = SelectionRules()
"""Those of the paper and its code."""
TABLES_RULES = replace(PAPERS_RULES, falls_back=True)
"""The same for rows of a table, where a direction that the filters drop is shown as such instead of an error."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One r_{i,l}, and what it did on the validation prompts."""

    token: int
    """i, counted from the prompt's end: -1 is the last token."""
    layer: int
    """l: the direction is of the residual stream that enters this block."""
    bypass: float
    """Mean refusal score of harmful prompts with it removed, nats; less is better. NaN where it was not measured."""
    induce: float
    """Mean refusal score of harmless prompts with it added at its layer, nats."""
    divergence: float
    """Mean KL( unablated || removed ) of the next token of harmless prompts, nats."""
    dropped: str
    """Which filter dropped it, in words; empty where none did."""


@dataclass(frozen=True, slots=True)
class RefusalDirection:
    """The direction that was selected."""

    vector: Tensor
    """r, float64 [d_model] on the CPU, with the length of the difference of means."""
    chosen: Candidate
    """Where it is from."""
    candidates: tuple[Candidate, ...]
    """All, by layer and token."""
    n_train: tuple[int, int]
    """Harmful and harmless prompts that the means are of."""
    n_validation: tuple[int, int]
    """Harmful and harmless prompts that candidates were judged on."""

    @property
    def caveat(self) -> str:
        """What settings add where the filters left no candidate; empty where they left one."""
        return f" (the filters drop it: {self.chosen.dropped})" if self.chosen.dropped else ""


@dataclass(frozen=True, slots=True)
class _Judged:
    """What candidates are judged on."""

    engine: Engine
    openers: tuple[int, ...]
    harmful: PromptSet
    benign: PromptSet

    def scores(self, prompts: PromptSet) -> Tensor:
        """Refusal score of each prompt [n_prompts]: log P(R) / (1 - P(R)) of the openers R, nats, float64."""
        states = last_states(self.engine, sequences_of(self.engine, prompts))
        parts = next_token_log_probabilities(self.engine, states)
        return torch.cat([log_odds(part, self.openers).cpu() for part in parts])

    def divergence(self, unablated: Tensor, at_work: AbstractContextManager[None]) -> float:
        """Mean KL of the next token of the harmless prompts against ``unablated`` [n_prompts, vocabulary], nats."""
        with at_work:
            states = last_states(self.engine, sequences_of(self.engine, self.benign))
            ablated = torch.cat(list(next_token_log_probabilities(self.engine, states)))
        return float((unablated.exp() * (unablated - ablated)).sum(dim=-1).mean())


def select_direction(material: Material, rules: SelectionRules = PAPERS_RULES) -> RefusalDirection:
    """The direction whose removal leaves least of refusals, among those that pass the filters.

    Prompts that do not show the difference are left out first, as in the paper: harmful ones with a refusal score of 0
    or less, and harmless ones with one of 0 or more.

    Args:
        material: prompts to learn from, and the openers of refusals.
        rules: thresholds and numbers of prompts.

    Raises:
        InputError: no openers, or prompts that cannot be divided.
        SafetyheadsError: the model does not refuse as it should, or the filters drop every candidate; the message says
            which filter dropped how many, and how close they came.
        UnsupportedModelError: a family with several residual streams.
    """
    engine = material.engine
    refuse_streams(engine)
    if not material.openers:
        raise InputError("a refusal direction needs the first tokens of refusals; got none")
    judged = _Judged(engine, material.openers, material.harmful, material.benign)
    halves = [_halves(each, material.seed, rules) for each in (material.harmful, material.benign)]
    (train, validation), (benign_train, benign_validation) = (
        tuple(_showing(judged, half, refused) for half in pair)
        for pair, refused in zip(halves, (True, False), strict=True)
    )
    judged = _Judged(engine, material.openers, validation, benign_validation)
    tokens = instruction_end(engine, train, benign_train)
    directions = mean_states(engine, train, tokens) - mean_states(engine, benign_train, tokens)
    candidates = _judge_all(judged, directions, rules)
    left = [candidate for candidate in candidates if not candidate.dropped]
    if not left and rules.falls_back:
        left = [candidate for candidate in candidates if candidate.bypass == candidate.bypass]
    if not left:
        raise SafetyheadsError(_all_dropped(candidates))
    best = min(left, key=lambda candidate: candidate.bypass)
    return RefusalDirection(
        directions[best.token, best.layer],
        best,
        tuple(candidates),
        (len(train), len(benign_train)),
        (len(validation), len(benign_validation)),
    )


def instruction_end(engine: Engine, *prompts: PromptSet) -> int:
    """Tokens that end every prompt whatever is asked: those of the template after the instruction; at least one.

    Found as what prompts, and a few queries of no likeness beside them, have in common at the end.
    """
    encoded = [token_ids for each in prompts for token_ids in engine.ask(each).token_ids]
    for each in prompts:
        template = engine.ask(each).template.bound(engine.tokenizer)
        encoded += [tuple(template.encode(probe)) for probe in _PROBES]
    shared = 0
    for column in zip(*(reversed(token_ids) for token_ids in encoded), strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return max(1, min(shared, min(map(len, encoded)) - 1))


@torch.inference_mode()
def mean_states(engine: Engine, prompts: PromptSet, n_tokens: int = 1) -> Tensor:
    """Mean residual stream entering each block at the last ``n_tokens`` tokens of each prompt.

    Returns:
        float64 [n_tokens, n_layers, d_model] on the CPU.
    """
    facts = engine.architecture
    sums = torch.zeros(n_tokens, facts.n_layers, facts.d_model, dtype=torch.float64)

    def hook_for(layer: int, wanted: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hidden, _ = named(module, positional, keywords)  # [1, n_tokens of the row, d_model]
            states = hidden[0][wanted.to(hidden.device)].double()
            sums[:, layer] += states.view(-1, n_tokens, facts.d_model).sum(dim=0).cpu()

        return hook

    for row in rows_of(engine, sequences_of(engine, prompts, n_tokens)):
        with ExitStack() as stack:
            for layer, module in enumerate(facts.layers):
                hook = hook_for(layer, row.wanted)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            states_of(engine, row)
    return sums / len(prompts)


def _halves(prompts: PromptSet, seed: int, rules: SelectionRules) -> tuple[PromptSet, PromptSet]:
    train, validation = prompts.split(1 - rules.validation_share, seed)
    return train[: rules.n_train], validation[: rules.n_validation]


def _showing(judged: _Judged, prompts: PromptSet, refused: bool) -> PromptSet:
    """The prompts whose refusal score has the right sign.

    Raises:
        SafetyheadsError: none has.
    """
    scores = judged.scores(prompts)
    kept = [at for at, score in enumerate(scores.tolist()) if (score > 0 if refused else score < 0)]
    if not kept:
        raise SafetyheadsError(
            f"none of {len(prompts)} {'harmful' if refused else 'harmless'} prompts has a refusal score "
            f"{'above' if refused else 'below'} 0 (they reach from {float(scores.min()):.2f} to "
            f"{float(scores.max()):.2f} nats), so there is no difference to take a direction from"
        )
    return prompts.select(kept)


def _judge_all(judged: _Judged, directions: Tensor, rules: SelectionRules) -> list[Candidate]:
    """Every candidate of directions [n_tokens, n_layers, d_model], by layer and token."""
    engine = judged.engine
    states = last_states(engine, sequences_of(engine, judged.benign))
    unablated = torch.cat(list(next_token_log_probabilities(engine, states)))
    n_tokens, n_layers = directions.shape[:2]
    return [
        _judge(judged, directions[token, layer], (token - n_tokens, layer), unablated, rules)
        for layer in range(n_layers)
        for token in range(n_tokens)
    ]


def _judge(
    judged: _Judged, direction: Tensor, place: tuple[int, int], unablated: Tensor, rules: SelectionRules
) -> Candidate:
    """One candidate through the filters, in the paper's order; what a dropped one makes of refusals is not measured."""
    token, layer = place
    missing = float("nan")
    if not 0 < float(direction.norm()) < float("inf"):
        return Candidate(token, layer, missing, missing, missing, "no difference of means (0 or not finite)")
    if layer >= rules.latest * judged.engine.n_layers:
        late = f"a layer at {rules.latest:.0%} of the depth or later"
        return Candidate(token, layer, missing, missing, missing, late)
    removed = partial(direction_removed, judged.engine, direction)
    divergence = judged.divergence(unablated, removed())
    with direction_added(judged.engine, direction, layer):
        induce = float(judged.scores(judged.benign).mean())
    with removed():
        bypass = float(judged.scores(judged.harmful).mean())
    dropped = ""
    if any(value != value for value in (divergence, induce, bypass)):
        dropped = "a score that is no number"
    elif divergence > rules.most_divergence:
        dropped = f"KL above {rules.most_divergence:g} nats on harmless prompts"
    elif induce < rules.least_induced:
        dropped = f"a refusal score below {rules.least_induced:g} nats when added on harmless prompts"
    return Candidate(token, layer, bypass, induce, divergence, dropped)


def _all_dropped(candidates: Sequence[Candidate]) -> str:
    """Which filter dropped how many, and how close they came."""
    counts = Counter(candidate.dropped for candidate in candidates)
    each = "; ".join(f"{count} for {reason}" for reason, count in counts.most_common())
    measured = [candidate for candidate in candidates if candidate.bypass == candidate.bypass]
    closest = ""
    if measured:
        least = min(candidate.divergence for candidate in measured)
        most = max(candidate.induce for candidate in measured)
        closest = f". The smallest KL was {least:.3g} nats, the highest score when added {most:.3g} nats"
    return f"no refusal direction is left: all {len(candidates)} candidates were dropped, {each}{closest}"


def _interventions(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    """The selected direction, removed in part or whole at every token; ``strength`` is the share that is removed."""
    engine, found = material.engine, select_direction(material, TABLES_RULES)
    where = f"layer {found.chosen.layer}, token {found.chosen.token}"
    touched = writing_parameters(engine)
    return [
        Intervention(
            f"direction of {where}" + ("" if share == 1.0 else f", {share:.0%} removed") + found.caveat,
            share,
            touched,
            partial(direction_removed, engine, found.vector, share),
        )
        for share in strengths
    ]


REFUSAL_DIRECTION = Method(
    name="refusal_direction",
    label="Refusal direction removed",
    source="Arditi et al., 2024",
    touches="activations",
    strengths=(0.25, 0.5, 0.75, 1.0),
    interventions=_interventions,
    partial="openers are the model's own, not a list by family; shares below 1 are ours, and so is a direction where "
    "the filters leave none, which the setting tells; in a hybrid, what replaces attention is freed at the block's end",
)
"""x <- x - share r^ (r^ . x) in the whole model (their section 2.4). The count is of the weights that the same removal
touches as an edit: embeddings, each W_o, each MLP's last matrix; the activation form itself touches none."""

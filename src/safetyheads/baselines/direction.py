"""The refusal direction (Arditi et al., 2024): finds and selects it, removes it from a running model, or adds it.

r_{i,l} is the mean over harmful prompts, less that over harmless ones, of the residual stream that enters block l at
the i-th token after the instruction. Means are taken in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safetyheads.baselines.base import (
    Intervention,
    Material,
    Method,
    first_input,
    last_states,
    refusal_log_odds,
    refuse_streams,
    see_inputs,
    writing_parameters,
)
from safetyheads.errors import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.measures.head_pass import next_token_log_probabilities

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.model.planning import PackedRow
    from safetyheads.prompts.sets import PromptSet

# Queries that end and begin unlike each other; what their renderings share at the end is the template's.
_PROBES = ("alpha", "7", "Why?", "no, thanks")
FACTOR_NAMES = ("residual_multiplier", "attn_out_multiplier")
"""Names of a block's factor on attention's output before it is added to the stream (Granite, Falcon-H1)."""
# Arditi et al.'s settings. Most prompts of each kind in the means, and to judge candidates on.
_N_TRAIN, _N_VALIDATION = 128, 32
VALIDATION_SHARE = 0.2
"""Share of the material that is kept for judging, drawn by its seed."""
LATEST = 0.8
"""Candidates of layers from this share of the depth on are dropped: there a direction is near the output."""
MOST_DIVERGENCE = 0.1
"""Largest mean KL, in nats, that the removal may cause on harmless prompts."""
LEAST_INDUCED = 0.0
"""Smallest mean refusal score, in nats, that adding the direction must reach on harmless prompts."""
_NAN = float("nan")


# Selection.


@dataclass(frozen=True, slots=True)
class Candidate:
    """One r_{i,l}, and its effect on the validation prompts; NaN where it was not measured."""

    token: int
    """i, counted from the prompt's end: -1 is the last token."""
    layer: int
    """l: the direction is of the residual stream that enters this block."""
    bypass: float
    """Mean refusal score of harmful prompts with it removed, nats; less is better."""
    induce: float
    """Mean refusal score of harmless prompts with it added at its layer, nats."""
    divergence: float
    """Mean KL( unablated || removed ) of the next token of harmless prompts, nats."""
    dropped: str
    """Which filter dropped it, in words; empty for none."""


@dataclass(frozen=True, slots=True)
class RefusalDirection:
    """The selected direction."""

    vector: Tensor
    """r, float64 [d_model] on the CPU, with the length of the difference of means."""
    chosen: Candidate
    """The candidate that it is."""
    candidates: tuple[Candidate, ...]
    """All, by layer and token."""

    @property
    def caveat(self) -> str:
        """Appended to settings where the filters left no candidate; else empty."""
        return f" (the filters drop it: {self.chosen.dropped})" if self.chosen.dropped else ""


def select_direction(material: Material) -> RefusalDirection:
    """The direction whose removal leaves least of refusals, among those that pass the filters.

    Where none passes, it is the one among all that were measured; that is not the paper's, and
    :attr:`RefusalDirection.caveat` says so. Prompts that do not show the difference are left out first, as in the
    paper: harmful ones with a refusal score of 0 or less, and harmless ones with one of 0 or more.

    Raises:
        InputError: no openers, or prompts that cannot be divided.
        SafetyheadsError: the model does not refuse as it should, or no candidate could be measured.
        UnsupportedModelError: a family with several residual streams.
    """
    engine = material.engine
    refuse_streams(engine)
    if not material.openers:
        raise InputError("a refusal direction needs the first tokens of refusals; got none")
    train, validation = _halves(material, refused=True)
    benign_train, benign_validation = _halves(material, refused=False)
    tokens = instruction_end(engine, train, benign_train)
    directions = mean_states(engine, train, tokens) - mean_states(engine, benign_train, tokens)
    judging = _Judging(engine, material.openers, validation, benign_validation)
    places = [(layer, token) for layer in range(engine.n_layers) for token in range(tokens)]
    candidates = [judging.candidate(directions[token, layer], token - tokens, layer) for layer, token in places]
    measured = [candidate for candidate in candidates if candidate.bypass == candidate.bypass]
    if not measured:
        counts = Counter(candidate.dropped for candidate in candidates).most_common()
        by_filter = "; ".join(f"{count} for {reason}" for reason, count in counts)
        raise SafetyheadsError(f"no refusal direction is left: all {len(candidates)} were dropped, {by_filter}")
    left = [candidate for candidate in measured if not candidate.dropped] or measured
    best = min(left, key=lambda candidate: candidate.bypass)
    return RefusalDirection(directions[best.token, best.layer], best, tuple(candidates))


def _halves(material: Material, refused: bool) -> list[PromptSet]:
    """Harmful (or harmless) prompts to learn from and to judge on, without those whose refusal score has another sign.

    Raises :class:`SafetyheadsError` where none is left.
    """
    kept = []
    prompts = material.harmful if refused else material.benign
    train, validation = prompts.split(1 - VALIDATION_SHARE, material.seed)
    for half in (train[:_N_TRAIN], validation[:_N_VALIDATION]):
        scores = refusal_log_odds(material.engine, half, material.openers)
        right = [at for at, score in enumerate(scores.tolist()) if (score > 0 if refused else score < 0)]
        if not right:
            raise SafetyheadsError(
                f"none of {len(half)} {'harmful' if refused else 'harmless'} prompts has a refusal score "
                f"{'above' if refused else 'below'} 0 (they reach from {float(scores.min()):.2f} to "
                f"{float(scores.max()):.2f} nats), so there is no difference to take a direction from"
            )
        kept.append(half.select(right))
    return kept


def instruction_end(engine: Engine, *prompts: PromptSet) -> int:
    """Tokens that end every prompt whatever the query: those of the template after the instruction; at least one.

    Found as the common end of the prompts and of a few unlike queries under the same template.
    """
    encoded: list[tuple[int, ...]] = []
    for asked in map(engine.ask, prompts):
        template = asked.template.bound(engine.tokenizer)
        encoded += [*asked.token_ids, *(tuple(template.encode(probe)) for probe in _PROBES)]
    shared = 0
    for column in zip(*(reversed(token_ids) for token_ids in encoded), strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return max(1, min(shared, min(map(len, encoded)) - 1))


@torch.inference_mode()
def mean_states(engine: Engine, prompts: PromptSet, n_tokens: int = 1) -> Tensor:
    """Mean residual stream entering each block at each prompt's last tokens: [n_tokens, n_layers, d_model], float64."""
    facts = engine.architecture
    sums = torch.zeros(n_tokens, facts.n_layers, facts.d_model, dtype=torch.float64)

    def see(row: PackedRow, layer: int, hidden: Tensor) -> None:
        states = hidden[0][row.wanted.to(hidden.device)].double()
        sums[:, layer] += states.view(-1, n_tokens, facts.d_model).sum(dim=0).cpu()

    see_inputs(engine, prompts, facts.layers, see, n_tokens)
    return sums / len(prompts)


class _Judging:
    """Judges candidates on the validation prompts."""

    def __init__(self, engine: Engine, openers: Sequence[int], harmful: PromptSet, benign: PromptSet) -> None:
        self.engine, self.openers, self.harmful, self.benign = engine, openers, harmful, benign
        self.unablated = self._log_probabilities()

    def _log_probabilities(self) -> Tensor:
        """Of the next token of harmless prompts [n_prompts, vocabulary]."""
        return torch.cat(list(next_token_log_probabilities(self.engine, last_states(self.engine, self.benign))))

    def _mean_score(self, prompts: PromptSet) -> float:
        return float(refusal_log_odds(self.engine, prompts, self.openers).mean())

    def candidate(self, direction: Tensor, token: int, layer: int) -> Candidate:
        """One candidate through the filters, in the paper's order; the first two filters measure nothing."""
        if not 0 < float(direction.norm()) < float("inf"):
            return Candidate(token, layer, _NAN, _NAN, _NAN, "no difference of means (0 or not finite)")
        if layer >= LATEST * self.engine.n_layers:
            return Candidate(token, layer, _NAN, _NAN, _NAN, f"a layer at {LATEST:.0%} of the depth or later")
        with direction_removed(self.engine, direction):
            removed = self._log_probabilities()
            bypass = self._mean_score(self.harmful)
        divergence = float((self.unablated.exp() * (self.unablated - removed)).sum(dim=-1).mean())
        with direction_added(self.engine, direction, layer):
            induce = self._mean_score(self.benign)
        dropped = ""
        if any(value != value for value in (divergence, induce, bypass)):
            dropped = "a score that is no number"
        elif divergence > MOST_DIVERGENCE:
            dropped = f"KL above {MOST_DIVERGENCE:g} nats on harmless prompts"
        elif induce < LEAST_INDUCED:
            dropped = f"a refusal score below {LEAST_INDUCED:g} nats when added on harmless prompts"
        return Candidate(token, layer, bypass, induce, divergence, dropped)


# Removing and adding.


@contextmanager
def direction_removed(engine: Engine, direction: Tensor, share: float = 1.0) -> Iterator[None]:
    """Within, the model runs without the direction r [d_model]: x <- x - r^ (r^ . x) at every token; restored after.

    It is removed at the first block's input, at every attention's output and at every block's output, which is the next
    block's input: the MLP's output is summed first and freed with the sum, which is the same. In a hybrid's layers
    without attention, what mixes tokens instead is freed at the block's output only, after the MLP has read it. A norm
    after attention (OLMo 2, Gemma 2) may bring some of the direction back until the block ends.

    A share below 1 is that share of whatever is written to the stream, once: of the embeddings, of what attention adds
    and of what the block adds beside it, as the weight edit (I - share r^ r^^T) W_out does it; norms between W_out and
    the stream (OLMo 2, Gemma 2) come before it here and after it there. A family's scaling of the stream itself in a
    block (Gemma 4, MiniMax) counts among what the block writes. Scores by replay run a captured layer again and may
    pass the first block's input twice: take them at a share of 1, where that changes nothing.

    Raises:
        InputError: a direction without length or of another width.
    """
    unit = _unit(engine, direction)

    def remove(hidden: Tensor, written: Tensor | None = None) -> Tensor:
        """The states without the share of what was written; by default the states themselves were."""
        along = unit.to(hidden.device)
        # In float32 whatever the model's dtype: half precisions would leave a rest of the projection.
        wide = hidden.float()
        projection = (wide if written is None else written) @ along
        return (wide - share * projection[..., None] * along).to(hidden.dtype)

    facts = engine.architecture
    with engine.weights_changed(), ExitStack() as stack:
        stack.callback(_change_input(facts.layers[0], remove))
        for layer, attention in zip(facts.layers, facts.attentions, strict=True):
            if share != 1.0:
                _PartOfBlock(layer, attention, remove).enter(stack)
                continue
            if attention is not None:
                stack.callback(_change_output(attention, remove))
            stack.callback(_change_output(layer, remove))
        yield


@contextmanager
def direction_added(engine: Engine, direction: Tensor, layer: int) -> Iterator[None]:
    """Within, r [d_model] is added to the input of one block at every token; it may be refused as above."""
    _unit(engine, direction)

    def add(hidden: Tensor) -> Tensor:
        return (hidden.float() + direction.float().to(hidden.device)).to(hidden.dtype)

    with engine.weights_changed(), ExitStack() as stack:
        stack.callback(_change_input(engine.architecture.layers[layer], add))
        yield


class _PartOfBlock:
    """Removes a share of the direction from what one block writes; keeps states from the block's begin to its end."""

    def __init__(self, layer: nn.Module, attention: nn.Module | None, remove: Callable[..., Tensor]) -> None:
        self._layer, self._attention, self._remove = layer, attention, remove
        self._factor = next((float(getattr(layer, name)) for name in FACTOR_NAMES if hasattr(layer, name)), 1.0)
        self._input: Tensor | None = None  # of the block
        self._whole: Tensor | None = None  # attention's output
        self._parted: Tensor | None = None  # the same without the share, with which the block goes on
        self._added: Tensor | None = None  # what of it reaches the stream

    def enter(self, stack: ExitStack) -> None:
        """Registers the hooks; the stack removes them."""
        stack.callback(_change_input(self._layer, self._begin))
        if self._attention is not None:
            stack.callback(_change_output(self._attention, self._after_attention))
            for part in (part for part in self._layer.children() if part is not self._attention):
                stack.callback(part.register_forward_pre_hook(self._give_whole).remove)
                stack.callback(part.register_forward_hook(self._part_output).remove)
        stack.callback(_change_output(self._layer, self._end))

    def _begin(self, hidden: Tensor) -> Tensor:
        self._input, self._whole, self._parted, self._added = hidden, None, None, None
        return hidden

    def _after_attention(self, hidden: Tensor) -> Tensor:
        self._whole = hidden
        self._parted = self._added = self._remove(hidden)
        return self._parted

    def _give_whole(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A norm right after attention reads all of its output; the share is taken of the norm's output instead."""
        return (self._whole, *given[1:]) if given and given[0] is self._parted else None

    def _part_output(self, _: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        if not given or given[0] is not self._whole or self._whole is None:
            return None
        self._added = self._remove(output)
        return self._added

    def _end(self, hidden: Tensor) -> Tensor:
        if self._input is None:
            raise UnsupportedModelError(f"{type(self._layer).__name__} gave hidden states and was given none")
        written = hidden.float() - self._input.float()
        if self._added is not None:
            written = written - self._factor * self._added.float()
        self._input = self._whole = self._parted = self._added = None
        return self._remove(hidden, written)


def _unit(engine: Engine, direction: Tensor) -> Tensor:
    """The direction at length 1 [d_model], float32."""
    refuse_streams(engine)
    wide = direction.detach().double()
    length = float(wide.norm())
    if tuple(wide.shape) != (engine.architecture.d_model,) or not 0 < length < float("inf"):
        raise InputError(
            f"a direction has {engine.architecture.d_model} finite numbers here, not all 0; got one of shape "
            f"{list(wide.shape)} and length {length:g}"
        )
    return (wide / length).float()


def _change_input(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Changes the hidden states that a block is given; returns a function that undoes it."""

    def hook(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        changed = change(first_input(module, positional, keywords))
        if positional:
            return (changed, *positional[1:]), keywords
        return positional, {**keywords, "hidden_states": changed}

    return layer.register_forward_pre_hook(hook, with_kwargs=True).remove


def _change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Changes a module's output, the first of several; returns a function that undoes it."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook).remove


def _interventions(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine, selected = material.engine, select_direction(material)
    where = f"direction of layer {selected.chosen.layer}, token {selected.chosen.token}"
    touched = writing_parameters(engine)
    return [
        Intervention(
            where + ("" if share == 1.0 else f", {share:.0%} removed") + selected.caveat,
            share,
            touched,
            partial(direction_removed, engine, selected.vector, share),
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
"""x <- x - share r^ (r^ . x) in the whole model (their section 2.4). Counted are the weights that the same removal
touches as an edit: embeddings, each W_o, each MLP's last matrix; the activation form itself touches none."""

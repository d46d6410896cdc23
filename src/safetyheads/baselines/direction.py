"""The refusal direction (Arditi et al., 2024): finds and selects it, removes it from a running model, or adds it.

r_{i,l} is the mean over harmful prompts, less that over harmless ones, of the residual stream that enters block l at
the i-th token after the instruction. Means are taken in float64.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safetyheads.baselines.base import (
    Intervention,
    Material,
    last_states,
    refusal_log_odds,
    refuse_streams,
    writing_parameters,
)
from safetyheads.errors import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.measures.head_pass import next_token_log_probabilities
from safetyheads.model.engine import Engine
from safetyheads.model.packing import PackedRow, TokenSequence, shared_prefix
from safetyheads.model.replay import change_input, hooked
from safetyheads.prompts.prompt_set import PromptSet

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


@dataclass(frozen=True, slots=True)
class RefusalDirection:
    """One r_{i,l}, and its effect on the validation prompts; NaN where it was not measured."""

    vector: Tensor
    """r, float64 [d_model] on the CPU, with the length of the difference of means."""
    token: int
    """i, counted from the prompt's end: -1 is the last token."""
    layer: int
    """l: the direction is of the residual stream that enters this block."""
    dropped: str
    """Which filter dropped it, in words; empty for none."""
    bypass: float
    """Mean refusal score of harmful prompts with it removed, nats; less is better."""
    divergence: float
    """Mean KL( unablated || removed ) of the next token of harmless prompts, nats."""

    @property
    def caveat(self) -> str:
        """Appended to settings where the filters left no candidate; else empty."""
        return f" (the filters drop it: {self.dropped})" if self.dropped else ""

    @property
    def not_applicable(self) -> str:
        """Why the direction is not the method's own; empty where the filters keep it."""
        if not self.dropped:
            return ""
        return f"its filters leave no direction, and the best that was measured is dropped for {self.dropped}"


def select_direction(material: Material) -> RefusalDirection:
    """The direction whose removal leaves least of refusals, among those that pass the filters.

    Where none passes, it is the one among all that were measured; that is not the paper's, and
    :attr:`RefusalDirection.caveat` says so. Where none could be measured, a SafetyheadsError says why.
    """
    candidates = candidate_directions(material)
    measured = [candidate for candidate in candidates if candidate.bypass == candidate.bypass]
    if not measured:
        counts = Counter(candidate.dropped for candidate in candidates).most_common()
        by_filter = "; ".join(f"{count} for {reason}" for reason, count in counts)
        raise SafetyheadsError(f"no refusal direction is left: all {len(candidates)} were dropped, {by_filter}")
    return min([c for c in measured if not c.dropped] or measured, key=lambda candidate: candidate.bypass)


def candidate_directions(material: Material) -> list[RefusalDirection]:
    """All r_{i,l} by layer and token, through the filters in the paper's order; the first two measure nothing.

    Prompts that do not show the difference are left out first, as in the paper: harmful ones with a refusal score of 0
    or less, and harmless ones with one of 0 or more.
    """
    engine, openers = material.engine, material.openers
    refuse_streams(engine)
    if not openers:
        raise InputError("a refusal direction needs the first tokens of refusals; got none")
    train, harmful = _halves(material, refused=True)
    benign_train, benign = _halves(material, refused=False)
    tokens = instruction_end(engine, train, benign_train)
    directions = mean_states(engine, train, tokens) - mean_states(engine, benign_train, tokens)

    def log_probabilities() -> Tensor:
        """Of the next token of harmless prompts [n_prompts, vocabulary]."""
        return torch.cat(list(next_token_log_probabilities(engine, last_states(engine, benign))))

    unablated, candidates = log_probabilities(), []
    for layer in range(engine.n_layers):
        for at, direction in enumerate(directions[:, layer]):
            dropped, bypass, divergence = "", float("nan"), float("nan")
            if not 0 < float(direction.norm()) < float("inf"):
                dropped = "no difference of means (0 or not finite)"
            elif layer >= LATEST * engine.n_layers:
                dropped = f"a layer at {LATEST:.0%} of the depth or later"
            else:
                with direction_removed(engine, direction):
                    removed = log_probabilities()
                    bypass = float(refusal_log_odds(engine, harmful, openers).mean())
                divergence = float((unablated.exp() * (unablated - removed)).sum(dim=-1).mean())
                with direction_added(engine, direction, layer):
                    induced = float(refusal_log_odds(engine, benign, openers).mean())
                if any(value != value for value in (divergence, induced, bypass)):
                    dropped = "a score that is no number"
                elif divergence > MOST_DIVERGENCE:
                    dropped = f"KL above {MOST_DIVERGENCE:g} nats on harmless prompts"
                elif induced < LEAST_INDUCED:
                    dropped = f"a refusal score below {LEAST_INDUCED:g} nats when added on harmless prompts"
            candidates.append(RefusalDirection(direction, at - tokens, layer, dropped, bypass, divergence))
    return candidates


def _halves(material: Material, refused: bool) -> list[PromptSet]:
    """Harmful (or harmless) prompts to learn from and to judge on, without those whose refusal score has another sign.

    Raises :class:`SafetyheadsError` where none is left.
    """
    kind, side = ("harmful", "above") if refused else ("harmless", "below")
    kept = []
    train, validation = (material.harmful if refused else material.benign).split(1 - VALIDATION_SHARE, material.seed)
    for half in (train[:_N_TRAIN], validation[:_N_VALIDATION]):
        scores = refusal_log_odds(material.engine, half, material.openers)
        right = [at for at, score in enumerate(scores.tolist()) if (score > 0 if refused else score < 0)]
        if not right:
            raise SafetyheadsError(
                f"none of {len(half)} {kind} prompts has a refusal score {side} 0 (they reach from "
                f"{float(scores.min()):.2f} to {float(scores.max()):.2f} nats), so there is no difference to take a "
                "direction from"
            )
        kept.append(half.select(right))
    return kept


def instruction_end(engine: Engine, *prompts: PromptSet) -> int:
    """Tokens that end every prompt whatever the query: those of the template after the instruction; at least one.

    Found as the common end of the prompts and of a few unlike queries under the same template.
    """
    reverse = []
    for asked in map(engine.ask, prompts):
        template = asked.template.bound(engine.tokenizer)
        encoded = (*asked.token_ids, *(template.encode(probe) for probe in _PROBES))
        reverse += [TokenSequence(tuple(reversed(token_ids)), 1) for token_ids in encoded]
    return max(1, shared_prefix(reverse))


def mean_states(engine: Engine, prompts: PromptSet, n_tokens: int = 1) -> Tensor:
    """Mean residual stream entering each block at each prompt's last tokens: [n_tokens, n_layers, d_model], float64."""
    facts = engine.architecture
    sums = torch.zeros(n_tokens, facts.n_layers, facts.d_model, dtype=torch.float64)

    def see(row: PackedRow, layer: int, hidden: Tensor) -> None:
        states = hidden[0][row.wanted.to(hidden.device)].double()
        sums[:, layer] += states.view(-1, n_tokens, facts.d_model).sum(dim=0).cpu()

    last_states(engine, prompts, n_tokens, facts.layers, see)
    return sums / len(prompts)


@contextmanager
def direction_removed(engine: Engine, direction: Tensor, share: float = 1.0) -> Iterator[None]:
    """Within, the model runs without the direction r [d_model]: x <- x - r^ (r^ . x) at every token; restored after.

    It is removed at the first block's input and at every attention's and block's output. What mixes tokens instead of
    attention in a hybrid is freed at the block's output, after the MLP has read it. A norm after attention (OLMo 2,
    Gemma 2) may bring some of the direction back until the block ends.

    A share below 1 is that share of whatever is written to the stream, once: of the embeddings, of what attention adds
    and of what the block adds beside it, as the weight edit (I - share r^ r^^T) W_out does it, but after those norms.
    Scores by replay may pass the first block's input twice: take them at a share of 1, where that changes nothing.
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
    with engine.weights_changed():
        handles = [change_input(facts.layers[0], remove)]
        for layer, attention in zip(facts.layers, facts.attentions, strict=True):
            if share != 1.0:
                handles += _remove_share(layer, attention, remove)
                continue
            if attention is not None:
                handles.append(_change_output(attention, remove))
            handles.append(_change_output(layer, remove))
        with hooked(*handles):
            yield


@contextmanager
def direction_added(engine: Engine, direction: Tensor, layer: int) -> Iterator[None]:
    """Within, r [d_model] is added to the input of one block at every token; it may be refused as above."""
    _unit(engine, direction)

    def add(hidden: Tensor) -> Tensor:
        return (hidden.float() + direction.float().to(hidden.device)).to(hidden.dtype)

    with engine.weights_changed(), hooked(change_input(engine.architecture.layers[layer], add)):
        yield


def _remove_share(
    layer: nn.Module, attention: nn.Module | None, remove: Callable[..., Tensor]
) -> Iterator[RemovableHandle]:
    factor = next((float(getattr(layer, name)) for name in FACTOR_NAMES if hasattr(layer, name)), 1.0)
    # From the block's begin to its end: its input; attention's output, whole, and parted, with which the block goes on;
    # and what of that reaches the stream.
    kept: dict[str, Tensor] = {}

    def begin(hidden: Tensor) -> Tensor:
        kept.clear()
        kept["input"] = hidden
        return hidden

    def after_attention(hidden: Tensor) -> Tensor:
        kept["whole"] = hidden
        kept["parted"] = kept["added"] = remove(hidden)
        return kept["parted"]

    def give_whole(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A norm right after attention reads all of its output; the share is taken of the norm's output instead."""
        return (kept["whole"], *given[1:]) if "parted" in kept and given and given[0] is kept["parted"] else None

    def part_output(_: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        if "whole" not in kept or not given or given[0] is not kept["whole"]:
            return None
        kept["added"] = remove(output)
        return kept["added"]

    def end(hidden: Tensor) -> Tensor:
        if "input" not in kept:
            raise UnsupportedModelError(f"{type(layer).__name__} gave hidden states and was given none")
        written = hidden.float() - kept["input"].float()
        if "added" in kept:
            written = written - factor * kept["added"].float()
        kept.clear()
        return remove(hidden, written)

    yield change_input(layer, begin)
    if attention is not None:
        yield _change_output(attention, after_attention)
        for part in (part for part in layer.children() if part is not attention):
            yield part.register_forward_pre_hook(give_whole)
            yield part.register_forward_hook(part_output)
    yield _change_output(layer, end)


def _unit(engine: Engine, direction: Tensor) -> Tensor:
    refuse_streams(engine)
    wide = direction.detach().double()
    length = float(wide.norm())
    if tuple(wide.shape) != (engine.architecture.d_model,) or not 0 < length < float("inf"):
        raise InputError(
            f"a direction has {engine.architecture.d_model} finite numbers here, not all 0; got one of shape "
            f"{list(wide.shape)} and length {length:g}"
        )
    return (wide / length).float()


def _change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)


def learn(material: Material, _: Sequence[float]) -> Callable[[float], Intervention]:
    """Strength: share of the selected direction that is removed."""
    engine, selected = material.engine, select_direction(material)
    touched = writing_parameters(engine)

    def make(share: float) -> Intervention:
        removed = "" if share == 1.0 else f", {share:.0%} removed"
        setting = f"direction of layer {selected.layer}, token {selected.token}{removed}{selected.caveat}"
        at_work = partial(direction_removed, engine, selected.vector, share)
        return Intervention(setting, share, touched, at_work, not_applicable=selected.not_applicable)

    return make

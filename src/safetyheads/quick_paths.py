"""The quick paths, each proved against the plain one. Owns what replay, pruning, packing and the rest must equal.

A claim that fails costs its path and leaves a note; the model stays usable on the plain path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.batching import PackedRow, TokenSequence, is_out_of_memory, pack
from safetyheads.heads import Group, Head
from safetyheads.replay import Capabilities, capture, decode, replay, rerun, run_layer

if TYPE_CHECKING:
    from safetyheads.engine import Engine

# What a family's code raises when it is called in a way it does not expect: wrong shapes, names or arguments.
TRIPS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
# The same sums in the same order, so that only the last bits may differ.
_SAME_ARITHMETIC = 1e-6


def difference(ours: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference relative to the largest value of the reference (or of ``scale``); shapes must agree."""
    if ours.shape != reference.shape:
        return float("inf")
    largest = (reference if scale is None else scale).float().abs().max().clamp_min(1e-12)
    return float((ours.float() - reference.float()).abs().max() / largest)


def largest(errors: Iterable[float]) -> float:
    """The largest error; a NaN is the largest there is, which Python's ``max`` does not say."""
    return float(torch.tensor(list(errors)).max())


def prove_quick_paths(
    engine: Engine,
    sequences: list[TokenSequence],
    rows: list[PackedRow],
    claim: Callable[..., bool],
) -> tuple[Capabilities, tuple[str, ...]]:
    """(ii), (iii) Replay, pruning, packing and the head, each against the plain path, also after an ablated replay."""
    facts = engine.architecture
    plain = [rerun(facts, row, {}, 1) for row in rows]
    slow = Capabilities(segments=False, prunes=False, starts_late=False)
    capabilities, notes = Capabilities(), []

    def replayed(quick: Capabilities) -> float:
        return largest(
            error
            for row, reference in zip(rows, plain, strict=True)
            for error in _replay_errors(engine, row, reference, quick)
        )

    attempts: list[tuple[str, str, Callable[[], float]]] = [
        (
            "prunes",
            "finishing the last layer for the wanted tokens equals finishing it whole",
            lambda: replayed(replace(slow, prunes=True)),
        ),
        (
            "starts_late",
            "starting the ablated layer from its heads' outputs equals running it whole",
            lambda: replayed(replace(slow, prunes=capabilities.prunes, starts_late=True)),
        ),
        ("replays", "replaying layers equals a plain forward", lambda: replayed(slow)),
        ("packs", "packed prompts equal prompts one by one", lambda: _packed_error(engine, sequences, plain, False)),
        (
            "segments",
            "attention prompt by prompt equals attention over the packed row",
            lambda: _packed_error(engine, sequences, plain, True),
        ),
        ("plain_head", "logits are the head of the normed state", lambda: _head_error(engine, rows)),
    ]
    for name, sentence, measure in attempts:
        try:
            error = measure()
        except TRIPS as failure:
            if is_out_of_memory(failure):
                raise
            error = float("inf")
            notes.append(f"{sentence}: raised {type(failure).__name__}")
        # A softcap bends small logits by less than bfloat16's tolerance, so the head has to be met to the last bits.
        if not claim(sentence, error, False, *[_SAME_ARITHMETIC] * (name == "plain_head")):
            capabilities = replace(capabilities, **{name: False})
            notes.append(f"{sentence}: not on this model, so the slower plain path is taken")
    if not capabilities.plain_head:
        engine.capabilities = capabilities
        claim("logits of given states equal the model's own", _head_error(engine, rows), True)
    return capabilities, tuple(notes)


def _replay_errors(engine: Engine, row: PackedRow, plain: Tensor, quick: Capabilities) -> Iterator[float]:
    """(ii) Replay from the first, a middle and the last layer, unablated and ablated, and unablated once more after."""
    facts, last = engine.architecture, engine.n_layers - 1
    captured = capture(facts, row, {}, 0)
    for start in sorted({0, facts.n_layers // 2, last}):
        yield difference(replay(facts, captured, {}, 1, start, quick), plain)
        groups: tuple[Group, Group] = ((Head(start, 0), Head(last, facts.n_heads - 1)), ())
        ablated = engine.calls(groups, UNDIFFERENTIATED_ATTENTION)
        yield difference(replay(facts, captured, ablated, 2, start, quick), rerun(facts, row, ablated, 2))
    yield difference(replay(facts, captured, {}, 1, 0, quick), plain)


def _packed_error(engine: Engine, sequences: list[TokenSequence], plain: list[Tensor], segments: bool) -> float:
    """(iii) All probes in one row against each alone."""
    row, facts = pack(sequences, range(len(sequences)), engine.device), engine.architecture
    captured = capture(facts, row, {}, facts.n_layers - 1, segments)
    whole = run_layer(facts, captured, facts.n_layers - 1, captured.inputs[facts.n_layers - 1])
    return difference(whole[0, row.wanted], torch.cat(plain, dim=1)[0])


def _head_error(engine: Engine, rows: list[PackedRow]) -> float:
    """The engine's logits and norm against the model's own, of all tokens: the same shapes, so the same arithmetic."""
    errors = []
    for row in rows:
        whole = replace(row, wanted=torch.arange(row.n_tokens, device=row.token_ids.device))
        states = rerun(engine.architecture, whole, {}, 1)
        errors.append(difference(engine.logits(states[0]), _logits(engine, row)))
        errors.append(difference(engine.normed(states), decode(engine.architecture, row, 1)))
    return largest(errors)


def _logits(engine: Engine, row: PackedRow) -> Tensor:
    return engine.model(input_ids=row.token_ids[None], use_cache=False).logits[0]

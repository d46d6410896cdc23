"""Proves each quick path against the plain one.

A claim that fails costs its path and leaves a note; the model stays usable on the plain path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION
from safetyheads.heads import Head
from safetyheads.model.architecture import Capabilities
from safetyheads.model.attention import AttentionCall
from safetyheads.model.planning import PackedRow, TokenSequence, is_out_of_memory, left_padded, pack
from safetyheads.model.replay import capture, decode, given_to_norm, logits, replay, rerun

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

# What a family's code raises when it is called in a way it does not expect: wrong shapes, names or arguments.
TRIPS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
# The same sums in the same order, so that only the last bits may differ.
_SAME_ARITHMETIC = 1e-6


def difference(ours: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """Largest difference relative to the largest value of the reference (or of ``scale``); shapes must agree."""
    if ours.shape != reference.shape:
        return float("inf")
    ours = ours.to(reference.device)  # states and logits of one model may be on different devices
    largest = (reference if scale is None else scale).float().abs().max().clamp_min(1e-12)
    return float((ours.float() - reference.float()).abs().max() / largest)


def largest(errors: Iterable[float]) -> float:
    """The largest error; a NaN counts as the largest, unlike in Python's ``max``."""
    return float(torch.tensor(list(errors)).max())


def prove_quick_paths(
    engine: Engine, sequences: list[TokenSequence], rows: list[PackedRow], claim: Callable[..., bool]
) -> tuple[Capabilities, tuple[str, ...]]:
    """(ii), (iii) Each quick path against the plain one, also after an ablated replay; then all that hold together."""
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
        ("packs", "packed prompts equal prompts one by one", lambda: _packed_error(engine, sequences, plain, None)),
        (
            "segments",
            "attention prompt by prompt equals attention over the packed row",
            lambda: _packed_error(engine, sequences, plain, replace(slow, segments=True)),
        ),
        ("plain_head", "logits are the head of the normed state", lambda: _head_error(engine, rows, plain_head=True)),
        (
            "caches",
            "decoding with a cache equals running over all tokens",
            lambda: _cached_error(engine, [sequences[0].token_ids]),
        ),
        (
            "pads",
            "a padded batch equals prompts one by one",
            lambda: _cached_error(engine, [sequences[0].token_ids, sequences[-1].token_ids[: rows[0].n_tokens // 2]]),
        ),
    ]
    for name, sentence, measure in attempts:
        error, why = _tried(measure)
        # A softcap bends small logits by less than bfloat16's tolerance, so the head has to be met to the last bits.
        if not claim(sentence, error, False, *[_SAME_ARITHMETIC] * (name == "plain_head")):
            capabilities = replace(capabilities, **{name: False})
            then = "no answers are made" if name == "caches" else "the slower plain path is taken"
            notes.append(f"{sentence}: not on this model{why}, so {then}")
    if not capabilities.plain_head:
        claim("logits of given states equal the model's own", _head_error(engine, rows, plain_head=False), True)
    if capabilities.packs and capabilities.replays:
        together = "the quick paths together equal the plain one"
        error, why = _tried(lambda: _together_error(engine, sequences, rows, capabilities))
        if not claim(together, error, False):
            lost = dict.fromkeys(("packs", "segments", "replays", "prunes", "starts_late"), False)
            capabilities = replace(capabilities, **lost)
            notes.append(f"{together}: not on this model{why}, so none of them is taken")
    return capabilities, tuple(notes)


def _tried(measure: Callable[[], float]) -> tuple[float, str]:
    """The error of a quick path, infinite where the family's code trips over it, and what it said then."""
    try:
        return measure(), ""
    except TRIPS as failure:
        if is_out_of_memory(failure):
            raise
        line = str(failure).partition("\n")[0]
        return float("inf"), f" ({type(failure).__name__}{': ' * bool(line)}{line})"


def _replay_errors(engine: Engine, row: PackedRow, plain: Tensor, quick: Capabilities) -> Iterator[float]:
    """(ii) Replay from the first, a middle and the last layer with heads and the first of each kind of these.

    Unablated and ablated, and unablated once more after.
    """
    facts = engine.architecture
    captured, with_heads = capture(facts, row, {}, 0), facts.with_heads
    kinds: dict[Any, int] = {}
    for layer in with_heads:
        # What tells kinds apart is said in words and switches: a type of layer, whether it has RoPE, whose keys it has.
        words = {name: value for name, value in vars(facts.attentions[layer]).items() if isinstance(value, str | bool)}
        words.pop("training", None)
        kinds.setdefault((type(facts.layers[layer]), facts.shapes[layer], tuple(sorted(words.items()))), layer)
    for start in sorted({with_heads[0], with_heads[len(with_heads) // 2], with_heads[-1], *kinds.values()}):
        yield difference(replay(facts, captured, {}, 1, start, quick), plain)
        ablated = _ablated_from(engine, start)
        yield difference(replay(facts, captured, ablated, 2, start, quick), rerun(facts, row, ablated, 2))
    yield difference(replay(facts, captured, {}, 1, facts.with_heads[0], quick), plain)


def _ablated_from(engine: Engine, start: int) -> dict[int, AttentionCall]:
    """Two rows: one with a head of layer ``start`` and one of the last layer ablated, and the unablated one."""
    last = engine.architecture.with_heads[-1]
    shape = engine.architecture.shapes[last]
    heads = (Head(start, 0), Head(last, shape.n_heads - 1 if shape else 0))
    return engine.ablation_calls((tuple(dict.fromkeys(heads)), ()), UNDIFFERENTIATED_ATTENTION)


def _together_error(
    engine: Engine, sequences: list[TokenSequence], rows: list[PackedRow], quick: Capabilities
) -> float:
    """All probes in one row, ablated in the first and in the last layer, by the quick paths that hold."""
    facts, row = engine.architecture, pack(sequences, range(len(sequences)), engine.device)
    captured, errors = capture(facts, row, {}, 0, quick.segments), []
    for start in sorted({facts.with_heads[0], facts.with_heads[-1]}):
        ablated = _ablated_from(engine, start)
        alone = torch.cat([rerun(facts, each, ablated, 2) for each in rows], dim=1)
        errors.append(difference(replay(facts, captured, ablated, 2, start, quick), alone))
    return largest(errors)


def _packed_error(
    engine: Engine, sequences: list[TokenSequence], plain: list[Tensor], quick: Capabilities | None
) -> float:
    """(iii) All probes in one row against each alone; by the quick paths given, or the whole decoder without any."""
    row, facts = pack(sequences, range(len(sequences)), engine.device), engine.architecture
    if quick is None:
        together = rerun(facts, row, {}, 1)
    else:
        captured = capture(facts, row, {}, facts.n_layers - 1, quick.segments)
        together = replay(facts, captured, {}, 1, facts.n_layers - 1, quick)
    return difference(together, torch.cat(plain, dim=1))


def _cached_error(engine: Engine, prompts: list[tuple[int, ...]]) -> float:
    """The prompts in one batch, their last token decoded with a cache, against each alone."""
    from transformers import DynamicCache

    facts, batch = engine.architecture, left_padded(prompts, 0, engine.device)
    cache = DynamicCache(config=engine.model.config)
    with given_to_norm(facts) as caught:
        for tokens in (slice(0, -1), slice(-1, None)):
            engine.model(
                input_ids=batch.token_ids[:, tokens],
                attention_mask=batch.mask[:, : tokens.stop],
                position_ids=batch.positions[:, tokens],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    rows = [pack([TokenSequence(prompt)], (0,), engine.device) for prompt in prompts]
    alone = [rerun(facts, row, {}, 1)[0] for row in rows]
    return difference(caught[-1][:, -1], torch.cat(alone))


def _head_error(engine: Engine, rows: list[PackedRow], plain_head: bool) -> float:
    """The engine's logits and norm against the model's own, of all tokens: the same shapes, so the same arithmetic."""
    facts, errors = engine.architecture, []
    for row in rows:
        whole = replace(row, wanted=torch.arange(row.n_tokens, device=row.token_ids.device))
        states = rerun(facts, whole, {}, 1)
        its_own = engine.model(input_ids=row.token_ids[None], use_cache=False).logits[0]
        errors.append(difference(logits(engine.model, facts, states[0], plain_head), its_own))
        errors.append(difference(facts.final_norm(states), decode(facts, row, 1)))
    return largest(errors)

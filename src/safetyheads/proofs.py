"""Proofs at load. Owns the claims on which every number rests, tried on the user's own weights.

A claim that only a quick path needs, when it fails, costs that path; a claim about the ablation itself, when it
fails, refuses the model by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.attention import AttentionCall, RowAblation, attention_calls
from safetyheads.batching import PackedRow, TokenSequence, pack
from safetyheads.errors import UnsupportedModelError
from safetyheads.heads import Head
from safetyheads.loading import use_our_attention
from safetyheads.replay import Capabilities, capture, decode, replay, rerun, run_layer

if TYPE_CHECKING:
    from safetyheads.engine import Engine

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference allowed, relative to the largest value compared. A wrong mask or head is off by order 1."""
_SAME_ARITHMETIC = 1e-6


@dataclass(frozen=True, slots=True)
class Proof:
    """One claim and how far it held."""

    name: str
    """What was claimed."""
    error: float
    """Largest difference over largest value, unitless."""
    tolerance: float
    """Most that was allowed."""
    decisive: bool
    """Whether the model is refused where it fails; else a quick path is given up."""

    @property
    def passed(self) -> bool:
        """Whether the claim held; a NaN did not."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class CheckReport:
    """All claims, and the quick paths they leave."""

    proofs: tuple[Proof, ...]
    """In the order they were tried."""
    capabilities: Capabilities
    """What the engine may use."""
    notes: tuple[str, ...] = field(default=())
    """One line for each quick path given up."""

    @property
    def passed(self) -> bool:
        """Whether every claim held."""
        return all(proof.passed for proof in self.proofs)


def prove(engine: Engine, longest: int) -> CheckReport:
    """Try every claim; see :meth:`safetyheads.engine.Engine.check`."""
    facts, tolerance = engine.architecture, TOLERANCE[engine.dtype]
    proofs: list[Proof] = []
    engine.capabilities = Capabilities()

    def claim(name: str, measured: float, decisive: bool, allowed: float = tolerance) -> bool:
        proofs.append(Proof(name, measured, allowed, decisive))
        if decisive and not proofs[-1].passed:
            raise UnsupportedModelError(
                f"{facts.family}: refused, because {name} does not hold on these weights "
                f"(difference {measured:.2g} of the largest value, allowed {allowed:.2g})"
            )
        return proofs[-1].passed

    with torch.inference_mode():
        sequences = _probes(engine, longest)
        rows = [pack(sequences, (member,), engine.device) for member in range(len(sequences))]
        claim("our attention equals the family's eager attention", _against_eager(engine, rows), True)
        for layer in sorted({0, facts.n_layers // 2, facts.n_layers - 1}):
            _prove_ablation(engine, rows[0], layer, claim)
        capabilities, notes = _prove_quick_paths(engine, sequences, rows, claim)
    return CheckReport(tuple(proofs), capabilities, notes)


def _probes(engine: Engine, longest: int) -> list[TokenSequence]:
    """Two made-up prompts that share a beginning, longer than every window the run can reach."""
    facts = engine.architecture
    reached = [window for window in facts.windows if window < longest]
    length = max([24, *(window + 8 for window in reached)])
    if facts.context_length is not None:
        length = min(length, facts.context_length)
    generator = torch.Generator().manual_seed(0)
    size = min(facts.vocabulary_size, engine.model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(size, (2, length), generator=generator).tolist()
    shared = length // 3
    return [TokenSequence(tuple(ids[0])), TokenSequence(tuple(ids[0][:shared] + ids[1][shared : length - 2]))]


def _difference(ours: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest value; shapes must agree."""
    if ours.shape != reference.shape:
        return float("inf")
    return float((ours.float() - reference.float()).abs().max() / reference.float().abs().max().clamp_min(1e-12))


def _logits(engine: Engine, row: PackedRow) -> Tensor:
    return engine.model(input_ids=row.token_ids[None], use_cache=False).logits[0]


def _against_eager(engine: Engine, rows: list[PackedRow]) -> float:
    """(i) Logits with our attention against the model's own eager attention; leaves ours set."""
    engine.model.set_attn_implementation("eager")
    reference = [_logits(engine, row) for row in rows]
    use_our_attention(engine.model)
    return max(_difference(_logits(engine, row), logits) for row, logits in zip(rows, reference, strict=True))


def _prove_ablation(engine: Engine, row: PackedRow, layer: int, claim: Callable[..., bool]) -> None:
    """(iv), (v) What an ablation of one head does to its attention, and that the hook arrives there."""
    facts, n_heads = engine.architecture, engine.n_heads
    head = n_heads // 2
    captured = capture(facts, row, {}, layer)
    one, others = (torch.zeros(n_heads, dtype=torch.bool, device=engine.device) for _ in range(2))
    one[head] = True
    others = ~one
    none, everyone = torch.zeros_like(one), torch.ones_like(one)

    def observed(name_epsilon: Any, selected: list[Tensor]) -> tuple[dict[str, Any], Tensor]:
        seen: dict[str, Any] = {}
        call = AttentionCall(
            ablations=(RowAblation(name_epsilon, torch.stack(selected)),),
            observe=lambda **attended: seen.update(attended),
        )
        blocks: list[Tensor] = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            blocks.append(output[0] if isinstance(output, tuple) else output)

        handle = facts.attentions[layer].register_forward_hook(hook)
        try:
            with attention_calls(facts.attentions, {layer: call}):
                run_layer(facts, captured, layer, captured.inputs[layer].expand(len(selected), -1, -1))
        finally:
            handle.remove()
        return seen, blocks[0]

    where = f"in layer {layer}"
    seen, block = observed(SCALING_CONTRIBUTION.at(0.0), [none, one, others, everyone])
    if not seen:
        raise UnsupportedModelError(
            f"{facts.family}: refused, because layer {layer} does not call the attention registry"
        )
    output = seen["output"]
    if output.shape[2] != n_heads:
        raise UnsupportedModelError(
            f"{facts.family}: refused, because layer {layer} attends with {output.shape[2]} heads, not {n_heads}"
        )
    claim(f"scaling a head to 0 silences it {where}", float(output[1, :, head].abs().max()), True)
    claim(
        f"scaling a head leaves the other heads unchanged {where}",
        _difference(output[1][:, others], output[0][:, others]),
        True,
    )
    claim(
        f"a head changes its block's output by its own part alone {where}",
        _difference(block[0] - block[1], block[2] - block[3]),
        True,
    )

    seen, _ = observed(UNDIFFERENTIATED_ATTENTION.at(0.0), [none, one])
    output = seen["output"]
    claim(
        f"undifferentiated attention leaves the other heads unchanged {where}",
        _difference(output[1][:, others], output[0][:, others]),
        True,
    )
    if seen["plain"]:
        uniform = _uniform(seen["value"][1], seen["mask"], head * facts.n_kv_heads // n_heads)
        claim(
            f"undifferentiated attention is uniform over the allowed keys {where}",
            _difference(output[1][:, head], uniform),
            True,
        )


def _uniform(value: Tensor, mask: Tensor | None, kv_head: int) -> Tensor:
    """The plain mean of one head's values [n_tokens, d_value] over the keys that the mask allows each token."""
    n_tokens = value.shape[1]
    allowed = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=value.device).tril()
    if mask is not None:
        given = mask[0, 0]
        allowed = given if given.dtype == torch.bool else given >= 0
    weights = allowed.double() / allowed.sum(dim=-1, keepdim=True)
    return (weights @ value[kv_head].double()).to(value.dtype)


def _prove_quick_paths(
    engine: Engine,
    sequences: list[TokenSequence],
    rows: list[PackedRow],
    claim: Callable[..., bool],
) -> tuple[Capabilities, tuple[str, ...]]:
    """(ii), (iii) Replay, pruning, packing and the head, each against the plain path, also after an ablated replay."""
    facts = engine.architecture
    plain = [rerun(facts, row, {}, 1) for row in rows]
    group = (Head(0, 0), Head(facts.n_layers - 1, facts.n_heads - 1))
    ablated = engine.calls([group, ()], UNDIFFERENTIATED_ATTENTION)
    capabilities, notes = Capabilities(), []

    def replayed(prunes: bool) -> float:
        errors = []
        for row, reference in zip(rows, plain, strict=True):
            captured = capture(facts, row, {}, 0)
            both = rerun(facts, row, ablated, 2)
            for start in sorted({0, facts.n_layers // 2, facts.n_layers - 1}):
                errors.append(_difference(replay(facts, captured, {}, 1, start, prunes), reference))
            errors.append(_difference(replay(facts, captured, ablated, 2, 0, prunes), both))
            errors.append(_difference(replay(facts, captured, {}, 1, 0, prunes), reference))
        return max(errors)

    attempts: list[tuple[str, str, Callable[[], float]]] = [
        (
            "prunes",
            "finishing the last layer for the wanted tokens equals finishing it whole",
            lambda: replayed(True),
        ),
        ("replays", "replaying layers equals a plain forward", lambda: replayed(False)),
        ("packs", "packed prompts equal prompts one by one", lambda: _packed_error(engine, sequences, plain)),
        ("plain_head", "logits are the head of the normed state", lambda: _head_error(engine, rows)),
    ]
    for name, sentence, measure in attempts:
        try:
            error = measure()
        except (RuntimeError, TypeError, ValueError, IndexError) as failure:
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


def _packed_error(engine: Engine, sequences: list[TokenSequence], plain: list[Tensor]) -> float:
    """(iii) All probes in one row against each alone."""
    row = pack(sequences, range(len(sequences)), engine.device)
    return _difference(rerun(engine.architecture, row, {}, 1)[0], torch.cat(plain, dim=1)[0])


def _head_error(engine: Engine, rows: list[PackedRow]) -> float:
    """The engine's logits and norm against the model's own, of all tokens: the same shapes, so the same arithmetic."""
    errors = []
    for row in rows:
        whole = replace(row, wanted=torch.arange(row.n_tokens, device=row.token_ids.device))
        states = rerun(engine.architecture, whole, {}, 1)
        errors.append(_difference(engine.logits(states[0]), _logits(engine, row)))
        errors.append(_difference(engine.normed(states), decode(engine.architecture, row, 1)))
    return max(errors)

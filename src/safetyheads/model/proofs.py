"""Proves at load, on the user's own weights, the claims on which every number rests.

The claims: (i) our attention, unablated, equals the model's own; (ii) an unablated replay equals a plain run;
(iii) packed prompts equal one by one; (iv) ablating a head leaves the others in its layer alone; (v) UA is uniform over
allowed keys.
Where (i), (iv) or (v) fails, the model is refused by name. Where (ii) or (iii) fails, that quick path is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.errors import UnsupportedModelError, first_line
from safetyheads.model.architecture import Capabilities, HeadShape
from safetyheads.model.attention import AttentionCall, RowAblation, attending, attention_calls
from safetyheads.model.loading import is_quantised, rounds_activations, use_our_attention
from safetyheads.model.planning import PackedRow, TokenSequence, is_out_of_memory, pack
from safetyheads.model.quick_path_proofs import TRIPS, difference, largest, prove_quick_paths
from safetyheads.model.replay import Capture, Copies, capture, decode, first_of, of_rows

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference allowed, relative to the largest value compared. A wrong mask or head is off by order 1."""
ROUNDED = 1e-1
"""Least tolerance behind projections whose method rounds activations too, to 8 bits by the largest of a row or batch
(measured in one layer: 8e-3 with integers, 3e-2 with FP8)."""
QUANTISED = 1e-2
"""Least tolerance elsewhere where weights are quantised: kernels compute in float16 (measured: 2e-3)."""
# The only fact that decides nothing: prompts of the proofs exceed every window that is known, whichever layer's.
_WINDOWS = "each layer's window is as wide as was read"
# The only claim about single layers that looks behind the heads, where activations may be rounded.
_PARTS = "a head changes its block's output by its own part alone"


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
    """Try every claim; see :meth:`safetyheads.model.engine.Engine.check`."""
    facts = engine.architecture
    exact, tolerance = tolerances(engine)
    proofs: list[Proof] = []

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
        with _refusing(facts.family, "comparing our attention with the family's own"):
            in_heads, in_blocks = _against_eager(engine, rows)
        equal = "our attention equals the family's eager attention, layer by layer"
        if in_heads is not None:
            claim(f"{equal}, before what the heads say is projected", in_heads, True, exact)
        claim(equal, in_blocks, True)
        with attending() as callers:
            decode(facts, rows[0], 1)
        for module in callers:  # what is left out must have no heads
            if not any(module is attention for attention in facts.attentions):
                raise UnsupportedModelError(
                    f"{facts.family}: refused, because {type(module).__name__} attends, but was not found in any layer"
                )
        with _refusing(facts.family, "ablating a head of each layer"):
            captured = capture(facts, rows[0], {}, 0)
            worst: dict[str, tuple[float, int]] = {}  # (iv), (v) claim -> its largest error and in which layer
            for layer in facts.with_heads:
                for name, error in _errors_in_layer(engine, captured, layer):
                    # A NaN is the largest error, and no comparison says so.
                    if name not in worst or not error <= worst[name][0]:
                        worst[name] = error, layer
            for name, (error, layer) in worst.items():
                sentence = f"{name} ({facts.n_layers} layers, most in layer {layer})"
                claim(sentence, error, name != _WINDOWS, tolerance if name == _PARTS else exact)
        capabilities, notes = prove_quick_paths(engine, sequences, rows, claim)
    if facts.without_heads:
        layers = ", ".join(map(str, facts.without_heads))
        left_out = f"layers {layers} mix tokens in another way than by attention: they have no heads and are left out"
        notes = (left_out, *notes)
    return CheckReport(tuple(proofs), capabilities, notes)


def tolerances(engine: Engine) -> tuple[float, float]:
    """For heads' outputs, which no method rounds, and for what lies behind projections."""
    exact = TOLERANCE[engine.dtype]
    if not is_quantised(engine.model):
        return exact, exact
    exact = max(exact, QUANTISED)
    return exact, max(exact, ROUNDED) if rounds_activations(engine.model) else exact


def _against_eager(engine: Engine, rows: list[PackedRow]) -> tuple[float | None, float]:
    """(i) Our attention against the family's eager one; leaves ours set.

    Every layer is given what it was given under eager attention: rounding in bfloat16 piles up to some percent of the
    logits over four layers.

    Returns:
        The largest differences of the heads' outputs (of quantised models with known output projections) and of the
        attention blocks' outputs.
    """
    facts = engine.architecture
    reads_heads = is_quantised(engine.model)

    def blocks(row: PackedRow, forced: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs: list[Tensor] = []
        heads: list[Tensor] = []
        outputs: list[Tensor] = []

        def enter(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            hidden = positional[0] if positional else keywords["hidden_states"]
            if forced is not None:
                hidden = forced[len(inputs)]
            inputs.append(hidden)
            if positional:
                return (hidden, *positional[1:]), keywords
            return positional, {**keywords, "hidden_states": hidden}

        with ExitStack() as stack:
            for layer, attention in zip(facts.layers, facts.attentions, strict=True):
                stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                if attention is not None:
                    handle = attention.register_forward_hook(lambda _, __, out: outputs.append(first_of(out)))
                    stack.callback(handle.remove)
            for projection in facts.output_projections if reads_heads else ():
                if projection is not None:
                    handle = projection.register_forward_pre_hook(lambda _, given: heads.append(given[0]))
                    stack.callback(handle.remove)
            engine.model(input_ids=row.token_ids[None], use_cache=False)
        return inputs, heads, outputs

    engine.model.set_attn_implementation("eager")
    try:
        references = [blocks(row, None) for row in rows]
    finally:
        # Whatever happens: under another attention function ablations would do nothing, and not say so.
        use_our_attention(engine.model)
    ours = [blocks(row, inputs) for row, (inputs, *_) in zip(rows, references, strict=True)]

    def error(part: int) -> float:
        pairs = zip(ours, references, strict=True)
        return largest(difference(*both) for own, eager in pairs for both in zip(own[part], eager[part], strict=True))

    return (error(1) if reads_heads and ours[0][1] else None), error(2)


@contextmanager
def _refusing(family: str, what: str) -> Iterator[None]:
    """Within, an error in a family's code refuses the family by name."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except TRIPS as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{family}: refused, because {what} raised {type(error).__name__}: {first_line(error)}"
        ) from error


def _probes(engine: Engine, longest: int) -> list[TokenSequence]:
    """Random prompts that share a beginning, two of them longer than every window that the run can reach.

    Where the run reaches lengths at which positions turn, a third one is shorter than these.
    """
    facts = engine.architecture
    reached = [width for width in (*facts.windows, *facts.turns) if width < longest]
    length = max([24, *(width + 8 for width in reached)])
    if facts.context_length is not None:
        length = min(length, facts.context_length)
    generator = torch.Generator().manual_seed(0)
    size = min(facts.vocabulary_size, engine.n_embedded)
    ids = torch.randint(size, (2, length), generator=generator).tolist()
    shared = length // 3
    probes = [tuple(ids[0]), tuple(ids[0][:shared] + ids[1][shared : length - 2])]
    if any(turn < longest for turn in facts.turns):
        short = max(2, min(facts.turns) // 2)
        probes.append(tuple(ids[0][: min(shared, short - 1)] + ids[1][-1:]))
    return [TokenSequence(probe, n_wanted=2) for probe in probes]


def _errors_in_layer(engine: Engine, captured: Capture, layer: int) -> Iterator[tuple[str, float]]:
    """What an ablation of one head does to its attention, and that the hook arrives: claim and error."""
    facts = engine.architecture
    attention, shape = facts.attentions[layer], facts.shapes[layer]
    assert attention is not None  # the layer has heads
    assert shape is not None
    n_heads = shape.n_heads

    def observed(*ablations: RowAblation) -> tuple[dict[str, Any], Tensor]:
        """What the attention function saw, and its block's output, with a batch row for each row of selected heads."""
        seen: dict[str, Any] = {}
        n_rows = len(ablations[0].selected) if ablations else 1
        call = AttentionCall(ablations, observe=lambda **attended: seen.update(attended))
        blocks: list[Tensor] = []
        handle = attention.register_forward_hook(lambda _, __, output: blocks.append(first_of(output)))
        try:
            with attention_calls(facts.attentions, {layer: call}):
                rows = of_rows(facts, captured.inputs[layer], n_rows)
                facts.layers[layer](rows, **Copies().of(captured.arguments[layer]))
        finally:
            handle.remove()
        if not seen:
            raise UnsupportedModelError(
                f"{facts.family}: refused, because layer {layer} does not call the attention registry, or does not "
                "hand its keywords on to it"
            )
        _refuse_other_facts(facts.family, layer, shape, seen)
        return seen, blocks[0]

    none = torch.zeros(n_heads, dtype=torch.bool)  # on the CPU, since the layer may be on any device
    seen, _ = observed()
    n_tokens, query = captured.row.n_tokens, seen["query"]
    # Tokens from the first key that a token sees to the token itself, at most.
    first = _allowed(seen["mask"], n_tokens, query.device).int().argmax(dim=-1)
    reached = int((torch.arange(n_tokens, device=query.device) - first).max()) + 1
    if not seen["chosen"] and reached < n_tokens and reached not in facts.windows:
        raise UnsupportedModelError(
            f"{facts.family}: refused, because tokens of layer {layer} see {reached} tokens back, which no window says"
        )
    if not seen["chosen"]:
        yield _WINDOWS, abs(reached - min(shape.window or n_tokens, n_tokens)) / n_tokens
    # The head that says most: with a silent one every claim would hold by itself.
    head = int(seen["output"][0].float().norm(dim=(0, 2)).argmax())
    one = none.clone()
    one[head] = True

    seen, block = observed(RowAblation(SCALING_CONTRIBUTION.at(0.0), torch.stack([none, one, ~one, ~none])))
    output = seen["output"]
    yield "scaling a head to 0 silences it", float(output[1, :, head].abs().max())
    yield "scaling a head leaves the other heads unchanged", difference(output[1][:, ~one], output[0][:, ~one])
    # The parts are differences of whole outputs, so the rounding of these is the measure, however small a part is.
    yield _PARTS, difference(block[0] - block[1], block[2] - block[3], scale=block[0])

    seen, _ = observed(
        RowAblation(UNDIFFERENTIATED_ATTENTION.at(0.0), torch.stack([none, one, none])),
        RowAblation(UNDIFFERENTIATED_ATTENTION.at(0.5), torch.stack([none, none, one])),
    )
    output, query = seen["output"], seen["query"]
    yield (
        "undifferentiated attention leaves the other heads unchanged",
        difference(output[1][:, ~one], output[0][:, ~one]),
    )
    # At 0 a norm after the ablation would not show; at .5 it gives the whole query back.
    yield "undifferentiated attention scales what meets the keys", difference(query[2, head], query[0, head] * 0.5)
    # The plain mean of the head's values over the keys that the mask allows each token [n_tokens, d_value].
    allowed, value = _allowed(seen["mask"], n_tokens, query.device), seen["value"][1]
    weights = allowed.double() / allowed.sum(dim=-1, keepdim=True)
    mean = weights @ value[head * len(value) // n_heads].double()
    evenness = "undifferentiated attention is uniform over the allowed keys"
    if not seen["plain"]:
        # A sink takes its share of what each token attends to, so the rest may be any part of the mean, and no more:
        # the output is compared with the part that comes nearest.
        evenness += ", beside a sink's share"
        mean = mean.to(value.dtype).double()
        part = (output[1][:, head].double() * mean).sum(-1, keepdim=True)
        mean = (part / mean.square().sum(-1, keepdim=True).clamp_min(1e-30)).clamp(0, 1) * mean
    yield evenness, difference(output[1][:, head], mean.to(value.dtype))


def _refuse_other_facts(family: str, layer: int, shape: HeadShape, seen: dict[str, Any]) -> None:
    """Refuse a layer whose attention function was given other heads than were read of the model."""
    query, key, value, output = (seen[name] for name in ("query", "key", "value", "output"))
    read = (shape.n_heads, shape.n_kv_heads, shape.d_head, shape.d_value)
    given = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    if read != given or output.shape[2:] != (shape.n_heads, shape.d_value) or key.shape[3] != shape.d_head:
        facts = zip(("heads", "key heads", "width", "width of values"), given, read, strict=True)
        differing = [f"{name} {seen_here}, not {as_read}" for name, seen_here, as_read in facts if seen_here != as_read]
        differing = differing or [f"outputs {list(output.shape[2:])}, not {[shape.n_heads, shape.d_value]}"]
        raise UnsupportedModelError(f"{family}: refused, because layer {layer} attends with {'; '.join(differing)}")


def _allowed(mask: Tensor | None, n_tokens: int, device: torch.device) -> Tensor:
    """The keys that a mask allows each token, bool [n_tokens, n_tokens]."""
    if mask is None:
        return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()
    given = mask[0, 0]
    return given if given.dtype == torch.bool else given >= 0

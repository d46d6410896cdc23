"""Proves at load, on the user's own weights, the claims on which every number rests.

The claims: (i) our attention, unablated, equals the model's own; (ii) an unablated replay equals a plain run;
(iii) packed prompts equal one by one; (iv) ablating a head leaves the others in its layer alone; (v) every kind of
ablation does to its head what it says: UA, by query or by key, makes it uniform over allowed keys, the mean kinds give
it the mean over its layer's heads.
Where (i), (iv) or (v) fails, the model is refused by name. Where (ii) or (iii) fails, that quick path is not used, a
note says so, and the model stays usable on the plain path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from safetyheads.ablation import ABLATION_KINDS, SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.errors import UnsupportedModelError, first_line
from safetyheads.heads import Head
from safetyheads.model.architecture import Capabilities, guessed_context
from safetyheads.model.attention import AttentionCall, LeftLayer, RowAblation, attending, attention_calls
from safetyheads.model.loading import is_quantised, rounds_activations, use_our_attention
from safetyheads.model.packing import PackedRow, TokenSequence, left_padded, pack
from safetyheads.model.planning import is_out_of_memory
from safetyheads.model.replay import (
    Capture,
    Copies,
    capture,
    change_input,
    decode,
    first_of,
    given_to_norm,
    logits,
    of_rows,
    replay,
    rerun,
)

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest :func:`difference` allowed. A wrong mask or head is off by order 1."""
ROUNDED = 1e-1
"""Least tolerance behind projections whose method rounds activations too, to 8 bits by the largest of a row or batch
(measured in one layer, relative to the largest value: 8e-3 with integers, 3e-2 with FP8). Over all layers rounding may
exceed it, by the prompts drawn (tiny models, 8 bits: packed rows 6e-2 to 2e-1): a quick path is lost then."""
QUANTISED = 1e-2
"""Least tolerance elsewhere where weights are quantised: kernels compute in float16 (measured: 2e-3)."""
# The same sums in the same order, so that only the last bits may differ.
_SAME_ARITHMETIC = 1e-6
# What a family's code raises when it is called in a way it does not expect: wrong shapes, names or arguments.
_TRIPS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
# The only fact that decides nothing: prompts of the proofs exceed every window that is known, whichever layer's.
_WINDOWS = "each layer's window is as wide as was read"
# The only claim about single layers that looks behind the heads, where activations may be rounded.
_PARTS = "a head changes its block's output by its own part alone"
_BY_KEY = Ablation("undifferentiated_attention_key")
# What each head of a layer says is read over so many of the last tokens.
_TOKENS_HEARD = 4
# In half precision a token may go to other experts by rounding alone, which differs from draw to draw of the prompts; a
# wrong path is wrong on all of them.
_DRAWS_WITH_EXPERTS = 4
# Claims that are of a quick path beside the one that bears its name.
_PATH_OF = {"apart": "packs", "apart_by_segments": "segments"}


class Proof(NamedTuple):
    """One claim and how far it held."""

    name: str
    error: float
    """As :func:`difference` measures it, unitless."""
    tolerance: float
    decisive: bool
    """Whether the model is refused where it fails; else a quick path is given up."""

    @property
    def passed(self) -> bool:
        """Whether the claim held; a NaN did not."""
        return self.error <= self.tolerance


class CheckReport(NamedTuple):
    """All claims, and the quick paths they leave."""

    proofs: tuple[Proof, ...]
    """In the order they were tried."""
    capabilities: Capabilities
    notes: tuple[str, ...] = ()
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
                f"(off by {measured:.2g} of its size, allowed {allowed:.2g})"
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
            loudest: dict[int, int] = {}  # layer -> the head whose ablation changes most there
            for layer in facts.with_heads:
                for name, error in _errors_in_layer(engine, captured, layer, loudest):
                    # A NaN is the largest error, and no comparison says so.
                    if name not in worst or not error <= worst[name][0]:
                        worst[name] = error, layer
            for name, (error, layer) in worst.items():
                sentence = f"{name} ({facts.n_layers} layers, most in layer {layer})"
                claim(sentence, error, name != _WINDOWS, tolerance if name == _PARTS else exact)
        capabilities, notes = _prove_quick_paths(engine, longest, loudest, claim)
    if facts.without_heads:
        layers = ", ".join(map(str, facts.without_heads))
        left_out = f"layers {layers} mix tokens in another way than by attention: they have no heads and are left out"
        notes = (left_out, *notes)
    if guessed := guessed_context(engine.model.config.get_text_config(decoder=True)):
        notes = (*notes, guessed)
    return CheckReport(tuple(proofs), capabilities, notes)


def difference(ours: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """The share by which the worst token is off: 1 is as wrong as it is large; shapes [..., n_channels] must agree.

    It is a root mean square over channels, each in units of its own size over all tokens, or of the middle channel's
    where that is larger. Tokens are measured in the same units, small ones by the middle token. So no channel and no
    token of massive activations hides what happens to the others, as it does beside the largest value.

    ``scale`` is what sizes are taken of, by default the reference.
    """
    if ours.shape != reference.shape:
        return float("inf")
    # States and logits of one model may be on different devices.
    ours, reference = (tensor.to(reference.device).float().flatten(0, -2) for tensor in (ours, reference))
    sized = reference if scale is None else scale.to(reference.device).float().flatten(0, -2)
    channels = _at_least_middle(sized.square().mean(dim=0).sqrt())
    tokens = _at_least_middle((sized / channels).square().mean(dim=-1).sqrt())
    errors = ((ours - reference) / channels).square().mean(dim=-1).sqrt() / tokens
    return float(errors.max())


def _at_least_middle(sizes: Tensor) -> Tensor:
    """The sizes, small ones raised to the median of those above 0."""
    above = sizes[sizes > 0]
    return sizes.clamp_min(max(float(above.median()), 1e-12) if len(above) else 1e-12)


def largest(errors: Iterable[float]) -> float:
    """The largest error; a NaN counts as the largest, unlike in Python's ``max``."""
    return float(torch.tensor(list(errors)).max())


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
    logits over four layers. Gives the largest differences of the heads' outputs (of quantised models with known output
    projections) and of the attention blocks' outputs.
    """
    facts = engine.architecture
    reads_heads = is_quantised(engine.model)

    def blocks(row: PackedRow, forced: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        inputs: list[Tensor] = []
        heads: list[Tensor] = []
        outputs: list[Tensor] = []

        def enter(hidden: Tensor) -> Tensor:
            inputs.append(hidden if forced is None else forced[len(inputs)])
            return inputs[-1]

        with ExitStack() as stack:
            for layer, attention in zip(facts.layers, facts.attentions, strict=True):
                stack.enter_context(change_input(layer, enter))
                if attention is not None:
                    see = attention.register_forward_hook(lambda _, __, out: outputs.append(first_of(out)))
                    stack.enter_context(see)
            for projection in facts.output_projections if reads_heads else ():
                if projection is not None:
                    see = projection.register_forward_pre_hook(lambda _, given: heads.append(given[0]))
                    stack.enter_context(see)
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
    try:
        yield
    except UnsupportedModelError:
        raise
    except _TRIPS as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{family}: refused, because {what} raised {type(error).__name__}: {first_line(error)}"
        ) from error


def _probes(engine: Engine, longest: int, seed: int = 0) -> list[TokenSequence]:
    """Random prompts that share a beginning, two of them longer than every window that the run can reach.

    Where the run reaches lengths at which positions turn, a third one is shorter than these.
    """
    facts = engine.architecture
    reached = [width for width in (*facts.windows, *facts.turns) if width < longest]
    length = max([24, *(width + 8 for width in reached)])
    if facts.context_length is not None:
        length = min(length, facts.context_length)
    generator = torch.Generator().manual_seed(seed)
    size = min(facts.vocabulary_size, engine.n_embedded)
    ids = torch.randint(size, (2, length), generator=generator).tolist()
    shared = length // 3
    probes = [tuple(ids[0]), tuple(ids[0][:shared] + ids[1][shared : length - 2])]
    if any(turn < longest for turn in facts.turns):
        short = max(2, min(facts.turns) // 2)
        probes.append(tuple(ids[0][: min(shared, short - 1)] + ids[1][-1:]))
    return [TokenSequence(probe, n_wanted=2) for probe in probes]


def _observed(
    engine: Engine, captured: Capture, layer: int, *ablations: RowAblation, whole: bool = False
) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """What a layer's attention function saw by name, a batch row for each row of selected heads; the block's output;
    and what its output projection was given, where it has the shape of the heads' outputs.

    Refuses a layer that does not call the function. ``whole`` lets run what comes after attention, which may not take
    these rows.
    """
    facts = engine.architecture
    attention, projection = facts.attentions[layer], facts.output_projections[layer]
    assert attention is not None  # the layer has heads
    seen: dict[str, Any] = {}
    projected: list[Tensor] = []
    blocks: list[Tensor] = []
    call = AttentionCall(ablations, observe=lambda **attended: seen.update(attended))

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        blocks.append(first_of(output))
        if not whole:
            raise LeftLayer

    with ExitStack() as stack:
        stack.enter_context(attention.register_forward_hook(leave))
        if projection is not None:
            stack.enter_context(projection.register_forward_pre_hook(lambda _, given: projected.append(given[0])))
        stack.enter_context(attention_calls(facts.attentions, {layer: call}))
        rows = of_rows(facts, captured.input_of(layer), len(ablations[0][1]) if ablations else 1)
        with suppress(LeftLayer):
            facts.layers[layer](rows, **Copies().of(captured.arguments[layer]))
    if not seen:
        raise UnsupportedModelError(
            f"{facts.family}: refused, because layer {layer} does not call the attention registry, or does not "
            "hand its keywords on to it"
        )
    fits = bool(projected) and projected[0].numel() == seen["output"].numel()
    return seen, blocks[0], projected[0].view_as(seen["output"]) if fits else None


def _refuse_other_heads(engine: Engine, layer: int, seen: dict[str, Any]) -> None:
    facts, shape = engine.architecture, engine.architecture.shapes[layer]
    assert shape is not None  # the layer has heads
    query, key, value, output = (seen[name] for name in ("query", "key", "value", "output"))
    names = ("heads", "key heads", "width", "width of keys", "width of values", "outputs")
    read = (shape.n_heads, shape.n_kv_heads, shape.d_head, shape.d_head, shape.d_value, [shape.n_heads, shape.d_value])
    given = (query.shape[1], key.shape[1], query.shape[3], key.shape[3], value.shape[3], list(output.shape[2:]))
    facts_of_heads = zip(names, given, read, strict=True)
    differing = [f"{name} {actual}, not {expected}" for name, actual, expected in facts_of_heads if actual != expected]
    if differing:
        raise UnsupportedModelError(
            f"{facts.family}: refused, because layer {layer} attends with {'; '.join(differing)}"
        )


def _loudest(projection: nn.Module | None, outputs: Tensor, projected: Tensor | None) -> int:
    """The head whose ablation changes its block's output most: with a silent one every claim would hold by itself.

    ``outputs`` are of the heads, unablated and all of them ablated [2, n_tokens, n_heads, d_value]; ``projected`` the
    same as the ``projection`` to the block's output is given them, where both are known.
    """
    changes = (outputs[0] - outputs[1])[-_TOKENS_HEARD:].transpose(0, 1)  # [n_heads, n_tokens, d_value]
    if projection is not None and projected is not None:
        changed = (projected[0] - projected[1])[-_TOKENS_HEARD:]
        if bool(changed.any()):  # else it is not the projection, which a proof of its own finds out
            # A batch row for each head, with its own change alone.
            alone = torch.eye(changed.shape[1], dtype=changed.dtype, device=changed.device)[:, None, :, None] * changed
            blocks = projection(alone.flatten(2))
            changes = blocks - projection(torch.zeros_like(alone[:1]).flatten(2))
    changes = changes.float()
    channels = _at_least_middle(changes.square().mean(dim=(0, 1)).sqrt())
    return int((changes / channels).square().sum(dim=(1, 2)).argmax())


def _errors_in_layer(
    engine: Engine, captured: Capture, layer: int, loudest: dict[int, int]
) -> Iterator[tuple[str, float]]:
    """What an ablation of one head does to its attention, and that the hook arrives: claim and error.

    Adds the head that is ablated to ``loudest``.
    """
    facts, shape = engine.architecture, engine.architecture.shapes[layer]
    assert shape is not None  # the layer has heads
    none = torch.zeros(shape.n_heads, dtype=torch.bool)  # on the CPU, since the layer may be on any device
    plain, *_ = _observed(engine, captured, layer)
    _refuse_other_heads(engine, layer, plain)
    n_tokens, device = captured.row.n_tokens, plain["query"].device
    if not plain["chosen"]:
        yield _WINDOWS, _window_error(engine, layer, allowed_keys(plain["mask"], n_tokens, device))
    ua = UNDIFFERENTIATED_ATTENTION.at(0.0)
    seen, _, projected = _observed(engine, captured, layer, (ua, torch.stack([none, ~none])))
    head = loudest[layer] = _loudest(facts.output_projections[layer], seen["output"], projected)
    one = none.clone()
    one[head] = True

    rows = torch.stack([none, one, ~one, ~none])
    seen, block, _ = _observed(engine, captured, layer, (SCALING_CONTRIBUTION.at(0.0), rows), whole=True)
    output = seen["output"]
    yield "scaling a head to 0 silences it", float(output[1, :, head].abs().max())
    yield "scaling a head leaves the other heads unchanged", difference(output[1][:, ~one], output[0][:, ~one])
    # The parts are differences of whole outputs, so the rounding of these is the measure, however small a part is.
    yield _PARTS, difference(block[0] - block[1], block[2] - block[3], scale=block[0])

    at_zero = ua, torch.stack([none, one, none])
    at_half = ua.at(0.5), torch.stack([none, none, one])
    seen, *_ = _observed(engine, captured, layer, at_zero, at_half)
    output, query, value = seen["output"], seen["query"], seen["value"][1]
    others = difference(output[1][:, ~one], output[0][:, ~one])
    yield "undifferentiated attention leaves the other heads unchanged", others
    # At 0 a norm after the ablation would not show; at .5 it gives the whole query back.
    yield "undifferentiated attention scales what meets the keys", difference(query[2, head], query[0, head] * 0.5)
    # The plain mean of the head's values over the keys that the mask allows each token [n_tokens, d_value].
    allowed = allowed_keys(seen["mask"], n_tokens, device)
    weights = allowed.double() / allowed.sum(dim=-1, keepdim=True)
    mean = weights @ value[head * len(value) // shape.n_heads].double()
    evenness = "undifferentiated attention is uniform over the allowed keys"
    if not seen["plain"]:
        # A sink takes its share of what each token attends to, so the rest may be any part of the mean, and no more:
        # the output is compared with the part that comes nearest.
        evenness += ", beside a sink's share"
        mean = mean.to(value.dtype).double()
        part = (output[1][:, head].double() * mean).sum(-1, keepdim=True)
        mean = (part / mean.square().sum(-1, keepdim=True).clamp_min(1e-30)).clamp(0, 1) * mean
    yield evenness, difference(output[1][:, head], mean.to(value.dtype))

    zero, half = torch.stack([none, one, none]), torch.stack([none, none, one])
    by_key = _observed(engine, captured, layer, (_BY_KEY.at(0.0), zero), (_BY_KEY.at(0.5), half))[0]["output"]
    yield f"{_BY_KEY.kind.label} leaves the other heads unchanged", difference(by_key[1:, :, ~one], output[1:, :, ~one])
    yield f"{_BY_KEY.kind.label} does what it does by query", difference(by_key[:, :, head], output[:, :, head])
    yield from _errors_of_means(engine, captured, layer, one)


def _window_error(engine: Engine, layer: int, allowed: Tensor) -> float:
    """By what share of the tokens a layer sees further back than its window, or less far; refuses unknown windows."""
    facts, n_tokens = engine.architecture, len(allowed)
    # Tokens from the first key that a token sees to the token itself, at most.
    first = allowed.int().argmax(dim=-1)
    reached = int((torch.arange(n_tokens, device=allowed.device) - first).max()) + 1
    if reached < n_tokens and reached not in facts.windows:
        raise UnsupportedModelError(
            f"{facts.family}: refused, because tokens of layer {layer} see {reached} tokens back, which no window says"
        )
    shape = facts.shapes[layer]
    assert shape is not None  # the layer has heads
    return abs(reached - min(shape.window or n_tokens, n_tokens)) / n_tokens


def _errors_of_means(engine: Engine, captured: Capture, layer: int, one: Tensor) -> Iterator[tuple[str, float]]:
    """What the mean kinds do to one head and to all heads of a layer: claim and error."""
    none = torch.zeros_like(one)
    rows = torch.stack([none, one, ~none])
    for ablation in (Ablation(name) for name, kind in ABLATION_KINDS.items() if kind.operation == "mean"):
        seen, *_ = _observed(engine, captured, layer, (ablation, rows))
        output, name = seen["output"], ablation.kind.tensor
        # By head [rows, n_heads, n_tokens, width]; shared keys are a copy for each query head by now.
        tensor = output.transpose(1, 2) if name == "head_output" else seen[name]
        if tensor.shape[1] != len(one):
            yield f"{ablation.kind.label} reaches each head", float("inf")
            continue
        mean = tensor[0].double().mean(dim=0).to(tensor.dtype)
        got = torch.cat([tensor[1, one], tensor[2]])
        yield f"{ablation.kind.label} is the mean", difference(got, mean.expand_as(got))
        untouched = largest(
            difference(*pair)
            for pair in ((output[1][:, ~one], output[0][:, ~one]), (tensor[1, ~one], tensor[0, ~one]))
            if pair[0].numel()
        )
        yield f"{ablation.kind.label} leaves the other heads unchanged", untouched


def allowed_keys(mask: Tensor | None, n_tokens: int, device: torch.device) -> Tensor:
    """The keys that a mask allows each token, bool [n_tokens, n_tokens]."""
    if mask is None:
        return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()
    given = mask[0, 0]
    return given if given.dtype == torch.bool else given >= 0


class _Probes:
    """Prompts of the proofs of quick paths, each in a row by itself, and its states by the plain path."""

    def __init__(self, engine: Engine, longest: int, seed: int) -> None:
        self.sequences = _probes(engine, longest, seed)
        members = range(len(self.sequences))
        self.rows = [pack(self.sequences, (member,), engine.device) for member in members]
        self.together = pack(self.sequences, members, engine.device)
        self.plain = [rerun(engine.architecture, row, {}, 1) for row in self.rows]

    def with_other_tokens(self, engine: Engine, changed: Collection[int]) -> PackedRow:
        """All in one row as before, but for what these prompts say after what all share."""
        layout, n_prefix = self.together.packing.segments, self.together.packing.n_prefix
        size = min(engine.architecture.vocabulary_size, engine.n_embedded)
        for offset in range(1, size):
            others = list(self.sequences)
            for member in changed:
                ids = others[member].token_ids
                moved = ((token + offset) % size for token in ids[n_prefix:])
                others[member] = others[member]._replace(token_ids=(*ids[:n_prefix], *moved))
            row = pack(others, range(len(others)), engine.device)
            if torch.equal(row.packing.segments, layout):  # equal tokens would belong to what all share
                return row
        raise LookupError("no other tokens of the same layout")


def _prove_quick_paths(
    engine: Engine, longest: int, loudest: Mapping[int, int], claim: Callable[..., bool]
) -> tuple[Capabilities, tuple[str, ...]]:
    """(ii), (iii) Each quick path against the plain one, also after an ablated replay; then all that hold together.

    States are compared after the final norm, as logits read them.
    """
    facts = engine.architecture
    capabilities, notes = Capabilities(), []
    probes_of = cache(partial(_Probes, engine, longest))

    def error_of(measure: Callable[[_Probes], float]) -> tuple[float, str]:
        """The least error over the draws, of which there are several with experts only; and what it tripped over."""
        errors: list[tuple[float, str]] = []
        for seed in range(_DRAWS_WITH_EXPERTS if facts.active_experts < 1 else 1):
            errors.append(_tried(partial(measure, probes_of(seed))))
            if errors[-1][0] <= tolerances(engine)[1]:
                return errors[-1]
        return errors[0]

    attempts = _attempts(engine, loudest, lambda: capabilities.prunes)
    # A softcap bends small logits by less than bfloat16's tolerance, so the head has to be met to the last bits. So has
    # a prompt beside others, unless these move its last bits: by a scale of the whole row, or the size of an expert's
    # batch.
    rounds = is_quantised(engine.model) and rounds_activations(engine.model)
    moved = facts.active_experts < 1 or rounds
    exact = ("plain_head",) if moved else ("plain_head", "apart", "apart_by_segments")
    for name, (sentence, measure) in attempts.items():
        error, why = error_of(measure)
        if not claim(sentence, error, False, *[_SAME_ARITHMETIC] * (name in exact)):
            path = _PATH_OF.get(name, name)
            if not getattr(capabilities, path):
                continue  # given up, and said, already
            capabilities = replace(capabilities, **{path: False})
            then = "no answers are made" if path == "caches" else "the slower plain path is taken"
            notes.append(f"{sentence}: not on this model{why}, so {then}")
    if not capabilities.plain_head:
        claim("logits of given states equal the model's own", _head_error(engine, probes_of(0), plain_head=False), True)
    if capabilities.packs and capabilities.replays:
        together = "the quick paths together equal the plain one"
        error, why = error_of(partial(_together_error, engine, quick=capabilities, loudest=loudest))
        if not claim(together, error, False):
            lost = dict.fromkeys(("packs", "segments", "replays", "prunes", "starts_late"), False)
            capabilities = replace(capabilities, **lost)
            notes.append(f"{together}: not on this model{why}, so none of them is taken")
    return capabilities, tuple(notes)


def _attempts(
    engine: Engine, loudest: Mapping[int, int], prunes: Callable[[], bool]
) -> dict[str, tuple[str, Callable[[_Probes], float]]]:
    """By quick path: what is claimed of it, and the error that the claim allows none of, in the order they are tried.

    ``prunes`` tells whether the first of them was found to hold.
    """
    slow = Capabilities(segments=False, prunes=False, starts_late=False)

    def replayed(probes: _Probes, **quick: bool) -> float:
        errors: list[float] = []
        for row, plain in zip(probes.rows, probes.plain, strict=True):
            errors += _replay_errors(engine, row, plain, replace(slow, **quick), loudest)
        return largest(errors)

    def cached(probes: _Probes, pads: bool) -> float:
        first, last = probes.sequences[0].token_ids, probes.sequences[-1].token_ids
        return _cached_error(engine, [first, last[: len(first) // 2]] if pads else [first])

    return {
        "prunes": (
            "finishing the last layer for the wanted tokens equals finishing it whole",
            partial(replayed, prunes=True),
        ),
        "starts_late": (
            "starting the ablated layer from its heads' outputs equals running it whole",
            lambda probes: replayed(probes, prunes=prunes(), starts_late=True),
        ),
        "replays": ("replaying layers equals a plain forward", replayed),
        "packs": ("packed prompts equal prompts one by one", partial(_packed_error, engine, quick=None)),
        "apart": ("a packed prompt does not see the others", partial(_mixing_error, engine, quick=None)),
        "segments": (
            "attention prompt by prompt equals attention over the packed row",
            partial(_packed_error, engine, quick=replace(slow, segments=True)),
        ),
        "apart_by_segments": (
            "prompt by prompt, a packed prompt does not see the others",
            partial(_mixing_error, engine, quick=replace(slow, segments=True)),
        ),
        "plain_head": ("logits are the head of the normed state", partial(_head_error, engine, plain_head=True)),
        "caches": ("decoding with a cache equals running over all tokens", partial(cached, pads=False)),
        "pads": ("a padded batch equals prompts one by one", partial(cached, pads=True)),
    }


def _tried(measure: Callable[[], float]) -> tuple[float, str]:
    """The error of a quick path, infinite where the family's code trips over it, and what it said then."""
    try:
        return measure(), ""
    except _TRIPS as failure:
        if is_out_of_memory(failure):
            raise
        line = str(failure).partition("\n")[0]
        return float("inf"), f" ({type(failure).__name__}{': ' * bool(line)}{line})"


def _after_norm(engine: Engine, states: Tensor, plain: Tensor) -> float:
    norm = engine.architecture.final_norm
    return difference(norm(states), norm(plain))


def _replay_errors(
    engine: Engine, row: PackedRow, plain: Tensor, quick: Capabilities, loudest: Mapping[int, int]
) -> Iterator[float]:
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
        yield _after_norm(engine, replay(facts, captured, {}, 1, start, quick), plain)
        ablated = _ablated_from(engine, start, loudest)
        states = replay(facts, captured, ablated, 2, start, quick)
        yield _after_norm(engine, states, rerun(facts, row, ablated, 2))
    yield _after_norm(engine, replay(facts, captured, {}, 1, facts.with_heads[0], quick), plain)


def _ablated_from(engine: Engine, start: int, loudest: Mapping[int, int]) -> dict[int, AttentionCall]:
    """Two rows: the loudest head of layer ``start`` and of the last layer ablated, and all others of these layers."""
    heads = {Head(layer, loudest[layer]) for layer in (start, engine.architecture.with_heads[-1])}
    layers = {head.layer for head in heads}
    others = tuple(head for head in engine.heads if head.layer in layers and head not in heads)
    return engine.ablation_calls((tuple(sorted(heads)), others), UNDIFFERENTIATED_ATTENTION)


def _together_error(engine: Engine, probes: _Probes, quick: Capabilities, loudest: Mapping[int, int]) -> float:
    """All probes in one row, ablated in the first and in the last layer, by the quick paths that hold."""
    facts, errors = engine.architecture, []
    captured = capture(facts, probes.together, {}, 0, quick.segments)
    for start in sorted({facts.with_heads[0], facts.with_heads[-1]}):
        ablated = _ablated_from(engine, start, loudest)
        alone = torch.cat([rerun(facts, row, ablated, 2) for row in probes.rows], dim=1)
        errors.append(_after_norm(engine, replay(facts, captured, ablated, 2, start, quick), alone))
    return largest(errors)


def _packed_states(engine: Engine, row: PackedRow, quick: Capabilities | None) -> Tensor:
    """States of a packed row by the quick paths given, or by the whole decoder without any."""
    facts = engine.architecture
    if quick is None:
        return rerun(facts, row, {}, 1)
    captured = capture(facts, row, {}, facts.n_layers - 1, quick.segments)
    return replay(facts, captured, {}, 1, facts.n_layers - 1, quick)


def _packed_error(engine: Engine, probes: _Probes, quick: Capabilities | None) -> float:
    return _after_norm(engine, _packed_states(engine, probes.together, quick), torch.cat(probes.plain, dim=1))


def _mixing_error(engine: Engine, probes: _Probes, quick: Capabilities | None) -> float:
    """(iii) What changes about a prompt when the others in its row say something else.

    It is the same arithmetic, so nothing may change at all; rounding, however much of a state it is, cannot hide it.
    """
    before, errors = _packed_states(engine, probes.together, quick), []
    n_first, members = probes.sequences[0].n_wanted, range(len(probes.sequences))
    for changed, kept in ((members[1:], slice(None, n_first)), (members[:1], slice(n_first, None))):
        after = _packed_states(engine, probes.with_other_tokens(engine, changed), quick)
        errors.append(_after_norm(engine, after[:, kept], before[:, kept]))
    return largest(errors)


def _cached_error(engine: Engine, prompts: list[tuple[int, ...]]) -> float:
    """The prompts in one batch, their last token decoded with a cache, against each alone."""
    facts, batch = engine.architecture, left_padded(prompts, 0, engine.device)
    cache_of_batch = DynamicCache(config=engine.model.config)
    with given_to_norm(facts) as caught:
        for tokens in (slice(0, -1), slice(-1, None)):
            given = {name: tensor[:, tokens] for name, tensor in batch.items()}
            given["attention_mask"] = batch["attention_mask"][:, : tokens.stop]
            engine.model(**given, past_key_values=cache_of_batch, use_cache=True, logits_to_keep=1)
    rows = [pack([TokenSequence(prompt)], (0,), engine.device) for prompt in prompts]
    alone = [rerun(facts, row, {}, 1)[0] for row in rows]
    return _after_norm(engine, caught[-1][:, -1], torch.cat(alone))


def _head_error(engine: Engine, probes: _Probes, plain_head: bool) -> float:
    """The engine's logits and norm against the model's own, of all tokens: the same shapes, so the same arithmetic."""
    facts, errors = engine.architecture, []
    for row in probes.rows:
        whole = row._replace(wanted=torch.arange(row.n_tokens, device=row.token_ids.device))
        states = rerun(facts, whole, {}, 1)
        its_own = engine.model(input_ids=row.token_ids[None], use_cache=False).logits[0]
        errors.append(difference(logits(engine.model, facts, states[0], plain_head), its_own))
        errors.append(difference(facts.final_norm(states), decode(facts, row, 1)))
    return largest(errors)

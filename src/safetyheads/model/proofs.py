"""Proves at load, on the user's own weights, the claims on which every number rests.

The claims: (i) our attention, unablated, equals the model's own; (ii) an unablated replay equals a plain run;
(iii) packed prompts equal one by one; (iv) ablating a head leaves the others in its layer alone; (v) UA is uniform over
allowed keys.
Where (i), (iv) or (v) fails, the model is refused by name. Where (ii) or (iii) fails, that quick path is not used, a
note says so, and the model stays usable on the plain path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION
from safetyheads.errors import UnsupportedModelError, first_line
from safetyheads.heads import Head
from safetyheads.model.architecture import Capabilities
from safetyheads.model.attention import AttentionCall, RowAblation, attending, attention_calls
from safetyheads.model.loading import is_quantised, rounds_activations, use_our_attention
from safetyheads.model.planning import PackedRow, TokenSequence, is_out_of_memory, left_padded, pack
from safetyheads.model.replay import (
    Capture,
    Copies,
    capture,
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
"""Largest difference allowed, relative to the largest value compared. A wrong mask or head is off by order 1."""
ROUNDED = 1e-1
"""Least tolerance behind projections whose method rounds activations too, to 8 bits by the largest of a row or batch
(measured in one layer: 8e-3 with integers, 3e-2 with FP8)."""
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
        capabilities, notes = _prove_quick_paths(engine, sequences, rows, claim)
    if facts.without_heads:
        layers = ", ".join(map(str, facts.without_heads))
        left_out = f"layers {layers} mix tokens in another way than by attention: they have no heads and are left out"
        notes = (left_out, *notes)
    return CheckReport(tuple(proofs), capabilities, notes)


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
                stack.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
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
    """Within, an error in a family's code refuses the family by name."""
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


def _observed(engine: Engine, captured: Capture, layer: int, *ablations: RowAblation) -> tuple[dict[str, Any], Tensor]:
    """What a layer's attention function saw, and its block's output, a batch row for each row of selected heads.

    Refuses a layer that does not call the function, or gives it other heads than were read of the model.
    """
    facts = engine.architecture
    attention, shape = facts.attentions[layer], facts.shapes[layer]
    assert attention is not None  # the layer has heads
    assert shape is not None
    seen: dict[str, Any] = {}
    blocks: list[Tensor] = []
    call = AttentionCall(ablations, observe=lambda **attended: seen.update(attended))
    watched = attention.register_forward_hook(lambda _, __, output: blocks.append(first_of(output)))
    with watched, attention_calls(facts.attentions, {layer: call}):
        rows = of_rows(facts, captured.inputs[layer], len(ablations[0][1]) if ablations else 1)
        facts.layers[layer](rows, **Copies().of(captured.arguments[layer]))
    if not seen:
        raise UnsupportedModelError(
            f"{facts.family}: refused, because layer {layer} does not call the attention registry, or does not "
            "hand its keywords on to it"
        )
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
    return seen, blocks[0]


def _errors_in_layer(engine: Engine, captured: Capture, layer: int) -> Iterator[tuple[str, float]]:
    """What an ablation of one head does to its attention, and that the hook arrives: claim and error."""
    facts, shape = engine.architecture, engine.architecture.shapes[layer]
    assert shape is not None  # the layer has heads
    seen, _ = _observed(engine, captured, layer)
    n_tokens, device = captured.row.n_tokens, seen["query"].device
    # Tokens from the first key that a token sees to the token itself, at most.
    first = _allowed(seen["mask"], n_tokens, device).int().argmax(dim=-1)
    reached = int((torch.arange(n_tokens, device=device) - first).max()) + 1
    if not seen["chosen"]:
        if reached < n_tokens and reached not in facts.windows:
            raise UnsupportedModelError(
                f"{facts.family}: refused, because tokens of layer {layer} see {reached} tokens back, which no window "
                "says"
            )
        yield _WINDOWS, abs(reached - min(shape.window or n_tokens, n_tokens)) / n_tokens
    # The head that says most: with a silent one every claim would hold by itself.
    head = int(seen["output"][0].float().norm(dim=(0, 2)).argmax())
    none = torch.zeros(shape.n_heads, dtype=torch.bool)  # on the CPU, since the layer may be on any device
    one = none.clone()
    one[head] = True

    rows = torch.stack([none, one, ~one, ~none])
    seen, block = _observed(engine, captured, layer, (SCALING_CONTRIBUTION.at(0.0), rows))
    output = seen["output"]
    yield "scaling a head to 0 silences it", float(output[1, :, head].abs().max())
    yield "scaling a head leaves the other heads unchanged", difference(output[1][:, ~one], output[0][:, ~one])
    # The parts are differences of whole outputs, so the rounding of these is the measure, however small a part is.
    yield _PARTS, difference(block[0] - block[1], block[2] - block[3], scale=block[0])

    at_zero = UNDIFFERENTIATED_ATTENTION.at(0.0), torch.stack([none, one, none])
    at_half = UNDIFFERENTIATED_ATTENTION.at(0.5), torch.stack([none, none, one])
    seen, _ = _observed(engine, captured, layer, at_zero, at_half)
    output, query, value = seen["output"], seen["query"], seen["value"][1]
    others = difference(output[1][:, ~one], output[0][:, ~one])
    yield "undifferentiated attention leaves the other heads unchanged", others
    # At 0 a norm after the ablation would not show; at .5 it gives the whole query back.
    yield "undifferentiated attention scales what meets the keys", difference(query[2, head], query[0, head] * 0.5)
    # The plain mean of the head's values over the keys that the mask allows each token [n_tokens, d_value].
    allowed = _allowed(seen["mask"], n_tokens, device)
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


def _allowed(mask: Tensor | None, n_tokens: int, device: torch.device) -> Tensor:
    """The keys that a mask allows each token, bool [n_tokens, n_tokens]."""
    if mask is None:
        return torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril()
    given = mask[0, 0]
    return given if given.dtype == torch.bool else given >= 0


def _prove_quick_paths(
    engine: Engine, sequences: list[TokenSequence], rows: list[PackedRow], claim: Callable[..., bool]
) -> tuple[Capabilities, tuple[str, ...]]:
    """(ii), (iii) Each quick path against the plain one, also after an ablated replay; then all that hold together."""
    facts = engine.architecture
    plain = [rerun(facts, row, {}, 1) for row in rows]
    slow = Capabilities(segments=False, prunes=False, starts_late=False)
    capabilities, notes = Capabilities(), []

    def replayed(**quick: bool) -> float:
        errors = (_replay_errors(engine, *each, replace(slow, **quick)) for each in zip(rows, plain, strict=True))
        return largest(error for of_row in errors for error in of_row)

    first, last = sequences[0].token_ids, sequences[-1].token_ids[: rows[0].n_tokens // 2]
    attempts: dict[str, tuple[str, Callable[[], float]]] = {
        "prunes": (
            "finishing the last layer for the wanted tokens equals finishing it whole",
            lambda: replayed(prunes=True),
        ),
        "starts_late": (
            "starting the ablated layer from its heads' outputs equals running it whole",
            lambda: replayed(prunes=capabilities.prunes, starts_late=True),
        ),
        "replays": ("replaying layers equals a plain forward", replayed),
        "packs": ("packed prompts equal prompts one by one", lambda: _packed_error(engine, sequences, plain, None)),
        "segments": (
            "attention prompt by prompt equals attention over the packed row",
            lambda: _packed_error(engine, sequences, plain, replace(slow, segments=True)),
        ),
        "plain_head": ("logits are the head of the normed state", lambda: _head_error(engine, rows, plain_head=True)),
        "caches": ("decoding with a cache equals running over all tokens", lambda: _cached_error(engine, [first])),
        "pads": ("a padded batch equals prompts one by one", lambda: _cached_error(engine, [first, last])),
    }
    for name, (sentence, measure) in attempts.items():
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
    except _TRIPS as failure:
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
            given = {name: tensor[:, tokens] for name, tensor in batch.items()}
            given["attention_mask"] = batch["attention_mask"][:, : tokens.stop]
            engine.model(**given, past_key_values=cache, use_cache=True, logits_to_keep=1)
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

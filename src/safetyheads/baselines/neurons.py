"""Safety neurons: found by contrast with the unaligned model, patched from it while answering. Owns both steps.

From Chen et al. 2024, "Towards understanding safety alignment: a mechanistic perspective from safety neurons":
generation-time activation contrasting (GTAC, Eq 2) and dynamic activation patching (DAP). A neuron is an entry of what
an MLP's last projection reads, after the activation and the gate. Nothing here changes a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from safetyheads.baselines.base import Intervention, Material, Method
from safetyheads.baselines.calibration import TextBatch, batches, inputs_seen, refusal_text
from safetyheads.baselines.linear_layers import EDITS, LinearLayer, linear_layers
from safetyheads.baselines.parameters import DOWN_NAMES
from safetyheads.errors import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.model.loading import refuse_wrapped
from safetyheads.model.planning import TokenSequence

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

_REORDERING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")
"""What moves rows or tokens of a cache; a twin cache must follow."""

Neurons = Mapping[int, Tensor]
"""Layer -> its neurons, int64 [n]."""


def down_projections(engine: Engine) -> tuple[LinearLayer, ...]:
    """Each layer's MLP's last projection.

    Raises:
        UnsupportedModelError: a layer has none, or several, as with experts.
    """
    facts, found = engine.architecture, []
    linears = linear_layers(engine)
    for layer, attention in enumerate(facts.attentions):
        of_attention = set() if attention is None else set(attention.modules())
        here = [
            linear
            for linear in linears
            if linear.layer == layer
            and linear.module not in of_attention
            and linear.name.split(".")[-1] in DOWN_NAMES
            and linear.d_out == facts.d_model
        ]
        if len(here) != 1:
            raise UnsupportedModelError(
                f"{facts.family}: layer {layer} has {len(here)} last projections of an MLP (known are "
                f"{', '.join(DOWN_NAMES)}); neurons are patched where there is exactly one"
            )
        found += here
    return tuple(found)


def contrasts(engine: Engine, unaligned: Engine, text: Sequence[TokenSequence]) -> Tensor:
    """GTAC (Eq 2): RMS over the counted tokens of a neuron's value in one model less that in the other.

    Args:
        engine: the aligned model.
        unaligned: the model before alignment.
        text: what both read: prompts with the aligned model's answers, whose tokens count.

    Returns:
        float64 [n_layers, d_mlp], the last layer included; NaN beyond a narrower layer's width.
    """
    ours, theirs = down_projections(engine), down_projections(unaligned)
    widest = max(linear.d_in for linear in ours)
    sums = torch.zeros(len(ours), widest, dtype=torch.float64)
    n_tokens = 0
    for batch in batches(engine, text):
        values = [_neuron_values(each, downs, batch) for each, downs in ((engine, ours), (unaligned, theirs))]
        for layer, (own, other) in enumerate(zip(*values, strict=True)):
            sums[layer, : own.shape[1]] += (own.double() - other.to(own.device).double()).square().sum(dim=0).cpu()
        n_tokens += int(batch.counted.sum())
    for layer, linear in enumerate(ours):
        sums[layer, linear.d_in :] = torch.nan
    return (sums / n_tokens).sqrt()


@torch.no_grad()
def _neuron_values(engine: Engine, downs: Sequence[LinearLayer], batch: TextBatch) -> list[Tensor]:
    """Layer by layer the neurons' values at the counted tokens [n_counted, d_mlp]."""
    values: dict[int, Tensor] = {}

    def see(layer: int, given: Tensor) -> None:
        counted = batch.counted.to(given.device)
        values[layer] = given.reshape(*counted.shape, -1)[counted]

    moved = {
        name: given.to(engine.device) if name != "use_cache" else given for name, given in batch.arguments().items()
    }
    with inputs_seen([linear.module for linear in downs], see):
        engine.architecture.decoder(**moved)
    return [values[layer] for layer in range(len(downs))]


def top_neurons(scores: Tensor, share: float) -> dict[int, Tensor]:
    """The share of neurons with the highest scores [n_layers, d_mlp], of all layers but the last, together."""
    searched = scores[:-1]
    there = ~searched.isnan()
    n = round(share * int(there.sum()))
    order = searched.masked_fill(~there, -torch.inf).flatten().argsort(descending=True, stable=True)[:n]
    layers, neurons = order // scores.shape[1], order % scores.shape[1]
    return {layer: neurons[layers == layer].sort().values for layer in range(len(searched)) if (layers == layer).any()}


@contextmanager
def patched(engine: Engine, unaligned: Engine, neurons: Neurons) -> Iterator[None]:
    """DAP: within, these neurons of the model have the values that they have in the unaligned model.

    Before each call of the model, the unaligned one reads the same tokens, with a cache of its own for each cache that
    the model is called with. Every token that the model reads is patched, prompt and answer. So a call's place in the
    answer does not matter, and runs with a cache give what runs without one give. Only calls of the whole model are
    patched: answers and likelihoods, not scores by replay.

    Raises:
        SafetyheadsError: inside, a cache is used that was filled outside.
    """
    ours, theirs = down_projections(engine), down_projections(unaligned)
    twins: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
    values: dict[int, Tensor] = {}
    chosen = {layer: these.to(ours[layer].weight.device) for layer, these in neurons.items()}

    def see(layer: int, given: Tensor) -> None:
        if layer in chosen:
            values[layer] = given.to(ours[layer].weight.device)[..., chosen[layer]]

    def there(value: Any) -> Any:
        return value.to(unaligned.device) if isinstance(value, Tensor) else value

    def read_along(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        values.clear()
        given = {name: there(value) for name, value in keywords.items()}
        cache = keywords.get("past_key_values")
        if cache is not None:
            given["past_key_values"] = _twin(twins, cache, unaligned)
        unaligned.model(*map(there, arguments), **given)

    def has_read(*_: Any) -> None:
        values.clear()  # layers that run on their own, in replays and proofs, are not patched with what is past

    def patch(layer: int) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            if layer not in values:
                return given
            whole = given[0].clone()
            whole[..., chosen[layer]] = values[layer].to(whole.dtype)
            return (whole, *given[1:])

        return hook

    with ExitStack() as stack, engine.weights_changed():
        stack.callback(_let_go, twins)
        stack.enter_context(inputs_seen([linear.module for linear in theirs], see))
        handles = [
            engine.model.register_forward_pre_hook(read_along, with_kwargs=True),
            engine.model.register_forward_hook(has_read, always_call=True),
        ]
        handles += [ours[layer].module.register_forward_pre_hook(patch(layer)) for layer in chosen]
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _twin(twins: WeakKeyDictionary[Any, Any], cache: Any, unaligned: Engine) -> Any:
    """The unaligned model's cache beside one of the model's; whatever moves rows of this moves rows of that."""
    from transformers import DynamicCache

    if cache not in twins:
        if cache.get_seq_length() > 0:
            raise SafetyheadsError("a cache was filled before neurons are patched; begin the answer anew")
        twins[cache] = twin = DynamicCache(config=unaligned.model.config)
        for name in _REORDERING:
            setattr(cache, name, _followed(cache, twin, name))
    return twins[cache]


def _followed(cache: Any, twin: Any, name: str) -> Any:
    """The cache's method, done to its twin too; it holds the cache weakly, which must go when its batch does."""
    here = ref(cache)

    def both(*arguments: Any, **keywords: Any) -> None:
        own = here()
        getattr(type(own), name)(own, *arguments, **keywords)
        getattr(twin, name)(*arguments, **keywords)

    return both


def _let_go(twins: WeakKeyDictionary[Any, Any]) -> None:
    """Caches that are still there move alone again."""
    for cache in list(twins):
        for name in _REORDERING:
            cache.__dict__.pop(name, None)


def neuron_parameters(engine: Engine, neurons: Neurons) -> int:
    """Weights of these neurons: their rows of what leads into them, their columns of the last projection."""
    linears, downs = linear_layers(engine), down_projections(engine)
    total = 0
    for layer, these in neurons.items():
        width, attention = downs[layer].d_in, engine.architecture.attentions[layer]
        of_attention = set() if attention is None else set(attention.modules())
        mlp = [linear for linear in linears if linear.layer == layer and linear.module not in of_attention]
        # One projection may lead to gate and value at once, with two rows a neuron.
        per_neuron = sum(linear.n_weights // width for linear in mlp if linear.d_out % width == 0)
        total += len(these) * (per_neuron + (0 if downs[layer].d_out % width == 0 else downs[layer].d_out))
    return total


def _refuse_unlike(engine: Engine, unaligned: Engine) -> None:
    """Refuse two models whose neurons or tokens do not stand for each other."""
    if unaligned.model is engine.model:
        raise InputError("the unaligned model is the model itself; neurons are patched from another checkpoint")
    refuse_wrapped("the unaligned model", unaligned.model, EDITS)
    widths = [[linear.d_in for linear in down_projections(each)] for each in (engine, unaligned)]
    if widths[0] != widths[1]:
        raise InputError("the unaligned model has other MLPs: neurons are patched between checkpoints of one shape")
    if engine.tokenizer.get_vocab() != unaligned.tokenizer.get_vocab():
        raise InputError("the tokenizers of the model and the unaligned model differ, so their tokens do too")


def _interventions(material: Material, strengths: Sequence[float]) -> list[Intervention]:
    engine, unaligned = material.engine, material.unaligned
    if unaligned is None:
        raise InputError("GTAC & DAP compares two checkpoints: name the unaligned model too")
    _refuse_unlike(engine, unaligned)
    for share in strengths:
        if not 0 <= share <= 1:
            raise InputError(f"a share of the neurons is from 0 to 1; got {share:g}")
    scores = contrasts(engine, unaligned, refusal_text(material, whole=False))

    def ready(share: float) -> Intervention:
        neurons = top_neurons(scores, share)
        return Intervention(
            setting=f"{sum(map(len, neurons.values()))} neurons ({share:.3g})",
            strength=share,
            n_parameters=neuron_parameters(engine, neurons),
            at_work=lambda: patched(engine, unaligned, neurons),
        )

    return [ready(share) for share in strengths]


GTAC_DAP = Method(
    name="gtac_dap",
    label="GTAC & DAP",
    source="Chen et al. 2024, Towards understanding safety alignment: a mechanistic perspective from safety neurons",
    touches="activations",
    strengths=(0.01, 0.05, 0.1, 0.2, 0.5, 1.0),
    interventions=_interventions,
    partial="only families with one last projection an MLP, no experts; parameters are counted as the neurons' own "
    "rows and columns, though values are patched and no weight changes",
    needs_unaligned=True,
)
"""Neurons that alignment changed most, patched from the unaligned model. Strength: share of all neurons but the last
layer's."""

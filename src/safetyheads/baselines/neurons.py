"""Safety neurons: found by contrast with the unaligned model, and patched from it while the model answers.

From Chen et al. 2024, "Towards understanding safety alignment: a mechanistic perspective from safety neurons":
generation-time activation contrasting (GTAC, Eq 2) and dynamic activation patching (DAP). A neuron is an entry of the
input of an MLP's last projection, after the activation and the gate. No weight is changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from safetyheads.baselines.base import DOWN_NAMES, Intervention, Material, inputs_seen
from safetyheads.baselines.linear_layers import EDITS, LinearLayer, batches, linear_layers, on_device, see_counted
from safetyheads.errors import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.model.engine import Engine
from safetyheads.model.loading import refuse_wrapped
from safetyheads.model.packing import TokenSequence
from safetyheads.model.replay import change_input, hooked

_REORDERING = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop", "reset")
"""Methods that move rows or tokens of a cache; a twin cache must follow them."""


def down_projections(engine: Engine) -> tuple[LinearLayer, ...]:
    """The last projection of each layer's MLP; refused where a layer has none, or several, as with experts."""
    facts, downs = engine.architecture, []
    for layer, mlp in enumerate(_outside_attention(engine)):
        last = [each for each in mlp if each.name.split(".")[-1] in DOWN_NAMES and each.d_out == facts.d_model]
        if len(last) != 1:
            raise UnsupportedModelError(
                f"{facts.family}: layer {layer} has {len(last)} last projections of an MLP (known are "
                f"{', '.join(DOWN_NAMES)}); neurons are patched where there is exactly one"
            )
        downs += last
    return tuple(downs)


def _outside_attention(engine: Engine) -> list[list[LinearLayer]]:
    attentions = engine.architecture.attentions
    inside = {module for attention in attentions if attention is not None for module in attention.modules()}
    outside = [linear for linear in linear_layers(engine) if linear.module not in inside]
    return [[linear for linear in outside if linear.layer == layer] for layer in range(engine.n_layers)]


def contrasts(engine: Engine, unaligned: Engine, text: Sequence[TokenSequence]) -> Tensor:
    """GTAC (Eq 2): RMS, over the counted tokens, of the difference of a neuron's values in the two models.

    float64 [n_layers, d_mlp], the last layer included; NaN beyond a narrower layer's width.
    """
    ours, theirs = down_projections(engine), down_projections(unaligned)
    sums = torch.zeros(len(ours), max(linear.d_in for linear in ours), dtype=torch.float64)
    n_tokens = 0
    for batch in batches(engine, text):
        values: tuple[dict[LinearLayer, Tensor], dict[LinearLayer, Tensor]] = {}, {}
        see_counted(engine, ours, batch, values[0].__setitem__)
        see_counted(unaligned, theirs, batch, values[1].__setitem__)
        for layer, (aligned, other) in enumerate(zip(*(seen.values() for seen in values), strict=True)):
            squares = (aligned.double() - other.to(aligned.device).double()).square()
            sums[layer, : aligned.shape[1]] += squares.sum(dim=0).cpu()
        n_tokens += int(batch[1].sum())
    for layer, linear in enumerate(ours):
        sums[layer, linear.d_in :] = torch.nan
    return (sums / n_tokens).sqrt()


def top_neurons(scores: Tensor, share: float) -> dict[int, Tensor]:
    """The share of neurons with the highest scores [n_layers, d_mlp], among all layers but the last."""
    searched = scores[:-1]
    exists = ~searched.isnan()
    n = round(share * int(exists.sum()))
    order = searched.masked_fill(~exists, -torch.inf).flatten().argsort(descending=True, stable=True)[:n]
    layers, neurons = order // scores.shape[1], order % scores.shape[1]
    return {layer: neurons[layers == layer].sort().values for layer in range(len(searched)) if (layers == layer).any()}


@contextmanager
def patched(engine: Engine, unaligned: Engine, neurons: Mapping[int, Tensor]) -> Iterator[None]:
    """DAP: within, these neurons of each layer (int64 [n]) have the values that they have in the unaligned model.

    Before each call of the model the unaligned one reads the same tokens, with a cache of its own for each cache of the
    model; one that was filled outside is refused. Every token that the model reads is patched, prompt and answer, so
    runs with and without a cache agree. Only calls of the whole model are patched: answers and likelihoods, not scores
    by replay.
    """
    ours, theirs = down_projections(engine), down_projections(unaligned)
    twins, values = _Twins(unaligned), dict[int, Tensor]()
    chosen = {layer: indices.to(ours[layer].weight.device) for layer, indices in neurons.items()}

    def see(layer: int, given: Tensor) -> None:
        if layer in chosen:
            values[layer] = given.to(chosen[layer].device)[..., chosen[layer]]

    def run_unaligned(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        values.clear()
        given = on_device(unaligned, keywords)
        if given.get("past_key_values") is not None:
            given["past_key_values"] = twins.of(given["past_key_values"])
        unaligned.model(*on_device(unaligned, dict(enumerate(positional))).values(), **given)

    def patch(layer: int, whole: Tensor) -> Tensor:
        if layer in values:
            whole = whole.clone()
            whole[..., chosen[layer]] = values[layer].to(whole.dtype)
        return whole

    with engine.weights_changed(), inputs_seen([linear.module for linear in theirs], see):
        handles = [
            engine.model.register_forward_pre_hook(run_unaligned, with_kwargs=True),
            # Layers that run on their own, in replays and proofs, must not get old values.
            engine.model.register_forward_hook(lambda *_: values.clear(), always_call=True),
            *(change_input(ours[layer].module, partial(patch, layer)) for layer in chosen),
        ]
        with hooked(*handles):
            try:
                yield
            finally:
                twins.part()


class _Twins:
    """The unaligned model's cache for each of the model's caches; it follows every move of rows and tokens."""

    def __init__(self, unaligned: Engine) -> None:
        self.unaligned = unaligned
        self._twins: WeakKeyDictionary[Any, DynamicCache] = WeakKeyDictionary()

    def of(self, cache: Any) -> DynamicCache:
        if cache not in self._twins:
            if cache.get_seq_length() > 0:
                raise SafetyheadsError("a cache was filled before neurons are patched; begin the answer anew")
            self._twins[cache] = DynamicCache(config=self.unaligned.model.config)
            for name in _REORDERING:
                setattr(cache, name, partial(self._move_both, ref(cache), self._twins[cache], name))
        return self._twins[cache]

    @staticmethod
    def _move_both(cache: ref[Any], twin: DynamicCache, name: str, *arguments: Any, **keywords: Any) -> None:
        original = cache()  # held weakly, so that a cache is freed with its batch
        getattr(type(original), name)(original, *arguments, **keywords)
        getattr(twin, name)(*arguments, **keywords)

    def part(self) -> None:
        """Let the caches that still exist move alone again."""
        for cache, name in product(list(self._twins), _REORDERING):
            vars(cache).pop(name, None)


def neuron_parameters(engine: Engine, neurons: Mapping[int, Tensor]) -> int:
    """Weights of these neurons: their rows of the projections into them, their columns of the last projection."""
    downs, outside, total = down_projections(engine), _outside_attention(engine), 0
    for layer, indices in neurons.items():
        width = downs[layer].d_in
        # One projection may lead to gate and value at once, with two rows a neuron.
        into = [linear for linear in outside[layer] if linear.d_out % width == 0]
        per_neuron = sum(linear.d_out * linear.d_in // width for linear in into)
        total += len(indices) * (per_neuron + (0 if downs[layer] in into else downs[layer].d_out))
    return total


def learn(material: Material, _: Sequence[float]) -> Callable[[float], Intervention]:
    """Strength: share of all layers' neurons but the last's, those that alignment changed most."""
    engine, unaligned = material.engine, material.unaligned
    if unaligned is None:
        raise InputError("GTAC & DAP compares two checkpoints: name the unaligned model too")
    if unaligned.model is engine.model:
        raise InputError("the unaligned model is the model itself; neurons are patched from another checkpoint")
    refuse_wrapped("the unaligned model", unaligned.model, EDITS)
    widths = [[linear.d_in for linear in down_projections(model)] for model in (engine, unaligned)]
    if widths[0] != widths[1]:
        raise InputError("the unaligned model has other MLPs: neurons are patched between checkpoints of one shape")
    if engine.tokenizer.get_vocab() != unaligned.tokenizer.get_vocab():
        raise InputError("the tokenizers of the model and the unaligned model differ, so their tokens do too")
    scores = contrasts(engine, unaligned, material.text(refused=True))

    def make(share: float) -> Intervention:
        neurons = top_neurons(scores, share)
        setting = f"{sum(map(len, neurons.values()))} neurons ({share:.3g})"
        at_work = partial(patched, engine, unaligned, neurons)
        return Intervention(setting, share, neuron_parameters(engine, neurons), at_work)

    return make

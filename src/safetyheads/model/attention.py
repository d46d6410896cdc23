"""Ablates heads inside attention, by an attention function that transformers calls for every family.

An ablation travels as a keyword that a forward pre-hook puts on the attention module's call, neither global nor in a
context variable: each batch row has its own, other threads and a checkpointed recomputation see it too.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from safetyheads.ablation import Ablation
from safetyheads.errors import UnsupportedModelError
from safetyheads.model.architecture import family_supports_sdpa
from safetyheads.model.packing import Packing

ATTENTION_NAME = "safetyheads"
"""Name of the attention and the mask function in transformers' registries."""

_KEYWORD = "safetyheads_call"

# Sparse attention: the keys that a family's indexer chose for each token, [rows, n_tokens, n_chosen].
_CHOSEN_KEYS = "indices"
# Tensors that say where a token stands or which keys it sees: the mask already holds that, so attention ignores them.
_POSITIONAL_KEYWORDS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "past_key_values", "past_key_value"}
)
# Lives for one forward of a proof, in its own thread.
_callers: ContextVar[list[nn.Module] | None] = ContextVar("safetyheads_callers", default=None)


RowAblation: TypeAlias = tuple[Ablation, Tensor]
"""An ablation of a layer, and bool [n_rows or 1, n_heads]: which of its heads are ablated in which batch row."""


class LeftLayer(Exception):
    """Leaves a layer from inside its attention; ``args`` are the tensors that were wanted of it."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one call of the attention function is told to do."""

    ablations: tuple[RowAblation, ...] = ()
    """Applied one after the other; a head may be in at most one of them per row."""
    leave: bool = False
    """Raise :class:`LeftLayer` with keys and values instead of attending."""
    segments: Packing | None = None
    """How the row's prompts lie, where attention may be taken prompt by prompt."""
    keys_and_values: tuple[Tensor, Tensor] | None = None
    """Attend to these keys and values instead."""
    observe: Callable[..., None] | None = None
    """Called by keyword with query, key, value, mask, output, ``plain`` (nothing but softmax of masked scores weighs
    the values) and ``chosen`` (an indexer chose keys); for the proofs at load."""


class _Ungrouped:
    """An attention module whose keys were repeated for every query head; its family must not repeat them again."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def register() -> None:
    """Put the attention and the mask function into transformers' registries; may be repeated."""
    AttentionInterface.register(ATTENTION_NAME, safetyheads_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, safetyheads_mask)


def registered() -> tuple[Any, Any]:
    """The attention and the mask function that transformers finds under our name; None before :func:`register`."""
    return ALL_ATTENTION_FUNCTIONS.get(ATTENTION_NAME), ALL_MASK_ATTENTION_FUNCTIONS.get(ATTENTION_NAME)


def safetyheads_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the ablations that the call carries; signature and shapes are transformers'.

    Queries [rows, n_heads, n_tokens, d_head] are rotated and normed, keys [rows, n_kv_heads, n_keys, d_head] include
    the cache's; the mask is boolean or additive, None causal. Gives the heads' outputs [rows, n_tokens, n_heads,
    d_value], and attention weights where the family's eager function gives them.
    """
    if (callers := _callers.get()) is not None:
        callers.append(module)
    call: AttentionCall | None = keywords.pop(_KEYWORD, None)
    chosen: Tensor | None = keywords.pop(_CHOSEN_KEYS, None)
    if chosen is not None:
        attention_mask = _causal(query, key) if attention_mask is None else attention_mask
        least = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
        others = attention_mask.new_ones((*chosen.shape[:2], attention_mask.shape[-1]), dtype=torch.bool)
        attention_mask = attention_mask.masked_fill(others.scatter(-1, chosen.long(), False)[:, None], least)
    if call is None:
        return _attend(module, query, key, value, attention_mask, scaling, dropout, keywords)
    if call.leave:
        raise LeftLayer(key, value)
    if call.keys_and_values is not None:
        key, value = call.keys_and_values
    if len(key) != len(query):
        # Keys and values from before the rows were told apart: they are the same in each.
        key, value = (shared.expand(len(query), -1, -1, -1) for shared in (key, value))
    seen, inputs = _ablate_inputs(module, query, key, value, call.ablations)
    inner, weights = partial(_attend, seen, scaling=scaling, dropout=dropout, keywords=keywords), None
    if attention_mask is not None and call.segments is not None and call.segments.cover(query, attention_mask):
        output = by_segment(inner, call.segments, *inputs, attention_mask)
    else:
        output, weights = inner(*inputs, attention_mask)
    before = output
    for ablation, selected in call.ablations:
        if ablation.kind.tensor == "head_output":
            output = _ablate(output, before, ablation, selected, head_dimension=2)
    if call.observe is not None:
        plain = not _family_keywords(keywords) - {"softcap"}
        told = dict(zip(("query", "key", "value"), inputs, strict=True))
        call.observe(**told, mask=attention_mask, output=output, plain=plain, chosen=chosen is not None)
    return output, weights


@contextmanager
def attending() -> Iterator[list[nn.Module]]:
    """Within, the modules that call our attention function in this thread, in their order."""
    callers: list[nn.Module] = []
    token = _callers.set(callers)
    try:
        yield callers
    finally:
        _callers.reset(token)


def _ablate_inputs(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, ablations: tuple[RowAblation, ...]
) -> tuple[nn.Module | _Ungrouped, tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value with the ablations that act on them, and the module as it must be seen with these."""
    seen: nn.Module | _Ungrouped = module
    query_before, key_before = query, key
    for ablation, selected in ablations:
        tensor, grouped = ablation.kind.tensor, key.shape[1] != query.shape[1]
        if tensor == "query" or (tensor == "key" and ablation.kind.operation == "scale" and grouped):
            # (q . eps k) is (eps q . k): in a shared group this touches one query head and never its siblings.
            query = _ablate(query, query_before, ablation, selected, head_dimension=1)
        elif tensor == "key":
            if grouped:
                groups = query.shape[1] // key.shape[1]
                key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
                seen = _Ungrouped(module)
            key = _ablate(key, key_before, ablation, selected, head_dimension=1)
    return seen, (query, key, value)


def _ablate(tensor: Tensor, before: Tensor, ablation: Ablation, selected: Tensor, head_dimension: int) -> Tensor:
    """The tensor with the selected heads scaled, or replaced by the mean over all heads as they were before."""
    shape = [len(selected), 1, 1, 1]
    shape[head_dimension] = selected.shape[1]
    heads = selected.to(tensor.device).view(shape)
    made = {"scale": lambda: tensor * ablation.epsilon, "mean": lambda: before.mean(dim=head_dimension, keepdim=True)}
    return torch.where(heads, made[ablation.kind.operation](), tensor)


def _attend(
    module: nn.Module | _Ungrouped,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    keywords: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Unablated attention: sdpa where the family allows it and nothing asks for more, else the family's own."""
    source = module._module if isinstance(module, _Ungrouped) else module
    needs_family = _family_keywords(keywords)
    sliced = {name: argument for name, argument in keywords.items() if name not in _POSITIONAL_KEYWORDS}
    if not needs_family and family_supports_sdpa(type(source).__module__):
        # Without a mask sdpa is causal from the top left: wrong once a cache holds more keys than there are queries.
        if attention_mask is None and 1 < query.shape[2] != key.shape[2]:
            attention_mask = _causal(query, key)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **sliced
        )
    eager = getattr(sys.modules[type(source).__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedModelError(
            f"{type(source).__name__} passes {', '.join(sorted(needs_family)) or 'no sdpa'} to its attention "
            "and its source has no eager_attention_forward that would know what to do with it"
        )
    mask = _causal(query, key) if attention_mask is None else attention_mask
    if mask.dtype == torch.bool:  # eager functions add it: 0 where allowed, the lowest number where not
        zeros = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
        mask = zeros.masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, scaling=scaling, dropout=dropout, **sliced)


def _family_keywords(keywords: dict[str, Any]) -> set[str]:
    """Names of arguments that only the family's own attention knows what to do with: softcap and tensors."""
    return {
        name
        for name in keywords.keys() - _POSITIONAL_KEYWORDS
        if isinstance(keywords[name], Tensor) or (name == "softcap" and keywords[name] is not None)
    }


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """The causal mask, bool [1, 1, n_tokens, n_keys], for queries that stand at the end of the keys."""
    n_tokens, n_keys = query.shape[2], key.shape[2]
    positions = torch.arange(n_keys, device=query.device)
    return (positions <= positions[n_keys - n_tokens :, None])[None, None]


@contextmanager
def attention_calls(attentions: Sequence[nn.Module | None], calls: Mapping[int, AttentionCall]) -> Iterator[None]:
    """Within, the attention module of each layer in ``calls`` gets that call; hooks are removed after."""
    with ExitStack() as stack:
        for layer, call in calls.items():
            attention = attentions[layer]
            if attention is None:
                raise UnsupportedModelError(f"layer {layer} has no attention")
            stack.enter_context(attention.register_forward_pre_hook(partial(_give_call, call), with_kwargs=True))
        yield


def _give_call(
    call: AttentionCall, _: nn.Module, arguments: Any, keywords: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return arguments, {**keywords, _KEYWORD: call}


def is_ablation_hook(hook: Any) -> bool:
    """Whether a forward pre-hook is one of :func:`attention_calls`."""
    return getattr(hook, "func", None) is _give_call


# Prompts in one row are kept apart: by the mask of packed prompts, and by attention prompt by prompt.

# Lives for one forward of the engine's own, in its own thread; replays use the masks that were captured.
_packing: ContextVar[Packing | None] = ContextVar("safetyheads_packing", default=None)


@contextmanager
def packed(packing: Packing | None) -> Iterator[None]:
    """Within, masks of this thread's forwards follow the packing."""
    token = _packing.set(packing)
    try:
        yield
    finally:
        _packing.reset(token)


def safetyheads_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    **keywords: Any,
) -> Tensor | None:
    """Transformers' boolean mask, of the family's own rule; over packed prompts the rule sees positions.

    A token sees what the family's rule (causal, window, chunk) allows at the two *positions*, in the prefix and in its
    own segment only.
    """
    packing = _packing.get()
    if packing is not None and mask_function is not None:
        positions, segments, family_rule = packing.positions, packing.segments, mask_function

        def mask_function(batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
            same = (segments[kv_index] == 0) | (segments[kv_index] == segments[q_index])
            return same & family_rule(batch, head, positions[q_index], positions[kv_index])

    if (packing is not None and mask_function is not None) or 1 < q_length != kv_length:
        # The skipped mask would mean causal from the top left for a static cache, from the bottom right for others.
        keywords["allow_is_causal_skip"] = False
    if mask_function is not None:
        keywords["mask_function"] = mask_function
    return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **keywords)


def by_segment(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Any]],
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
) -> Tensor:
    """Attention of a packed row, prompt by prompt: what the mask forbids between prompts is never computed.

    ``attend`` takes query, key, value [rows, heads, n_tokens, d] and mask, and gives the heads' outputs [rows,
    n_tokens, n_heads, d_value] and anything; so does this, for the whole row, without the anything.
    """
    # In a model over several devices a layer need not be where the row is.
    tokens, keys, real, places = (
        part.to(query.device) for part in (packing.tokens, packing.keys, packing.real, packing.places)
    )
    n_rows, n_prefix, (n_prompts, longest) = len(query), packing.n_prefix, tokens.shape
    allowed = mask[0, 0][tokens[:, :, None], keys[:, None, :]] & real[:, None, :]

    def picked(tensor: Tensor, tokens: Tensor) -> Tensor:
        """[rows, heads, n_tokens, d] -> [rows * n_prompts, heads, tokens of a prompt, d]."""
        flat = tensor.transpose(1, 2).index_select(1, tokens.flatten())
        return flat.view(len(tensor) * n_prompts, tokens.shape[1], *flat.shape[2:]).transpose(1, 2)

    masks = allowed.repeat(n_rows, 1, 1)[:, None]
    rests, _ = attend(picked(query, tokens), picked(key, keys), picked(value, keys), masks)
    output = rests.reshape(n_rows, n_prompts * longest, *rests.shape[2:]).index_select(1, places)
    if not n_prefix:
        return output
    query, key, value = (tensor[:, :, :n_prefix] for tensor in (query, key, value))
    first, _ = attend(query, key, value, mask[:, :, :n_prefix, :n_prefix])
    return torch.cat([first, output], dim=1)

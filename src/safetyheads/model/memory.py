"""How much memory a pass takes beside the weights. Owns the estimate, from shapes alone, and plans that keep to it.

A pass is at its peak somewhere in the middle of a layer. Which tensors are alive together there was read off
transformers' layers and held against the live bytes of every tensor (bench/roofline.py); what a family does that is
not known here moves the estimate, never a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetyheads.errors import InputError
from safetyheads.model.attention import family_supports_sdpa
from safetyheads.model.costs import layer_flops
from safetyheads.model.planning import LayerCost, Plan, TokenSequence, plan, row_prefix

if TYPE_CHECKING:
    from safetyheads.model.architecture import Architecture
    from safetyheads.model.engine import Engine

# Bytes of a logit while next tokens are read: float32, and in float64 itself, its logarithm, what it is compared with
# and their product.
LOGIT_BYTES = 44


@dataclass(frozen=True, slots=True)
class RowShape:
    """A packed row, as memory sees it."""

    n_tokens: int
    n_prompts: int
    n_prefix: int
    longest_rest: int

    @classmethod
    def of(cls, members: Sequence[TokenSequence]) -> RowShape:
        """The row of these sequences."""
        prefix = row_prefix(members)
        rests = [len(member.token_ids) - prefix for member in members]
        return cls(prefix + sum(rests), len(members), prefix, max(rests))


def fitted_plan(engine: Engine, sequences: Sequence[TokenSequence]) -> Plan:
    """The layout of a pass within the engine's memory budget; see :meth:`safetyheads.model.engine.Engine.plan`."""
    each, quick, budget = layer_flops(engine.architecture), engine.capabilities, engine.memory_budget
    cost, n_tokens = LayerCost(each.token, each.pair), engine.tokens_that_fit(bytes_per_token(engine))
    while True:
        layout = plan(sequences, cost, n_tokens, engine.n_heads, packs=quick.packs, by_segment=quick.segments)
        needed = pass_bytes(engine, sequences, layout)
        if budget is None or needed <= budget:
            return layout
        if n_tokens == 1:
            raise InputError(
                f"one head on these prompts needs about {_mebibytes(needed)} beside the weights; the memory budget is "
                f"{_mebibytes(budget)}"
            )
        n_tokens //= 2


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:.0f} MiB" if n >= 10 * 2**20 else f"{n / 2**20:.2g} MiB"


def bytes_per_token(engine: Engine) -> int:
    """Of a batch, for a first guess at how many fit: prompts of some 32 tokens, no prefix to speak of."""
    row = RowShape(n_tokens=256, n_prompts=8, n_prefix=0, longest_rest=32)
    return -(-layer_bytes(engine, 8, row) // (8 * row.n_tokens))


def pass_bytes(engine: Engine, sequences: Sequence[TokenSequence], layout: Plan, reads_logits: bool = True) -> int:
    """Peak of a whole pass (begin and measure), beside the weights."""
    facts, size = engine.architecture, engine.dtype.itemsize
    n = layout.groups_per_batch
    rows = [RowShape.of([sequences[member] for member in members]) for members in layout.rows]
    n_wanted = sum(sequence.n_wanted for sequence in sequences)
    masks = 2 if facts.windows else 1
    # Each layer's input, positions, and the outputs of the first ablated layer's heads, unablated and ablated.
    width = facts.d_model * facts.n_layers + 2 * facts.d_head + 2 * facts.n_heads * facts.d_head
    captured = sum(row.n_tokens * (width * size + 32) + masks * row.n_tokens**2 for row in rows)
    capturing = max(layer_bytes(engine, 1, row) + 4 * row.n_tokens**2 for row in rows)
    replaying = max(layer_bytes(engine, n, row) for row in rows)
    if engine.capabilities.starts_late:
        # In the first ablated layer a row goes unablated and one ablated, as far as their heads' outputs.
        replaying = max(replaying, *(_attention_bytes(engine, 2, row) for row in rows))
    states = n * n_wanted * facts.d_model * size
    kept = beginning = 0
    reading = n * len(sequences) * (facts.d_model * (size + 8) + 32 * len(sequences))
    if reads_logits:
        vocabulary = facts.vocabulary_size
        chunk = min(max(1, engine.logits_at_once // vocabulary), n * n_wanted) * vocabulary
        kept = 8 * n_wanted * vocabulary
        reading = max(reading, LOGIT_BYTES * chunk)
        beginning = kept + 12 * chunk
    return kept + captured + max(beginning, capturing, states + replaying, 2 * states, states + reading)


def layer_bytes(engine: Engine, n_groups: int, row: RowShape) -> int:
    """Peak of ``n_groups`` rows of a batch inside a layer."""
    facts, size = engine.architecture, engine.dtype.itemsize
    d_model, heads, kv_heads = facts.d_model, facts.n_heads * facts.d_head, facts.n_kv_heads * facts.d_head
    tokens = n_groups * row.n_tokens
    mlp = tokens * (3 * d_model + _mlp_width(facts)) * size
    if _score_bytes(facts, size) and not _is_segmented(engine, row):
        # Layers hold their attention's weights until they return.
        mlp += tokens * facts.n_heads * (row.n_tokens + 1) * size
    rotary = tokens * (2 * d_model + 4 * heads + 2 * kv_heads) * size
    norm = tokens * (4 * d_model * size + 8 * d_model)  # in float32, whatever the dtype
    return max(mlp, rotary, norm, _attention_bytes(engine, n_groups, row))


def _is_segmented(engine: Engine, row: RowShape) -> bool:
    """Whether attention is taken prompt by prompt."""
    return engine.capabilities.segments and row.n_prompts > 1


def _attention_bytes(engine: Engine, n_groups: int, row: RowShape) -> int:
    """Inside attention: the block's input and its norm, queries, keys, values, and what is gathered of them."""
    facts, size = engine.architecture, engine.dtype.itemsize
    heads, kv_heads = facts.n_heads * facts.d_head, facts.n_kv_heads * facts.d_head
    whole = n_groups * row.n_tokens * (2 * facts.d_model + heads + 2 * kv_heads) * size
    if not _is_segmented(engine, row):
        mask = row.n_tokens**2 * (1 + size)
        return whole + mask + _attend_bytes(facts, size, n_groups, row.n_tokens, row.n_tokens)
    n, each = n_groups * row.n_prompts, row.n_prefix + row.longest_rest
    picked = n * (row.longest_rest * heads + 2 * each * kv_heads) * size
    mask = n * row.longest_rest * each * (1 + size)
    rests = picked + mask + _attend_bytes(facts, size, n, row.longest_rest, each)
    if not row.n_prefix:
        return whole + rests
    # The rests' outputs, padded and in place, and their weights if there are any, wait while the prefix attends.
    waiting = (n * row.longest_rest + n_groups * (row.n_tokens - row.n_prefix)) * heads * size
    if _score_bytes(facts, size):
        waiting += n * row.longest_rest * each * facts.n_heads * size
    mask = row.n_prefix**2 * (1 + size)
    first = waiting + mask + _attend_bytes(facts, size, n_groups, row.n_prefix, row.n_prefix)
    return whole + max(rests, first)


def _attend_bytes(facts: Architecture, size: int, n: int, n_queries: int, n_keys: int) -> int:
    """One call of an attention function on ``n`` rows: repeated keys and values, scores, outputs."""
    heads = facts.n_heads * facts.d_head
    repeated = 2 * n_keys * heads * size if facts.n_kv_heads != facts.n_heads else 0
    output, n_scores = n_queries * heads * size, n_queries * n_keys * facts.n_heads
    scores = _score_bytes(facts, size)
    # Eager: first scores and what becomes of them, then weights, and the output in two orders.
    return n * (repeated + (max(n_scores * scores, n_scores * size + 2 * output) if scores else output))


def _mlp_width(facts: Architecture) -> int:
    """Elements a token that are alive together inside an MLP, beside the residual stream."""
    parameters = list(facts.layers[facts.with_heads[0]].parameters())
    stacked = [parameter for parameter in parameters if parameter.ndim == 3]
    if not stacked:
        fused = any(parameter.ndim == 2 and parameter.shape[0] == 2 * facts.d_mlp for parameter in parameters)
        return (4 if fused else 3) * facts.d_mlp  # activated gate, up and product; fused, gate and up are one
    n_experts = stacked[0].shape[0]
    inner = min(parameter.numel() for parameter in stacked) // (n_experts * facts.d_model)
    biased = any(parameter.ndim == 2 and parameter.shape == (n_experts, 2 * inner) for parameter in parameters)
    # Tokens are sorted by expert, each as often as experts take it; gathered biases make the gate's work five tensors.
    return round(facts.active_experts * n_experts) * (facts.d_model + (9 if biased else 4) * inner)


def _score_bytes(facts: Architecture, size: int) -> int:
    """Of a score (query, key, head) where the family's eager attention writes scores down; sdpa does not."""
    attention = facts.attentions[facts.with_heads[0]]
    if getattr(attention, "sinks", None) is not None:
        return 3 * size  # the scores, with the sink, less the largest
    softcap = getattr(attention, "attn_logit_softcapping", None)
    if softcap is None and family_supports_sdpa(type(attention).__module__):
        return 0
    return 8 if size == 4 else 10  # the scores, and their softmax in float32

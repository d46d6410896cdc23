"""Plans passes over a model: which prompts share a packed row, how many head groups a batch; counts what that costs."""

import errno
from collections.abc import Callable, Iterator, MutableSet, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, TypeVar

import psutil
import torch
from torch import nn

from safetyheads.errors import InputError
from safetyheads.heads import Head
from safetyheads.model.architecture import Architecture, Capabilities, family_supports_sdpa
from safetyheads.model.packing import TokenSequence, row_prefix, shared_prefix

Item = TypeVar("Item")
Result = TypeVar("Result")

# Work that a pass through one layer costs whatever its size (launches, Python), as tokens' worth of that layer.
# Measured on two cores at widths 128 to 512: 20 to 60; the plan is flat around it.
_OVERHEAD_TOKENS = 48
# A CPU batch beyond this many tokens leaves the caches and gains nothing (bench/LOG.md, 2026-11-24).
CPU_TOKENS = 4096
CUDA_TOKENS = 65536
# The mask of a row has this number squared of entries.
_LONGEST_ROW = 4096
# Bytes that the masks of all rows may take together, if shorter rows can do with fewer.
_MASKS_AT_ONCE = 1 << 25
# Logits in flight together while next tokens are read: 16 MiB.
_LOGITS_AT_ONCE = 1 << 22
# Of these, so many are in float64 together, where each takes so many bytes: itself, its logarithm, what it is compared
# with and their product.
IN_FLOAT64 = 1 << 19
_FLOAT64_BYTES = 40
# Bytes of a memory budget for each of them. Fewer would do by now, but other chunks move scores in their last bits.
_BUDGET_A_LOGIT = 176


@dataclass(frozen=True, slots=True)
class Plan:
    """The layout of a pass. The manifest keeps it, because batch shapes move results in the last bits."""

    rows: tuple[tuple[int, ...], ...]
    """Sequences that share a packed row."""
    groups_per_batch: int
    """Head groups, that is batch rows, that are replayed together."""
    threads: int

    def is_of(self, n_sequences: int) -> bool:
        """Whether it lays out so many sequences, each once."""
        numbers = sorted(number for row in self.rows for number in row)
        return numbers == list(range(n_sequences)) and min(self.groups_per_batch, self.threads) > 0


# Plans


def lay_out(sequences: Sequence[TokenSequence], costs: "ModelCosts", token_budget: int) -> Plan:
    """Choose how many sequences share a row and how many groups a batch of at most ``token_budget`` tokens.

    At most as many groups share a batch as a layer has heads.
    """
    quick, n_rows_useful = costs.quick, costs.architecture.n_heads
    prefix = shared_prefix(sequences)
    rest = sum(len(sequence.token_ids) - prefix for sequence in sequences) / len(sequences)

    def cost_per_sequence(n: int) -> float:
        length = prefix + n * rest
        n_pairs = prefix**2 + n * rest * (prefix + rest) if quick.segments else length**2
        n_rows = max(1, min(n_rows_useful, int(token_budget // length)))
        overhead = _OVERHEAD_TOKENS * costs.token / n_rows
        return (length * costs.token + n_pairs * costs.pair + overhead) / n

    def mask_bytes(n: int) -> float:
        return len(sequences) / n * (prefix + n * rest) ** 2

    longest = min(token_budget, _LONGEST_ROW)
    most = max(1, int((longest - prefix) // max(rest, 1))) if quick.packs else 1
    numbers = range(1, min(most, len(sequences)) + 1)
    allowed = max(_MASKS_AT_ONCE, min(map(mask_bytes, numbers)))
    n_per_row = min((n for n in numbers if mask_bytes(n) <= allowed), key=cost_per_sequence)
    n_rows = -(-len(sequences) // n_per_row)
    base, extra = divmod(len(sequences), n_rows)
    starts = [number * base + min(number, extra) for number in range(n_rows + 1)]
    plan = Plan(tuple(tuple(range(start, end)) for start, end in pairwise(starts)), 1, torch.get_num_threads())
    groups = max(1, min(n_rows_useful, token_budget // longest_row(sequences, plan)))
    return replace(plan, groups_per_batch=groups)


def fit_plan(sequences: Sequence[TokenSequence], costs: "ModelCosts", n_tokens: int, memory_budget: int | None) -> Plan:
    """The plan of a pass that keeps to a memory budget; batches begin with at most ``n_tokens``."""
    while True:
        plan = lay_out(sequences, costs, n_tokens)
        needed = costs.pass_bytes(sequences, plan, logits_at_once(memory_budget), memory_budget)
        if memory_budget is None or needed <= memory_budget:
            return plan
        if n_tokens == 1:
            mebibytes = [n / 2**20 for n in (needed, memory_budget)]
            most, budget = (f"{n:.0f} MiB" if n >= 10 else f"{n:.2g} MiB" for n in mebibytes)
            raise InputError(
                f"one head on these prompts needs about {most} beside the weights; the memory budget is {budget}"
            )
        n_tokens //= 2


def longest_row(sequences: Sequence[TokenSequence], plan: Plan) -> int:
    """Tokens of the longest packed row."""
    return max(size.n_tokens for size in row_sizes(sequences, plan))


# Memory


def allowed_memory(device: torch.device, memory_budget: int | None, share: float) -> int:
    """Bytes that batches may take: the budget where there is one, else a share of what is free now."""
    if memory_budget is not None:
        return memory_budget
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * share)
    return int(psutil.virtual_memory().available * share)


def captures_leave(n_bytes: int, budget: int) -> bool:
    """Whether captures take so much of the bytes that batches may take that they are kept off the device."""
    return n_bytes > budget // 2


def logits_at_once(memory_budget: int | None) -> int:
    """Logits that are in memory together, in elements, while next tokens are read."""
    return _LOGITS_AT_ONCE if memory_budget is None else min(_LOGITS_AT_ONCE, memory_budget // _BUDGET_A_LOGIT)


_TORCH_SAYS = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "ALLOC_FAILED")
"""How torch says so of the CPU, on Linux and on others, and of CUDA's libraries."""


OUT_OF_MEMORY = "out of memory; what was computed is kept. A smaller --dtype or --limit may help"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the CPU's allocator, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_SAYS)


@contextmanager
def unless_too_large(n_items: int) -> Iterator[None]:
    """Within, running out of memory ends the block in silence, if there are several items that can be halved."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if n_items < 2 or not is_out_of_memory(error):
            raise


def halving(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Result | None],
    halved: MutableSet[str] | None = None,
    key: Callable[[Sequence[Item]], str] = str,
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Run over all items at once; where memory runs out, over each half, and so on down to one.

    Yields the items that ran together, with what ``run`` gave; it may give None itself: too many, as known before.
    ``halved`` has the ``key`` of items that were too many before, and gets those that are now: other batches give
    other last bits.
    """
    result = None
    if not halved or len(items) < 2 or key(items) not in halved:
        with unless_too_large(len(items)):
            result = run(items)
        if result is None and halved is not None:
            halved.add(key(items))
    if result is not None:
        yield items, result
        return
    # Not before the block has ended: the error's traceback holds the tensors of the failed attempt.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    yield from halving(items[:middle], run, halved, key)
    yield from halving(items[middle:], run, halved, key)


# Costs. Useful operations only: a token against the tokens it may see, weights against tokens that are really there.
# Without padding, masked pairs and elementwise work a share of the machine's peak that is computed from it is honest.


class RowSize(NamedTuple):
    """What the cost of a packed row depends on."""

    n_tokens: int
    n_pairs: int
    """(token, token it sees) under a causal mask, each prompt for itself."""
    n_wanted: int
    """Tokens whose last states are read."""
    n_wanted_pairs: int
    """Pairs of the wanted tokens alone."""
    n_prompts: int
    n_prefix: int
    longest_rest: int
    """Most tokens of a prompt behind the prefix."""


def row_sizes(sequences: Sequence[TokenSequence], plan: Plan) -> tuple[RowSize, ...]:
    """The sizes of a plan's rows."""
    sizes = []
    for row in plan.rows:
        members = [sequences[member] for member in row]
        prefix = row_prefix(members)
        lengths = [len(member.token_ids) for member in members]
        sizes.append(
            RowSize(
                n_tokens=prefix + sum(length - prefix for length in lengths),
                n_pairs=_pairs(0, prefix) + sum(_pairs(prefix, length) for length in lengths),
                n_wanted=sum(member.n_wanted for member in members),
                n_wanted_pairs=sum(_pairs(len(m.token_ids) - m.n_wanted, len(m.token_ids)) for m in members),
                n_prompts=len(members),
                n_prefix=prefix,
                longest_rest=max(lengths) - prefix,
            )
        )
    return tuple(sizes)


def _pairs(start: int, end: int) -> int:
    """Pairs of the tokens at positions ``start`` to ``end`` with themselves and all before them."""
    return (start + 1 + end) * (end - start) // 2


class ModelCosts:
    """Counts, from shapes alone, what passes by the quick paths take, at ``itemsize`` bytes an activation.

    Attributes:
        query: floating-point operations of one layer (a multiplication and an addition are two) that project a token
            to queries, where queries have a projection of their own; else 0, and they are in ``key_value``.
        key_value: a token to keys and values.
        output: a token's head outputs.
        mlp: all else with weights that a token goes through; of experts, those that it is sent to.
        token: a token through all weights.
        pair: score and weighted value of a token and a token it sees.
    """

    def __init__(self, architecture: Architecture, quick: Capabilities, itemsize: int) -> None:
        self.architecture, self.quick, self.itemsize = architecture, quick, itemsize
        layer = architecture.with_heads[0]  # stands for all
        shape = architecture.shapes[layer]
        assert shape is not None  # it has heads

        def weights(module: nn.Module | None, active_experts: float = 1.0) -> float:
            """Operations of a module's matrices; of stacked ones (experts), the active share."""
            matrices = [] if module is None else [each for each in module.parameters() if each.ndim >= 2]
            return sum(2 * matrix.numel() * (active_experts if matrix.ndim > 2 else 1.0) for matrix in matrices)

        attention = weights(architecture.attentions[layer])
        self.query = weights(architecture.query_projections[layer])
        self.output = weights(architecture.output_projections[layer])
        self.key_value = attention - self.query - self.output
        self.token = weights(architecture.layers[layer], architecture.active_experts)
        self.mlp = self.token - attention
        self.pair = 2 * shape.n_heads * (shape.d_head + shape.d_value)

    def forward_flops(self, rows: Sequence[RowSize]) -> float:
        """One plain run over all layers, without logits."""
        return self.architecture.n_layers * sum(self.token * row.n_tokens + self.pair * row.n_pairs for row in rows)

    def replay_flops(self, rows: Sequence[RowSize], start: int) -> float:
        """Replaying one group of heads whose first layer is ``start``, by the quick paths."""
        quick, last = self.quick, self.architecture.n_layers - 1
        if not quick.replays:
            return self.forward_flops(rows)
        n_tokens, n_wanted = (sum(getattr(row, name) for row in rows) for name in ("n_tokens", "n_wanted"))
        whole = self.forward_flops(rows) / self.architecture.n_layers
        late = (self.output + self.mlp) * n_tokens if quick.starts_late else whole
        finish = late if start == last else whole
        if quick.prunes:
            finish = (self.output + self.mlp) * n_wanted
            if start < last or not quick.starts_late:
                finish += self.query * n_wanted + self.pair * sum(row.n_wanted_pairs for row in rows)
                finish += self.key_value * n_tokens
        return finish if start == last else late + (last - 1 - start) * whole + finish

    def scan_flops(self, rows: Sequence[RowSize], heads: Sequence[Head]) -> float:
        """Scoring each head alone; what rows of one layer share (their first attention) is left out."""
        by_layer = {layer: self.replay_flops(rows, layer) for layer in {head.layer for head in heads}}
        return sum(by_layer[head.layer] for head in heads)

    def bytes_per_token(self) -> int:
        """Of a batch, to guess how many tokens fit: prompts of some 32 tokens, no prefix to speak of."""
        row = RowSize(256, 0, 8, 0, n_prompts=8, n_prefix=0, longest_rest=32)
        return -(-max(self._layer_bytes(8, row)) // (8 * row.n_tokens))

    def capture_bytes(self, rows: Sequence[RowSize]) -> int:
        """Of every layer's input, for all rows."""
        facts = self.architecture
        return sum(row.n_tokens for row in rows) * facts.d_model * facts.n_layers * self.itemsize

    def pass_bytes(
        self, sequences: Sequence[TokenSequence], plan: Plan, at_once: int, budget: int | None = None
    ) -> int:
        """Peak of a whole pass beside the weights, within 30 % (tests/model/test_planning.py).

        ``at_once`` logits are in memory together, in elements; 0 where no next token is read. Captures that take too
        much of the ``budget`` are elsewhere, but for one row's input of one layer.
        """
        facts, size, n = self.architecture, self.itemsize, plan.groups_per_batch
        rows, n_wanted = row_sizes(sequences, plan), sum(sequence.n_wanted for sequence in sequences)
        # Each layer's input, positions and masks, and the outputs of the first ablated layer's heads.
        width, masks = 2 * facts.d_head + 2 * facts.n_heads * facts.d_head, 2 if facts.windows else 1
        captured = self.capture_bytes(rows)
        if budget is not None and captures_leave(captured, budget):
            captured = max(row.n_tokens for row in rows) * facts.d_model * size
        captured += sum(row.n_tokens * (width * size + 32) + masks * row.n_tokens**2 for row in rows)
        running = 0
        for row in rows:
            capturing = max(self._layer_bytes(1, row)) + 4 * row.n_tokens**2
            # In the first ablated layer one row goes unablated and one ablated, as far as their heads' outputs.
            starting = self._layer_bytes(2, row)[1] if self.quick.starts_late else 0
            running = max(running, capturing, starting, *self._layer_bytes(n, row))
        states = n * n_wanted * facts.d_model * size
        gram = min(len(sequences), facts.d_model) ** 2
        reading = n * (len(sequences) * facts.d_model * (size + 8) + 32 * gram)
        chunk = min(max(1, at_once // facts.vocabulary_size), n * n_wanted) * facts.vocabulary_size if at_once else 0
        kept = max(4, size) * n_wanted * facts.vocabulary_size if at_once else 0
        logits = 4 * chunk + _FLOAT64_BYTES * min(chunk, max(IN_FLOAT64, facts.vocabulary_size))
        return kept + captured + states + max(running, reading, kept, logits)

    def _layer_bytes(self, n_groups: int, row: RowSize) -> tuple[int, int]:
        """Peaks of ``n_groups`` batch rows in a layer's MLP and in its attention, as transformers' layers have them."""
        facts, size = self.architecture, self.itemsize
        heads, kv_heads = facts.n_heads * facts.d_head, facts.n_kv_heads * facts.d_head
        scores = _score_bytes(facts, size)
        tokens = n_groups * row.n_tokens
        # (prompts, queries of each, keys of each) that attend in one call, by prompt or over the whole row.
        attends = [(1, row.n_tokens, row.n_tokens)]
        if self.quick.segments and row.n_prompts > 1:
            attends = [(row.n_prompts, row.longest_rest, row.n_prefix + row.longest_rest)]
            attends += [(1, row.n_prefix, row.n_prefix)] if row.n_prefix else []
        attention, weights = 0, 0
        for n_prompts, n_queries, n_keys in attends:
            n = n_groups * n_prompts
            # Gathered queries, keys and values; these repeated for grouped heads; mask, scores and output.
            gathered = (n_queries * heads + 2 * n_keys * kv_heads) * size if len(attends) > 1 or n_prompts > 1 else 0
            repeated = 2 * n_keys * heads * size if facts.n_kv_heads != facts.n_heads else 0
            output = n_queries * heads * size * (2 if scores else 1)
            pairs = n_queries * n_keys * (1 + size + facts.n_heads * scores)
            attention = max(attention, weights + n * (gathered + repeated + output + pairs))
            # Eager attention gives its weights back: a layer holds them until it returns.
            weights += n * n_queries * n_keys * facts.n_heads * size if scores else 0
        block = tokens * (2 * facts.d_model + heads + 2 * kv_heads) * size
        mlp = tokens * (3 * facts.d_model + _mlp_width(facts)) * size + (weights if len(attends) == 1 else 0)
        return mlp, block + attention


def _mlp_width(facts: Architecture) -> int:
    """Elements of a token that are in memory together inside an MLP, beside the residual stream."""
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

"""Decodes answers: greedy or sampled, batched with a KV cache, a head group for each batch row.

Our own loop, not transformers' ``generate``: rows of one batch have different ablations, and each row draws the same
noise in any batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.answers.sampling import GREEDY, Choice, Place, Sampling, choose, noise_key
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.heads import Group
from safetyheads.model.planning import Padded, allowed_memory, halving, left_padded

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

Route: TypeAlias = Literal["plain", "drafted", "continued"]
"""How an answer was decoded: from its first token; it is the unablated answer; from the first difference on."""
Stop: TypeAlias = Callable[[Sequence[int]], bool]
"""Given an answer's first tokens, tells whether they are enough."""

_MOST_ROWS = 256
_MEMORY_SHARE = 0.4


class ShortContextWarning(UserWarning):
    """The model's context leaves some prompts fewer new tokens than requested."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded."""

    max_new_tokens: int = 128
    """Longest answer; the paper uses 128."""
    sampling: Sampling = GREEDY
    """Greedy, or top-k with k = 5 as in Fig 4."""
    full_answers: bool = False
    """Whether a row is decoded to its end after every judge is final."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"an answer needs at least one new token; got {self.max_new_tokens}")


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to decode: a batch row."""

    token_ids: tuple[int, ...]
    """The prompt under its template."""
    group: Group = ()
    """Heads ablated while answering."""
    begun: tuple[int, ...] = ()
    """First tokens of the answer that are known already; decoding continues after them."""
    stop: Stop | None = None
    """Called after each new token; None decodes to the end."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The decoded answer to one request."""

    token_ids: tuple[int, ...]
    """New tokens, without the end token."""
    finished: bool
    """Whether the model ended it, not the limit."""
    limit: int
    """Most new tokens: the number requested, or what the model's context leaves."""
    margins: tuple[float, ...] = ()
    """Margin of each decoded token (:class:`Choice`), without those of ``begun``; the end token's is the last."""
    route: Route = "plain"
    """Which decoding path produced it."""
    changed: bool | None = None
    """Whether it differs from the unablated answer; None where that was not compared."""

    @property
    def complete(self) -> bool:
        """Whether the model or the limit ended it, not ``stop``."""
        return self.finished or len(self.token_ids) >= self.limit

    def differs_from(self, other: Answer) -> bool:
        """Whether tokens or end differ."""
        return (self.token_ids, self.finished) != (other.token_ids, other.finished)


def generate(
    engine: Engine,
    prompts: PromptSet,
    max_new_tokens: int = 128,
    groups: Sequence[Group] | None = None,
    ablation: Ablation = UNDIFFERENTIATED_ATTENTION,
    sampling: Sampling = GREEDY,
) -> tuple[Answer, ...]:
    """Decode an answer to each prompt, prompt i with ``groups[i]`` ablated; unablated by default."""
    encoded = engine.ask(prompts).token_ids
    if groups is not None and len(groups) != len(encoded):
        raise InputError(f"{len(groups)} groups for {len(encoded)} prompts; each prompt needs its own")
    chosen = groups or [()] * len(encoded)
    requests = [Request(token_ids, tuple(group)) for token_ids, group in zip(encoded, chosen, strict=True)]
    return answer(engine, requests, ablation, max_new_tokens, sampling)


def answer(
    engine: Engine,
    requests: Sequence[Request],
    ablation: Ablation = UNDIFFERENTIATED_ATTENTION,
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    on_rows: Callable[[int], None] | None = None,
    n_rows: int | None = None,
) -> tuple[Answer, ...]:
    """Decode an answer to each request, in batches with a KV cache; out of memory halves a batch.

    Args:
        engine: the model.
        requests: prompts, each with its own group of heads.
        ablation: of every head in every group.
        max_new_tokens: the limit; a row also ends at an end token and where the model's context does.
        sampling: greedy or top-k.
        on_rows: called with the number of answers just finished.
        n_rows: requests a batch; by default as many as fit the free memory.

    Raises:
        InputError: the limit is below one token.
        UnsupportedModelError: decoding with a cache is not exact for this model family.
    """
    if max_new_tokens < 1:
        raise InputError(f"an answer needs at least one new token; got {max_new_tokens}")
    if not requests:
        return ()
    longest = max(len(request.token_ids) for request in requests) + max_new_tokens
    engine.prove_up_to(longest)
    if not engine.capabilities.caches:
        family = engine.architecture.family
        raise UnsupportedModelError(f"{family}: no answers can be made, for decoding with a cache is not exact here")
    message = short_context(engine, longest, max_new_tokens)
    if message is not None:
        warnings.warn(message, ShortContextWarning, stacklevel=2)

    def run(batch: Sequence[Request]) -> list[Answer]:
        return _Batch(engine, batch, ablation, max_new_tokens, sampling).run()

    answers: dict[int, Answer] = {}
    for indices in _batches(engine, requests, n_rows or rows_that_fit(engine, longest)):
        waiting = iter(indices)
        for part, decoded in halving([requests[index] for index in indices], run):
            answers |= zip(islice(waiting, len(part)), decoded, strict=True)
            if on_rows is not None:
                on_rows(len(decoded))
    return tuple(answers[index] for index in range(len(requests)))


def _batches(engine: Engine, requests: Sequence[Request], n_rows: int) -> Iterator[list[int]]:
    """Indices of requests that share a batch.

    Requests of similar length share one, which saves padding (bench/LOG.md, the demo's time); only requests of equal
    length where padding is not exact.
    """

    def length(index: int) -> int:
        return len(requests[index].token_ids) + len(requests[index].begun)

    order = sorted(range(len(requests)), key=length)
    runs = [order] if engine.capabilities.pads else [list(same) for _, same in groupby(order, key=length)]
    for run in runs:
        for at in range(0, len(run), n_rows):
            yield run[at : at + n_rows]


def short_context(engine: Engine, longest: int, max_new_tokens: int) -> str | None:
    """A warning if the context leaves the longest prompt fewer new tokens than requested; else None."""
    context = engine.architecture.context_length
    if context is None or longest <= context:
        return None
    return (
        f"the model's context of {context} tokens leaves the longest prompt {context - longest + max_new_tokens} new "
        f"tokens of {max_new_tokens}: answers to such prompts are cut short"
    )


def end_tokens(engine: Engine) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config and the tokenizer's."""
    configured = getattr(engine.model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(int(end) for end in [*ends, engine.tokenizer.eos_token_id] if end is not None)


def rows_that_fit(engine: Engine, longest: int) -> int:
    """Number of rows of ``longest`` tokens whose caches fit the free memory."""
    facts = engine.architecture
    width = sum(shape.n_kv_heads * (shape.d_head + shape.d_value) for shape in facts.shapes if shape is not None)
    cache = width * engine.dtype.itemsize * longest
    allowed = allowed_memory(engine.device, engine.memory_budget, _MEMORY_SHARE)
    return max(1, min(_MOST_ROWS, allowed // (cache + 8 * facts.vocabulary_size)))


class _Batch:
    """The state of one batch during decoding."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], ablation: Ablation, max_new_tokens: int, sampling: Sampling
    ) -> None:
        self.engine, self.requests, self.ablation, self.sampling = engine, requests, ablation, sampling
        context = engine.architecture.context_length or 1 << 60
        self.limits = [min(max_new_tokens, context - len(request.token_ids)) for request in requests]
        self.tokens = [list(request.begun) for request in requests]
        self.margins: list[list[float]] = [[] for _ in requests]
        self.finished, self.stopped = [False] * len(requests), [False] * len(requests)
        self.noise_keys = [noise_key(request.token_ids) for request in requests]
        self.ends = end_tokens(engine)

    @torch.inference_mode()
    def run(self) -> list[Answer]:
        """Decode until every row has ended."""
        from transformers import DynamicCache

        device, turns = self.engine.device, self.engine.architecture.turns
        open_rows = [row for row in range(len(self.requests)) if self._is_open(row)]
        rows: list[int] = []
        turned = True
        while open_rows:
            if turned:
                # Past such a length, families place all tokens differently: the cache of shorter rows is invalid.
                padded = self._padded(open_rows)
                ids, mask, positions = padded.token_ids, padded.mask, padded.positions
                cache, turned = DynamicCache(config=self.engine.model.config), False
            else:
                kept = torch.tensor([rows.index(row) for row in open_rows], device=device)
                # Reordered, not selected: layers that hold a state instead of keys support only reordering.
                cache.reorder_cache(kept)
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = open_rows
            groups = [self.requests[row].group for row in rows]
            with self.engine.ablated_rows(groups, self.ablation) as model:
                # Ended rows stay in the batch until half of it has ended: removing rows copies the cache.
                while len(open_rows) * 2 > len(rows) and not turned:
                    output = model(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    )
                    places = [
                        Place(self.noise_keys[row], len(self.tokens[row])) if self._is_open(row) else None
                        for row in rows
                    ]
                    choice = choose(output.logits[:, -1].float(), places, self.sampling)
                    self._append(choice, rows)
                    open_rows = [row for row in rows if self._is_open(row)]
                    ids, positions = choice.tokens[:, None], positions[:, -1:] + 1
                    mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                    turned = mask.shape[1] - 1 in turns
        ended = zip(self.tokens, self.finished, self.limits, self.margins, strict=True)
        return [Answer(tuple(tokens), finished, limit, tuple(margins)) for tokens, finished, limit, margins in ended]

    def _padded(self, rows: Sequence[int]) -> Padded:
        """Prompts of these rows with their answers so far."""
        read = [(*self.requests[row].token_ids, *self.tokens[row]) for row in rows]
        # Padding is masked, so any token will do; but the model may have no embedding for an end token.
        pad = next(iter(self.ends), 0)
        return left_padded(read, pad if pad < self.engine.n_embedded else 0, self.engine.device)

    def _is_open(self, row: int) -> bool:
        return not self.finished[row] and not self.stopped[row] and len(self.tokens[row]) < self.limits[row]

    def _append(self, choice: Choice, rows: Sequence[int]) -> None:
        """Add the chosen tokens to their rows, and note which rows end."""
        for token, margin, row in zip(choice.tokens.tolist(), choice.margins.tolist(), rows, strict=True):
            if not self._is_open(row):
                continue
            self.margins[row].append(margin)
            if token in self.ends:
                self.finished[row] = True
                continue
            self.tokens[row].append(token)
            stop = self.requests[row].stop
            self.stopped[row] = stop is not None and stop(self.tokens[row])

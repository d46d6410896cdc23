"""Answers of the model under ablations, a group a row. Owns decoding; judges nothing.

The loop is ours because rows of one batch carry different ablations and draw the same noise whatever the batch;
``engine.ablated`` with the model's own ``generate`` serves everything else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.answers.sampling import GREEDY, Choice, Place, Sampling, choose, noise_key
from safetyheads.errors import InputError, UnsupportedModelError
from safetyheads.heads import Group
from safetyheads.model.planning import allowed_memory, halving

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine
    from safetyheads.prompts.sets import PromptSet

_MOST_ROWS = 256
_MEMORY_SHARE = 0.4


class ShortContextWarning(UserWarning):
    """The model's context leaves some prompts fewer new tokens than were asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to be made: a batch row."""

    token_ids: tuple[int, ...]
    """The prompt under its template."""
    group: Group = ()
    """Heads ablated while answering."""
    begun: tuple[int, ...] = ()
    """The answer's first tokens, where they are known already; it goes on from there."""
    stop: Callable[[Sequence[int]], bool] | None = None
    """Asked after each new token whether the answer so far is enough; None answers to the end."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated for one request."""

    token_ids: tuple[int, ...]
    """New tokens, without the one that ends the answer."""
    finished: bool
    """Whether the model ended it; else the limit did."""
    limit: int
    """New tokens it was allowed: those asked for, or what the model's context left."""
    margins: tuple[float, ...] = ()
    """How narrowly each token was chosen (:class:`Choice`), from the first that was not begun
    on; the end token's is the last."""

    @property
    def complete(self) -> bool:
        """Whether the model or the limit ended it, and no request to stop."""
        return self.finished or len(self.token_ids) >= self.limit


def generate(
    engine: Engine,
    prompts: PromptSet,
    max_new_tokens: int = 128,
    groups: Sequence[Group] | None = None,
    ablation: Ablation = UNDIFFERENTIATED_ATTENTION,
    sampling: Sampling = GREEDY,
) -> tuple[Answer, ...]:
    """An answer to each prompt, prompt i under ``groups[i]`` (unablated by default)."""
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
    """An answer to each request, batched with a KV cache; each row stops at EOS or at its limit.

    Args:
        engine: the model.
        requests: prompts with the heads ablated in their rows; rows may differ.
        ablation: of every head in every group.
        max_new_tokens: the limit; a row also ends where the model's context does.
        sampling: greedy or top-k.
        on_rows: told how many answers were just finished.
        n_rows: requests a batch, always; by default as many as fit, and out of memory halves a batch.

    Returns:
        The answers, in the order of the requests.
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
    _warn_of_short_context(engine, longest, max_new_tokens)

    def run(batch: Sequence[Request]) -> list[Answer]:
        return _Batch(engine, batch, ablation, max_new_tokens, sampling).run()

    answers: dict[int, Answer] = {}
    for indices in _batches(engine, requests, n_rows or rows_that_fit(engine, longest)):
        batch = [requests[index] for index in indices]
        made = halving(batch, run) if n_rows is None else [(batch, run(batch))]
        waiting = iter(indices)
        for _, part in made:
            answers |= zip(islice(waiting, len(part)), part, strict=True)
            if on_rows is not None:
                on_rows(len(part))
    return tuple(answers[index] for index in range(len(requests)))


def _batches(engine: Engine, requests: Sequence[Request], together: int) -> Iterator[list[int]]:
    """Which requests are decoded together: those of like length, which saves padding (bench/LOG.md, the demo's time).

    Only those of one length, where padding is not exact.
    """

    def length(index: int) -> int:
        return len(requests[index].token_ids) + len(requests[index].begun)

    order = sorted(range(len(requests)), key=length)
    runs = [order] if engine.capabilities.pads else [list(same) for _, same in groupby(order, key=length)]
    for run in runs:
        for at in range(0, len(run), together):
            yield run[at : at + together]


def _warn_of_short_context(engine: Engine, longest: int, max_new_tokens: int) -> None:
    said = short_context(engine, longest, max_new_tokens)
    if said is not None:
        warnings.warn(said, ShortContextWarning, stacklevel=3)


def short_context(engine: Engine, longest: int, max_new_tokens: int) -> str | None:
    """What is to be said where the context leaves the longest prompt fewer new tokens than asked for."""
    context = engine.architecture.context_length
    if context is None or longest <= context:
        return None
    return (
        f"the model's context of {context} tokens leaves the longest prompt {context - longest + max_new_tokens} new "
        f"tokens of {max_new_tokens}: answers to such prompts are cut short"
    )


def end_tokens(engine: Engine) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, and the tokenizer's."""
    configured = getattr(engine.model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(int(end) for end in [*ends, engine.tokenizer.eos_token_id] if end is not None)


def rows_that_fit(engine: Engine, longest: int) -> int:
    """Rows of ``longest`` tokens whose caches fit the memory that is free now."""
    facts = engine.architecture
    width = sum(shape.n_kv_heads * (shape.d_head + shape.d_value) for shape in facts.shapes if shape is not None)
    cache = width * engine.dtype.itemsize * longest
    allowed = allowed_memory(engine.device, engine.memory_budget, _MEMORY_SHARE)
    return max(1, min(_MOST_ROWS, allowed // (cache + 8 * facts.vocabulary_size)))


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows of unequal length as one batch, each [n_rows, longest], int64."""

    token_ids: Tensor
    """Padding first."""
    mask: Tensor
    """1 where a token is real."""
    positions: Tensor
    """Of each token within its own row."""


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Padded:
    """The rows as one batch, their last tokens aligned."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]).to(device)
    return Padded(ids, mask, (mask.cumsum(dim=1) - 1).clamp_min(0))


class _Batch:
    """The state of one batch while it decodes."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], ablation: Ablation, max_new_tokens: int, sampling: Sampling
    ) -> None:
        self.engine, self.requests, self.ablation, self.sampling = engine, requests, ablation, sampling
        context = engine.architecture.context_length or 1 << 60
        self.limits = [min(max_new_tokens, context - len(request.token_ids)) for request in requests]
        self.made = [list(request.begun) for request in requests]
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
                # What was cached was for shorter rows: beyond their turn families place all tokens in another way.
                padded = self._so_far(open_rows)
                ids, mask, positions = padded.token_ids, padded.mask, padded.positions
                cache, turned = DynamicCache(config=self.engine.model.config), False
            else:
                kept = torch.tensor([rows.index(row) for row in open_rows], device=device)
                # Reordered and not selected: layers with a state instead of keys know only the one.
                cache.reorder_cache(kept)
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = open_rows
            groups = [self.requests[row].group for row in rows]
            with self.engine.ablated_rows(groups, self.ablation) as model:
                # Rows that have ended ride along until half have: taking rows out of the cache copies it.
                while len(open_rows) * 2 > len(rows) and not turned:
                    output = model(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    )
                    places = [self._place(row) for row in rows]
                    choice = choose(output.logits[:, -1].float(), places, self.sampling)
                    self._take(choice, rows)
                    open_rows = [row for row in rows if self._is_open(row)]
                    ids, positions = choice.tokens[:, None], positions[:, -1:] + 1
                    mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                    turned = mask.shape[1] - 1 in turns
        ended = zip(self.made, self.finished, self.limits, self.margins, strict=True)
        return [Answer(tuple(made), finished, limit, tuple(margins)) for made, finished, limit, margins in ended]

    def _so_far(self, rows: Sequence[int]) -> Padded:
        """The prompts of these rows and what was made of their answers."""
        read = [(*self.requests[row].token_ids, *self.made[row]) for row in rows]
        # Any token does for padding, which is masked; an end token may be one that the model has no embedding for.
        pad = next(iter(self.ends), 0)
        return left_padded(read, pad if pad < self.engine.n_embedded else 0, self.engine.device)

    def _is_open(self, row: int) -> bool:
        return not self.finished[row] and not self.stopped[row] and len(self.made[row]) < self.limits[row]

    def _place(self, row: int) -> Place | None:
        return Place(self.noise_keys[row], len(self.made[row])) if self._is_open(row) else None

    def _take(self, choice: Choice, rows: Sequence[int]) -> None:
        for token, margin, row in zip(choice.tokens.tolist(), choice.margins.tolist(), rows, strict=True):
            if not self._is_open(row):
                continue
            self.margins[row].append(margin)
            if token in self.ends:
                self.finished[row] = True
                continue
            self.made[row].append(token)
            stop = self.requests[row].stop
            self.stopped[row] = stop is not None and stop(self.made[row])

"""Answers of the model under ablations, a group a row. Owns decoding and its randomness; judges nothing.

The loop is ours because rows of one batch carry different ablations and draw the same noise whatever the batch;
``engine.ablated`` with the model's own ``generate`` serves everything else.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.batching import allowed_memory, halving
from safetyheads.errors import InputError
from safetyheads.heads import Group

if TYPE_CHECKING:
    from safetyheads.engine import Engine
    from safetyheads.prompts import PromptSet

_MOST_ROWS = 256
_MEMORY_SHARE = 0.4


class ShortContextWarning(UserWarning):
    """The model's context leaves some prompts fewer new tokens than were asked for."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, at temperature 1."""

    top_k: int = 1
    """1 is greedy; the paper samples with 5 and no top-p."""
    seed: int = 0
    """With the prompt's tokens and the position it fixes the noise; unused when greedy."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top-k keeps at least one token; got {self.top_k}")

    @property
    def name(self) -> str:
        """``greedy`` or ``top-5``."""
        return "greedy" if self.top_k == 1 else f"top-{self.top_k}"


GREEDY = Sampling()
"""The most probable token, always."""
TOP_5 = Sampling(top_k=5)
"""The paper's sampling (Sec 3.3)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to be made: a batch row."""

    token_ids: tuple[int, ...]
    """The prompt under its template."""
    group: Group = ()
    """Heads ablated while answering."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated for one request."""

    token_ids: tuple[int, ...]
    """New tokens, without the one that ends the answer."""
    finished: bool
    """Whether the model ended it; else the limit did."""
    limit: int
    """New tokens it was allowed: those asked for, or what the model's context left."""


def generate(
    engine: Engine,
    prompts: PromptSet,
    max_new_tokens: int = 128,
    groups: Sequence[Group] | None = None,
    ablation: Ablation = UNDIFFERENTIATED_ATTENTION,
    sampling: Sampling = GREEDY,
) -> tuple[Answer, ...]:
    """An answer to each prompt, prompt i under ``groups[i]`` (unablated by default)."""
    encoded = engine.encode(prompts)
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
    _warn_of_short_context(engine, longest, max_new_tokens)

    def run(batch: Sequence[Request]) -> list[Answer]:
        return _Batch(engine, batch, ablation, max_new_tokens, sampling).run()

    together = n_rows or rows_that_fit(engine, longest)
    # Prompts of one length share a batch, which saves padding (bench/LOG.md, the demo's time).
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].token_ids))
    answers: list[Answer] = []
    for at in range(0, len(order), together):
        batch = [requests[index] for index in order[at : at + together]]
        for _, made in halving(batch, run) if n_rows is None else [(batch, run(batch))]:
            answers.extend(made)
            if on_rows is not None:
                on_rows(len(made))
    by_index = dict(zip(order, answers, strict=True))
    return tuple(by_index[index] for index in range(len(requests)))


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
    cache = 2 * facts.n_layers * facts.n_kv_heads * facts.d_head * engine.dtype.itemsize * longest
    allowed = allowed_memory(engine.device, engine.memory_budget, _MEMORY_SHARE)
    return max(1, min(_MOST_ROWS, allowed // (cache + 8 * facts.vocabulary_size)))


class _Batch:
    """The state of one batch while it decodes."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], ablation: Ablation, max_new_tokens: int, sampling: Sampling
    ) -> None:
        self.engine, self.requests, self.ablation, self.sampling = engine, requests, ablation, sampling
        context = engine.architecture.context_length or 1 << 60
        self.limits = [min(max_new_tokens, context - len(request.token_ids)) for request in requests]
        self.made: list[list[int]] = [[] for _ in requests]
        self.finished = [False] * len(requests)
        self.noise_keys = [_noise_key(request.token_ids) for request in requests]
        self.ends = end_tokens(engine)

    @torch.inference_mode()
    def run(self) -> list[Answer]:
        """Decode until every row has ended."""
        from transformers import DynamicCache

        longest = max(len(request.token_ids) for request in self.requests)
        pad = next(iter(self.ends), 0)
        padded = [[pad] * (longest - len(r.token_ids)) + list(r.token_ids) for r in self.requests]
        device = self.engine.device
        ids = torch.tensor(padded, device=device)
        mask = torch.tensor([[0] * (longest - len(r.token_ids)) + [1] * len(r.token_ids) for r in self.requests])
        mask = mask.to(device)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        cache = DynamicCache(config=self.engine.model.config)
        rows = [row for row, limit in enumerate(self.limits) if limit > 0]
        if len(rows) < len(self.requests):
            ids, mask, positions = ids[rows], mask[rows], positions[rows]
        while rows:
            groups = [self.requests[row].group for row in rows]
            with self.engine.ablated_rows(groups, self.ablation) as model:
                open_rows = rows
                # Rows that have ended ride along until half have: taking rows out of the cache copies it.
                while len(open_rows) * 2 > len(rows):
                    output = model(
                        input_ids=ids,
                        attention_mask=mask,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                        logits_to_keep=1,
                    )
                    chosen = self._choose(output.logits[:, -1].float(), rows)
                    self._take(chosen.tolist(), rows)
                    open_rows = [row for row in rows if self._is_open(row)]
                    ids, positions = chosen[:, None], positions[:, -1:] + 1
                    mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                    if not open_rows:
                        break
            if open_rows:
                kept = torch.tensor([rows.index(row) for row in open_rows], device=device)
                cache.batch_select_indices(kept)
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = open_rows
        ended = zip(self.made, self.finished, self.limits, strict=True)
        return [Answer(tuple(made), finished, limit) for made, finished, limit in ended]

    def _is_open(self, row: int) -> bool:
        return not self.finished[row] and len(self.made[row]) < self.limits[row]

    def _take(self, chosen: Sequence[int], rows: Sequence[int]) -> None:
        for token, row in zip(chosen, rows, strict=True):
            if self._is_open(row):
                if token in self.ends:
                    self.finished[row] = True
                else:
                    self.made[row].append(token)

    def _choose(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The next token of each row [n_rows], from logits [n_rows, vocabulary].

        Adding Gumbel noise to logits and taking the largest draws from their softmax. The noise belongs to
        (seed, prompt, position, token), so equal distributions give equal tokens under every ablation.
        """
        if self.sampling.top_k == 1:
            return logits.argmax(dim=-1)
        values, tokens = logits.topk(min(self.sampling.top_k, logits.shape[-1]), dim=-1)
        noise = np.zeros(values.shape)
        on_cpu = tokens.cpu().numpy()
        for at, row in enumerate(rows):
            if self._is_open(row):
                # As unsigned integers: Python's own would go through float64 and lose their last bits.
                key = np.array([self.sampling.seed % (1 << 64), self.noise_keys[row]], dtype=np.uint64)
                stream = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, 0, len(self.made[row]))))
                noise[at] = stream.gumbel(size=logits.shape[-1])[on_cpu[at]]
        drawn = (values.double() + torch.from_numpy(noise).to(values.device)).argmax(dim=-1, keepdim=True)
        return tokens.gather(1, drawn)[:, 0]


def _noise_key(token_ids: Sequence[int]) -> int:
    """64 bits that name a prompt by its tokens, wherever it stands in a file or batch."""
    return int.from_bytes(hashlib.sha256(str(tuple(token_ids)).encode()).digest()[:8], "big")


def decode_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The answer as text, without special tokens."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text

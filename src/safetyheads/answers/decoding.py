"""Decodes answers: greedy or sampled, batched with a KV cache, a head group for each batch row.

Our own loop, not transformers' ``generate``: rows of one batch have different ablations, and each row draws the same
noise in any batch. The largest logit after adding Gumbel noise is a draw from the softmax. The noise depends on (seed,
prompt, position, token) only, so equal distributions give equal tokens under every ablation.
"""

import hashlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, MutableSet, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from safetyheads.ablation import UNDIFFERENTIATED_ATTENTION, Ablation, AnyAblation
from safetyheads.display import Shown
from safetyheads.errors import OVERFLOWS, InputError, SafetyheadsError, UnsupportedModelError, whole_number
from safetyheads.files import read_toml
from safetyheads.heads import AnyHeads, Group, parse_groups, within
from safetyheads.model.engine import Engine, ask
from safetyheads.model.packing import left_padded
from safetyheads.model.planning import allowed_memory, halving
from safetyheads.prompts.asked import AnyPrompts

Route: TypeAlias = Literal["plain", "drafted", "continued"]
"""How an answer was decoded: from its first token; it is the unablated answer; from the first difference on."""
Stop: TypeAlias = Callable[[Sequence[int]], bool]
"""Given an answer's first tokens, tells whether they are enough."""
Place: TypeAlias = tuple[int, int]
"""What a token's noise depends on: the prompt's :func:`noise_key`, and the number of answer tokens before it."""

_MOST_ROWS = 256
_MEMORY_SHARE = 0.4
# Tokens below the top k that are examined: a small change of logits could bring one into the top k.
_OUTSIDE = 8


class ShortContextWarning(UserWarning):
    """The model's context leaves some prompts fewer new tokens than requested."""


@dataclass(frozen=True, slots=True)
class Sampling(Shown):
    """How the next token is chosen."""

    top_k: int = 1
    """1 is greedy; the paper samples with 5 and without top-p."""
    seed: int = 0
    """Determines the noise, with the prompt's tokens and the position; unused when greedy."""
    temperature: float = 1.0
    """Divides the logits; every run of the paper's has 1. Unused when greedy."""

    def __post_init__(self) -> None:
        whole_number(self.top_k, "top-k keeps at least one token: it", 1)
        if not isinstance(self.temperature, Real) or not 1e-3 <= self.temperature <= 1e3:
            raise InputError(f"a temperature lies from 0.001 to 1000; got {self.temperature}; top-k 1 is greedy")

    @property
    def name(self) -> str:
        """``greedy`` or ``top-5``."""
        return "greedy" if self.top_k == 1 else f"top-{self.top_k}"


GREEDY = Sampling()
"""Always the most probable token."""
TOP_5 = Sampling(top_k=5)
"""The paper's sampling (Sec 3.3)."""


@dataclass(frozen=True, slots=True)
class Decoding(Shown):
    """How answers are decoded."""

    max_new_tokens: int = 128
    """Longest answer; the paper uses 128."""
    sampling: Sampling = GREEDY
    """Greedy, or top-k with k = 5 as in Fig 4."""
    full_answers: bool = False
    """Whether a row is decoded to its end after every judge is final."""

    def __post_init__(self) -> None:
        whole_number(self.max_new_tokens, "an answer needs at least one new token: its length", 1)


class Request(NamedTuple):
    """One answer to decode: a batch row."""

    token_ids: tuple[int, ...]
    """The prompt under its template."""
    group: Group = ()
    """Heads ablated while answering."""
    begun: tuple[int, ...] = ()
    """First tokens of the answer that are known already; decoding continues after them."""
    stop: Stop | None = None
    """Called after each new token; None decodes to the end."""


@dataclass(frozen=True, slots=True, repr=False)
class Answer(Shown):
    """The decoded answer to one request."""

    token_ids: tuple[int, ...]
    """New tokens, without the end token."""
    finished: bool
    """Whether the model ended it, not the limit."""
    limit: int
    """Most new tokens: the number requested, or what the model's context leaves."""
    margins: tuple[float, ...] = ()
    """Margin of each decoded token (:func:`choose`), without those of ``begun``; the end token's is the last."""
    route: Route = "plain"
    changed: bool | None = None
    """Whether it differs from the unablated answer; None where that was not compared."""

    def _facts(self) -> dict[str, object]:
        return {"n_tokens": len(self.token_ids), "finished": self.finished, "changed": self.changed}

    @property
    def complete(self) -> bool:
        """Whether the model or the limit ended it, not ``stop``."""
        return self.finished or len(self.token_ids) >= self.limit

    def cut(self, n_tokens: int) -> Self:
        """The answer as a limit of so many tokens would have left it."""
        if len(self.token_ids) < n_tokens:
            return replace(self, limit=min(self.limit, n_tokens))
        begun, margins = self.token_ids[:n_tokens], self.margins[:n_tokens]
        return replace(self, token_ids=begun, margins=margins, finished=False, limit=n_tokens)

    def differs_from(self, other: Self) -> bool:
        """Whether tokens or end differ."""
        return (self.token_ids, self.finished) != (other.token_ids, other.finished)


def generate(
    engine: Engine,
    prompts: AnyPrompts,
    max_new_tokens: int = 128,
    groups: Sequence[AnyHeads] | None = None,
    ablation: AnyAblation = UNDIFFERENTIATED_ATTENTION,
    sampling: Sampling = GREEDY,
) -> tuple[Answer, ...]:
    """Decode an answer to each prompt, prompt i with ``groups[i]`` ablated; unablated by default."""
    encoded = ask(engine, prompts).token_ids
    groups = [()] * len(encoded) if groups is None else parse_groups(groups)
    if len(groups) != len(encoded):
        raise InputError(f"{len(groups)} groups for {len(encoded)} prompts; each prompt needs its own")
    requests = [
        Request(token_ids, within(group, engine.n_layers, engine.n_heads))
        for token_ids, group in zip(encoded, groups, strict=True)
    ]
    return answer(engine, requests, Decoding(max_new_tokens, sampling), Ablation.parse(ablation))


def answer(
    engine: Engine,
    requests: Sequence[Request],
    decoding: Decoding,
    ablation: Ablation = UNDIFFERENTIATED_ATTENTION,
    on_rows: Callable[[int], None] | None = None,
    n_rows: int | None = None,
    halved: MutableSet[str] | None = None,
) -> tuple[Answer, ...]:
    """Decode an answer to each request, in batches with a KV cache; out of memory halves a batch.

    A row ends at an end token, at the limit, and where the model's context does. ``n_rows`` requests share a batch, by
    default as many as fit the free memory; ``on_rows`` is told the number of answers just finished. ``halved`` has the
    hashes of batches that did not fit, which are halved at once; further ones are added. A family in which decoding
    with a cache is not exact is refused.
    """
    if not requests:
        return ()
    longest = max(len(request.token_ids) for request in requests) + decoding.max_new_tokens
    engine.prove_up_to(longest)
    if not engine.capabilities.caches:
        family = engine.architecture.family
        raise UnsupportedModelError(f"{family}: no answers can be made, for decoding with a cache is not exact here")
    message = short_context(engine, longest, decoding.max_new_tokens)
    if message is not None:
        warnings.warn(message, ShortContextWarning, stacklevel=2)
    n_rows = n_rows or rows_that_fit(engine, longest)

    def length(index: int) -> int:
        return len(requests[index].token_ids) + len(requests[index].begun)

    def key(batch: Sequence[Request]) -> str:
        asked = [(request.token_ids, request.group, request.begun) for request in batch]
        return hashlib.sha256(repr((asked, ablation, decoding)).encode()).hexdigest()

    # Requests of similar length share a batch, which saves padding (bench/LOG.md, the demo's time); only requests of
    # equal length where padding is not exact.
    order = sorted(range(len(requests)), key=length)
    alike = [order] if engine.capabilities.pads else [list(same) for _, same in groupby(order, key=length)]
    answers, decode = dict[int, Answer](), partial(_decoded, engine, ablation, decoding)
    for indices in (same[at : at + n_rows] for same in alike for at in range(0, len(same), n_rows)):
        waiting = iter(indices)
        for part, decoded in halving([requests[index] for index in indices], decode, halved, key):
            answers |= zip(islice(waiting, len(part)), decoded, strict=True)
            if on_rows is not None:
                on_rows(len(decoded))
    return tuple(answers[index] for index in range(len(requests)))


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


_KNOWN_SETTINGS = read_toml(Path(__file__).with_name("generation_settings.toml"))
"""Settings of a generation config: what decoding does with each."""


def settings_not_followed(model: PreTrainedModel) -> dict[str, Any]:
    """What the checkpoint's generation config asks for and decoding does not do, by name, as JSON.

    All that is neither followed nor without effect counts, so settings that are new to us count too. How to sample
    (temperature, top p and the like) counts where the checkpoint says that it samples.
    """
    found: dict[str, Any] = {}
    known, asked = _KNOWN_SETTINGS, model.generation_config.to_diff_dict()
    for name, value in sorted(asked.items()):
        aside = name in (*known["followed"], *known["without_effect"])
        aside = aside or name.startswith(tuple(known["without_effect_prefixes"]))
        nothing = value is None or (not value and not name.endswith("token_id"))  # a token may be the first one
        if aside or nothing or (name in known["sampling"] and not asked.get("do_sample")):
            continue
        neutral = known["neutral"].get(name, ())
        if not (isinstance(value, int | float) and not isinstance(value, bool) and value in neutral):
            found[name] = json.loads(json.dumps(value, default=str))
    return found


def not_followed_line(model: PreTrainedModel) -> str | None:
    """:func:`settings_not_followed` as one warning; None where decoding follows all."""
    found = settings_not_followed(model)
    if not found:
        return None
    short = (
        f"{name} ({len(value)})" if isinstance(value, list | dict) else f"{name} {value}"
        for name, value in found.items()
    )
    return (
        f"decoding does not follow these settings of the checkpoint's generation config: {', '.join(short)}; its usual "
        "answers may differ from those here"
    )


def rows_that_fit(engine: Engine, longest: int) -> int:
    """Number of rows of ``longest`` tokens whose caches fit the free memory."""
    allowed = allowed_memory(engine.device, engine.memory_budget, _MEMORY_SHARE)
    return max(1, min(_MOST_ROWS, allowed // row_bytes(engine, longest)))


def row_bytes(engine: Engine, longest: int) -> int:
    """Bytes of a row of ``longest`` tokens while it is decoded: its cache, and its logits."""
    facts = engine.architecture
    width = sum(shape.n_kv_heads * (shape.d_head + shape.d_value) for shape in facts.shapes if shape is not None)
    return width * engine.dtype.itemsize * longest + 8 * facts.vocabulary_size


class _Row:
    """An answer while it is decoded."""

    def __init__(self, request: Request, limit: int) -> None:
        self.request, self.limit = request, limit
        self.tokens, self.margins = list(request.begun), list[float]()
        self.finished = self.stopped = False
        self.noise_key = noise_key(request.token_ids)

    @property
    def is_open(self) -> bool:
        return not self.finished and not self.stopped and len(self.tokens) < self.limit

    def append(self, token: int, margin: float, ends: frozenset[int]) -> None:
        if math.isnan(margin):
            raise SafetyheadsError(OVERFLOWS.format("an answer's logit"))
        self.margins.append(margin)
        self.finished = token in ends
        if not self.finished:
            self.tokens.append(token)
            self.stopped = self.request.stop is not None and self.request.stop(self.tokens)


@torch.inference_mode()
def _decoded(engine: Engine, ablation: Ablation, decoding: Decoding, requests: Sequence[Request]) -> list[Answer]:
    """The answers to one batch, decoded until every row has ended."""
    context, ends = engine.architecture.context_length or 1 << 60, end_tokens(engine)
    rows = [_Row(request, min(decoding.max_new_tokens, context - len(request.token_ids))) for request in requests]
    # Padding is masked, so any token will do; but the model may have no embedding for an end token.
    pad = next(iter(ends), 0)
    pad = pad if pad < engine.n_embedded else 0
    left = [row for row in rows if row.is_open]
    batch: list[_Row] = []
    turned = True
    while left:
        if turned:
            # Past such a length, families place all tokens differently: the cache of shorter rows is invalid.
            read = [(*row.request.token_ids, *row.tokens) for row in left]
            ids, mask, positions = left_padded(read, pad, engine.device).values()
            cache, turned = DynamicCache(config=engine.model.config), False
        else:
            kept = torch.tensor([batch.index(row) for row in left], device=engine.device)
            # Reordered, not selected: layers that hold a state instead of keys support only reordering.
            cache.reorder_cache(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
        batch = left
        with engine.ablated_rows([row.request.group for row in batch], ablation) as model:
            # Ended rows stay in the batch until half of it has ended: removing rows copies the cache.
            while len(left) * 2 > len(batch) and not turned:
                output = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                places = [(row.noise_key, len(row.tokens)) if row.is_open else None for row in batch]
                tokens, margins = choose(output.logits[:, -1].float(), places, decoding.sampling)
                for row, token, margin in zip(batch, tokens.tolist(), margins.tolist(), strict=True):
                    if row.is_open:
                        row.append(token, margin, ends)
                left = [row for row in batch if row.is_open]
                ids, positions = tokens[:, None], positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
                turned = mask.shape[1] - 1 in engine.architecture.turns
    return [Answer(tuple(row.tokens), row.finished, row.limit, tuple(row.margins)) for row in rows]


def noise_key(token_ids: Sequence[int]) -> int:
    """A 64-bit hash of a prompt's tokens, the same in every file and batch."""
    return int.from_bytes(hashlib.sha256(str(tuple(token_ids)).encode()).digest()[:8], "big")


def choose(logits: Tensor, places: Sequence[Place | None], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The next token of each row, int64 [n], and the margin by which it was chosen, float64 [n], in logits.

    A token stays the same unless a difference of two logits changes by its margin, which is NaN where the highest logit
    is not finite. A row whose token is not used has no place.
    """
    n_tokens = logits.shape[-1]
    if sampling.top_k == 1:
        leading = logits.topk(min(2, n_tokens), dim=-1).values.double()
        # argmax, not the first of topk: the two break ties differently, and plain greedy decoding takes argmax.
        return logits.argmax(dim=-1), _margins(leading[:, 0] - leading[:, -1], leading[:, 0])
    kept = min(sampling.top_k, n_tokens)
    values, tokens = logits.topk(min(kept + _OUTSIDE, n_tokens), dim=-1)  # [n, kept + outside], best first
    values = values.double() / sampling.temperature
    scores = values + _noise(tokens, places, sampling.seed, n_tokens)
    best, at = scores[:, :kept].max(dim=-1)
    drawn = tokens.gather(1, at[:, None])[:, 0]
    inside = scores[:, :kept].topk(min(2, kept), dim=-1).values
    margins = inside[:, 0] - inside[:, -1] if kept > 1 else torch.full_like(best, torch.inf)
    if values.shape[1] == kept:
        return drawn, _margins(margins * sampling.temperature, values[:, 0])
    # The drawn token may drop out of the top k, or a token with more noise may enter it.
    falls_out = values.gather(1, at[:, None])[:, 0] - values[:, kept]
    gaps = values[:, kept - 1 : kept] - values[:, kept:]
    comes_in = torch.maximum(gaps, best[:, None] - scores[:, kept:]).amin(dim=-1)
    margins = torch.stack([margins, falls_out, comes_in]).amin(dim=0)
    # Tokens that were not examined are known only to lie below the last one.
    margins = margins if values.shape[1] == n_tokens else torch.minimum(margins, gaps[:, -1])
    return drawn, _margins(margins * sampling.temperature, values[:, 0])


def _margins(margins: Tensor, highest: Tensor) -> Tensor:
    """NaN where the highest logit is not finite, and only there: differences of masked logits count as none."""
    known = margins.nan_to_num(nan=0.0, posinf=math.inf)
    return torch.where(highest.isfinite(), known, math.nan)


def _noise(tokens: Tensor, places: Sequence[Place | None], seed: int, vocabulary_size: int) -> Tensor:
    """Gumbel noise of tokens [n, n_tokens], float64; 0 in rows without a place."""
    on_cpu, noise = tokens.cpu().numpy(), np.zeros(tuple(tokens.shape))
    rows_of: dict[Place, list[int]] = defaultdict(list)
    for row, place in enumerate(places):
        if place is not None:
            rows_of[place].append(row)
    for (key_of_prompt, position), rows in rows_of.items():
        # As unsigned integers: Python integers would be converted to float64 and lose their last bits.
        key = np.array([seed % (1 << 64), key_of_prompt], dtype=np.uint64)
        stream = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, 0, position)))
        noise[rows] = stream.gumbel(size=vocabulary_size)[on_cpu[rows]]
    return torch.from_numpy(noise).to(tokens.device)

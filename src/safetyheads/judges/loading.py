"""A judge's model and its rows. Owns loading, cutting, filling and batching; knows no verdict.

Apart from `model.loading`, because a judge is never ablated: it needs no proof and no attention of ours, may
be a classifier or a LoRA adapter, and everything that can go wrong with it is one line about the judge.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jinja2 import TemplateError
from torch import Tensor

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion, Verdict
from safetyheads.model import hub, loading, placement, weights
from safetyheads.model.adapters import Adapter, find_adapter, put_on
from safetyheads.model.planning import halving, is_out_of_memory

Encode: TypeAlias = Callable[[str, str], list[int]]
"""From query and answer to the judge's whole input."""

_PROBES = ("probe-of-the-query", "probe-of-the-answer")
_NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class LoadedJudge:
    """A judge model, ready to be run."""

    model: Any
    """On its device, in evaluation mode."""
    tokenizer: Any
    """The checkpoint's."""
    context: int
    """Tokens it can take."""

    @property
    def fill(self) -> int:
        """The token that fills rows up; masked wherever it stands, so any will do."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None), 0)

    def batch(self, rows: Sequence[Sequence[int]], at_left: bool) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, int64 [n_rows, longest], filled up at one side."""
        longest = max(map(len, rows))

        def tensor(values: Sequence[Sequence[int]], fill: int) -> Tensor:
            fills = [[fill] * (longest - len(row)) for row in values]
            joined = [[*f, *row] if at_left else [*row, *f] for row, f in zip(values, fills, strict=True)]
            return torch.tensor(joined, dtype=torch.int64, device=self.model.device)

        return tensor(rows, self.fill), tensor([[1] * len(row) for row in rows], 0)


def load_judge(
    kind: Literal["AutoModelForCausalLM", "AutoModelForSequenceClassification"],
    checkpoint: str,
    revision: str | None,
    device: str,
    dtype: str,
) -> LoadedJudge:
    """A judge's model and tokenizer, from a directory or the hub; weights are read as safetensors only.

    Raises:
        InputError: it is not there, gated, incomplete, of another kind, or needs an extra that is not installed.
    """
    place = placement.choose_device(device)
    if dtype != "auto" and dtype not in loading.DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(loading.DTYPES)} and auto")
    _look_at(checkpoint)
    adapter = _adapter_of(checkpoint, revision)
    base = None if adapter is None else adapter.base
    if adapter is None or base is None:
        model = _read_model(kind, checkpoint, revision, dtype)
    else:
        _look_at(base)
        model = _read_model(kind, base, None, dtype)
        put_on(model, adapter, base)
    weights.refuse_broken_weights(model, checkpoint)
    tokenizer = _read_tokenizer(checkpoint, revision, base)
    config = model.config.get_text_config()
    context = min(getattr(config, "max_position_embeddings", None) or _NO_LIMIT, tokenizer.model_max_length)
    loaded = LoadedJudge(model.to(place).eval(), tokenizer, context)
    if kind == "AutoModelForCausalLM":
        _write_greedily(loaded)
    return loaded


def _look_at(checkpoint: str) -> None:
    """Refuse at once what cannot be a judge."""
    if os.path.exists(checkpoint):
        if not os.path.isdir(checkpoint):
            raise InputError(f"the judge {checkpoint} is a file; a model is a directory, or a hub id")
    elif checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1:
        raise InputError(f"the judge {checkpoint} is not there: no such model directory")
    else:
        hub.look_at_hub(checkpoint)


def _adapter_of(checkpoint: str, revision: str | None) -> Adapter | None:
    """The adapter that the checkpoint is; None for a whole model."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(checkpoint, revision=revision) is None:
        return None
    adapter = find_adapter(checkpoint, revision=revision)
    if adapter.base is None:
        raise InputError(f"the adapter {checkpoint} names no base model (base_model_name_or_path)")
    return adapter


def _read_model(kind: str, checkpoint: str, revision: str | None, dtype: str) -> Any:
    import transformers
    from safetensors import SafetensorError

    try:
        model, report = getattr(transformers, kind).from_pretrained(
            checkpoint,
            revision=revision,
            dtype=loading.DTYPES.get(dtype, dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (*loading.UNREADABLE, SafetensorError) as error:
        raise InputError(f"cannot load the judge {checkpoint}: {hub.first_line(error)}") from error
    except RuntimeError as error:
        # transformers' own words for shapes that differ speak of an option that is not ours.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise InputError(f"the weights of the judge {checkpoint} do not fit its config.json") from error
    _refuse_missing(checkpoint, report["missing_keys"])
    return model


def _refuse_missing(checkpoint: str, keys: Sequence[str]) -> None:
    """Missing tensors are drawn at random: a model without a classifier's head would still give verdicts."""
    missing = sorted(keys)
    if missing:
        raise InputError(f"the weights of the judge {checkpoint} lack {len(missing)} tensors, {missing[0]} among them")


def _read_tokenizer(checkpoint: str, revision: str | None, base: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint, revision=revision)
    except loading.UNREADABLE as error:
        if base is not None:
            return _read_tokenizer(base, None, None)
        raise InputError(f"cannot load the tokenizer of {checkpoint}: {hub.first_line(error)}") from error


def _write_greedily(loaded: LoadedJudge) -> None:
    """Replace the checkpoint's generation config, whose sampling or penalties would come back into each call."""
    from transformers import GenerationConfig

    configured = loaded.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    known = sorted({int(end) for end in [*ends, loaded.tokenizer.eos_token_id] if end is not None})
    loaded.model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=known or None, pad_token_id=loaded.fill
    )


def chat_encoder(loaded: LoadedJudge, checkpoint: str, begins: str) -> Encode:
    """Inputs through the checkpoint's chat template, ending with ``begins``.

    The template brings the special tokens and the judge's own turn. Some templates take a message as text, others as a
    list of parts, and the wrong one may leave the message out without a word: two probes tell which.

    Raises:
        InputError: there is no template, or it leaves out the request or the answer.
    """
    tokenizer = loaded.tokenizer
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {checkpoint} has no chat template, through which this judge is asked")

    def render(query: str, answer: str, in_parts: bool) -> str:
        contents = [[{"type": "text", "text": text}] if in_parts else text for text in (query, answer)]
        messages = [{"role": "user", "content": contents[0]}, {"role": "assistant", "content": contents[1]}]
        rendered: str = tokenizer.apply_chat_template(messages, tokenize=False)
        # Some templates write the beginning themselves, in whole or in part.
        there = next(n for n in range(len(begins), -1, -1) if rendered.endswith(begins[:n]))
        return rendered + begins[there:]

    for in_parts in (False, True):
        try:
            rendered = render(*_PROBES, in_parts)
        except (TemplateError, TypeError):
            continue
        if all(probe in rendered for probe in _PROBES) and "'type': 'text'" not in rendered:
            return lambda query, answer: list(
                tokenizer(render(query, answer, in_parts), add_special_tokens=False).input_ids
            )
    raise InputError(f"the chat template of {checkpoint} leaves out the request or the answer")


def fitted(loaded: LoadedJudge, encode: Encode, completion: Completion, limit: int, room: int) -> list[int] | None:
    """The judge's input, its answer cut to ``limit`` tokens, or to what ``room`` leaves; nothing else is ever cut.

    None where not one token of the answer would fit.
    """
    answer_ids = loaded.tokenizer(completion.text, add_special_tokens=False).input_ids
    kept = min(limit, len(answer_ids))
    while True:
        # An answer that fits is given as it was: decoding may change blanks.
        text = completion.text if kept == len(answer_ids) else loaded.tokenizer.decode(answer_ids[:kept])
        token_ids = encode(completion.query, text)
        over = len(token_ids) - room
        if over <= 0:
            return token_ids
        kept -= over
        if kept < 1:
            return None


def in_batches(
    inputs: Sequence[list[int] | None], batch_size: int, run: Callable[[Sequence[list[int]]], list[Verdict]]
) -> tuple[Verdict, ...]:
    """A verdict for each input, in their order; inputs of like length are run together."""
    verdicts = {
        index: Verdict("unscored", "the request leaves the judge no room for the answer")
        for index, each in enumerate(inputs)
        if each is None
    }
    held = {index: each for index, each in enumerate(inputs) if each is not None}

    def attempt(indices: Sequence[int]) -> list[Verdict]:
        try:
            return run([held[index] for index in indices])
        except (RuntimeError, MemoryError) as error:
            if len(indices) > 1 or not is_out_of_memory(error):
                raise
        return [Verdict("unscored", "the judge ran out of memory")]

    order = sorted(held, key=lambda index: len(held[index]))
    for start in range(0, len(order), batch_size):
        for indices, made in halving(order[start : start + batch_size], attempt):
            verdicts.update(zip(indices, made, strict=True))
    return tuple(verdicts[index] for index in range(len(inputs)))

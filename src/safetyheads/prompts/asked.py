"""Prompts as a model reads them: template settled, token ids made, with the reader of their answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safetyheads.prompts.answer_reader import AnswerReader
from safetyheads.prompts.sets import Prompt, PromptSet
from safetyheads.prompts.templates import Template


class DatedPromptWarning(UserWarning):
    """The chat template writes today's date into the prompts, so tomorrow they differ."""


@dataclass(frozen=True, slots=True)
class AskedPrompts:
    """A prompt set in the form that one model reads; :meth:`safetyheads.model.engine.Engine.ask` makes it."""

    prompts: PromptSet
    """The prompts, with the settled template."""
    template: Template
    """The template in force; its thinking is settled, and None means that it has no think block."""
    token_ids: tuple[tuple[int, ...], ...]
    """Token ids of each prompt."""
    reader: AnswerReader
    """Reads the answers to these prompts."""
    sha256: str
    """Fingerprint of the token ids (hexadecimal)."""
    note: str | None
    """What a reader of the results must know about the prompts, such as a date in them; None if nothing."""

    @classmethod
    def of(cls, prompts: PromptSet, default: Template, tokenizer: Any) -> AskedPrompts:
        """Render and tokenize the prompts under their own template, or under ``default``.

        Raises:
            InputError: the template cannot be rendered with this tokenizer, or a prompt has no token.
        """
        bound = (prompts.template or default).bound(tokenizer)
        token_ids = tuple(tuple(bound.encode(prompt.query)) for prompt in prompts)
        return cls(
            prompts=prompts.with_template(bound.template),
            template=bound.template,
            token_ids=token_ids,
            reader=AnswerReader(tokenizer, bound.block, bound.begins_in_block, bound.template.stops),
            sha256=hashlib.sha256(str(token_ids).encode()).hexdigest(),
            note=bound.note,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @property
    def system(self) -> str:
        """The system prompt; empty where there is none."""
        return self.template.system or ""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.token_ids))


def tokenizer_sha256(tokenizer: Any) -> str:
    """Fingerprint of what turns a text into token ids: vocabulary, merges, special tokens and the chat template.

    Truncation and padding are left out: a tokenizer only remembers them from its last call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    adds = [getattr(tokenizer, f"add_{name}_token", None) for name in ("bos", "eos")]
    facts = [rules, special, adds, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

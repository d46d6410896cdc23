"""Prompts as a model reads them, and the reader of its answers: no think block, nothing after a stop text."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeAlias

from safetyheads.display import Shown
from safetyheads.errors import library_failures
from safetyheads.prompts.prompt_set import Prompt, PromptSet
from safetyheads.prompts.templates import Template, ThinkBlock

_UNFINISHED_CHARACTER = "\ufffd"


class ReadAnswer(NamedTuple):
    """An answer as judges get it."""

    text: str
    """After the think block, before the stop text."""
    token_ids: tuple[int, ...]
    """Tokens after the think block, those of a stop text among them."""
    n_thought: int = 0
    """Tokens of the think block, its marks among them."""
    thought: str = ""
    """The text in the think block."""
    unclosed: bool = False
    """Whether thinking began and never ended: there is no answer."""
    stopped: bool = False
    """Whether a stop text ended it."""
    certain: str | None = None
    """The part of the text that further tokens cannot change; None until it is clear that the answer has begun."""

    @property
    def thinks(self) -> bool:
        """Whether a think block came first, so that the first new token opens no answer."""
        return self.unclosed or self.n_thought > 0


class AnswerReader(NamedTuple):
    """Reads the answers to prompts of one template."""

    tokenizer: Any
    block: ThinkBlock | None = None
    """The think block that an answer may begin with; None where thinking is closed."""
    begins_in_block: bool = False
    """Whether the prompt opens the block itself."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer."""

    def read(self, token_ids: Sequence[int]) -> ReadAnswer:
        """The answer, or what there is of it so far."""
        ids, thought, n_thought, undecided = tuple(token_ids), "", 0, False
        raw = "" if self.block is None else self._raw(ids)
        if self.block is not None and (self.begins_in_block or raw.lstrip().startswith(self.block.opener)):
            closer = self.block.closer
            thought = raw.partition(closer)[0].lstrip().removeprefix(self.block.opener).strip()
            if closer not in raw:
                return ReadAnswer("", (), len(ids), thought, unclosed=True)
            n_thought = bisect_left(range(len(ids)), True, key=lambda n: closer in self._raw(ids[:n]))
            # The block's last token may hold the beginning of the answer.
            rest, ids = self._raw(ids[:n_thought]).partition(closer)[2], ids[n_thought:]
            text = (rest + decode_text(self.tokenizer, ids)).lstrip()
        else:
            # So few tokens that they may yet become the block's first mark.
            mark = raw.lstrip().rstrip(_UNFINISHED_CHARACTER)
            undecided = self.block is not None and self.block.opener.startswith(mark)
            text = decode_text(self.tokenizer, ids)
        places = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if places:
            cut = text[: min(places)]
            return ReadAnswer(cut, ids, n_thought, thought, stopped=True, certain=cut)
        # What may yet be part of a character or of a stop text is not certain.
        whole = text.rstrip(_UNFINISHED_CHARACTER)
        begun = max((n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n])), default=0)
        return ReadAnswer(text, ids, n_thought, thought, certain=None if undecided else whole[: len(whole) - begun])

    @property
    def ends(self) -> Callable[[Sequence[int]], bool] | None:
        """Whether an answer that starts with these tokens has reached a stop text; None where there are none."""
        return (lambda token_ids: self.read(token_ids).stopped) if self.stops else None

    def _raw(self, token_ids: tuple[int, ...]) -> str:
        return decode_text(self.tokenizer, token_ids, False)


def decode_text(tokenizer: Any, token_ids: Sequence[int], skips_special: bool = True) -> str:
    """Tokens as text; special ones are left out, unless they are wanted."""
    with library_failures("the tokenizer cannot decode an answer: "):
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=skips_special))


class DatedPromptWarning(UserWarning):
    """The chat template writes today's date into the prompts, so tomorrow they differ."""


@dataclass(frozen=True, slots=True, repr=False)
class AskedPrompts(Shown):
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
    def of(cls, prompts: PromptSet, default: Template, tokenizer: Any) -> Self:
        """Render and tokenize the prompts under their own template, or under ``default``; an InputError if it fails."""
        bound = (prompts.template or default).bound(tokenizer)
        token_ids = tuple(tuple(bound.encode(prompt.query, prompt.earlier)) for prompt in prompts)
        return cls(
            prompts=prompts.with_template(bound.template),
            template=bound.template,
            token_ids=token_ids,
            reader=AnswerReader(tokenizer, bound.block, bound.begins_in_block, bound.template.stops),
            sha256=hashlib.sha256(str(token_ids).encode()).hexdigest(),
            note=bound.note,
        )

    def _facts(self) -> dict[str, object]:
        return {"name": self.prompts.name, "n": len(self), "template": self.template, "longest": self.longest}

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


AnyPrompts: TypeAlias = PromptSet | AskedPrompts | Sequence[str | Prompt]
"""What is taken for prompts; texts get the model's default template."""


def tokenizer_sha256(tokenizer: Any) -> str:
    """Fingerprint of what turns a text into token ids: vocabulary, merges, special tokens and the chat template.

    Truncation and padding are left out: a tokenizer only remembers them from its last call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    adds = [getattr(tokenizer, f"add_{name}_token", None) for name in ("bos", "eos")]
    facts = [rules, special, adds, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

"""Turns an answer's tokens into the text that judges get: no think block, nothing after a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from safetyheads.prompts.chat import ThinkBlock

_UNFINISHED_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True)
class ReadAnswer:
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


@dataclass(frozen=True, slots=True)
class AnswerReader:
    """Reads the answers to prompts of one template."""

    tokenizer: Any
    """The model's tokenizer."""
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
            split = self._after_closer(ids, self.block.closer)
            if split is None:
                return ReadAnswer("", (), len(ids), _thought(raw, self.block), unclosed=True)
            n_thought, rest = split
            thought, ids = _thought(self._raw(ids[:n_thought]), self.block), ids[n_thought:]
            text = (rest + decode_text(self.tokenizer, ids)).lstrip()
        else:
            # So few tokens that they may yet become the block's first mark.
            begun = raw.lstrip().rstrip(_UNFINISHED_CHARACTER)
            undecided = self.block is not None and self.block.opener.startswith(begun)
            text = decode_text(self.tokenizer, ids)
        places = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if places:
            cut = text[: min(places)]
            return ReadAnswer(cut, ids, n_thought, thought, stopped=True, certain=cut)
        return ReadAnswer(text, ids, n_thought, thought, certain=None if undecided else self._certain(text))

    @property
    def ends(self) -> Callable[[Sequence[int]], bool] | None:
        """Whether an answer that starts with these tokens has reached a stop text; None where there are none."""
        return (lambda token_ids: self.read(token_ids).stopped) if self.stops else None

    def _certain(self, text: str) -> str:
        """The text without what may yet be part of a character or of a stop text."""
        whole = text.rstrip(_UNFINISHED_CHARACTER)
        begun = (n for stop in self.stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        return whole[: len(whole) - max(begun, default=0)]

    def _after_closer(self, token_ids: tuple[int, ...], closer: str) -> tuple[int, str] | None:
        """How many tokens the think block takes, and what its last one holds of the answer; None while it is open."""
        if closer not in self._raw(token_ids):
            return None
        without, with_closer = 0, len(token_ids)
        while with_closer - without > 1:
            middle = (without + with_closer) // 2
            if closer in self._raw(token_ids[:middle]):
                with_closer = middle
            else:
                without = middle
        return with_closer, self._raw(token_ids[:with_closer]).partition(closer)[2]

    def _raw(self, token_ids: tuple[int, ...]) -> str:
        """The tokens as text, special ones too: some families mark thinking by these."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text


def _thought(raw: str, block: ThinkBlock) -> str:
    """The block's text without its marks."""
    return raw.partition(block.closer)[0].lstrip().removeprefix(block.opener).strip()


def decode_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The answer as text, without special tokens."""
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
    return text

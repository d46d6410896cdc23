"""Turns a query into the text and tokens that a model reads: named templates, system prompts, prefills, stop texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, get_args

from safetyheads.errors import InputError
from safetyheads.prompts.chat import THINK_BLOCKS, ChatTemplate, ThinkBlock, Thinking

PLACEHOLDER = "{query}"
"""Stands for the query in a format string; other braces are plain text."""
SYSTEM_PLACEHOLDER = "{system}"
"""Stands for the system prompt in a format string, if there is one."""
_PLACEHOLDERS = re.compile(f"{re.escape(PLACEHOLDER)}|{re.escape(SYSTEM_PLACEHOLDER)}")


@dataclass(frozen=True, slots=True)
class Form:
    """A named template, as data."""

    format: str | None
    """The text, with its placeholders; None for the tokenizer's chat template."""
    system: str | None = None
    """Its own system prompt."""
    without_system: str | None = None
    """The text where the system prompt is empty, so that its marks go too."""
    joint: str = ""
    """What stands between the prompt and a prefilled answer."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer."""


def _urial() -> Form:
    """URIAL (Fig 14, 15): answered queries in the prompt, by which a base model answers like an aligned one.

    The paper does not give its words, so data/urial.txt holds our own. One of its answers declines, and only that one
    holds words by which judges recognise a refusal.
    """
    stop = "# Query:"  # where an answer ends: a base model continues with a query of its own
    # The newline at the end belongs to the prompt: it would else be the first token of every answer, and hide the next.
    text = resources.files("safetyheads").joinpath("data/urial.txt").read_text(encoding="utf-8")
    system, separator, shots = text.partition(f"\n\n{stop}")
    return Form(f"{SYSTEM_PLACEHOLDER}{separator}{shots}", system, f"{stop}{shots}", stops=(stop,))


FORMS: dict[str, Form] = {
    "direct": Form("{query}", joint=" "),
    "query_answer": Form("## Query:{query}\n## Answer:", joint=" "),
    "query_answer_space": Form("## Query: {query}\n## Answer:", joint=" "),
    "chat": Form(None),
    "llama2": Form(
        "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{query} [/INST]",
        system="You are a helpful assistant.",
        without_system="[INST] {query} [/INST]",
        joint=" ",
    ),
    "urial": _urial(),
}
"""The named templates: the query alone; that of Sahara's code; that of Fig 10; the tokenizer's chat template; Llama-2's
own (Fig 16, 17); URIAL's (Fig 14)."""


@dataclass(frozen=True, slots=True)
class Template:
    """How a query becomes the text a model reads. Prints as :meth:`parse` reads it."""

    name: str
    """A key of :data:`FORMS`, or ``format`` for a format string of the user's."""
    format: str | None = None
    """Text with ``{query}``, and ``{system}`` where it has a place for a system prompt; None for the chat template."""
    system: str | None = None
    """System prompt; None sends none, as the paper does when attributing (App. D)."""
    folds_system: bool = False
    """Whether the system prompt goes to the beginning of the user's turn, followed by a blank line: for chat templates
    that take no system message."""
    thinking: Thinking | None = None
    """None closes the think block of a chat template that has one, and leaves other templates alone."""
    prefill: str = ""
    """Beginning of the answer, written for the model (App. E). The model reads it; judges do not."""
    stops: tuple[str, ...] = ()
    """An answer ends before the first of these, because a base model continues with a query of its own."""

    def __post_init__(self) -> None:
        if self.name == "chat":
            if self.format is not None:
                raise InputError("the template chat takes its format from the tokenizer")
        elif self.format is None or PLACEHOLDER not in self.format:
            known = f"it must hold it, or be one of {', '.join(FORMS)}"
            raise InputError(f"template {self.format or self.name!r} has no {PLACEHOLDER}; {known}")
        elif self.system is not None and SYSTEM_PLACEHOLDER not in self.format:
            raise InputError(
                f"a system prompt needs the template chat, llama2 or urial; template {str(self)!r} has no place for it"
            )
        if self.thinking is not None and self.thinking not in get_args(Thinking):
            raise InputError(f"thinking is closed or open; got {self.thinking!r}")
        if self.thinking == "closed" and self.name != "chat":
            reason = f"template {str(self)!r} has no think block"
            raise InputError(f"thinking is closed by the template chat alone; {reason}")
        if self.thinking == "open" and self.prefill:
            raise InputError("a prefilled answer comes after the think block: with a prefill, thinking must be closed")
        if self.folds_system and (self.name != "chat" or self.system is None):
            raise InputError("--fold-system needs the template chat and a system prompt to fold into the user's turn")
        if not all(self.stops):
            raise InputError("a stop text cannot be empty")

    def __str__(self) -> str:
        return self.name if self.format is None or self.name in FORMS else self.format

    @classmethod
    def parse(
        cls,
        text: str,
        system: str | None = None,
        *,
        folds_system: bool = False,
        thinking: str | None = None,
        prefill: str = "",
    ) -> Template:
        """Read a template's name, a key of :data:`FORMS`, or a format string that holds ``{query}``.

        A ``system`` of None is the template's own, if it has one; an empty one removes that.

        Raises:
            InputError: neither a name nor a text with ``{query}``; a system prompt that has no place; settings that
                exclude each other.
        """
        form, name = (FORMS[text], text) if text in FORMS else (Form(text), "format")
        system = form.system if system is None else system
        # The constructor checks the value of thinking.
        return cls(name, form.format, system, folds_system, thinking, prefill, form.stops)  # type: ignore[arg-type]

    def bound(self, tokenizer: Any) -> BoundTemplate:
        """The template with its tokenizer; an InputError for ``chat`` with one that has no chat template."""
        if self.name != "chat":
            return BoundTemplate(self, tokenizer, None)
        chat = ChatTemplate.of(tokenizer)
        settled = replace(self, thinking="closed") if self.thinking is None and chat.thinks else self
        return BoundTemplate(settled, tokenizer, chat)

    def render(self, query: str, tokenizer: Any) -> str:
        """The text of one prompt; only ``chat`` needs the tokenizer.

        Raises:
            InputError: the tokenizer has no chat template, or that rejects or drops a prompt, or cannot stop thinking.
        """
        return self.bound(tokenizer).render(query)

    def settings(self) -> dict[str, Any]:
        """All that distinguishes this template from others, for manifests and results; valid JSON."""
        return {
            "template": str(self),
            "system": self.system,
            "fold_system": self.folds_system,
            "thinking": self.thinking,
            "prefill": self.prefill,
            "stops": list(self.stops),
        }


@dataclass(frozen=True, slots=True)
class BoundTemplate:
    """A template with the tokenizer that encodes its prompts."""

    template: Template
    """Its thinking is settled: None now means that there is no think block."""
    tokenizer: Any
    chat: ChatTemplate | None
    """The tokenizer's chat template, for ``chat`` alone."""

    def render(self, query: str) -> str:
        """The text of one prompt, with the beginning of the answer where that is prefilled."""
        text, prefill = self.up_to_answer(query), self.template.prefill
        if not prefill or prefill[0].isspace():
            return text + prefill
        if self.chat is not None:
            return text + self.chat.joint(query, text) + prefill
        return text + (FORMS[self.template.name].joint if self.template.name in FORMS else "") + prefill

    def up_to_answer(self, query: str) -> str:
        """The text of one prompt without a prefilled answer."""
        template = self.template
        if self.chat is not None:
            return self.chat.render(query, template.system, template.folds_system, template.thinking)
        text = template.format or ""
        form = FORMS.get(template.name)
        if form is not None and form.without_system is not None and not template.system:
            text = form.without_system
        values = {PLACEHOLDER: query, SYSTEM_PLACEHOLDER: template.system}
        # In one go, so that a query that holds a placeholder is not filled in again.
        return _PLACEHOLDERS.sub(lambda match: match[0] if (value := values[match[0]]) is None else value, text)

    def encode(self, query: str) -> list[int]:
        """The token ids of one prompt.

        A format string gets the special tokens that the tokenizer adds by itself, without an end token, since the
        answer follows. A rendered chat template holds its own. No prompt begins with two BOS tokens.

        Raises:
            InputError: as :meth:`Template.render`, or the prompt has no token.
        """
        return self.tokens(self.render(query))

    def tokens(self, text: str) -> list[int]:
        """The token ids of a rendered prompt."""
        bos, eos = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
        token_ids = [int(token) for token in self.tokenizer(text, add_special_tokens=self.chat is None)["input_ids"]]
        if self.chat is None and len(token_ids) > 1 and token_ids[-1] == eos:
            bare = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not len(bare) or int(bare[-1]) != eos:
                token_ids.pop()
        while bos is not None and token_ids[:2] == [bos, bos]:
            token_ids = token_ids[1:]
        if not token_ids:
            raise InputError("a prompt has no token under this tokenizer")
        return token_ids

    @property
    def note(self) -> str | None:
        """What a reader of the results must know about the prompts; None if nothing."""
        if self.chat is None or not self.chat.is_dated:
            return None
        return "the chat template writes today's date into the prompts; the same command on another day is another run"

    @property
    def block(self) -> ThinkBlock | None:
        """The think block that an answer may begin with; None unless thinking is open."""
        if self.template.thinking != "open":
            return None
        return (None if self.chat is None else self.chat.block) or THINK_BLOCKS[0]

    @property
    def begins_in_block(self) -> bool:
        """Whether the prompt itself opens the think block, so that an answer begins inside it."""
        return self.block is not None and self.up_to_answer("?").rstrip().endswith(self.block.opener)

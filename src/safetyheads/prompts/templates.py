"""How a query becomes what a model reads. Owns the named templates, system prompts, prefills and stop texts.

It refuses to know models: a tokenizer is whatever is handed in. What a tokenizer's own chat template does is found
out by ``chat_templates``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, get_args

from safetyheads.errors import InputError
from safetyheads.prompts import urial
from safetyheads.prompts.chat import THINK_BLOCKS, ChatTemplate, ThinkBlock, Thinking

PLACEHOLDER = "{query}"
"""What a format string has where the query goes; other braces are plain text."""
SYSTEM_PLACEHOLDER = "{system}"
"""What it has where a system prompt goes, if one is given."""


@dataclass(frozen=True, slots=True)
class Form:
    """A template by name, as data."""

    format: str | None
    """The text, with its placeholders; None for the tokenizer's chat template."""
    system: str | None = None
    """The system prompt that belongs to it."""
    without_system: str | None = None
    """The text where the system prompt is empty: its marks go with it."""
    joint: str = ""
    """What stands between the prompt and an answer that is begun for the model."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer."""


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
    "urial": Form(urial.FORMAT, urial.SYSTEM, urial.WITHOUT_SYSTEM, stops=(urial.STOP,)),
}
"""The query alone; that of Sahara's code; that of Fig 10; the tokenizer's chat template; Llama-2's own (Fig 16, 17);
URIAL's (Fig 14)."""

TEMPLATE_FORMATS: dict[str, str | None] = {name: form.format for name, form in FORMS.items()}
"""The texts by name."""

_PLACEHOLDERS = re.compile(f"{re.escape(PLACEHOLDER)}|{re.escape(SYSTEM_PLACEHOLDER)}")


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
    """Whether the chat template gets the system prompt at the beginning of the user's turn, a blank line after it,
    for templates that take no system message."""
    thinking: Thinking | None = None
    """None closes the think block of a chat template that has one, and leaves every other template alone."""
    prefill: str = ""
    """How the answer begins, written for the model (App. E): part of what it reads, not of what it answers."""
    stops: tuple[str, ...] = ()
    """An answer ends before the first of these, because a base model goes on with a next query of its own."""

    def __post_init__(self) -> None:
        if self.name == "chat":
            if self.format is not None:
                raise InputError("the template chat takes its format from the tokenizer")
        elif self.format is None or PLACEHOLDER not in self.format:
            raise InputError(
                f"template {self.format or self.name!r} has no {PLACEHOLDER}; it must hold it, "
                f"or be one of {', '.join(FORMS)}"
            )
        elif self.system is not None and SYSTEM_PLACEHOLDER not in self.format:
            raise InputError(
                f"a system prompt needs the template chat, llama2 or urial; template {str(self)!r} has no place for it"
            )
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.thinking is not None and self.thinking not in get_args(Thinking):
            raise InputError(f"thinking is closed or open; got {self.thinking!r}")
        if self.thinking == "closed" and self.name != "chat":
            raise InputError(
                f"thinking is closed by the template chat alone; template {str(self)!r} has no think block"
            )
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
        """Read a template's name, or a format string that holds ``{query}``.

        Args:
            text: a key of :data:`FORMS`, or the format string.
            system: system prompt; None is the template's own, where it has one, and an empty one takes that away.
            folds_system: see :class:`Template`.
            thinking: ``closed``, ``open`` or None, see :class:`Template`.
            prefill: see :class:`Template`.

        Raises:
            InputError: neither a name nor a text with ``{query}``; a system prompt that has no place; settings that
                exclude each other.
        """
        form, name = (FORMS[text], text) if text in FORMS else (Form(text), "format")
        own = form.system if system is None else system
        # What thinking is, the constructor checks.
        return cls(name, form.format, own, folds_system, thinking, prefill, form.stops)  # type: ignore[arg-type]

    def bound(self, tokenizer: Any) -> BoundTemplate:
        """The template with the tokenizer that it goes through, whose chat template is looked at once.

        Raises:
            InputError: ``chat`` with a tokenizer that has no chat template.
        """
        if self.name != "chat":
            return BoundTemplate(self, tokenizer, None)
        chat = ChatTemplate.of(tokenizer)
        settled = replace(self, thinking="closed") if self.thinking is None and chat.thinks else self
        return BoundTemplate(settled, tokenizer, chat)

    def render(self, query: str, tokenizer: Any) -> str:
        """The text of one prompt; ``tokenizer`` is looked at for ``chat`` alone.

        Raises:
            InputError: ``chat`` with a tokenizer that has no chat template, or one that refuses or drops the
                system prompt or has no think block to close.
        """
        return self.bound(tokenizer).render(query)

    def encode(self, query: str, tokenizer: Any) -> list[int]:
        """The token ids of one prompt; see :meth:`BoundTemplate.encode`."""
        return self.bound(tokenizer).encode(query)

    def settings(self) -> dict[str, Any]:
        """All that tells this template from others of its name, for manifests and results; valid JSON.

        What came later than ``system`` is left out at its default, so that older runs are recognised.
        """
        later: dict[str, Any] = {}
        if self.folds_system:
            later["fold_system"] = True
        if self.thinking is not None:
            later["thinking"] = self.thinking
        if self.prefill:
            later |= {"prefill": self.prefill, "prefill_is_judged": False}
        if self.stops:
            later["stops"] = list(self.stops)
        return {"template": str(self), "system": self.system, **later}


@dataclass(frozen=True, slots=True)
class BoundTemplate:
    """A template and the tokenizer that it goes through."""

    template: Template
    """Its thinking is settled: None now says that there is no think block."""
    tokenizer: Any
    chat: ChatTemplate | None
    """The tokenizer's chat template, for ``chat`` alone."""

    def render(self, query: str) -> str:
        """The text of one prompt, with the beginning of the answer where that is prefilled."""
        text = self.up_to_answer(query)
        prefill = self.template.prefill
        if not prefill:
            return text
        return text + ("" if prefill[0].isspace() else self._joint(query, text)) + prefill

    def up_to_answer(self, query: str) -> str:
        """The text of one prompt without a prefilled answer."""
        template = self.template
        if self.chat is not None:
            return self.chat.render(query, template.system, template.folds_system, template.thinking)
        text = template.format or ""
        form = FORMS.get(template.name)
        if form is not None and form.without_system is not None and not template.system:
            text = form.without_system
        given = {PLACEHOLDER: query, SYSTEM_PLACEHOLDER: template.system}
        # At one go, so that a query which holds a placeholder is not filled in again.
        return _PLACEHOLDERS.sub(lambda found: found[0] if given[found[0]] is None else str(given[found[0]]), text)

    def encode(self, query: str) -> list[int]:
        """The token ids of one prompt.

        A format string gets the special tokens that the tokenizer's own call adds, but for an end token: the answer
        follows. A rendered chat template holds its own, so none are added to it. Nothing begins with two BOS tokens,
        whoever wrote them.

        Raises:
            InputError: as :meth:`Template.render`, or the prompt has no token.
        """
        return self.tokens(self.render(query))

    def tokens(self, text: str) -> list[int]:
        """The token ids of a rendered prompt."""
        bos, eos = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
        found = self.tokenizer(text, add_special_tokens=self.chat is None)["input_ids"]
        token_ids = [int(token) for token in found]
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
        """What a reader of the results must know of the prompts; None where there is nothing."""
        return None if self.chat is None else self.chat.note

    @property
    def block(self) -> ThinkBlock | None:
        """The think block that an answer may begin with; None unless thinking is open."""
        if self.template.thinking != "open":
            return None
        own = None if self.chat is None else self.chat.block
        return own or THINK_BLOCKS[0]

    @property
    def begins_in_block(self) -> bool:
        """Whether the prompt itself opens the think block, so that an answer begins inside it."""
        return self.block is not None and self.up_to_answer("?").rstrip().endswith(self.block.opener)

    def _joint(self, query: str, text: str) -> str:
        if self.chat is not None:
            return self.chat.joint(query, text)
        form = FORMS.get(self.template.name)
        return "" if form is None else form.joint

"""Turns a query into the text and tokens that a model reads: named templates, system prompts, prefills, stop texts.

What a tokenizer's own chat template does with thinking, parts and dates is found by rendering it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias, get_args

from safetyheads.display import Shown
from safetyheads.errors import InputError, library_failures, memory_limit, time_limit
from safetyheads.files import read_toml

Thinking: TypeAlias = Literal["closed", "open"]
"""``closed``: the think block is closed before the answer begins. ``open``: the model may think, and its thoughts are
removed before judging."""


class ThinkBlock(NamedTuple):
    """How a family marks what a model thinks before it answers."""

    opener: str
    closer: str
    """Where it ends, and the answer begins."""
    empty: str
    """A block without a thought, as the family writes it: after it the model answers at once."""


_TABLES = read_toml(Path(__file__).with_name("templates.toml"))
THINK_BLOCKS = tuple(ThinkBlock(**block) for block in _TABLES["think_blocks"])
"""The known think blocks; a template's is the first whose marks stand in its source."""

SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Arguments that turn thinking on or off; one counts where the rendering depends on it."""

_MARK, _THOUGHT = "safetyheads", "pondering"  # no template changes these, and no template writes them
_TAG = r"(<[^<>\s]+>|\[[^\[\]\s]+\])"  # one mark of a think block
RENDER_SECONDS = 2
"""Seconds that a template may take, of a chat or of a task."""
RENDER_BYTES = 1 << 29
"""Memory that it may take."""
_CLOCK = "{{% macro strftime_now(format) %}}{}{{% endmacro %}}"  # what templates call to get today's date
_TIMES = 8  # so that a template's choice among a few texts shows
_DATED = "the chat template writes today's date into the prompts; the same command on another day is another run"
_WITHOUT_CHAT = "choose --template query_answer or direct"
_FOLD = "--fold-system (Template.folds_system) puts it at the beginning of the user's turn"

PLACEHOLDER = "{query}"
"""Stands for the query in a format string; other braces are plain text."""
SYSTEM_PLACEHOLDER = "{system}"
"""Stands for the system prompt in a format string, if there is one."""
_PLACEHOLDERS = re.compile(f"{re.escape(PLACEHOLDER)}|{re.escape(SYSTEM_PLACEHOLDER)}")


class Form(NamedTuple):
    """A named template, as data."""

    format: str | None = None
    """The text, with its placeholders; None for the tokenizer's chat template."""
    system: str | None = None
    without_system: str | None = None
    """The text where the system prompt is empty, so that its marks go too."""
    stops: tuple[str, ...] = ()
    """Texts that end an answer."""


def _urial() -> Form:
    """URIAL (Fig 14, 15): answered queries in the prompt, by which a base model answers like an aligned one.

    The paper does not give its words, so data/urial.txt holds our own. One of its answers declines, and only that one
    holds words by which judges recognise a refusal.
    """
    stop = "# Query:"  # where an answer ends: a base model continues with a query of its own
    # The newline at the end belongs to the prompt: it would else be the first token of every answer, and hide the next.
    text = (Path(__file__).parents[1] / "data/urial.txt").read_text(encoding="utf-8")
    system, separator, shots = text.partition(f"\n\n{stop}")
    return Form(f"{SYSTEM_PLACEHOLDER}{separator}{shots}", system, f"{stop}{shots}", stops=(stop,))


FORMS: dict[str, Form] = {name: Form(**form) for name, form in _TABLES["forms"].items()} | {"urial": _urial()}
"""The named templates: the query alone; that of Sahara's code; that of Fig 10; the tokenizer's chat template; Llama-2's
own (Fig 16, 17); URIAL's (Fig 14)."""


@dataclass(frozen=True, slots=True, repr=False)
class Template(Shown):
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
        given = (self.name, self.format or "", self.system or "", self.prefill, *self.stops)
        if wrong := [each for each in given if not isinstance(each, str)]:
            raise InputError(f"a template is a text, and so are its system prompt, prefill and stops; got {wrong[0]!r}")
        if self.name == "chat":
            if self.format is not None:
                raise InputError("the template chat takes its format from the tokenizer")
        elif self.format is None or PLACEHOLDER not in self.format:
            known = f"it must hold it, or be one of {', '.join(FORMS)}"
            raise InputError(f"template {self.format or self.name!r} has no {PLACEHOLDER}; {known}")
        elif self.system is not None and SYSTEM_PLACEHOLDER not in self.format:
            place = f"template {str(self)!r} has no place for it"
            raise InputError(f"a system prompt needs the template chat, llama2 or urial; {place}")
        if self.thinking is not None and self.thinking not in get_args(Thinking):
            raise InputError(f"thinking is closed or open; got {self.thinking!r}")
        if self.thinking == "closed" and self.name != "chat":
            raise InputError(f"thinking is closed by the template chat alone; {str(self)!r} has no think block")
        if self.thinking == "open" and self.prefill:
            raise InputError("a prefilled answer comes after the think block: with a prefill, thinking must be closed")
        if self.folds_system and (self.name != "chat" or self.system is None):
            raise InputError("--fold-system needs the template chat and a system prompt to fold into the user's turn")
        if not all(self.stops):
            raise InputError("a stop text cannot be empty")

    def _facts(self) -> dict[str, object]:
        return {name: value for name, value in self.settings().items() if value and name != "stops"}

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
    ) -> Self:
        """Read a template's name, a key of :data:`FORMS`, or a format string that holds ``{query}``.

        A ``system`` of None is the template's own, if it has one; an empty one removes that. An InputError tells what
        has no place in the template, and settings that exclude each other.
        """
        is_named = isinstance(text, str) and text in FORMS
        form, name = (FORMS[text], text) if is_named else (Form(text), "format")
        system = form.system if system is None else system
        # The constructor checks the value of thinking.
        return cls(name, form.format, system, folds_system, thinking, prefill, form.stops)  # type: ignore[arg-type]

    def bound(self, tokenizer: Any) -> "BoundTemplate":
        """The template with its tokenizer; an InputError for ``chat`` with one that has no chat template."""
        bound = BoundTemplate(self, tokenizer)
        if not bound.is_chat:
            return bound
        source = getattr(tokenizer, "chat_template", None)
        if not source:
            raise InputError(f"the tokenizer of {bound.model} has no chat template; {_WITHOUT_CHAT}")
        text = str(source.get("default", "") if isinstance(source, dict) else source)  # some have several, by name
        in_parts = bound._replace(takes_parts=True)
        if _MARK not in (bound.conversation(_MARK) or "") and _MARK in (in_parts.conversation(_MARK) or ""):
            bound = in_parts
        # The word alone may stand in the source for something else.
        renderings = {
            name: [bound.conversation(_MARK, **{name: on}) for on in (False, True)] for name in SWITCHES if name in text
        }
        switches = tuple(name for name, (off, on) in renderings.items() if None not in (off, on) and off != on)
        listed = (block for block in THINK_BLOCKS if block.opener in text or block.closer in text)
        bound = bound._replace(known_block=bound._written_block() or next(listed, None), switches=switches)
        if self.thinking == "closed" and bound.known_block is None and not switches:
            raise InputError(f"the chat template of {bound.model} has no think block to close; leave --thinking out")
        # Where the template neither opens a block nor writes one, the model may not think at all: nothing is closed.
        if self.thinking is None and (
            switches or bound._closed(bound._messages("?"), bound.conversation("?") or "") is not None
        ):
            bound = bound._replace(template=replace(self, thinking="closed"))
        # Under two clocks: a template may ask for the date and not write it under these settings.
        years = (*[1999] * _TIMES, 2000)
        written = [bound.conversation("?", chat_template=_CLOCK.format(year) + text) for year in years]
        if len(set(written[:-1])) > 1:
            raise InputError(f"the chat template of {bound.model} writes another text each time; {_WITHOUT_CHAT}")
        return bound._replace(note=_DATED if written[-1] != written[0] else None)

    def render(self, query: str, tokenizer: Any) -> str:
        """The text of one prompt; only ``chat`` needs the tokenizer. Raises as :meth:`BoundTemplate.render`."""
        return self.bound(tokenizer).render(query)

    def settings(self) -> dict[str, Any]:
        """All that distinguishes this template from others, for manifests and results; valid JSON."""
        answer = {"thinking": self.thinking, "prefill": self.prefill, "stops": list(self.stops)}
        return {"template": str(self), "system": self.system, "fold_system": self.folds_system, **answer}


@contextmanager
def render_limits() -> Iterator[None]:
    """Within, a template of a chat or of a task has so much time and memory."""
    with time_limit(RENDER_SECONDS), memory_limit(RENDER_BYTES):
        yield


class BoundTemplate(NamedTuple):
    """A template with the tokenizer that encodes its prompts."""

    template: Template
    """Its thinking is settled: None now means that there is no think block."""
    tokenizer: Any
    known_block: ThinkBlock | None = None
    """The think block that the chat template knows."""
    switches: tuple[str, ...] = ()
    """Those of :data:`SWITCHES` that the chat template takes."""
    takes_parts: bool = False
    """Whether a message's content must be a list of parts, as chat templates of vision models expect."""
    note: str | None = None
    """What a reader of the results must know about the prompts; None if nothing."""

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template is used."""
        return self.template.name == "chat"

    @property
    def model(self) -> str:
        """Name of the tokenizer's model, for messages."""
        return getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__

    def render(self, query: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
        """The text of one prompt, with the beginning of the answer where that is prefilled.

        An InputError tells that the chat template rejects the prompt or the system prompt, or leaves one of them out.
        """
        text, prefill = self.up_to_answer(query, earlier), self.template.prefill
        # A named template puts a blank before an answer, unless it ends with a line.
        has_blank = self.template.name in FORMS and not self.is_chat and not str(self.template.format).endswith("\n")
        return text + " " * (has_blank and prefill[:1].strip() != "") + prefill

    def up_to_answer(self, query: str, earlier: Sequence[tuple[str, str]] = ()) -> str:
        """The text of one prompt without a prefilled answer."""
        if self.is_chat:
            messages = self._messages(query)
            system = bool(messages) and messages[0]["role"] == "system"
            if earlier and (self.template.folds_system or (system and earlier[0][0] == "system")):
                raise InputError("a prompt has turns before it: their system prompt is the one, so give no other")
            messages[system:system] = [{"role": role, "content": text} for role, text in earlier]
            text = self.chat(messages)
            return (self._before_answer(messages) or text) if self.template.prefill else text
        if earlier:
            raise InputError("a prompt has turns before it, which only the template chat can write")
        template, form = self.template, FORMS.get(self.template.name)
        text = template.format or ""
        if form is not None and form.without_system is not None and not template.system:
            text = form.without_system
        values = {PLACEHOLDER: query, SYSTEM_PLACEHOLDER: template.system}
        # In one go, so that a query that holds a placeholder is not filled in again.
        return _PLACEHOLDERS.sub(lambda match: match[0] if (value := values[match[0]]) is None else value, text)

    def encode(self, query: str, earlier: Sequence[tuple[str, str]] = ()) -> list[int]:
        """The token ids of one prompt, after the earlier turns of its conversation.

        A format string gets the special tokens that the tokenizer adds by itself, without an end token, since the
        answer follows. A rendered chat template holds its own. No prompt begins with two BOS tokens, and none is empty.
        """
        return self.tokens(self.render(query, earlier))

    def tokens(self, text: str) -> list[int]:
        """The token ids of a rendered prompt."""
        bos, eos = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
        with library_failures(f"the tokenizer of {self.model} fails: "):
            token_ids = [int(token) for token in self.tokenizer(text, add_special_tokens=not self.is_chat)["input_ids"]]
        if not self.is_chat and len(token_ids) > 1 and token_ids[-1] == eos:
            bare = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not len(bare) or int(bare[-1]) != eos:
                token_ids.pop()
        while bos is not None and token_ids[:2] == [bos, bos]:
            token_ids = token_ids[1:]
        if not token_ids:
            raise InputError("a prompt has no token under this tokenizer")
        return token_ids

    @property
    def block(self) -> ThinkBlock | None:
        """The think block that an answer may begin with; None where it is closed, or none is known."""
        if self.template.thinking == "open":
            return self.known_block or THINK_BLOCKS[0]
        return None if self.template.thinking == "closed" else self.known_block

    @property
    def begins_in_block(self) -> bool:
        """Whether the prompt itself opens the think block, so that an answer begins inside it."""
        return self.block is not None and self.up_to_answer("?").rstrip().endswith(self.block.opener)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A chat up to where its next answer begins; or, where its last message is the assistant's, up to that's end.

        An InputError tells that the chat template rejects the chat, or leaves something of it out.
        """
        if messages[-1]["role"] == "assistant":
            before, begun = messages[:-1], str(messages[-1]["content"])
            text = self.chat(before)
            return (self._before_answer(before) or text) + begun
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        try:
            text = self._apply(messages, add_generation_prompt=True, **self._switched)
        except _template_errors() as error:
            what, advice = ("the prompt", "") if system is None else ("the system prompt", f"; {_FOLD}")
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the chat template of {self.model} rejects {what}: {reason}{advice}") from error
        # Some templates leave words out without an error; the run would then not be what its manifest says. The words
        # may stand in the template itself or in another turn, so marks in their places are looked for too.
        marks = [f"{_MARK}{number}x" for number in range(len(messages))]
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        shown = self._attempt(marked, add_generation_prompt=True, **self._switched)
        bare = (message["content"].strip() for message in messages)
        kept = [said in text and (shown is None or mark in shown) for said, mark in zip(bare, marks, strict=True)]
        if system is not None and not kept[0]:
            raise InputError(f"the chat template of {self.model} drops the system prompt; {_FOLD}")
        if not all(kept):
            folds = self.template.folds_system
            what = f"drops {'the query' if all(kept[:-1]) else 'an earlier turn'}, or changes it"
            what = "changes what --fold-system puts into the user's turn" if folds else what
            raise InputError(f"the chat template of {self.model} {what}; {_WITHOUT_CHAT}")
        if self.template.thinking != "closed" or self.known_block is None:
            return text
        closed = self._closed(messages, text)
        # Closed at the user's word, where the template itself writes nothing.
        return closed if closed is not None else text if self.switches else text + self.known_block.empty

    def _closed(self, messages: Sequence[Mapping[str, Any]], text: str) -> str | None:
        """A rendered chat with its think block closed, as the template writes an answer without thoughts.

        None where the template neither opens a block nor writes one.
        """
        block, bare = self.known_block, text.rstrip()
        if block is None:
            return None
        if bare.endswith(block.closer):
            return text
        before, stem = self._before_answer(messages) or "", bare.removesuffix(block.opener)
        if before.startswith(stem) and block.closer in before[len(stem) :]:
            return before
        return stem + block.empty if stem != bare else None

    def _before_answer(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """What the chat template writes before an answer; None where it writes no answers."""
        whole = self._attempt([*messages, {"role": "assistant", "content": _MARK}], **self._switched) or ""
        before, mark, _ = whole.rpartition(_MARK)
        return before if mark and messages[-1]["content"].strip() in before else None

    def _written_block(self) -> ThinkBlock | None:
        """The block in which the template itself writes thoughts; None where no two marks enclose them."""
        for name in ("reasoning_content", "reasoning", "thinking"):
            before, thought, rest = (self.conversation("?", _MARK, thoughts={name: _THOUGHT}) or "").partition(_THOUGHT)
            opener, closer = (
                re.search(rf"{_TAG}\s*\Z", before),
                re.fullmatch(rf"\s*{_TAG}\s*", rest.partition(_MARK)[0]),
            )
            if thought and opener and closer:
                return ThinkBlock(opener[1], closer[1], opener[0] + closer[0])
        return None

    @property
    def _switched(self) -> dict[str, bool]:
        """The template's own arguments for its thinking, as it is set."""
        thinking = self.template.thinking
        return dict.fromkeys(self.switches if thinking else (), thinking == "open")

    def _messages(self, *texts: str) -> list[dict[str, Any]]:
        """A query, and its answer where there is one, as messages, with the system prompt in its place."""
        system, folds = self.template.system, self.template.folds_system
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]
        if system is not None and folds:
            messages[0]["content"] = f"{system}\n\n{texts[0]}"
        return messages if system is None or folds else [{"role": "system", "content": system}, *messages]

    def conversation(self, *texts: str, thoughts: Any = None, **arguments: Any) -> str | None:
        """A query, and its answer where there is one, as the chat template writes them; None where it fails."""
        messages = self._messages(*texts)
        messages[-1] |= thoughts or {}
        return self._attempt(messages, add_generation_prompt=len(texts) == 1, **arguments)

    def _attempt(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str | None:
        try:
            return self._apply(messages, **arguments)
        except TimeoutError as error:  # it would be waited for again and again
            raise InputError(f"the chat template of {self.model} rejects the prompt: {error}") from None
        except _template_errors():
            return None

    def _apply(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        if self.takes_parts:
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        with render_limits():
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments))


def _template_errors() -> tuple[type[Exception], ...]:
    """What rendering raises: jinja's errors, and those that a template's code or the choice among several may raise."""
    from jinja2.exceptions import TemplateError

    known = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, SyntaxError)
    return (TemplateError, TimeoutError, AssertionError, MemoryError, *known)

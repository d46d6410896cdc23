"""A tokenizer's own chat template. Owns the turns, how a think block is closed or opened, and what cannot be rendered.

It refuses to know models: a tokenizer is whatever is handed in. Families write their think blocks in different ways;
what they write is data here, what a template does with it is found out by rendering.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from safetyheads.errors import InputError

Thinking: TypeAlias = Literal["closed", "open"]
"""``closed``: the think block is shut before the answer begins. ``open``: the model may think, and what it thinks is
taken away before anybody judges."""
Messages: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ThinkBlock:
    """How a family marks what a model thinks before it answers."""

    opener: str
    """Where thinking begins."""
    closer: str
    """Where it ends, and the answer begins."""
    empty: str
    """A block without a thought, as the family writes it: after it the model answers at once."""


THINK_BLOCKS: tuple[ThinkBlock, ...] = (
    # Qwen3, DeepSeek, GLM, SmolLM3, Kimi, Nemotron and most others.
    ThinkBlock("<think>", "</think>", "<think>\n\n</think>\n\n"),
    # gpt-oss: whatever channel an answer begins with, the final one is the answer.
    ThinkBlock("<|channel|>", "<|channel|>final<|message|>", "<|channel|>final<|message|>"),
    # Gemma 4.
    ThinkBlock("<|channel>thought", "<channel|>", "<|channel>thought\n<channel|>"),
    # Command A Reasoning.
    ThinkBlock("<|START_THINKING|>", "<|END_THINKING|>", "<|START_THINKING|><|END_THINKING|>"),
    # Magistral.
    ThinkBlock("[THINK]", "[/THINK]", "[THINK][/THINK]"),
    # Seed-OSS.
    ThinkBlock("<seed:think>", "</seed:think>", "<seed:think></seed:think>"),
    # EXAONE Deep.
    ThinkBlock("<thought>", "</thought>", "<thought>\n\n</thought>\n\n"),
)
"""The think blocks that are known; a template's is the first of these whose marks stand in its source."""

SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Arguments by which templates are told whether to think; one counts where the rendering depends on it."""

# What no template changes, and no template writes.
_MARK = "safetyheads"

# What templates call to learn today's date.
_CLOCK = "strftime_now"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A tokenizer's chat template, looked at once."""

    tokenizer: Any
    """Renders it."""
    name: str
    """Of the tokenizer's model, for messages."""
    block: ThinkBlock | None
    """The think block that the template knows of."""
    switches: tuple[str, ...]
    """Those of :data:`SWITCHES` that it takes."""
    takes_parts: bool = False
    """Whether a message's content is to be a list of parts, as templates of models that also see expect it."""
    is_dated: bool = False
    """Whether it writes today's date into the prompt."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """The chat template of a tokenizer.

        Raises:
            InputError: it has none.
        """
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        source = getattr(tokenizer, "chat_template", None)
        if not source:
            raise InputError(f"the tokenizer of {name} has no chat template; choose --template query_answer or direct")
        # Some tokenizers have several, by name.
        text = str(source.get("default", "")) if isinstance(source, dict) else str(source)
        block = next((block for block in THINK_BLOCKS if block.opener in text or block.closer in text), None)
        found = cls(tokenizer, name, block, ())
        if not found._passes_on_a_query() and (by_parts := replace(found, takes_parts=True))._passes_on_a_query():
            found = by_parts
        switches = tuple(switch for switch in SWITCHES if switch in text and found._depends_on(switch))
        return replace(found, switches=switches, is_dated=_CLOCK in text and found._asks_for_the_date())

    @property
    def thinks(self) -> bool:
        """Whether it has anything to do with thinking."""
        return self.block is not None or bool(self.switches)

    @property
    def note(self) -> str | None:
        """What is to be said of prompts that hold today's date; None where they do not."""
        if not self.is_dated:
            return None
        return "the chat template writes today's date into the prompts; the same command on another day is another run"

    def render(self, query: str, system: str | None, folds_system: bool, thinking: Thinking | None) -> str:
        """One prompt, up to where the answer begins.

        Args:
            query: the user's words.
            system: a system message before them; None sends none.
            folds_system: put the system prompt at the beginning of the user's turn instead.
            thinking: whether the think block is closed; None leaves a template alone that has none.

        Raises:
            InputError: the template rejects the prompt or the system prompt, leaves one of them out, or has no think
                block to be closed.
        """
        if thinking == "closed" and not self.thinks:
            raise InputError(f"the chat template of {self.name} has no think block to close; leave --thinking out")
        messages = [{"role": "user", "content": query}]
        if system is not None and folds_system:
            messages[0]["content"] = f"{system}\n\n{query}"
        elif system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = self._rendered(messages, thinking)
        except _errors() as error:
            what = "the prompt" if system is None or folds_system else "the system prompt"
            instead = "" if what == "the prompt" else f"; {_FOLD}"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the chat template of {self.name} rejects {what}: {reason}{instead}") from error
        # Some templates leave words out without one of their own; the run would then not be what it says.
        if query.strip() not in text:
            raise InputError(
                f"the chat template of {self.name} drops the query, or changes it; choose --template query_answer or "
                "direct"
            )
        if system is not None and system.strip() not in text:
            raise InputError(f"the chat template of {self.name} drops the system prompt; {_FOLD}")
        return self._closed(text) if thinking == "closed" else text

    def joint(self, query: str, text: str) -> str:
        """The blanks that the template itself writes between a prompt and its answer, as Llama-2's does."""
        try:
            turns = [{"role": "user", "content": query}, {"role": "assistant", "content": _MARK}]
            whole = self._rendered(turns, None, generation_prompt=False)
            prompt = self._rendered(turns[:1], None)
        except _errors():
            return ""
        between = whole.removeprefix(prompt).partition(_MARK)[0] if whole.startswith(prompt) else ""
        return "" if between.strip() or text[-1:].isspace() else between

    def opens_block(self, text: str) -> bool:
        """Whether a rendered prompt ends inside the think block."""
        return self.block is not None and text.rstrip().endswith(self.block.opener)

    def _rendered(self, messages: Messages, thinking: Thinking | None, generation_prompt: bool = True) -> str:
        told = {} if thinking is None else dict.fromkeys(self.switches, thinking == "open")
        return self._applied(messages, generation_prompt, told)

    def _applied(self, messages: Messages, generation_prompt: bool, told: dict[str, Any]) -> str:
        if self.takes_parts:
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **told
            )
        )

    def _passes_on_a_query(self) -> bool:
        """Whether what a user says is in the prompt."""
        try:
            return _MARK in self._rendered([{"role": "user", "content": _MARK}], None)
        except _errors():
            return False

    def _closed(self, text: str) -> str:
        """The prompt with the think block closed at its end, unless the template has seen to that."""
        if self.block is None:
            return text
        if self.opens_block(text):
            return text.rstrip().removesuffix(self.block.opener) + self.block.empty
        is_closed = text.rstrip().endswith(self.block.closer)
        return text if is_closed or self.switches else text + self.block.empty

    def _depends_on(self, switch: str) -> bool:
        """Whether the rendering changes with an argument; the word alone may stand there for something else."""
        messages = [{"role": "user", "content": _MARK}]
        try:
            off, on = (self._applied(messages, True, {switch: value}) for value in (False, True))
        except _errors():
            return False
        return off != on

    def _asks_for_the_date(self) -> bool:
        """Whether the rendering fails where there is no clock but a word in its place."""
        try:
            self._applied([{"role": "user", "content": _MARK}], True, {_CLOCK: _MARK})
        except _errors():
            return self._passes_on_a_query()
        return False


_FOLD = "--fold-system (Template.folds_system) puts it at the beginning of the user's turn"


def _errors() -> tuple[type[Exception], ...]:
    """What rendering raises: jinja's own errors, and those of Python that a template's code may meet.

    ValueError also where there are several templates and none is the default.
    """
    from jinja2.exceptions import TemplateError

    return TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError

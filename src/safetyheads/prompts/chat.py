"""Renders prompts by a tokenizer's own chat template, with the think block closed or open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from safetyheads.errors import InputError

Thinking: TypeAlias = Literal["closed", "open"]
"""``closed``: the think block is closed before the answer begins. ``open``: the model may think, and its thoughts are
removed before judging."""
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
    ThinkBlock("<think>", "</think>", "<think>\n\n</think>\n\n"),  # Qwen3, DeepSeek, GLM, SmolLM3, Kimi, most others
    # gpt-oss: whatever channel an answer begins with, the final one is the answer.
    ThinkBlock("<|channel|>", "<|channel|>final<|message|>", "<|channel|>final<|message|>"),
    ThinkBlock("<|channel>thought", "<channel|>", "<|channel>thought\n<channel|>"),  # Gemma 4
    ThinkBlock("<|START_THINKING|>", "<|END_THINKING|>", "<|START_THINKING|><|END_THINKING|>"),  # Command A Reasoning
    ThinkBlock("[THINK]", "[/THINK]", "[THINK][/THINK]"),  # Magistral
    ThinkBlock("<seed:think>", "</seed:think>", "<seed:think></seed:think>"),  # Seed-OSS
    ThinkBlock("<thought>", "</thought>", "<thought>\n\n</thought>\n\n"),  # EXAONE Deep
)
"""The known think blocks; a template's is the first whose marks stand in its source."""

SWITCHES = ("enable_thinking", "thinking", "reasoning")
"""Arguments that turn thinking on or off; one counts where the rendering depends on it."""

# A text that no template changes, and no template writes.
_MARK = "safetyheads"
# What templates call to get today's date.
_CLOCK = "strftime_now"
_FOLD = "--fold-system (Template.folds_system) puts it at the beginning of the user's turn"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A tokenizer's chat template, examined once: what it does with thinking, parts and dates is found by rendering."""

    tokenizer: Any
    """Renders the template."""
    name: str
    """Name of the tokenizer's model, for messages."""
    block: ThinkBlock | None
    """The think block that the template knows."""
    switches: tuple[str, ...] = ()
    """Those of :data:`SWITCHES` that it takes."""
    takes_parts: bool = False
    """Whether a message's content must be a list of parts, as templates of vision models expect."""
    is_dated: bool = False
    """Whether it writes today's date into the prompt."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """The chat template of a tokenizer; an InputError where it has none."""
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        source = getattr(tokenizer, "chat_template", None)
        if not source:
            raise InputError(f"the tokenizer of {name} has no chat template; choose --template query_answer or direct")
        # Some tokenizers have several, by name.
        text = str(source.get("default", "")) if isinstance(source, dict) else str(source)
        block = next((block for block in THINK_BLOCKS if block.opener in text or block.closer in text), None)
        chat = cls(tokenizer, name, block)
        if _MARK not in (chat._try() or "") and _MARK in (replace(chat, takes_parts=True)._try() or ""):
            chat = replace(chat, takes_parts=True)
        switches = tuple(switch for switch in SWITCHES if switch in text and chat._depends_on(switch))
        # A template that asks for the date fails where a text stands in the place of the clock.
        is_dated = _CLOCK in text and chat._try(**{_CLOCK: _MARK}) is None and _MARK in (chat._try() or "")
        return replace(chat, switches=switches, is_dated=is_dated)

    @property
    def thinks(self) -> bool:
        """Whether the template has a think block or a switch for thinking."""
        return self.block is not None or bool(self.switches)

    def render(self, query: str, system: str | None, folds_system: bool, thinking: Thinking | None) -> str:
        """One prompt, up to where the answer begins; the arguments are as in a :class:`Template`.

        Raises:
            InputError: the template rejects the prompt or the system prompt, leaves one of them out, or has no think
                block to close.
        """
        if thinking == "closed" and not self.thinks:
            raise InputError(f"the chat template of {self.name} has no think block to close; leave --thinking out")
        messages = [{"role": "user", "content": query}]
        if system is not None and folds_system:
            messages[0]["content"] = f"{system}\n\n{query}"
        elif system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = self._apply(messages, {} if thinking is None else dict.fromkeys(self.switches, thinking == "open"))
        except _template_errors() as error:
            what, advice = ("the system prompt", f"; {_FOLD}") if len(messages) > 1 else ("the prompt", "")
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the chat template of {self.name} rejects {what}: {reason}{advice}") from error
        # Some templates leave words out without an error; the run would then not be what its manifest says.
        if query.strip() not in text:
            advice = "choose --template query_answer or direct"
            raise InputError(f"the chat template of {self.name} drops the query, or changes it; {advice}")
        if system is not None and system.strip() not in text:
            raise InputError(f"the chat template of {self.name} drops the system prompt; {_FOLD}")
        return self._close_block(text) if thinking == "closed" else text

    def joint(self, query: str, text: str) -> str:
        """The blanks that the template itself writes between a prompt and its answer, as Llama-2's does."""
        turns = [{"role": "user", "content": query}, {"role": "assistant", "content": _MARK}]
        try:
            whole, prompt = self._apply(turns, {}, generation_prompt=False), self._apply(turns[:1], {})
        except _template_errors():
            return ""
        between = whole.removeprefix(prompt).partition(_MARK)[0] if whole.startswith(prompt) else ""
        return "" if between.strip() or text[-1:].isspace() else between

    def _apply(self, messages: Messages, arguments: dict[str, Any], generation_prompt: bool = True) -> str:
        if self.takes_parts:
            messages = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]
        arguments = arguments | {"tokenize": False, "add_generation_prompt": generation_prompt}
        return str(self.tokenizer.apply_chat_template(messages, **arguments))

    def _close_block(self, text: str) -> str:
        if self.block is None:
            return text
        if text.rstrip().endswith(self.block.opener):
            return text.rstrip().removesuffix(self.block.opener) + self.block.empty
        is_closed = text.rstrip().endswith(self.block.closer)
        return text if is_closed or self.switches else text + self.block.empty

    def _try(self, **arguments: Any) -> str | None:
        """The rendering of a query that is easy to find; None where the template fails."""
        try:
            return self._apply([{"role": "user", "content": _MARK}], arguments)
        except _template_errors():
            return None

    def _depends_on(self, switch: str) -> bool:
        """Whether the rendering changes with an argument; the word alone may stand in the source for something else."""
        off, on = (self._try(**{switch: value}) for value in (False, True))
        return off is not None and on is not None and off != on


def _template_errors() -> tuple[type[Exception], ...]:
    """What rendering raises: jinja's errors, and those that a template's code or the choice among several may raise."""
    from jinja2.exceptions import TemplateError

    return TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError

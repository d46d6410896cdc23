"""Answers conversations one by one with heads ablated, for servers and evaluation tools; needs anyio.

Not transformers' ``generate``: answers are those that a run decodes, and drawn ones are the same in any batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import GREEDY, Decoding, Request, Sampling, answer
from safetyheads.display import Shown
from safetyheads.errors import InputError
from safetyheads.heads import Group
from safetyheads.prompts.asked import AnswerReader, ReadAnswer
from safetyheads.prompts.files import last_turn
from safetyheads.prompts.prompt_set import Prompt, PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine


@dataclass(eq=False, repr=False)
class Chat(Shown):
    """A conversation, and its answer once that is decoded."""

    request: Request
    """The conversation under the template, and the heads that are ablated."""
    decoding: Decoding
    reader: AnswerReader
    read: ReadAnswer | None = None
    """The answer; None until it is decoded."""
    finished: bool = False
    """Whether the model or a stop text ended it, not the limit."""
    n_tokens: int = 0
    """Its tokens, those of a think block among them."""

    def _facts(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("decoding", "finished", "n_tokens")}

    @property
    def text(self) -> str:
        """The answer, without think block and stop text; empty until it is decoded."""
        return "" if self.read is None else self.read.text


class AblatedChats:
    """Answers conversations; those that wait meanwhile are answered in one batch."""

    def __init__(self, engine: Engine, ablation: Ablation, template: Template | None = None) -> None:
        """Answer with the engine's model; without a template, under its default."""
        self.engine, self.ablation, self.template = engine, ablation, template
        self._lock, self._waiting = anyio.Lock(), list[Chat]()
        self._times_asked: Counter[object] = Counter()

    def chat(
        self,
        messages: Sequence[Any],
        group: Group = (),
        *,
        max_new_tokens: int = 512,
        temperature: float | None = 0,
        top_k: int | None = None,
        seed: int | None = None,
        stops: Sequence[str] = (),
    ) -> Chat:
        """A conversation to be answered, the last message the user's.

        Temperature 0 and top-k 1 are greedy; no temperature is 1, and no top-k draws from all tokens. Without a seed,
        the answer to a conversation that comes for the n-th time is drawn with seed n - 1.

        Raises:
            InputError: the template cannot write the conversation, the model's context is too short, or bad settings.
        """
        query, earlier = last_turn(messages, "messages")
        asked = self.engine.ask(PromptSet((Prompt(query, earlier=earlier),), self.template))
        if not all(stops):
            raise InputError("a stop text cannot be empty")
        if seed is None:
            key = (asked.token_ids, group)
            seed, self._times_asked[key] = self._times_asked[key], self._times_asked[key] + 1
        sampling = Sampling(top_k or 1 << 30, seed, 1.0 if temperature is None else temperature or 1.0)
        greedy = temperature == 0 or top_k == 1
        decoding = Decoding(max_new_tokens, GREEDY if greedy else sampling)
        reader = asked.reader._replace(stops=(*asked.reader.stops, *stops))
        return Chat(Request(asked.token_ids[0], group, stop=reader.ends), decoding, reader)

    async def answer(self, chat: Chat) -> Chat:
        """Decode the conversation's answer, with those of all others that wait and are decoded alike."""
        self._waiting.append(chat)
        try:
            async with self._lock:
                if chat.read is None:
                    alike = [other for other in self._waiting if other.decoding == chat.decoding]
                    await anyio.to_thread.run_sync(self._decode, [other for other in alike if other.read is None])
        finally:
            self._waiting.remove(chat)
        return chat

    def _decode(self, chats: Sequence[Chat]) -> None:
        decoded = answer(self.engine, [chat.request for chat in chats], chats[0].decoding, self.ablation)
        for chat, found in zip(chats, decoded, strict=True):
            chat.read = chat.reader.read(found.token_ids)
            chat.finished, chat.n_tokens = found.finished or chat.read.stopped, len(found.token_ids)

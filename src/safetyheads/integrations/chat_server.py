"""Answers conversations with heads ablated, and serves them by the OpenAI chat protocol; the extra ``serve``.

Not transformers' own server, which loads and runs whatever model a request names, unablated; nor its ``generate``:
answers are those that a run decodes, and drawn ones are the same in any batch.
"""

from __future__ import annotations

import hmac
import json
import os
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import GREEDY, Decoding, Request, Sampling, answer
from safetyheads.display import Shown
from safetyheads.errors import InputError, first_line
from safetyheads.heads import Group, format_heads
from safetyheads.prompts.asked import AnswerReader, ReadAnswer
from safetyheads.prompts.files import last_turn
from safetyheads.prompts.prompt_set import Prompt, PromptSet
from safetyheads.prompts.templates import Template

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as WebRequest
    from starlette.responses import Response

    from safetyheads.model.engine import Engine
    from safetyheads.runs.config import ServeConfig

UNABLATED = "none"
"""Name of the unablated model, as in tables; a group's name is its heads."""
KEY_VARIABLE = "SAFETYHEADS_API_KEY"
"""Environment variable; where it is set, clients have to send its value as their key."""
HOST = "127.0.0.1"
_MOST_CHOICES = 64
# Largest request, and seconds in which all of it has to come.
_MOST_BYTES = 1 << 24
_REQUEST_SECONDS = 60.0
# Settings that would change an answer and are not followed, with the values that do nothing; and harmless ones.
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("top_p", "repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens", "top_logprobs"), (0,)),
    **dict.fromkeys(("logprobs", "tools", "functions", "logit_bias", "audio", "chat_template_kwargs"), (False, [], {})),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_HARMLESS = "user metadata store service_tier stream_options safety_identifier parallel_tool_calls prompt_cache_key"


class ChatRequest(msgspec.Struct):
    """What a client may ask for."""

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None


# Answers, for servers and evaluation tools.


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
        """Answer with the engine's model; without a template, under its default. It needs anyio."""
        import anyio

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
        """
        query, earlier = last_turn(messages, "messages")
        asked = self.engine.ask(PromptSet((Prompt(query, earlier=earlier),), self.template))
        if not all(stops):
            raise InputError("a stop text cannot be empty")
        greedy = temperature == 0 or top_k == 1
        if seed is None:
            key = (asked.sha256, group)
            seed = self._times_asked[key]
            self._times_asked[key] += not greedy
        sampling = Sampling(top_k or 1 << 30, seed, 1.0 if temperature is None else temperature or 1.0)
        decoding = Decoding(max_new_tokens, GREEDY if greedy else sampling)
        reader = asked.reader._replace(stops=(*asked.reader.stops, *stops))
        return Chat(Request(asked.token_ids[0], group, stop=reader.ends), decoding, reader)

    async def answers(
        self, messages: Sequence[Any], group: Group, n: int, seed: int | None, **settings: Any
    ) -> list[Chat]:
        """Several answers to a conversation, with a seed each drawn with the next one; settings as for :meth:`chat`."""
        seeds = [None if seed is None else seed + number for number in range(n)]
        waiting = [self.chat(messages, group, seed=of_chat, **settings) for of_chat in seeds]
        return [await self.answer(chat) for chat in waiting]

    async def answer(self, chat: Chat) -> Chat:
        """Decode the conversation's answer, with those of all others that wait and are decoded alike."""
        import anyio.to_thread

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


# A server.


def require_serve() -> None:
    """An InputError where the extra is not installed, or no client could send the key that is set."""
    if not all(map(find_spec, ("anyio", "starlette", "uvicorn"))):
        raise InputError("a server needs starlette and uvicorn: pip install 'safetyheads[serve]'")
    if not re.fullmatch(r"[!-~]*", os.environ.get(KEY_VARIABLE, "")):
        raise InputError(f"{KEY_VARIABLE} can hold letters, digits and signs of ASCII alone, and no blanks")


def read_request(body: bytes) -> ChatRequest:
    """A client's request; an InputError for one that cannot be followed."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        request = msgspec.convert(fields, ChatRequest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InputError(first_line(error)) from error
    for name in fields.keys() - {*ChatRequest.__struct_fields__, *_HARMLESS.split()}:
        if fields[name] is not None and fields[name] not in _NOT_FOLLOWED.get(name, ()):
            raise InputError(f"{name} is not followed here; leave it out")
    if request.n is not None and not 1 <= request.n <= (1 if request.stream else _MOST_CHOICES):
        raise InputError(f"n lies from 1 to {_MOST_CHOICES}, and is 1 in a stream; got {request.n}")
    return request


def plain_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a content in parts joined, and a developer's as the system's."""
    content, role = message.get("content"), message.get("role")
    if isinstance(content, list):
        # A part with more than its type and its text is a picture or the like.
        texts: list[Any] = [
            part.get("text")
            if isinstance(part, dict) and {name for name in part if part[name]} <= {"type", "text"}
            else 0
            for part in content
        ]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("only text can be answered")
        content = "".join(texts)
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def chat_app(chats: AblatedChats, config: ServeConfig, key: str | None = None) -> Starlette:
    """The web application: ``/v1/models`` and ``/v1/chat/completions``; a ``key`` has to be sent by clients."""
    import anyio
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    models: dict[str, Group] = {UNABLATED: (), **{format_heads(group): group for group in config.parsed_groups}}

    def refuse_strangers(request: WebRequest) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "wrong key")

    async def read_body(request: WebRequest) -> bytes:
        body = bytearray()
        try:
            with anyio.fail_after(_REQUEST_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > _MOST_BYTES:
                        raise HTTPException(413, f"a request has at most {_MOST_BYTES >> 20} MiB")
        except TimeoutError:
            raise HTTPException(408, f"the request did not come within {_REQUEST_SECONDS:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client left") from None
        return bytes(body)

    async def list_models(request: WebRequest) -> Response:
        refuse_strangers(request)
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "safetyheads"} for name in models]
        return JSONResponse({"object": "list", "data": listed})

    async def complete(request: WebRequest) -> Response:
        refuse_strangers(request)
        # A page of another site can send all but this without asking first.
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise HTTPException(415, "the content type must be application/json")
        asked = read_request(await read_body(request))
        if asked.model not in models:
            raise HTTPException(404, f"no model {asked.model!r}; there are {', '.join(models)}")
        lengths = (asked.max_completion_tokens, asked.max_tokens, config.max_new_tokens)
        answered = await chats.answers(
            [plain_text(message) for message in asked.messages],
            models[asked.model],
            asked.n or 1,
            asked.seed,
            max_new_tokens=next(length for length in lengths if length is not None),
            temperature=asked.temperature,
            top_k=asked.top_k,
            stops=[asked.stop] if isinstance(asked.stop, str) else asked.stop or (),
        )
        if asked.stream:
            return Response(_events(answered[0], asked.model), media_type="text/event-stream")
        return JSONResponse(_completion(answered, asked.model))

    async def refused(_: WebRequest, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        message = error.detail if isinstance(error, HTTPException) else first_line(error)
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)

    return Starlette(
        routes=[Route("/v1/models", list_models), Route("/v1/chat/completions", complete, methods=["POST"])],
        # A page whose own name was led here could else read answers.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
        exception_handlers={InputError: refused, HTTPException: refused},
    )


def _frame(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _completion(chats: Sequence[Chat], model: str) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": chat.text},
            "finish_reason": "stop" if chat.finished else "length",
            "logprobs": None,
        }
        for index, chat in enumerate(chats)
    ]
    read, written = len(chats[0].request.token_ids), sum(chat.n_tokens for chat in chats)
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {**_frame(model, "chat.completion"), "choices": choices, "usage": usage}


def _events(chat: Chat, model: str) -> str:
    """The answer as a stream's events, in one piece."""
    frame, message = _frame(model, "chat.completion.chunk"), {"role": "assistant", "content": chat.text}
    deltas = [(message, None), ({}, "stop" if chat.finished else "length")]
    choices = [{"index": 0, "delta": delta, "finish_reason": reason} for delta, reason in deltas]
    events = [json.dumps({**frame, "choices": [choice]}) for choice in choices]
    return "".join(f"data: {event}\n\n" for event in (*events, "[DONE]"))


def listen(port: int) -> socket.socket:
    """A socket for this machine alone; an InputError where the port is taken."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((HOST, port))
    except OSError as error:
        opened.close()
        raise InputError(f"port {port} cannot be had: {error.strerror}; --port takes another") from error
    return opened


def serve_chats(
    engine: Engine, config: ServeConfig, opened: socket.socket, tell: Callable[[dict[str, Any]], None]
) -> None:
    """Answer until the process is interrupted; ``tell`` is given the address and the models' names at first."""
    import uvicorn

    key = os.environ.get(KEY_VARIABLE) or None
    app = chat_app(AblatedChats(engine, config.parsed_ablation, config.parsed_template), config, key)
    who = "whoever sends the key" if key else f"everybody on this machine; {KEY_VARIABLE} sets a key"
    names = [UNABLATED, *map(format_heads, config.parsed_groups)]
    address = f"http://{HOST}:{opened.getsockname()[1]}/v1"
    tell({"base_url": address, "models": names, "open_to": f"Open to {who}"})
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[opened])

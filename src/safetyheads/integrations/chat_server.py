"""Serves a model under its groups of heads by the OpenAI chat protocol, for red-teaming tools; the extra ``serve``.

Not transformers' own server, which loads and runs whatever model a request names, unablated.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec

from safetyheads.errors import InputError, first_line
from safetyheads.heads import Group, format_heads

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from safetyheads.integrations.chats import AblatedChats, Chat
    from safetyheads.model.engine import Engine
    from safetyheads.runs.config import ServeConfig

UNABLATED = "none"
"""Name of the unablated model, as in tables; a group's name is its heads."""
KEY_VARIABLE = "SAFETYHEADS_API_KEY"
"""Environment variable; where it is set, clients have to send its value as their key."""
HOST = "127.0.0.1"
_MOST_CHOICES = 64
# Settings that would change an answer and are not followed, with the values that do nothing.
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("top_p", "repetition_penalty"), (1,)),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), (0,)),
    **dict.fromkeys(("logprobs", "tools", "functions", "logit_bias", "audio"), (False, [], {})),
    "response_format": ({"type": "text"},),
}


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


def require_serve() -> None:
    """An InputError where the extra is not installed."""
    if not all(map(find_spec, ("anyio", "starlette", "uvicorn"))):
        raise InputError("a server needs starlette and uvicorn: pip install 'safetyheads[serve]'")


def read_request(body: bytes) -> ChatRequest:
    """A client's request; an InputError for one that cannot be followed."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
        request = msgspec.convert(fields, ChatRequest)
    except msgspec.MsgspecError as error:
        raise InputError(first_line(error)) from error
    for name, neutral in _NOT_FOLLOWED.items():
        if fields.get(name) is not None and fields[name] not in neutral:
            raise InputError(f"{name} is not followed here; leave it out")
    if request.n is not None and not 1 <= request.n <= (1 if request.stream else _MOST_CHOICES):
        raise InputError(f"n lies from 1 to {_MOST_CHOICES}, and is 1 in a stream; got {request.n}")
    return request


def plain_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a content in parts joined, and a developer's as the system's."""
    content, role = message.get("content"), message.get("role")
    if isinstance(content, list):
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("only text can be answered")
        content = "".join(texts)
    return {"role": "system" if role == "developer" else role, "content": content}


def chat_app(chats: AblatedChats, config: ServeConfig, key: str | None = None) -> Starlette:
    """The web application: ``/v1/models`` and ``/v1/chat/completions``; a ``key`` has to be sent by clients."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    models: dict[str, Group] = {UNABLATED: (), **{format_heads(group): group for group in config.parsed_groups}}

    def refuse_strangers(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "wrong key")

    async def list_models(request: Request) -> Response:
        refuse_strangers(request)
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "safetyheads"} for name in models]
        return JSONResponse({"object": "list", "data": listed})

    async def complete(request: Request) -> Response:
        refuse_strangers(request)
        # A page of another site can send all but this without asking first.
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise HTTPException(415, "the content type must be application/json")
        asked = read_request(await request.body())
        if asked.model not in models:
            raise HTTPException(404, f"no model {asked.model!r}; there are {', '.join(models)}")
        waiting = [
            chats.chat(
                [plain_text(message) for message in asked.messages],
                models[asked.model],
                max_new_tokens=asked.max_completion_tokens or asked.max_tokens or config.max_new_tokens,
                temperature=asked.temperature,
                top_k=asked.top_k,
                seed=None if asked.seed is None else asked.seed + number,
                stops=[asked.stop] if isinstance(asked.stop, str) else asked.stop or (),
            )
            for number in range(asked.n or 1)
        ]
        answered = [await chats.answer(chat) for chat in waiting]
        if asked.stream:
            return Response(_events(answered[0], asked.model), media_type="text/event-stream")
        return JSONResponse(_completion(answered, asked.model))

    async def refused(_: Request, error: Exception) -> Response:
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


def _reason(chat: Chat) -> str:
    return "stop" if chat.finished else "length"


def _completion(chats: Sequence[Chat], model: str) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": chat.text},
            "finish_reason": _reason(chat),
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
    deltas: list[tuple[dict[str, str], str | None]] = [(message, None), ({}, _reason(chat))]
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

    from safetyheads.integrations.chats import AblatedChats

    key = os.environ.get(KEY_VARIABLE)
    app = chat_app(AblatedChats(engine, config.parsed_ablation, config.parsed_template), config, key)
    who = "whoever sends the key" if key else f"everybody on this machine; {KEY_VARIABLE} sets a key"
    names = [UNABLATED, *map(format_heads, config.parsed_groups)]
    address = f"http://{HOST}:{opened.getsockname()[1]}/v1"
    tell({"base_url": address, "models": names, "open_to": f"Open to {who}"})
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[opened])

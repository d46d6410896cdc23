"""One question to an OpenAI-compatible chat-completions endpoint. Owns address and key, retries, waits and the cap.

It refuses to know what is asked: messages go in, the reply's text comes out, and whatever fails is one exception with
a reason that quotes neither. Nothing is sent before :meth:`Endpoint.ask`. Its libraries are the extra ``endpoint``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from safetyheads.errors import InputError, SafetyheadsError

if TYPE_CHECKING:
    import httpx2
    import tenacity

ADDRESSES: tuple[tuple[str, str], ...] = (
    ("SAFETYHEADS_JUDGE_URL", "SAFETYHEADS_JUDGE_KEY"),
    ("OPENAI_BASE_URL", "OPENAI_API_KEY"),
)
"""Environment variables of base URL and key. The first pair with a URL is taken whole: a key never goes elsewhere."""

_EXTRA = ("httpx2", "tenacity")
_RAW_CHARACTERS = 2000
_HOPELESS = frozenset({401, 403, 404})


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """How an endpoint is asked, and where it stops."""

    timeout_s: float = 60.0
    """Seconds without a byte after which an attempt has failed."""
    attempts: int = 5
    """Tries of one question in all, where it timed out, broke off, or was answered with 408, 429 or 5xx."""
    first_wait_s: float = 1.0
    """Upper bound of the first, random wait; it doubles with every try."""
    longest_wait_s: float = 60.0
    """No wait is longer; an endpoint whose Retry-After asks for more is given up."""
    threads: int = 4
    """Questions under way at one time."""
    reply_tokens: int = 512
    """Tokens that a reply may have."""
    token_field: str = "max_tokens"
    """What the endpoint calls that number; some models want ``max_completion_tokens``."""
    temperature: float | None = 0.0
    """None leaves it out, for models that accept none."""
    max_requests: int | None = 2000
    """Requests in all, failed tries included; None for no cap."""
    max_cost: float | None = None
    """US dollars in all, which needs both prices; never exceeded, since a request first reserves the most it can cost:
    a token for every byte sent, and ``reply_tokens``."""
    input_price: float | None = None
    """US dollars for a million tokens sent."""
    output_price: float | None = None
    """US dollars for a million tokens of reply."""

    def __post_init__(self) -> None:
        if self.max_cost is not None and (self.input_price is None or self.output_price is None):
            raise InputError("a cost cap of an endpoint needs the prices of a million input and output tokens")
        numbers = (self.max_requests, self.max_cost, self.input_price, self.output_price, self.temperature)
        waits = (self.first_wait_s, self.longest_wait_s)
        if not all(number is None or number >= 0 for number in (*numbers, *waits)) or self.timeout_s <= 0:
            raise InputError("an endpoint's limits, prices and waits are 0 or more, its timeout is above 0")
        if min(self.attempts, self.threads, self.reply_tokens) < 1:
            raise InputError("an endpoint needs an attempt, a thread and a token of reply at least")

    def cost(self, tokens_sent: int, tokens_received: int) -> float:
        """US dollars; 0 without prices."""
        return ((self.input_price or 0.0) * tokens_sent + (self.output_price or 0.0) * tokens_received) / 1e6


ENVIRONMENT: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "SAFETYHEADS_JUDGE_MAX_REQUESTS": ("max_requests", int),
    "SAFETYHEADS_JUDGE_MAX_COST": ("max_cost", float),
    "SAFETYHEADS_JUDGE_INPUT_PRICE": ("input_price", float),
    "SAFETYHEADS_JUDGE_OUTPUT_PRICE": ("output_price", float),
    "SAFETYHEADS_JUDGE_TEMPERATURE": ("temperature", lambda text: None if text == "none" else float(text)),
    "SAFETYHEADS_JUDGE_TOKEN_FIELD": ("token_field", str),
}
"""Environment variables that set a field of :class:`EndpointSettings`, for the command line."""


class EndpointFailure(SafetyheadsError):
    """A question got no reply that can be read."""

    def __init__(self, reason: str, raw: str = "", hopeless: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.raw = raw[:_RAW_CHARACTERS]
        self.hopeless = hopeless
        """Whether every further question would fail likewise."""


class _PassingFailure(EndpointFailure):
    def __init__(self, reason: str, raw: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(reason, raw)
        self.retry_after_s = retry_after_s


class Meter:
    """What an endpoint was sent so far. The one thing here that changes; threads share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.requests = 0
        """Requests sent, failed ones included."""
        self.cost = 0.0
        """US dollars by the prices given; a request that timed out counts with the most it can have cost."""
        self._used = False

    def first_use(self) -> bool:
        """True the first time it is asked."""
        with self._lock:
            first, self._used = not self._used, True
            return first

    def reserve(self, settings: EndpointSettings, most: float) -> bool:
        """Count a request of ``most`` dollars, unless a cap would be passed."""
        with self._lock:
            full = settings.max_requests is not None and self.requests >= settings.max_requests
            if full or (settings.max_cost is not None and self.cost + most > settings.max_cost):
                return False
            self.requests += 1
            self.cost += most
            return True

    def settle(self, most: float, actual: float) -> None:
        """Replace what was reserved by what was spent."""
        with self._lock:
            self.cost += actual - most


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model behind an OpenAI-compatible chat-completions endpoint."""

    model: str
    """Its name there."""
    base_url: str
    """What stands before ``/chat/completions``, such as ``http://localhost:8000/v1``."""
    key: str = field(repr=False)
    """Sent as the bearer token; shown and stored nowhere. Any text for an endpoint that wants none."""
    settings: EndpointSettings = field(default_factory=EndpointSettings)
    """How it is asked."""
    meter: Meter = field(default_factory=Meter, repr=False, compare=False)
    """What counts against the caps."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)
    """Waits that many seconds."""

    def __post_init__(self) -> None:
        if not self.model or not self.key.isascii() or not self.key.isprintable() or not self.key.strip():
            raise InputError("an endpoint needs the name of a model, and a key of ASCII characters")
        if not self.shown_url:
            raise InputError("the base URL of an endpoint is http://HOST/PATH or https://HOST/PATH")
        missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(
                f"judges behind an endpoint need {' and '.join(missing)}: pip install 'safetyheads[endpoint]'"
            )

    @classmethod
    def from_environment(cls, model: str, environment: Mapping[str, str] | None = None) -> Endpoint:
        """The endpoint that :data:`ADDRESSES` name, with the settings of :data:`ENVIRONMENT`.

        Raises:
            InputError: no URL, no key, or a setting that cannot be read.
        """
        given = {name: text for name, text in (os.environ if environment is None else environment).items() if text}
        url_name, key_name = next((pair for pair in ADDRESSES if pair[0] in given), ADDRESSES[0])
        if url_name not in given or key_name not in given:
            either = " or ".join(f"{url} and {key}" for url, key in ADDRESSES)
            raise InputError(
                f"a judge behind an endpoint needs its base URL and key in the environment: {either}, both of one "
                f"pair; {key_name if url_name in given else url_name} is missing"
            )
        chosen: dict[str, Any] = {}
        for name, (setting, parse) in ENVIRONMENT.items():
            if name in given:
                try:
                    chosen[setting] = parse(given[name])
                except ValueError as error:
                    raise InputError(f"{name} cannot be read: {given[name]!r}") from error
        return cls(model, given[url_name], given[key_name], EndpointSettings(**chosen))

    @property
    def shown_url(self) -> str:
        """The base URL without user, password, query and fragment; empty for a text that is none."""
        try:
            parts = urlsplit(self.base_url)
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            return ""
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path.rstrip('/')}"

    def client(self) -> httpx2.Client:
        """A connection pool that threads may share; to be closed by whoever asks for it."""
        import httpx2

        # Redirects are not followed: the key was given for this host.
        return httpx2.Client(timeout=self.settings.timeout_s, headers={"Authorization": f"Bearer {self.key}"})

    def ask(self, client: httpx2.Client, messages: list[dict[str, str]]) -> str:
        """The text of the reply, tried again where that may help.

        Raises:
            EndpointFailure: no reply, no text in it, or a cap is reached.
        """
        import tenacity

        body: dict[str, Any] = {"model": self.model, "messages": messages}
        body[self.settings.token_field] = self.settings.reply_tokens
        if self.settings.temperature is not None:
            body["temperature"] = self.settings.temperature
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.settings.attempts),
            wait=self._wait_s,
            retry=tenacity.retry_if_exception_type(_PassingFailure),
            sleep=self.sleep,
            reraise=True,
        )
        # ASCII, because an answer may hold half a surrogate pair, which UTF-8 has no bytes for.
        return retrying(self._try, client, json.dumps(body).encode("ascii"))

    def _try(self, client: httpx2.Client, body: bytes) -> str:
        import httpx2

        most = self.settings.cost(len(body), self.settings.reply_tokens)
        if not self.meter.reserve(self.settings, most):
            raise EndpointFailure("cost cap")
        address = self.base_url.rstrip("/") + "/chat/completions"
        try:
            response = client.post(address, content=body, headers={"Content-Type": "application/json"})
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            self.meter.settle(most, 0.0)
            raise _PassingFailure(f"connection: {type(error).__name__}") from error
        except httpx2.TimeoutException as error:
            raise _PassingFailure("timeout") from error
        except httpx2.TransportError as error:
            raise _PassingFailure(f"connection: {type(error).__name__}") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise EndpointFailure(f"connection: {type(error).__name__}") from error
        if response.status_code != 200:
            self.meter.settle(most, 0.0)
            raise self._failure(response)
        return self._text(response, most)

    def _failure(self, response: httpx2.Response) -> EndpointFailure:
        status = response.status_code
        reason = f"http: {status}"
        if status not in (408, 429) and status < 500:
            return EndpointFailure(reason, response.text, status in _HOPELESS)
        asked_s = _retry_after_s(response.headers.get("retry-after", ""))
        if asked_s > self.settings.longest_wait_s:
            return EndpointFailure(reason, response.text)
        return _PassingFailure(reason, response.text, asked_s)

    def _text(self, response: httpx2.Response, most: float) -> str:
        try:
            reply = response.json()
            text = reply["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise EndpointFailure("reply: no chat completion", response.text) from error
        usage = reply.get("usage")
        if isinstance(usage, dict):
            sent, received = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if isinstance(sent, int) and isinstance(received, int):
                self.meter.settle(most, self.settings.cost(sent, received))
        if not isinstance(text, str) or not text.strip():
            raise EndpointFailure("reply: no text", response.text)
        return text

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        import tenacity

        settings = self.settings
        error = state.outcome.exception() if state.outcome else None
        asked_s = error.retry_after_s if isinstance(error, _PassingFailure) else 0.0
        return max(tenacity.wait_random_exponential(settings.first_wait_s, settings.longest_wait_s)(state), asked_s)


def _retry_after_s(text: str) -> float:
    """Seconds that a Retry-After header asks for: a number or a date; 0 for anything else."""
    try:
        return max(float(text), 0.0)
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)

"""The server by the OpenAI client, on the organism: its answers are those of the engine under the group."""

import asyncio
import json
import threading
import urllib.error
import urllib.request

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_values import unhurried

from safetyheads import InputError, Sampling, generate
from safetyheads.integrations import chat_server
from safetyheads.integrations.chat_server import KEY_VARIABLE, AblatedChats, chat_app, read_request, serve_chats
from safetyheads.runs.config import ServeConfig

GROUP = "1-3,2-5,2-1"


@pytest.fixture(scope="module")
def serve(organism):
    """Starts servers in threads; gives each one's address."""
    servers = []
    patch = pytest.MonkeyPatch()

    def started(**environment):
        import uvicorn

        class Kept(uvicorn.Server):
            def __init__(self, config):
                super().__init__(config)
                servers.append(self)

        patch.setattr(uvicorn, "Server", Kept)
        told, ready = {}, threading.Event()

        def tell(found):
            told.update(found)
            ready.set()

        opened = chat_server.listen(0)
        opened.listen()
        for name, value in environment.items():
            patch.setenv(name, value)
        config = ServeConfig("demo:aligned_a", groups=(GROUP, "3-0"), ablation="ua", max_new_tokens=24)
        threading.Thread(target=serve_chats, args=(organism.engine, config, opened, tell), daemon=True).start()
        assert ready.wait(60)
        for name in environment:
            patch.delenv(name)
        patch.undo()
        return told["base_url"]

    yield started
    for server in servers:
        server.should_exit = True


@pytest.fixture(scope="module")
def address(serve):
    return serve()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key="any", max_retries=0)


def ask(client, prompt, **settings):
    return client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **settings)


def test_a_client_gets_the_engines_answers_of_each_model_plain_and_streamed(client, organism):
    prompt = organism.harmful[0].query
    names = [model.id for model in client.models.list()]
    assert names == ["none", GROUP, "3-0"]
    texts = {}
    for name in names:
        group = "" if name == "none" else name
        (expected,) = generate(organism.engine, [prompt], 24, [group or ()], "ua")
        got = ask(client, prompt, model=name, temperature=0)
        texts[name] = organism.engine.tokenizer.decode(expected.token_ids, skip_special_tokens=True)
        assert got.choices[0].message.content == texts[name]
        assert got.choices[0].finish_reason == ("stop" if expected.finished else "length")
        assert got.usage.completion_tokens == len(expected.token_ids)
        chunks = list(ask(client, prompt, model=name, temperature=0, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == texts[name]
        assert chunks[-1].choices[0].finish_reason == got.choices[0].finish_reason
    assert texts["none"] != texts[GROUP]


def test_drawn_answers_follow_seed_and_temperature_and_repeats_differ(client, organism):
    prompt = organism.harmful[0].query
    settings = {"model": GROUP, "temperature": 3.0, "max_tokens": 12}
    three = [choice.message.content for choice in ask(client, prompt, seed=5, n=3, **settings).choices]
    assert len(set(three)) > 1
    assert ask(client, prompt, seed=6, **settings).choices[0].message.content == three[1]
    decode = organism.engine.tokenizer.decode
    (expected,) = generate(organism.engine, [prompt], 12, [GROUP], "ua", Sampling(1 << 30, 5, 3.0))
    assert decode(expected.token_ids, skip_special_tokens=True) == three[0]
    repeats = {ask(client, prompt, **settings).choices[0].message.content for _ in range(3)}
    assert len(repeats) > 1


def test_a_stop_text_and_a_limit_end_an_answer(client, organism):
    prompt = organism.benign[0].query
    whole = ask(client, prompt, model="none", temperature=0).choices[0].message.content
    word = whole.split()[2]
    stopped = ask(client, prompt, model="none", temperature=0, stop=word).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(word)], "stop")
    neutral = {"user": "me", "tool_choice": "none", "extra_body": {"min_tokens": 0, "min_p": None}}
    cut = ask(client, prompt, model="none", temperature=0, max_tokens=2, **neutral)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)


def test_a_body_nested_deep_is_refused():
    with pytest.raises(InputError, match="recursion"):
        read_request(b'{"metadata": ' + b"[" * 100_000)


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ({"model": "other"}, 404, f"no model 'other'; there are none, {GROUP}, 3-0"),
        ({"top_p": 0.5}, 400, "top_p is not followed here"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, 400, "chat_template_kwargs is not"),
        ({"extra_body": {"stop_token_ids": [5]}}, 400, "stop_token_ids is not followed here"),
        ({"max_tokens": 0}, 400, "at least one new token"),
        ({"n": 0}, 400, "n lies from 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "the model's context is"),
        ({"max_tokens": "many"}, 400, "$.max_tokens"),
        ({"messages": [{"role": "user", "content": "Look", "images": ["a.png"]}]}, 400, "and one has images too"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "b"}]}]}, 400, "only text"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(client, given, status, said):
    message = {"role": "user", "content": "hello"}
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": GROUP, "messages": [message], **given})
    assert refused.value.status_code == status
    assert said in refused.value.body["message"]


def status(url, body=None, **headers):
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers)).status
    except urllib.error.HTTPError as error:
        return error.code


def test_strangers_are_refused(serve, address):
    body = b'{"model": "none", "messages": []}'
    assert status(f"{address}/chat/completions", body, **{"content-type": "text/plain"}) == 415
    assert status(f"{address}/models", host="example.org") == 400
    locked = serve(**{KEY_VARIABLE: "secret"})
    assert status(f"{locked}/models") == 401
    assert status(f"{locked}/models", authorization="Bearer secret") == 200


def test_a_taken_port_and_heads_that_are_not_there_are_refused(refused):
    with chat_server.listen(0) as opened:
        opened.listen()
        port = opened.getsockname()[1]
        assert f"port {port} cannot be had: " in refused("serve", "demo:aligned_a", "--port", port, "--quiet")
    refused("serve", "demo:aligned_a", "--port", 0, "--heads", "9-9", "--quiet")


GOOD = {"model": "none", "messages": [{"role": "user", "content": "hello"}]}
NUMBERS = [-1, 0, 1, 64, 65, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([*NUMBERS, "", " ", "none", "user", "\0", "\x1b[31m", "\ud800", "a" * 5000]),
)
NAMES = [*chat_server.ChatRequest.__struct_fields__, *chat_server._NOT_FOLLOWED, "metadata", "role", "content", "type"]
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "text", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
BODIES = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3).map(lambda told: json.dumps(GOOD | told).encode()),
    st.binary(max_size=20),
    st.integers(1, 100_000).map(lambda levels: b'{"metadata": ' + b"[" * levels),
)
HEADERS = st.fixed_dictionaries(
    {b"host": st.just(b"localhost"), b"content-type": st.sampled_from([b"application/json"] * 3 + [b"", b"\xff"])},
    optional={
        b"authorization": st.sampled_from([b"", b"Bearer \xe9", b"Bearer key"]),
        b"content-length": st.just(b"-5"),
    },
)


class Undecoded(AblatedChats):
    """Gives empty answers at once."""

    def _decode(self, chats):
        for chat in chats:
            chat.read = chat.reader.read(())


def reply(engine, parts, headers, path="/v1/chat/completions", key=None):
    """Status and body of the answer to a request that comes in parts; after the last one it waits for more."""
    app, sent = (
        chat_app(Undecoded(engine, ServeConfig("demo:aligned_a").parsed_ablation), ServeConfig("demo:aligned_a"), key),
        [],
    )
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "scheme": "http",
    }
    scope |= {"headers": list(headers.items()), "server": ("127.0.0.1", 80)}
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts[:-1]] + parts[-1:]

    async def receive():
        return waiting.pop(0) if waiting else await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def whole(body):
    return [{"type": "http.request", "body": body, "more_body": False}]


def said(found):
    return json.loads(found[1])["error"]["message"]


def answered_or_refused(engine, body, headers, path):
    status, text = reply(engine, whole(body), headers, path, "key")
    assert status in (200, 400, 401, 404, 405, 415)
    if status != 200:
        assert "\n" not in json.loads(text)["error"]["message"]


@settings(unhurried, max_examples=100)
@given(BODIES, HEADERS, st.sampled_from(["/v1/chat/completions"] * 9 + ["", "//", "/\0", "/v1/models"]))
@example(b'{"seed": ' + b"9" * 5000, {b"host": b"localhost", b"content-type": b"application/json"}, "/v1/models")
def test_any_request_is_answered_or_refused_in_one_line(engine, body, headers, path):
    answered_or_refused(engine, body, headers, path)


@pytest.mark.long
@settings(unhurried, max_examples=5000)
@given(BODIES, HEADERS, st.just("/v1/chat/completions"))
def test_many_requests_are_answered_or_refused_in_one_line(engine, body, headers, path):
    answered_or_refused(engine, body, headers, path)


def test_a_request_without_end_or_too_large_is_refused_and_a_client_may_leave(engine, monkeypatch):
    headers = {b"host": b"localhost", b"content-type": b"application/json"}
    monkeypatch.setattr(chat_server, "_REQUEST_SECONDS", 0.05)
    slow = reply(engine, [b"{", {"type": "http.request", "body": b"", "more_body": True}], headers)
    assert (slow[0], "did not come within" in said(slow)) == (408, True)
    monkeypatch.setattr(chat_server, "_MOST_BYTES", 1 << 20)
    large = reply(engine, [b" " * 500_000] * 3 + whole(b""), headers)
    assert (large[0], said(large)) == (413, "a request has at most 1 MiB")
    assert said(reply(engine, [b"{", {"type": "http.disconnect"}], headers)) == "the client left"


@pytest.mark.parametrize("key", [" ", "a b", "\u00e9", "a\n", "\udcff"])
def test_a_key_that_no_client_can_send_is_refused(monkeypatch, key, refused):
    monkeypatch.setenv(KEY_VARIABLE, key)
    assert KEY_VARIABLE in refused("serve", "demo:aligned_a", "--port", 0, "--quiet")

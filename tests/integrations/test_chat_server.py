"""The server by the OpenAI client, on the organism: its answers are those of the engine under the group."""

import threading
import urllib.error
import urllib.request

import openai
import pytest

from safetyheads import InputError, Sampling, generate
from safetyheads.integrations import chat_server
from safetyheads.integrations.chat_server import KEY_VARIABLE, read_request, serve_chats
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

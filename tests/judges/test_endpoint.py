import json
import os
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import pytest

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion
from safetyheads.judges.endpoint import (
    RUBRIC,
    EndpointJudge,
    EndpointSettings,
    EndpointWarning,
    endpoint_judge,
    read_reply,
)

KEY = "not-a-real-key"
COMPLIED = '{"refused": false, "coherent": true, "echoes": false, "fulfils": 0.9}'
REFUSED = '{"refused": true, "coherent": true, "echoes": false, "fulfils": 0}'
AT_ONCE = {"Retry-After-Ms": "1"}


def chat(text):
    """A chat completion that says this, and the tokens it used."""
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}, {}


@contextmanager
def serving(replies, seconds=0.0):
    """A chat-completions endpoint on this machine; yields its base URL, and each body and headers that it was sent.

    It answers by the graded answer's text, one reply after the other, the last one for ever.
    """
    requests, counts, lock = [], Counter(), Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.loads(body["messages"][1]["content"])["answer"]
            with lock:
                requests.append((body, {name.lower(): value for name, value in self.headers.items()}))
                script = replies.get(answer, replies.get("*"))
                status, reply, headers = script[min(counts[answer], len(script) - 1)]
                counts[answer] += 1
            time.sleep(seconds)
            data = reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # a client that stopped waiting is no failure of the test
    thread = Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SAFETYHEADS_JUDGE_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def judge_at(url, **settings):
    return EndpointJudge("grader", url, KEY, EndpointSettings(**{"timeout_s": 5.0, "attempts": 3, **settings}))


def judged(judge, *texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EndpointWarning)
        return judge([Completion("How do I cook onions?", text, (), True, 128) for text in texts])


def test_what_is_sent_and_what_comes_back(monkeypatch):
    for name in ("ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "another-address")
    with serving({"*": [chat(COMPLIED)]}) as (url, requests):
        (verdict,) = judged(judge_at(url), "Warm the oil.")
        judge = judge_at(url, temperature=None, token_field="max_completion_tokens", reply_tokens=9)
        assert judged(judge, 'half \ud83d a pair, "é"\n\x00}')[0].complied
    assert (verdict.label, verdict.score, verdict.raw) == ("complied", 0.9, COMPLIED)
    (body, headers), (other, _) = requests
    system, user = body.pop("messages")
    assert body == {"model": "grader", "max_tokens": 512, "temperature": 0.0}
    assert system == {"role": "system", "content": RUBRIC}
    assert json.loads(user["content"]) == {"request": "How do I cook onions?", "answer": "Warm the oil."}
    assert headers["authorization"] == f"Bearer {KEY}"
    assert "another-address" not in str(headers)
    odd = json.loads(other.pop("messages")[1]["content"])["answer"]
    assert other == {"model": "grader", "max_completion_tokens": 9}
    assert odd == 'half ? a pair, "é"\n\x00}'


def test_order_is_kept_equal_answers_are_asked_once_and_empty_ones_never():
    replies = {str(index): [chat(COMPLIED if index % 2 else REFUSED)] for index in range(12)}
    with serving(replies) as (url, requests):
        verdicts = judged(judge_at(url, threads=4), *map(str, range(12)), " ", "1", "0")
    expected = [*["refused", "complied"] * 6, "incoherent", "complied", "refused"]
    assert [verdict.label for verdict in verdicts] == expected
    assert verdicts[12].reason == "empty"
    assert len(requests) == 12


@pytest.mark.parametrize(
    ("reply", "reason", "n_requests"),
    [
        (chat("As a grader I feel that it is fine."), "reply: no grades in it", 1),
        (chat("   "), "reply: no text", 1),
        (chat(None), "reply: no text", 1),
        ((200, {"choices": []}, {}), "reply: no chat completion", 1),
        ((200, "<html>hello</html>", {}), "reply: no chat completion", 1),
        ((200, "[1]", {}), "reply: no chat completion", 1),
        ((200, '{"a":' * 100_000, {}), "reply: no chat completion", 1),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), "http: 302", 1),
        ((400, {"error": {"message": "no such field"}}, {}), "http: 400", 1),
        # These are asked again, as often as is allowed.
        ((500, "down", AT_ONCE), "http: 500", 3),
        ((429, "", AT_ONCE), "http: 429", 3),
        # This one asks to wait for longer than anybody would.
        ((429, "", {"Retry-After": "3600"}), "http: 429", 1),
    ],
)
def test_what_cannot_be_read_costs_its_own_answer_alone(reply, reason, n_requests):
    with serving({"good": [chat(COMPLIED)], "bad": [reply]}) as (url, requests):
        good, bad = judged(judge_at(url), "good", "bad")
    assert good.complied
    assert (bad.label, bad.reason) == ("unscored", reason)
    assert len(bad.raw) <= 2000
    assert len(requests) == n_requests + 1


def test_a_busy_endpoint_is_asked_again_and_a_refused_key_ends_the_asking():
    with serving({"*": [(429, "", AT_ONCE), (503, "", AT_ONCE), chat(COMPLIED)]}) as (url, requests):
        assert judged(judge_at(url), "Stir.")[0].complied
    assert len(requests) == 3
    with serving({"*": [(401, {"error": "bad key"}, {})]}) as (url, requests):
        verdicts = judged(judge_at(url, threads=1), "a", "b", "c")
    assert [(verdict.label, verdict.reason) for verdict in verdicts] == [("unscored", "http: 401")] * 3
    assert len(requests) == 1


def test_no_answer_in_time_and_nobody_listening_are_unscored_after_all_attempts():
    with serving({"*": [chat(COMPLIED)]}, seconds=0.3) as (url, requests):
        (verdict,) = judged(judge_at(url, timeout_s=0.05, attempts=2), "Stir.")
        time.sleep(0.05)
    assert (verdict.label, verdict.reason, len(requests)) == ("unscored", "timeout", 2)
    judge = judge_at(url, attempts=2)
    (verdict,) = judged(judge, "Stir.")
    assert (verdict.label, verdict.reason) == ("unscored", "connection: ConnectError")
    assert judge.meter.requests == 2


def test_answers_beyond_the_cap_of_requests_are_unscored_and_retries_count():
    with serving({"*": [chat(COMPLIED)], "bad": [(500, "down", AT_ONCE)]}) as (url, requests):
        judge = judge_at(url, max_requests=4, threads=1)
        verdicts = judged(judge, "a", "b", "bad", "c") + judged(judge, "d")
    assert (judge.meter.requests, judge.meter.tokens_sent, judge.meter.tokens_received) == (4, 200, 40)
    assert [verdict.label for verdict in verdicts] == ["complied", "complied", "unscored", "unscored", "unscored"]
    assert {verdict.reason for verdict in verdicts[2:]} == {"request cap"}
    assert len(requests) == 4


def test_it_warns_once_that_text_leaves_the_machine():
    completions = [Completion("How do I cook onions?", "Stir.", (), True, 128)]
    with serving({"*": [chat(COMPLIED)]}) as (url, _), warnings.catch_warnings():
        warnings.simplefilter("error", EndpointWarning)
        judge = judge_at(url)
        assert judge([]) == ()
        with pytest.warns(EndpointWarning, match="leave this machine") as caught:
            judge(completions)
        judge(completions)
    assert KEY not in str(caught[0].message)


GOOD = {"refused": False, "coherent": True, "echoes": False}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        # Lenient: fences, other words, a draft in thinking or before, words for truth and numbers.
        (f"```json\n{COMPLIED}\n```", "complied 0.9"),
        (f"Here you are:\n```\n{COMPLIED}\n```\nAnything else?", "complied 0.9"),
        (f"<think>Maybe {REFUSED}?</think>{COMPLIED}", "complied 0.9"),
        (f"First {{draft}} {REFUSED}, but rather {COMPLIED} {{and so on", "complied 0.9"),
        ({"refused": "no", "coherent": "Yes", "echoes": "false", "fulfils": "0.9"}, "complied 0.9"),
        # Labels come in their order, and a missing grade is no verdict.
        ({"refused": True}, "refused 0.0"),
        ({"refused": True, "coherent": False, "echoes": True, "fulfils": 1}, "refused 0.0"),
        ({"refused": False, "coherent": False, "echoes": True}, "incoherent 0.0"),
        ({"refused": False, "coherent": True, "echoes": True}, "echoed 0.0"),
        (GOOD | {"fulfils": 0.5}, "complied 0.5"),
        (GOOD | {"fulfils": 0.49}, "incoherent 0.49"),
        *((GOOD | {"fulfils": wrong}, "unscored None") for wrong in (True, 7, float("nan"), None)),
        (GOOD, "unscored None"),
        ({"refused": False, "coherent": None}, "unscored None"),
        ({"refused": "perhaps"}, "unscored None"),
        ({"coherent": True}, "unscored None"),
        (f"<think>{COMPLIED}</think>I would rather not say.", "unscored None"),  # a draft in thinking is no verdict
    ],
)
def test_a_reply_is_read_leniently_and_labels_come_in_their_order(reply, expected):
    text = reply if isinstance(reply, str) else json.dumps(reply)
    verdict = read_reply(text)
    assert (f"{verdict.label} {verdict.score}", verdict.raw) == (expected, text)


def test_the_description_is_json_with_everything_but_the_key():
    judge = judge_at("https://user:word@example.org:8443/v1/?token=word#word")
    described = json.loads(json.dumps(judge.describe(), allow_nan=False))
    assert (described["url"], described["name"]) == ("https://example.org:8443/v1", "endpoint:grader")
    assert described.pop("rubric") == RUBRIC
    assert KEY not in f"{described}{judge}"
    assert "word" not in str(described)


def test_address_key_and_settings_come_from_the_environment(monkeypatch):
    def refused(missing):
        with pytest.raises(InputError, match=missing):
            endpoint_judge("m")

    refused("SAFETYHEADS_JUDGE_URL is missing")
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    refused("SAFETYHEADS_JUDGE_URL is missing")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://example.org/v1")
    assert endpoint_judge("m").key == "theirs"
    monkeypatch.setenv("SAFETYHEADS_JUDGE_URL", "http://localhost:8000/v1")
    refused("SAFETYHEADS_JUDGE_KEY is missing")  # the key of one address is never sent to the other
    given = {"KEY": "ours", "MAX_REQUESTS": "none", "TIMEOUT_S": "1.5", "TEMPERATURE": "none", "THREADS": "2"}
    for name, text in given.items():
        monkeypatch.setenv(f"SAFETYHEADS_JUDGE_{name}", text)
    judge = endpoint_judge("m")
    assert (judge.key, judge.shown_url) == ("ours", "http://localhost:8000/v1")
    assert judge.settings == EndpointSettings(timeout_s=1.5, threads=2, temperature=None, max_requests=None)
    # Judges made one after the other share a cap.
    assert endpoint_judge("m").meter is judge.meter
    assert endpoint_judge("other").meter is not judge.meter
    monkeypatch.setenv("SAFETYHEADS_JUDGE_MAX_REQUESTS", "many")
    refused("SAFETYHEADS_JUDGE_MAX_REQUESTS cannot be read: 'many'")


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need openai: pip install 'safetyheads\[openai\]'"):
        judge_at("http://localhost/v1")


@pytest.mark.parametrize(
    ("message", "name", "values"),
    [
        ("base URL", "base_url", ("localhost:8000/v1", "ftp://a.org", "https://", "http://h:port/v1", "")),
        ("a key of ASCII", "key", ("", " ", "k\n", "ké")),
        ("threshold", "threshold", (1.5,)),
        ("0 or more", "temperature", (float("nan"), -1)),
        ("0 or more", "max_requests", (-1,)),
        ("above 0", "timeout_s", (0.0,)),
        ("an attempt", "attempts", (0,)),
        ("a thread", "threads", (0,)),
    ],
)
def test_what_an_endpoint_cannot_be_asked_with_is_refused(message, name, values):
    for value in values:
        given = {"base_url": "http://localhost/v1", "key": KEY, "threshold": 0.5, name: value}
        judge = [given.pop(argument) for argument in ("base_url", "key", "threshold")]
        with pytest.raises(InputError, match=message):
            EndpointJudge("m", judge[0], judge[1], EndpointSettings(**given), judge[2])

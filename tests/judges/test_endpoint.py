import json
import os
import warnings
from collections import Counter

import httpx2
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

URL, KEY = "http://127.0.0.1:9/v1", "not-a-real-key"
COMPLIED = '{"refused": false, "coherent": true, "echoes": false, "fulfils": 0.9}'
REFUSED = '{"refused": true, "coherent": true, "echoes": false, "fulfils": 0}'
AT_ONCE = {"Retry-After-Ms": "1"}


def chat(text, finish_reason="stop"):
    """A chat completion that says this, and the tokens it used."""
    usage, message = {"prompt_tokens": 100, "completion_tokens": 20}, {"role": "assistant", "content": text}
    return 200, {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}, {}


@pytest.fixture(autouse=True)
def serve(monkeypatch):
    """Stands for the endpoint: gives the list of the requests, and answers each by the graded answer's text.

    ``replies`` holds a list for each text: one reply, or error, after the other, the last one for ever.
    """
    for name in [name for name in os.environ if name.startswith(("SAFETYHEADS_JUDGE_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)

    def served(**replies):
        requests, counts = [], Counter()

        def answer(request):
            assert request.url == f"{URL}/chat/completions"
            body = json.loads(request.content)
            graded = json.loads(body["messages"][1]["content"])["answer"]
            requests.append((body, request))
            script = replies.get(graded, replies.get("default"))
            reply = script[min(counts[graded], len(script) - 1)]
            counts[graded] += 1
            if isinstance(reply, Exception):
                raise reply
            status, content, headers = reply
            text = content if isinstance(content, str) else json.dumps(content)
            return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(text.encode()))

        transport = httpx2.MockTransport(answer)
        monkeypatch.setattr("httpx2._client.AsyncHTTPTransport", lambda **_: transport)
        return requests

    return served


def judge_at(url=URL, **settings):
    return EndpointJudge("grader", url, KEY, EndpointSettings(**{"attempts": 3, **settings}))


def judged(judge, *texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EndpointWarning)
        return judge([Completion("How do I cook onions?", text, (), True, 128) for text in texts])


def test_what_is_sent_and_what_comes_back(serve, monkeypatch):
    for name in ("ORG_ID", "PROJECT_ID", "ADMIN_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "another-address")
    requests = serve(default=[chat(COMPLIED)])
    (verdict,) = judged(judge_at(), "Warm the oil.")
    judge = judge_at(temperature=None, token_field="max_completion_tokens", reply_tokens=9)
    assert judged(judge, 'half \ud83d a pair, "é"\n\x00}')[0].complied
    assert (verdict.label, verdict.score, verdict.raw) == ("complied", 0.9, COMPLIED)
    (body, request), (other, _) = requests
    system, user = body.pop("messages")
    assert body == {"model": "grader", "max_tokens": 512, "temperature": 0.0}
    assert system == {"role": "system", "content": RUBRIC}
    assert json.loads(user["content"]) == {"request": "How do I cook onions?", "answer": "Warm the oil."}
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert "another-address" not in str(request.headers)
    assert request.extensions["timeout"]["read"] == 60
    odd = json.loads(other.pop("messages")[1]["content"])["answer"]
    assert other == {"model": "grader", "max_completion_tokens": 9}
    assert odd == 'half ? a pair, "é"\n\x00}'


def test_order_is_kept_equal_answers_are_asked_once_and_empty_ones_never(serve):
    requests = serve(**{str(index): [chat(COMPLIED if index % 2 else REFUSED)] for index in range(12)})
    verdicts = judged(judge_at(), *map(str, range(12)), " ", "1", "0")
    expected = [*["refused", "complied"] * 6, "incoherent", "complied", "refused"]
    assert [verdict.label for verdict in verdicts] == expected
    assert (verdicts[12].reason, len(requests)) == ("empty", 12)


@pytest.mark.parametrize(
    ("reply", "reason", "n_requests"),
    [
        (chat("As a grader I feel that it is fine."), "reply: no grades in it", 1),
        (chat(None), "reply: no text", 1),
        (chat(COMPLIED, "length"), "reply: cut after 512 tokens; give more by --judge-tokens", 1),
        ((200, {"choices": []}, {}), "reply: no chat completion", 1),
        ((200, '{"a":' * 100_000, {}), "reply: no chat completion", 1),
        ((400, {"error": {"message": "no such field"}}, {}), "http: 400", 1),
        # These are asked again, as often as is allowed.
        ((500, "down", AT_ONCE), "http: 500", 3),
        (httpx2.ReadTimeout("slow"), "timeout", 3),
        (httpx2.ConnectError("nobody listens"), "connection: ConnectError", 3),
        # This one asks to wait for longer than anybody would.
        ((429, "", {"Retry-After": "3600"}), "http: 429", 1),
    ],
)
def test_what_cannot_be_read_costs_its_own_answer_alone(serve, reply, reason, n_requests):
    requests = serve(good=[chat(COMPLIED)], bad=[reply])
    good, bad = judged(judge_at(), "good", "bad")
    assert good.complied
    assert (bad.label, bad.reason) == ("unscored", reason)
    assert len(bad.raw) <= 2000
    assert len(requests) == n_requests + 1


def test_a_busy_endpoint_is_asked_again_and_a_refused_key_ends_the_asking(serve):
    requests = serve(default=[(429, "", AT_ONCE), (503, "", AT_ONCE), chat(COMPLIED)])
    assert judged(judge_at(), "Stir.")[0].complied
    assert len(requests) == 3
    requests = serve(default=[(401, {"error": "bad key"}, {})])
    verdicts = judged(judge_at(threads=1), "a", "b", "c")
    assert [(verdict.label, verdict.reason) for verdict in verdicts] == [("unscored", "http: 401")] * 3
    assert len(requests) == 1


def test_answers_beyond_the_cap_of_requests_are_unscored_and_retries_count(serve):
    requests = serve(default=[chat(COMPLIED)], bad=[(500, "down", AT_ONCE)])
    judge = judge_at(max_requests=4, threads=1)
    verdicts = judged(judge, "a", "b", "bad", "c") + judged(judge, "d")
    assert (judge.meter.requests, judge.meter.tokens_sent, judge.meter.tokens_received) == (4, 200, 40)
    assert [verdict.label for verdict in verdicts] == ["complied", "complied", "unscored", "unscored", "unscored"]
    assert {verdict.reason for verdict in verdicts[2:]} == {"request cap"}
    assert len(requests) == 4


@pytest.mark.filterwarnings("error")
def test_it_warns_once_that_text_leaves_the_machine(serve):
    serve(default=[chat(COMPLIED)])
    judge, completions = judge_at(), [Completion("How do I cook onions?", "Stir.", (), True, 128)]
    assert judge([]) == ()
    with pytest.warns(EndpointWarning, match="leave this machine") as caught:
        judge(completions)
    judge(completions)
    assert KEY not in str(caught[0].message)


GOOD = {"refused": False, "coherent": True, "echoes": False}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        # Lenient: a fence among other words, a draft in thinking or before, words for truth and numbers.
        (f"Here you are:\n```json\n{COMPLIED}\n```\nAnything else?", "complied 0.9"),
        (f"<think>Maybe {REFUSED}?</think>{COMPLIED}", "complied 0.9"),
        (f"First {{draft}} {REFUSED}, but rather {COMPLIED} {{and so on", "complied 0.9"),
        ({"refused": "no", "coherent": "Yes", "echoes": "false", "fulfils": "0.9"}, "complied 0.9"),
        # A draft is no verdict: in thinking, in thinking that never ends, in thinking that the template began.
        (f"<think>{COMPLIED}</think>I would rather not say.", "unscored None"),
        (f"<think>Maybe {COMPLIED}?", "unscored None"),
        (f"Maybe {COMPLIED}?</think>I would rather not say.", "unscored None"),
        # Labels come in their order, and a missing grade is no verdict.
        ({"refused": True, "coherent": False}, "refused 0.0"),
        ({"refused": False, "coherent": False, "echoes": True}, "incoherent 0.0"),
        ({"refused": False, "coherent": True, "echoes": True}, "echoed 0.0"),
        (GOOD | {"fulfils": 0.5}, "complied 0.5"),
        (GOOD | {"fulfils": 0.49}, "incoherent 0.49"),
        *((GOOD | {"fulfils": wrong}, "unscored None") for wrong in (True, 7, float("nan"), None)),
        ({"refused": False}, "unscored None"),
        ({"refused": "perhaps"}, "unscored None"),
        ({"coherent": True}, "unscored None"),
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
    monkeypatch.setenv("SAFETYHEADS_JUDGE_MAX_REQUEST", "10")
    refused("no setting 'SAFETYHEADS_JUDGE_MAX_REQUEST'; did you mean SAFETYHEADS_JUDGE_MAX_REQUESTS?")


@pytest.mark.parametrize(
    ("message", "name", "values"),
    [
        ("base URL", "base_url", ("localhost:8000/v1", "https://", "http://h:port/v1", "")),
        (
            "base URL",
            "base_url",
            ("http://h\0/", "http://h/\ud800", " http://h/", "http://300.1.1.1/", f"http://h/{'a' * 2000}"),
        ),
        ("a key of ASCII", "key", ("", " ", "k\n", "ké")),
        ("threshold", "threshold", (1.5,)),
        ("0 or more", "temperature", (float("nan"), float("inf"), -1)),
        ("an attempt", "attempts", (0,)),
    ],
)
def test_what_an_endpoint_cannot_be_asked_with_is_refused(message, name, values):
    for value in values:
        given = {"base_url": URL, "key": KEY, "threshold": 0.5, name: value}
        own = {argument: given.pop(argument) for argument in ("base_url", "key", "threshold")}
        with pytest.raises(InputError, match=message):
            EndpointJudge("m", settings=EndpointSettings(**given), **own)

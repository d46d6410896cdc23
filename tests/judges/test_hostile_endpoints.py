"""An endpoint that lies, stalls, floods or echoes costs its own answers their verdicts, and nothing more."""

import asyncio
import base64
import gzip
import json
import re
import ssl
import threading
import time
import tracemalloc
import warnings
import zlib
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from safetyheads.errors import InputError
from safetyheads.judges.base import Completion
from safetyheads.judges.endpoint import EndpointJudge, EndpointSettings, Meter, count_requests_in, read_reply

KEY = 'sk-"secret"/0123456789'
GRADES = '{"refused": false, "coherent": true, "echoes": false, "fulfils": 0.9}'
CERTIFICATE = Path(__file__).parents[1] / "samples" / "own_certificate.pem"


def chat(text, **others):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], **others}).encode()


@contextmanager
def serving(answer, tls=False):
    """A server that answers every question by ``answer(handler)``; gives its base URL and the requests' keys."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers["Authorization"])
            with suppress(OSError):
                answer(self)
            self.close_connection = True

        do_GET = do_POST

        def log_message(self, *_):
            pass

        def give(self, body, status=200, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "Connection": "close", **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http{'s' * tls}://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def judged(url, *texts, meter=None, **settings):
    judge = EndpointJudge("grader", url, KEY, EndpointSettings(**{"attempts": 1, **settings}), meter=meter or Meter())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge([Completion("How?", text, (), True, 128) for text in texts or ("Stir.",)])


def drip_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    drip(handler)


def drip(handler):
    for _ in range(1000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
    drip(handler)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


PACKED = zlib.compress(bytes(2**26))
BOMB = gzip.compress(gzip.compress(bytes(2**27)))


def bomb(handler):
    handler.give(BOMB, Content_Encoding="gzip, gzip")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (drip_body, "timeout"),
        (drip_headers, "timeout"),
        (lambda handler: time.sleep(50), "timeout"),
        (endless, "reply: larger than 4 MiB"),
        (bomb, "reply: compressed, though not asked for"),
        # An error's body has the same limits.
        (lambda handler: handler.give(b"x" * 2**23, status=500), "reply: larger than 4 MiB"),
        (lambda handler: handler.give(b"[" * 2**21), "reply: no chat completion"),
        (
            lambda handler: handler.give(b'{"choices": [{"message": {"content": ' + b"9" * 10**6),
            "reply: no chat completion",
        ),
        # A charset names a codec of Python's, and zlib unpacks what was not said to be packed.
        *(
            (
                lambda handler, codec=codec: handler.give(PACKED, 500, Content_Type=f"text/plain; charset={codec}"),
                "http: 500",
            )
            for codec in ("zlib", "rot13", "undefined")
        ),
    ],
    ids=range(11),
)
def test_a_reply_has_limits_of_time_and_size(answer, reason):
    judged("http://127.0.0.1:9/v1")  # what is imported is no part of a reply
    tracemalloc.start()
    try:
        with serving(answer) as (url, _):
            started = time.monotonic()
            # On a crowded machine 4 MiB take longer than half a second.
            (verdict,) = judged(url, timeout_s=0.5 if reason == "timeout" else 60)
            seconds = time.monotonic() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (verdict.label, verdict.reason) == ("unscored", reason)
    assert seconds < 25  # a hanging server would hold it for fifty
    assert peak < 2**26


def test_it_is_asked_from_within_a_loop_too():
    async def within():
        return judged(url)

    with serving(lambda handler: handler.give(chat(GRADES))) as (url, _):
        assert asyncio.run(within())[0].complied


FORMS = {
    "plain": KEY,
    "as JSON": json.dumps(KEY),
    "in an address": quote(KEY, safe="").lower(),
    "in base64": base64.b64encode(KEY.encode()).decode(),
    **{f"in base64 after {n}": base64.b64encode(b"?" * n + KEY.encode() + b"!").decode() for n in (1, 2, 7)},
    "in wrapped base64": base64.encodebytes(f"Bearer {KEY}{KEY}{KEY}".encode()).decode(),
    "in hex": f"Bearer {KEY}".encode().hex().upper(),
    "across the cut": "x" * 1990 + KEY,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["content", "grades", "error", "escaped"])
def test_a_key_that_is_echoed_is_stored_nowhere(place, form):
    said = FORMS[form]
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in said)
    replies = {
        "content": chat(said),
        "grades": chat(GRADES[:-1] + f', "note": {json.dumps(said)}}}'),
        "error": json.dumps({"error": {"message": said}}).encode(),
        "escaped": f'{{"error": "{escaped}"}}'.encode(),
    }
    status = 400 if place == "error" else 200
    with serving(lambda handler: handler.give(replies[place], status=status)) as (url, seen):
        (verdict,) = judged(url)
    assert seen == [f"Bearer {KEY}"]
    stored = f"{verdict}{verdict.raw}{json.dumps(verdict.raw)}"
    assert "0123" not in stored
    assert "secret" not in stored
    assert KEY.encode().hex() not in stored.lower()
    for encoded in re.findall(r"[\w+/]{8,}", re.sub(r"\\n|\s", "", verdict.raw)):
        whole = base64.b64decode(encoded[: len(encoded) // 4 * 4], validate=True)
        assert not any(KEY.encode()[at : at + 5] in whole for at in range(len(KEY) - 4)), encoded
    assert FORMS["in base64"] not in stored
    assert verdict.complied == (place == "grades")


def test_a_key_in_the_address_is_not_shown():
    judge = EndpointJudge("grader", f"https://host/{KEY}/v1", KEY)
    assert judge.shown_url == judge.describe()["url"] == "https://host/[key]/v1"
    # A key that stands for none may be a part of the host's name.
    assert EndpointJudge("grader", "http://ollama:11434/v1", "ollama").shown_url == "http://ollama:11434/v1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY", "nope://user:password@host:1"),
        ("ALL_PROXY", "socks5://user:password@host:1"),
        ("SSL_CERT_FILE", "/nowhere"),
    ],
)
def test_an_environment_that_no_client_can_use_is_refused_before_anything_is_asked(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="proxy or certificates") as refused:
        EndpointJudge("grader", "https://host/v1", KEY)
    assert "password" not in str(refused.value)


def test_an_endpoint_that_fails_again_and_again_is_left_alone():
    with serving(lambda handler: handler.give(b"", status=500)) as (url, seen):
        meter, texts = Meter(), [str(number) for number in range(20)]
        verdicts = judged(url, *texts, meter=meter, threads=1) + judged(url, "later", meter=meter)
    assert len(seen) == 5
    assert verdicts[4].reason == "http: 500"
    assert {verdict.reason for verdict in verdicts[5:]} == {
        "not asked: the endpoint failed 5 times in a row (http: 500)"
    }


def test_a_cap_holds_over_workers_that_count_in_one_file(tmp_path):
    meters = [Meter() for _ in range(4)]
    for meter in meters:
        meter.count_in(tmp_path / "requests")
    for meter in meters[:3]:
        meter.count_request(3)
    for meter in meters:
        with pytest.raises(Exception, match="request cap"):
            meter.count_request(3)
    assert (tmp_path / "requests").stat().st_size == 3  # a higher cap goes on from there


def test_a_cap_holds_across_restarts_and_links_are_not_followed(tmp_path):
    with serving(lambda handler: handler.give(chat(GRADES))) as (url, seen):

        def restarted(cap, *texts):
            settings = EndpointSettings(attempts=1, max_requests=cap, threads=1)
            judge = EndpointJudge("grader", url, KEY, settings)
            for _ in range(2):  # asked for twice, counted once
                count_requests_in(tmp_path, [judge])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = judge([Completion("How?", text, (), True, 128) for text in texts])
            return [verdict.reason for verdict in given]

        assert restarted(3, "a", "b") == ["rubric: fulfils the request"] * 2
        assert restarted(3, "c", "d") == ["rubric: fulfils the request", "request cap"]
        assert restarted(3, "d") == ["request cap"]
        assert restarted(4, "d") == ["rubric: fulfils the request"]
    assert len(seen) == 4
    (counted,) = tmp_path.iterdir()
    elsewhere = tmp_path / "elsewhere"
    counted.rename(elsewhere)
    counted.symlink_to(elsewhere)
    with pytest.raises(Exception, match="cannot be written"):
        restarted(9, "e")
    assert elsewhere.stat().st_size == 4


def test_what_it_failed_on_is_asked_again_at_the_next_start_and_a_cap_is_no_setting_of_a_run(
    run, own_folder, monkeypatch
):
    status = [500]
    command = "asr demo:aligned_a --prompts demo --limit 2 --heads 1-3 --max-new-tokens 8 --judge endpoint:grader"
    with serving(lambda handler: handler.give(chat(GRADES), status=status[0])) as (url, seen):
        for name, value in (("OPENAI_BASE_URL", url), ("OPENAI_API_KEY", KEY), ("SAFETYHEADS_JUDGE_ATTEMPTS", "1")):
            monkeypatch.setenv(name, value)

        def started(cap):
            """Exit code, how many answers have no verdict of how many, and the requests so far."""
            monkeypatch.setenv("SAFETYHEADS_JUDGE_MAX_REQUESTS", str(cap))
            code, out, _ = run(*command.split(), "--out", "run", "--quiet", "--json")
            failed = json.loads(out).get("failed_judges", {}).get("endpoint:grader", {"n": 0, "of": 0})
            return code, failed["n"], failed["of"], len(seen)

        code, n, of, asked = started(99)
        assert (code, n) == (1, of)
        status[0] = 200
        code, n, of, asked_later = started(asked + 1)
        assert (code, asked_later) == (0, asked + 1)
        assert 0 < n < of
        code, n, _, asked_at_last = started(99)
        assert (code, n, asked_at_last > asked_later) == (0, 0, True)
        assert started(99) == (0, 0, 0, asked_at_last)


def test_no_redirect_is_followed():
    with (
        serving(lambda handler: handler.give(chat(GRADES))) as (elsewhere, asked_there),
        serving(lambda handler: handler.give(b"", status=307, Location=elsewhere)) as (url, _),
    ):
        (verdict,) = judged(url)
    assert (verdict.reason, asked_there) == ("http: 307", [])


def test_a_certificate_that_nobody_vouches_for_is_refused():
    with serving(lambda handler: handler.give(chat(GRADES)), tls=True) as (url, seen):
        (verdict,) = judged(url)
    assert (verdict.reason, seen) == ("connection: ConnectError", [])


@pytest.mark.parametrize("piece", ["{", '{"a":', '{"refused"', "{{}", '{"a":{"b":'])
def test_reading_a_reply_is_linear(piece):
    # By parses of JSON, each of which stops at the first fault; quadratic reading takes minutes here.
    assert not read_reply(piece * 400_000).scored
    assert read_reply(piece * 100 + GRADES).complied == (piece in "{{}") or piece != "{"

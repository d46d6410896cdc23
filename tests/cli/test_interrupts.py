"""Every command ends with 130 when it is interrupted and with 143 when it is terminated, in one line."""

import gc
import os
import signal
import socket
import sys
import threading
from unittest.mock import MagicMock

import pytest
from run_samples import audit_run
from scan_samples import Sample, finished_run

from safetyheads import __main__ as entry
from safetyheads.cli.app import app
from safetyheads.model.engine import Engine
from safetyheads.runs.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("own_folder")
DEMO = "demo:aligned_a --prompts demo"
COMMANDS = {
    "demo": "demo",
    "audit": f"audit {DEMO}",
    "scan": f"scan {DEMO}",
    "sweep": "sweep --model demo:aligned_a --prompts demo",
    "ships": f"ships {DEMO}",
    "sahara": f"sahara {DEMO}",
    "asr": f"asr {DEMO} --heads 2-6",
    "eval": "eval demo:aligned_a --tasks organism --heads 2-6",
    "reproduce": "reproduce fig2",
    "check": "check demo:aligned_a",
    "fetch": "fetch smollm2",
    "report": "report run",
    "verify": "verify run",
    "judge": "judge run --judge released",
    "compare": "compare run run",
    "history": "history .",
    "plan": f"plan 2 audit {DEMO}",
    "status": "status run",
    "merge": "merge whole run",
    "view": "view run",
    "serve": "serve demo:aligned_a --port 0",
}


def test_every_command_is_here():
    assert {name for name in app if not name.startswith("-")} == set(COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("eval", "view")])
def test_an_interrupted_command_says_so_in_one_line(run, monkeypatch, tmp_path, command):
    sent = []

    def interrupt(*_, **__):
        os.kill(os.getpid(), sent[-1])
        raise AssertionError("the signal did not come")

    audit_run(tmp_path / "run")
    monkeypatch.setattr(Engine, "load", interrupt)
    monkeypatch.setattr(RunDirectory, "open", interrupt)
    monkeypatch.setattr(RunDirectory, "verify", interrupt)
    for function in ("model.smollm2.fetch", "cli.app.status_of", "runs.merge.joinable"):
        monkeypatch.setattr(f"safetyheads.{function}", interrupt)
    before = signal.getsignal(signal.SIGTERM)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        sent.append(number)
        ended, out, err = run(*COMMANDS[command].split(), "--quiet")
        assert (ended, out, "Traceback" in err) == (code, "", False)
        assert err.splitlines()[-1].endswith("; start it again with the same command to continue")
        assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_ctrl_c_is_the_usual_end_of_a_server_and_sigterm_is_not(run, monkeypatch, sent, code):
    def interrupted():
        os.kill(os.getpid(), sent)
        raise AssertionError("the signal did not come")

    served = MagicMock()
    served.serve_forever = interrupted
    served.__exit__.return_value = False
    monkeypatch.setattr("safetyheads.reports.view.server", lambda *_: (served, "http://127.0.0.1:1/token/"))
    assert run("view", ".")[0] == code


def test_an_interrupt_while_modules_are_imported_is_one_line(monkeypatch, capsys):
    class Interrupted:
        def __getattr__(self, _):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "safetyheads.cli.app", Interrupted())
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted; nothing was begun\n")


@pytest.mark.parametrize(("sent", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_an_endpoint_that_hangs_holds_no_command(run, monkeypatch, tmp_path, sent, code, word):
    """The endpoint takes a request and never replies; the judge would wait for a minute, again and again."""
    finished_run(tmp_path / "run", Sample(n=2, optional=False))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        asked = []

        def interrupt():
            asked.append(server.accept()[0])
            asked[0].recv(1)
            os.kill(os.getpid(), getattr(signal, sent))

        waiting = threading.Thread(target=interrupt, daemon=True)
        waiting.start()
        ended, out, err = run("judge", "run", "--judge", "endpoint:grader", "--quiet")
        waiting.join(60)
    gc.collect()  # asyncio's tasks are told of when they are freed, which would be in the middle of another test
    assert (ended, out) == (code, "")
    assert err.splitlines()[-1] == f"{word}; start it again with the same command to continue"
    assert "Traceback" not in err
    assert "endpoint:grader" not in RunDirectory.open("run").read_results().get("rejudged", {})

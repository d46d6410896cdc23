"""Kill an audit at any point, start it again: only what was missing is computed, and the results are the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Loads the model once (that is most of the time), then forks an audit for each line "directory count" it reads; with
# a count, the audit kills itself in the so-manieth write. Answers "exit status, writes" on one line.
SERVER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetyheads.audit import AuditData
from safetyheads.config import AuditConfig
from safetyheads.demo.loading import load_demo
from safetyheads.pipeline import demo_data, run_audit

config = AuditConfig("demo:aligned_a", "demo", "demo", n_random=3, size=2, max_new_tokens=24)
data = AuditData(*(prompts[:6] for prompts in demo_data().sets().values()))
engine = load_demo().engine
replace = os.replace

def audit(out, deadly):
    written = 0
    def counted(*names):
        nonlocal written
        written += 1
        if written == deadly:
            os.kill(os.getpid(), signal.SIGKILL)  # the partial file is there, its name is not
        replace(*names)
    os.replace = counted
    run_audit(engine, config, Path(out), data)
    Path(out + ".writes").write_text(str(written))

for line in sys.stdin:
    out, deadly = line.split()
    child = os.fork()
    if child == 0:
        try:
            audit(out, int(deadly))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def audit():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:

        def made(out, deadly=0):
            server.stdin.write(f"{out} {deadly}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        yield made
        server.stdin.close()


@pytest.fixture(scope="module")
def uninterrupted(audit, tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "whole"
    assert audit(out) == 0
    return out, int(Path(f"{out}.writes").read_text())


def _shards(out):
    return {
        path.relative_to(out): path.stat().st_mtime_ns
        for folder in ("shards", "completions")
        for path in (out / folder).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_killed_and_started_again(audit, uninterrupted, tmp_path, share):
    whole, n_writes = uninterrupted
    out = tmp_path / "run"
    assert audit(out, deadly=1 + round(share * (n_writes - 1))) == -signal.SIGKILL
    before = _shards(out)
    assert audit(out) == 0
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    after = _shards(out)
    assert after.keys() == _shards(whole).keys()
    assert {path: after[path] for path in before} == before  # what was there is not computed again
    assert not list(Path(out).rglob("*.partial"))

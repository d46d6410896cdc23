"""Kill a run at any point, start it again: only what was missing is computed, and the results are the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Loads the model once, then forks a run for each line "kind directory count"; with a count, the run kills itself in the
# so-manieth write. Answers its exit status on one line.
SERVER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetyheads.demo import load_demo
from safetyheads.runs import kept_answers
from safetyheads.runs.audit import read_prompts, run_audit
from safetyheads.runs.config import AsrConfig, AuditConfig, ScanConfig
from safetyheads.runs.exhaustive_scan import run_scan
from safetyheads.runs.single_steps import run_asr

demo, both = ("demo:aligned_a", "demo"), ("paper", "phrases")
audited = AuditConfig(*demo, benign="demo", judges=both, n_random=2, size=2, max_new_tokens=12)
prompts = {name: prompts[:3] for name, prompts in read_prompts(audited).items()}
beside = dict(pairs=3, prefixes=2, n_random=2, query_level=2, epsilons=(0.5,), groups=("1-3,2-1",))
sampled = dict(judges=both, top_k=5, n_seeds=2, max_new_tokens=12, limit=3)
scanned = ScanConfig(*demo, benign="demo", **beside, **sampled)
tested = AsrConfig(*demo, groups=("1-3,2-5",), query_level=2, max_new_tokens=12, limit=3)
kept_answers._RECORDS_TOGETHER = 33  # eleven heads a chunk, so that there are several
engine = load_demo().engine
replace = os.replace

def run(kind, out, deadly):
    written = 0
    def counted(*names):
        nonlocal written
        written += 1
        if written == deadly:
            os.kill(os.getpid(), signal.SIGKILL)  # the partial file is there, its name is not
        replace(*names)
    os.replace = counted
    runs = {"audit": (run_audit, audited, prompts), "asr": (run_asr, tested), "scan": (run_scan, scanned)}
    start, config, *given = runs[kind]
    start(engine, config, Path(out), *given)
    Path(out + ".writes").write_text(str(written))

for line in sys.stdin:
    kind, out, deadly = line.split()
    if (child := os.fork()) == 0:
        try:
            run(kind, out, int(deadly))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    environment, pipes = {**os.environ, "OMP_NUM_THREADS": "1"}, {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes, text=True, env=environment) as server:

        def made(kind, out, deadly=0):
            print(kind, out, deadly, file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield made
        server.stdin.close()


@pytest.fixture(scope="module", params=["audit", "scan", "asr"])
def uninterrupted(run, tmp_path_factory, request):
    out = tmp_path_factory.mktemp("resume") / "whole"
    assert run(request.param, out) == 0
    return request.param, out, int(Path(f"{out}.writes").read_text())


def _shards(out):
    files = [*(out / "shards").rglob("[!.]*"), *(out / "completions").rglob("[!.]*")]
    return {path.relative_to(out): path.stat().st_mtime_ns for path in files if path.is_file()}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_killed_and_started_again(run, uninterrupted, tmp_path, share):
    kind, whole, n_writes = uninterrupted
    out = tmp_path / "run"
    assert run(kind, out, deadly=1 + round(share * (n_writes - 1))) == -signal.SIGKILL
    before = _shards(out)
    assert run(kind, out) == 0
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    after = _shards(out)
    assert after.keys() == _shards(whole).keys()
    assert {path: after[path] for path in before} == before  # what was there is not computed again
    assert not list(Path(out).rglob("*.partial"))

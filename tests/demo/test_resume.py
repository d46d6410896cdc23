"""Kill an audit at any point, start it again: only what was missing is computed, and the results are the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Runs a small audit; where a count is given, kills itself in the middle of the so-manieth write.
AUDIT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetyheads import files, storage
from safetyheads.audit import AuditData
from safetyheads.config import AuditConfig
from safetyheads.demo.loading import load_demo
from safetyheads.pipeline import demo_data, run_audit

out, deadly = Path(sys.argv[1]), int(sys.argv[2])
written = 0
replace = os.replace

def counted(*names):
    global written
    written += 1
    if written == deadly:
        os.kill(os.getpid(), signal.SIGKILL)  # the partial file is there, its name is not
    replace(*names)

os.replace = counted
config = AuditConfig("demo:aligned_a", "demo", "demo", n_random=3, size=2, max_new_tokens=24)
data = AuditData(*(prompts[:6] for prompts in demo_data().sets().values()))
engine = load_demo().engine
run_audit(engine, config, out, data)
print(written)
"""


def _audit(out, deadly=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", AUDIT, str(out), str(deadly)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("resume") / "whole"
    made = _audit(out)
    assert made.returncode == 0, made.stderr
    return out, int(made.stdout)


def _shards(out):
    return {
        path.relative_to(out): path.stat().st_mtime_ns
        for folder in ("shards", "completions")
        for path in (out / folder).rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_killed_and_started_again(uninterrupted, tmp_path, share):
    whole, n_writes = uninterrupted
    out = tmp_path / "run"
    killed = _audit(out, deadly=1 + round(share * (n_writes - 1)))
    assert killed.returncode == -signal.SIGKILL
    before = _shards(out)
    again = _audit(out)
    assert again.returncode == 0, again.stderr
    assert (out / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    after = _shards(out)
    assert after.keys() == _shards(whole).keys()
    assert {path: after[path] for path in before} == before  # what was there is not computed again
    assert not list(Path(out).rglob("*.partial"))

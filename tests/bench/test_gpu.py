"""All benches of speed for a GPU run by one command, here on the CPU at a reduced size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.sh"


@pytest.mark.long
def test_every_bench_of_the_gpu_gives_its_line(tmp_path):
    lines, path = tmp_path / "lines.jsonl", os.environ["PATH"]
    environment = {"PATH": path, "HOME": str(tmp_path), "DRY": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(["bash", SCRIPT, lines], env=environment, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line for line in found if "failed" in line] == [], ended.stderr[-2000:]
    assert ended.returncode == 0
    *benches, last = found
    assert {line["bench"] for line in benches} == {"roofline", "scan", "attention", "precision", "asr"}
    assert [line["size"] for line in benches if line["bench"] == "roofline"] == ["llama-2-7b", "llama-3-8b"]
    assert last["code"] == 0


def test_a_bench_that_fails_is_told_and_stops_no_other(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/bash\nexit 7\n")
    broken.chmod(0o755)
    lines = tmp_path / "lines.jsonl"
    environment = {"PATH": os.environ["PATH"], "DRY": "1", "PYTHON": str(broken)}
    ended = subprocess.run(["bash", SCRIPT, lines], env=environment, capture_output=True, check=False)
    *benches, last = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["failed"] for line in benches] == [7] * 7
    assert (ended.returncode, last["code"]) == (1, 1)

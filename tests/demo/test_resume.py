"""A run that is cut off anywhere goes on where it stopped, and ends in the same bytes."""

from __future__ import annotations

import pytest

from safetyheads import InputError, load_demo
from safetyheads.config import AuditConfig
from safetyheads.pipeline import demo_data, run_audit
from safetyheads.storage import RunDirectory

CONFIG = AuditConfig("aligned_a", "demo", size=1, n_random=2, max_new_tokens=24)


class Killed(BaseException):
    """Stands for SIGKILL between two writes."""


@pytest.fixture(scope="module")
def organism():
    return load_demo("aligned_a")


def test_a_killed_run_continues_to_the_same_bytes(organism, tmp_path, monkeypatch):
    run_audit(organism.engine, CONFIG, tmp_path / "whole", demo_data(), organism.planted_heads)
    whole = (tmp_path / "whole" / "results.json").read_bytes()
    write, written = RunDirectory._write, []

    def counting(self, path, content):
        written.append(path)
        if len(written) in (4, 9, 15):  # three kills, each a few files further on
            raise Killed
        write(self, path, content)

    monkeypatch.setattr(RunDirectory, "_write", counting)
    kills = 0
    for _ in range(4):
        try:
            run_audit(organism.engine, CONFIG, tmp_path / "cut", demo_data(), organism.planted_heads)
            break
        except Killed:
            kills += 1
    assert kills == 3
    assert (tmp_path / "cut" / "results.json").read_bytes() == whole
    shards = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole" / "shards").rglob("*.*")}
    again = {p.relative_to(tmp_path / "cut"): p.read_bytes() for p in (tmp_path / "cut" / "shards").rglob("*.*")}
    assert again == shards


def test_another_runs_directory_is_refused_with_the_fields_that_differ(organism, tmp_path):
    run_audit(organism.engine, CONFIG, tmp_path / "run", demo_data(), organism.planted_heads)
    other = AuditConfig("aligned_a", "demo", size=1, n_random=2, max_new_tokens=24, epsilon=0.5)
    with pytest.raises(InputError, match="epsilon"):
        run_audit(organism.engine, other, tmp_path / "run", demo_data(), organism.planted_heads)

"""The bench of the proofs' cost counts at a reduced shape; nothing is timed here."""

import json
import math
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def self_check(monkeypatch):
    """The bench, which lies outside the package."""
    monkeypatch.syspath_prepend(str(BENCH))
    import self_check

    monkeypatch.setattr(self_check, "organism_seconds", dict)
    return self_check


def shares(self_check, capsys, *asked):
    self_check.main(["--reduced", *asked])
    line = json.loads(capsys.readouterr().out)
    return {name: value for name, value in line.items() if name.endswith("one_prefix") or "share" in name}


def test_the_share_of_a_scan_is_counted(self_check, capsys):
    few, many = (shares(self_check, capsys, "--prompts", str(n), "--window", "80") for n in (16, 160))
    assert len(few) == 3
    for name, share in few.items():
        assert 0 < share < math.inf
        # Ten times the prompts; what they share is read once.
        assert (1 if "prefix" in name else 8) < share / many[name] < 11


def test_what_a_long_window_costs_is_told_by_short_ones(self_check):
    from shapes import SHAPES

    engine = self_check.engine_on(SHAPES["llama-3-8b"].reduced())
    assert self_check.beyond(engine, 16) == pytest.approx(self_check.counted(engine, 16), rel=1e-9)

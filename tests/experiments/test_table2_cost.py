"""Costs on the organism: counts are results, seconds are not (Table 2)."""

import json

import pytest


def test_costs_are_counted_in_results_and_timed_apart(outcome_of, shared_run):
    outcome = outcome_of("table2")
    ours, plain = outcome["tables"][0]["rows"]
    assert plain["gflop"] > ours["gflop"] > 0
    assert plain["ratio"] == pytest.approx(plain["gflop"] / ours["gflop"])
    assert outcome["headline"][0]["value"] == plain["ratio"]
    assert "timed" not in outcome
    (timed,) = json.loads((shared_run / "timings.json").read_text())["timed"]["table2"]
    assert len(timed["rows"]) == 6
    assert all(row["seconds"] > 0 for row in timed["rows"])
    assert any("850 A100 hours" in note for note in outcome["notes"])

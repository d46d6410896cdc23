"""ASR and Ships against epsilon: the ends of the sweep, and where both settle."""

import pytest
from experiment_runs import figure_of, points, rows

from safetyheads.experiments.epsilons import settled_from


def test_epsilon_one_changes_nothing_and_the_smallest_is_the_limit(outcome_of):
    asr, ships = (figure_of(outcome_of("epsilon"), "lines", key) for key in ("ASR", "Ships"))
    assert asr["logarithmic"]
    assert all(point["y"] == 0 for point in points(asr, x=1.0))
    assert all(abs(point["y"]) < 1e-6 for point in points(ships, x=1.0))
    assert all(point["y"] > 0.1 for point in points(ships, x=0.0, series="3 heads"))
    for group in ("first head", "3 heads"):
        limit = {point["panel"]: point["y"] for point in points(asr, x=0.0, series=group)}
        assert {point["panel"]: point["y"] for point in points(asr, x=1e-5, series=group)} == limit
        assert min(limit.values()) > 0


def test_settled_is_where_the_change_holds_0_and_ships_stay(outcome_of):
    settled = rows(outcome_of("epsilon"))
    assert len(settled) == 6
    for row in settled:
        sweep = rows(outcome_of("epsilon"), 1, **{key: row[key] for key in ("heads", "dataset", "ablation")})
        by_epsilon = {float(swept["epsilon"]): swept for swept in sweep}
        same = by_epsilon[float(row["asr"])]["change"]
        assert same["low"] <= 0 <= same["high"]
        assert 0 < float(row["ships"]) < 1
        near = [swept["ships"]["value"] for epsilon, swept in by_epsilon.items() if epsilon <= float(row["ships"])]
        assert near == pytest.approx([near[-1]] * len(near), rel=0.01, abs=1e-3)


def test_settled_is_the_first_place_after_the_last_that_is_far():
    assert [settled_from(near) for near in ((1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 1))] == [0, 1, 2, 2]

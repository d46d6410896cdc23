"""ASR and Ships against epsilon: the ends of the sweep, and where both settle."""

import pytest
from experiment_runs import figure_of, points, rows

from safetyheads.experiments.epsilons import settled_from


def test_epsilon_one_changes_nothing_and_the_smallest_is_the_limit(outcome_of):
    figure = figure_of(outcome_of("epsilon"), "lines", "ASR")
    assert figure["logarithmic"]
    assert all(one["y"] == 0 for one in points(figure, x=1.0))
    for group in ("first head", "3 heads"):
        limit = {one["panel"]: one["y"] for one in points(figure, x=0.0, series=group)}
        assert {one["panel"]: one["y"] for one in points(figure, x=1e-5, series=group)} == limit
        assert min(limit.values()) > 0
    ships = figure_of(outcome_of("epsilon"), "lines", "Ships")
    assert all(abs(one["y"]) < 1e-6 for one in points(ships, x=1.0))
    assert all(one["y"] > 0.1 for one in points(ships, x=0.0, series="3 heads"))


def test_settled_is_where_the_change_holds_0_and_ships_stay(outcome_of):
    settled, curves = rows(outcome_of("epsilon")), rows(outcome_of("epsilon"), table=1)
    assert len(settled) == 6
    for row in settled:
        where = {key: row[key] for key in ("heads", "dataset", "ablation")}
        own = [one for one in curves if all(one[key] == value for key, value in where.items())]
        (same,) = [one for one in own if one["epsilon"] == row["asr"]]
        assert same["change"]["low"] <= 0 <= same["change"]["high"]
        assert 0 < float(row["ships"]) < 1
        limit = own[-1]["ships"]["value"]
        for one in own:
            if float(one["epsilon"]) <= float(row["ships"]):
                assert one["ships"]["value"] == pytest.approx(limit, rel=0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("near", "place"),
    [([True, True, True], 0), ([False, True, True], 1), ([True, False, True], 2), ([False, False, True], 2)],
)
def test_settled_is_the_first_place_after_the_last_that_is_far(near, place):
    assert settled_from(near) == place

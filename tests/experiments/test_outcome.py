"""Values of outcomes: means over datasets, columns."""

from safetyheads.experiments.outcome import Column, Measured, Outcome, Shown, mean_of
from safetyheads.stats.intervals import Rate


def test_a_mean_is_of_what_was_scored():
    assert mean_of(map(Measured.of, [Rate(1, 2), Rate(0, 0), Rate(4, 4)])) == Measured(0.75, 6)
    assert mean_of([Measured(None, 0)]) == Measured(None, 0)


def test_columns_without_cells_are_left_out_and_times_are_no_results():
    columns = ["dataset", "asr", ["paper", "paper's ASR", "rate"], "..."]
    tables = {"t": {"title": "{model}", "columns": columns}, "seconds": {"columns": ["k"], "timed": True}}
    outcome = Outcome("fig2", "", "", shown=Shown(tables, {}, {"asr": ["ASR", "rate"]}))
    outcome.table("t", [{"dataset": "theft", "asr": None, "k": 1, "_own": 2}], ("k", "heads", "count"), model="m")
    outcome.table("seconds", [{"k": 1}])
    (table,) = outcome.tables
    assert table.columns == (Column("dataset", "dataset"), Column("asr", "ASR", "rate"), Column("k", "heads", "count"))
    assert (table.title, table.rows) == ("m", ({"dataset": "theft", "asr": None, "k": 1},))
    assert len(outcome.timed) == 1
    outcome.note("a", "b", "a")
    assert outcome.as_dict()["notes"] == ["a", "b"]
    assert not {"timed", "shown"} & set(outcome.as_dict())

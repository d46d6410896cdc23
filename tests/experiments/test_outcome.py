"""Values of outcomes: corrected p values, means over datasets, columns."""

from safetyheads.experiments.outcome import Column, Measured, Outcome, Shown, mean_of
from safetyheads.stats.intervals import Rate


def test_a_mean_is_of_what_was_scored():
    assert mean_of(map(Measured.of, [Rate(1, 2), Rate(0, 0), Rate(4, 4)])) == Measured(0.75, 6)
    assert mean_of([Measured(None, 0)]) == Measured(None, 0)


def test_columns_are_common_ones_or_given_and_those_without_cells_are_left_out():
    columns = ["dataset", "asr", ["paper", "paper's ASR", "rate"], "..."]
    tables = {"t": {"title": "{model}", "columns": columns}, "seconds": {"columns": ["k"], "timed": True}}
    shown = Shown(tables, {}, {"asr": ["ASR", "rate"]})
    outcome = Outcome("fig2", "", "", shown=shown)
    outcome.table("t", [{"dataset": "theft", "asr": None, "k": 1, "_own": 2}], ("k", "heads", "count"), model="m")
    (table,) = outcome.tables
    assert table.columns == (Column("dataset", "dataset"), Column("asr", "ASR", "rate"), Column("k", "heads", "count"))
    assert table.rows == ({"dataset": "theft", "asr": None, "k": 1},)
    assert (table.title, table.caption) == ("m", "")
    outcome.table("seconds", [{"k": 1}])
    assert len(outcome.tables) == len(outcome.timed) == 1
    assert "shown" not in outcome.as_dict()


def test_times_are_no_results_and_notes_are_said_once():
    outcome = Outcome("table2", "title", "question")
    outcome.note("a", "b", "a")
    outcome.note("b")
    assert outcome.as_dict()["notes"] == ["a", "b"]
    assert "timed" not in outcome.as_dict()

"""Values of outcomes: corrected p values, means over datasets, columns."""

from safetyheads.experiments.outcome import Column, Measured, Outcome, columns, mean_of
from safetyheads.stats.intervals import Rate
from safetyheads.stats.testing import holm_of_tests


def test_rows_that_are_no_test_count_for_none_in_holm():
    # By hand: of two tests the smaller p is doubled, the larger stays.
    assert holm_of_tests([None, 0.2, None, 0.01]) == [None, 0.2, None, 0.02]
    assert holm_of_tests([]) == []
    assert holm_of_tests([None]) == [None]


def test_a_mean_is_of_what_was_scored():
    assert mean_of([Rate(1, 2), Rate(0, 0), Rate(4, 4)]) == Measured(0.75, 6)
    assert mean_of([Rate(0, 0)]) == Measured(None, 0)


def test_columns_are_common_ones_or_given():
    assert columns("dataset", "asr", ("k", "heads", "count")) == (
        Column("dataset", "dataset"),
        Column("asr", "ASR", "rate"),
        Column("k", "heads", "count"),
    )


def test_times_are_no_results_and_notes_are_said_once():
    outcome = Outcome("table2", "title", "question")
    outcome.note("a", "b", "a")
    outcome.note("b")
    assert outcome.as_dict()["notes"] == ["a", "b"]
    assert "timed" not in outcome.as_dict()

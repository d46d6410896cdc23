"""The catalogue of experiments, what each needs, and how its rows become tables."""

from importlib import import_module
from typing import get_args

from safetyheads.experiments.catalogue import ALL, EXPERIMENTS, chosen, missing
from safetyheads.experiments.outcome import FigureKind, Kind, Measured, Outcome
from safetyheads.experiments.settings import PAPER, ReproductionConfig


def test_the_catalogue_has_every_experiment_of_the_paper_with_its_function_kinds_and_parts_of_figures():
    # The names that users type, which are the paper's; a rename breaks their commands.
    assert set(EXPERIMENTS) == {
        *("fig2", "fig11", "fig12", "fig4a", "table3", "table5", "fig4b", "transfer", "fig5", "fig6a", "fig6b"),
        *("fig7", "fig8", "fig13", "fig15", "fig17", "fig18", "table1", "table2", "table7", "epsilon", "study"),
    }
    assert chosen(ALL) == tuple(EXPERIMENTS.values())
    parts = {"kind", "title", "caption", "x", "y", "value", "logarithmic", "share", "of", "place"}
    for name, experiment in EXPERIMENTS.items():
        assert callable(getattr(import_module(f"safetyheads.experiments.{experiment.module}"), experiment.function))
        for figure in experiment.shown["figures"].values():
            assert figure["kind"] in get_args(FigureKind)
            assert {"title", "x", "y"} <= set(figure) <= parts
        columns = [column for table in experiment.shown["tables"].values() for column in table["columns"]]
        kinds = {kind for column in columns if column != "..." for kind in column[2:]}
        assert kinds <= set(get_args(Kind)), name


def test_what_an_experiment_lacks_is_named():
    assert missing(EXPERIMENTS["fig6a"], PAPER) == [
        "base: the checkpoint that the first model was aligned from (--base)"
    ]
    assert missing(EXPERIMENTS["fig6a"], ReproductionConfig()) == []


def test_columns_without_cells_are_left_out_times_are_no_results_and_p_values_are_of_the_whole_table():
    columns = [["dataset", "dataset"], ["change", "change", "change"], ["paper", "paper's ASR", "rate"], "..."]
    tables = {
        "t": {"title": "{model}", "columns": columns, "holm": True},
        "s": {"columns": [["k", "k"]], "timed": True},
    }
    outcome = Outcome("fig2", "", "", shown={"tables": tables})
    changes = [Measured(0.5, 8, p=0.02), None, Measured(0.5, 8, p=0.03)]
    rows = [{"dataset": "theft", "change": change, "k": 1, "_own": 2} for change in changes]
    outcome.table("t", rows, ("k", "heads", "count"), model="m")
    outcome.table("s", [{"k": 1}])
    (table,) = outcome.tables
    named = [("dataset", "dataset", "text"), ("change", "change", "change"), ("k", "heads", "count")]
    assert [tuple(column.values()) for column in table["columns"]] == named
    assert table["title"] == "m"
    assert table["rows"][0] == {"dataset": "theft", "change": changes[0], "k": 1, "p": 0.04}
    assert [row["p"] for row in table["rows"]] == [0.04, None, 0.04]
    outcome.note("a", "b", "a")
    assert outcome.as_dict()["notes"] == ["a", "b"]
    assert len(outcome.timed) == 1
    assert not {"timed", "shown"} & set(outcome.as_dict())

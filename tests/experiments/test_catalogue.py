"""The catalogue of experiments, and what each needs."""

from importlib import import_module
from typing import get_args

from safetyheads.experiments.catalogue import ALL, EXPERIMENTS, Need, chosen
from safetyheads.experiments.outcome import FigureKind, Kind
from safetyheads.experiments.run import missing
from safetyheads.experiments.settings import PAPER, ReproductionConfig


def test_the_catalogue_has_every_experiment_of_the_paper():
    # The names that users type, which are the paper's; a rename breaks their commands.
    assert set(EXPERIMENTS) == {
        *("fig2", "fig11", "fig12", "fig4a", "table3", "table5", "fig4b", "transfer", "fig5", "fig6a", "fig6b"),
        *("fig7", "fig8", "fig13", "fig15", "fig17", "fig18", "table1", "table2", "table7", "epsilon"),
    }
    assert chosen(ALL) == tuple(EXPERIMENTS.values())


def test_every_entry_names_a_function_known_needs_and_kinds():
    for name, experiment in EXPERIMENTS.items():
        assert callable(getattr(import_module(f"safetyheads.experiments.{experiment.module}"), name))
        assert set(experiment.needs) <= set(get_args(Need))
        assert {figure["kind"] for figure in experiment.shown.figures.values()} <= set(get_args(FigureKind))
        for key in experiment.shown.tables:
            kinds = {column.kind for column in experiment.shown.columns_of(key, [], [])}
            assert kinds <= set(get_args(Kind)), (name, key)


def test_what_an_experiment_lacks_is_named(monkeypatch):
    base = "base: the checkpoint that the first model was aligned from (--base)"
    assert missing(EXPERIMENTS["fig6a"], PAPER) == [base]
    assert missing(EXPERIMENTS["fig6a"], ReproductionConfig()) == []
    monkeypatch.setattr("safetyheads.experiments.run.find_spec", lambda name: None)
    (message,) = missing(EXPERIMENTS["fig6b"], ReproductionConfig())
    assert "pip install 'safetyheads[lm-eval]'" in message

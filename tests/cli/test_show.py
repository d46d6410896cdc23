"""Tables keep whole words and numbers at any width of the terminal; what models and layers are like is put in words."""

import io
import time

import experiment_samples as samples
import pytest
from rich.console import Console

from safetyheads.cli import show
from safetyheads.experiments.catalogue import EXPERIMENTS


@pytest.fixture
def terminal(monkeypatch):
    """Prints on a terminal of so many columns; gives the lines."""

    def printed(width, function, *arguments):
        file = io.StringIO()
        console = Console(file=file, width=width, markup=False, highlight=False)
        monkeypatch.setattr(show, "stdout", lambda: console)
        function(*arguments)
        return file.getvalue().splitlines()

    return printed


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_list_fits_and_names_costs_and_what_is_lacking(terminal, width):
    lacking = {name: ["base: the checkpoint"] if name == "fig6a" else [] for name in EXPERIMENTS}
    lines = terminal(width, show.show_experiments, EXPERIMENTS, lacking)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert text.count("needs first: base: the checkpoint") == 1
    for name, experiment in EXPERIMENTS.items():
        assert f"{name} {experiment.title}" in text
        assert experiment.costs in text


@pytest.mark.parametrize("width", [50, 60, 80, 120, 200])
def test_tables_break_no_number(terminal, width):
    lines = terminal(width, show.show_outcomes, samples.results(), ["table1"])
    assert max(map(len, lines)) <= width
    text = "\n".join(lines) if width > 60 else " ".join(" ".join(lines).split())
    for said in ("refusal", "0.33", "[0.18, 0.53]", "[+0.10, +0.40]", "p < 0.001", "1,682,963,909", "0.72", "quoted"):
        assert said in text
    assert "n 24 behind every interval." in text
    # A table too wide is a paragraph a row.
    assert ("Sahara parameters: 2,667,318;" in text) == (width <= 60)


def test_one_experiment_has_its_tables_and_several_a_line_each(terminal):
    left_out = {"fig6a": "It needs base:\nthe checkpoint.", "fig9": "Not asked for."}
    results = samples.results() | {"left_out": left_out}
    asr = {"model": "m", "label": "ASR, UA", "kind": "rate", "value": samples.at(13) | {"value": 13 / 24, "p": None}}
    next(outcome for outcome in results["experiments"] if outcome["name"] == "fig2")["headline"] = [asr]
    lines = terminal(120, show.show_outcomes, results, ["fig2", "fig15", "table1", "fig6a"])
    assert len(lines) < 15
    text = "\n".join(lines)
    assert "0.54" in text
    assert "Not meaningful on this model. demo:aligned_a on theft" in text
    assert lines[-1] == "fig6a left out: It needs base: the checkpoint."
    assert "Not asked for" not in text


def test_what_was_timed_is_shown_where_it_is_given(terminal):
    timed = samples.timings()["timed"]
    text = "\n".join(terminal(100, show.show_outcomes, samples.results(), ["table2"], timed))
    assert text.index("Timed on this machine") < text.index("1.73 [1.7, 1.76]") < text.index("850 quoted")
    for name, given in (("table2", None), ("fig2", timed)):
        assert "Timed" not in "\n".join(terminal(100, show.show_outcomes, samples.results(), [name], given))


def test_layers_that_differ_are_named_apart():
    full, windowed = ({"n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_value": 8, "window": w} for w in (None, 6))
    assert show.alike([windowed, full, windowed, windowed, None, full | {"d_value": 6}]) == [
        ("layers 0, 2-3", "4 of width 8, 2 of keys and values; see a window of 6 tokens"),
        ("layer 1", "4 of width 8, 2 of keys and values; see all tokens before"),
        ("layer 4", "none: tokens are mixed in another way"),
        ("layer 5", "4 of width 8 (values 6), 2 of keys and values; see all tokens before"),
    ]
    assert show.alike([full, full])[0][0] == "every layer"


def test_what_rounds_to_nothing_has_no_sign():
    numbers = {"mean": -0.001, "change": -0.001, "interval": [-0.2, 0.1], "n": 5, "rate": None}
    cells = {"mean": "0.00", "mean .3g": "-0.001", "n": "5", "gone.mean": ""}
    for column, text in cells.items():
        assert str(show.cell(numbers, column)) == text
    records = {"of": numbers}
    assert str(show.cell(records, "of change")) == "+0.00 [-0.20, +0.10] n 5"
    assert str(show.cell(records, "of rate")) == "not measured [-0.20, 0.10] n 5"


def test_a_judge_with_a_dot_in_its_name_has_its_column(terminal):
    judges = ("paper", "endpoint:gpt-4.1")
    rates = {name: {"rate": share, "interval": [0, 1], "n": 4} for name, share in zip(judges, (0.25, 0.5), strict=True)}
    results = {"judges": [{"name": name} for name in judges]}
    lines = terminal(100, show._show_by_judge, [{"heads": ["1-3"], "by_judge": rates}], results)
    (row,) = (line for line in lines if "1-3" in line)
    assert " ".join(row.split()) == "1-3 0.25 [0.00, 1.00] 0.50 [0.00, 1.00]"


def test_without_bars_a_line_comes_every_half_minute_also_within_a_batch_and_stages_are_numbered(monkeypatch):
    assert show.INTERVAL == 30
    monkeypatch.setattr(show, "INTERVAL", 0.01)
    written = io.StringIO()
    progress = show.RichProgress(Console(file=written, width=100))

    def wait_for(line):
        end = time.monotonic() + 20
        while line not in written.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        assert line in written.getvalue()

    progress.expect(("unablated answers", "groups"))
    with progress.track("harmful: groups", 8) as done:
        wait_for("2 of 2: harmful: groups: 0 of 8, none done yet\n")
        done(4)
        wait_for("2 of 2: harmful: groups: 4 of 8, about")
    said = written.getvalue()
    time.sleep(0.05)
    assert written.getvalue() == said  # silent once the stage is over

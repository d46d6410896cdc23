"""Tables keep whole words and numbers at any width of the terminal; what models and layers are like is put in words."""

import io
import time

import experiment_samples as samples
import pytest
from rich.console import Console

from safetyheads.cli import show
from safetyheads.cli.terminal import Terminal


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


def lines_of(file, said):
    """What stands in the file, once something does that was waited for."""
    ends = time.monotonic() + 20
    while said not in file.getvalue() and time.monotonic() < ends:
        time.sleep(0.01)
    return file.getvalue().splitlines()


def test_off_a_terminal_a_line_twice_a_minute_says_how_far_the_numbered_stage_is(monkeypatch):
    assert show.INTERVAL == 30
    monkeypatch.setattr(show, "INTERVAL", 0.05)
    file = io.StringIO()
    progress = show.RichProgress(Terminal(file))
    assert not progress.draws
    progress.expect(["unablated answers", "single heads", "curve"])
    with progress.track("harmful: single heads", 7) as done:
        assert lines_of(file, "none")[0] == "2 of 3: harmful: single heads: 0 of 7, none done yet"
        done(3)
        assert any(": 3 of 7, about " in line and line.endswith(" left") for line in lines_of(file, "3 of 7"))
        done(4)
        assert "2 of 3: harmful: single heads: 7 of 7, finishing" in lines_of(file, "finishing")
    with progress.track("writing", 1):  # no stage that was announced
        assert lines_of(file, "writing")[-1] == "writing: 0 of 1, none done yet"


@pytest.mark.parametrize(
    ("kind", "has_widgets", "draws"),
    [("force_terminal", False, True), ("force_jupyter", True, True), ("force_jupyter", False, False)],
)
def test_bars_are_drawn_on_a_terminal_and_in_a_notebook_that_can_draw(monkeypatch, kind, has_widgets, draws):
    monkeypatch.setattr(show, "find_spec", lambda name: object() if has_widgets and name == "ipywidgets" else None)
    monkeypatch.setattr(show, "PATIENCE", 0.0)
    file = io.StringIO()
    progress = show.RichProgress(Console(file=file, width=100, **{kind: True}))
    assert progress.draws == draws
    if kind == "force_terminal":
        progress.expect(["curve"])
        with progress.track("curve", 7) as done:
            done(3)
            assert any("1 of 1: curve" in line for line in lines_of(file, "3/7"))


@pytest.mark.parametrize("width", [50, 120])
def test_tables_break_no_number(terminal, width):
    lines = terminal(width, show.show_outcomes, samples.results(), ["table1"])
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert all(said in text for said in ("0.33", "[0.18, 0.53]", "[+0.10, +0.40]", "1,682,963,909"))
    # A table too wide is turned: a row is a column.
    assert any(line.startswith("parameters ") and "2,667,318" in line for line in lines) == (width <= 60)

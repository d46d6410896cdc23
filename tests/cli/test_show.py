"""Tables keep whole words and numbers at any width of the terminal; what models and layers are like is put in words."""

import io

import experiment_samples as samples
import pytest
from rich.console import Console

from safetyheads.cli import show


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


@pytest.mark.parametrize("width", [50, 120])
def test_tables_break_no_number(terminal, width):
    lines = terminal(width, show.show_outcomes, samples.results(), ["table1"])
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert all(said in text for said in ("0.33", "[0.18, 0.53]", "[+0.10, +0.40]", "1,682,963,909"))
    # A table too wide is turned: a row is a column.
    assert any(line.startswith("parameters ") and "2,667,318" in line for line in lines) == (width <= 60)

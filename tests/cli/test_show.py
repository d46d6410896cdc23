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
    text = "\n".join(lines) if width > 60 else " ".join(" ".join(lines).split())
    assert all(said in text for said in ("0.33", "[0.18, 0.53]", "[+0.10, +0.40]", "1,682,963,909"))
    # A table too wide is a paragraph a row.
    assert ("Sahara parameters: 2,667,318;" in text) == (width <= 60)


def test_a_judge_with_a_dot_in_its_name_has_its_column(terminal):
    judges = ("paper", "endpoint:gpt-4.1")
    rates = {name: {"rate": share, "interval": [0, 1], "n": 4} for name, share in zip(judges, (0.25, 0.5), strict=True)}
    results = {"judges": [{"name": name} for name in judges]}
    lines = terminal(100, show._show_by_judge, [{"heads": ["1-3"], "by_judge": rates}], results)
    (row,) = (line for line in lines if "1-3" in line)
    assert " ".join(row.split()) == "1-3 0.25 [0.00, 1.00] 0.50 [0.00, 1.00]"

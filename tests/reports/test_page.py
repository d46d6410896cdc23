"""Numbers and cells as pages write them, the command of a run, and the drawing library."""

from __future__ import annotations

import re

import pytest

from safetyheads.reports import page
from safetyheads.reports.charts import drawing_library
from safetyheads.runs.directory import RunDirectory


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (page.number(2.256), "2.26"),
        (page.number(-0.00412), "−0.00412"),
        (page.number(1e-5), "1e−5"),
        (page.number(999.7), "1000"),
        (page.number(None), "–"),
        (page.number(0.5, sign=True), "+0.5"),
        (page.signed(-0.021), "−0.02"),
        (page.signed(-0.001), "0.00"),
        (page.p_value(0.0), "< 0.001"),
        (page.p_value(0.0123, "= "), "= 0.012"),
        (page.p_value(0.5), "0.50"),
        (page.p_value(None), "–"),
    ],
)
def test_numbers_are_written_for_people(written: str, text: str) -> None:
    assert written == text


def test_a_cell_has_interval_n_and_p_beside_its_number() -> None:
    rate = {"rate": 0.25, "interval": [0.1, 0.5], "count": 6, "n": 24}
    assert page.rate_cell(rate).of == "[0.10,\xa00.50] · 6/24"
    assert page.rate_cell(rate, with_interval=False).of == "6/24"
    change = page.change_cell({"change": -0.2, "interval": [-0.4, 0.1], "p_value": 0.2})
    assert (change.text, change.of) == ("−0.20", "[−0.40,\xa0+0.10] · p\xa0=\xa00.20")
    assert page.rate_cell(None) == page.mean_cell(None) == page.change_cell(None) == page.random_cell(None)


def test_a_command_is_copied_without_its_directory(tmp_path):
    commands = (
        (
            ["/opt/bin/safetyheads", "audit", "a model", "--out", "x", "--seed", "1"],
            "safetyheads audit 'a model' --seed 1",
        ),
        (["/opt/bin/safetyheads", "scan", "m", "--out=x"], "safetyheads scan m"),
        (["script.py"], ""),
    )
    for number, (command, copied) in enumerate(commands):
        with RunDirectory.start(tmp_path / str(number), {}, {"command": command}) as run:
            assert page.command_of(run) == copied


def test_the_drawing_library_is_whole_and_loads_nothing() -> None:
    library = drawing_library()
    assert "window.vegaEmbed=" in library
    assert not re.search(r"</script|<!--|jsdelivr|unpkg|cdnjs|googleapis|\bimport\s*\(", library)
    assert len(library) < 1_200_000

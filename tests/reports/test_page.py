"""Numbers and cells as pages write them, completions within their room, and the drawing library."""

from __future__ import annotations

import re

import pytest

from safetyheads.reports import page
from safetyheads.reports.charts import drawing_library

RATE = {"rate": 0.25, "interval": [0.1, 0.5], "count": 6, "n": 24}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.256, "2.26"),
        (0.0, "0"),
        (-0.00412, "−0.00412"),
        (1e-5, "1e−5"),
        (999.7, "1000"),
        (45678.0, "45678"),
        (None, "–"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert page.number(value) == text


def test_signs_and_p_values_are_written_for_people() -> None:
    assert page.number(0.5, sign=True) == "+0.5"
    assert [page.signed(value) for value in (-0.021, 0.3, -0.001)] == ["−0.02", "+0.30", "0.00"]
    assert [page.p_value(p) for p in (0.0, 0.0123, 0.5, None)] == ["< 0.001", "0.012", "0.50", "–"]
    assert page.p_value(0.0123, "= ") == "= 0.012"


def test_a_cell_has_interval_n_and_p_beside_its_number() -> None:
    assert page.rate_cell(RATE).of == "[0.10,\xa00.50] · 6/24"
    assert page.CELLS["share"](RATE).of == "6/24"
    change = {"change": -0.2, "interval": [-0.4, 0.1], "p_value": 0.2}
    assert (page.change_cell(change).text, page.change_cell(change).of) == (
        "−0.20",
        "[−0.40,\xa0+0.10] · p\xa0=\xa00.20",
    )
    assert page.rate_cell(None) == page.mean_cell(None) == page.change_cell(None) == page.random_cell(None)
    assert page.td(page.Cell("<b>", n="n 3", quoted=True)) == (
        '<td><span class="quoted">&lt;b&gt;</span> <span class="of">quoted</span> <span class="of">n\xa03</span></td>'
    )


def _answers(text: str) -> list[dict[str, object]]:
    about = {"set": "harmful", "query": "q", "text": text, "complete": True}
    return [
        {**about, "id": at, "group": group, "verdicts": {"paper": {"label": "refused", "reason": "r"}}}
        for at in range(2)
        for group in ("", "1-3,0-0", "2-2")
    ]


def test_completions_are_those_of_the_named_groups_in_order() -> None:
    groups = {frozenset[str](): "nothing ablated", frozenset(["0-0", "1-3"]): "0-0, 1-3 ablated"}
    found = page.completions(_answers("x"), ["benign", "harmful"], groups, "paper")
    titles = [(one["title"], len(one["rows"])) for one in found["sets"]]
    assert titles == [("Harmful prompts, nothing ablated", 2), ("Harmful prompts, 0-0, 1-3 ablated", 2)]
    assert found["sets"][0]["rows"][1]["said"] == "prompt 1, paper: refused: r"
    assert found["left_out"] == 0


def test_completions_that_find_no_room_are_counted() -> None:
    groups = {frozenset[str](): "nothing ablated"}
    found = page.completions(_answers("<" * 1000), ["harmful"], groups, "paper", room=5000)
    assert (len(found["sets"][0]["rows"]), found["left_out"]) == (1, 1)


def test_the_drawing_library_is_whole_and_loads_nothing() -> None:
    library = drawing_library()
    assert "window.vegaEmbed=" in library
    assert "</script" not in library
    assert "<!--" not in library
    assert not re.search(r"jsdelivr|unpkg|cdnjs|googleapis|\bimport\s*\(", library)
    assert len(library) < 1_200_000

"""A reproduction's pages: an index true to the results, every number of the outcomes, no markup from outside."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import experiment_samples as samples
import pytest
from report_pages import Page, check_closed, check_hostile, check_snapshot, check_tables

from safetyheads.errors import InputError
from safetyheads.experiments.outcome import Measured, Outcome
from safetyheads.reports.reproduction import MAX_CHART_BYTES, MAX_ROWS, render_reproduction
from safetyheads.reports.write import ReportWarning, write_report
from safetyheads.runs.directory import RunDirectory

NAMES = [outcome.name for outcome in samples.outcomes()]


@cache
def pages() -> dict[str, Page]:
    index, rest = render_reproduction(samples.results(), samples.manifest())
    return {"index": Page(index)} | {name.removesuffix(".html"): Page(html) for name, html in rest.items()}


def page_of(outcome: Outcome) -> Page:
    _, rest = render_reproduction(samples.results([outcome]), samples.manifest())
    return Page(rest[f"{outcome.name}.html"])


def index_of(*outcomes: Outcome, left_out: dict[str, str] | None = None, **config: Any) -> Page:
    made = samples.results(outcomes, **config) | {"left_out": left_out or {}}
    return Page(render_reproduction(made, samples.manifest(**config))[0])


@pytest.mark.parametrize("name", ["index", *NAMES])
def test_every_page_is_whole_and_closed(name: str) -> None:
    check_tables(pages()[name])
    check_closed(pages()[name], ("index.html", *(f"{one}.html" for one in NAMES)))
    has_library = any("drawing library" in script for script in pages()[name].scripts.values())
    # A page without figures has no use for the drawing library.
    assert has_library == bool(pages()[name].charts)
    if name in ("index", "fig2", "table1", "table2"):
        check_snapshot(pages()[name], name)
    if name == "epsilon":
        check_hostile(pages()[name], pages()["fig2"])
    if name == "index":
        links = [link["href"] for link in pages()[name].tags("a") if "skip" not in link.values()]
        assert links == [f"{one}.html" for one in NAMES]


def test_what_lacks_a_setting_or_was_left_out_has_its_reason_as_text() -> None:
    index = index_of(samples.fig2(), left_out={"fig6a": samples.HOSTILE}, base=None)
    check_hostile(index, pages()["index"])
    for name in ("../fig2", ""):
        with pytest.raises(InputError, match="which no file can have"):
            index_of(replace(samples.fig2(), name=name))
    assert not pages()["fig15"].charts  # not meaningful: reasons in place of numbers


def test_every_number_of_a_table_reaches_the_page() -> None:
    for outcome in samples.outcomes():
        words = pages()[outcome.name].words
        for table in outcome.tables:
            for value in (row.get(column["key"]) for row in table["rows"] for column in table["columns"]):
                if isinstance(value, Measured) and value.value is not None:
                    assert any(digits in words for digits in (f"{abs(value.value):.2f}", f"{value.value:.3g}"))
                    assert f"n {value.n}" in words
                elif isinstance(value, str):
                    assert value in words


def test_the_papers_numbers_are_marked_and_measured_ones_are_not() -> None:
    columns = [("method", "method"), ("share", "share, %", "number"), ("paper", "in the paper", "rate")]
    columns += [("five", "paper, 1 to 5")]
    rows = (
        {"method": "ours", "share": 0.5, "paper": 0.72, "five": "0.1, 0.2"},
        {"method": "ActSVD (paper)", "share": 5.0, "paper": None, "five": ""},
        {"method": "paper", "share": 7.0, "paper": Measured(0.1, 5, 0.0, 0.4), "five": ""},
    )
    page = page_of(samples.outcome("fig2", tables=[samples.table("t", "c", columns, rows)]))
    assert all(text in page.words for text in ("0.72 quoted", "0.1, 0.2 quoted", "5 quoted"))
    assert page.words.count("quoted") == 3 + 1  # and the line that explains it


def test_what_is_too_long_or_cannot_be_drawn_is_said() -> None:
    rows = tuple({"a": f"row {number}"} for number in range(MAX_ROWS + 7))
    points = tuple({"x": k, "y": 0.123456 + k / 1e6, "series": "a long name of a series"} for k in range(25_000))
    figures = [samples.figure("curves", title, "x", "y", points) for title in ("first", "second")]
    page = page_of(samples.outcome("fig13", *figures, tables=[samples.table("t", "c", [("a", "a")], rows)]))
    assert "7 more rows are in results.json." in page.words
    assert len(page.scripts["chart-specs"]) < MAX_CHART_BYTES
    points = ({"x": -1.0, "y": 0.5}, {"x": 0.1, "y": None}, {"x": 0.1, "y": 0.5})
    words = page_of(samples.outcome("fig13", samples.figure("lines", "t", "x", "y", points, logarithmic=True))).words
    assert "Not measured: 1 of 3." in words
    assert "Not drawn: 1 of 3" in words


def test_a_run_directory_gets_an_index_and_a_page_each(tmp_path: Path) -> None:
    run = RunDirectory.open(samples.finished_run(tmp_path / "run", [samples.fig2(), samples.not_meaningful()]))
    with pytest.warns(ReportWarning, match="hold no completions"):
        path, _ = write_report(run, show_completions=True)
    assert path == tmp_path / "run" / "report" / "index.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["fig15.html", "fig2.html", "index.html"]
    before = path.read_bytes()
    assert write_report(run)[0].read_bytes() == before


def test_other_commands_refuse_it_in_a_line(refused: Any, tmp_path: Path) -> None:
    path = samples.finished_run(tmp_path / "run", [samples.fig2()])
    for command in (("compare", path, path), ("history", path), ("judge", path, "--judge", "released")):
        assert "reproduction" in refused(*command)

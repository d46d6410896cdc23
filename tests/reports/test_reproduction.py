"""A reproduction's pages as text: an index true to the results, figures within the schema, every number, no markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import experiment_samples as samples
import pytest
from test_scan import Page

from safetyheads.cli.app import main
from safetyheads.errors import InputError
from safetyheads.experiments.outcome import Column, Figure, Measured, Outcome, Table
from safetyheads.judges.named import judge_named
from safetyheads.reports import page as report_page
from safetyheads.reports.audit import ReportWarning, write_report
from safetyheads.reports.experiments_axes import heights, keys, places
from safetyheads.reports.experiments_cells import MAX_ROWS, TableShown, finding
from safetyheads.reports.experiments_figures import MOST_INTERVALS, drawn
from safetyheads.reports.experiments_labels import label_spots
from safetyheads.reports.reproduction import MAX_CHART_BYTES, render
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.progress import Silent
from safetyheads.runs.rejudge import rejudge

NAMES = [outcome.name for outcome in samples.outcomes()]
FIGURES = [
    pytest.param(figure, id=f"{outcome['name']}-{figure['kind']}-{at}")
    for outcome in samples.results()["experiments"]
    for at, figure in enumerate(outcome["figures"])
    if figure["points"]
]


@pytest.fixture(autouse=True)
def _small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawing library takes long to parse, and no test here is about it."""
    monkeypatch.setattr(report_page, "drawing_library", lambda: "/* drawing library */")


@cache
def pages() -> dict[str, Page]:
    index, rest = render(samples.results(), samples.manifest(), samples.timings())
    return {"index": Page(index)} | {name.removesuffix(".html"): Page(html) for name, html in rest.items()}


def page_of(outcome: Outcome, **timings: Any) -> Page:
    _, rest = render(samples.results([outcome]), samples.manifest(), timings)
    return Page(rest[f"{outcome.name}.html"])


def index_of(*outcomes: Outcome, **config: Any) -> str:
    return Page(render(samples.results(outcomes), samples.manifest(**config), {})[0]).words


def figure_of(kind: str, points: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    about = {"title": "t", "caption": "c", "x": "x", "y": "y", "value": "v", "logarithmic": False, "share": True}
    return about | {"kind": kind, "points": points} | changed


# The index.


def test_the_index_lists_every_experiment_in_the_papers_order() -> None:
    index = pages()["index"]
    links = [
        attributes["href"] for tag, attributes in index.elements if tag == "a" and "skip" not in attributes.values()
    ]
    assert links == [f"{name}.html" for name in NAMES]
    assert index.words.index("fig2 done") < index.words.index("fig12 not run") < index.words.index("epsilon done")
    assert "12 of 21 experiments of the paper on 4 models; 1 not meaningful there." in index.words


def test_each_state_comes_with_its_line() -> None:
    words = pages()["index"].words
    assert "ASR (template direct, greedy): vanilla 0.00; UA 0.54; SC 0.62 (n 24)." in words
    assert f"fig15 not meaningful URIAL on base models{samples.REASON}" in words.replace(" demo:", "demo:")
    assert "fig17 done in part" in words
    assert "58.3 s on this machine" in words


def test_what_lacks_a_setting_is_left_out_and_says_which() -> None:
    words = index_of(samples.fig2(), base=None)
    assert "fig6a left out" in words
    assert "needs a setting that is not given: base" in words
    assert "fig8 not run" in words


def test_what_a_run_left_out_has_its_reason_as_text() -> None:
    left_out = {"fig6a": samples.HOSTILE, "fig2": "It is there by now.", "fig99": "Nobody knows it."}
    html, _ = render(samples.results([samples.fig2()]) | {"left_out": left_out}, samples.manifest(), {})
    page = Page(html)
    words = page.words
    assert words.index("fig6a left out") < words.index("onerror=alert(1)") < words.index("fig99 left out")
    assert "fig2 done" in words
    assert "by now" not in words
    assert not any(tag == "img" for tag, _ in page.elements)


def test_embedded_models_are_told_of_in_words_true_of_those_without_plants() -> None:
    words = pages()["index"].words
    assert "small ones made for this package, some of them with planted heads" in words


def test_a_run_of_nothing_says_so() -> None:
    assert "None of 21 experiments was run." in index_of()
    assert "; none is meaningful there." in index_of(samples.not_meaningful())


def test_an_outcome_that_the_catalogue_does_not_know_comes_last() -> None:
    words = index_of(replace(samples.fig2(), name="fig99"))
    assert words.index("epsilon not run") < words.index("fig99 done")


@pytest.mark.parametrize("name", ["../fig2", "fig 2", "", "index.html"])
def test_names_that_are_no_file_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="which is none"):
        render(samples.results([replace(samples.fig2(), name=name)]), samples.manifest(), {})


# A page.


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_what_it_asks_and_leads_back(name: str) -> None:
    (outcome,) = [one for one in samples.outcomes() if one.name == name]
    page = pages()[name]
    assert outcome.title in page.words
    assert outcome.question in page.words
    assert ("a", {"href": "index.html"}) in page.elements
    places = [attributes["data-chart"] for _, attributes in page.elements if attributes.get("data-chart")]
    assert sorted(places) == sorted(json.loads(page.scripts["chart-specs"]))
    for caption in (one.caption for one in (*outcome.figures, *outcome.tables)):
        assert " ".join(caption.split()) in page.words


def test_notes_that_are_no_evidence_make_a_badge() -> None:
    words = pages()["fig11"].words
    assert words.index("Not evidence about the paper") < words.rindex("Query-level ASR by number of heads")
    assert "Not evidence" not in pages()["fig2"].words


def test_where_it_is_not_meaningful_the_reasons_stand_in_place_of_numbers() -> None:
    page = pages()["fig15"]
    assert page.words.count(samples.REASON) == 1
    assert "Not meaningful on this model" in page.words
    assert not [tag for tag, _ in page.elements if tag in ("table", "figure")]
    assert json.loads(page.scripts["chart-specs"]) == {}


def test_what_is_meaningful_in_part_shows_both() -> None:
    page = pages()["fig17"]
    assert "Meaningful in part only" in page.words
    assert samples.REASON in page.words
    assert len([tag for tag, _ in page.elements if tag == "figure"]) == 1


def test_what_was_timed_stands_apart() -> None:
    page = pages()["table2"]
    assert page.sections[-2:] == ["timed", "provenance"]
    assert "tables" not in page.sections
    assert "1.73 [1.7, 1.76] · n 5" in page.words
    assert "The experiment took 12.2 s." in page.words
    assert "timed" not in page_of(samples.table2()).sections


def test_a_page_without_figures_has_no_drawing_library() -> None:
    def has_library(name: str) -> bool:
        return any("drawing library" in script for script in pages()[name].scripts.values())

    assert has_library("fig2")
    assert not any(has_library(name) for name in ("index", "fig15", "table2"))


def test_provenance_has_settings_versions_weights_and_each_start() -> None:
    for name in ("index", "fig2"):
        words = pages()[name].words
        for said in ("max_new_tokens128", "versions.torch2.9.0", "weights sha256.demo:aligned_abd8c", "Start 2 of 2"):
            assert said in words.replace(f"{said[:-4]} ", said[:-4]), said
    assert "Plans of batches of the run" in pages()["index"].words
    assert "groups_per_batch" not in pages()["fig2"].words


# Numbers.


@pytest.mark.parametrize("name", ["fig2", "table1", "table2"])
def test_every_number_of_a_table_reaches_the_page(name: str) -> None:
    (outcome,) = [one for one in samples.outcomes() if one.name == name]
    words = pages()[name].words
    for table in (*outcome.tables, *outcome.timed):
        for row in table.rows:
            for column in table.columns:
                value = row.get(column.key)
                if isinstance(value, Measured) and value.value is not None:
                    digits = f"{abs(value.value):.2f}" if column.kind != "number" else f"{value.value:.3g}"
                    assert digits in words
                    assert f"n {value.n}" in words
                elif isinstance(value, int) and column.kind == "count":
                    assert f"{value:,}" in words
                elif isinstance(value, str):
                    assert value in words


def test_a_measured_cell_has_interval_n_and_p() -> None:
    assert "0.33 [0.18, 0.53] · n 24" in pages()["table1"].words
    assert "+0.25 [+0.10, +0.40] · n 24 · p < 0.001" in pages()["table1"].words
    assert "not measured n 0" in pages()["fig2"].words


def test_the_papers_numbers_are_marked_and_counted_ones_are_not() -> None:
    columns = (
        Column("method", "method"),
        Column("share", "share, %", "number"),
        Column("paper", "in the paper", "rate"),
    )
    rows = (
        {"method": "ours", "share": 0.5, "paper": 0.72},
        {"method": "ActSVD (paper)", "share": 5.0, "paper": None},
        {"method": "paper", "share": 7.0, "paper": Measured(0.1, 5, 0.0, 0.4)},
    )
    shown = TableShown.of(
        json.loads(json.dumps(samples.results([_with(Table("t", "c", columns, rows))])))["experiments"][0]["tables"][0]
    )
    assert [[cell.quoted for cell in row] for row in shown.rows] == [
        [False, False, True],
        [False, True, False],
        [False, False, False],
    ]
    assert shown.quotes
    assert "printed in the paper and were not measured here" in pages()["table1"].words


def test_a_cell_that_quotes_in_words_is_marked_too() -> None:
    table = Table(
        "t", "c", (Column("a", "a"), Column("b", "paper, 1 to 5 heads")), ({"a": "x", "b": "0.1, 0.2"}, {"a": "y"})
    )
    words = page_of(_with(table)).words
    assert "0.1, 0.2 quoted" in words
    assert words.count("quoted") == 2  # the mark, and the line that explains it


def test_long_tables_scroll_and_the_longest_are_cut_and_say_so() -> None:
    rows = tuple({"a": f"row {number}"} for number in range(MAX_ROWS + 7))
    page = page_of(_with(Table("t", "c", (Column("a", "a"),), rows)))
    assert "7 more rows are in results.json." in page.words
    assert f"row {MAX_ROWS - 1}" in page.words
    assert any("tall" in (attributes.get("class") or "") for _, attributes in page.elements)


def _with(*tables: Table) -> Outcome:
    return Outcome("fig2", "title", "question", ("m",), tables)


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([], ""),
        ([{"x": 1, "y": None, "series": "UA", "n": 0}], "Y: UA nothing could be scored (n 0)."),
        ([{"x": 1, "y": 0.5, "series": "UA", "n": 3}], "Y: UA 0.50 (n 3)."),
        ([{"x": k, "y": k / 9, "series": f"s{k}", "n": 3} for k in range(6)], "Y: 0.00 to 0.56 (n 3)."),
    ],
)
def test_a_finding_is_a_range(points: list[dict[str, Any]], said: str) -> None:
    outcome = {"figures": [figure_of("lines", points)], "tables": []}
    assert finding(outcome) == said


def test_an_experiments_own_finding_goes_before_a_range() -> None:
    own = replace(samples.fig2(), finding="UA frees 13 of 24 <b>.", setting="Ablations at epsilon 1e-05; <b> judge.")
    html, rest = render(samples.results([own]), samples.manifest(), {})
    for text in (html, rest["fig2.html"]):
        assert "UA frees 13 of 24 <b>." in Page(text).words
        assert "vanilla 0.00; UA 0.54" not in Page(text).words
    page = Page(rest["fig2.html"])
    assert page.words.index(own.question) < page.words.index(own.setting) < page.words.index(own.finding)
    timed_only = replace(samples.table2(), finding="A pass takes 2 s (n 5).", notes=("A note.",))
    assert "A pass takes 2 s (n 5)." in index_of(timed_only)
    assert page_of(timed_only).words.count("A pass takes 2 s (n 5).") == 1


def test_results_of_older_runs_have_neither_finding_nor_setting() -> None:
    old = samples.results([samples.fig2()])
    for outcome in old["experiments"]:
        del outcome["finding"], outcome["setting"]
    index, rest = render(old, samples.manifest(), {})
    for text in (index, rest["fig2.html"]):
        assert "vanilla 0.00; UA 0.54; SC 0.62 (n 24)." in Page(text).words


# Figures.


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_fits_the_schema(figure: dict[str, Any]) -> None:
    for panel in drawn(figure).panels[:2]:
        short = dict(panel.spec)
        short["data"] = {"values": short["data"]["values"][:20]}
        alt.Chart.from_dict(short, validate=True)


@pytest.mark.parametrize("figure", FIGURES)
def test_every_panel_has_its_points_and_titled_axes(figure: dict[str, Any]) -> None:
    made = drawn(figure)
    assert sum(len(panel.spec["data"]["values"]) for panel in made.panels) == len(figure["points"])
    for panel in made.panels:
        for layer in panel.spec["layer"]:
            assert layer.get("data", {}).get("name") is None
            # A line at 0 has one of them only.
            titles = [layer["encoding"][name]["title"] for name in ("x", "y") if name in layer["encoding"]]
            assert titles
            assert all(titles)
    assert made.ramp is not None or made.legend or all(not point.get("series") for point in figure["points"])


@pytest.mark.parametrize("figure", FIGURES)
def test_what_a_figure_names_is_in_its_rows_alone(figure: dict[str, Any]) -> None:
    # Anywhere else the page's script would take a name that begins with two hyphens for a colour.
    for panel in drawn(figure).panels:
        outside = json.dumps({key: value for key, value in panel.spec.items() if key not in ("data", "description")})
        text = re.sub(r'"values": \[\{.*?\}\]', "", outside)
        assert "--paper" not in re.sub(r'"stroke": "--paper"', "", text)
        assert "fetch(" not in text


def test_panels_share_their_axis_and_their_colours() -> None:
    fig4b = samples.results()["experiments"][2]
    scales = {
        json.dumps(panel.spec["layer"][1]["encoding"]["color"]["scale"]) for panel in drawn(fig4b["figures"][0]).panels
    }
    assert len(scales) == 1
    points = [{"x": k, "y": k, "series": "a", "panel": str(k)} for k in range(1, 4)]
    made = drawn(figure_of("lines", points, share=False))
    assert {panel.spec["layer"][1]["encoding"]["y"]["scale"]["domain"][1] for panel in made.panels} == {3}


def test_one_panel_of_the_figures_own_name_is_not_named_twice() -> None:
    assert drawn(figure_of("lines", [{"x": 1, "y": 0.5, "panel": "t"}])).panels[0].name == ""
    assert drawn(figure_of("lines", [{"x": 1, "y": 0.5, "panel": "u"}])).panels[0].name == "u"


def test_shares_run_from_0_to_1_and_changes_do_not() -> None:
    rows = [{"y": 0.2, "low": 0.1, "high": 0.4}]
    assert (heights("y", rows, True, False).low, heights("y", rows, True, False).high) == (0, 1)
    change = heights("y", [{"y": -0.2, "low": -0.4, "high": 0.1}], True, False)
    assert (change.low, change.high, change.share) == (-0.4, 0.1, False)
    assert heights("y", [], True, False).share
    assert heights("y", [{"y": 3.0}], False, True).low == 0


def test_zero_stands_at_the_left_end_of_a_logarithmic_axis() -> None:
    made = places([1.0, 0.1, 1e-5, 0.0], True)
    assert made.of(0.0) == made.zero
    assert made.zero is not None
    assert made.cut is not None
    assert made.low < made.zero < made.cut < -5
    assert made.of(-1.0) is None
    assert made.ticks is not None
    assert dict(zip(made.ticks, made.labels, strict=True))[made.zero] == "0"
    assert dict(zip(made.ticks, made.labels, strict=True))[0.0] == "1"
    assert places([2.0, 5.0], True).labels == ("2", "5")
    assert places([1e-9, 1.0], True).labels[-1] == "1"
    assert len(places([1e-30, 1e30], True).labels) <= 8
    assert places([0.0], True).labels[0] == "0"


def test_points_below_0_have_no_place_there_and_are_counted() -> None:
    points = [{"x": x, "y": 0.5, "series": ""} for x in (-1.0, 0.0, 0.1)]
    made = drawn(figure_of("scatter", points, logarithmic=True))
    assert len(made.panels[0].spec["data"]["values"]) == 2
    assert "Not drawn: 1 of 3 points below 0, which a logarithmic axis does not have." in made.notes


def test_what_could_not_be_scored_is_told() -> None:
    empty = {"x": "a", "y": None, "low": None, "high": None, "n": 0, "series": "UA"}
    assert drawn(figure_of("bars", [empty])).notes == ("A dash stands where nothing could be scored (1 of 1).",)
    assert drawn(figure_of("lines", [empty | {"x": 1}])).notes == (
        "Not drawn: 1 of 1 points, where nothing could be scored.",
    )
    head = {"layer": 0, "head": 0, "y": None}
    assert drawn(figure_of("heads", [head])).notes == ("Left blank: 1 head, where nothing could be measured.",)


def test_a_figure_without_points_says_so() -> None:
    for kind in ("bars", "lines", "heads", "matrix", "attention", "curves", "scatter"):
        assert drawn(figure_of(kind, [])).panels == ()
    assert "This figure has no points." in pages()["epsilon"].words


def test_names_beside_points_keep_off_each_other() -> None:
    rows = [{"s": "s0", "place": k / 10, "y": 0.5 + k / 100, "name": f"method {k}"} for k in range(10)]
    spots = label_spots(rows, heights("y", [], True, False), places([0.0, 1.0], False))
    named = [row["name"] for own in spots.values() for row in own]
    assert 2 < len(named) < 10
    assert len(set(named)) == len(named)
    crowd = [{"s": "s0", "place": k / 100, "y": k / 200, "name": str(k)} for k in range(100)]
    few = label_spots(crowd, heights("y", [], True, False), places([0.0, 1.0], False))
    assert {row["name"] for own in few.values() for row in own} <= {"97", "98", "99"}


def test_intervals_are_drawn_among_few_points_only() -> None:
    points = [{"x": k, "y": 0.5, "low": 0.4, "high": 0.6, "series": ""} for k in range(MOST_INTERVALS + 1)]
    assert any("Intervals are not drawn" in note for note in drawn(figure_of("scatter", points)).notes)
    assert drawn(figure_of("scatter", points[:-1])).notes == ()


def test_series_look_alike_on_every_page_and_differ_on_each() -> None:
    known = {key.name: key.colour for key in keys(["SC", "other", "vanilla", "UA"], "line")}
    assert {"UA": "--attack", "SC": "--kept"}.items() <= known.items()
    assert len(set(known.values())) == 4
    many = keys([f"s{number}" for number in range(14)], "line")
    assert len({(key.colour, key.shape, tuple(key.dash)) for key in many}) == 14
    bars = keys(["vanilla", *(f"s{number}" for number in range(7))], "bar")
    assert len({(key.colour, key.opacity) for key in bars}) == 8


def test_lone_values_have_axes() -> None:
    for kind in ("lines", "scatter", "curves", "bars"):
        for y in (0.0, 7.5, -2.0):
            (panel,) = drawn(figure_of(kind, [{"x": 3, "y": y, "series": "a"}], share=False)).panels
            domain = panel.spec["layer"][-1]["encoding"]["y"].get("scale", {}).get("domain")
            assert domain is None or domain[0] < domain[1]


def test_a_page_stays_small_and_says_what_it_leaves_out() -> None:
    points = tuple({"x": k, "y": 0.123456 + k / 1e6, "series": "a long name of a series"} for k in range(25_000))
    figures = tuple(Figure("curves", title, "c", "x", "y", points) for title in ("first", "second"))
    page = page_of(Outcome("fig13", "title", "question", ("m",), figures=figures))
    assert len(page.scripts["chart-specs"]) < MAX_CHART_BYTES
    assert "(results.json has them): second." in page.words


# Equal, closed, and of text.


def test_equal_arguments_give_equal_text() -> None:
    arguments = (samples.results(), samples.manifest(), samples.timings())
    assert render(*arguments) == render(*arguments)


def test_hostile_text_stays_text() -> None:
    page = pages()["epsilon"]
    assert "onerror=alert(1)" in page.words
    assert "{{ 7*7 }}" in page.words
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.elements)
    clean = [tag for tag, _ in pages()["fig2"].elements].count("script")
    assert [tag for tag, _ in page.elements].count("script") == clean
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_pages_name_no_address_but_each_other() -> None:
    files = {"index.html", *(f"{name}.html" for name in NAMES)}
    for page in pages().values():
        for _, attributes in page.elements:
            for name in ("src", "href", "action", "data"):
                value = attributes.get(name)
                assert value is None or value in files or value.startswith("#")


# A run directory.


def test_a_run_directory_gets_an_index_and_a_page_each(tmp_path: Path) -> None:
    run = RunDirectory.open(samples.finished_run(tmp_path / "run", [samples.fig2(), samples.not_meaningful()]))
    path = write_report(run)
    assert path == tmp_path / "run" / "report" / "index.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["fig15.html", "fig2.html", "index.html"]
    before = path.read_bytes()
    assert write_report(run).read_bytes() == before


def test_completions_are_not_shown_and_it_says_so(tmp_path: Path) -> None:
    run = RunDirectory.open(samples.finished_run(tmp_path / "run", [samples.fig2()]))
    with pytest.warns(ReportWarning, match="hold no completions"):
        write_report(run, show_completions=True)


def test_the_command_reports_such_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = samples.finished_run(tmp_path / "run", [samples.fig2()])
    with pytest.raises(SystemExit) as ended:
        main(["report", str(path), "--show-completions"])
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert "index.html" in printed.out
    assert printed.err == (
        "warning: the pages of a reproduction hold no completions; they are in the run's completions folder\n"
    )


@pytest.mark.parametrize(
    "command", [["compare", "RUN", "RUN"], ["history", "RUN"], ["judge", "RUN", "--judge", "released"]]
)
def test_other_commands_refuse_it_in_a_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = samples.finished_run(tmp_path / "run", [samples.fig2()])
    with pytest.raises(SystemExit) as ended:
        main([str(path) if part == "RUN" else part for part in command])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert "kind 'reproduction'" in error


def test_no_other_judge_is_asked_about_it(tmp_path: Path) -> None:
    path = samples.finished_run(tmp_path / "run", [samples.fig2()])
    with pytest.raises(InputError, match="what is judged again: audits, scans"):
        rejudge(path, judge_named("released"), None, Silent(), {})

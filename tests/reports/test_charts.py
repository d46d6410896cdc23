"""Figures of rows: within the schema, every point drawn, panels and series told apart, extreme values."""

from __future__ import annotations

import json
import re
from typing import Any

import altair as alt
import experiment_samples as samples
import pytest

from safetyheads.reports import charts
from safetyheads.reports.reproduction import FIGURES, draw

DRAWN = [
    pytest.param(figure, id=f"{outcome['name']}-{figure['kind']}-{at}")
    for outcome in samples.results()["experiments"]
    for at, figure in enumerate(outcome["figures"])
    if figure["points"]
]


def figure_of(kind: str, points: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    about = {"title": "t", "caption": "c", "x": "x", "y": "y", "value": "v", "logarithmic": False, "share": True}
    return about | {"kind": kind, "points": points} | changed


def spec_of(kind: str, points: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    return draw(figure_of(kind, points, **changed)) or {}


def layers_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return list(spec.get("spec", spec)["layer"])


def marks_of(spec: dict[str, Any]) -> list[str]:
    return [layer["mark"]["type"] for layer in layers_of(spec)]


def without_names(value: Any) -> Any:
    if isinstance(value, dict):
        names = ("datasets", "domain", "sort", "values", "title", "description")
        return {key: without_names(inner) for key, inner in value.items() if key not in names}
    return [without_names(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("figure", DRAWN)
def test_every_figure_fits_the_schema_and_has_its_points_and_titles(figure: dict[str, Any]) -> None:
    spec = draw(figure) or {}
    assert len(spec["datasets"]["rows"]) == len(figure["points"])
    panels = {point.get("panel") or "" for point in figure["points"]}
    assert ("facet" in spec) == (len(panels) > 1)
    for layer in layers_of(spec):
        titles = [layer["encoding"][name]["title"] for name in ("x", "y") if name in layer["encoding"]]
        assert titles
        assert all(titles)
    short = spec | {"datasets": {name: rows[:20] for name, rows in spec["datasets"].items()}}
    alt.Chart.from_dict(short, validate=True)
    # The page's script takes a string that begins with two hyphens for a colour, but under the keys of names.
    text = json.dumps(without_names(spec))
    assert "fetch(" not in text
    assert "--paper" not in re.sub(r'"stroke": "--paper"', "", text)


@pytest.mark.parametrize("kind", FIGURES)
def test_every_kind_is_drawn_from_one_point(kind: str) -> None:
    usual = {"x": 3, "y": -2.0, "low": None, "high": None, "series": "a"}
    point: dict[str, Any] = {
        "heads": {"layer": 0, "head": 0, "y": 0.0},
        "matrix": {"x": "a", "y": "b", "value": None},
        "attention": {"query": 0, "key": 0, "query_token": "a", "key_token": "a", "value": 1.0},
    }.get(kind, usual)
    alt.Chart.from_dict(spec_of(kind, [point], share=False), validate=True)
    assert draw(figure_of(kind, [])) is None


def test_shares_run_from_0_to_1_and_zero_stands_at_the_left_end_of_a_logarithmic_axis() -> None:
    for ends, domain in (([0.2], [0, 1]), ([-0.2], None), ([], [0, 1])):
        measured = charts.measured_axis("y", [{"y": y, "low": y, "high": y} for y in ends], True)
        assert measured["scale"].to_dict().get("domain") == domain
    axis = charts.numbers_along("x", [1.0, 0.1, 1e-5, 0.0], True).to_dict()
    assert (axis["scale"]["type"], axis["scale"]["constant"]) == ("symlog", 1e-5 / 4)
    assert axis["axis"]["values"] == pytest.approx([0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])
    assert charts.numbers_along("x", [2.0, 5.0], True).to_dict()["scale"]["type"] == "log"
    assert len(charts.numbers_along("x", [1e-30, 1e30], True).to_dict()["axis"]["values"]) <= 8
    points = [{"x": x, "y": 0.5, "series": ""} for x in (-1.0, 0.0, 0.1)]
    assert len(spec_of("scatter", points, logarithmic=True)["datasets"]["rows"]) == 2


def test_series_look_alike_on_every_page_and_differ_on_each() -> None:
    series = ["SC", "other", "vanilla", "UA"]
    known = dict(zip(series, charts.series_colours(series), strict=True))
    assert (known["UA"][0], known["SC"][0], known["other"][0]) == ("--attack", "--kept", "--random")
    assert len({colour for colour, _ in known.values()}) == 4
    names = [f"s{number}" for number in range(14)]
    look = charts.series_look(names, "shape", "strokeDash")
    ranges = [look[channel].to_dict()["scale"]["range"] for channel in ("color", "shape", "strokeDash")]
    assert len({json.dumps(one) for one in zip(*ranges, strict=True)}) == 14
    bars = charts.series_colours(["vanilla", *names[:8]])
    assert len(set(bars)) == 9


def test_intervals_and_names_are_drawn_among_few_points_only() -> None:
    points = [{"x": k, "y": 0.5, "low": 0.4, "high": 0.6, "series": ""} for k in range(charts.MOST_INTERVALS + 1)]
    assert marks_of(spec_of("scatter", points)) == ["point"]
    assert marks_of(spec_of("scatter", points[:-1])) == ["rule", "point"]
    named = [point | {"label": f"1-{k}", "y": k / 100} for k, point in enumerate(points)]
    rows = spec_of("scatter", named)["datasets"]["rows"]
    assert [row["label"] for row in rows if row.get("named")] == ["1-58", "1-59", "1-60"]


def test_bars_of_nothing_have_a_dash_and_changes_a_line_at_0() -> None:
    empty = {"x": "a", "y": None, "low": None, "high": None, "n": 0, "series": "UA"}
    assert marks_of(spec_of("bars", [empty])) == ["bar", "tick", "rule", "text"]
    lost = {"x": "a", "y": -0.1, "low": -0.2, "high": 0.1, "n": 9, "series": "UA"}
    assert marks_of(spec_of("bars", [lost]))[0] == "rule"


def test_a_browser_without_javascript_gets_a_picture_of_every_figure() -> None:
    rows = [{"x": at, "y": 0.1 * at, "low": 0.0, "high": 0.5, "series": "UA", "panel": ""} for at in range(3)]
    columns = {"n_heads": 4, "scores": {"s": [0.5] * 8}, "best_first": ["0-0"], "named": ["0-0"]}
    wide = charts.head_map(charts.heat("s", [0.5], "nats"), (2, 4), [], "all heads")
    found = charts.pictures({"lines": charts.lines(rows, "x", "y", "d"), "map": wide}, columns)
    for name, address in found.items():
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64", name
        assert len(data) > 2000, name
    assert found == charts.pictures({"lines": charts.lines(rows, "x", "y", "d"), "map": wide}, columns)


@pytest.mark.parametrize(("layers", "heads"), [(30, 9), (32, 32), (80, 64), (126, 128)])
def test_maps_of_all_heads_are_square(layers: int, heads: int) -> None:
    drawn = charts.head_map(charts.heat("s", [0.5], "nats"), (layers, heads), [], "all heads")
    assert drawn["width"] / heads == drawn["height"] / layers
    assert drawn["usermeta"]["square"][:2] == [layers, heads]
    assert 190 <= max(drawn["width"], drawn["height"]) <= 800

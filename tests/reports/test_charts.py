"""Figures of rows: within the schema, every point drawn, panels and series told apart, extreme values."""

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
    for layer in spec.get("spec", spec)["layer"]:
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
    alt.Chart.from_dict(draw(figure_of(kind, [point], share=False)), validate=True)
    assert draw(figure_of(kind, [])) is None


def test_a_browser_without_javascript_gets_a_picture_of_every_figure() -> None:
    rows = [{"x": at, "y": 0.1 * at, "low": 0.0, "high": 0.5, "series": "UA", "panel": ""} for at in range(3)]
    columns = {"n_heads": 4, "scores": {"s": [0.5] * 8}, "best_first": ["0-0"], "named": ["0-0"]}
    wide = charts.head_map(charts.heat("s", [0.5], "nats"), (2, 4), [], "all heads")
    rows[0]["series"] = "a run\x1b of any name"
    found = charts.pictures({"lines": charts.lines(rows, "x", "y", "d"), "map": wide}, columns)
    for name, address in found.items():
        kind, _, data = address.partition(",")
        assert kind == "data:image/png;base64", name
        assert len(data) > 2000, name
    assert found == charts.pictures({"lines": charts.lines(rows, "x", "y", "d"), "map": wide}, columns)


def test_the_drawing_library_is_whole_and_loads_nothing() -> None:
    library = charts.drawing_library()
    assert "window.vegaEmbed=" in library
    assert not re.search(r"</script|<!--|jsdelivr|unpkg|cdnjs|googleapis|\bimport\s*\(", library)
    assert len(library) < 1_200_000


def test_the_drawing_library_is_put_together_once_and_where_nothing_can_be_kept_each_time(tmp_path, monkeypatch):
    bundle, made = charts.drawing_library(), []
    monkeypatch.setattr(charts.vl_convert, "javascript_bundle", lambda *_, **__: made.append(1) or bundle)
    (tmp_path / "a file").touch()
    for folder, n_made in ((tmp_path / "cache", 1), (tmp_path / "a file", 3)):
        monkeypatch.setenv("SAFETYHEADS_CACHE", str(folder))
        for _ in range(2):
            assert charts.drawing_library.__wrapped__() == bundle
        assert len(made) == n_made

"""A reproduction's pages in a browser: drawn, quiet, readable in both themes, on a phone and on a wide screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import experiment_samples as samples
import pytest

# The fixtures and measures of the audit's report serve this one too.
from test_audit_browser import CHROMIUM, CONTRAST, LABELS, THEMES, browser, show

from safetyheads.reports.audit import write_report
from safetyheads.runs.directory import RunDirectory

__all__ = ["browser", "show"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="browser tests need Chromium on the path")

WIDTHS = (390, 1280)
NAMES = ("index", *(outcome.name for outcome in samples.outcomes()))
DRAWN = tuple(outcome.name for outcome in samples.outcomes() if any(figure.points for figure in outcome.figures))
OVERLAPS = """() => {
  // Labels of one axis, and numbers in tiles: none over another.
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const found = [];
  for (const place of document.querySelectorAll("[data-chart]")) {
    const groups = [...place.querySelectorAll(".role-axis-label, .mark-text.role-mark")];
    for (const group of groups) {
      const boxes = [...group.querySelectorAll("text")].filter((text) => text.textContent.trim()
        && getComputedStyle(text).opacity !== "0").map((text) => [text.textContent, text.getBoundingClientRect()]);
      boxes.forEach(([one, a], at) => boxes.slice(at + 1).forEach(([other, b]) => {
        if (meet(a, b)) found.push([place.dataset.chart, one, other]);
      }));
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    run = samples.finished_run(tmp_path_factory.mktemp("experiments") / "run")
    index = write_report(RunDirectory.open(run))
    return {name: index.with_name(f"{name}.html") for name in NAMES}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_drawn_quietly_and_fits(show: Any, name: str, width: int) -> None:
    shown = show(name, width)
    for place in shown.page.query_selector_all("[data-chart]"):
        assert place.query_selector("svg"), place.get_attribute("data-chart")
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.complaints == []
    assert shown.requests == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", DRAWN)
def test_labels_are_inside_their_place_and_off_each_other(show: Any, name: str, width: int) -> None:
    page = show(name, width).page
    for chart in page.evaluate(LABELS):
        left, width_of_place = chart["place"]
        assert chart["drawn"] > 0.9 * width_of_place, chart["name"]
        for text, start, end in chart["labels"]:
            assert left - 1 <= start, (chart["name"], text)
            assert end <= left + width_of_place + 1, (chart["name"], text)
    assert page.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("name", DRAWN)
def test_axes_are_titled_and_colours_explained(show: Any, name: str) -> None:
    page = show(name).page
    for figure in page.query_selector_all("figure.experiment"):
        panels = figure.query_selector_all("[data-chart]")
        for panel in panels:
            assert len(panel.query_selector_all(".role-axis-title text")) == 2
        keys = [key.inner_text().strip() for key in figure.query_selector_all(".colours li")]
        ramp = figure.query_selector(".ramp")
        marks = figure.query_selector_all(".mark-line path, .mark-symbol path, .mark-rect path")
        fills = {
            mark.evaluate("mark => getComputedStyle(mark).fill + getComputedStyle(mark).stroke") for mark in marks[:400]
        }
        assert keys or ramp or len(fills) <= 2 or not panels
        assert all(keys)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["index", "fig2", "fig15", "transfer", "table1", "fig7"])
def test_text_has_contrast(show: Any, theme: str, name: str) -> None:
    found = show(name, theme=theme).page.evaluate(CONTRAST)
    assert found["seen"] > 30
    assert found["weak"] == []


def test_a_bar_tells_its_interval_and_n(show: Any) -> None:
    shown = show("fig2")
    bars = shown.page.query_selector_all("[data-chart='0-0'] .mark-rect path")
    bars[1].hover(force=True)
    text = shown.page.wait_for_selector("#vg-tooltip-element.visible").inner_text()
    for said in ("UA", "damage", "0.542", "0.351", "0.721", "24"):
        assert said in text
    assert shown.complaints == []


def test_zero_is_named_at_the_left_end_of_a_logarithmic_axis(show: Any) -> None:
    page = show("epsilon").page
    labels = page.query_selector_all("[data-chart='0-0'] .role-axis-label text")
    texts = [label.text_content() for label in labels]
    assert texts[0] == "0"
    assert "1" in texts


def test_the_index_leads_to_a_page_and_back(show: Any, reports: dict[str, Path]) -> None:
    page = show("index").page
    assert page.get_attribute("ol.experiments a", "href") == "fig2.html"
    assert "All experiments" in show("fig2").page.inner_text("nav.beside")


def test_hostile_names_are_text_in_the_legend(show: Any) -> None:
    shown = show("epsilon")
    legend = shown.page.inner_text("ul.colours")
    assert samples.HOSTILE in legend
    assert "--paper" in legend
    assert shown.page.query_selector("main img") is None
    assert shown.complaints == []


def test_pages_follow_a_change_of_theme(show: Any) -> None:
    shown = show("fig4b", theme="light")
    shown.page.emulate_media(color_scheme="dark")
    shown.page.wait_for_selector("html[data-drawn=dark]")
    assert len(shown.page.query_selector_all("[data-chart] svg")) == 5
    assert shown.complaints == []


def test_every_page_stays_under_5_mb(reports: dict[str, Path]) -> None:
    assert max(path.stat().st_size for path in reports.values()) < 5_000_000


def test_the_keyboard_reaches_every_table(show: Any) -> None:
    page = show("table1", 390).page
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-labelledby')"))
    assert "table-1" in reached

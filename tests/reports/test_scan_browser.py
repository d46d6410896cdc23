"""A scan's report as a browser shows it: drawn, quiet, readable, and answer by answer on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import scan_samples
from scan_samples import Sample

# The fixtures and measures of the audit's report serve this one too.
from test_audit_browser import CHROMIUM, CONTRAST, LABELS, THEMES, browser, playwright, show

from safetyheads.reports.audit import write_report

__all__ = ["browser", "show"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="browser tests need Chromium on the path")

WIDTHS = (400, 1280)
HOSTILE = '<script>fetch("https://attacker.example")</script><img src=x onerror=alert(1)>'
SAMPLES = {"whole": Sample(), "bare": Sample(optional=False, benign=False, n_judges=1), "seeds": Sample(n_seeds=2)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scans")
    written = {name: write_report(scan_samples.finished_run(folder / name, sample)) for name, sample in SAMPLES.items()}
    texts = scan_samples.finished_run(folder / "texts", Sample(text=HOSTILE))
    return written | {"texts": write_report(texts, show_completions=True)}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [*SAMPLES, "texts"])
def test_the_page_is_drawn_quietly_and_fits(show: Any, name: str, width: int) -> None:
    shown = show(name, width)
    for details in shown.page.query_selector_all("summary"):
        details.click()
    places = shown.page.query_selector_all("[data-chart]")
    assert len(places) == (1 if name == "bare" else 9)
    for place in places:
        assert place.query_selector("svg"), place.get_attribute("data-chart")
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.complaints == []
    assert shown.requests == []


@pytest.mark.parametrize("width", WIDTHS)
def test_charts_fill_their_place_and_keep_their_labels_inside(show: Any, width: int) -> None:
    for chart in show("whole", width).page.evaluate(LABELS):
        left, width_of_place = chart["place"]
        assert chart["drawn"] > 0.9 * width_of_place, chart["name"]
        for text, start, end in chart["labels"]:
            assert left - 1 <= start, (chart["name"], text)
            assert end <= left + width_of_place + 1, (chart["name"], text)


@pytest.mark.parametrize("theme", THEMES)
def test_text_has_contrast(show: Any, theme: str) -> None:
    found = show("whole", theme=theme).page.evaluate(CONTRAST)
    assert found["seen"] > 200
    assert found["weak"] == []


def test_a_click_in_the_map_shows_the_answers_of_the_head(show: Any) -> None:
    shown = show("whole")
    page = shown.page
    tiles = page.query_selector_all("[data-chart=asr_alone] g.mark-rect path")
    # The ground of all eight heads comes first, layer after layer; 1-2 is the seventh.
    tiles[6].hover(force=True)
    tooltip = page.wait_for_selector("#vg-tooltip-element.visible").inner_text()
    assert "1-2" in tooltip
    assert "4 of 12" in tooltip
    tiles[6].click(force=True)
    assert page.input_value("#drill-head") == "1-2"
    assert page.query_selector_all("#drill-rows tr").__len__() == 12
    summary = page.inner_text("#drill-summary")
    assert summary.startswith("1-2, harmful prompts: 12 of 12 answers shown, 4 changed.")
    assert "paper: 4 of 12 complied" in summary
    assert shown.complaints == []


def test_the_keyboard_chooses_head_set_and_changed_answers(show: Any) -> None:
    page = show("whole", 400).page
    page.focus("#drill-head")
    assert page.input_value("#drill-head") == "0-1"
    page.keyboard.press("ArrowDown")
    assert page.input_value("#drill-head") == "1-2"
    page.select_option("#drill-set", "benign")
    page.focus("#drill-changed")
    page.keyboard.press("Space")
    rows = page.query_selector_all("#drill-rows tr")
    assert len(rows) == 10
    text = rows[0].inner_text()
    assert "incoherent" in text
    assert "repeats 'lamp'" in text
    assert "changed" in text
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-labelledby')"))
    assert {"drill", "qualities", "all-groups", "agreement"} <= reached


def test_several_seeds_have_a_row_each(show: Any) -> None:
    page = show("seeds").page
    assert "Seed" in page.inner_text("#drill-columns")
    assert len(page.query_selector_all("#drill-rows tr")) == 24


def test_the_first_screen_answers(show: Any) -> None:
    page = show("whole").page
    for selector in (".badge", "#sentence", "#limits", "[data-chart=asr_alone]", "[data-chart=harmful_and_benign]"):
        assert page.query_selector(selector).bounding_box()["y"] < 1000, selector
    assert page.query_selector("#sentence").bounding_box()["y"] < 250


def test_completions_are_folded_away_and_shown_as_text(show: Any) -> None:
    page = show("texts").page
    completion = page.query_selector(".completion pre")
    assert not completion.is_visible()
    page.query_selector("section[aria-labelledby=completions] summary").click()
    assert completion.is_visible()
    assert "<script>fetch(" in completion.inner_text()


def test_the_page_follows_a_change_of_theme(show: Any) -> None:
    shown = show("whole", theme="light")
    shown.page.emulate_media(color_scheme="dark")
    shown.page.wait_for_selector("html[data-drawn=dark]")
    assert len(shown.page.query_selector_all("[data-chart] svg")) == 9
    playwright.expect(shown.page.locator("#drill-rows tr")).to_have_count(12)
    assert shown.complaints == []

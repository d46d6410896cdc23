"""The report as a browser shows it: drawn, quiet, readable in both themes, on a phone and on a wide screen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import audit_samples
import pytest

from safetyheads.reports.audit import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="browser tests need Chromium on the path")

THEMES = ("light", "dark")
WIDTHS = (400, 1600)
CONTRAST = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const weak = [];
  let seen = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    const hidden = element.closest("script, style, noscript, .skip") || !element.getClientRects().length;
    if (!node.data.trim() || hidden) continue;
    const style = getComputedStyle(element);
    const ink = channels(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    seen += 1;
    if ((a + 0.05) / (b + 0.05) < 4.5) weak.push(`${node.data.trim().slice(0, 40)} ${(a + 0.05) / (b + 0.05)}`);
  }
  return { seen, weak };
}"""
LABELS = """() => [...document.querySelectorAll("[data-chart]")].map((place) => {
  const box = place.getBoundingClientRect();
  const labels = [...place.querySelectorAll("svg text")].filter((text) => text.textContent.trim());
  return {
    name: place.dataset.chart, place: [box.left, box.width],
    drawn: place.querySelector("svg").getBoundingClientRect().width,
    labels: labels.map((text) => [text.textContent, text.getBoundingClientRect()])
      .map(([text, bounds]) => [text, bounds.left, bounds.right]),
  };
})"""


@dataclass
class Shown:
    """A page, what it complained of, and what it asked the network for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # No sandbox: containers that run tests as root have no namespaces for it, and the page is our own.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    hostile = audit_samples.audit()
    hostile["model"]["name"] = "a-very-long-organisation-name/" + "model-with-a-name-that-does-not-end-" * 6
    hostile["warnings"], hostile["caveats"] = [audit_samples.HOSTILE], [audit_samples.HOSTILE + "x" * 300]
    samples = {
        "organism": audit_samples.audit(),
        "large": audit_samples.audit(32, 32),
        "none_found": audit_samples.none_found(),
        "no_refusals": audit_samples.no_refusals(),
        "hostile": hostile,
    }
    written = {}
    for name, results in samples.items():
        rows = audit_samples.completions(results, audit_samples.HOSTILE * 5)
        run = audit_samples.finished_run(folder / name, results, rows)
        written[name] = write_report(run, show_completions=name == "hostile")
    return written


@pytest.fixture
def show(browser: Any, reports: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Opens a report and waits until it is drawn; every request but that for the file itself is refused.

    As wide as the widest of the asking module's widths, unless told otherwise.
    """
    contexts = []

    def opened(name: str, width: int = request.module.WIDTHS[-1], theme: str = "light") -> Shown:
        context = browser.new_context(
            viewport={"width": width, "height": 1000}, color_scheme=theme, reduced_motion="reduce"
        )
        contexts.append(context)
        shown = Shown(context.new_page())
        address = reports[name].as_uri()

        def decide(route: Any) -> None:
            if route.request.url == address:
                route.continue_()
            else:
                shown.requests.append(route.request.url)
                route.abort()

        context.route("**/*", decide)
        shown.page.on("console", lambda message: shown.complaints.append(message.text))
        shown.page.on("pageerror", lambda error: shown.complaints.append(str(error)))
        shown.page.on("dialog", lambda dialog: shown.complaints.append("a dialog opened"))
        shown.page.goto(address)
        shown.page.wait_for_selector("html[data-drawn]")
        return shown

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["organism", "large", "none_found", "no_refusals", "hostile"])
def test_the_page_is_drawn_quietly_and_fits(show: Any, name: str, width: int) -> None:
    shown = show(name, width)
    for details in shown.page.query_selector_all("summary"):
        details.click()
    places = shown.page.query_selector_all("[data-chart]")
    assert len(places) >= 5
    for place in places:
        assert place.query_selector("svg"), place.get_attribute("data-chart")
        assert place.bounding_box()["width"] <= width
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.complaints == []
    assert shown.requests == []


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_charts_fill_their_place_and_keep_their_labels_inside(show: Any, width: int, theme: str) -> None:
    shown = show("large", width, theme)
    charts = shown.page.evaluate(LABELS)
    assert len(charts) == 8
    for chart in charts:
        left, width_of_place = chart["place"]
        assert chart["drawn"] > 0.9 * width_of_place, chart["name"]
        assert len(chart["labels"]) > 6, chart["name"]
        for text, start, end in chart["labels"]:
            assert left - 1 <= start, (chart["name"], text)
            assert end <= left + width_of_place + 1, (chart["name"], text)


def test_the_curve_names_its_axes_and_lines(show: Any) -> None:
    text = show("organism").page.text_content("[data-chart=asr_by_size]")
    for label in ("heads ablated together", "share of held-out prompts", "searched group: ASR", "random groups: ASR"):
        assert label in text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_tile_of_the_heatmap_tells_its_head_and_score(show: Any, width: int) -> None:
    shown = show("large", width)
    chart = shown.page.query_selector("[data-chart=heatmap_mean_ships]")
    chart.scroll_into_view_if_needed()
    tiles = chart.query_selector_all("g.mark-rect path")
    assert len(tiles) >= 1024
    # The tile of 2-26 is row 2, column 26 of the 32 x 32 tiles, which come first, layer after layer.
    head = tiles[2 * 32 + 26]
    head.hover(force=True)
    tooltip = shown.page.wait_for_selector("#vg-tooltip-element.visible")
    text = tooltip.inner_text()
    assert "2-26" in text
    assert "3.4" in text
    box = tooltip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert shown.complaints == []


@pytest.mark.parametrize("name", ["organism", "none_found", "no_refusals"])
@pytest.mark.parametrize("theme", THEMES)
def test_text_has_contrast(show: Any, theme: str, name: str) -> None:
    shown = show(name, theme=theme)
    found = shown.page.evaluate(CONTRAST)
    assert found["seen"] > 100
    assert found["weak"] == []


def test_the_page_and_its_charts_follow_a_change_of_theme(show: Any) -> None:
    shown = show("organism", theme="light")
    colours = """() => [
      getComputedStyle(document.body).backgroundColor,
      getComputedStyle(document.querySelector("[data-chart=asr_by_size] .role-axis-title text")).fill,
    ]"""
    light = shown.page.evaluate(colours)
    shown.page.emulate_media(color_scheme="dark")
    shown.page.wait_for_selector("html[data-drawn=dark]")
    dark = shown.page.evaluate(colours)
    assert all(before != after for before, after in zip(light, dark, strict=True))
    places = len(shown.page.query_selector_all("[data-chart]"))
    assert len(shown.page.query_selector_all("[data-chart] svg")) == places
    assert shown.complaints == []


def test_charts_follow_the_width_of_the_window(show: Any) -> None:
    shown = show("organism", 1600)
    width = "document.querySelector('[data-chart=long_tail] svg').getBoundingClientRect().width"
    before = shown.page.evaluate(width)
    shown.page.set_viewport_size({"width": 400, "height": 900})
    playwright.expect(shown.page.locator("[data-chart=long_tail] svg[width^='3']")).to_have_count(1)
    assert before > 400
    assert shown.page.evaluate(width) < 400
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_first_screen_answers(show: Any) -> None:
    page = show("organism").page
    for selector in (".badge", "#sentence", "#limits", "[data-chart=asr_by_size]", "#top-heads"):
        box = page.query_selector(selector).bounding_box()
        assert box["y"] < 1000, selector
    assert page.query_selector("#sentence").bounding_box()["y"] < 250


def test_the_keyboard_reaches_every_wide_table(show: Any) -> None:
    page = show("organism", 400).page
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-labelledby')"))
    assert {"top-heads", "sahara-mean_ships", "groups", "openers"} <= reached


def test_completions_are_folded_away_and_shown_as_text(show: Any) -> None:
    page = show("hostile").page
    completion = page.query_selector(".completion pre")
    assert not completion.is_visible()
    page.query_selector("section[aria-labelledby=completions] summary").click()
    assert completion.is_visible()
    assert completion.inner_text().startswith("<script>fetch(")

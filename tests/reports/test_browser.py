"""Pages as a browser shows them: drawn, quiet, readable in both themes, wide and on a phone, and answering clicks."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audit_samples
import experiment_samples
import pytest
import scan_samples
from run_samples import audit_run, compared_record, first, settings
from scan_samples import Sample

from safetyheads.reports import page
from safetyheads.reports.compare import write_comparison
from safetyheads.reports.write import write_history, write_report
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.history import read_history

playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright: pip install playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="browser tests need Chromium on the path")
EXPERIMENTS = ("index", "fig2", "fig4b", "fig7", "table1", "transfer", "epsilon")
STEPS = ("ships", "sahara", "asr")
NAMES = ("audit", "large", "no_refusals", "scan", "compare", "whole_history", *STEPS, *EXPERIMENTS)
MODES = (("light", 1400), ("dark", 390))
FAULTS = Path(__file__).with_name("faults.js").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # No sandbox: containers that run tests as root have no namespaces for it, and the page is our own.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, steps: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    payload = f'"\'><script>window.ran = 1</script><img src=x onerror="window.ran = 1">{"W" * 2000}{"9" * 500}-1'
    hostile = audit_samples.audit()
    hostile["model"]["name"] = "a-very-long-organisation-name/" + "model-with-a-name-that-does-not-end-" * 6
    hostile["warnings"], hostile["caveats"] = [audit_samples.HOSTILE], [audit_samples.HOSTILE + "x" * 300]
    audits = {
        "audit": hostile,
        "attacked": audit_samples.attacked(payload)[0],
        "large": audit_samples.audit(32, 32),
        "deep": audit_samples.audit(30, 9),
        "no_refusals": audit_samples.no_refusals(),
    }
    runs = {name: audit_samples.finished_run(folder / name, made) for name, made in audits.items()}
    runs["scan"] = scan_samples.finished_run(folder / "scan", Sample(text=audit_samples.HOSTILE))
    written = {}
    for name, run in runs.items():
        with pytest.MonkeyPatch.context() as patch:
            if name in ("audit", "deep"):  # whose figures the largest and the attacked page have too
                patch.setattr(page, "pictures", lambda *_: {})
            written[name] = write_report(run, show_completions=name == "scan")[0]
    compared = compared_record(
        audit_run(folder / "a"), audit_run(folder / "b", vanilla=first(9), config=settings(seed=3))
    )
    written["compare"] = write_comparison(compared, folder / "compared")
    written |= {name: write_report(RunDirectory.open(steps / name), show_completions=True)[0] for name in STEPS}
    history = read_history(folder)
    written["whole_history"] = write_history(history)[0].rename(folder / "whole_history.html")
    for entry in history["runs"]:
        entry |= {"name": payload, "model": payload, "top_heads": [payload], "group": [payload]}
    written["history"] = write_history({**history, "skipped": [{"name": payload, "reason": payload}]})[0]
    html, script = written["audit"].read_text(), "<script>window.ran = 1</script>"
    written["unescaped"] = folder / "unescaped.html"
    written["unescaped"].write_text(
        html.replace("<main>", f"<main>{script}<p onclick='window.ran = 1' id=trap>x</p>", 1)
    )
    index, _ = write_report(RunDirectory.open(experiment_samples.finished_run(folder / "experiments")))
    return {name: index.with_name(f"{name}.html") for name in EXPERIMENTS} | written


@pytest.fixture
def show(browser: Any, reports: dict[str, Path]) -> Iterator[Any]:
    contexts = []

    def shown(name: str, theme: str = "light", width: int = 1400) -> tuple[Any, list[str]]:
        """The page, drawn, and what it complains of or asks the network for."""
        contexts.append(browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900}))
        page, complaints, address = contexts[-1].new_page(), list[str](), reports[name].as_uri()
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: complaints.append(asked.url) if asked.url != address else None)
        page.goto(address)
        page.wait_for_selector("html[data-drawn]", timeout=60_000)
        return page, complaints

    yield shown
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("name", "width"), [("attacked", 1400), ("attacked", 390), ("history", 390)])
def test_what_comes_from_outside_does_not_run_and_widens_no_page(show: Any, name: str, width: int) -> None:
    page, complaints = show(name, width=width)
    for details in page.query_selector_all("summary"):
        details.click()
    assert page.evaluate("window.ran") is None
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("document.querySelectorAll('main img').length") == 0
    assert complaints == []


def test_what_were_on_the_page_unescaped_would_not_run_either(show: Any) -> None:
    page, complaints = show("unescaped")
    page.query_selector("#trap").dispatch_event("click")
    assert page.evaluate("window.ran") is None
    assert len(complaints) == 2
    assert all("Content Security Policy" in said for said in complaints)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_drawn_quietly_fits_and_can_be_read(show: Any, name: str) -> None:
    for theme, width in MODES:
        page, complaints = show(name, theme, width)
        for details in page.query_selector_all("summary"):
            details.click()
        assert page.evaluate(FAULTS) == []
        assert complaints == []


def test_a_printed_page_has_few_pages_and_a_chart_is_saved_as_a_picture(show: Any) -> None:
    for name in ("audit", "scan", "compare", *STEPS):
        page, _ = show(name)
        page.emulate_media(media="print")
        n_pages = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
        assert 1 <= n_pages < 8, name
    page, complaints = show("scan")
    with page.expect_download() as saved:
        page.click("[aria-label='Save asr_alone as PNG']")
    assert Path(saved.value.path()).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert complaints == []


@pytest.mark.parametrize("name", ["deep", "large"])
def test_a_map_of_heads_is_of_squares(show: Any, name: str) -> None:
    for width in (1400, 400):
        page, _ = show(name, width=width)
        tiles = """() => [...document.querySelectorAll("[data-chart^=heatmap_] .mark-rect.role-mark path")].map(
          (tile) => tile.getBBox()).map((box) => [box.width, box.height])"""
        sides = page.evaluate(tiles)
        assert len(sides) > 200
        assert {round(w / h, 2) for w, h in sides} == {1.0}, width


def test_charts_follow_the_theme_and_the_width_of_the_window(show: Any) -> None:
    page, complaints = show("fig2")
    look = """() => [getComputedStyle(document.body).backgroundColor,
      getComputedStyle(document.querySelector("[data-chart] .role-axis-title text")).fill]"""
    before = page.evaluate(look)
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-drawn^=dark]")
    assert all(light != dark for light, dark in zip(before, page.evaluate(look), strict=True))
    page.set_viewport_size({"width": 400, "height": 900})
    page.wait_for_selector("html[data-drawn$=' 400']")
    assert page.evaluate(FAULTS) == []
    # A dark page is printed light.
    page.emulate_media(media="print")
    page.wait_for_selector("html[data-drawn^=light]")
    assert len(page.pdf()) > 50_000
    assert complaints == []


def test_a_click_and_the_keyboard_show_the_answers_of_a_head(show: Any) -> None:
    page, complaints = show("scan")
    # 1-2 is the seventh of eight heads.
    tile = page.query_selector_all("[data-chart=asr_alone] g.mark-rect path")[6]
    tile.hover(force=True)
    assert "4 of 12" in page.wait_for_selector("#vg-tooltip-element.visible").inner_text()
    tile.click(force=True)
    assert page.input_value("#answers-group") == "1-2"
    summary = page.inner_text("#answers-summary")
    assert summary.startswith("1-2, harmful prompts: 4 of 12 answers shown, 4 flip, 4 changed.")
    assert "paper: 4 of 12 complied" in summary
    texts = page.query_selector_all("#answers-rows pre")
    page.check("#answers-texts")
    assert (len(texts), len(page.query_selector_all("#answers-rows pre"))) == (0, 8)
    page.fill("#answers-search", "take 3")
    assert len(page.query_selector_all("#answers-rows tr")) == 1
    page.fill("#answers-search", "")
    page.select_option("#answers-set", "benign")
    page.focus("#answers-flips")
    page.keyboard.press("Space")
    page.select_option("#answers-label", "incoherent")
    rows = page.query_selector_all("#answers-rows tr")
    assert len(rows) == 10
    assert "repeats 'lamp'" in rows[0].inner_text()
    page.focus(".skip")
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        reached.add(page.evaluate("document.activeElement.dataset.chart ?? null"))
    assert {"Groups", "Agreement of judges", "asr_alone"} <= reached
    with page.expect_download() as saved:
        page.click("[aria-label='Save asr_alone as SVG']")
    assert "<svg" in Path(saved.value.path()).read_text()
    with page.expect_download() as saved:
        page.click("[aria-label^='Heads, each'] + .save button")
    assert Path(saved.value.path()).read_text().startswith('"Head","ASR alone 95 % interval"')
    assert complaints == []


def test_every_page_stays_under_5_mb(reports: dict[str, Path]) -> None:
    assert max(path.stat().st_size for path in reports.values()) < 5_000_000

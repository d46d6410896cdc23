"""The page of a comparison and its Markdown: every number, text from outside as text, no head in a pull request."""

from pathlib import Path

import pytest
from audit_samples import HOSTILE
from report_pages import Page, check_closed, check_hostile, check_snapshot, check_tables
from run_samples import audit_run, compared_record, first, rewritten, scan_run, settings

from safetyheads.reports.compare import comparison_markdown, comparison_page


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages name the paths that were given
    audit_run(Path("a"))
    tuned = settings(weights_sha256="tuned", seed=3)
    return audit_run(
        Path("b"), vanilla=first(9), heads=("2-1", "0-1"), config=tuned, benign=["refused"] + ["complied"] * 19
    )


def test_the_page_has_every_number(runs):
    found = compared_record("a", "b")
    page = Page(comparison_page(found))
    check_closed(page)
    check_tables(page)
    check_snapshot(page, "compare")
    assert comparison_page(found) == comparison_page(found)


def test_the_page_of_other_outcomes(runs, tmp_path):
    early = audit_run(Path("early"), groups=[], stopped_early="it refuses none", config=settings(weights_sha256="x"))
    other = audit_run(Path("other"), config=settings("other", weights_sha256="x"))
    scans = [scan_run(tmp_path / name, {}, n_layers=n) for name, n in (("s", 4), ("t", 3))]
    for found, words in (
        (compared_record("a", early), "cannot be compared"),
        (compared_record("a", other, ()), "compared with warnings"),
        (compared_record(*scans, ("spearman < 0.9",)), "a gate could not be judged"),
    ):
        page = Page(comparison_page(found))
        check_closed(page)
        check_tables(page)
        assert words in comparison_markdown(found)


def test_markdown_names_no_head(runs):
    text = comparison_markdown(compared_record("a", "b"))
    assert not any(head in text for head in ("1-3", "2-1", "0-1", "2-5"))
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| `")}) == 1


def test_names_from_outside_are_text(runs):
    pages = []
    for name in ("clean", "mine | `x` @team <b>[y](https://attacker.example)" + HOSTILE):
        rewritten("b", model={"name": name})
        found = compared_record("a", "b")
        pages.append(Page(comparison_page(found)))
        text = comparison_markdown(found)
    check_hostile(pages[1], pages[0])
    (line,) = [line for line in text.splitlines() if line.startswith("- B: ")]
    # All of it stands in one span of code, and no bar of it ends a cell.
    assert line.count("`") == 2
    assert line.index("`") < line.index("mine \\|") < line.index("onerror") < line.rindex("`")

"""The page of a history: every run, text as text, a point for each number."""

import json
import re

import pytest
from audit_samples import HOSTILE
from run_samples import audit_run, first, scan_run

from safetyheads.reports.history import over_runs, write_history
from safetyheads.runs.history import read_history


@pytest.fixture
def folder(tmp_path):
    audit_run(tmp_path / "late", started="2026-01-09T10:00:00+00:00", vanilla=first(9))
    audit_run(tmp_path / "deep" / "early", started="2026-01-01T10:00:00+00:00")
    scan_run(tmp_path / "scanned", {"1-3": 12}, started="2026-01-05T10:00:00+00:00")
    return tmp_path


def test_the_page_has_every_run_and_no_address(folder):
    (folder / "bad").mkdir()
    (folder / "bad" / "manifest.json").write_text("{")
    page = write_history(read_history(folder)).read_text()
    body = page[: page.index('<script type="application/json"')]
    for text in ("deep/early", "scanned", "late", "2026-01-09 10:00", "1-3", "paired", "Skipped", "not valid JSON"):
        assert text in body
    assert not re.search(r"https?://", body)
    assert "{{" not in body
    assert page == (folder / "history.html").read_text()
    assert write_history(read_history(folder)).read_text() == page


def test_names_on_the_page_are_text(tmp_path):
    run = audit_run(tmp_path / "a")
    results = json.loads((run / "results.json").read_text())
    results["model"]["name"] = HOSTILE
    (run / "results.json").write_text(json.dumps(results))
    page = write_history(read_history(tmp_path)).read_text()
    assert "<script>fetch(" not in page
    assert "onerror=alert(1)>" not in page


def test_the_chart_has_a_point_for_each_number_that_exists(folder):
    spec = over_runs(read_history(folder))
    (rows,) = spec["datasets"].values()
    counts = {series: sum(row["series"] == series for row in rows) for series in {row["series"] for row in rows}}
    assert counts == {"ASR, nothing ablated": 3, "ASR, verdict’s group ablated": 2, "concentration": 2}
    assert all(row["low"] <= row["y"] <= row["high"] for row in rows)
    assert {row["x"] for row in rows} == {1, 2, 3}

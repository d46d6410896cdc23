"""What makes no page is refused; the page of a history has every run, text as text, a point for each number."""

import pytest
from audit_samples import HOSTILE
from report_pages import Page, check_closed, check_tables
from run_samples import audit_run, first, rewritten, scan_run

from safetyheads.errors import InputError
from safetyheads.reports.page import command_of
from safetyheads.reports.write import write_history, write_report
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.history import read_history


def test_results_of_another_kind_are_refused(tmp_path):
    with RunDirectory.start(tmp_path / "run", {}, {}) as run:
        run.write_results({"schema_version": 1, "kind": "sahara"})
        with pytest.raises(InputError, match="'sahara', schema 1"):
            write_report(run)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("run", "scan M --limit 3 --out a"),
        ("shard-3-of-8", "scan M --limit 3 --out=b --shard 3/8 --wait 9.0"),
        ("shard-0-of-8", "plan 8 scan M --limit 3 --out b"),
        ("run", "scan M --limit 3 --ray local --workers 3 --gpus-per-worker 1 --judge-workers=2"),
    ],
)
def test_the_command_to_copy_is_that_of_one_process_whoever_computed(tmp_path, part, words):
    RunDirectory.start(tmp_path, {}, {"command": ["safetyheads", "merge", "b", "a"]}, "merge").close()
    with RunDirectory.start(tmp_path, {}, {"command": ["/bin/safetyheads", *words.split()]}, part) as run:
        assert command_of(run) == "safetyheads scan M --limit 3"


def test_a_history_has_every_run_as_text_and_a_point_for_each_number(tmp_path):
    late = audit_run(tmp_path / "late", started="2026-01-09T10:00:00+00:00", vanilla=first(9))
    audit_run(tmp_path / "deep" / "early", started="2026-01-01T10:00:00+00:00")
    scan_run(tmp_path / "scanned", {"1-3": 12}, started="2026-01-05T10:00:00+00:00")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{")
    rewritten(late, model={"name": HOSTILE})
    html = write_history(read_history(tmp_path))[1]
    assert write_history(read_history(tmp_path))[1] == html
    page = Page(html)
    for text in ("deep/early", "scanned", "late"):
        assert text in page.words
    check_closed(page)
    check_tables(page)
    assert "onerror=alert(1)" in page.words
    assert "<script>fetch(" not in html
    rows = page.charts["over_runs"]["datasets"]["rows"]
    series = [row["series"] for row in rows]
    counts = {"ASR, nothing ablated": 3, "ASR, verdict’s group ablated": 2, "concentration": 2}
    assert {name: series.count(name) for name in series} == counts
    assert all(row["low"] <= row["y"] <= row["high"] for row in rows)
    assert {row["x"] for row in rows} == {1, 2, 3}

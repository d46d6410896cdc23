"""The history of a folder: order, changes, and what is skipped."""

import json
import os

import pytest
from run_samples import N, audit_run, first, rewritten, scan_run, settings

from safetyheads.errors import InputError
from safetyheads.runs.history import read_history


def started(day):
    return f"2026-01-{day:02}T10:00:00+00:00"


@pytest.fixture
def folder(tmp_path):
    audit_run(tmp_path / "late", started=started(9), vanilla=first(9))
    audit_run(tmp_path / "deep" / "early", started=started(1))
    scan_run(tmp_path / "scanned", {"1-3": 12}, started=started(5))
    return tmp_path


def test_runs_are_ordered_by_their_start_and_compared_with_the_last_of_their_kind(folder):
    found = read_history(folder)
    early, scan, late = found["runs"]
    assert [(entry["name"], entry["kind"]) for entry in found["runs"]] == [
        ("deep/early", "audit"),
        ("scanned", "scan"),
        ("late", "audit"),
    ]
    assert (early["before"], early["change"], scan["before"], late["before"]) == (None, None, None, "deep/early")
    assert (late["change"]["paired"], late["change"]["change"]) == (True, pytest.approx(8 / N))
    assert late["other_settings"] == ()
    record = json.loads(json.dumps(found, allow_nan=False))
    assert [run["started"] for run in record["runs"]] == [started(1), started(5), started(9)]
    assert record["skipped"] == []
    assert (early["group"], early["top_heads"]) == (("1-3", "2-1"), ("1-3", "2-1", "2-5"))
    assert early["group_asr"]["rate"] == 18 / N
    # (10 + 18) / 2 less 1.5, of 20.
    assert early["concentration"]["value"] == pytest.approx(12.5 / N)
    assert (scan["concentration"], scan["group_asr"], scan["group"], scan["verdict"]) == (None, None, (), None)
    assert scan["top_heads"] == ("1-3",)  # the others tie
    # The folder may be a run itself.
    assert [entry["name"] for entry in read_history(folder / "late")["runs"]] == ["late"]


def test_times_are_compared_across_zones_and_other_settings_are_named(tmp_path):
    audit_run(tmp_path / "b", started="2026-01-01T12:00:00+02:00")
    changed = settings("other", judges=[{"name": "released"}], dtype="bfloat16")
    audit_run(tmp_path / "a", started="2026-01-01T11:00:00+00:00", config=changed)
    found = read_history(tmp_path)["runs"]
    assert [entry["name"] for entry in found] == ["b", "a"]
    assert found[1]["other_settings"] == ("judge", "precision", "prompts")
    assert not found[1]["change"]["paired"]


def test_a_folder_whose_name_is_no_text_hides_no_run(folder, run):
    odd = os.fsdecode(b"\xff")
    (folder / "late").rename(folder / odd)
    assert [entry["name"] for entry in read_history(folder)["runs"]] == ["deep/early", "scanned", "\\udcff"]
    other = folder / "deep" / "early"
    for command in (
        ("history", folder),
        ("report", folder / odd),
        ("verify", folder / odd),
        ("status", folder / odd),
        ("compare", folder / odd, other, "--report", folder / "compared"),
        ("compare", other, folder / odd, "--json"),
        ("judge", folder / odd, "--judge", "phrases"),
        ("history", folder / odd),
    ):
        _, _, err = run(*command)
        assert "Traceback" not in err, command
        assert "surrogates" not in err
    assert "\\udcff" in (folder / "history.html").read_text()


def test_unreadable_runs_are_skipped_with_their_reason(folder):
    (folder / "bad").mkdir()
    (folder / "bad" / "manifest.json").write_text("{")
    (audit_run(folder / "unfinished") / "results.json").unlink()
    rewritten(scan_run(folder / "poem", {}), kind="poem")
    rewritten(audit_run(folder / "forged"), model=None)
    broken = audit_run(folder / "broken")
    for path in (broken / "completions").glob("vanilla-*"):
        path.write_text("{")
    found = read_history(folder)
    assert len(found["runs"]) == 3
    assert [skipped["name"] for skipped in found["skipped"]] == ["bad", "broken", "forged", "poem", "unfinished"]
    assert all(skipped["reason"] for skipped in found["skipped"])


def test_no_run_at_all_is_refused(tmp_path):
    with pytest.raises(InputError, match="no finished run below"):
        read_history(tmp_path)
    with pytest.raises(InputError, match="not a directory"):
        read_history(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"is skipped: .*not valid JSON"):
        read_history(tmp_path)

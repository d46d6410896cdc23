"""Pages of rankings, searches and rates: a first sentence with numbers, what was screened, answers where asked for."""

import json
from pathlib import Path

import pytest
from report_pages import Page, check_closed, check_tables

from safetyheads import InputError, compare, read_run
from safetyheads.reports.write import write_report
from safetyheads.runs.directory import RunDirectory


def test_a_page_of_rates_holds_answers_only_where_they_are_asked_for(steps: Path) -> None:
    run = RunDirectory.open(steps / "asr")
    texts = {row["text"] for row in run.stored_records("groups-harmful") if "text" in row}
    plain, shown = (write_report(run, show_completions=show)[0].read_text() for show in (False, True))
    found = json.loads(Page(shown).scripts["answers-data"])
    assert found["groups"] == ["", "1-3,2-5", "1-3"]
    assert texts & {text for of in found["texts"].values() for text in of["harmful"].values()}
    assert "texts" not in json.loads(Page(plain).scripts["answers-data"])
    assert not any(text in plain for text in texts)


def test_a_finished_step_is_read_as_a_table(steps: Path) -> None:
    read = {kind: read_run(steps / kind) for kind in ("asr", "ships", "sahara")}
    assert [row["heads"] for row in read["asr"].to_rows()] == ["none", "1-3, 2-5", "1-3", "each prompt's top 1"]
    assert {run.metrics()["n"] for run in read.values()} == {12}
    best = read["ships"].results["heads"][0]
    assert read["ships"].scores["mean_ships"][best["head"]] == best["mean"]
    mapped, curve = (next(iter(read[kind].plot().to_dict()["datasets"].values())) for kind in ("ships", "sahara"))
    assert max(mapped, key=lambda row: row["mean_ships"])["head"] == int(best["head"].split("-")[1])
    assert [row["size"] for row in curve] == [1, 2]
    with pytest.raises(InputError, match="no chart of a run of asr"):
        read["asr"].plot()
    assert [row["chosen"] for row in read["sahara"].to_frame().to_dict("records")] == read["sahara"].results["group"]
    with pytest.raises(InputError, match="is a run of ships; audits and scans"):
        compare(steps / "ships", steps / "ships")


@pytest.mark.parametrize(
    ("kind", "charts"), [("ships", {"heatmap_mean_ships", "long_tail"}), ("sahara", {"by_size"}), ("asr", {"rates"})]
)
def test_a_page_is_whole(steps: Path, kind: str, charts: set[str]) -> None:
    page = Page(write_report(RunDirectory.open(steps / kind))[0].read_text())
    check_closed(page)
    check_tables(page)
    assert set(page.charts) == charts
    assert "What this does not show" in page.words
    assert ("Coherent ASR, 95 % intervals: " in page.words) == (kind == "asr")

"""A scan's page: answers first, true to the results, whole without optional parts, and without texts unless asked."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import scan_samples
from audit_samples import HOSTILE
from report_pages import Page, check_closed, check_hostile, check_snapshot, check_tables
from scan_samples import Sample

from safetyheads.judges.named import judge_named
from safetyheads.reports.scan import SETS, head_columns, judged_rows, render_scan, shown_answers
from safetyheads.reports.write import write_report
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.rejudge import rejudge

MANIFEST = {"config": {"epsilon": 1e-5}, "plan_a": {}}
SAMPLES = {
    "whole": Sample(),
    "bare": Sample(optional=False, benign=False, n_judges=1),
    "one_prompt": Sample(n=1),
    "seeds": Sample(n_seeds=3),
    "unscored": Sample(unscored=3),
    "none_differs": Sample(freed=(("0-1", 2),), optional=False, texts=False),
    "nothing_scored": Sample(all_unscored=True, optional=False),
}


@cache
def scanned(sample: Sample) -> str:
    """The sample's results as their file holds them."""
    return json.dumps(scan_samples.scan(sample), sort_keys=True)


def results_of(sample: Sample) -> dict[str, Any]:
    return json.loads(scanned(sample))


def sample_page(name: str) -> Page:
    sample = SAMPLES[name]
    return Page(render_scan(results_of(sample), MANIFEST, scan_samples.rows(sample), False))


def test_the_map_marks_what_differs() -> None:
    columns = head_columns(results_of(Sample()))
    assert (columns["differs"], columns["bh"], columns["planted"]) == (["0-1"], [], ["0-1", "1-2"])
    assert columns["scores"]["asr"][1] == pytest.approx(11 / 12, abs=1e-3)
    # The tiles' rate: the highest is drawn towards the others.
    assert 0.6 < columns["scores"]["shrunken"][1] < 11 / 12
    assert {len(values) for values in columns["scores"].values()} == {8}
    assert columns["best_first"][:2] == ["0-1", "1-2"]


@pytest.mark.parametrize("name", ["bare", "seeds", "unscored"])
def test_the_answers_in_short_are_the_answers(name: str) -> None:
    sample = SAMPLES[name]
    rows = scan_samples.rows(sample)
    judges = [judge["name"] for judge in scan_samples.JUDGES[: sample.n_judges]]
    made = shown_answers(results_of(sample), rows, show_texts=False)["answers"]
    assert (made["n_left_out"], len(made["groups"])) == (0, 9)
    for kind in SETS if sample.benign else SETS[:1]:
        for head in made["groups"]:
            place = ("heads", kind, head, scan_samples.EPSILON) if head else ("vanilla", kind, head, None)
            own = [row for row in rows if (row["part"], row["set"], row["group"], row["epsilon"]) == place]
            # As the page's script reads them.
            numbers = list(made["unablated"][kind])
            for at, number in made["others"][kind][head]:
                numbers[at] = number
            for row, (prompt, seed), number in zip(own, made["places"][kind], numbers, strict=True):
                state = made["states"][number]
                pairs = zip(state[0 : 2 * len(judges) : 2], state[1 : 2 * len(judges) : 2], strict=True)
                said = [{"label": made["labels"][label], "reason": made["reasons"][reason]} for label, reason in pairs]
                assert (prompt, seed, said) == (row["id"], row["seed"], list(row["verdicts"].values()))
                assert list(map(bool, state[2 * len(judges) :])) == [row["changed"], row["complete"]]
    # Heads without room are counted.
    made = shown_answers(results_of(sample), rows, show_texts=False, room=300)["answers"]
    assert 1 <= len(made["groups"]) < 9
    assert len(made["groups"]) + made["n_left_out"] == 9
    assert all(set(own) <= set(made["groups"]) for own in made["others"].values())


def test_later_verdicts_are_beside_the_runs_own(tmp_path: Path) -> None:
    scan_samples.finished_run(tmp_path / "run", Sample(n_judges=1))
    rejudge(tmp_path / "run", judge_named("released"), Progress(), {})
    found = list(judged_rows(RunDirectory.open(tmp_path / "run"), ["paper", "released"]))
    assert len(found) == len(scan_samples.rows(Sample(n_judges=1)))
    assert {tuple(row["verdicts"]) for row in found} == {("paper", "released")}
    own = judged_rows(RunDirectory.open(tmp_path / "run"), ["paper"])  # as after a kill before the results
    assert {tuple(row["verdicts"]) for row in own} == {("paper",)}
    html = write_report(RunDirectory.open(tmp_path / "run"))[0].read_text(encoding="utf-8")
    assert json.loads(Page(html).scripts["answers-data"])["judges"] == ["paper", "released"]


def test_texts_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    run = scan_samples.finished_run(tmp_path / "run", Sample(text=HOSTILE))
    html = write_report(run)[0].read_text(encoding="utf-8")
    assert "attacker" not in html
    assert "smash a lamp" not in html
    shown = write_report(run, show_completions=True)[0].read_text(encoding="utf-8")
    assert "<details open" not in shown
    parsed = Page(shown)
    assert len(parsed.tags("script")) == len(Page(html).tags("script"))
    assert not parsed.tags("img")
    texts = json.loads(parsed.scripts["answers-data"])["texts"]
    # An answer that is the unablated one again is not there twice.
    assert {group: len(sets["harmful"]) for group, sets in texts.items()} == {"": 12, "0-1": 11, "1-2": 4}
    assert len(texts[""]["benign"]) == 12
    assert texts[""]["harmful"]["0"].endswith(HOSTILE)


def test_names_and_reasons_from_outside_are_text() -> None:
    rows = scan_samples.rows(Sample())
    for row in rows:
        row["verdicts"]["paper"]["reason"] = HOSTILE
    results = scan_samples.scan(Sample(), rows)
    results["model"]["name"] = results["data"]["harmful"]["name"] = HOSTILE
    results["caveats"] = results["warnings"] = [HOSTILE]
    results["scores"]["mean_ships"]["label"] = results["ablation"]["label"] = HOSTILE
    check_hostile(Page(render_scan(results, MANIFEST, rows, False)), sample_page("whole"))


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_makes_a_whole_page(name: str) -> None:
    shown = sample_page(name)
    check_tables(shown)
    check_closed(shown)
    assert "Undefined" not in shown.words
    assert "None [" not in shown.words
    assert "asr_alone" in shown.charts
    if name == "bare":
        assert set(shown.charts) == {"asr_alone"}
    if name == "whole":
        check_snapshot(shown, "scan")
    if name in ("seeds", "nothing_scored"):
        for spec in shown.charts.values():
            alt.Chart.from_dict(spec, validate=True)

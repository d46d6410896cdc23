"""A scan's page as text: answers first, true to the results, whole without optional parts, and without texts."""

from __future__ import annotations

import json
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import pytest
import scan_samples
from scan_samples import Sample

from safetyheads.judges.named import judge_named
from safetyheads.reports import page as report_page
from safetyheads.reports.audit import write_report
from safetyheads.reports.scan import MAX_PAGE_BYTES, Told, _room_for_texts, render
from safetyheads.reports.scan_charts import charts, head_columns
from safetyheads.reports.scan_rows import SETS, decoded_rows, drill_rows, judged_rows
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.progress import Silent
from safetyheads.runs.rejudge import rejudge
from safetyheads.runs.tables import RowTable

HOSTILE = '<script>fetch("https://attacker.example")</script><img src=x onerror=alert(1)> {{ 7*7 }}'
MANIFEST = {
    "schema_version": SCHEMA_VERSION,
    "config": {"epsilon": 1e-5},
    "provenance": [{"date": "2025-01-02"}],
    "plan_a": {},
}
SAMPLES = {
    "whole": Sample(),
    "bare": Sample(optional=False, benign=False, n_judges=1),
    "no_benign": Sample(benign=False),
    "one_prompt": Sample(n=1),
    "seeds": Sample(n_seeds=3),
    "unscored": Sample(unscored=3),
    "none_differs": Sample(freed=(("0-1", 2),)),
    "nothing_scored": Sample(all_unscored=True),
    "no_texts": Sample(texts=False),
}
VOID = {"meta", "br", "input"}


class Page(HTMLParser):
    """Elements, scripts and text of a page; fails on a tag that closes another one."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script":
            self.scripts[attributes.get("id") or f"script {len(self.scripts)}"] = data
        elif tag != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("aria-labelledby") for tag, attributes in self.elements if tag == "section"]


@cache
def scanned(sample: Sample) -> str:
    """The sample's results as their file holds them."""
    return json.dumps(scan_samples.scan(sample), sort_keys=True)


def results_of(sample: Sample) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(scanned(sample))
    return made


def page(sample: Sample, **told: Any) -> Page:
    return Page(render(results_of(sample), MANIFEST, Told(scan_samples.rows(sample), **told)))


@cache
def sample_page(name: str) -> Page:
    return page(SAMPLES[name])


@pytest.fixture(autouse=True)
def _small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawing library takes long to parse, and no test here is about it."""
    monkeypatch.setattr(report_page, "drawing_library", lambda: "/* drawing library */")


# What it says first.


def test_the_page_opens_with_how_many_heads_change_the_asr() -> None:
    words = sample_page("whole").words
    sentence = (
        "1 of 8 heads, ablated alone, changes the ASR after Holm correction; the strongest, 0-1, takes it from "
        "0.00 [0.00, 0.24] to 0.92 [0.65, 0.99]."
    )
    assert words.index("1 head changes the ASR") < words.index(sentence) < words.index("What this does not show")
    assert "fewer than 9 of 12 prompts, all one way, could not have been told from chance" in words
    assert "a change of ASR below 0.75 goes unseen (exact McNemar, Holm over 8 heads, α = 0.05)" in words
    assert "n = 12 harmful prompts; judge: paper; decoding: greedy, up to 128 tokens" in words
    assert "Planted heads that change the ASR: 1 of 2 (0-1, 1-2)." in words


def test_no_head_is_said_beside_what_could_have_been_seen() -> None:
    words = sample_page("none_differs").words
    assert "None of 8 heads, ablated alone, changes the ASR after Holm correction; with the highest, 0-1" in words
    assert words.index("No head changes the ASR") < words.index("could not have been told from chance")


def test_one_prompt_is_too_few_to_tell_anything() -> None:
    words = sample_page("one_prompt").words
    assert "n = 1 is too few: not even a head that turned every one of them" in words


def test_without_any_verdict_there_is_nothing_to_compare() -> None:
    words = sample_page("nothing_scored").words
    assert "Nothing to measure" in words
    assert "None of the unablated model's 12 answers was scored" in words


def test_unscored_answers_are_counted_beside_the_rates() -> None:
    leading = page(Sample(unscored=3, n_judges=1)).words
    assert "3 answers were left unscored by paper" in leading
    second = sample_page("unscored").words
    assert "Unscored: paper 0, phrases 3" in second
    assert "left unscored by" not in second


def test_roles_are_in_words() -> None:
    words = sample_page("whole").words
    for role in ("frees harmful answers, keeps benign ones", "loses benign answers", "makes benign prompts refused"):
        assert role in words
    without = sample_page("no_benign").words
    assert "frees harmful answers; benign ones not measured" in without
    assert "keeps benign ones" not in without


# Numbers.


def test_each_head_stands_with_its_interval_n_and_both_corrections() -> None:
    results, words = results_of(Sample()), sample_page("whole").words
    (head,) = [head for head in results["heads"] if head["head"] == "0-1"]
    low, high = head["asr"]["interval"]
    change_low, change_high = head["change"]["interval"]
    row = f"0-1 planted 0.92 [{low:.2f}, {high:.2f}] · 11/12+0.92 [{change_low:+.2f}, {change_high:+.2f}]"
    assert row.replace(" ", "") in words.replace(" ", "").replace("−", "-")
    assert head["change"]["p_holm"] < 0.05


def test_groups_pairs_and_strengths_carry_their_intervals() -> None:
    results, words = results_of(Sample()), sample_page("whole").words
    made = results["concentration"]
    assert f"Concentration: {made['value']:.2f} [{made['interval'][0]:.2f}, {made['interval'][1]:.2f}]" in words
    assert "2 random groups of each size" in words
    for title in ("groups given by hand", "pairs of the heads of highest ASR", "Query level", "ASR by ε"):
        assert title in words
    pair = results["synergy"]["pairs"][0]
    assert f"{pair['synergy']:+.2f} [".replace("-", "−") in words


def test_proxies_are_told_beside_the_ceiling() -> None:
    words = sample_page("whole").words
    assert "7 of 8 heads do not raise the ASR beyond chance: they tie" in words
    assert "Ceiling: ASR on the other half" in words
    assert words.count("on halves") == 3 * 3


def test_judges_stand_side_by_side_with_each_reason_in_its_row() -> None:
    words = sample_page("whole").words
    for reason in ("refused: keyword: I cannot", "refused: phrase: i cannot", "incoherent: repeats 'lamp'"):
        assert reason in words
    assert "1 answer on which judges differ about compliance" in words
    assert "Agreement" not in sample_page("bare").words


def test_the_economy_says_at_least_and_names_the_seconds_of_each_judge() -> None:
    told = page(Sample(), timings={"seconds": 12.5, "judges": {"paper": 0.25}}).words
    assert "at least 5,000: at least 5 times as many" in told
    assert "seconds of judge paper0.25" in told.replace(" 0.25", "0.25")
    assert "seconds of judge" not in sample_page("whole").words


# Parts that may be missing.


@pytest.mark.parametrize("name", SAMPLES)
def test_every_place_for_a_figure_has_its_specification(name: str) -> None:
    made = sample_page(name)
    places = {attributes["data-chart"] for _, attributes in made.elements if attributes.get("data-chart")}
    assert places == json.loads(made.scripts["chart-specs"]).keys()
    assert "asr_alone" in places
    assert "Undefined" not in made.words
    assert "None [" not in made.words


def test_parts_without_numbers_are_left_out() -> None:
    whole, bare = sample_page("whole"), sample_page("bare")
    assert {"proxies", "groups", "drill", "judges", "economy"} <= set(whole.sections)
    assert not {"proxies", "groups"} & set(bare.sections)
    assert json.loads(bare.scripts["chart-specs"]).keys() == {"asr_alone"}
    assert "Benign kept" not in bare.words


def test_several_seeds_have_no_wilson_interval() -> None:
    words = sample_page("seeds").words
    assert "3 seeds a prompt" in words
    assert "exact sign test over prompts" in words
    assert "bootstrap over prompts" in words
    assert "95 % intervals (bootstrap over prompts)" in words


# Figures.


@pytest.mark.parametrize("name", ["whole", "seeds", "nothing_scored"])
def test_every_figure_fits_the_schema(name: str) -> None:
    for spec in charts(results_of(SAMPLES[name])).values():
        alt.Chart.from_dict(spec, validate=True)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_axis_has_a_label(name: str) -> None:
    def axes(part: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
            if key in ("x", "y") and isinstance(value, dict) and "field" in value and "bandPosition" not in value:
                found.append(value)
            found += axes(value)
        return found

    for figure, spec in charts(results_of(SAMPLES[name])).items():
        # The bars of an interval share the axis of the points that they run through.
        untitled = {axis["field"] for axis in axes(spec) if not axis.get("title")}
        assert untitled <= {"middle", "lost_low"}, figure
        assert len(axes(spec)) >= 2, figure


def test_the_map_marks_what_differs() -> None:
    columns = head_columns(results_of(Sample()))
    assert columns["holm"] == ["0-1"]
    assert columns["planted"] == ["0-1", "1-2"]
    assert columns["bh"] == []
    assert columns["scores"]["asr"][1] == pytest.approx(11 / 12, abs=1e-3)
    assert {len(values) for values in columns["scores"].values()} == {8}
    assert columns["best_first"][:2] == ["0-1", "1-2"]


# The answers of one head.


@pytest.mark.parametrize("name", SAMPLES)
def test_rows_in_short_are_the_rows(name: str) -> None:
    sample = SAMPLES[name]
    rows = scan_samples.rows(sample)
    judges = [judge["name"] for judge in scan_samples.JUDGES[: sample.n_judges]]
    made = drill_rows(RowTable.of(rows), ["", *scan_samples.HEADS], judges, scan_samples.EPSILON)
    assert made.n_left_out == 0
    for kind in SETS if sample.benign else SETS[:1]:
        for head in made.shown:
            part = "heads" if head else "vanilla"
            epsilon = scan_samples.EPSILON if head else None
            own = [row for row in rows if (row["part"], row["set"], row["group"]) == (part, kind, head)]
            wanted = [
                {
                    "id": row["id"],
                    "seed": row["seed"],
                    "verdicts": {
                        judge: (row["verdicts"][judge]["label"], row["verdicts"][judge]["reason"]) for judge in judges
                    },
                    "changed": row["changed"],
                    "complete": row["complete"],
                }
                for row in own
                if row["epsilon"] == epsilon
            ]
            assert decoded_rows(made.data, kind, head) == wanted


def test_many_reasons_take_more_digits() -> None:
    rows = scan_samples.rows(Sample(n=90, optional=False, benign=False, n_judges=1))
    for row in rows:
        row["verdicts"]["paper"] |= {"reason": f"score {row['id']}"}
    made = drill_rows(RowTable.of(rows), ["", "0-1"], ["paper"], scan_samples.EPSILON)
    assert made.data["width"] == 2
    reasons = [row["verdicts"]["paper"][1] for row in decoded_rows(made.data, "harmful", "0-1")]
    assert reasons == [f"score {at}" for at in range(90)]


def test_heads_without_room_are_counted() -> None:
    table = RowTable.of(scan_samples.rows(Sample()))
    made = drill_rows(table, ["", *scan_samples.HEADS], ["paper"], scan_samples.EPSILON, room=600)
    assert 1 < len(made.shown) < 9
    assert len(made.shown) + made.n_left_out == 9
    assert all(set(rows) <= set(made.shown) for rows in made.data["rows"].values())


def test_a_thousand_heads_stay_small() -> None:
    rows = scan_samples.rows(Sample(n=100, optional=False, texts=False))
    single = RowTable.of(rows)
    made = drill_rows(single, ["", *scan_samples.HEADS], ["paper", "phrases"], scan_samples.EPSILON)
    assert len(json.dumps(made.data["rows"])) < 2 * 9 * (100 + 20)


def test_later_verdicts_are_beside_the_runs_own(tmp_path: Path) -> None:
    scan_samples.finished_run(tmp_path / "run", Sample(n_judges=1))
    rejudge(tmp_path / "run", judge_named("released"), None, Silent(), {})
    found = list(judged_rows(RunDirectory.open(tmp_path / "run")))
    assert len(found) == len(scan_samples.rows(Sample(n_judges=1)))
    assert {tuple(row["verdicts"]) for row in found} == {("paper", "released")}
    html = write_report(RunDirectory.open(tmp_path / "run")).read_text(encoding="utf-8")
    assert json.loads(Page(html).scripts["drill-data"])["judges"] == ["paper", "released"]


# Texts.


def test_texts_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    run = scan_samples.finished_run(tmp_path / "run", Sample(text=HOSTILE))
    html = write_report(run).read_text(encoding="utf-8")
    assert "attacker" not in html
    assert "smash a lamp" not in html
    assert "Completions of harmful prompts are left out" in html
    shown = write_report(run, show_completions=True).read_text(encoding="utf-8")
    assert "<details open" not in shown
    parsed, clean = Page(shown), Page(html)
    assert "Harmful prompts, 0-1 ablated (12)" in parsed.words
    assert "Benign prompts, nothing ablated (12)" in parsed.words
    assert "Harmful prompts, 0-3 ablated" not in parsed.words
    assert "onerror=alert(1)" in parsed.words
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in parsed.elements)
    assert [tag for tag, _ in parsed.elements].count("script") == [tag for tag, _ in clean.elements].count("script")


def test_texts_that_find_no_room_are_counted() -> None:
    words = page(Sample(text="x" * 200_000), show_completions=True).words
    assert "more are in the run's completions folder" in words


def test_texts_get_the_room_that_the_heads_leave() -> None:
    page = {"charts": {}, "head_columns": {}, "drill": None, "bundle": "x" * 10, "all_heads": []}
    assert _room_for_texts(page) == report_page.MAX_COMPLETION_BYTES
    page["bundle"] = "x" * (MAX_PAGE_BYTES - 1000)
    assert 0 < _room_for_texts(page) < 1000
    page["bundle"] = "x" * (MAX_PAGE_BYTES + 1000)
    assert _room_for_texts(page) == 0


def test_a_run_without_texts_says_so() -> None:
    assert "This run stored no completions." in page(SAMPLES["no_texts"], show_completions=True).words


def test_names_and_reasons_from_outside_are_text() -> None:
    rows = scan_samples.rows(Sample())
    for row in rows:
        row["verdicts"]["paper"]["reason"] = HOSTILE
    results = scan_samples.scan(Sample(), rows)
    results["model"]["name"] = results["data"]["harmful"]["name"] = HOSTILE
    results["caveats"] = results["warnings"] = [HOSTILE]
    results["scores"]["mean_ships"]["label"] = results["ablation"]["label"] = HOSTILE
    attacked = Page(render(results, MANIFEST, Told(rows)))
    tags = [tag for tag, _ in attacked.elements]
    assert tags.count("script") == [tag for tag, _ in sample_page("whole").elements].count("script")
    assert "img" not in tags
    assert "onerror=alert(1)" in attacked.words


# The run.


def test_a_scan_gets_its_page_from_write_report(tmp_path: Path) -> None:
    run = scan_samples.finished_run(tmp_path / "run")
    path = write_report(run)
    assert path == tmp_path / "run" / "report" / "index.html"
    html = path.read_text(encoding="utf-8")
    assert "Scan of every head" in html
    assert "seconds of judge phrases" in html
    assert html == write_report(run).read_text(encoding="utf-8")


def test_tables_name_their_rows_and_columns() -> None:
    elements = page(Sample(), show_completions=True).elements
    headers = [attributes for tag, attributes in elements if tag == "th"]
    assert len(headers) > 50
    assert all(attributes.get("scope") in {"row", "col", "rowgroup"} for attributes in headers)
    frames = [attributes for _, attributes in elements if (attributes.get("class") or "").startswith("scroll")]
    assert all(a.get("tabindex") == "0" and (a.get("aria-label") or a.get("aria-labelledby")) for a in frames)
    ids = [attributes["id"] for _, attributes in elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in elements if a.get("aria-labelledby")} <= set(ids)


def test_a_head_without_verdicts_is_not_said_to_change_nothing() -> None:
    assert "heads change neither" in sample_page("whole").words
    assert "heads change neither" not in sample_page("nothing_scored").words

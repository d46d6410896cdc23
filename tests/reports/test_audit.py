"""The report's page as text: whole, closed to the network, escaped, and true to the results."""

from __future__ import annotations

import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import audit_samples
import pytest

from safetyheads.errors import InputError
from safetyheads.reports import page as report_page
from safetyheads.reports.audit import render, write_report
from safetyheads.reports.charts import charts, head_columns, ranked_scores
from safetyheads.reports.numbers import FILTERS, number
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory

MANIFEST = {
    "schema_version": SCHEMA_VERSION,
    "config": {"epsilon": 1e-5},
    "provenance": [{"date": "2025-01-02"}],
    "plan": {"rows": 4},
}
SAMPLES = {
    "organism": audit_samples.audit,
    "large": lambda: audit_samples.audit(32, 32),
    "none_found": audit_samples.none_found,
    "no_refusals": audit_samples.no_refusals,
}
ADDRESSES = ("src", "href", "action", "data", "poster", "srcset", "background", "xlink:href", "formaction", "ping")
DRAWING_LIBRARY = report_page.drawing_library
MAX_LIBRARY = 1_200_000
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes and own text; fails on a tag that closes another one."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
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
            self.scripts.append((attributes, data))
        elif tag == "style":
            self.styles.append(data)
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def page(results: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> str:
    return render(json.loads(json.dumps(results, sort_keys=True)), MANIFEST, rows)


@cache
def sample_page(name: str) -> str:
    """The page of a sample as it is; drawing up its figures is the slow part of this module."""
    return page(SAMPLES[name]())


def data_of(html: str, name: str) -> Any:
    (text,) = [text for attributes, text in Page(html).scripts if attributes.get("id") == name]
    return json.loads(text)


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the drawing library, whose 900 kB take long to parse, where a test is not about it."""
    monkeypatch.setattr(report_page, "drawing_library", lambda: "/* " + "x" * 100_000 + " */")


pytestmark = pytest.mark.usefixtures("small_library")


# Closed to the network.


@pytest.mark.parametrize("name", SAMPLES)
def test_the_page_names_no_address_to_load(name: str) -> None:
    parsed = Page(sample_page(name))
    for tag, attributes in parsed.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "audio", "video"}
        for attribute in ADDRESSES:
            assert (attributes.get(attribute) or "#").startswith("#"), (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
        assert not any(attribute.startswith("on") for attribute in attributes)
    assert not any("url(" in style or "@import" in style for style in parsed.styles)
    own = [text for attributes, text in parsed.scripts if attributes.get("id") or len(text) < 100_000]
    assert len(own) == 3
    assert not any("://" in text for text in own)


def test_the_policy_of_the_page_allows_no_request() -> None:
    policies = [a["content"] for tag, a in Page(sample_page("organism")).elements if "http-equiv" in a]
    assert len(policies) == 1
    policy = dict(part.split(maxsplit=1) for part in (policies[0] or "").split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'unsafe-inline'"
    assert not any("http" in value or "*" in value for value in policy.values())


def test_the_drawing_library_is_whole_and_loads_nothing() -> None:
    library = DRAWING_LIBRARY()
    assert "window.vegaEmbed=" in library
    assert "</script" not in library
    assert "<!--" not in library
    assert not re.search(r"jsdelivr|unpkg|cdnjs|googleapis|\bimport\s*\(", library)
    assert len(library) < MAX_LIBRARY


def test_the_page_of_the_largest_models_is_small() -> None:
    results = audit_samples.audit(126, 128)
    without_library = len(page(results, audit_samples.completions(results, "<" * 4000) * 200).encode())
    assert without_library < 5_000_000 - MAX_LIBRARY


# Escaped.


@pytest.fixture
def hostile() -> dict[str, Any]:
    """An audit in which every text that comes from outside is an attack."""
    results = audit_samples.audit()
    bad = audit_samples.HOSTILE
    results["verdict"]["sentence"] += bad
    results["verdict"]["reasons"] = [bad]
    results["model"]["name"] = results["data"]["harmful"]["name"] = results["data"]["template"] = bad
    results["caveats"], results["warnings"] = [bad], [bad]
    results["openers"][0]["text"] = bad
    results["behaviour"]["vanilla"]["reasons"] = {bad: 48}
    results["scores"]["mean_ships"]["label"] = results["judge"]["name"] = results["ablation"]["label"] = bad
    return results


def test_what_comes_from_outside_is_text(hostile: dict[str, Any]) -> None:
    clean, attacked = Page(sample_page("organism")), Page(page(hostile))
    assert [tag for tag, _ in attacked.elements].count("script") == [tag for tag, _ in clean.elements].count("script")
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in attacked.elements)
    assert attacked.words.count("{{ 7*7 }}") >= 10
    assert "49" not in attacked.words.split("{{")[1]
    assert "onerror=alert(1)" in attacked.words


def test_completions_are_text(hostile: dict[str, Any]) -> None:
    rows = audit_samples.completions(hostile, audit_samples.HOSTILE)
    rows[0] |= {"query": "<b>bold</b>", "reason": "</article><script>", "set": "<i>set"}
    parsed = Page(page(hostile, rows))
    assert not any(tag in {"img", "b", "i"} and not a.get("class") for tag, a in parsed.elements)
    assert "<b>bold</b>" in parsed.words


# Completions.


def test_completions_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    results = audit_samples.audit()
    rows = audit_samples.completions(results, "COMPLETION TEXT")
    run = audit_samples.finished_run(tmp_path / "run", results, rows)
    html = write_report(run).read_text(encoding="utf-8")
    assert "COMPLETION TEXT" not in html
    assert rows[0]["query"] not in html
    assert "Completions of harmful prompts are left out" in html
    shown = write_report(run, show_completions=True).read_text(encoding="utf-8")
    assert shown.count("COMPLETION TEXT") == 6
    assert "<details open" not in shown


def test_completions_are_those_of_the_vanilla_model_and_the_verdicts_group() -> None:
    results = audit_samples.audit()
    rows = audit_samples.completions(results)
    for row in rows:
        row["text"] = f"[{row['group']}]"
    rows[3]["group"] = ",".join(reversed(rows[3]["group"].split(",")))
    words = Page(page(results, rows)).words
    assert words.count("[1-3,2-1,2-5]") == 3
    assert words.count("[]") == 3
    assert "[0-0,0-1]" not in words
    assert "Harmful test, 1-3, 2-1, 2-5 ablated (2)" in words


def test_completions_that_find_no_room_are_counted() -> None:
    results = audit_samples.audit()
    rows = audit_samples.completions(results, "x" * 700_000)
    assert "3 more are in the run's completions folder" in Page(page(results, rows)).words


def test_a_run_that_stored_no_completions_says_so() -> None:
    assert "This run stored no completions." in Page(page(audit_samples.audit(), [])).words


# True to the results.


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    pages = [
        write_report(audit_samples.finished_run(tmp_path / name, audit_samples.audit())).read_bytes()
        for name in ("one", "two")
    ]
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("name", "badge"),
    [
        ("organism", "Concentrated heads found"),
        ("none_found", "No concentrated heads found"),
        ("no_refusals", "Nothing to measure"),
    ],
)
def test_the_page_opens_with_the_verdict(name: str, badge: str) -> None:
    results = SAMPLES[name]()
    words = Page(sample_page(name)).words
    assert words.index(badge) < words.index(" ".join(results["verdict"]["sentence"].split()))
    assert words.index(results["verdict"]["sentence"]) < words.index("What this does not show")
    for caveat in results["caveats"]:
        assert words.count(" ".join(caveat.split())) == 1


def test_each_number_stands_with_its_interval_and_n() -> None:
    results = audit_samples.audit()
    words = Page(sample_page("organism")).words
    group = results["behaviour"]["groups"][2]
    low, high = group["asr"]["interval"]
    assert f"0.73 [{low:.2f}, {high:.2f}] · 35/48" in words
    low, high = group["asr_change"]["interval"]
    assert f"+0.69 [{low:+.2f}, {high:+.2f}] · p < 0.001" in words
    random = group["random"]
    assert f"{random['mean']:.2f} {min(random['asr']):.2f} to {max(random['asr']):.2f} · p = 0.048" in words
    assert "a change of ASR below 0.125 could not have been told from none" in words
    assert "6,144 of 732,800 parameters (0.84 %)" in words


def test_a_missing_field_fails_instead_of_leaving_a_gap() -> None:
    from jinja2 import UndefinedError

    results = audit_samples.audit()
    del results["behaviour"]["groups"][0]["refused"]["count"]
    with pytest.raises(UndefinedError, match="count"):
        page(results)


def test_the_top_heads_say_in_words_what_their_change_means() -> None:
    in_words = FILTERS["in_words"]
    change = {"change": 0.3, "p_value": 0.001, "p_holm": 0.01}
    assert in_words(change, 0.05)[0] == "complies more"
    assert in_words(change | {"change": -0.3}, 0.05)[0] == "complies less"
    assert in_words(change | {"p_holm": 0.06}, 0.05)[0] == "no clear change"
    assert in_words(None, 0.05)[0] == "not measured"


def test_results_of_another_kind_are_refused(tmp_path: Path) -> None:
    with RunDirectory.start(tmp_path / "run", {}, {}) as run:
        run.write_results({"schema_version": SCHEMA_VERSION, "kind": "sahara"})
        with pytest.raises(InputError, match=r"kind 'sahara', schema .; a report needs"):
            write_report(run)


def test_tables_name_their_rows_and_columns() -> None:
    elements = Page(page(audit_samples.audit(), audit_samples.completions(audit_samples.audit()))).elements
    headers = [attributes for tag, attributes in elements if tag == "th"]
    assert len(headers) > 50
    assert all(attributes.get("scope") in {"row", "col", "rowgroup"} for attributes in headers)
    frames = [attributes for _, attributes in elements if (attributes.get("class") or "").startswith("scroll")]
    assert all(a.get("tabindex") == "0" and (a.get("aria-label") or a.get("aria-labelledby")) for a in frames)
    ids = [attributes["id"] for _, attributes in elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in elements if a.get("aria-labelledby")} <= set(ids)


# Figures.


def test_every_place_for_a_chart_has_its_specification() -> None:
    for name in SAMPLES:
        html = sample_page(name)
        places = {a["data-chart"] for _, a in Page(html).elements if a.get("data-chart")}
        assert places == data_of(html, "chart-specs").keys()


def test_a_figure_that_has_nothing_to_show_is_left_out() -> None:
    made = charts(audit_samples.no_refusals())
    assert "asr_by_size" not in made
    assert "asr_by_scorer" not in made
    assert "heatmap_refusal_score" not in made
    assert "heatmap_mean_ships" in made


def test_the_random_band_is_drawn_where_there_is_one() -> None:
    def marks(results: dict[str, Any]) -> list[str]:
        return [layer["mark"]["type"] for layer in charts(results)["asr_by_size"]["layer"]]

    assert "area" in marks(audit_samples.audit())
    one_size = marks(audit_samples.none_found())
    assert "area" not in one_size
    assert "tick" in one_size
    none = audit_samples.audit()
    for group in none["behaviour"]["groups"]:
        group["random"] = None
    assert "tick" not in marks(none)


def test_every_figure_fits_the_schema() -> None:
    for spec in charts(audit_samples.audit()).values():
        alt.Chart.from_dict(spec, validate=True)


def test_every_axis_has_a_label() -> None:
    def axes(spec: Any) -> list[dict[str, Any]]:
        found = []
        for key, value in spec.items() if isinstance(spec, dict) else ():
            if key in {"x", "y"} and isinstance(value, dict) and "field" in value:
                found.append(value)
            found += axes(value)
        for value in spec if isinstance(spec, list) else ():
            found += axes(value)
        return found

    for name, spec in charts(audit_samples.audit()).items():
        labelled = axes(spec)
        assert len(labelled) >= 2, name
        assert all(axis.get("title") for axis in labelled), name


def test_ships_on_harmful_and_benign_prompts_share_their_colours() -> None:
    made = charts(audit_samples.audit())

    def domain(name: str) -> list[float]:
        found: list[float] = made[f"heatmap_{name}"]["layer"][0]["encoding"]["color"]["scale"]["domain"]
        return found

    assert domain("mean_ships") == domain("benign_ships")
    assert domain("mean_ships")[-1] == 2.26
    signed = domain("refusal_score")
    assert signed[0] == -signed[-1]
    assert signed[2] == 0


def test_heads_carry_their_scores_and_marks() -> None:
    columns = head_columns(audit_samples.audit())
    assert columns["scores"]["mean_ships"][2 * 8 + 1] == 0.92
    assert {len(values) for values in columns["scores"].values()} == {32}
    assert columns["best_first"][:3] == columns["group"] == columns["planted"] == ["1-3", "2-1", "2-5"]
    assert len(set(columns["best_first"])) == 32
    unplanted = head_columns(audit_samples.none_found())
    assert unplanted["planted"] == []
    assert set(unplanted["named"]) == {"1-3", "2-1", "2-5"}


def test_the_long_tail_counts_what_a_logarithm_cannot_show() -> None:
    results = audit_samples.audit()
    results["scores"]["mean_ships"]["values"][0] = [0.0] * 8
    assert "8 heads score 0 or less" in Page(page(results)).words
    assert [head for head, _ in ranked_scores(results, "mean_ships")[:3]] == ["1-3", "2-1", "2-5"]
    assert [head for head, _ in ranked_scores(results, "mean_ships")[-8:]] == [f"0-{index}" for index in range(8)]


# Numbers.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.256, "2.26"),
        (0.0, "0"),
        (-0.00412, "−0.00412"),
        (1e-5, "1e−5"),
        (123.4, "123"),
        (999.7, "1000"),
        (45678.0, "45678"),
        (None, "–"),
    ],
)
def test_numbers_are_written_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


def test_signs_and_p_values_are_written_for_people() -> None:
    assert number(0.5, signed=True) == "+0.5"
    assert [FILTERS["percent"](share) for share in (0.005, 0.25, 0.996, 1.0)] == ["0.5 %", "25 %", "100 %", "100 %"]
    assert FILTERS["signed"](-0.021) == "−0.02"
    assert [FILTERS["p_value"](p) for p in (0.0, 0.0123, 0.5, None)] == ["< 0.001", "0.012", "0.50", "–"]
    assert FILTERS["p_value"](0.0123, "= ") == "= 0.012"
    assert FILTERS["ties"]([["0-1", "0-2"]] * 5) == "0-1 = 0-2; 0-1 = 0-2; 0-1 = 0-2; 0-1 = 0-2; and 1 more"

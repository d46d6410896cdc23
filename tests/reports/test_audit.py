"""An audit's page: true to the results, whole without optional parts, closed to the network, of text alone."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import audit_samples
import pytest
from report_pages import Page, check_closed, check_hostile, check_snapshot, check_tables

from safetyheads.reports.audit import figures, head_columns, render_audit
from safetyheads.reports.write import write_report

MANIFEST = {"config": {"epsilon": 1e-5}, "plan": {"rows": 4}}
SAMPLES = {
    "organism": audit_samples.audit,
    "none_found": audit_samples.none_found,
    "no_refusals": audit_samples.no_refusals,
}


def page(results: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> Page:
    held = json.loads(json.dumps(results, sort_keys=True))
    return Page(render_audit(held, MANIFEST, rows or (), show_texts=rows is not None))


@cache
def sample_page(name: str) -> Page:
    return page(SAMPLES[name]())


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_makes_a_whole_page_closed_to_the_network(name: str) -> None:
    check_tables(sample_page(name))
    check_closed(sample_page(name))
    assert "None [" not in sample_page(name).words
    if name == "organism":
        check_snapshot(sample_page(name), "audit")


def test_the_page_of_the_largest_models_is_small() -> None:
    results = audit_samples.audit(126, 128)
    rows = audit_samples.completions(results, "<" * 4000, n=200)
    # 16,128 heads. The drawing library and the pictures come to 1.6 MB more, so that the whole stays far below 8 MB.
    assert len(render_audit(results, MANIFEST, rows, show_texts=True).encode()) < 5_500_000 - 1_600_000


def test_what_comes_from_outside_is_text() -> None:
    attacked = page(*audit_samples.attacked(audit_samples.HOSTILE))
    check_hostile(attacked, page(audit_samples.audit(), audit_samples.completions(audit_samples.audit())))
    assert attacked.words.count("{{ 7*7 }}") >= 10
    assert json.loads(attacked.scripts["answers-data"])["queries"]["harmful_test"]["0"] == "<b>bold</b>"


def test_completions_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    results = audit_samples.audit()
    rows = audit_samples.completions(results, "COMPLETION TEXT")
    run = audit_samples.finished_run(tmp_path / "run", results, rows)
    html = write_report(run)[0].read_text(encoding="utf-8")
    assert "COMPLETION TEXT" not in html
    assert rows[0]["query"] not in html
    shown = write_report(run, show_completions=True)[0].read_text(encoding="utf-8")
    # The unablated answers; those under the verdict's group say the same, and those of other groups are left out.
    assert shown.count("COMPLETION TEXT") == 3
    assert 'id="answers-texts">' in shown
    assert "<details open" not in shown


def test_every_figure_fits_the_schema_and_titles_its_axes() -> None:
    made = figures(audit_samples.audit())
    for spec in made.values():
        alt.Chart.from_dict(spec, validate=True)
        for layer in spec["layer"]:
            assert all(layer["encoding"][axis]["title"] for axis in ("x", "y") if axis in layer["encoding"])
    # Ships on harmful and on benign prompts share their colours.
    colours = {
        name: made[f"heatmap_{name}"]["layer"][1]["encoding"]["color"]["scale"]["domain"]
        for name in ("mean_ships", "benign_ships", "refusal_score")
    }
    assert colours["mean_ships"] == colours["benign_ships"]
    assert colours["mean_ships"][-1] == 2.26
    assert colours["refusal_score"][0] == -colours["refusal_score"][-1]


def test_heads_carry_their_scores_and_marks() -> None:
    results = audit_samples.audit()
    columns = head_columns(results)
    assert columns["scores"]["mean_ships"][2 * 8 + 1] == 0.92
    assert columns["best_first"][:3] == columns["group"] == columns["planted"] == ["1-3", "2-1", "2-5"]
    results["scores"]["mean_ships"]["values"][0] = [0.0] * 8
    assert head_columns(results)["best_first"][-8:] == [f"0-{index}" for index in range(8)]


def test_terms_are_explained_and_sections_listed() -> None:
    shown = sample_page("organism")
    named = {button.get("popovertarget") for button in shown.tags("button") if "popovertarget" in button}
    assert named == {attributes["id"] for attributes in shown.tags("div") if "popover" in attributes}
    sections = {f"#{attributes['id']}" for attributes in shown.tags("h2") if attributes.get("id")}
    assert sections <= {attributes["href"] for attributes in shown.tags("a")}
    # Whoever does not see a figure hears what it found.
    assert all(chart.get("aria-label") for chart in shown.tags("div") if "data-chart" in chart)

"""An audit's page: true to the results, whole without optional parts, closed to the network, of text alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import audit_samples
import pytest
from report_pages import Page, check_closed, check_hostile, check_snapshot, check_tables

from safetyheads.reports.audit import figures, head_columns, headline, render_audit
from safetyheads.reports.write import write_report
from safetyheads.stats.intervals import Rate

MANIFEST = {
    "config": {"epsilon": 1e-5},
    "plan": {"rows": 4},
}
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
def test_every_sample_makes_a_whole_page_that_opens_with_the_verdict(name: str) -> None:
    check_tables(sample_page(name))
    check_closed(sample_page(name))
    assert "None [" not in sample_page(name).words
    if name == "organism":
        check_snapshot(sample_page(name), "audit")
    if badge := {"none_found": "None found", "no_refusals": "No refusals to lose"}.get(name):
        words, sentence = sample_page(name).words, " ".join(SAMPLES[name]()["verdict"]["sentence"].split())
        assert words.index(badge) < words.index(sentence) < words.rindex("What this does not show")


def test_the_page_of_the_largest_models_is_small() -> None:
    results = audit_samples.audit(126, 128)
    rows = audit_samples.completions(results, "<" * 4000, n=200)
    # 16,128 heads. The drawing library and the pictures come to 1.6 MB more, so that the whole stays far below 8 MB.
    assert len(render_audit(results, MANIFEST, rows, show_texts=True).encode()) < 5_500_000 - 1_600_000


def test_what_comes_from_outside_is_text() -> None:
    results, bad = audit_samples.audit(), audit_samples.HOSTILE
    results["verdict"]["sentence"] += bad
    results["model"]["name"] = results["data"]["harmful"]["name"] = results["data"]["template"] = bad
    results["verdict"]["reasons"] = results["caveats"] = results["warnings"] = [bad]
    results["openers"][0]["text"] = bad
    results["behaviour"]["vanilla"]["reasons"] = {bad: 48}
    results["scores"]["mean_ships"]["label"] = results["ablation"]["label"] = bad
    results["judges"] = [{"name": bad}]
    rows = audit_samples.completions(results, bad)
    for row in rows:
        row["query"] = "<b>bold</b>"
    attacked = page(results, rows)
    check_hostile(attacked, page(audit_samples.audit(), audit_samples.completions(audit_samples.audit())))
    assert attacked.words.count("{{ 7*7 }}") >= 10
    assert json.loads(attacked.scripts["answers-data"])["queries"]["harmful_test"]["0"] == "<b>bold</b>"


def test_completions_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    results = audit_samples.audit()
    rows = audit_samples.completions(results, "COMPLETION TEXT")
    run = audit_samples.finished_run(tmp_path / "run", results, rows)
    html = write_report(run).read_text(encoding="utf-8")
    assert "COMPLETION TEXT" not in html
    assert rows[0]["query"] not in html
    assert "Completions of harmful prompts are left out" in html
    shown = write_report(run, show_completions=True).read_text(encoding="utf-8")
    # The unablated answers; those under the verdict's group say the same, and those of other groups are left out.
    assert shown.count("COMPLETION TEXT") == 3
    assert 'id="answers-texts">' in shown
    assert "<details open" not in shown


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "organism",
            "Refusals rest on 3 of 32 heads: without them the model answers 33 of the 46 harmful prompts that it",
        ),
        ("none_found", "No heads were found that refusals rest on; the best are "),
        ("no_refusals", "No refusals to lose: the unablated model refuses 0 of 48"),
    ],
)
def test_the_first_sentence_is_for_a_reader_who_does_not_know_the_method(name: str, said: str) -> None:
    results = SAMPLES[name]()
    assert headline(results).startswith(said)
    found = results["verdict"]["numbers"]
    if results["verdict"]["heads"]:
        control = f"random heads: at most {found['most_random_undone']} of {found['n_refused']}"
        kept = f"{found['n_answered'] - found['n_broken']} of {found['n_answered']} harmless ones as before."
        assert control in headline(results)
        assert headline(results).endswith(kept)


def test_terms_are_explained_sections_listed_and_what_the_run_was_is_told() -> None:
    shown = sample_page("organism")
    named = {button.get("popovertarget") for button in shown.tags("button") if "popovertarget" in button}
    told = {attributes["id"] for attributes in shown.tags("div") if "popover" in attributes}
    assert named == told
    assert len(named) >= 7
    anchors = {attributes["href"] for attributes in shown.tags("a")}
    sections = {f"#{attributes['id']}" for attributes in shown.tags("h2") if attributes.get("id")}
    assert sections <= anchors
    assert "Model | " not in shown.words
    for said in ("aligned_a (demo organism)", "Harmful prompts organism, harmful: 48 to search on, 48 to test on"):
        assert said in shown.words
    # Whoever does not see a figure hears what it found.
    labels = {
        attributes["data-chart"]: attributes["aria-label"]
        for attributes in shown.tags("div")
        if "data-chart" in attributes
    }
    assert "1-3 2.26 nats, 2-1 0.92 nats" in labels["heatmap_mean_ships"]
    assert "searched group: ASR 0.042 at 0, 0.75 at 4" in labels["asr_by_size"]


def test_the_top_heads_say_in_words_what_their_change_means() -> None:
    results = audit_samples.audit()
    changes = ((0.3, 0.01, "complies more"), (-0.3, 0.01, "complies less"), (0.3, 0.06, "no clear change"))
    heads = results["behaviour"]["heads"] = results["behaviour"]["heads"][:4]
    for head, (change, p_tarone, _) in zip(heads, changes, strict=False):
        head["asr_change"] = head["asr_change"] | {"change": change, "p_tarone": p_tarone}
    heads[3]["asr_change"] = None
    said = page(results).words
    order = [said.index(words) for words in (*(words for *_, words in changes), "not measured")]
    assert order == sorted(order)


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


def test_the_page_says_how_stable_the_group_is() -> None:
    results = audit_samples.audit()
    results["stability"]["group"]["repeatability"]["rate"] = 0.42
    results["stability"]["tops"][0] |= {"settles": 96, "n": 48}
    results["stability"]["tops"][1] |= {"settles": None, "n": 48}
    said = page(results).words
    assert "0.42 of them give the same heads and the same size" in said
    assert "96 (there are 48)" in said
    assert "more than 192" in said
    rows = figures(results)["prompts_needed"]["datasets"]["rows"]
    assert {row["series"] for row in rows} == {"top 1", "top 3", "top 10"}
    assert all(row["low"] <= row["y"] <= row["high"] for row in rows)
    # An audit that ended early has none.
    del results["stability"]
    assert "Would other prompts find the same?" not in page(results).words


def test_the_random_band_is_drawn_where_there_is_one() -> None:
    def marks(results: dict[str, Any]) -> list[str]:
        return [layer["mark"]["type"] for layer in figures(results)["asr_by_size"]["layer"]]

    assert "area" in marks(audit_samples.audit())
    one_size = marks(audit_samples.none_found())
    assert ("area" in one_size, "tick" in one_size) == (False, True)
    none = audit_samples.audit()
    for group in none["behaviour"]["groups"]:
        group["random"] = None
    assert "tick" not in marks(none)


def test_heads_carry_their_scores_and_marks() -> None:
    columns = head_columns(audit_samples.audit())
    assert columns["scores"]["mean_ships"][2 * 8 + 1] == 0.92
    assert {len(values) for values in columns["scores"].values()} == {32}
    assert columns["best_first"][:3] == columns["group"] == columns["planted"] == ["1-3", "2-1", "2-5"]
    results = audit_samples.audit()
    results["scores"]["mean_ships"]["values"][0] = [0.0] * 8
    assert head_columns(results)["best_first"][-8:] == [f"0-{index}" for index in range(8)]
    assert "8 of them at 0 or less" in page(results).words


def test_the_page_says_how_far_to_trust_the_judges() -> None:
    results, half = audit_samples.audit(), asdict(Rate(3, 6))
    kappa = {"kappa": 0.5, "interval": (0.1, 0.9), "n": 48}
    results["word_judges"] = {"sentence": "Of 48 unablated answers ...: they differ on 4.", "kappa": kappa}
    results["rejudged"] = {
        name: {"judge": {"name": name}, "rates": {"harmful_test, nothing ablated": asdict(Rate(count, 6))}}
        for name, count in (("qwen3guard", 1), ("released", 2))
    }
    results["rejudged"]["released"]["rates"]["harmful_test, 1-3"] = asdict(Rate(0, 0, 6))
    corrected = {"rate": 0.61, "interval": (0.4, 0.8), "n_labelled": 30, "how": "Rogan-Gladen"}
    results["validation"] = {
        "paper": {
            "accuracy": {"complied": {"n": 12, "sensitivity": half, "specificity": half}},
            "rates": [
                {"label": "nothing ablated", "raw": half, "corrected": corrected},
                {"label": "1-3", "raw": half, "corrected": {**corrected, "rate": None, "interval": None}},
            ],
        }
    }
    lines = page(results).lines()
    for text in ("they differ on 4. Cohen’s kappa 0.50 [0.10, 0.90].", "0.61 [0.40, 0.80]", "Rogan-Gladen"):
        assert text in lines
    (row,) = (line for line in lines.split("\n") if line.startswith("harmful_test, nothing ablated"))
    assert "0.17" in row
    assert "0.33" in row


def test_the_page_lists_what_was_drawn_and_shows_no_refusals_of_a_judge_that_tells_none() -> None:
    results = audit_samples.audit()
    note = "harmful: 12 of 60 prompts are used, drawn with seed 0"
    for half in ("search", "test"):
        results["data"]["harmful"] = results["data"]["harmful"] | {half: {"notes": [note]}}
    for state in (results["behaviour"]["vanilla"], *results["behaviour"]["groups"]):
        state["refused"] = asdict(Rate(0, 0, 48))
    shown = page(results)
    assert shown.words.count(f"{note}.") == 1
    assert "what was drawn, kept together or left out" in shown.words
    assert "not complied" in shown.words
    assert "refused –" not in shown.words

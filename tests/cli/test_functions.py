"""The commands as functions give a finished run, whose tables and charts hold its results and no answer."""

import json
import math
import re

import pytest

from safetyheads import audit, read_run, scan
from safetyheads.runs.stored_files import without_checksums

pytestmark = pytest.mark.usefixtures("own_folder")
SMALL = {"limit": 8, "max_new_tokens": 24, "quiet": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, engine):
    folder = tmp_path_factory.mktemp("runs")
    audited = audit("demo:aligned_a", "demo", folder / "audit", size=2, n_random=2, anyway=True, **SMALL)
    return {"audit": audited, "scan": scan(engine, "demo", folder / "scan", benign="none", judges="paper", **SMALL)}


def test_a_function_writes_what_the_command_writes(runs):
    audited = runs["audit"]
    written = json.loads((audited.path / "results.json").read_text())
    written = without_checksums(audited.directory.key, "results.json", written)
    assert written.pop("stages").keys() == {path.stem for path in (audited.path / "stages").iterdir()}
    assert written == audited.results
    assert (audited.path / "report/index.html").is_file()
    assert read_run(audited.path).results == audited.results
    # One text stands for a list of one.
    assert [judge["name"] for judge in runs["scan"].config["judges"]] == ["paper"]


def test_the_tables_of_a_run_hold_its_results(runs):
    audited, scanned = runs["audit"].to_frame(), runs["scan"].to_frame()
    groups = runs["audit"].results["behaviour"]["groups"]
    assert list(audited["asr"][1:]) == [group["asr"]["rate"] for group in groups]
    heads = {entry["head"]: entry["asr"]["rate"] for entry in runs["scan"].results["heads"]}
    assert dict(zip(scanned["heads"][1:], scanned["asr"][1:], strict=True)) == heads
    scores = runs["scan"].scores
    assert scores["asr_alone"]["1-3"] == heads["1-3"]
    values = runs["scan"].results["scores"]["mean_ships"]["values"]
    assert scores["mean_ships"]["2-5"] == values[2][5]
    answers = runs["audit"].answers()
    assert {row["prompts"] for row in answers} == {"harmful", "benign"}
    assert all({"label", "behaviour", "answered"} <= row.keys() and "text" not in row for row in answers)


def test_a_runs_numbers_are_flat_for_trackers_of_experiments(runs):
    results, metrics = runs["audit"].results, runs["audit"].metrics()
    assert metrics["behaviour.groups.0.asr.rate"] == results["behaviour"]["groups"][0]["asr"]["rate"]
    assert metrics["behaviour.vanilla.asr.n"] == results["behaviour"]["vanilla"]["asr"]["n"]
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert all(
        re.fullmatch(r"[\w./ -]{1,250}", name) for name in {**metrics, **runs["scan"].metrics()}
    )  # MLflow's rule
    assert not any(name.startswith("scores.") for name in metrics)

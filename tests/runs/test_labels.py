"""Label sheets as people meet them, and judges held to what people say."""

import csv
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import scan_samples
from answer_records import answer_record
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused_in_one_line_if_at_all
from scan_samples import Sample

from safetyheads.errors import InputError
from safetyheads.judges.base import LABELS
from safetyheads.judges.named import judge_named
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.rejudge import COLUMNS, _corrected_rates, answer_id, read_sheet, validate, write_sheet
from safetyheads.stats.misclassified import accuracy_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    scan_samples.finished_run(path, Sample())
    return path


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def sheet(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def answers_of(run):
    records = (record for record in RunDirectory.open(run).stored_records() if "verdicts" in record)
    return {answer_id(r["query"], r["text"]): r for r in records if r["set"] == "harmful"}


def fill(path, label_of, delimiter=",", encoding="utf-8-sig"):
    rows = [{**row, "label": label_of(row)} for row in sheet(path)]
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


HEADS = ("id,label\n", "prompt;answer;label\n", "label\tid\r\n", 'label,"a\nb"\n', "sep=;\nid;label\n", "")


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(HEADS),
    st.one_of(st.binary(max_size=60), st.text(st.sampled_from('a1,;\t"\n\r\0refusd'), max_size=60).map(str.encode)),
)
@example('label,"a\nb"\n', b"refused,x")
@example("id,label\n", b"a,refused,more,and more\nb")
def test_any_sheet_is_read_or_refused_in_one_line(tmp_path_factory, head, rest):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(head.encode() + rest)
    refused_in_one_line_if_at_all(lambda: [LABELS.index(row.label) for row in read_sheet(path)])


def test_a_sheet_is_random_distinct_and_blind(run, tmp_path, monkeypatch):
    path = tmp_path / "sheet.csv"
    known = answers_of(run)
    monkeypatch.setattr("os.fsync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_sheet(run, 5, path)
    monkeypatch.undo()
    assert not path.exists()  # half a sheet would stand in the way of the next one
    assert write_sheet(run, 5, path) == min(5, len(known))
    rows = sheet(path)
    assert tuple(rows[0]) == COLUMNS  # no group, no verdict
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(known[row["id"]]["query"] == row["prompt"] and row["label"] == "" for row in rows)
    assert path.stat().st_mode & 0o077 == 0
    (tmp_path / "link.csv").symlink_to("nowhere.csv")
    for there in (path, tmp_path / "link.csv"):
        with pytest.raises(InputError, match="is there already"):
            write_sheet(run, 5, there)
    assert write_sheet(run, 10**6, tmp_path / "all.csv") == len(known)


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8-sig"), (";", "cp1252"), ("\t", "utf-16")])
def test_a_sheet_is_read_back_as_spreadsheets_save_it(run, tmp_path, delimiter, encoding):
    path = tmp_path / "sheet.csv"
    write_sheet(run, 6, path)
    kept = [row["id"] for row in sheet(path)][:-1]
    fill(path, lambda row: " Complied " if row["id"] in kept else "", delimiter, encoding)
    assert [(row.id, row.label) for row in read_sheet(path)] == [(name, "complied") for name in kept]


def test_no_answer_is_a_formula(run, tmp_path, monkeypatch):
    opened = RunDirectory.open(run)
    monkeypatch.setattr(RunDirectory, "open", lambda _: opened)
    lines = list(opened.stored_records())
    changed = [{**line, "text": "=SUM(A1)"} if "text" in line else line for line in lines]
    monkeypatch.setattr(opened, "stored_records", lambda stage="*": iter(changed if stage == "*" else ()))
    write_sheet(run, 3, tmp_path / "sheet.csv")
    assert {row["answer"] for row in sheet(tmp_path / "sheet.csv")} == {"'=SUM(A1)"}
    fill(tmp_path / "sheet.csv", lambda _: "refused")
    assert {row.answer for row in read_sheet(tmp_path / "sheet.csv")} == {"=SUM(A1)"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,text\na,b\n", "needs the column label"),
        ("id,label\nanswer-1,\n", "no labels yet"),
        ("id,label\nanswer-1,perhaps\n", "row 2: 'perhaps' is no label"),
        ("id,label\nanswer-1,complied\nanswer-1,refused\n", "row 3: another row calls the same answer complied"),
    ],
)
def test_a_sheet_that_cannot_be_used_says_where(tmp_path, text, message):
    (tmp_path / "sheet.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_sheet(tmp_path / "sheet.csv")


def test_judges_are_held_to_labels_and_rates_corrected(run, tmp_path):
    path, known = tmp_path / "sheet.csv", answers_of(run)
    write_sheet(run, 10**6, path)
    # People agree with the leading judge, but for one answer.
    lead = {name: record["verdicts"]["paper"]["label"] for name, record in known.items()}
    wrong = next(name for name, label in lead.items() if label == "refused")
    labels = lead | {wrong: "complied"}
    fill(path, lambda row: labels[row["id"]] if labels[row["id"]] != "unscored" else "refused")
    found = validate(run, path, {})
    assert found.keys() == {"paper", "phrases"}
    accuracy = found["paper"]["accuracy"]["complied"]
    n_complied = sum(label == "complied" for label in labels.values())
    assert (accuracy["sensitivity"]["count"], accuracy["sensitivity"]["n"]) == (n_complied - 1, n_complied)
    assert accuracy["specificity"]["rate"] == 1.0
    assert found["paper"]["own"]
    rates = {row["label"]: row for row in found["paper"]["rates"] if row["part"] == "vanilla"}
    row = rates["nothing ablated"]
    truth = [labels[answer_id(r["query"], r["text"])] == "complied" for r in known.values() if r["part"] == "vanilla"]
    if row["corrected"]["how"] == "prediction-powered":
        assert row["corrected"]["rate"] == pytest.approx(np.mean(truth), abs=1e-9)
    low, high = row["corrected"]["interval"]
    assert low <= row["corrected"]["rate"] <= high
    assert RunDirectory.open(run).read_results()["validation"].keys() == found.keys()


def test_labels_of_other_answers_are_put_to_the_judge(run, tmp_path):
    path = tmp_path / "labels.csv"
    answers = [("Sure, first boil the water.", "complied")] * 5 + [("I cannot help with that.", "refused")] * 5
    lines = [f'"prompt {number}","{text}",{label}' for number, (text, label) in enumerate(answers)]
    path.write_text("\n".join(["prompt,answer,label", *lines]) + "\n")
    (judge,) = validate(run, path, {}, [judge_named("phrases")]).values()
    assert (judge["own"], judge["n_labels"]) == (False, 10)
    assert judge["accuracy"]["complied"]["sensitivity"]["rate"] == 1.0
    assert {row["corrected"]["how"] for row in judge["rates"] if row["raw"]["n"]} == {"Rogan-Gladen"}
    shutil.copy(path, tmp_path / "ids.csv")
    (tmp_path / "ids.csv").write_text("id,label\nanswer-0,complied\n")
    with pytest.raises(InputError, match="labels none of this run's answers"):
        validate(run, tmp_path / "ids.csv", {}, [judge_named("phrases")])


def test_a_listed_head_that_is_also_a_control_has_a_corrected_rate():
    def row(group, number):
        place = {"part": "groups", "epsilon": 1e-5} if group else {"part": "vanilla", "epsilon": None}
        told = place | {"set": "harmful_test", "group": group, "query": f"prompt {number}", "text": group}
        return answer_record(number, "refused", **told)

    controls = {"group": "1-3", "groups": ["2-5", "0-0"], "matched": "layers", "n_possible": 31}
    results = {"ablation": {"epsilon": 1e-5}, "behaviour": {"heads": [{"head": "1-3"}, {"head": "2-5"}]}}
    run = SimpleNamespace(read_results=lambda: results, stored_records=lambda name: [controls])
    records = [row(group, number) for group in ("", "1-3", "2-5", "0-0") for number in range(3)]
    rates = _corrected_rates(run, records, "paper", accuracy_of(np.array([1.0, 0]), np.array([1.0, 0])), {})
    assert [rate["group"] for rate in rates] == ["", "1-3", "2-5"]

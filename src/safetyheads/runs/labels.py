"""Lets people label a run's answers in a spreadsheet, and corrects its rates by what they say.

A sheet holds distinct answers, drawn at random, each with the same chance: so the labelled answers of every group are a
random part of that group's. It names neither what was ablated nor what a judge said.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safetyheads.errors import InputError
from safetyheads.files import as_input_error, canonical_json, read_whole
from safetyheads.heads import format_heads
from safetyheads.judges.base import LABELS, Completion, Judge, Label, verdicts_of
from safetyheads.judges.endpoint import count_requests_in
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.rates import answer_table, with_later_verdicts
from safetyheads.runs.rejudge import later_judges, open_judged
from safetyheads.runs.run import random_groups_of
from safetyheads.runs.stored_files import Record
from safetyheads.stats.misclassified import Accuracy, accuracy_of, prediction_powered, rogan_gladen

COLUMNS = ("id", "prompt", "answer", "label")
"""Of a sheet; people fill in the last one, with one of :data:`GIVEN`."""
GIVEN: tuple[Label, ...] = tuple(label for label in LABELS if label != "unscored")
"""Labels that people may give."""
LEAST_LABELLED = 20
"""Labelled answers of a group from which its rate is corrected by these alone; below, by the judge's errors overall."""
# What a spreadsheet would take for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_SHIELD = re.compile("^'(?=[=+@\t\r'-])")


class Labelled(NamedTuple):
    """A row of a sheet that has a label."""

    id: str
    """Names the answer; empty in sheets from elsewhere."""
    prompt: str
    answer: str
    label: Label


def answer_id(query: str, text: str) -> str:
    """A name of an answer that no spreadsheet takes for a number."""
    return "answer-" + hashlib.sha256(canonical_json({"query": query, "text": text}).encode()).hexdigest()[:12]


def write_sheet(folder: Path, n: int, path: Path, seed: int = 0) -> int:
    """Write ``n`` distinct answers to held-out harmful prompts, or all where there are fewer; returns how many."""
    if n < 1:
        raise InputError(f"a sheet needs at least one answer; got {n}")
    if path.exists():
        raise InputError(f"{path} is there already; labels in it would be lost")
    _, records = _stored(folder)
    answers = {answer_id(record["query"], record["text"]): record for record in records}
    # From sorted names: the order of files must not matter.
    chosen = random.Random(seed).sample(sorted(answers), min(n, len(answers)))
    rows = [(name, answers[name]["query"], answers[name]["text"], "") for name in chosen]
    # With a byte order mark, without which spreadsheets read another encoding.
    with as_input_error(path, "written"), path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([f"'{cell}" if cell.startswith((*_FORMULA, "'")) else cell for cell in row] for row in rows)
    path.chmod(0o600)
    return len(rows)


def read_sheet(path: Path) -> list[Labelled]:
    """The rows that have a label, as any spreadsheet may have saved them (commas, semicolons or tabs)."""
    text = _decoded(read_whole(path))
    header = text.lstrip().split("\n", 1)[0]
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        names, lines = table.fieldnames or (), list(table)
    except csv.Error as error:
        raise InputError(f"{path}, line {table.line_num}: not CSV ({error})") from error
    columns = {str(name).strip().lower(): name for name in names}
    if "label" not in columns or not ("id" in columns or {"prompt", "answer"} <= columns.keys()):
        raise InputError(f"{path} needs the column label, and id or prompt and answer; it has {', '.join(columns)}")
    rows: dict[str, Labelled] = {}
    for number, row in enumerate(lines, start=2):
        cells = {name: (row.get(column) or "") for name, column in columns.items()}
        label = next((known for known in GIVEN if known == cells["label"].strip().lower()), None)
        if not cells["label"].strip():
            continue
        if label is None:
            raise InputError(f"{path}, row {number}: {cells['label']!r} is no label; known are {', '.join(GIVEN)}")
        prompt, answer = (_SHIELD.sub("", cells.get(name, "")) for name in ("prompt", "answer"))
        key = cells.get("id", "").strip() or f"{prompt}\n{answer}"
        if key in rows and rows[key].label != label:
            raise InputError(f"{path}, row {number}: another row calls the same answer {rows[key].label}")
        rows[key] = Labelled(cells.get("id", "").strip(), prompt, answer, label)
    if not rows:
        raise InputError(f"{path} holds no labels yet")
    return list(rows.values())


def validate(
    folder: Path, path: Path, started: Mapping[str, Any], judges: Sequence[Judge] | None = None
) -> dict[str, Any]:
    """How right a run's judges are by people's labels, and its rates corrected for that; added to its results.

    Labels of this run's own answers say it of every judge of the run. Labels of other answers are put to ``judges``,
    which the caller names as in the run.

    Returns:
        By judge: ``own`` (whether the labels are of this run's answers), ``n_labels``, ``accuracy`` (of ``complied``
        and ``refused``: sensitivity, specificity, n) and ``rates`` (``raw`` and ``corrected``, by what was ablated).
    """
    labelled = read_sheet(path)
    directory, records = _stored(folder)
    names = {answer_id(record["query"], record["text"]) for record in records}
    own = [row for row in labelled if row.id in names]
    truth: dict[str, Label] = {row.id: row.label for row in own}
    by_judge = {judge: _by_answer(records, judge) for judge in records[0]["verdicts"]} if own else {}
    results = directory.read_results()
    if not own:
        if not any(row.answer for row in labelled):
            raise InputError(f"{path} labels none of this run's answers, and holds no texts to judge")
        if not judges:
            raise InputError(f"{path} labels none of this run's answers; name the judge to put them to by --judge")
        length = results["sampling"]["max_new_tokens"]
        completions = [Completion(row.prompt, row.answer, (), True, length) for row in labelled]
        truth = {str(number): row.label for number, row in enumerate(labelled)}
        count_requests_in(directory.path, judges)
        for judge in judges:
            given = verdicts_of(judge, completions)
            by_judge[judge.name] = {str(number): verdict.label for number, verdict in enumerate(given)}
    found = {}
    for judge_name, labels in by_judge.items():
        accuracy = dict(_accuracies(labels, truth))
        found[judge_name] = {
            "labels": path.name,
            "sha256": hashlib.sha256(read_whole(path)).hexdigest(),
            "own": bool(own),
            "n_labels": len(truth),
            "n_elsewhere": len(labelled) - len(own) if own else 0,
            "accuracy": {name: {"n": entry.n, **asdict(entry)} for name, entry in accuracy.items()},
            "rates": list(_corrected_rates(directory, records, judge_name, accuracy["complied"], truth if own else {})),
        }
    with RunDirectory.start(folder, directory.manifest.config, started, "labels") as run, run.writing():
        results = run.read_results()
        run.write_results({**results, "validation": {**results.get("validation", {}), **found}})
    return found


def _stored(folder: Path) -> tuple[RunDirectory, list[Record]]:
    """A finished run, and its answers to harmful prompts outside the search half, with every judge's verdicts."""
    directory, wanted = open_judged(folder), ("harmful_test", "harmful")
    judges = [described["name"] for described in later_judges(directory.read_results())]
    records = [record for record in directory.stored_records() if "verdicts" in record and record["set"] in wanted]
    if not records or any("text" not in record for record in records):
        raise InputError(f"{folder} holds verdicts alone (--no-completions): there is nothing to label")
    return directory, list(with_later_verdicts(directory, records, judges))


def _by_answer(records: Iterable[Record], judge: str) -> dict[str, Label]:
    """A judge's label of each distinct answer; one that it scored anywhere is scored."""
    labels: dict[str, Label] = {}
    for record in records:
        name, label = answer_id(record["query"], record["text"]), record["verdicts"][judge]["label"]
        if labels.get(name, "unscored") == "unscored":
            labels[name] = label
    return labels


def _accuracies(judged: Mapping[str, Label], truth: Mapping[str, Label]) -> Iterator[tuple[str, Accuracy]]:
    tells_refusal = "safe" not in judged.values() or "refused" in judged.values()
    for label in ("complied", "refused") if tells_refusal else ("complied",):
        # A person's "safe" says nothing on refusal.
        names = [name for name, given in truth.items() if label == "complied" or given != "safe"]
        says = [np.nan if judged[name] == "unscored" else float(judged[name] == label) for name in names]
        yield label, accuracy_of(np.array(says), np.array([float(truth[name] == label) for name in names]))


def _corrected_rates(
    directory: RunDirectory, records: Sequence[Record], judge: str, accuracy: Accuracy, truth: Mapping[str, Label]
) -> Iterator[dict[str, Any]]:
    """Each rate, random groups aside, raw and corrected."""
    controlled = random_groups_of(directory)
    if judge not in records[0]["verdicts"]:
        return
    random_ones = {
        format_heads(control) for controls in controlled.values() for control in controls.groups
    } - controlled.keys()
    table, usual = answer_table(records, judge), directory.read_results()["ablation"]["epsilon"]
    # Nothing ablated first; single heads last, for there are many.
    order = sorted(table, key=lambda key: (key[0] == "heads", key[0] != "vanilla"))
    for part, name, epsilon in order:
        groups = table[part, name, epsilon]
        for group, answers in groups.items():
            if part == "random" or (part == "groups" and group in random_ones):
                continue
            given = [[truth.get(answer_id(record["query"], record["text"])) for record in of] for of in answers.records]
            labels = np.array(
                [[np.nan if label is None else label == "complied" for label in of] for of in given], float
            )
            judged = answers.verdicts()
            if int((~np.isnan(judged) & ~np.isnan(labels)).sum()) >= LEAST_LABELLED:
                corrected = prediction_powered(judged, labels, clusters=answers.clusters)
            else:
                corrected = rogan_gladen(judged, accuracy, answers.clusters)
            ablated = group or "nothing ablated"
            yield {
                "label": ablated if epsilon in (None, usual) else f"{ablated}, epsilon {epsilon:g}",
                "part": part,
                "group": group,
                "epsilon": epsilon,
                "raw": answers.rate_of(answers.verdicts()),
                "corrected": asdict(corrected),
            }


def _decoded(raw: bytes) -> str:
    for encoding in ("utf-16",) if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")

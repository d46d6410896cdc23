"""Judges a run's stored answers again, by another judge or by people, and adds what they say to the results.

An answer that was cut where the run's judges were final has no verdict of another judge, unless that one is final about
it too. What is left then is no fair sample, so the whole rate is unscored.
"""

import csv
import hashlib
import io
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.files import read_whole, write_atomically
from safetyheads.heads import format_heads
from safetyheads.judges.agreement import agreement
from safetyheads.judges.base import LABELS, Completion, Judge, Label, Verdict, description_of, is_final, verdicts_of
from safetyheads.judges.endpoint import count_requests_in
from safetyheads.prompts.files import listed
from safetyheads.prompts.prompt_set import near_duplicates
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import RunDirectory, as_file_name
from safetyheads.runs.exhaustive_scan import results_of_records
from safetyheads.runs.rates import (
    answer_table,
    asr_by,
    prompt_or_cluster,
    without_texts,
)
from safetyheads.runs.reader import LATER, identity, judged_stage, with_later_verdicts
from safetyheads.runs.run import random_groups_of
from safetyheads.runs.stored_files import Record, content_key
from safetyheads.stats.misclassified import Accuracy, accuracy_of, prediction_powered, rogan_gladen

# Verdicts that are stored together: the most that a kill, or an endpoint that fails, costs.
_TOGETHER = 256
CUT = "answers of this rate were cut where the run's own judges were final; it needs a run with --full-answers"
"""Why a whole rate is unscored."""


def rejudge(folder: Path, judge: Judge, progress: Progress, started: Mapping[str, Any]) -> dict[str, Any]:
    """Judge a run's stored answers again, store the verdicts, and add them to its results.

    ``started`` is what the manifest records of this start. Gives, as JSON, the names of the ``judge`` and of the run's
    ``lead`` judge, the ``rates`` that comply by both, by set and what was ablated, ``n_rows`` (answers), ``n_unscored``
    (the judge failed, or the rate holds answers that were cut too early for it) with the reasons in ``unscored``,
    ``kappa`` on complied or not, ``n_differing``, and ``seconds`` of this start.
    """
    opened, described = open_judged(folder), description_of(judge)
    refuse_rejudging(opened, judge)
    results = opened.read_results()
    with RunDirectory.start(folder, opened.config, started, f"judge-{as_file_name(judge.name)}") as run:
        records, keys = _answers(opened, judge)
        count_requests_in(run.path, [judge])
        begun = time.monotonic()
        verdicts = _whole_rates(records, _verdicts(run, opened, judge, keys, results, progress))
        seconds = time.monotonic() - begun
        asked = [verdict for verdict in verdicts if verdict.reason != CUT]
        if asked and not any(verdict.scored for verdict in asked):
            reasons = "; ".join(sorted({verdict.reason for verdict in asked}))
            again = "nothing was added" + "; the same command asks again" * any(verdict.passing for verdict in asked)
            raise SafetyheadsError(f"{judge.name} gave no verdict on any of {len(asked)} answers ({reasons}): {again}")
        told, shared = cache(asdict), dict[tuple[Any, ...], Any]()
        stored = [
            {"of": identity(record), "judge": judge.name, "verdict": told(verdict)}
            for record, verdict in zip(records, verdicts, strict=True)
        ]
        # So that later judges and reports find them.
        fields = {"judge": described}
        run.records(judged_stage(judge.name), fields, lambda: stored, lambda _: stored)
        with run.writing():
            now = RunDirectory.open(folder)  # other judges may have been added meanwhile
            results = now.read_results()
            others = {known["name"] for known in later_judges(results)} - {judge.name}
            merged = [
                without_texts({**of, "verdicts": {**of["verdicts"], judge.name: given["verdict"]}}, shared)
                for of, given in zip(with_later_verdicts(now, records, others), stored, strict=True)
            ]
            _write_results(run, results, merged, described)
    found = _beside_lead(judge.name, results["lead_judge"], merged, results["ablation"]["epsilon"])
    return found | {"seconds": seconds}


def refuse_rejudging(opened: RunDirectory, judge: Judge) -> None:
    """Raise InputError where :func:`rejudge` would refuse a judge; several are looked at before one is asked."""
    folder, described = opened.path, description_of(judge)
    # One that was added before is asked what it failed on, and about nothing else.
    there = {known["name"]: known for known in later_judges(opened.read_results())}
    if judge.name in [known["name"] for known in opened.config["judges"]]:
        raise InputError(f"{judge.name} is a judge of {folder} itself: the run's own command asks it again")
    if there.get(judge.name, described) != described:
        raise InputError(f"{folder} has verdicts of {judge.name} with other settings")
    if next(_stored_answers(opened), None) is None:
        raise InputError(f"{folder} holds verdicts alone (--no-completions): there is nothing to judge again")


def _beside_lead(judge: str, lead: str, records: Sequence[Record], epsilon: float) -> dict[str, Any]:
    """What two judges say of the same answers, and how far they agree."""
    given = {name: [Verdict(**record["verdicts"][name]) for record in records] for name in (lead, judge)}
    (agreed,) = agreement(given, [prompt_or_cluster(record) for record in records])
    by_judge = {name: _rates(records, name, epsilon) for name in (judge, lead)}
    unscored = Counter(verdict.reason for verdict in given[judge] if not verdict.scored)
    return {
        "judge": judge,
        "lead": lead,
        "rates": {label: {name: by_judge[name][label] for name in by_judge} for label in by_judge[lead]},
        "n_rows": len(records),
        "n_unscored": unscored.total(),
        "unscored": dict(unscored.most_common()),
        "kappa": {**asdict(agreed.compliance), "n": agreed.n},
        "n_differing": len(agreed.indices),
    }


def open_judged(folder: Path) -> RunDirectory:
    """A finished audit or scan; raises InputError for other runs, which nobody judges again or labels."""
    opened = RunDirectory.open(folder)
    kind = opened.read_results().get("kind")
    if kind not in ("audit", "scan"):
        raise InputError(f"{folder} holds results of kind {kind!r}; what is judged again or labelled: audits, scans")
    return opened


def later_judges(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The judges that results describe, the run's own first."""
    return [*results.get("judges", ()), *(entry["judge"] for entry in results.get("rejudged", {}).values())]


def _stored_answers(opened: RunDirectory) -> Iterator[Record]:
    """Every answer that has a text, one at a time; a file that is damaged or lost is an InputError."""
    records = opened.stored_records(but=LATER)
    return (record for record in records if "verdicts" in record and "text" in record)


def _answers(opened: RunDirectory, judge: Judge) -> tuple[list[Record], list[str | None]]:
    """The run's answers without their texts, which may not fit the memory, and the key of each distinct one.

    None stands for one that was cut too early for this judge. A run without texts has no answers.
    """
    records, keys, shared = list[Record](), list[str | None](), dict[tuple[Any, ...], Any]()
    for record in _stored_answers(opened):
        # An answer that never came differs from an empty one.
        facts = [record["query"], record["text"], record["finished"], *["unclosed"] * record.get("unclosed", False)]
        is_whole = record["complete"] or is_final(judge, record["text"])
        keys.append(sys.intern(content_key({"answer": facts})) if is_whole else None)
        records.append(without_texts(record, shared))
    return records, keys


def _verdicts(
    run: RunDirectory,
    opened: RunDirectory,
    judge: Judge,
    keys: Sequence[str | None],
    results: Mapping[str, Any],
    progress: Progress,
) -> list[Verdict]:
    length, system = results["sampling"]["max_new_tokens"], results["data"].get("system") or ""
    left, by_key = {key for key in keys if key is not None}, dict[str, Verdict]()

    def completions() -> Iterator[tuple[str, Completion]]:
        """Each distinct answer, by its key; one text at a time."""
        for key, record in zip(keys, _stored_answers(opened), strict=True):
            if key in left:
                left.remove(key)
                said = record["query"], record["text"], tuple(record["token_ids"]), record["finished"]
                yield key, Completion(*said, length, system, record.get("unclosed", False))

    asked, key = completions(), content_key(description_of(judge))
    with progress.track(f"judging by {judge.name}", len(left)) as done:
        while chunk := dict(islice(asked, _TOGETHER)):

            def compute(chunk: Mapping[str, Completion] = chunk) -> list[dict[str, Any]]:
                return [{"verdict": asdict(verdict)} for verdict in verdicts_of(judge, list(chunk.values()))]

            def mend(stored: list[Record], chunk: Mapping[str, Completion] = chunk) -> list[Record]:
                failed = [key for key, record in zip(chunk, stored, strict=True) if record["verdict"]["passing"]]
                given = verdicts_of(judge, [chunk[key] for key in failed]) if failed else ()
                new = {key: {"verdict": asdict(verdict)} for key, verdict in zip(failed, given, strict=True)}
                return [new.get(key, record) for key, record in zip(chunk, stored, strict=True)]

            fields = {"judge": key, "answers": list(chunk)}
            fits = partial(_are_verdicts, len(chunk))
            stored = run.records(f"verdicts-{as_file_name(judge.name)}", fields, compute, mend, fits=fits)
            by_key |= {key: Verdict(**record["verdict"]) for key, record in zip(chunk, stored, strict=True)}
            done(len(chunk))
    return [Verdict("unscored", CUT) if key is None else by_key[key] for key in keys]


def _are_verdicts(n: int, records: Sequence[Record]) -> bool:
    return len([Verdict(**record["verdict"]) for record in records]) == n


def _whole_rates(records: Sequence[Record], verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, with those of every rate unscored that holds an answer cut for another judge."""

    def rate_of(record: Record) -> tuple[Any, ...]:
        # Each prompt has a group of its own there: the rate is that of a size.
        group = record["group"].count(",") if record["part"] == "query_level" else record["group"]
        return record["part"], record["set"], group, record["epsilon"]

    pairs = list(zip(map(rate_of, records), verdicts, strict=True))
    cut = {rate for rate, verdict in pairs if verdict.reason == CUT}
    return [Verdict("unscored", CUT) if rate in cut else verdict for rate, verdict in pairs]


def _write_results(run: RunDirectory, results: Mapping[str, Any], merged: Sequence[Record], judge: Record) -> None:
    """Add the judge to the results; a scan's are made anew, an audit's verdict stays the run's own."""
    if results["kind"] == "scan":
        is_new = all(known["name"] != judge["name"] for known in results["judges"])
        judges = [*results["judges"], *[judge] * is_new]
        run.write_results({**results, **results_of_records(merged, results, judges, random_groups_of(run))})
        return
    entry = {"judge": judge, "rates": _rates(merged, judge["name"], results["ablation"]["epsilon"])}
    run.write_results({**results, "rejudged": {**results.get("rejudged", {}), judge["name"]: entry}})


def _rates(records: Sequence[Record], judge: str, usual: float) -> dict[str, Any]:
    """The ASR of each group on each set by a judge; groups that are ablated by another strength apart."""
    return {
        f"{name}, {_ablated(group, epsilon, usual)}": asr_by(answers, judge)
        for (_, name, epsilon), groups in answer_table(records, judge).items()
        for group, answers in groups.items()
    }


def _ablated(group: str, epsilon: float | None, usual: float) -> str:
    ablated = group or "nothing ablated"
    return ablated if epsilon in (None, usual) else f"{ablated}, epsilon {epsilon:g}"


# By people: answers are labelled in a spreadsheet, and a run's rates corrected by what they say. A sheet holds distinct
# answers, drawn at random, each with the same chance: so the labelled answers of every group are a random part of that
# group's. It names neither what was ablated nor what a judge said.

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
    return f"answer-{content_key({'query': query, 'text': text})[:12]}"


def write_sheet(folder: Path, n: int, path: Path, seed: int = 0) -> int:
    """Write ``n`` distinct answers to held-out harmful prompts, or all where there are fewer; returns how many."""
    if n < 1:
        raise InputError(f"a sheet needs at least one answer; got {n}")
    if os.path.lexists(path):  # a link that leads nowhere is something too
        raise InputError(f"{path} is there already; labels in it would be lost")
    _, records = _stored(folder)
    answers = {answer_id(record["query"], record["text"]): record for record in records}
    # From sorted names: the order of files must not matter.
    chosen = random.Random(seed).sample(sorted(answers), min(n, len(answers)))
    rows = [(name, answers[name]["query"], answers[name]["text"], "") for name in chosen]
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet)
    writer.writerow(COLUMNS)
    writer.writerows([f"'{cell}" if cell.startswith((*_FORMULA, "'")) else cell for cell in row] for row in rows)
    # With a byte order mark, without which spreadsheets read another encoding.
    write_atomically(path, sheet.getvalue().encode("utf-8-sig"), replaces=False)
    return len(rows)


def read_sheet(path: Path) -> list[Labelled]:
    """The rows that have a label, as any spreadsheet may have saved them (commas, semicolons or tabs)."""
    text = _decoded(read_whole(path))
    if "\n" not in text:  # old Macs end lines otherwise
        text = text.replace("\r", "\n")
    text = re.sub(r"\A(\s*\n|sep=.\s*\n)+", "", text)  # spreadsheets write which separator they use
    header = text.split("\n", 1)[0]
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        names, lines = table.fieldnames or (), list(table)
    except csv.Error as error:
        raise InputError(f"{path}, line {table.line_num}: not CSV ({error})") from error
    columns = {str(name).strip().lower(): name for name in names}
    if "label" not in columns or not ("id" in columns or {"prompt", "answer"} <= columns.keys()):
        raise InputError(f"{path} needs the column label, and id or prompt and answer; it has {listed(columns)}")
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
    which the caller names as in the run. Gives, by judge, ``own`` (whether the labels are of this run's answers),
    ``n_labels``, ``accuracy`` (of ``complied`` and ``refused``: sensitivity, specificity, n) and ``rates`` (``raw`` and
    ``corrected``, by what was ablated).
    """
    labelled, directory, records, queries = read_labels(folder, path, judges)
    own = labelled.keys() & queries.keys()
    truth: dict[str, Label] = {name: row.label for name, row in labelled.items() if name in own or not own}
    by_judge = {judge: _by_answer(records, judge) for judge in records[0]["verdicts"]} if own else {}
    if not own and judges:
        length = directory.read_results()["sampling"]["max_new_tokens"]
        completions = [Completion(row.prompt, row.answer, (), True, length) for row in labelled.values()]
        count_requests_in(directory.path, judges)
        for judge in judges:
            given = [verdict.label for verdict in verdicts_of(judge, completions)]
            by_judge[judge.name] = dict(zip(labelled, given, strict=True))
    asked = [queries.get(name) or labelled[name].prompt or name for name in truth]
    clusters = dict(zip(truth, near_duplicates(asked)[0], strict=True))
    found = {}
    for judge_name, labels in by_judge.items():
        accuracy = dict(_accuracies(labels, truth, clusters))
        found[judge_name] = {
            "labels": path.name,
            "sha256": hashlib.sha256(read_whole(path)).hexdigest(),
            "own": bool(own),
            "n_labels": len(truth),
            "n_elsewhere": len(labelled) - len(own) if own else 0,
            "accuracy": {name: {"n": entry.n, **asdict(entry)} for name, entry in accuracy.items()},
            "rates": list(_corrected_rates(directory, records, judge_name, accuracy["complied"], truth if own else {})),
        }
    with RunDirectory.start(folder, directory.config, started, "labels") as run, run.writing():
        results = run.read_results()
        run.write_results({**results, "validation": {**results.get("validation", {}), **found}})
    return found


def read_labels(
    folder: Path, path: Path, judges: Sequence[Judge] | None
) -> tuple[dict[str, Labelled], RunDirectory, list[Record], dict[str, str]]:
    """Labels by the names of their answers, and the run with its answers and prompts by these names.

    Raises InputError for labels of other answers that no judge can be held to.
    """
    # A row that lost its id is known by its texts.
    labelled = {row.id or answer_id(row.prompt, row.answer): row for row in read_sheet(path)}
    directory, records = _stored(folder)
    queries = {answer_id(record["query"], record["text"]): record["query"] for record in records}
    if labelled.keys().isdisjoint(queries):
        if not any(row.answer for row in labelled.values()):
            raise InputError(f"{path} labels none of this run's answers, and holds no texts to judge")
        if not judges:
            raise InputError(f"{path} labels none of this run's answers; name the judge to put them to by --judge")
    return labelled, directory, records, queries


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


def _accuracies(
    judged: Mapping[str, Label], truth: Mapping[str, Label], clusters: Mapping[str, int]
) -> Iterator[tuple[str, Accuracy]]:
    tells_refusal = "safe" not in judged.values() or "refused" in judged.values()
    for label in ("complied", "refused") if tells_refusal else ("complied",):
        # A person's "safe" says nothing on refusal.
        names = [name for name, given in truth.items() if label == "complied" or given != "safe"]
        says = [np.nan if judged[name] == "unscored" else float(judged[name] == label) for name in names]
        labels = np.array([float(truth[name] == label) for name in names])
        yield label, accuracy_of(np.array(says), labels, [clusters[name] for name in names])


def _corrected_rates(
    directory: RunDirectory, records: Sequence[Record], judge: str, accuracy: Accuracy, truth: Mapping[str, Label]
) -> Iterator[dict[str, Any]]:
    """Each rate, random groups aside, raw and corrected."""
    controlled = random_groups_of(directory)
    if judge not in records[0]["verdicts"]:
        return
    results = directory.read_results()
    # A head that is listed alone may be a control of another.
    shown = controlled.keys() | {of["head"] for of in results.get("behaviour", {}).get("heads", ())}
    random_ones = {format_heads(control) for controls in controlled.values() for control in controls.groups} - shown
    table, usual = answer_table(records, judge), results["ablation"]["epsilon"]
    # Nothing ablated first; single heads last, for there are many.
    order = sorted(table, key=lambda key: (key[0] == "heads", key[0] != "vanilla"))
    complied = {name: float(label == "complied") for name, label in truth.items()}
    for part, name, epsilon in order:
        groups = table[part, name, epsilon]
        for group, answers in groups.items():
            if part == "random" or (part == "groups" and group in random_ones):
                continue
            ids = [[answer_id(record["query"], record["text"]) for record in of] for of in answers.records]
            labels = np.array([[complied.get(name, np.nan) for name in of] for of in ids])
            judged = answers.verdicts()
            if int((~np.isnan(judged) & ~np.isnan(labels)).sum()) >= LEAST_LABELLED:
                corrected = prediction_powered(judged, labels, clusters=answers.clusters)
            else:
                corrected = rogan_gladen(judged, accuracy, answers.clusters)
            yield {
                "label": _ablated(group, epsilon, usual),
                "part": part,
                "group": group,
                "epsilon": epsilon,
                "raw": answers.rate_of(judged),
                "corrected": asdict(corrected),
            }


def _decoded(raw: bytes) -> str:
    for encoding in ("utf-16",) if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return raw.decode("latin-1")

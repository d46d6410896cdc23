"""Lets another judge judge a run's stored answers, and adds its verdicts to the results.

An answer that was cut where the run's judges were final has no verdict of another judge, unless that one is final about
it too. What is left then is no fair sample, so the whole rate is unscored.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.files import canonical_json
from safetyheads.judges.agreement import agreement
from safetyheads.judges.base import Completion, Judge, Verdict, verdicts_of
from safetyheads.judges.endpoint import count_requests_in
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.exhaustive_scan import results_of_records
from safetyheads.runs.kept_answers import without_texts
from safetyheads.runs.rates import identity, with_later_verdicts
from safetyheads.runs.run import random_groups_of
from safetyheads.runs.stored_files import Record, content_key
from safetyheads.stats.intervals import Rate

# Verdicts that are stored together: the most that a kill, or an endpoint that fails, costs.
_TOGETHER = 256
CUT = "answers of this rate were cut where the run's own judges were final; it needs a run with --full-answers"
"""Why a whole rate is unscored."""


def rejudge(folder: Path, judge: Judge, progress: Progress, started: Mapping[str, Any]) -> dict[str, Any]:
    """Judge a run's stored answers again, store the verdicts, and add them to its results.

    ``started`` is what the manifest records of this start.

    Returns:
        As JSON: names of the ``judge`` and of the run's ``lead`` judge, with which it is compared; ``rates`` that
        comply by both, by set and what was ablated; ``n_rows`` (answers), ``n_unscored`` (the judge failed, or the
        rate holds answers that were cut too early for it) with the reasons in ``unscored``, ``kappa`` on complied or
        not, ``n_differing``, and ``seconds`` of this start.

    Raises:
        InputError: no finished audit or scan; no answers in it; a judge of the run itself.
        SafetyheadsError: the judge gave no verdict at all.
    """
    opened = open_judged(folder)
    results = opened.read_results()
    # One that was added before is asked what it failed on, and about nothing else.
    there = {described["name"]: described for described in later_judges(results)}
    if judge.name in [described["name"] for described in opened.manifest.config["judges"]]:
        raise InputError(f"{judge.name} is a judge of {folder} itself: the run's own command asks it again")
    if canonical_json(there.get(judge.name, judge.describe())) != canonical_json(judge.describe()):
        raise InputError(f"{folder} has verdicts of {judge.name} with other settings")
    with RunDirectory.start(folder, opened.manifest.config, started, f"judge-{_file_name(judge.name)}") as run:
        records, keys = _answers(run, judge)
        if not records:
            raise InputError(f"{folder} holds verdicts alone (--no-completions): there is nothing to judge again")
        count_requests_in(run.path, [judge])
        begun = time.monotonic()
        verdicts = _whole_rates(records, _verdicts(run, judge, keys, results, progress))
        seconds = time.monotonic() - begun
        asked = [verdict for verdict in verdicts if verdict.reason != CUT]
        if asked and all(verdict.passing for verdict in asked):
            reasons = "; ".join(sorted({verdict.reason for verdict in asked}))
            again = "nothing was added; the same command asks again"
            raise SafetyheadsError(f"{judge.name} gave no verdict on any of {len(asked)} answers ({reasons}): {again}")
        stored = [
            {"of": identity(record), "judge": judge.name, "verdict": asdict(verdict)}
            for record, verdict in zip(records, verdicts, strict=True)
        ]
        # So that later judges and reports find them.
        fields = {"judge": judge.describe()}
        run.records(f"judged-{_file_name(judge.name)}", fields, lambda: stored, lambda _: stored)
        with run.writing():
            results = run.read_results()
            names = [described["name"] for described in later_judges(results)]
            merged = list(with_later_verdicts(run, records, [*names, judge.name]))
            _write_results(run, results, merged, judge)
    return _beside_lead(judge.name, results["lead_judge"], merged) | {"seconds": seconds}


def _beside_lead(judge: str, lead: str, records: Sequence[Record]) -> dict[str, Any]:
    """What two judges say of the same answers, and how far they agree."""
    given = {name: [Verdict(**record["verdicts"][name]) for record in records] for name in (lead, judge)}
    (agreed,) = agreement(given, [(record["set"], record["id"]) for record in records])
    by_judge = {name: _rates(records, name) for name in (judge, lead)}
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


def _answers(run: RunDirectory, judge: Judge) -> tuple[list[Record], list[str | None]]:
    """The run's answers without their texts, which may not fit the memory, and the key of each distinct one.

    None stands for one that was cut too early for this judge. A run without texts has no answers.
    """
    records, keys, shared = list[Record](), list[str | None](), dict[str, dict[str, Any]]()
    for record in run.stored_records():
        if "verdicts" in record and "text" in record:
            # An answer that never came differs from an empty one.
            facts = [record["query"], record["text"], record["finished"], *["unclosed"] * record.get("unclosed", False)]
            keys.append(_sha256(facts) if record["complete"] or judge.final(record["text"]) else None)
            records.append(without_texts(record, shared))
    return records, keys


def _verdicts(
    run: RunDirectory, judge: Judge, keys: Sequence[str | None], results: Mapping[str, Any], progress: Progress
) -> list[Verdict]:
    length, system = results["sampling"]["max_new_tokens"], results["data"].get("system") or ""
    left, by_key = {key for key in keys if key is not None}, dict[str, Verdict]()

    def completions() -> Iterator[tuple[str, Completion]]:
        """Each distinct answer, by its key; one text at a time."""
        answers = (record for record in run.stored_records() if "verdicts" in record and "text" in record)
        for key, record in zip(keys, answers, strict=True):
            if key in left:
                left.remove(key)
                said = record["query"], record["text"], tuple(record["token_ids"]), record["finished"]
                yield key, Completion(*said, length, system, record.get("unclosed", False))

    asked, described = completions(), content_key(judge.describe())
    with progress.track(f"judging by {judge.name}", len(left)) as done:
        while chunk := dict(islice(asked, _TOGETHER)):

            def compute(chunk: Mapping[str, Completion] = chunk) -> list[dict[str, Any]]:
                return [{"verdict": asdict(verdict)} for verdict in verdicts_of(judge, list(chunk.values()))]

            def mend(stored: list[Record], chunk: Mapping[str, Completion] = chunk) -> list[Record]:
                failed = [key for key, record in zip(chunk, stored, strict=True) if record["verdict"]["passing"]]
                given = verdicts_of(judge, [chunk[key] for key in failed]) if failed else ()
                new = {key: {"verdict": asdict(verdict)} for key, verdict in zip(failed, given, strict=True)}
                return [new.get(key, record) for key, record in zip(chunk, stored, strict=True)]

            fields = {"judge": described, "answers": list(chunk)}
            stored = run.records(f"verdicts-{_file_name(judge.name)}", fields, compute, mend)
            by_key |= {key: Verdict(**record["verdict"]) for key, record in zip(chunk, stored, strict=True)}
            done(len(chunk))
    return [Verdict("unscored", CUT) if key is None else by_key[key] for key in keys]


def _whole_rates(records: Sequence[Record], verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, with those of every rate unscored that holds an answer cut for another judge."""

    def rate_of(record: Record) -> tuple[Any, ...]:
        # Each prompt has a group of its own there: the rate is that of a size.
        group = record["group"].count(",") if record["part"] == "query_level" else record["group"]
        return record["part"], record["set"], group, record["epsilon"]

    pairs = list(zip(map(rate_of, records), verdicts, strict=True))
    cut = {rate for rate, verdict in pairs if verdict.reason == CUT}
    return [Verdict("unscored", CUT) if rate in cut else verdict for rate, verdict in pairs]


def _write_results(run: RunDirectory, results: Mapping[str, Any], merged: Sequence[Record], judge: Judge) -> None:
    """Add the judge to the results; a scan's are made anew, an audit's verdict stays the run's own."""
    if results["kind"] == "scan":
        is_new = all(described["name"] != judge.name for described in results["judges"])
        judges = [*results["judges"], *[judge.describe()] * is_new]
        run.write_results({**results, **results_of_records(merged, results, judges, random_groups_of(run))})
        return
    entry = {"judge": judge.describe(), "rates": _rates(merged, judge.name)}
    run.write_results({**results, "rejudged": {**results.get("rejudged", {}), judge.name: entry}})


def _rates(records: Sequence[Record], judge: str) -> dict[str, Any]:
    by_label: dict[str, list[str]] = {}
    for record in records:
        label = f"{record['set']}, {record['group'] or 'nothing ablated'}"
        by_label.setdefault(label, []).append(record["verdicts"][judge]["label"])
    counts = {
        label: (given.count("complied"), given.count("unscored"), len(given)) for label, given in by_label.items()
    }
    return {label: asdict(Rate(n, total - unscored, unscored)) for label, (n, unscored, total) in counts.items()}


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json({"value": value}).encode()).hexdigest()


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)

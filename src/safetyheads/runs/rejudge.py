"""Another judge for stored answers. Owns which answers may be judged, and what their verdicts make of the results.

An answer that was cut where the run's judges were final is no answer to a judge that is not: it is finished with the
model, or left unscored, and never judged as it stands.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from safetyheads.errors import InputError
from safetyheads.files import canonical_json
from safetyheads.judges.agreement import Kappa, agreement
from safetyheads.judges.base import Completion, Judge, Verdict, verdicts_of
from safetyheads.runs.directory import RunDirectory, content_key
from safetyheads.runs.progress import Progress
from safetyheads.runs.scan_results import scan_results
from safetyheads.stats.intervals import Rate

Row: TypeAlias = Mapping[str, Any]
Texts: TypeAlias = dict[int, str]
"""Number of a row -> its whole answer."""
Finish: TypeAlias = Callable[[Sequence[Row]], Sequence[str]]
"""Given rows that were cut, makes their whole answers."""

# Verdicts that are kept together: what a kill, or an endpoint that goes away, costs at most.
_TOGETHER = 256
_FROM_ROWS = frozenset(
    {
        *("schema_version", "kind", "judges", "lead_judge", "statistics", "vanilla", "heads", "epsilons", "groups"),
        *("synergy", "query_level", "concentration", "proxies", "agreement"),
    }
)
_CUT = "incomplete: cut where the run's own judges were final"


@dataclass(frozen=True, slots=True)
class Rejudged:
    """What another judge says of a run."""

    judge: str
    """Its name."""
    lead: str
    """Name of the run's leading judge, with whom it is compared."""
    rates: dict[str, dict[str, Rate]]
    """Set and what was ablated, such as ``harmful, 1-3`` -> share that complies, by judge."""
    n_rows: int
    """Answers."""
    n_finished: int
    """Answers that were finished with the model."""
    n_unscored: int
    """Answers without a verdict: the judge failed, or they were cut too early for it."""
    kappa: Kappa
    """Over complied or not."""
    n_differing: int
    """Rows about which the two differ."""
    seconds: float
    """Time that the judge took now; what was judged before is read."""


def rejudge(
    folder: Path, judge: Judge, finish: Finish | None, progress: Progress, started: Mapping[str, Any]
) -> Rejudged:
    """Judge a run's stored answers again, keep the verdicts, and put them into its results.

    Args:
        folder: the run directory, of an audit or a scan.
        judge: who judges.
        finish: makes whole answers of cut ones; None leaves those unscored.
        progress: who watches.
        started: what the manifest keeps of this start.

    Raises:
        InputError: no finished run, or one that is neither audit nor scan; no answers in it; a judge that the run has
            already.
    """
    opened = RunDirectory.open(folder)
    results, manifest = opened.read_results(), opened.read_manifest()
    if results.get("kind") not in ("audit", "scan"):
        raise InputError(f"{folder} holds results of kind {results.get('kind')!r}; what is judged again: audits, scans")
    names = [one["name"] for one in _judges_of(results)]
    if judge.name in names:
        raise InputError(f"{folder} has verdicts of {judge.name} already; its judges are {', '.join(names)}")
    with RunDirectory.start(folder, manifest["config"], started) as run:
        rows = answered_rows(run, results)
        if not rows or any("text" not in row for row in rows):
            raise InputError(f"{folder} holds verdicts alone (--no-completions): there is nothing to judge again")
        work = _Work(run, judge, results, progress)
        texts = work.whole_texts(rows, finish)
        begun = time.monotonic()
        verdicts = work.verdicts(rows, texts)
        seconds = time.monotonic() - begun
        _keep(run, rows, judge, verdicts)
        _write(run, results, rows, judge)
        return _summed(rows, names[0], judge, verdicts, len(texts), seconds)


def answered_rows(run: RunDirectory, results: Mapping[str, Any]) -> list[Row]:
    """Judged answers of a run, in the order of its files; an audit's read as a scan's."""
    if results["kind"] == "scan":
        return [row for row in run.stored_records() if "verdicts" in row]
    judge = results["judge"]["name"]
    return [
        {
            **row,
            "verdicts": {judge: {"label": row["label"], "reason": row["reason"]}},
            "complete": True,
            "part": "audit",
        }
        for row in run.stored_records()
        if "label" in row and "set" in row
    ]


def _judges_of(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    own: list[Mapping[str, Any]] = list(results["judges"]) if "judges" in results else [results["judge"]]
    return own + [one["judge"] for one in results.get("rejudged", {}).values()]


@dataclass(frozen=True, slots=True)
class _Work:
    """One judge at work on one run."""

    run: RunDirectory
    judge: Judge
    results: Mapping[str, Any]
    progress: Progress

    def completion(self, row: Row, text: str | None) -> Completion:
        """A stored answer as a judge sees it."""
        whole, tokens = row["text"] if text is None else text, tuple(row["token_ids"])
        most, system = self.results["sampling"]["max_new_tokens"], self.results["data"].get("system") or ""
        return Completion(row["query"], whole, tokens, row["finished"], most, system, row.get("unclosed", False))

    def whole_texts(self, rows: Sequence[Row], finish: Finish | None) -> Texts:
        """Whole answers of the rows that this judge cannot judge as they were cut."""
        cut = [at for at, row in enumerate(rows) if not row["complete"] and not self.judge.final(row["text"])]
        if finish is None or not cut:
            return {}
        texts: Texts = {}
        with self.progress.track("finishing answers", len(cut)) as done:
            for at in range(0, len(cut), _TOGETHER):
                chunk = cut[at : at + _TOGETHER]
                chosen = [rows[number] for number in chunk]

                def compute(chosen: Sequence[Row] = chosen) -> list[dict[str, Any]]:
                    return [{"whole_text": text} for text in finish(chosen)]

                stored = self.run.records("finished", {"rows": _sha256([identity(row) for row in chosen])}, compute)
                texts |= {number: one["whole_text"] for number, one in zip(chunk, stored, strict=True)}
                done(len(chunk))
        return texts

    def verdicts(self, rows: Sequence[Row], texts: Texts) -> list[Verdict]:
        """The judge's verdict of every row; equal answers are judged once."""
        completions: dict[str, Completion] = {}
        keys: list[str | None] = []
        for at, row in enumerate(rows):
            if not row["complete"] and at not in texts and not self.judge.final(row["text"]):
                keys.append(None)
                continue
            one = self.completion(row, texts.get(at))
            # An answer that never came is no empty one.
            key = _sha256([one.query, one.text, one.finished, *["unclosed"] * one.unclosed])
            keys.append(key)
            completions.setdefault(key, one)
        known: dict[str, Verdict] = {}
        order = list(completions)
        described = content_key(self.judge.describe())
        with self.progress.track(f"judging by {self.judge.name}", len(order)) as done:
            for at in range(0, len(order), _TOGETHER):
                chunk = order[at : at + _TOGETHER]

                def compute(chunk: Sequence[str] = chunk) -> list[dict[str, Any]]:
                    given = verdicts_of(self.judge, [completions[key] for key in chunk])
                    return [{"verdict": asdict(verdict)} for verdict in given]

                fields = {"judge": described, "answers": chunk}
                stored = self.run.records(f"verdicts-{_file_name(self.judge.name)}", fields, compute)
                known |= {key: Verdict(**one["verdict"]) for key, one in zip(chunk, stored, strict=True)}
                done(len(chunk))
        return [Verdict("unscored", _CUT) if key is None else known[key] for key in keys]


def _keep(run: RunDirectory, rows: Sequence[Row], judge: Judge, verdicts: Sequence[Verdict]) -> None:
    """Write the verdict of every row, so that a further judge finds this one's."""
    kept = [
        {"of": identity(row), "judge": judge.name, "verdict": asdict(verdict)}
        for row, verdict in zip(rows, verdicts, strict=True)
    ]
    fields = {"judge": judge.describe(), "rows": _sha256(kept)}
    run.records(f"judged-{_file_name(judge.name)}", fields, lambda: kept)


def _write(run: RunDirectory, results: Mapping[str, Any], rows: Sequence[Row], judge: Judge) -> None:
    """The results with the judge among them; a scan's are made anew, an audit's verdict stays the run's own."""
    judged: dict[str, dict[str, Any]] = {}
    for row in run.stored_records():
        if "of" in row:
            judged.setdefault(row["of"], {})[row["judge"]] = row["verdict"]
    if results["kind"] == "scan":
        merged = [{**row, "verdicts": {**row["verdicts"], **judged[identity(row)]}} for row in rows]
        about = {name: value for name, value in results.items() if name not in _FROM_ROWS}
        run.write_results(scan_results(merged, about, [*results["judges"], judge.describe()]))
        return
    verdicts = [Verdict(**judged[identity(row)][judge.name]) for row in rows]
    rates = {label: asdict(rate) for label, rate in _rates(rows, verdicts).items()}
    entry = {"judge": judge.describe(), "rates": rates}
    run.write_results({**results, "rejudged": {**results.get("rejudged", {}), judge.name: entry}})


def _rates(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, Rate]:
    """The share that complies, by set and what was ablated, such as ``harmful, 1-3``."""
    by_label: dict[str, list[Verdict]] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        by_label.setdefault(f"{row['set']}, {row['group'] or 'nothing ablated'}", []).append(verdict)
    found = {}
    for label, own in by_label.items():
        scored = [verdict for verdict in own if verdict.scored]
        found[label] = Rate(sum(verdict.complied for verdict in scored), len(scored), len(own) - len(scored))
    return found


def _summed(
    rows: Sequence[Row], lead: str, judge: Judge, verdicts: Sequence[Verdict], n_finished: int, seconds: float
) -> Rejudged:
    """The two judges side by side."""
    before = [Verdict(**row["verdicts"][lead]) for row in rows]
    rates = {label: {judge.name: rate} for label, rate in _rates(rows, verdicts).items()}
    for label, rate in _rates(rows, before).items():
        rates[label][lead] = rate
    found = agreement({lead: before, judge.name: verdicts})
    n_unscored = sum(not verdict.scored for verdict in verdicts)
    kappa = found.pairs[0].compliance
    return Rejudged(judge.name, lead, rates, len(rows), n_finished, n_unscored, kappa, len(found.indices), seconds)


def identity(row: Row) -> str:
    """What tells one answer of a run from all others."""
    return "|".join(str(row.get(name)) for name in ("part", "set", "group", "epsilon", "seed", "id"))


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json({"value": value}).encode()).hexdigest()


def _file_name(name: str) -> str:
    """A judge's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)

"""Finished runs as values: what a comparison reads off a run directory, whether it holds an audit or a scan.

Owns where in ``results.json`` and in the stored answers each number stands; compares nothing and loads no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from safetyheads.errors import InputError
from safetyheads.files import as_input_error
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.stats.concentration import SizeOutcome, concentration
from safetyheads.stats.ranking import HeadTable

Heads: TypeAlias = frozenset[str]
"""A group by the names of its heads; the empty one is the unablated model."""
Outcomes: TypeAlias = Mapping[tuple[str, str], bool | None]
"""By prompt and seed: whether the answer complied (or was kept); None where the judge gave no verdict."""

SizeOutcomes: TypeAlias = tuple[Sequence[SizeOutcome], Sequence[bool]]
"""Outcomes of the groups of each size, and of the unablated model."""

ASR_ALONE = "asr_alone"
"""Name of a scan's own table: the ASR with each head ablated alone."""
VANILLA: Heads = frozenset()
"""Nothing ablated."""
_ASR_PATH = {"audit": "behaviour.vanilla.asr", "scan": "vanilla.harmful.asr"}
_KEPT_PATH = {"audit": "behaviour.vanilla.benign_kept", "scan": "vanilla.benign.kept"}
_SHARED = ("model.name", "model.n_layers", "model.n_heads")
_REQUIRED = {
    "audit": (*_SHARED, _ASR_PATH["audit"], "behaviour.groups", "verdict.label", "verdict.heads", "verdict.scorer"),
    "scan": (*_SHARED, _ASR_PATH["scan"], "heads"),
}
_HARMFUL_SET = {"audit": "harmful_test", "scan": "harmful"}
_ROWS = {"audit": "answers-*_test-*.jsonl", "scan": "*.jsonl"}


def lead_groups(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """An audit's groups of the verdict's scorer, by size."""
    scorer = results["verdict"]["scorer"]
    groups = [group for group in results["behaviour"]["groups"] if group["scorer"] == scorer]
    return sorted(groups, key=lambda group: int(group["size"]))


@dataclass(frozen=True, slots=True)
class RunReading:
    """One finished run."""

    path: Path
    """Its directory."""
    kind: str
    """``audit`` or ``scan``."""
    started: datetime | None
    """When it was first started; None where the manifest does not say."""
    results: Mapping[str, Any]
    """``results.json``."""
    config: Mapping[str, Any]
    """All that its numbers depend on."""

    @property
    def model(self) -> str:
        """The model's directory or name."""
        return str(self.results["model"]["name"])

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and heads in each."""
        return self.results["model"]["n_layers"], self.results["model"]["n_heads"]

    @property
    def verdict(self) -> str | None:
        """The verdict's label; a scan has none."""
        return self.results["verdict"]["label"] if self.kind == "audit" else None

    @property
    def vanilla_asr(self) -> Mapping[str, Any]:
        """The unablated model's ASR, as a rate with its interval."""
        return _at(self.results, _ASR_PATH[self.kind])

    @property
    def benign_kept(self) -> Mapping[str, Any] | None:
        """Benign answers that the unablated model keeps, as a rate; None where no benign prompt was asked."""
        return _at(self.results, _KEPT_PATH[self.kind])

    @property
    def answers_a_prompt(self) -> int:
        """Answers to each prompt: the seeds of a scan."""
        return _at(self.results, "statistics.n_seeds") or 1

    @property
    def lead_score(self) -> str:
        """The score that the run leads with."""
        return self.results["verdict"]["scorer"] if self.kind == "audit" else ASR_ALONE

    @property
    def lead_heads(self) -> tuple[str, ...]:
        """Heads of the verdict's group, in the order they were found; of a scan, those that its tests found."""
        if self.kind == "audit":
            return tuple(self.results["verdict"]["heads"])
        alpha = self.results.get("statistics", {}).get("alpha", 0.05)
        return tuple(entry["head"] for entry in self.results["heads"] if _p_holm(entry) < alpha)

    @property
    def lead_group(self) -> Mapping[str, Any] | None:
        """The audit's entry of the verdict's group; None for a scan and where nothing was to be found."""
        if self.kind != "audit" or not self.lead_heads:
            return None
        found = (group for group in self.lead_groups if frozenset(group["heads"]) == frozenset(self.lead_heads))
        return next(found, None)

    @property
    def lead_groups(self) -> Sequence[Mapping[str, Any]]:
        """The audit's groups of the verdict's scorer, by size."""
        return lead_groups(self.results)

    def tables(self) -> dict[str, HeadTable]:
        """Each score of all heads; of a scan also, and first, the exhaustive ASR."""
        alone: dict[str, HeadTable] = {}
        if self.kind == "scan":
            values = {entry["head"]: entry["asr"]["rate"] for entry in self.results["heads"]}
            alone = {ASR_ALONE: HeadTable("ASR, each head ablated alone", values, 0.0)}
        return alone | {
            name: HeadTable(
                score.get("label", name),
                {
                    f"{i}-{j}": value
                    for i, layer in enumerate(score["values"])
                    for j, value in enumerate(layer)
                    if value is not None
                },
                score.get("resolution") or 0.0,
            )
            for name, score in self.results.get("scores", {}).items()
        }

    def prompts_sha256(self, prompts: str = "harmful", half: str = "test") -> str | None:
        """Fingerprint of the queries (and right answers) of a set; None where the manifest has none."""
        name = f"{prompts}_{half}" if self.kind == "audit" else prompts
        queries, references = (
            known.get(name) if isinstance(known := self.config.get(field), Mapping) else known
            for field in ("prompts_sha256", "references_sha256")
        )
        return f"{queries} {references}" if isinstance(queries, str) else None


@dataclass(frozen=True, slots=True)
class StoredAnswers:
    """What the judge said of the answers to the reported prompts, by group."""

    complied: Mapping[Heads, Outcomes]
    """Harmful prompts."""
    kept: Mapping[Heads, Outcomes]
    """Benign prompts: answered, and rightly where the right answer is known."""


def read_run(path: Path) -> RunReading:
    """A finished audit or scan.

    Raises:
        InputError: no run is there, it has not finished, or its results are of another kind or version.
    """
    opened = RunDirectory.open(path)
    manifest, results = opened.read_manifest(), opened.read_results()
    kind = results.get("kind")
    if kind not in _REQUIRED or results.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise InputError(
            f"{path} holds results of kind {kind!r}, schema {results.get('schema_version')!r}; "
            f"what is read are audits and scans of schema {SCHEMA_VERSION}"
        )
    for name in _REQUIRED[kind]:
        if _at(results, name) is None:
            raise InputError(f"{path}: its results.json has no {name}")
    starts, config = manifest.get("provenance"), manifest.get("config")
    first = starts[0] if isinstance(starts, list) and starts and isinstance(starts[0], dict) else {}
    return RunReading(path, kind, _moment(first), results, config if isinstance(config, dict) else {})


def read_answers(run: RunReading) -> StoredAnswers:
    """The stored verdicts of a run: of every group for an audit, of the unablated model alone for a scan."""
    complied: dict[Heads, dict[tuple[str, str], bool | None]] = {}
    kept: dict[Heads, dict[tuple[str, str], bool | None]] = {}
    harmful = _HARMFUL_SET[run.kind]
    for row in _rows(run):
        heads = frozenset(filter(None, str(row["group"]).split(",")))
        key = (str(row["id"]), str(row.get("seed", "")))
        if row["set"] == harmful:
            label = _label(run, row)
            complied.setdefault(heads, {})[key] = None if label in (None, "unscored") else label == "complied"
        elif row["set"] == harmful.replace("harmful", "benign") and "kept" in row:
            kept.setdefault(heads, {})[key] = bool(row["kept"])
    return StoredAnswers(complied, kept)


def size_outcomes(run: RunReading, answers: StoredAnswers) -> SizeOutcomes | None:
    """Outcomes of the lead groups and the unablated model, prompts in the order of their numbers.

    None where an answer is not stored, and for runs whose results do not name their random groups. Of a scan only the
    unablated model's answers are read, so it has none either.
    """
    # Prompts are numbered: in the order of their numbers a bootstrap makes the draws that it made in the audit.
    keys = sorted(answers.complied.get(VANILLA, {}) if run.kind == "audit" else (), key=lambda key: (len(key[0]), key))

    def outcome(heads: Sequence[str]) -> list[bool]:
        # An answer without a verdict has not complied, as in the concentration that the audit wrote.
        return [bool(answers.complied[frozenset(heads)][key]) for key in keys]

    try:
        found = []
        for group in run.lead_groups if keys else ():
            random = group["random"]["groups"] if group["random"] else []
            found.append(SizeOutcome(int(group["size"]), outcome(group["heads"]), [outcome(one) for one in random]))
        return (found, outcome(())) if found else None
    except KeyError:
        return None


def read_concentration(run: RunReading, answers: StoredAnswers | None = None) -> Mapping[str, Any] | None:
    """The concentration as the run wrote it; for an older audit, made of its stored answers."""
    if run.kind != "audit" or "concentration" in run.results:
        return run.results.get("concentration")
    made = size_outcomes(run, read_answers(run) if answers is None else answers)
    return None if made is None else asdict(concentration(*made))


def _rows(run: RunReading) -> Iterator[Mapping[str, Any]]:
    """Rows of answers. Of a scan, lines without an empty text are skipped unparsed: no vanilla answer is in them."""
    for path in sorted((run.path / "completions").glob(_ROWS[run.kind])):
        with as_input_error(path, "read"):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            if not line or (run.kind == "scan" and '""' not in line):
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise InputError(f"{path} is broken; start the run again with the same command to mend it") from None
            # Rows of other stages, such as teacher-forced tokens, are no answers.
            if {"id", "set", "group"} <= row.keys() and (run.kind == "audit" or row["group"] == ""):
                yield row


def _label(run: RunReading, row: Mapping[str, Any]) -> str | None:
    """The verdict of the run's judge; scans have several, and one that leads."""
    if "verdicts" in row:
        verdict = row["verdicts"].get(run.results.get("lead_judge"))
        return None if verdict is None else verdict["label"]
    return row.get("label")


def _p_holm(entry: Mapping[str, Any]) -> float:
    """Of the head's change of ASR; 1 where it was not tested."""
    p_value = (entry.get("change") or {}).get("p_holm")
    return 1.0 if p_value is None else float(p_value)


def _moment(start: Mapping[str, Any]) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(start.get("started", start.get("date"))))
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _at(value: Any, path: str) -> Any:
    """What stands under a dotted name; None where nothing does."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value

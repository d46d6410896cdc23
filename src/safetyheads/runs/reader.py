"""Reads a finished audit or scan, for comparisons, histories and reports. Loads no model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from safetyheads.errors import InputError
from safetyheads.files import as_input_error
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.rates import is_coherent
from safetyheads.stats.concentration import SizeOutcome
from safetyheads.stats.ranking import HeadTable

RateRecord: TypeAlias = Mapping[str, Any]
"""A rate in results.json: count, n, rate, interval."""
Outcomes: TypeAlias = dict[int, dict[int, float]]
"""By prompt, then by seed: 1 complied (or answered), 0 did not, NaN without a verdict."""

ASR_ALONE = "asr_alone"
"""Name of a scan's own table: the ASR with each head ablated alone."""

_SHARED = ("model.name", "model.n_layers", "model.n_heads")
_ASR = {"audit": "behaviour.vanilla.asr", "scan": "vanilla.harmful.asr"}
_KEPT = {"audit": "behaviour.vanilla.benign_answered", "scan": "vanilla.benign.answered"}
_REQUIRED = {
    "audit": (*_SHARED, _ASR["audit"], "behaviour.groups", "verdict.label", "verdict.heads", "verdict.scorer"),
    "scan": (*_SHARED, _ASR["scan"], "heads"),
}
# Answers of every group for an audit, of the unablated model for a scan.
_ANSWER_FILES = {"audit": "*_test-*.jsonl", "scan": "vanilla-*.jsonl"}


class RunReader:
    """A finished audit or scan.

    Attributes:
        kind: ``audit`` or ``scan``.
        shape: layers, and heads in each.
        started: when it was first started, UTC; None where the manifest does not say.
        verdict: the verdict's label; a scan has none.
        lead_score: the score that the run leads with.
        lead_heads: heads of the verdict's group in the order of the search; of a scan, heads whose ASR differs (Holm).
        lead_group: the audit's entry of the verdict's group; None for a scan and where no group was found.
        vanilla_asr: the unablated model's ASR.
        benign_answered: share of benign prompts that the unablated model answers; None where none was asked.
        limit: surprise above which an answer is not coherent, in nats a token; None where the run has none.
        concentration: as the run wrote it; None for a scan without the groups of a search.
        n_seeds: answers to each prompt.
    """

    def __init__(self, path: Path) -> None:
        """Read the manifest and the results.

        Raises:
            InputError: no run is there, it has not finished, or its results are of another kind or version.
        """
        directory = RunDirectory.open(path)
        manifest, results = directory.read_manifest(), directory.read_results()
        kind, version = results.get("kind"), results.get("schema_version")
        if kind not in _REQUIRED or version != SCHEMA_VERSION:
            raise InputError(
                f"{path} holds results of kind {kind!r}, schema {version!r}; "
                f"what is read are audits and scans of schema {SCHEMA_VERSION}"
            )
        self.path, self.kind, self.config, self.results = path, kind, manifest.get("config") or {}, results
        for name in _REQUIRED[kind]:
            if _value_at(results, name) is None:
                raise InputError(f"{path}: its results.json has no {name}")
        self.started, self.model = _start_time(manifest), str(results["model"]["name"])
        self.shape: tuple[int, int] = (results["model"]["n_layers"], results["model"]["n_heads"])
        self.vanilla_asr: RateRecord = _value_at(results, _ASR[kind])
        self.limit: float | None = _value_at(results, "coherence.limit")
        self.benign_answered: RateRecord | None = _value_at(results, _KEPT[kind])
        self.concentration: Mapping[str, Any] | None = results.get("concentration")
        self.n_seeds: int = _value_at(results, "statistics.n_seeds") or 1
        self.verdict: str | None = None
        self.lead_score: str = ASR_ALONE
        self.lead_group: Mapping[str, Any] | None = None
        if kind == "audit":
            verdict = results["verdict"]
            self.verdict, self.lead_score = verdict["label"], verdict["scorer"]
            self.lead_heads: tuple[str, ...] = (*verdict["heads"],)
            named = (group for group in lead_groups(results) if {*group["heads"]} == {*self.lead_heads})
            self.lead_group = next(named, None)
        else:
            alpha = _value_at(results, "statistics.alpha") or 0.05
            p_values = {entry["head"]: (entry.get("change") or {}).get("p_holm") for entry in results["heads"]}
            self.lead_heads = tuple(head for head, p in p_values.items() if p is not None and p < alpha)

    def tables(self) -> dict[str, HeadTable]:
        """Each score of all heads; of a scan also, and first, the exhaustive ASR."""
        tables: dict[str, HeadTable] = {}
        if self.kind == "scan":
            alone = {entry["head"]: entry["asr"]["rate"] for entry in self.results["heads"]}
            tables[ASR_ALONE] = HeadTable("ASR, each head ablated alone", _scored(alone), 0.0)
        for name, score in self.results.get("scores", {}).items():
            values = {f"{i}-{j}": value for i, layer in enumerate(score["values"]) for j, value in enumerate(layer)}
            tables[name] = HeadTable(score.get("label", name), _scored(values), score.get("resolution") or 0.0)
        return tables

    def prompts_sha256(self, prompts: str = "harmful", half: str = "test") -> str | None:
        """Fingerprint of the queries and right answers of a set; None where the manifest has none."""
        name = f"{prompts}_{half}" if self.kind == "audit" else prompts
        queries, references = (self.config.get(f"{field}_sha256", {}).get(name) for field in ("prompts", "references"))
        return None if queries is None else f"{queries} {references}"

    @cached_property
    def stored_outcomes(self) -> dict[tuple[str, frozenset[str]], Outcomes]:
        """The leading judge's outcomes, by prompts (``harmful`` or ``benign``) and group; of a scan, unablated only.

        Raises:
            InputError: a file of answers is broken.
        """
        outcomes: dict[tuple[str, frozenset[str]], Outcomes] = {}
        judged = {"complied": 1.0, "unscored": math.nan}
        for record in self._answer_records():
            prompts = record["set"].removesuffix("_test")
            label = record["verdicts"].get(self.results["lead_judge"], {}).get("label", "unscored")
            heads = frozenset(filter(None, record["group"].split(",")))
            answers = outcomes.setdefault((prompts, heads), {}).setdefault(record["id"], {})
            answered = record["answered"] and is_coherent(record, self.limit)
            answers[record["seed"]] = float(answered) if prompts == "benign" else judged.get(label, 0.0)
        return outcomes

    def _answer_records(self) -> Iterator[Mapping[str, Any]]:
        for path in sorted((self.path / "completions").glob(_ANSWER_FILES[self.kind])):
            with as_input_error(path, "read"):
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            try:
                records = [json.loads(line) for line in filter(None, lines)]
            except ValueError:
                reason = f"{path} is broken; start the run again with the same command to mend it"
                raise InputError(reason) from None
            # Records of other stages, such as teacher-forced tokens, are no answers.
            yield from (record for record in records if "verdicts" in record)

    def size_outcomes(self) -> tuple[list[SizeOutcome], list[bool]] | None:
        """Outcomes of an audit's lead groups and of its unablated model, prompts in order; None if not all are stored.

        An answer without a verdict has not complied, as in the concentration that the audit wrote.
        """
        if self.kind != "audit":
            return None

        def complied(heads: Iterable[str]) -> list[bool]:
            outcomes = self.stored_outcomes["harmful", frozenset(heads)]
            return [1 in outcomes[prompt].values() for prompt in prompts]

        sizes = []
        try:
            prompts = sorted(self.stored_outcomes["harmful", frozenset()])
            for group in lead_groups(self.results):
                random = group["random"]["groups"] if group["random"] else ()
                n_possible = group["random"]["n_possible"] if random else None
                controls = [*map(complied, random)]
                sizes.append(SizeOutcome(int(group["size"]), complied(group["heads"]), controls, n_possible))
            return (sizes, complied(())) if sizes else None
        except KeyError:  # a group or a prompt whose answers are not stored
            return None


def _scored(values: Mapping[str, float | None]) -> dict[str, float]:
    return {head: value for head, value in values.items() if value is not None}


def lead_groups(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """An audit's groups of the verdict's scorer, by size."""
    groups = [group for group in results["behaviour"]["groups"] if group["scorer"] == results["verdict"]["scorer"]]
    return sorted(groups, key=lambda group: int(group["size"]))


def _start_time(manifest: Mapping[str, Any]) -> datetime | None:
    """When the run was first started, UTC; None where the manifest does not say."""
    try:
        started = datetime.fromisoformat(manifest["provenance"][0]["started"])
    except (LookupError, TypeError, ValueError):
        return None
    return started.replace(tzinfo=UTC) if started.tzinfo is None else started.astimezone(UTC)


def _value_at(results: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted name; None where there is none."""
    value: Any = results
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value

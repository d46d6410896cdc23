"""Reads a finished audit or scan, for comparisons, histories and reports. Loads no model."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import numpy as np

from safetyheads.display import Chart, Table, chart, rate_row
from safetyheads.errors import InputError
from safetyheads.files import leaves
from safetyheads.runs.directory import RunDirectory, as_file_name
from safetyheads.runs.rates import OF_VERDICTS, GroupAnswers, without_texts
from safetyheads.runs.stored_files import Record, as_damaged, converted
from safetyheads.stats.gain_over_random import SizeOutcome
from safetyheads.stats.intervals import FloatArray
from safetyheads.stats.ranking import HeadTable

if TYPE_CHECKING:
    from safetyheads.scores import HeadScores

RateRecord: TypeAlias = Mapping[str, Any]
"""A rate in results.json: count, n, rate, interval."""


class _Numbers(TypedDict):
    n: int
    interval: tuple[float, float] | None


class _Counted(_Numbers):
    count: int
    rate: float | None


class _Told(TypedDict):
    heads: list[str]
    rates: list[_Counted]
    verdict: str | None
    concentration: _Numbers | None


ASR_ALONE = "asr_alone"
"""Name of a scan's own table: the ASR with each head ablated alone."""

_LONGEST_NAME = 250  # of a metric, in MLflow
OUTCOMES: dict[str, Callable[[GroupAnswers], FloatArray]] = {
    "complied": GroupAnswers.verdicts,
    "coherent": GroupAnswers.coherent,
    "incoherent": lambda answers: answers.where(
        lambda record: record["behaviour"] != "refused" and not answers.is_coherent(record)
    ),
    "refused": lambda answers: answers.where(lambda record: record["behaviour"] == "refused"),
    "answered": GroupAnswers.answered,
}
"""What is asked of answers -> 1, 0 or NaN of each: ``coherent`` also complied; ``incoherent`` is no refusal, and
``refused`` by rules of words."""

# Answers of every group for an audit, of the unablated model for a scan.
_STAGES = {"audit": "*_test", "scan": "vanilla-*"}


class FinishedRun(Table):
    """A finished run of any kind.

    Attributes:
        kind: the command that made it, such as ``asr``.
        model: its model's name.
        config: its settings.
        results: what ``results.json`` holds.
    """

    def __init__(self, path: Path) -> None:
        """Read the manifest and the results.

        Raises:
            InputError: no run is there, it has not finished, or it is of another version.
        """
        self.path, self.directory = path, RunDirectory.open(path)
        self.config, self.results = self.directory.config, self.directory.read_results()
        self.kind = str(self.results.get("kind"))
        self.model = str((self.results.get("model") or {}).get("name") or "")

    def _facts(self) -> dict[str, object]:
        return {"kind": self.kind, "model": self.model}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each group of ``asr``, head of ``ships``, step of ``sahara``, or metric of ``eval``."""
        field = {"asr": "rates", "ships": "heads", "sahara": "steps", "eval": "metrics"}.get(self.kind)
        if field is None:
            raise InputError(f"a run of {self.kind} is no table; .results has its numbers")
        return [
            {name: value for name, value in leaves(entry) if not name.startswith("reasons.")}
            for entry in self.results[field]
        ]

    @property
    def scores(self) -> dict[str, "HeadScores"]:
        """The run's scores of every head, by name; of a scan also the ASR of each head ablated alone."""
        import torch  # results are read without it

        from safetyheads.scores import HeadScores

        scores, model = {}, self.results["model"]
        for name, table in self.tables().items():
            values = torch.full((model["n_layers"], model["n_heads"]), float("nan"), dtype=torch.float64)
            for head, value in table.values.items():
                values[tuple(map(int, head.split("-")))] = value
            scores[name] = HeadScores(values, name, "", table.resolution)
        return scores

    def tables(self) -> dict[str, HeadTable]:
        """Each score of all heads, by name; none where the run has no such score."""
        if self.kind != "ships":
            return {}
        values = {entry["head"]: entry["mean"] for entry in self.results["heads"]}
        return {self.results["score"]: HeadTable(self.results["score"], _scored(values), 0.0)}

    def plot(self) -> Chart:
        """The heads as a map; of a search its score step by step. Rates have no chart."""
        if self.kind == "sahara":
            steps = [{"size": size, **row} for size, row in enumerate(self.to_rows(), start=1)]
            return chart(
                "curve", [{**row, "found_by": self.results["score"]} for row in steps], "size", "score", "found_by"
            )
        if self.kind == "ships":
            return self.scores[self.results["score"]].plot()
        raise InputError(f"no chart of a run of {self.kind}; .to_frame() gives its table")

    def metrics(self) -> dict[str, float]:
        """The results' numbers by dotted name, without the tables of scores and reasons: ``wandb.log(run.metrics())``.

        Names hold nothing that trackers of experiments refuse.
        """
        told = ((name, value) for name, value in leaves(self.results) if isinstance(value, int | float))
        return {
            re.sub(r"[^\w./ -]", "_", name)[:_LONGEST_NAME]: float(value)
            for name, value in told
            if not isinstance(value, bool) and not name.startswith("scores.") and "reasons." not in name
        }


class RunReader(FinishedRun):
    """A finished audit or scan.

    Attributes:
        shape: layers, and heads in each.
        started: when it was first started, UTC; None where nothing says.
        verdict: the verdict's label; a scan has none.
        lead_score: the score that the run leads with.
        lead_heads: heads of the verdict's group in the order of the search; of a scan, heads that differ (Tarone).
        lead_group: the audit's entry of the verdict's group; None for a scan and where no group was found.
        vanilla_asr: the unablated model's ASR.
        coherent_asr: the share of its answers that comply coherently.
        benign_answered: share of benign prompts that the unablated model answers; None where none was asked.
        stopped_early: why the run ended after its unablated answers; empty where it did not.
        concentration: as the run wrote it; None for a scan without the groups of a search.
        n_seeds: answers to each prompt.
    """

    def __init__(self, path: Path) -> None:
        """Read the manifest and the results; an InputError where they are of another kind too."""
        super().__init__(path)
        kind, results = self.kind, self.results
        if kind not in _STAGES:
            raise InputError(f"{path} is a run of {kind}; audits and scans are what is compared")
        with as_damaged(path / "starts"):
            started = [start["started"] for start in self.directory.read_starts()[:1]]
            self.started = started[0].astimezone(UTC) if started else None
        with as_damaged(path / "results.json"):
            self.shape: tuple[int, int] = (results["model"]["n_layers"], results["model"]["n_heads"])
            vanilla = results["behaviour"]["vanilla"] if kind == "audit" else results["vanilla"]["harmful"]
            kept = vanilla if kind == "audit" else results["vanilla"].get("benign", {})
            self.vanilla_asr: RateRecord = vanilla["asr"]
            self.coherent_asr: RateRecord = vanilla["coherent_asr"]
            self.benign_answered: RateRecord | None = kept.get("benign_answered", kept.get("answered"))
            self.limit: float | None = results.get("coherence", {}).get("limit")
            self.concentration: Mapping[str, Any] | None = results.get("concentration")
            self.n_seeds, self.stopped_early = 1, ""
            self.verdict: str | None = None
            self.lead_score: str = ASR_ALONE
            self.lead_group: Mapping[str, Any] | None = None
            if kind == "audit":
                verdict = results["verdict"]
                self.stopped_early = str(verdict["sentence"]) if verdict["stopped_early"] else ""
                self.verdict, self.lead_score = verdict["label"], lead_score_of(results)
                self.lead_heads: tuple[str, ...] = (*verdict["heads"],)
                named = (group for group in lead_groups(results) if {*group["heads"]} == {*self.lead_heads})
                self.lead_group = next(named, None)
            else:
                self.n_seeds, alpha = results["statistics"]["n_seeds"], results["statistics"]["alpha"]
                p_values = {entry["head"]: (entry.get("change") or {}).get("p_tarone") for entry in results["heads"]}
                self.lead_heads = tuple(head for head, p in p_values.items() if p is not None and p < alpha)
            rates = self.benign_answered, self.lead_group and self.lead_group["asr"]
            told = {"heads": [*self.lead_heads], "rates": [self.vanilla_asr, *filter(None, rates)]}
            converted(told | {"verdict": self.verdict, "concentration": self.concentration}, _Told)

    def _facts(self) -> dict[str, object]:
        heads = ", ".join(self.lead_heads) or "none"
        return super()._facts() | {"verdict": self.verdict or "a scan has none", "lead_heads": heads}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each group of heads, the unablated model first: its coherent ASR with the 95 % interval."""
        rows = [{"heads": "", "found_by": "unablated", "size": 0, **rate_row(self.coherent_asr)}]
        for group in self.results["behaviour"]["groups"] if self.kind == "audit" else self.results["heads"]:
            heads = group["heads"] if self.kind == "audit" else [group["head"]]
            found_by = group["scorer"] if self.kind == "audit" else "single heads"
            rows.append(
                {"heads": ",".join(heads), "found_by": found_by, "size": len(heads), **rate_row(group["coherent_asr"])}
            )
        return rows

    def answers(self) -> list[dict[str, Any]]:
        """A row for each stored answer of the test prompts, without its text."""
        rows = []
        for prompts, heads in sorted(self.stored_answers, key=lambda key: (key[0], sorted(key[1]))):
            answers = self.stored_answers[prompts, heads]
            for record in answers.flat():
                coherent = answers.is_coherent(record)
                place = {"prompts": prompts, "heads": ",".join(sorted(heads)), "prompt": record["id"]}
                place |= {"seed": record["seed"], "label": record["verdicts"][answers.lead]["label"]}
                told = {"behaviour": record["behaviour"], "coherent": coherent}
                told |= {"answered": record["answered"] and coherent, "cluster": record.get("cluster")}
                rows.append(place | told)
        return rows

    def plot(self, kind: Literal["map", "curve", "scatter"] = "map") -> Chart:
        """The heads as a map; an audit's ASR by group size as a curve; a scan's ASR against its first score."""
        scores = self.scores
        if kind == "map":
            lead = self.lead_score if self.lead_score in scores else next(iter(scores), "")
            if not lead:
                raise InputError(f"{self.path} has no scores: {self.stopped_early or 'none were asked for'}")
            return scores[lead].plot()
        if kind == "curve" and self.kind == "audit":
            rows = [row for row in self.to_rows() if row["found_by"] in ("unablated", self.lead_score)]
            return chart("curve", [{**row, "found_by": self.lead_score} for row in rows], "size", "asr", "found_by")
        other = next((name for name in scores if name != ASR_ALONE), None)
        if kind == "scatter" and self.kind == "scan" and other:
            rows = [{**row, other: scores[other][row["heads"]]} for row in self.to_rows()[1:]]
            return chart("scatter", rows, other, "asr", "found_by")
        raise InputError(
            f"no {kind!r} of this {self.kind}; audits have map and curve, scans with scores map and scatter"
        )

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

    def provenance(self) -> dict[str, str]:
        """What the numbers are of, in short texts by name: for tables of several runs."""
        config = self.config
        versions = ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())
        sets = {f"{name.replace('_', ' ')} prompts": sha for name, sha in config.get("prompts_sha256", {}).items()}
        hashes = {"weights": str(config.get("weights_sha256", "")), **sets}
        told = {f"{name}, sha256": sha[:16] for name, sha in hashes.items()}
        told |= {"device": str(config.get("device", "")), "versions": versions}
        return {name: text for name, text in told.items() if text}

    def under(self, prompts: str, heads: Iterable[str] = ()) -> GroupAnswers:
        """The stored answers to ``harmful`` or ``benign`` prompts under a group, which may be none; of a scan,
        unablated only.
        """
        nothing = GroupAnswers("", (), self.results["lead_judge"])
        return self.stored_answers.get((prompts, frozenset(heads)), nothing)

    @cached_property
    def stored_answers(self) -> dict[tuple[str, frozenset[str]], GroupAnswers]:
        """By prompts (``harmful`` or ``benign``) and group."""
        stored, shared = dict[tuple[str, frozenset[str]], list[Record]](), dict[tuple[Any, ...], Any]()
        for record in self.directory.stored_records(_STAGES[self.kind]):
            if "verdicts" in record:  # else no answer, such as teacher-forced tokens
                key = record["set"].removesuffix("_test"), frozenset(filter(None, record["group"].split(",")))
                stored.setdefault(key, []).append(without_texts(record, shared))
        lead = self.results["lead_judge"]
        return {key: GroupAnswers.of(of[0]["group"], of, lead, self.limit) for key, of in stored.items()}

    def size_outcomes(
        self, unscored: tuple[int, int] = (0, 0)
    ) -> tuple[list[SizeOutcome], list[bool], list[int]] | None:
        """Outcomes of an audit's lead groups and of its unablated model, prompts in order, and for each group how many
        of the answers behind its part of the concentration have no verdict; None if not all are stored.

        An incoherent answer has not complied, as in the audit's own concentration; nor has one without a verdict,
        unless ``unscored`` says otherwise: of the groups, and of what they are compared with.
        """
        if self.kind != "audit" or self.concentration is None:
            return None
        unablated = self.under("harmful")

        def complied(heads: Iterable[str], where_unscored: int) -> tuple[list[bool], int]:
            answers = self.under("harmful", heads)
            if answers.prompts != unablated.prompts:
                raise LookupError
            outcomes = answers.coherent()
            complied = (np.nan_to_num(outcomes, nan=where_unscored) == 1).any(axis=1)
            return list(complied.tolist()), int(np.isnan(outcomes).sum())

        sizes, counts = [], []
        try:
            vanilla, n_vanilla = complied((), unscored[1])
            for group in lead_groups(self.results):
                drawn = group["random"] or {"groups": (), "n_possible": None}
                controls = [complied(heads, unscored[1]) for heads in drawn["groups"]]
                own, n_own = complied(group["heads"], unscored[0])
                against = [of for of, _ in controls]
                sizes.append(SizeOutcome(int(group["size"]), own, against, drawn.get("n_possible")))
                counts.append(n_own + (sum(n for _, n in controls) if controls else n_vanilla))
        except LookupError:  # a group or a prompt whose answers are not stored
            return None
        return (sizes, vanilla, counts) if sizes and unablated.records else None


def _scored(values: Mapping[str, float | None]) -> dict[str, float]:
    return {head: value for head, value in values.items() if value is not None}


def lead_score_of(results: Mapping[str, Any]) -> str:
    """The score that an audit's verdict is about; one that stopped early names no group, so no score that found it."""
    return str(results["verdict"].get("scorer") or results.get("lead_score") or "mean_ships")


def lead_groups(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """An audit's groups of the verdict's scorer, by size."""
    groups = [group for group in results["behaviour"]["groups"] if group["scorer"] == lead_score_of(results)]
    return sorted(groups, key=lambda group: int(group["size"]))


def identity(record: Record) -> str:
    """What tells one answer of a run from all others."""
    return "|".join(str(record.get(name)) for name in ("part", "set", "group", "epsilon", "seed", "id"))


LATER = ("judged-", "verdicts-")
"""Beginnings of the stages of judges that came later, which hold no answers; their own commands mend them."""


def judged_stage(judge: str) -> str:
    """The stage that holds what a later judge said of every answer."""
    return f"judged-{as_file_name(judge)}"


def with_later_verdicts(run: RunDirectory, records: Iterable[Record], judges: Collection[str]) -> Iterator[Record]:
    """The records with the verdicts of later judges beside those of the run's own.

    A judge whose start was killed before its results were written is none of the run's ``judges``.
    """
    later, shared = dict[str, dict[str, Any]](), dict[tuple[Any, ...], Any]()
    stages = sorted(set(map(judged_stage, judges)))  # two names may have one stage
    for record in chain.from_iterable(map(run.stored_records, stages)):
        if record["judge"] in judges:
            told = tuple(map(record["verdict"].get, OF_VERDICTS))
            verdict = shared.setdefault(told, dict(zip(OF_VERDICTS, told, strict=True)))
            later.setdefault(record["of"], {})[record["judge"]] = verdict
    for record in records:
        yield {**record, "verdicts": {**record["verdicts"], **later.get(identity(record), {})}}

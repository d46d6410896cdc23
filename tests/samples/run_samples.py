"""Finished run directories made by hand: audits and scans whose answers, rates and settings agree with each other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from answer_records import answer_record
from audit_samples import answered, audit, outcome

from safetyheads.heads import parse_heads
from safetyheads.runs.audit import SETS, group_as_json
from safetyheads.runs.compare import check_gate, compare_runs, exit_code, parse_condition, quantities
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.reader import RunReader
from safetyheads.stats.gain_over_random import SizeOutcome, concentration
from safetyheads.stats.intervals import Rate, bootstrap_interval
from safetyheads.stats.testing import paired_difference

N = 20
LEAD = "mean_ships"
STARTED = "2026-01-02T03:04:05+00:00"
RANDOM_HEADS = (("0-0", "0-1", "0-2"), ("3-5", "3-6", "3-7"))


def rate(marks: Sequence[bool]) -> dict[str, Any]:
    return asdict(Rate(sum(marks), len(marks)))


def first(count: int, n: int = N) -> list[bool]:
    """The first ``count`` of n comply."""
    return [position < count for position in range(n)]


def settings(prompts: str = "same", **changed: Any) -> dict[str, Any]:
    """A config; ``prompts`` stands for their fingerprint."""
    names = [f"{kind}{half}" for kind in ("harmful", "benign") for half in ("_search", "_test", "")]
    shas = {name: f"{prompts} {name}" for name in names}
    base = {"ablation": "undifferentiated_attention", "epsilon": 1e-5, "template": "chat"}
    base |= {
        "judges": [{"name": "paper"}],
        "top_k": 1,
        "seed": 0,
        "max_new_tokens": 128,
        "dtype": "float32",
        "weights_sha256": f"{changed}",
    }
    return base | {"prompts_sha256": shas, "references_sha256": shas} | changed


def audit_run(
    path: Path,
    *,
    vanilla: Sequence[bool] | None = None,
    groups: Sequence[Sequence[bool]] | None = None,
    random: Sequence[Sequence[Sequence[bool]]] | None = None,
    heads: Sequence[str] = ("1-3", "2-1"),
    config: Mapping[str, Any] | None = None,
    started: str | None = STARTED,
    scores: Mapping[str, float] | None = None,
    said: Sequence[str] | None = None,
    benign: Sequence[str] | None = None,
    stopped_early: str | None = None,
    failed: int = 0,
) -> Path:
    """A finished audit: which prompts comply unablated, under the group of each size, and under its random groups.

    ``scores`` are of the lead score, by head; the others score 0.001 to 0.032, the later the more. ``said`` and
    ``benign`` are the labels of the unablated answers to harmful and to benign prompts. On the last ``failed`` answers
    under each group its judge failed.
    """
    vanilla = first(1) if vanilla is None else list(vanilla)
    labels = ["complied" if complied else "refused" for complied in vanilla] if said is None else list(said)
    vanilla = [label == "complied" for label in labels]
    groups = [first(10), first(18)] if groups is None else groups
    random = [[first(1), first(2)]] * len(groups) if random is None else random
    results, stored, n = audit(), {"": vanilla}, len(vanilla)
    before = {name: answered(vanilla if name == "harmful_test" else n, n) for name in SETS}
    made = []
    for size, (complied, controls) in enumerate(zip(groups, random, strict=True), start=1):
        named = dict(zip((",".join(names[:size]) for names in RANDOM_HEADS), controls, strict=False))
        group = ",".join(heads[:size])
        made.append(group_as_json(before, outcome(parse_heads(group), (complied, complied, n, n), named, n)))
        stored |= {group: [*complied[: n - failed], *["unscored"] * failed]} | named
    results["verdict"] |= {"heads": list(heads[: len(groups)]), "size": len(groups), "scorer": LEAD}
    if not groups:
        results["verdict"] |= {"label": "no refusals to lose"}
    results["behaviour"]["groups"] = made
    benign = ["complied"] * n if benign is None else list(benign)
    unscored = labels.count("unscored")
    asr = asdict(Rate(sum(vanilla), n - unscored, unscored))
    answers = rate([label == "complied" for label in benign])
    results["behaviour"]["vanilla"] |= {"asr": asr, "coherent_asr": asr, "benign_answered": answers}
    if stopped_early is not None:
        results["verdict"] |= {"stopped_early": True, "sentence": stopped_early}
    best = {"1-3": 3.0, "2-1": 2.0, "2-5": 1.0} if scores is None else scores
    values = [[best.get(f"{i}-{j}", 0.001 * (8 * i + j + 1)) for j in range(8)] for i in range(4)]
    results["scores"][LEAD]["values"] = values
    outcomes = [SizeOutcome(size, *both) for size, both in enumerate(zip(groups, random, strict=True), start=1)]
    results["concentration"] = asdict(concentration(outcomes, vanilla))
    stages = {
        "vanilla-harmful_test": [record("harmful_test", at, label) for at, label in enumerate(labels)],
        "vanilla-benign_test": [record("benign_test", at, label) for at, label in enumerate(benign)],
    }
    del stored[""]
    stages["groups-harmful_test"] = [
        record("harmful_test", at, label, group)
        for group, complied in stored.items()
        for at, label in enumerate(complied)
    ]
    return _written(path, config, started, results, stages)


def record(name: str, number: int, label: bool | str, group: str = "", seed: int = 0) -> dict[str, Any]:
    """A stored answer: the leading judge's label, another judge always says that it complied."""
    label = label if isinstance(label, str) else "complied" if label else "refused"
    made = answer_record(number, label, reason="made up", set=name, group=group, seed=seed)
    made["verdicts"]["other"] = {"label": "complied", "reason": ""}
    return made


CONDITIONS = ("asr_increase > 0.1", "damage > 0.2", "concentration_increase.value < -2", "spearman < 0.9")


def compared_record(before: str | Path, after: str | Path, conditions: Sequence[str] = CONDITIONS) -> dict[str, Any]:
    """A comparison of two runs with its gates, as ``compare --json`` prints it and pages read it."""
    found = compare_runs(RunReader(Path(before)), RunReader(Path(after)))
    gates = [check_gate(parse_condition(text), found) for text in conditions]
    record = {"quantities": quantities(found), "gates": gates, "exit_code": exit_code(found, gates)}
    return json.loads(json.dumps(asdict(found) | record))


def scan_run(
    path: Path,
    freed: Mapping[str, int],
    *,
    vanilla: Sequence[bool] | None = None,
    significant: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    started: str | None = STARTED,
    n_layers: int = 4,
    n_seeds: int = 1,
    concentration: float | None = None,
) -> Path:
    """A finished scan: ``freed`` prompts comply under a head, one under the others; ``significant`` heads differ."""
    vanilla = first(1) if vanilla is None else list(vanilla)
    heads = []
    for head in (f"{i}-{j}" for i in range(n_layers) for j in range(8)):
        complied = first(freed.get(head, 1), len(vanilla))
        p_holm = 0.01 if head in significant else 1.0
        change = asdict(paired_difference(vanilla, complied)) | {"p_tarone": p_holm, "p_holm": p_holm, "p_bh": p_holm}
        heads.append({"head": head, "asr": rate(complied), "change": change})
    results = {
        "kind": "scan",
        "schema_version": SCHEMA_VERSION,
        "model": {"name": "made-up", "family": "llama", "n_layers": n_layers, "n_heads": 8},
        "lead_judge": "paper",
        "heads": heads,
        "vanilla": {"harmful": {"asr": (asr := rate(vanilla * n_seeds)), "coherent_asr": asr}},
        "statistics": {"alpha": 0.05, "n_seeds": n_seeds},
        "concentration": None,
        "scores": {},
    }
    if n_seeds > 1:
        results["vanilla"]["harmful"]["asr"]["interval"] = list(bootstrap_interval(np.array(vanilla, float)))
    if concentration is not None:
        about = {"n": len(vanilla), "sizes": [1, 2], "n_random": 0, "against": "the unablated model"}
        results["concentration"] = about | {"value": concentration, "interval": [concentration - 0.1, 1.0]}
        grown = {"part": "prefixes", "heads": ["1-3"], "asr": rate(vanilla) | {"unscored": 1}}
        results["groups"] = [grown, {"part": "groups", "heads": ["0-0"], "asr": rate(vanilla)}]
    stages = {
        "vanilla-harmful": [
            record("harmful", at, one, seed=k) for at, one in enumerate(vanilla) for k in range(n_seeds)
        ],
        "heads-harmful": [record("harmful", at, True, "1-3") for at in range(len(vanilla))],
    }
    return _written(path, config, started, results, stages)


def rewritten(path: str | Path, **changed: Any) -> None:
    """Change fields of a finished run's results (a mapping: fields in a field)."""
    opened = RunDirectory.open(path)
    with RunDirectory.start(path, opened.config, {}) as run:
        results = run.read_results()
        for name, value in changed.items():
            keeps = isinstance(value, dict) and value and isinstance(results[name], dict)
            results[name] = {**results[name], **value} if keeps else value
        run.write_results(results)


def _written(
    path: Path, config: Mapping[str, Any] | None, started: str | None, results: Any, stages: Mapping[str, list[Any]]
) -> Path:
    provenance = {"command": ["safetyheads"]} | ({"started": started} if started else {})
    with RunDirectory.start(path, settings() if config is None else config, provenance) as run:
        for stage, rows in stages.items():
            run.records(stage, {"stage": stage}, lambda rows=rows: list(rows))
        # A stage whose records are no answers, as audits have it too.
        run.records("sequences-benign_test", {}, lambda: [{"token_ids": [1], "n_wanted": 1}])
        run.write_results(results)
    return path


class OneProcess:
    """What stands in for a run directory does its work alone, as a run without shards."""

    def divide(self, stage, units):
        """All units are its own."""

    def together(self, *tasks):
        return [task() for task in tasks]

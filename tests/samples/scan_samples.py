"""Made-up scans in the shape that a run writes: rows by hand, results by the package's own tables; no model.

A small model of 2 layers with 4 heads each: 0-1 carries refusal, 1-2 frees a few answers and breaks benign ones, 1-0
makes benign prompts refused, and the others do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from safetyheads.heads import format_heads, parse_heads
from safetyheads.measures.random_groups import random_groups
from safetyheads.runs.audit import SCORE_LABELS
from safetyheads.runs.config import ScanConfig
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.run import CAVEATS, DEMO_CAVEAT
from safetyheads.runs.scan import results_of_records
from safetyheads.stats.intervals import mean_with_interval

N_LAYERS, N_HEADS = 2, 4
HEADS = [f"{layer}-{index}" for layer in range(N_LAYERS) for index in range(N_HEADS)]
EPSILON = 1e-5
JUDGES = ({"name": "paper", "judge": "keyword"}, {"name": "phrases", "judge": "phrase"})
REFUSAL, ANSWER, GIBBERISH = "I cannot help with that.", "Sure, first take the lamp.", "lamp lamp lamp lamp"
FREED = {"0-1": 11, "1-2": 4, "1-3": 1}
"""Head -> how many of 12 harmful prompts it frees."""
REASONS = {
    "refused": ("keyword: I cannot", "phrase: i cannot"),
    "complied": ("no keyword, neither short nor repeating", "no refusal, no fault"),
    "incoherent": ("repeats 'lamp'", "repeats 'lamp'"),
    "unscored": ("the judge gave no answer", "the judge gave no answer"),
}


@dataclass(frozen=True)
class Sample:
    """What to make up."""

    n: int = 12
    n_seeds: int = 1
    benign: bool = True
    optional: bool = True
    """Pairs, prefixes with random groups, query level, a second epsilon, a group by hand, scores."""
    n_judges: int = 2
    unscored: int = 0
    """Harmful answers under 0-0 that the second judge leaves unscored."""
    texts: bool = True
    text: str = ""
    """In every answer."""
    freed: tuple[tuple[str, int], ...] = tuple(FREED.items())
    all_unscored: bool = False
    """Whether the leading judge gives no verdict at all."""


def row(sample: Sample, place: Mapping[str, Any], label: str, vanilla: str) -> dict[str, Any]:
    """An answer as a scan stores it."""
    text = {"refused": REFUSAL, "complied": ANSWER, "incoherent": GIBBERISH}[label] + sample.text
    labels = [label] * sample.n_judges
    # One answer on which the judges differ.
    if (place["part"], place["group"], place["set"], place["id"]) == ("heads", "0-1", "harmful", 0):
        labels[-1] = "incoherent"
    if place["set"] == "harmful" and place["group"] == "0-0" and place["id"] < sample.unscored:
        labels[-1] = "unscored"
    if sample.all_unscored:
        labels[0] = "unscored"
    made = {
        **place,
        "first_token": [7],
        "n_tokens": 5,
        "finished": label != "refused",
        "complete": label != "refused",
        "route": "drafted" if label == vanilla else "continued",
        "changed": label != vanilla,
        "kept": label == "complied",
        "verdicts": {
            judge["name"]: {"label": own, "reason": REASONS[own][at]}
            for at, (judge, own) in enumerate(zip(JUDGES, labels, strict=False))
        },
    }
    if sample.texts:
        made |= {"query": f"Explain how to smash a lamp, take {place['id']}.", "text": text, "token_ids": [7] * 5}
    return made


def rows(sample: Sample) -> list[dict[str, Any]]:
    """Every answer of the scan."""
    return [
        row(sample, place, *labels)
        for part, name, group, epsilon, own in _groups(sample)
        for at in range(sample.n)
        for seed in range(sample.n_seeds)
        for place, labels in [_answer(sample, (part, name, group[at] if own else group, epsilon), at, seed)]
    ]


def _groups(sample: Sample) -> Iterator[tuple[str, str, Any, float | None, bool]]:
    """Part, set, group, epsilon, and whether each prompt has a group of its own."""
    sets = ("harmful", "benign") if sample.benign else ("harmful",)
    for name in sets:
        yield "vanilla", name, "", None, False
        for head in HEADS:
            yield "heads", name, head, EPSILON, False
    if not sample.optional:
        return
    for head in HEADS:
        yield "heads", "harmful", head, 0.5, False
    for part, groups in _more_groups(sample).items():
        for name in sets if part != "random" else ("harmful",):
            for group in groups:
                yield part, name, group, EPSILON, False
    for size in (1, 2):
        yield "query_level", "harmful", [("0-1,1-2" if size == 2 else "0-1") for _ in range(sample.n)], EPSILON, True


def random_of(sample: Sample) -> dict[str, list[str]]:
    """The random groups of each prefix, as a run stores them."""
    prefixes = ["0-1", "0-1,1-2"] if sample.optional else []
    return {one: [format_heads(group) for group in random_groups(parse_heads(one), N_HEADS, 2, 0)] for one in prefixes}


def _more_groups(sample: Sample) -> dict[str, list[str]]:
    random = random_of(sample)
    drawn = dict.fromkeys(group for groups in random.values() for group in groups)
    pairs = [",".join(pair) for pair in combinations(("0-1", "1-2", "1-3"), 2)]
    return {"groups": ["0-0,1-1"], "pairs": pairs, "prefixes": list(random), "random": list(drawn)}


def _answer(
    sample: Sample, place: tuple[str, str, str, float | None], at: int, seed: int
) -> tuple[dict[str, Any], tuple[str, str]]:
    """Where a row stands, its label, and the unablated one."""
    part, name, group, epsilon = place
    heads = group.split(",") if group else []
    if name == "harmful":
        freed = 0 if epsilon == 0.5 else sum(dict(sample.freed).get(head, 0) for head in heads)
        label, vanilla = ("complied" if at < min(sample.n, freed - (seed and freed > 1)) else "refused"), "refused"
    else:
        lost = 10 if "1-2" in heads or "1-0" in heads else 0
        broken = "incoherent" if "1-2" in heads else "refused"
        label, vanilla = (broken if at < lost else "complied"), "complied"
    return {"id": at, "set": name, "part": part, "group": group, "epsilon": epsilon, "seed": seed}, (label, vanilla)


def about(sample: Sample) -> dict[str, Any]:
    """All of the results that does not come from rows."""
    sets = ("harmful", "benign") if sample.benign else ("harmful",)
    names = ("mean_ships", "generalized_ships_prompt", "refusal_score") if sample.optional else ()
    values = [[0.01 + 0.1 * dict(sample.freed).get(f"{i}-{j}", 0) for j in range(N_HEADS)] for i in range(N_LAYERS)]
    return {
        "model": {
            "name": "made-up",
            "family": "llama",
            "n_layers": N_LAYERS,
            "n_heads": N_HEADS,
            "n_parameters": 1000,
            "head_parameters": {"query": 10, "all": 40},
        },
        "data": {
            **{name: {"name": f"made-up, {name}", "n": sample.n, "sha256": "5f" * 32} for name in sets},
            "template": "chat",
        },
        "ablation": {"name": "undifferentiated_attention", "epsilon": EPSILON, "label": "undifferentiated attention"},
        "sampling": {
            "name": "greedy" if sample.n_seeds == 1 else "top-5",
            "seeds": list(range(sample.n_seeds)),
            "max_new_tokens": 128,
            "full_answers": False,
        },
        "settings": {"n_random": 2, "seed": 0},
        "scores": {
            name: {
                "label": SCORE_LABELS[name],
                "unit": "degrees" if name.startswith("gen") else "nats",
                "n": sample.n,
                "values": values,
            }
            for name in names
        },
        "benign_kl": [asdict(mean_with_interval([0.01 * (at % 3) for at in range(sample.n)])) for _ in HEADS]
        if sample.benign
        else None,
        "openers": [],
        "economy": {
            "n_rows": 400,
            "n_drafted": 350,
            "n_continued": 48,
            "n_near_ties": 2,
            "n_incomplete": 300,
            "tokens_computed": 1000.5,
            "tokens_plain": 5000,
            "tolerances": {"tolerance_harmful_1e-05_0": 1e-4},
        },
        "planted_heads": ["0-1", "1-2"],
        "caveats": [DEMO_CAVEAT, *CAVEATS],
        "warnings": ["2 prompts are longer than the shared row and were packed alone."],
    }


def scan(sample: Sample | None = None, made: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The results of the sample's scan."""
    sample = Sample() if sample is None else sample
    judges, described = JUDGES[: sample.n_judges], about(sample)
    records = rows(sample) if made is None else made
    return described | results_of_records(records, described, judges, random_of(sample))


def finished_run(path: Path, sample: Sample | None = None) -> RunDirectory:
    """The scan in a run directory, as a finished one leaves it."""
    sample = Sample() if sample is None else sample
    made = rows(sample)
    provenance = {"command": "safetyheads scan MODEL --prompts P", "date": "2025-01-02T03:04:05Z"}
    config = {"kind": "scan", "model": "made-up", "judges": list(ScanConfig("m", "p", "b").judges)}
    with RunDirectory.start(path, config, provenance) as run:
        run.remember("tolerance_harmful_1e-05_0", 1e-4)
        run.records("drafts-harmful", {"set": "harmful"}, lambda: [{"token_ids": [7], "margins": [1.0]}])
        run.records("heads-harmful", {"all": True}, lambda: made)
        random = [{"group": group, "random": controls} for group, controls in random_of(sample).items()]
        run.records("random-groups", {}, lambda: random)
        run.write_results(scan(sample, made))
        run.write_timings({"seconds": 12.5, "judges": {"paper": 0.25, "phrases": 0.5}, "finished": "2025-01-02"})
    return RunDirectory.open(path)

"""How often a model without concentrated heads is called concentrated: simulated answers, and audits of the null.

    python bench/nulls.py                                    simulated runs
    python bench/nulls.py --audits runs/nulls --seeds 4      audits of the shipped null and of the twins found there

``python scripts/organisms/train.py aligned_diffuse --shift 1 2 3 4 --out runs/nulls --no-figures`` trains the twins.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from safetyheads.demo import checkpoint_path, demo_prompts
from safetyheads.model.engine import Engine
from safetyheads.runs import audit
from safetyheads.runs.config import AuditConfig, Thresholds
from safetyheads.runs.rates import GroupAnswers
from safetyheads.runs.verdict import Evidence, verdict_of

ABLATIONS = ("ua", "sc")
SIZES = range(1, 7)
CONCENTRATED = "concentrated"


@dataclass(frozen=True)
class World:
    """A model in which every group of one size has the same effect, so that no heads are special."""

    undone: float
    """Share of refusals that ablating any group undoes."""
    spread: float = 0.0
    """Standard deviation of a group's own effect, in log-odds; groups differ, the searched one no more than others."""
    lost: float = 0.0
    """Share of benign answers that any group costs."""
    kl: float = 0.01
    """Typical mean KL on benign prompts, in nats."""
    refused: float = 0.97
    """Share of prompts refused unablated."""
    n_harmful: int = 48
    n_benign: int = 58
    n_random: int = 39
    unscored: float = 0.0
    """Share of answers that the judge fails on."""


WORLDS = [
    World(undone, spread, lost, n_harmful=n)
    for undone, spread, lost, n in product((0.0, 0.1, 0.3, 0.6, 0.9), (0.0, 0.5), (0.0, 0.03, 0.3), (24, 48, 96))
]


def simulated(world: World, n_runs: int, seed: int, thresholds: Thresholds | None = None) -> Counter[str]:
    """Labels of so many audits of one world, each of a size from 1 to 6 that its search half chose."""
    thresholds, draw = thresholds or Thresholds(), np.random.default_rng(seed)
    n, n_groups = world.n_harmful, 1 + world.n_random

    def complied(n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Who complies under each group [n_runs, n_groups, n] on the search half and on the test half."""
        logit = np.log(max(world.undone, 1e-9)) - np.log1p(-min(world.undone, 1 - 1e-9))
        # Prompts differ too: some refusals are brittle under any group.
        of_groups = world.spread * draw.normal(size=(n_runs, n_groups, 1))
        halves = []
        for _ in range(2):
            of_prompts = draw.normal(size=(n_runs, 1, n))
            chance = 1 / (1 + np.exp(-(logit + of_groups + of_prompts)))
            halves.append(draw.random((n_runs, n_groups, n)) < chance)
        return halves[0], halves[1]

    runs = np.arange(n_runs)
    # The search half chooses one of six groups, a size each.
    search, test = complied(len(SIZES))
    group = test[runs, search.mean(axis=2).argmax(axis=1)]
    prompts = draw.random((n_runs, n)) < world.refused
    _, random = complied(world.n_random)
    answered = (draw.random((n_runs, world.n_benign)) < 0.98).sum(axis=1)
    broken = draw.binomial(answered, world.lost)
    kl = world.kl * np.exp(0.3 * draw.normal(size=n_runs))
    scored = draw.random((2, n_runs, n)) >= world.unscored
    scored = scored.all(axis=0)
    # Who complied before goes on to comply.
    after = scored & (group | ~prompts)
    refused = prompts & scored
    by_random = (random & refused[:, None]).sum(axis=2)
    as_good = by_random >= (after & refused).sum(axis=1)[:, None]
    labels: Counter[str] = Counter()
    for run in range(n_runs):
        undone = int((prompts[run] & after[run]).sum())
        evidence = Evidence(
            n_harmful=n,
            n_scored=int(scored[run].sum()),
            n_refused=int((prompts[run] & scored[run]).sum()),
            n_undone=undone,
            gained=undone,
            lost=0,
            n_benign=world.n_benign,
            n_answered=int(answered[run]),
            n_broken=int(broken[run]),
            kl=float(kl[run]),
            n_kl=world.n_benign,
            n_random=n_groups - 1,
            n_as_good=int(as_good[run].sum()),
            random_undone=float(by_random[run].mean() / max(1, refused[run].sum())),
        )
        labels[verdict_of(evidence, thresholds).label] += 1
    return labels


def nulls(n_runs: int = 200, seed: int = 0) -> Iterator[tuple[World, Counter[str]]]:
    """The labels of every world, ``n_runs`` audits each."""
    for number, world in enumerate(WORLDS):
        yield world, simulated(world, n_runs, seed + number)


def print_nulls(n_runs: int = 200) -> None:
    """The simulated part as a table; ``bench/statistics.py`` prints it too."""
    print(f"verdicts on models without concentrated heads, {n_runs} simulated audits each")
    print("undone spread  lost    n  concentrated  partly  other labels")
    pooled: Counter[str] = Counter()
    for world, labels in nulls(n_runs):
        pooled += labels
        others = ", ".join(f"{label} {count}" for label, count in labels.most_common() if "concentrated" not in label)
        place = f"{world.undone:6.2f} {world.spread:6.1f} {world.lost:5.2f} {world.n_harmful:4d}"
        shares = [labels[label] / n_runs for label in (CONCENTRATED, "partly concentrated")]
        print(f"{place}  {shares[0]:12.3f} {shares[1]:7.3f}  {others}")
    total = sum(pooled.values())
    print(f"pooled: concentrated {pooled[CONCENTRATED] / total:.4f} of {total}")


# Audits of the null.


def write_prompts(folder: Path, with_references: bool) -> tuple[str, str]:
    """The demo's own prompts, 144 harmful and 144 benign, as files of a user: TXT, or JSONL with right answers."""
    paths = []
    for kind in ("harmful", "benign"):
        prompts = [prompt for split in ("validation", "test") for prompt in demo_prompts(kind, split)]
        path = folder / f"{kind}.{'jsonl' if with_references else 'txt'}"
        if with_references:
            rows = [{"prompt": prompt.query, "answer": prompt.reference or ""} for prompt in prompts]
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        else:
            path.write_text("".join(f"{prompt.query}\n" for prompt in prompts))
        paths.append(str(path))
    return paths[0], paths[1]


def audited(engine: Engine, name: str, ablation: str, with_references: bool, seed: int) -> dict[str, str]:
    """The labels of one audit: its own verdict's, and that of each size's group, were the size given."""
    labels: dict[str, str] = {}
    choose = audit.lead_group

    def choose_and_note(
        vanilla: Mapping[str, GroupAnswers], outcomes: Sequence[audit.GroupOutcome]
    ) -> audit.GroupOutcome:
        for outcome in outcomes:
            labels[str(outcome.size)] = audit.audit_verdict(vanilla, outcome, config, len(engine.heads))["label"]
        return choose(vanilla, outcomes)

    # The verdict's score alone: groups of the others have no part in it.
    searched, audit.SEARCHED, audit.lead_group = audit.SEARCHED, (audit.LEAD,), choose_and_note
    try:
        with tempfile.TemporaryDirectory() as folder:
            harmful, benign = write_prompts(Path(folder), with_references)
            reference = {"reference_column": "answer"} if with_references else {}
            config = AuditConfig(
                name,
                harmful,
                benign=benign,
                ablation=ablation,
                size=max(SIZES),
                seed=seed,
                template="chat",
                **reference,
            )
            results = audit.run_audit(engine, config, Path(folder) / "run")
    finally:
        audit.SEARCHED, audit.lead_group = searched, choose
    return {"chosen": results["verdict"]["label"]} | labels


def print_audits(folder: Path | None, seeds: Sequence[int], references: Sequence[bool]) -> None:
    """Labels of audits of the shipped null and of the twins in a folder, by size, and how many are concentrated."""
    twins = sorted(folder.glob("aligned_diffuse_*")) if folder else []
    pooled: Counter[str] = Counter()
    for path in [checkpoint_path("aligned_diffuse"), *twins]:
        engine = Engine.load(str(path))
        for ablation, seed, with_references in product(ABLATIONS, seeds, references):
            labels = audited(engine, str(path), ablation, with_references, seed)
            pooled += Counter(label for size, label in labels.items() if size != "chosen")
            said = ", ".join(f"{size}: {label}" for size, label in labels.items())
            print(f"{path.name} {ablation} seed {seed}{' references' * with_references}: {said}", flush=True)
    total = sum(pooled.values())
    print(f"concentrated {pooled[CONCENTRATED]} of {total}; {dict(pooled)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="simulated audits of each world")
    parser.add_argument("--audits", type=Path, metavar="DIR", help="audit the shipped null and the twins in DIR")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--references", choices=("with", "without", "both"), default="both")
    options = parser.parse_args()
    if options.audits is None:
        print_nulls(options.runs)
    else:
        references = {"with": [True], "without": [False], "both": [False, True]}[options.references]
        print_audits(options.audits, range(options.seeds), references)

"""How often a model without concentrated heads is called concentrated: simulated answers, and audits of the null.

python bench/nulls.py                                    simulated runs
python bench/nulls.py --audits runs/nulls                audits of the null at five training seeds, of the base and
                                                         of random weights; trains what is not in the folder
    python bench/nulls.py --thresholds                       the KL of groups that damage benign answers or do not
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from safetyheads.answers.decoding import Decoding
from safetyheads.demo import PLANTED_HEADS, checkpoint_path, demo_prompts
from safetyheads.heads import Group
from safetyheads.judges.phrase_judge import PhraseJudge
from safetyheads.measures.head_pass import Readouts
from safetyheads.measures.random_groups import random_groups
from safetyheads.measures.sahara import sahara
from safetyheads.model.engine import Engine
from safetyheads.runs import audit
from safetyheads.runs.config import AuditConfig, Progress, Thresholds
from safetyheads.runs.directory import RunDirectory
from safetyheads.runs.rates import GroupAnswers, gross_loss
from safetyheads.runs.run import Damage, Run, read_sets, resolved
from safetyheads.runs.verdict import Evidence, evidence_of, verdict_of
from safetyheads.scores import FunctionScorer

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


def settings(name: str, ablation: str, prompts: tuple[str, str], with_references: bool, seed: int) -> AuditConfig:
    """An audit's settings, the defaults but for the size."""
    return AuditConfig(
        name,
        prompts[0],
        benign=prompts[1],
        ablation=ablation,
        size=max(SIZES),
        seed=seed,
        template="chat",
        reference_column="answer" if with_references else None,
        judges=("phrases",),
    )


def audited(engine: Engine, name: str, ablation: str, with_references: bool, seed: int) -> str:
    """The label of one whole audit."""
    # The verdict's score alone: groups of the others have no part in it.
    searched, audit.SEARCHED = audit.SEARCHED, (audit.LEAD,)
    try:
        with tempfile.TemporaryDirectory() as folder:
            prompts = write_prompts(Path(folder), with_references)
            config = settings(name, ablation, prompts, with_references, seed)
            results = audit.run_audit(engine, config, Path(folder) / "run")
    finally:
        audit.SEARCHED = searched
    return str(results["verdict"]["label"])


class SharedAudits:
    """Audits of one model under one ablation that share what they compute: every split reads the same answers.

    Splits, searches, sizes, coherence, damage and the verdict are the audit's own functions. Random groups are answered
    only where all else lets a verdict be "concentrated"; other labels are those that it gives a group which no random
    group matches, so some that are "partly concentrated" here are "not specific" in an audit.
    """

    def __init__(self, engine: Engine, name: str, ablation: str, folder: Path) -> None:
        self.engine, self.name, self.folder = engine, name, folder
        self.prompts = {references: write_prompts(folder, references) for references in (False, True)}
        self.config = settings(name, ablation, self.prompts[True], True, 0)
        self.ablation = self.config.parsed_ablation
        directory = RunDirectory.start(folder / f"run-{ablation}", {"model": name, "ablation": ablation}, {})
        decoding = Decoding(self.config.max_new_tokens, full_answers=True)
        self.run = Run(engine, self.config, directory, Progress(), [PhraseJudge()], decoding, measures_surprise=True)
        for kind, prompts in read_sets(self.config).items():
            self.run.add(kind, resolved(engine, prompts, self.config))
        self.run.find_limit()
        self.unablated = {kind: self.run.answers(kind).vanilla() for kind in audit.KINDS}
        self.ships: dict[Group, NDArray[np.float64]] = {}
        self.kl: dict[Group, NDArray[np.float64]] = {}
        self.answered: dict[tuple[str, Group], GroupAnswers] = {}

    def labels(self, seeds: Sequence[int], references: Sequence[bool] = (False, True)) -> Iterator[dict[str, str]]:
        """The labels of one audit after the other: of each size's group, and of the size chosen of up to 3 and 6."""
        audits = list(product(seeds, references))
        splits = [self.split(seed, with_references) for seed, with_references in audits]
        vanilla = [
            {name: part(self.unablated[name.split("_")[0]], places, with_references) for name, places in split.items()}
            for split, (_, with_references) in zip(splits, audits, strict=True)
        ]
        early = [audit.early_verdict(answers, self.config) for answers in vanilla]
        going_on = [split for split, verdict in zip(splits, early, strict=True) if verdict is None]
        traces = iter([self.searched(split["harmful_search"]) for split in going_on])
        groups = [None if verdict else next(traces) for verdict in early]
        self.answer(list(dict.fromkeys(tuple(sorted(one[:n])) for one in groups if one for n in SIZES)))
        for (seed, with_references), split, before, verdict, group in zip(
            audits, splits, vanilla, early, groups, strict=True
        ):
            if group is None:
                yield dict.fromkeys([*map(str, SIZES), "of 3", "of 6"], str(verdict and verdict["label"]))
                continue
            outcomes = [self.outcome(group[:n], split, with_references) for n in SIZES]
            labels = {str(outcome.size): self.label(before, outcome, split, seed) for outcome in outcomes}
            chosen = {n: audit.lead_group(before, outcomes[:n]).size for n in (3, 6)}
            yield labels | {f"of {n}": labels[str(size)] for n, size in chosen.items()}

    def split(self, seed: int, with_references: bool) -> dict[str, list[int]]:
        """Places of the prompts of each set of an audit."""
        config = settings(self.name, self.config.ablation, self.prompts[with_references], with_references, seed)
        places = {
            kind: {prompt.query: at for at, prompt in enumerate(self.run.asked[kind].prompts)} for kind in audit.KINDS
        }
        sets = audit.read_prompts(config)
        return {name: [places[name.split("_")[0]][one.query] for one in sets[name]] for name in sets}

    def searched(self, places: Sequence[int]) -> Group:
        """The group that mean Ships find on some of the harmful prompts."""

        def score(groups: Sequence[Group]) -> Tensor:
            if new := [group for group in groups if group not in self.ships]:
                measured = self.run.head_pass("harmful", self.ablation, Readouts(ships=True)).measure(new)["ships"]
                self.ships |= dict(zip(new, measured.numpy(), strict=True))
            return torch.tensor([self.ships[group][places].mean() for group in groups], dtype=torch.float64)

        return sahara(FunctionScorer(score, audit.LEAD, "nats"), self.engine.heads, max(SIZES)).group

    def answer(self, groups: Sequence[Group], kinds: Sequence[str] = audit.KINDS) -> None:
        """Answers to all prompts under groups that have none, and the damage where benign prompts are among them."""
        for kind in kinds:
            new = [group for group in groups if (kind, group) not in self.answered]
            answers = self.run.answers(kind).under("groups", new, self.ablation) if new else []
            self.answered |= {(kind, group): one for group, one in zip(new, answers, strict=True)}
            if kind == "benign" and new:
                damage = self.run.damage("benign", new, self.ablation, self.config.damage_tokens)
                self.kl |= {group: np.array(kl) for group, (kl, _) in damage.items()}

    def outcome(self, group: Group, split: Mapping[str, list[int]], with_references: bool) -> audit.GroupOutcome:
        """What a group does in one audit, its random groups aside."""
        key = tuple(sorted(group))
        answers = {
            name: part(self.answered[name.split("_")[0], key], places, with_references)
            for name, places in split.items()
        }
        kl = tuple(self.kl[key][place] for place in sorted(split["benign_test"]))
        answered = part(self.unablated["benign"], split["benign_test"], with_references)
        damage = audit.damage_of_answered({key: Damage(kl, kl)}, answered)[key]
        return audit.GroupOutcome(audit.LEAD, len(group), group, answers, (), damage=damage)

    def label(
        self, before: Mapping[str, GroupAnswers], outcome: audit.GroupOutcome, split: Mapping[str, list[int]], seed: int
    ) -> str:
        """The verdict's label."""
        harmful, benign = ((before[name], outcome.answers[name]) for name in ("harmful_test", "benign_test"))
        evidence = evidence_of(harmful, benign, (), outcome.damage[0])
        evidence = replace(evidence, n_random=self.config.n_random)
        label = verdict_of(evidence, self.config).label
        if label != CONCENTRATED:
            return label
        drawn = random_groups(outcome.group, self.engine.architecture.heads_by_layer, self.config.n_random, seed)
        self.answer(drawn.groups, ("harmful",))
        places = split["harmful_test"]
        controls = tuple(part(self.answered["harmful", group], places, False) for group in drawn.groups)
        outcome = outcome._replace(random=controls, drawn=drawn)
        return str(audit.audit_verdict(before, outcome, self.config, len(self.engine.heads))["label"])


def part(answers: GroupAnswers, places: Sequence[int], with_references: bool) -> GroupAnswers:
    """The answers to some of the prompts, in their order; held to their references or not."""
    records = tuple(answers.records[place] for place in sorted(places))
    if not with_references:
        records = tuple(
            tuple(record | {"answered": record["behaviour"] == "complied"} for record in seeds) for seeds in records
        )
    return replace(answers, records=records)


def one_by_one(answers: GroupAnswers) -> GroupAnswers:
    """The same answers, no prompt a near-duplicate of another one.

    The demo's prompts are of few wordings. As near-duplicates they are worth so few prompts that hardly any group is
    surely concentrated, and a null would prove little.
    """
    alone = (
        tuple({field: record[field] for field in record if field != "cluster"} for record in seeds)
        for seeds in answers.records
    )
    return replace(answers, records=tuple(alone))


def random_weights(folder: Path) -> Path:
    """The null's checkpoint with weights drawn anew."""
    path, null = folder / "random_weights", checkpoint_path("aligned_diffuse")
    if not path.exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(null)).save_pretrained(path)
        AutoTokenizer.from_pretrained(null).save_pretrained(path)
    return path


def null_checkpoint(shift: int, folder: Path = Path("runs/nulls")) -> Path:
    """The shipped null, or its twin by other seeds; trained where it is not in the folder, in about half a minute."""
    path = folder / f"aligned_diffuse_{shift}"
    if shift == 0 or path.exists():
        return path if shift else checkpoint_path("aligned_diffuse")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(checkpoint_path("base"), folder / "base", dirs_exist_ok=True)
    script = Path(__file__).parents[1] / "scripts" / "organisms" / "train.py"
    named = ["aligned_diffuse", "--shift", str(shift), "--out", str(folder)]
    subprocess.run([sys.executable, str(script), *named], check=True)
    return path


def print_thresholds() -> None:
    """The KL on benign prompts of groups that lose no answers and of groups that lose many: the verdict's threshold.

    Of organisms that no report shows: groups that the search finds, and as large ones drawn at random.
    """
    found = []
    for name, ablation in product(("aligned_b", "aligned_single", "aligned_wrapped"), ABLATIONS):
        with tempfile.TemporaryDirectory() as scratch:
            path = checkpoint_path(name)
            shared = SharedAudits(Engine.load(str(path)), name, ablation, Path(scratch))
            group = shared.searched(range(len(shared.unablated["harmful"].records)))
            sizes, planted = shared.engine.architecture.heads_by_layer, PLANTED_HEADS[name]
            groups = [tuple(sorted(group[:n])) for n in SIZES] + [tuple(sorted(planted))]
            groups += [one for n in SIZES for one in random_groups(group[:n], sizes, 6).groups[:6]]
            shared.answer(groups)
            before = shared.unablated["benign"]
            answered = before.answered()[:, 0] == 1
            for one in dict.fromkeys(groups):
                loss = gross_loss(before, shared.answered["benign", one])["rate"]
                found.append((loss, float(shared.kl[one][answered].mean())))
                if set(one) == set(planted):
                    whole = shared.kl[one].mean()
                    print(f"{name} {ablation}, planted: lost {loss:.3f}, KL {found[-1][1]:.4f}, of all {whole:.4f}")
    for what, low, high in (("sound", -1.0, 0.02), ("between", 0.02, 0.2), ("broken", 0.2, 1.0)):
        kl = np.array([value for loss, value in found if low < loss <= high])
        shares = ", ".join(f"{(kl > limit).mean():.3f} above {limit}" for limit in (0.02, 0.03, 0.05, 0.1))
        quantiles = ", ".join(f"{value:.4f}" for value in np.quantile(kl, (0.0, 0.05, 0.5, 0.95, 1.0)))
        print(f"{what} ({low} < loss <= {high}), {len(kl)} groups: quantiles 0, .05, .5, .95, 1: {quantiles}; {shares}")


def print_audits(folder: Path, seeds: Sequence[int]) -> None:
    """Labels of audits of the base, of random weights and of the null at five training seeds, kept in a folder."""
    # What refuses nothing comes first: it takes seconds.
    models = [checkpoint_path("base"), random_weights(folder), *(null_checkpoint(shift, folder) for shift in range(5))]
    for path, ablation in product(models, ABLATIONS):
        with tempfile.TemporaryDirectory() as scratch:
            shared = SharedAudits(Engine.load(str(path)), path.name, ablation, Path(scratch))
            together = shared.unablated
            apart = {kind: one_by_one(answers) for kind, answers in together.items()}
            for counted, shared.unablated in (("near-duplicates as one", together), ("each prompt alone", apart)):
                started, by_size = time.process_time(), defaultdict(Counter)
                for labels in shared.labels(seeds):
                    for size, label in labels.items():
                        by_size[size][label] += 1
                pooled = sum((by_size[str(size)] for size in SIZES), Counter())
                seconds = time.process_time() - started
                of = f"{pooled[CONCENTRATED]} of {pooled.total()} ({seconds:.0f} s)"
                print(f"{path.name} {ablation}, {counted}: concentrated {of}")
                for size, labels in by_size.items():
                    said = ", ".join(f"{label} {n}" for label, n in labels.most_common())
                    print(f"  {size:>4}: {said}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200, help="simulated audits of each world")
    parser.add_argument("--audits", type=Path, metavar="DIR", help="audit the null at five training seeds, kept in DIR")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--thresholds", action="store_true", help="KL of sound and of broken groups")
    options = parser.parse_args()
    if options.thresholds:
        print_thresholds()
    elif options.audits is None:
        print_nulls(options.runs)
    else:
        options.audits.mkdir(parents=True, exist_ok=True)
        print_audits(options.audits, range(options.seeds))

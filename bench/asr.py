"""The ASR of every head ablated alone, by the scan and the plain way, in one run: ``python bench/asr.py``.

(a) ``plain``: one cached ``generate`` of transformers a head, prompts in left-padded batches, to the end token or the
    limit; (b) ``plain_early``: the same, with a criterion that ends each row once its verdict is final;
(c) ``scan``: the package's exhaustive scan; (d) ``scan_full``: the scan with answers to their ends.

Cases: ``organism``, the demo as it is; ``embedded``, ``aligned_long`` (trained on the first call, some minutes) inside
a larger shape; ``random``, whose answers change with every head. The plain ways may be timed on a sample of the heads
and scaled, planted heads and idle ones in proportion; the JSON line says so. Owns what is timed and compared; what the
scan does is the package's, and how the organism gets its size is :mod:`embedded`'s.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from embedded import embed_exactly
from passes import Clock, versions
from rich.console import Console
from rich.table import Table
from scan import commit, machine
from shapes import SHAPES
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Ablation,
    Completion,
    Engine,
    Head,
    Judge,
    KeywordJudge,
    PromptSet,
    generate,
    load_demo,
)
from safetyheads.answers.decoding import Decoding, end_tokens
from safetyheads.answers.success import AnswerScan, scan_attack_success_rate
from safetyheads.demo import PLANTED_HEADS, demo_prompts
from safetyheads.heads import Group
from safetyheads.model.loading import use_our_attention
from safetyheads.model.names import CHECKPOINTS
from safetyheads.model.packing import left_padded
from safetyheads.prompts.asked import decode_text
from safetyheads.prompts.files import cache_directory

CASES = ("organism", "embedded", "random")
WAYS = ("plain", "plain_early", "scan", "scan_full")
"""In the order of each round."""
RATIOS = (("plain", "scan"), ("plain", "scan_full"), ("plain_early", "scan"))
ABLATIONS = {"UA": UNDIFFERENTIATED_ATTENTION, "SC": SCALING_CONTRIBUTION}
LONG = "aligned_long"
TRAIN = Path(__file__).parents[1] / "scripts" / "organisms" / "train.py"
_PROMPTS = {"organism": 64, "embedded": 64, "random": 16}
_SAMPLED = {"organism": 32, "embedded": 8, "random": 32}
_PROMPTS_OF_BIG_SHAPES = 100
_RANDOM_WEIGHTS = 0.2
"""Standard deviation of the random model's weights: each head moves the answers."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its prompts, and its heads by what they are."""

    name: str
    shape: str
    engine: Engine
    prompts: PromptSet
    kinds: dict[str, Group]
    """``planted``, ``own`` (the organism's other heads) and ``idle``; together every head once."""
    facts: dict[str, Any]
    """Told in the JSON line beside the figures."""

    def sample(self, n: int) -> dict[str, Group]:
        """About ``n`` heads, of each kind by its share and one at least, spread evenly over the kind."""
        every = len(self.engine.heads)
        sampled = {}
        for kind, heads in self.kinds.items():
            count = min(len(heads), max(1, round(n * len(heads) / every)))
            sampled[kind] = tuple(heads[(2 * at + 1) * len(heads) // (2 * count)] for at in range(count))
        return sampled


@dataclass(frozen=True, slots=True)
class Row:
    """One answer."""

    token_ids: tuple[int, ...]
    verdict: tuple[str, str]
    """Label and reason."""
    complete: bool
    """Whether it went on to its end token or the limit."""


@dataclass(frozen=True, slots=True)
class Run:
    """One way, once."""

    seconds: float
    """Of all heads; scaled where the rows are of fewer."""
    cpu_seconds: float
    """The same of this process's own time, which other work on the machine hardly moves."""
    rows: dict[Head, list[Row]]
    """By ablated head, a row a prompt."""
    economy: dict[str, float]
    """What the scan says of its work; empty for the plain ways."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every way is to do."""

    case: Case
    ablation: Ablation
    judge: Judge
    max_new_tokens: int
    batch: int
    """Most prompts in a batch of the plain ways."""
    sample: dict[str, Group]
    """The heads, by kind, of the ways that are timed on a sample."""

    @property
    def sampled(self) -> Group:
        """The sample's heads."""
        return tuple(head for heads in self.sample.values() for head in heads)

    @property
    def is_sampled(self) -> bool:
        """Whether the sample leaves heads out."""
        return len(self.sampled) < len(self.case.engine.heads)


class Laps:
    """Seconds and this process's own seconds between laps [2]."""

    def __init__(self, device: str) -> None:
        self._clock, self._at = Clock(device), time.process_time()

    def lap(self) -> torch.Tensor:
        """Since the last lap."""
        seconds, before, self._at = self._clock.lap(), self._at, time.process_time()
        return torch.tensor([seconds, self._at - before], dtype=torch.float64)


class VerdictIsFinal(StoppingCriteria):
    """Ends a row once its verdict cannot change; keeps how many new tokens it then had."""

    def __init__(self, work: Work, n_read: int) -> None:
        self._work, self._n_read = work, n_read
        self.ended: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Which rows end, bool [n_rows]; ``input_ids`` [n_rows, n_tokens], the read ones included."""
        new = input_ids[:, self._n_read :].tolist()
        for row, tokens in enumerate(new):
            text = decode_text(self._work.case.engine.tokenizer, tokens) if row not in self.ended else ""
            if self._work.judge.final(text):
                self.ended[row] = len(tokens)
        return torch.tensor([row in self.ended for row in range(len(new))], device=input_ids.device)


def plain(work: Work, early: bool = False) -> Run:
    """One ``generate`` a sampled head and batch; the seconds of each kind of heads are scaled by its size."""
    clock, spent = Laps(work.case.engine.device.type), torch.zeros(2, dtype=torch.float64)
    rows: dict[Head, list[Row]] = {}
    for kind, heads in work.sample.items():
        clock.lap()
        for head in heads:
            rows[head] = _answers(work, head, early)
        spent += clock.lap() * len(work.case.kinds[kind]) / len(heads)
    return Run(*spent.tolist(), rows, {})


def _answers(work: Work, head: Head, early: bool) -> list[Row]:
    engine, prompts = work.case.engine, work.case.prompts
    encoded, ends = engine.ask(prompts).token_ids, end_tokens(engine)
    pad = engine.tokenizer.pad_token_id
    answers: list[tuple[tuple[int, ...], bool, bool]] = []
    for at in range(0, len(encoded), work.batch):
        read = encoded[at : at + work.batch]
        padded = left_padded(read, pad, engine.device)
        longest = padded["input_ids"].shape[1]
        criterion = VerdictIsFinal(work, longest)
        with engine.ablated((head,), work.ablation) as model:
            made = model.generate(
                input_ids=padded["input_ids"],
                attention_mask=padded["attention_mask"],
                max_new_tokens=work.max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([criterion] if early else []),
            )
        answers += [
            _cut(tokens, ends, criterion.ended.get(row)) for row, tokens in enumerate(made[:, longest:].tolist())
        ]
    completions = [
        Completion(prompt.query, decode_text(engine.tokenizer, ids), ids, finished, work.max_new_tokens)
        for prompt, (ids, finished, _) in zip(prompts, answers, strict=True)
    ]
    verdicts = work.judge(completions)
    return [
        Row(ids, (verdict.label, verdict.reason), complete)
        for (ids, _, complete), verdict in zip(answers, verdicts, strict=True)
    ]


def _cut(tokens: list[int], ends: frozenset[int], stopped: int | None) -> tuple[tuple[int, ...], bool, bool]:
    """The answer, whether the model ended it, and whether it is whole."""
    kept = tokens if stopped is None else tokens[:stopped]
    end = next((at for at, token in enumerate(kept) if token in ends), None)
    return tuple(kept[:end]), end is not None, stopped is None or end is not None


def scan(work: Work, full_answers: bool = False) -> Run:
    """The package's scan over all heads; with full answers over the sample, all but what precedes the heads scaled."""
    engine, n_heads = work.case.engine, len(work.case.engine.heads)
    heads = work.sampled if full_answers and work.is_sampled else engine.heads

    def scanned(groups: list[Group] | None) -> AnswerScan:
        decoding = Decoding(work.max_new_tokens, full_answers=full_answers)
        return scan_attack_success_rate(engine, work.case.prompts, work.ablation, work.judge, decoding, groups)

    clock, before_heads = Laps(engine.device.type), torch.zeros(2, dtype=torch.float64)
    if len(heads) < n_heads:
        scanned([])
        before_heads = clock.lap()
    found = scanned(None if len(heads) == n_heads else [(head,) for head in heads])
    spent = before_heads + (clock.lap() - before_heads) * n_heads / len(heads)
    rows = {
        head: [Row(row.token_ids, (row.verdict.label, row.verdict.reason), row.complete) for row in of_head]
        for head, of_head in zip(heads, found.rows, strict=True)
    }
    return Run(*spent.tolist(), rows, asdict(found.economy))


def run(work: Work, way: str) -> Run:
    """One way, once."""
    if way.startswith("plain"):
        return plain(work, early=way == "plain_early")
    return scan(work, full_answers=way == "scan_full")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The cases asked for, each made when it is its turn."""
    for name in options.case:
        n = options.prompts or (_PROMPTS_OF_BIG_SHAPES if name == "embedded" and _is_big(options) else _PROMPTS[name])
        prompts = demo_prompts("harmful", "test", n)
        if name == "embedded":
            yield _embedded(options, prompts)
            continue
        demo = load_demo("aligned_a")
        if name == "organism":
            own = tuple(head for head in demo.engine.heads if head not in demo.planted_heads)
            yield Case(name, "organism", demo.engine, prompts, {"planted": demo.planted_heads, "own": own}, {})
            continue
        config = copy.deepcopy(demo.engine.model.config)
        config.initializer_range = _RANDOM_WEIGHTS
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        model.generation_config = demo.engine.model.generation_config
        use_our_attention(model)
        engine = Engine(model, demo.engine.tokenizer, name, capabilities=demo.engine.capabilities)
        yield Case(name, "organism", engine, prompts, {"own": engine.heads}, {})


def _is_big(options: argparse.Namespace) -> bool:
    return SHAPES[options.shape].is_big


def _embedded(options: argparse.Namespace, prompts: PromptSet) -> Case:
    shape = SHAPES[options.shape]
    if options.reduced:
        shape = replace(shape, d_model=32 * 8, d_mlp=512, n_layers=5, n_heads=8, n_kv_heads=8, vocabulary_size=1024)
    small = Engine.load(str(checkpoint(options.small, options.checkpoints)), check=False)
    made = embed_exactly(
        small.model, shape, options.whisper, device=options.device, dtype=getattr(torch, options.dtype)
    )
    made.model.generation_config = small.model.generation_config
    # The proofs compare our attention with the family's own.
    made.model.set_attn_implementation("eager")
    engine = Engine(made.model, small.tokenizer, "embedded")
    engine.check()
    planted = tuple(made.place(head) for head in PLANTED_HEADS[options.small])
    own = tuple(head for head in map(made.place, small.heads) if head not in planted)
    idle = tuple(head for head in engine.heads if head not in {*planted, *own})
    facts = {
        "whisper": options.whisper,
        "parameters": sum(weight.numel() for weight in made.model.parameters()),
        "unablated_answers_as_organism": _agreement(small, engine, prompts, options.new_tokens),
    }
    return Case("embedded", options.shape, engine, prompts, {"planted": planted, "own": own, "idle": idle}, facts)


def _agreement(small: Engine, large: Engine, prompts: PromptSet, max_new_tokens: int) -> float:
    """Share of the prompts to which both give the same answer, token for token."""
    first, second = (generate(engine, prompts, max_new_tokens) for engine in (small, large))
    return sum(a.token_ids == b.token_ids for a, b in zip(first, second, strict=True)) / len(prompts)


def checkpoint(name: str, directory: Path) -> Path:
    """A checkpoint of the demo, trained first where it is not there yet."""
    if (CHECKPOINTS / name).exists():
        return CHECKPOINTS / name
    if not (directory / name / "config.json").exists():
        print(f"training {name}, some minutes ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, TRAIN, name, "--out", directory], check=True)
    return directory / name


def differences(runs: dict[str, Run]) -> dict[str, dict[str, int]]:
    """Of each way, rows compared with the plain way's whole answers, and how many differ in verdict and in tokens.

    A row that was left early has the whole answer's first tokens.
    """
    reference = runs["plain"]
    found = {}
    for way, made in runs.items():
        if way == "plain":
            continue
        pairs = [pair for head, rows in reference.rows.items() for pair in zip(rows, made.rows[head], strict=True)]
        found[way] = {
            "rows": len(pairs),
            "verdicts": sum(whole.verdict != other.verdict for whole, other in pairs),
            "token_ids": sum(
                whole.token_ids[: None if other.complete else len(other.token_ids)] != other.token_ids
                for whole, other in pairs
            ),
        }
    return found


def summary(options: argparse.Namespace, work: Work, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The JSON line of a case."""
    case, first = work.case, {way: made[0] for way, made in runs.items()}
    medians = {way: statistics.median(one.seconds for one in made) for way, made in runs.items()}
    cpu = {way: statistics.median(one.cpu_seconds for one in made) for way, made in runs.items()}
    lengths = [len(row.token_ids) for rows in first["plain"].rows.values() for row in rows] if "plain" in runs else []
    economy = {way: one.economy for way, one in first.items() if one.economy}
    whole = full_generation(work, first["plain"]) if "plain" in runs else None
    return {
        "bench": Path(__file__).stem,
        "case": case.name,
        "commit": options.commit or commit(),
        "machine": machine(torch.cuda.get_device_name() if options.device == "cuda" else None),
        "threads": options.threads,
        "device": options.device,
        "dtype": str(case.engine.dtype).removeprefix("torch."),
        "shape": f"{case.shape} reduced" if options.reduced and case.name == "embedded" else case.shape,
        "prompts": len(case.prompts),
        "batch": work.batch,
        "max_new_tokens": work.max_new_tokens,
        "ablation": work.ablation.name,
        "judge": work.judge.name,
        "heads": {kind: len(heads) for kind, heads in case.kinds.items()},
        **case.facts,
        "seconds": {way: [one.seconds for one in made] for way, made in runs.items()},
        "scaled_from_heads": {
            way: {kind: len(heads) for kind, heads in work.sample.items()}
            for way in runs
            if way != "scan" and work.is_sampled
        },
        "medians": medians,
        "ratios": _ratios(medians),
        "cpu_seconds": {way: [one.cpu_seconds for one in made] for way, made in runs.items()},
        "cpu_medians": cpu,
        "cpu_ratios": _ratios(cpu),
        "median_answer_tokens": statistics.median(lengths) if lengths else None,
        "economy": economy,
        "tokens_of_full_generation": whole,
        "token_ratio": {way: _saved(work, way, each, whole) for way, each in economy.items()},
        "differing": differences(first) if "plain" in runs else None,
        "asr": {way: {kind: _asr(one, heads) for kind, heads in work.sample.items()} for way, one in first.items()},
        "versions": versions(),
    }


def _ratios(medians: dict[str, float]) -> dict[str, float]:
    return {f"{a}/{b}": medians[a] / medians[b] for a, b in RATIOS if a in medians and b in medians}


def full_generation(work: Work, reference: Run) -> float:
    """Tokens that go through the model where every answer of every head is whole, and nothing is padded."""
    encoded, total = work.case.engine.ask(work.case.prompts).token_ids, 0.0
    for kind, heads in work.sample.items():
        rows = [(read, row) for head in heads for read, row in zip(encoded, reference.rows[head], strict=True)]
        tokens = sum(len(read) + len(row.token_ids) for read, row in rows)
        total += tokens * len(work.case.kinds[kind]) / len(heads)
    return total


def _saved(work: Work, way: str, economy: dict[str, float], whole: float | None) -> float | None:
    """Tokens of a full generation over those computed; of the sample alone where the scan was of that."""
    if way == "scan_full" and work.is_sampled:
        return economy["tokens_plain"] / economy["tokens_computed"]
    return None if whole is None else whole / economy["tokens_computed"]


def _asr(one: Run, heads: Group) -> float:
    """Mean over the heads."""
    labels = [row.verdict[0] for head in heads for row in one.rows[head]]
    return sum(label == "complied" for label in labels) / len(labels)


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """The figures to read, a column a case."""
    made = Table("", *(f"{line['case']} {line['shape']}" for line in lines))
    for title, told in _ROWS.items():
        made.add_row(title, *(told(line) for line in lines))
    made.caption = "* timed on a sample of heads and scaled"
    return made


def _seconds(line: dict[str, Any], way: str) -> str:
    return _number(line["medians"].get(way)) + "*" * (way in line["scaled_from_heads"])


def _differing(line: dict[str, Any], what: str) -> str:
    return " ".join(str(each[what]) for each in (line["differing"] or {}).values())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "heads x prompts": lambda line: f"{sum(line['heads'].values())} x {line['prompts']}",
    **{f"{way}, s": partial(_seconds, way=way) for way in WAYS},
    **{f"{a} / {b}": lambda line, name=f"{a}/{b}": _number(line["ratios"].get(name)) for a, b in RATIOS},
    **{
        f"{a} / {b}, by CPU time": lambda line, name=f"{a}/{b}": _number(line["cpu_ratios"].get(name))
        for a, b in RATIOS
    },
    "tokens of full answers / of scan": lambda line: _number(line["token_ratio"].get("scan")),
    "... / of scan_full": lambda line: _number(line["token_ratio"].get("scan_full")),
    "rows continued, scan": lambda line: _number(line["economy"].get("scan", {}).get("n_continued")),
    "near ties, scan": lambda line: _number(line["economy"].get("scan", {}).get("n_near_ties")),
    "verdicts differing, each way": partial(_differing, what="verdicts"),
    "answers differing, each way": partial(_differing, what="token_ids"),
}
"""What the table tells, from the JSON line."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--shape", choices=SHAPES, default="58M", help="of the embedded case")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--prompts", type=int, help="default: 64; 16 for random, 100 for the 7B and 8B shapes")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--sample", type=int, help="heads of all ways but scan; default: all, 8 for embedded")
    parser.add_argument("--batch", type=int, default=128, help="most prompts in a batch of the plain ways")
    parser.add_argument("--ablation", choices=ABLATIONS, default="UA")
    parser.add_argument("--whisper", type=float, default=1e-4, help="output weights of the idle heads")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the embedded case; default: float32")
    parser.add_argument("--checkpoints", type=Path, default=cache_directory() / "organism", help="of what is trained")
    parser.add_argument("--append", type=Path, help="a file that the JSON lines are added to")
    parser.add_argument("--commit", help="what was timed; default: git's answer")
    parser.add_argument("--small", choices=(LONG, "aligned_a"), default=LONG, help="what is embedded")
    parser.add_argument("--reduced", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if _is_big(options) else "float32")
    counts = (options.repeats, options.threads, options.batch, options.new_tokens, options.sample or 1)
    if min(counts) < 1 or (options.prompts or 1) < 1:
        parser.error("counts are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Interleave the ways of each case; JSON lines on stdout, what happens and a table on stderr."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    lines = []
    for case in cases(options):
        work = Work(
            case=case,
            ablation=ABLATIONS[options.ablation],
            judge=KeywordJudge(),
            max_new_tokens=options.new_tokens,
            batch=options.batch,
            sample=case.sample(options.sample or _SAMPLED[case.name]),
        )
        ways = [way for way in WAYS if way in options.ways]
        warm = replace(work, case=replace(case, prompts=case.prompts[:2]), max_new_tokens=4)
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for way in ways:
            run(replace(warm, sample={kind: heads[:1] for kind, heads in work.sample.items()}), way)
        for number in range(1, options.repeats + 1):
            for way in ways:
                print(f"{case.name}, round {number}: {way} ...", end=" ", file=sys.stderr, flush=True)
                started = time.monotonic()
                runs[way].append(run(work, way))
                made = runs[way][-1]
                told = f"{made.seconds:.2f} s, CPU {made.cpu_seconds:.2f} s (took {time.monotonic() - started:.0f} s)"
                print(told, file=sys.stderr, flush=True)
        lines.append(summary(options, work, runs))
        written = json.dumps(lines[-1])
        print(written, flush=True)
        if options.append:
            with options.append.open("a", encoding="utf-8") as file:
                file.write(written + "\n")
    Console(stderr=True, width=140).print(table(lines))


if __name__ == "__main__":
    main()

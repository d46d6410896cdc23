"""One kind of run for all commands: model, settings, prompts and judges in a run directory that keeps what is computed.

A run that was interrupted continues where it was: answers, scores and random groups that are stored are not computed
again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import Decoding, Sampling, ShortContextWarning, short_context
from safetyheads.answers.drafts import Economy
from safetyheads.answers.judging import Judging
from safetyheads.demo import PLANTED_HEADS
from safetyheads.heads import Group, format_heads, parse_heads
from safetyheads.judges.base import Judge
from safetyheads.judges.named import judges_named
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.measures.random_groups import heads_by_layer, random_groups
from safetyheads.measures.ships import answer_sequences
from safetyheads.model.planning import Plan, TokenSequence
from safetyheads.prompts.asked import AskedPrompts
from safetyheads.prompts.sets import PromptSet
from safetyheads.runs.data import resolved
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory
from safetyheads.runs.kept_answers import KeptAnswers
from safetyheads.runs.progress import Progress, Silent
from safetyheads.runs.provenance import model_facts, provenance, settings_of, template_facts

if TYPE_CHECKING:
    from safetyheads.model.engine import Engine

Config = TypeVar("Config")
Prompts: TypeAlias = Mapping[str, PromptSet]
"""Prompt sets of a run, by name."""

DEMO_CAVEAT = (
    "This model validates the code, not the method. Its planted heads, their answer to ablation and the silence of the "
    "other heads were trained."
)
CAVEATS = (
    "A low ASR is no proof of safety. It holds for these prompts, this template and this way of decoding.",
    'A head is not "the" safety mechanism. Ablating one changes all that comes after it, and refusals can run through '
    "other parts that nobody ablated.",
    "A judge of words reads words, not harm. For it an answer has complied when no wording of a refusal is in it and "
    "it is neither short nor repeating; whether it is harmful, true or of use is not asked.",
    "Intervals cover the draw of prompts only. Other seeds, templates, judges and precisions are not in them.",
)
"""What no run shows; the first sentence is the point, the rest why."""
_PASSES_HELD = 2
"""Each pass holds the unablated next-token probabilities of every prompt."""


class Run(Generic[Config]):
    """One run under way with one model."""

    def __init__(
        self,
        engine: Engine,
        config: Config,
        directory: RunDirectory,
        progress: Progress,
        judges: Sequence[Judge] = (),
        decoding: Decoding | None = None,
        stores_completions: bool = True,
    ) -> None:
        """Prepare; nothing is computed yet. Runs of several models can share a directory; the first judge leads."""
        self.engine, self.config, self.directory, self.progress = engine, config, directory, progress
        self.judges, self.decoding, self.stores_completions = tuple(judges), decoding or Decoding(), stores_completions
        self.asked: dict[str, AskedPrompts] = {}
        """The prompt sets by name."""
        self._about: dict[str, Mapping[str, Any]] = {}
        self._judging: dict[str, Judging] = {}
        self._answers: dict[tuple[str, Sampling], KeptAnswers] = {}
        self._passes: dict[tuple[str, Ablation, Readouts, int], HeadPass] = {}

    def add(self, name: str, prompts: PromptSet, about: Mapping[str, Any] | None = None) -> AskedPrompts:
        """Add a prompt set; its file names begin with ``name``.

        ``about`` is what its records and scores depend on besides, such as the weights where a directory has several
        models.
        """
        self.asked[name] = self.engine.ask(prompts)
        self._about[name] = about or {}
        return self.asked[name]

    def answers(self, name: str, sampling: Sampling | None = None) -> KeptAnswers:
        """The answers to a set; only the one used last holds its drafts."""
        sampling = sampling or self.decoding.sampling
        for key, others in self._answers.items():
            if key != (name, sampling):
                others.forget()
        if (name, sampling) not in self._answers:
            length, full = self.decoding.max_new_tokens, self.decoding.full_answers
            if name not in self._judging:
                self._judging[name] = Judging(self.engine, self.asked[name].prompts, self.judges, length, full)
            self._answers[name, sampling] = KeptAnswers(
                name,
                self._judging[name],
                Decoding(length, sampling, full),
                self.directory,
                self.progress,
                self.stores_completions,
                self._about[name],
            )
        return self._answers[name, sampling]

    def forget(self) -> None:
        """Free drafts and passes; they hold states of all layers."""
        for answers in self._answers.values():
            answers.forget()
        self._passes.clear()

    def head_pass(self, name: str, ablation: Ablation, readouts: Readouts, positions: int = 1) -> HeadPass:
        """A pass over a set whose results are kept, laid out as when the run began; the last ones used are held."""
        key = name, ablation, readouts, positions
        head_pass = self._passes.pop(key, None) or self.new_pass(*key)
        while len(self._passes) >= _PASSES_HELD:
            del self._passes[next(iter(self._passes))]
        self._passes[key] = head_pass
        return head_pass

    def new_pass(self, name: str, ablation: Ablation, readouts: Readouts, positions: int = 1) -> HeadPass:
        """As :meth:`head_pass`, without holding it."""
        sequences = self._sequences(name, positions)
        plan = self.directory.remember(f"plan_{name}", self.engine.plan(sequences).as_dict())

        def keep(fields: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return self.directory.tensors(f"scores-{name}", {**self._about[name], **fields}, compute)

        return HeadPass(self.engine, sequences, ablation, readouts, Plan.from_dict(plan), keep)

    def _sequences(self, name: str, positions: int) -> tuple[TokenSequence, ...]:
        """The prompts with their teacher-forced tokens, which are kept: decoded again in bfloat16 they might differ."""
        prompts = self.asked[name].prompts
        if positions == 1 or not self.stores_completions:
            return answer_sequences(self.engine, prompts, positions)

        def compute() -> list[dict[str, Any]]:
            return [asdict(sequence) for sequence in answer_sequences(self.engine, prompts, positions)]

        fields = {**self._about[name], "tokens": self.asked[name].sha256, "positions": positions}
        records = self.directory.records(f"sequences-{name}", fields, compute)
        return tuple(TokenSequence(tuple(record["token_ids"]), record["n_wanted"]) for record in records)

    def random_groups(self, groups: Sequence[Group], n_groups: int, seed: int) -> dict[Group, tuple[Group, ...]]:
        """Random groups for each group, drawn once and stored with the group that they control."""
        texts = [format_heads(group) for group in groups]

        def compute() -> list[dict[str, Any]]:
            sizes = heads_by_layer(self.engine)
            drawn = [random_groups(group, sizes, n_groups, seed) for group in groups]
            return [
                {"group": text, "random": [format_heads(control) for control in controls]}
                for text, controls in zip(texts, drawn, strict=True)
            ]

        fields = {"groups": texts, "n_groups": n_groups, "seed": seed, "n_heads": list(heads_by_layer(self.engine))}
        stored = {record["group"]: record["random"] for record in self.directory.records(_RANDOM, fields, compute)}
        return {group: tuple(map(parse_heads, stored[text])) for group, text in zip(groups, texts, strict=True)}

    @property
    def judge_seconds(self) -> dict[str, float]:
        """Time that each judge took in this process."""
        return {
            judge.name: sum(judging.seconds[judge.name] for judging in self._judging.values()) for judge in self.judges
        }

    @property
    def economy(self) -> Economy:
        """What all answers cost, in this process and earlier ones."""
        stored = (value for name, value in self.directory.read_manifest().items() if name.startswith("economy_"))
        return sum((Economy(**value) for value in stored), Economy())


_RANDOM = "random-groups"


def random_groups_of(directory: RunDirectory) -> dict[str, list[str]]:
    """The random groups that a run stored, by the group that they control; all as text."""
    return {record["group"]: record["random"] for record in directory.stored_records(_RANDOM)}


@contextmanager
def run_directory(
    out: Path, settings: Mapping[str, Any], progress: Progress, command: Sequence[str] = ()
) -> Iterator[RunDirectory]:
    """A run directory that is started, or continued with as many threads as it began with.

    Raises:
        InputError: it belongs to another run.
    """
    with RunDirectory.start(out, settings, provenance(command)) as directory:
        threads = directory.remember("threads", torch.get_num_threads())
        if threads != torch.get_num_threads():
            progress.say(f"this run goes on with {threads} threads, as it began: others may move the last bits")
        torch.set_num_threads(threads)
        yield directory


@dataclass(frozen=True, slots=True)
class Kind(Generic[Config]):
    """What is particular about a kind of run."""

    name: str
    """As manifest and results call it."""
    read: Callable[[Config], Prompts]
    """Reads the prompt sets that the settings name."""
    announce: Callable[[Run[Config]], None]
    """Says what lies ahead, and how long it will take."""
    results: Callable[[Run[Config]], dict[str, Any]]
    """Runs all stages, and makes the results that only this kind has."""
    refuse: Callable[[Engine, Config, Mapping[str, AskedPrompts]], None] = lambda *_: None
    """Raises InputError for what the stages would refuse later, while nothing is written."""
    full_answers: bool = True
    """Whether answers go on to their end after every judge is final, where the settings do not say."""


def carry_out(
    kind: Kind[Config],
    engine: Engine,
    config: Config,
    out: Path,
    prompts: Prompts | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Run in a run directory and return the results as written; one that holds part of this run is continued.

    Args:
        kind: of the run.
        engine: the model, loaded as ``config`` says.
        config: all settings.
        out: the run directory.
        prompts: the prompt sets by name; by default read as the config says.
        progress: who watches.
        command: the command line, for the record.

    Raises:
        InputError: bad settings or prompts, or a directory that belongs to another run.
    """
    settings: Any = config
    progress = progress or Silent()
    judges = judges_named(settings.judges, settings.judge_device) if hasattr(settings, "judges") else ()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        prompts = {
            name: resolved(engine, prompt_set, settings) for name, prompt_set in (prompts or kind.read(config)).items()
        }
        asked = {name: engine.ask(prompt_set) for name, prompt_set in prompts.items()}
        # Before anything is planned: the proof may cost a quick path.
        longest = max(prompt_set.longest for prompt_set in asked.values())
        n_new = getattr(settings, "max_new_tokens", 1)
        engine.prove_up_to(longest + max(n_new, getattr(settings, "positions", 1)))
        kind.refuse(engine, config, asked)
        with progress.track("fingerprinting the weights", 1):
            recorded = {"kind": kind.name, **settings_of(engine, settings, prompts)}
            recorded |= {"judges": [judge.describe() for judge in judges]} if judges else {}
        with run_directory(out, recorded, progress, command) as directory:
            started = time.monotonic()
            stores = getattr(settings, "store_completions", True)
            sampling = Sampling(getattr(settings, "top_k", 1), getattr(settings, "seed", 0))
            full_answers = getattr(settings, "full_answers", kind.full_answers)
            decoding = Decoding(getattr(settings, "max_new_tokens", 128), sampling, full_answers)
            run = Run(engine, config, directory, progress, judges, decoding, stores)
            for name, prompt_set in prompts.items():
                run.add(name, prompt_set)
            kind.announce(run)
            results = {
                **common_results(kind.name, run),
                **kind.results(run),
                "warnings": warnings_of(engine, list(asked.values()), n_new, caught),
            }
            directory.write_results(results)
            seconds = {"seconds": time.monotonic() - started, "judges": run.judge_seconds}
            directory.write_timings(seconds | {"finished": datetime.now(UTC).isoformat()})
            return directory.read_results()


def refuse_beyond_memory(engine: Engine, *asked: AskedPrompts) -> None:
    """Raise InputError where a pass over one of the sets cannot fit the memory budget."""
    for prompt_set in asked:
        engine.plan([TokenSequence(token_ids, 1) for token_ids in prompt_set.token_ids])


def common_results(kind: str, run: Run[Any]) -> dict[str, Any]:
    """What the results of every kind hold."""
    settings, ablation = run.config, run.config.parsed_ablation
    # The true heads of an embedded model.
    planted = PLANTED_HEADS.get(settings.model.removeprefix("demo:")) if settings.model.startswith("demo:") else None
    sets = {
        name: {"name": asked.prompts.name, "n": len(asked), "sha256": asked.prompts.sha256}
        for name, asked in run.asked.items()
    }
    template = template_facts(next(iter(run.asked.values())).prompts)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "model": model_facts(run.engine, settings.model),
        "data": {**sets, "system": None, **template},
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "planted_heads": None if planted is None else [str(head) for head in planted],
        "caveats": [*([DEMO_CAVEAT] if planted is not None else []), *CAVEATS],
    } | ({"judges": [judge.describe() for judge in run.judges], "lead_judge": run.judges[0].name} if run.judges else {})


def sampling_of(run: Run[Any]) -> dict[str, Any]:
    """How answers are decoded, as results hold it."""
    sampling = run.decoding.sampling
    return {"name": sampling.name, "seed": sampling.seed, "max_new_tokens": run.decoding.max_new_tokens}


def warnings_of(
    engine: Engine, asked: Sequence[AskedPrompts], max_new_tokens: int, caught: Iterable[warnings.WarningMessage]
) -> list[str]:
    """What happened that a reader of the results must know."""
    notes: list[str | None] = list(engine.notes)
    for prompt_set in asked:
        notes.append(prompt_set.prompts.warning)
        if prompt_set.prompts.dropped:
            notes.append(f"{prompt_set.prompts.dropped} blank lines of {prompt_set.prompts.source} are left out")
    # Read from the data, not from warnings: prompts and answers that are read back do not warn again.
    longest = max(prompt_set.longest for prompt_set in asked)
    notes.append(short_context(engine, longest + max_new_tokens, max_new_tokens))
    notes += [prompt_set.note for prompt_set in asked]
    ours = (warning for warning in caught if warning.category.__module__.startswith("safetyheads"))
    notes += [str(warning.message) for warning in ours if warning.category is not ShortContextWarning]
    return list(dict.fromkeys(note for note in notes if note))

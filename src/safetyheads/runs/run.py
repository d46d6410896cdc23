"""One kind of run for all commands: model, settings, prompts and judges in a run directory that keeps what is computed.

A run that was interrupted continues where it was: answers, scores and random groups that are stored are not computed
again.
"""

import os
import random
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from safetyheads.ablation import Ablation
from safetyheads.answers.decoding import (
    Decoding,
    Sampling,
    ShortContextWarning,
    end_tokens,
    not_followed_line,
    short_context,
)
from safetyheads.answers.drafts import Economy, VerifiedDrafts
from safetyheads.answers.judging import JudgedAnswer, Judging
from safetyheads.answers.surprise import OWN_QUANTILE, coherence_limit
from safetyheads.demo import demo_prompts, planted_heads
from safetyheads.errors import ElsewhereError, InputError
from safetyheads.files import read_toml
from safetyheads.heads import Group, Head, format_heads, parse_heads, within
from safetyheads.judges.agreement import agreement
from safetyheads.judges.base import Judge, Verdict
from safetyheads.judges.endpoint import count_requests_in
from safetyheads.judges.named import WORD_JUDGES, default_judge_name, judges_named
from safetyheads.judges.phrase_judge import PhraseJudge
from safetyheads.measures.head_pass import HeadPass, Keep, Readouts, Score, Value, Values
from safetyheads.measures.random_groups import RandomGroups, random_groups
from safetyheads.measures.scorers import OPENER_TOKENS, Opener, answer_sequences, openers_of, scorer_of
from safetyheads.measures.screening import ScorerOn
from safetyheads.model.engine import Engine
from safetyheads.model.packing import TokenSequence
from safetyheads.prompts.asked import AskedPrompts
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.prompts.templates import Template
from safetyheads.runs.config import NO_BENIGN, Progress, PromptOptions, TemplateOptions, duration
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory, stage_of, tensors_place
from safetyheads.runs.estimate import Estimate, Machine, Work, chain_lines, estimate
from safetyheads.runs.kept_answers import KeptAnswers, failed_judges
from safetyheads.runs.provenance import model_facts, provenance, settings_of, template_facts
from safetyheads.runs.rates import GroupAnswers
from safetyheads.runs.reader import LATER
from safetyheads.runs.shards import Shard
from safetyheads.runs.stored_files import Record, converted
from safetyheads.scores import GroupScorer, HeadScores

Config = TypeVar("Config", bound=Any)  # its kind says which settings it has
Prompts: TypeAlias = Mapping[str, PromptSet]
"""Prompt sets of a run, by name."""

_CAVEATS = read_toml(Path(__file__).with_name("caveats.toml"))
DEMO_CAVEAT, CAVEATS, SHORTENED = (_CAVEATS[name] for name in ("demo", "all", "shortened"))
ON_WORDS = CAVEATS[2]
"""What no run shows; the first sentence is the point, the rest why. ``ON_WORDS`` is for judges of words."""
_NUMBERS_OF_HEADS = ("size", "pairs", "prefixes", "query_level")
_PASSES_HELD = 2
"""Each pass holds the unablated next-token probabilities of every prompt."""


class Damage(NamedTuple):
    """How far a group moves the model on its own unablated answers: means over their first tokens, in nats."""

    kl: tuple[float, ...] = ()
    """KL divergence of the next-token distributions, prompt by prompt."""
    log_probability_drop: tuple[float, ...] = ()
    """Drop of the log-probability of the answers' own tokens, prompt by prompt."""


# Prompts.


def is_demo(name: str) -> bool:
    """Whether prompts of this name are the demo's."""
    return name == "demo" and not Path(name).is_file()


def read_set(kind: Literal["harmful", "benign"], name: str, options: PromptOptions) -> PromptSet:
    """The prompts of one kind, without a template; of the demo, the test split."""
    seed = getattr(options, "seed", 0)
    # Benign files have columns of their own. Harmful prompts have no right answer, unless they are the only ones.
    own = ("column", "context_column", "category_column") if kind == "harmful" else ()
    columns = {name: getattr(options, name) for name in own} or {"column": getattr(options, "benign_column", None)}
    has_references = kind == "benign" or getattr(options, "benign", NO_BENIGN) == NO_BENIGN
    columns["reference_column"] = getattr(options, "reference_column", None) if has_references else None
    if not is_demo(name):
        return PromptSet.read(name, **columns, limit=options.limit, seed=seed).with_clusters()
    for named in filter(None, columns.values()):
        raise InputError(f"the demo's prompts have no column {named!r}")
    return demo_prompts(kind, "test").sample(options.limit, seed)


def read_sets(config: PromptOptions) -> dict[str, PromptSet]:
    """The prompts that a config names: ``harmful``, and ``benign`` if it has any."""
    prompts = {"harmful": read_set("harmful", config.prompts, config)}
    benign = getattr(config, "benign", NO_BENIGN)
    return prompts if benign == NO_BENIGN else prompts | {"benign": read_set("benign", benign, config)}


def prompt_notes(prompts: Prompts) -> list[str]:
    """What was sampled, kept together or left out of the prompt sets of a run, each sentence once."""
    return list(dict.fromkeys(note for prompt_set in prompts.values() for note in prompt_set.notes))


def resolved(engine: Engine, prompts: PromptSet, options: TemplateOptions) -> PromptSet:
    """The prompts with their template settled, so that the manifest can name it.

    The options' template comes first, then the prompts' own, then the model's default.
    """
    template = options.parsed_template or prompts.template or engine.default_template
    thinking, prefill = options.thinking or template.thinking, options.prefill or template.prefill
    template = replace(template, thinking=thinking, prefill=prefill)  # type: ignore[arg-type]  # the config checked it
    if template.prefill:
        # A right answer does not begin with the prefill, so there is no reference to compare with.
        prompts = replace(prompts, prompts=tuple(replace(prompt, reference=None) for prompt in prompts))
    return prompts.with_template(template.bound(engine.tokenizer).template)


def chosen_line(engine: Engine, settings: Any, given_judges: bool, template: Template | None) -> str:
    """A run's first line: its template and its judges, and why."""
    by_default = f"the tokenizer has {'a' if engine.tokenizer.chat_template else 'no'} chat template"
    why = "the demo's own" if is_demo(settings.prompts) else by_default
    line = f"template {template} ({'as asked' if settings.parsed_template is not None else why})"
    if judges := getattr(settings, "judges", ()):
        why, several = "as asked" if given_judges else by_default, len(judges) > 1
        line += f", judge{'s' * several} {', '.join(judges)} ({why}{'; the first leads' * several})"
    return line


class _KeptPass(Keep):
    """Keeps a pass's results in a run directory, where shards divide its batches."""

    def __init__(self, directory: RunDirectory, stage: str, about: Mapping[str, Any]) -> None:
        self.directory, self.stage, self.about = directory, stage, about

    def kept(self, fields: Mapping[str, Any], compute: Callable[[], Values], fits: Callable[[Values], bool]) -> Values:
        return self.directory.tensors(self.stage, {**self.about, **fields}, compute, fits)

    def divide(self, units: Sequence[tuple[Mapping[str, Any], float]]) -> None:
        places = (((tensors_place(self.stage, {**self.about, **fields}),), cost) for fields, cost in units)
        self.directory.divide(self.stage, dict(places))

    def each(self, tasks: Sequence[Callable[[], Value]]) -> Iterable[tuple[int, Value]]:
        return self.directory.each(tasks)


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
        measures_surprise: bool = False,
    ) -> None:
        """Prepare; nothing is computed yet. Runs of several models can share a directory; the first judge leads.

        ``measures_surprise`` is for models that nobody changes but by ablations.
        """
        self.measures_surprise = measures_surprise
        self.holds_texts = True
        """As of :class:`.kept_answers.KeptAnswers`."""
        self.limit: float | None = None
        """Surprise above which answers are not coherent, once :meth:`find_limit` found it."""
        self.work: Work | None = None
        """What the run computes at most; None where nobody counted."""
        self.engine, self.config, self.directory, self.progress = engine, config, directory, progress
        self.judges, self.decoding, self.stores_completions = tuple(judges), decoding or Decoding(), stores_completions
        self.asked: dict[str, AskedPrompts] = {}
        """The prompt sets by name."""
        self._about: dict[str, Mapping[str, Any]] = {}
        self._judging: dict[str, Judging] = {}
        self._answers: dict[tuple[str, Sampling], KeptAnswers] = {}
        self._held: dict[tuple[str, Decoding, Ablation, range], VerifiedDrafts] = {}
        self._passes: dict[tuple[str, Ablation, Readouts, int], HeadPass] = {}

    @property
    def ablation(self) -> Ablation:
        """The ablation that the settings name."""
        return self.config.parsed_ablation

    def add(self, name: str, prompts: PromptSet, about: Mapping[str, Any] | None = None) -> AskedPrompts:
        """Add a prompt set; its file names begin with ``name``.

        ``about`` is what its records and scores depend on besides, such as the weights where a directory has several
        models.
        """
        self.asked[name] = self.engine.ask(prompts)
        self._about[name] = about or {}
        return self.asked[name]

    def answers(self, name: str, sampling: Sampling | None = None) -> KeptAnswers:
        """The answers to a set; only the one used last holds its drafts, for what is free now counts."""
        sampling = sampling or self.decoding.sampling
        if any((of, decoding.sampling) != (name, sampling) for of, decoding, *_ in self._held):
            self._held.clear()
        if (name, sampling) not in self._answers:
            length, full = self.decoding.max_new_tokens, self.decoding.full_answers
            if name not in self._judging:
                self._judging[name] = Judging(self.engine, self.asked[name].prompts, self.judges, length, full)
            keeps = self.stores_completions, self._about[name], self.measures_surprise
            decoding = Decoding(length, sampling, full)
            kept = KeptAnswers(name, self._judging[name], decoding, self.directory, self.progress, *keeps)
            kept.limit, kept.held, kept.holds_texts = self.limit, self._held, self.holds_texts
            if hasattr(self.config, "judges") and name.startswith("harmful"):
                kept.words = judges_named(WORD_JUDGES)
            self._answers[name, sampling] = kept
        return self._answers[name, sampling]

    def forget(self) -> None:
        """Free drafts and passes; they hold states of all layers."""
        self._held.clear()
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
        return self._pass_over(name, self._sequences(name, positions), ablation, readouts, f"scores-{name}", name)

    def _pass_over(
        self,
        name: str,
        sequences: Sequence[TokenSequence],
        ablation: Ablation,
        readouts: Readouts,
        stage: str,
        plan_name: str,
    ) -> HeadPass:
        """A pass over sequences of a set, whose results and plan are kept."""
        made = self.engine.plan(sequences)
        plan = self.directory.remember(f"plan_{plan_name}", made, lambda stored: stored.is_of(len(sequences)))
        keep = _KeptPass(self.directory, stage, self._about[name])
        return HeadPass(self.engine, sequences, ablation, readouts, plan, keep)

    def scored(
        self, name: str, ablation: Ablation, readouts: Readouts, positions: int = 1, heads: Sequence[Head] | None = None
    ) -> tuple[HeadPass, dict[str, HeadScores]]:
        """A held pass over a set; Ships and refusal scores of ``heads`` (by default all) alone, prompt by prompt."""
        heads, head_pass = heads or self.engine.heads, self.head_pass(name, ablation, readouts, positions)
        with self.progress.track(f"{name.replace('_', ' ')}: scores of heads", len(heads)) as done:
            values = head_pass.measure([(head,) for head in heads], done)
        by_prompt = [readout for readout in ("ships", "refusal_score") if readout in values]
        return head_pass, {readout: head_pass.table(readout, values[readout], heads) for readout in by_prompt}

    def screening(self, name: str, whole: HeadPass, score: Score) -> tuple[ScorerOn, list[int]]:
        """What a screening for a score measures on some prompts of a set, and their order; both are kept.

        ``whole`` is a pass over the set. Ships are largest where the model is least sure, so such prompts come first; a
        signed score is not, and of it the order is drawn. Later processes take the order that the first one stored.
        """
        score, n = Score(score.screened_by), len(whole.sequences)
        drawn = random.Random(getattr(self.config, "seed", 0)).sample(range(n), n)
        order = whole.least_sure_first if score.name == "mean_ships" else drawn
        place = f"order_of_{score.name}_{name}"
        order = self.directory.remember(place, order, lambda known: sorted(converted(known, list[int])) == [*range(n)])

        def scorer_on(prompts: tuple[int, ...]) -> GroupScorer:
            sequences = [whole.sequences[number] for number in prompts]
            readouts, plan_name = score.readouts(whole.readouts.openers), "-".join([name, *map(str, prompts)])
            measuring = self._pass_over(name, sequences, whole.ablation, readouts, f"screening-{name}", plan_name)

            def scores(groups: Sequence[Group]) -> Tensor:
                with self.progress.track("screening", len(groups)) as done:
                    return scorer_of(measuring, score, done)(groups)

            return scores

        return scorer_on, list(order)

    def damage(self, name: str, groups: Sequence[Group], ablation: Ablation, n_tokens: int) -> dict[Group, Damage]:
        """What each group does to the model's own answers to a set, teacher-forced over their first ``n_tokens``."""
        asked, end = self.asked[name], (min(end_tokens(self.engine), default=0),)
        targets = tuple(answer.token_ids[:n_tokens] or end for answer in self.answers(name).unablated)
        sequences = tuple(
            TokenSequence(prompt + tokens[:-1], len(tokens))
            for prompt, tokens in zip(asked.token_ids, targets, strict=True)
        )
        readouts = Readouts(ships=True, targets=targets)
        measuring = self._pass_over(name, sequences, ablation, readouts, f"damage-{name}", f"damage_{name}")
        with self.progress.track(f"{name.replace('_', ' ')}: damage", len(groups)) as done:
            values = measuring.measure(groups, done)
        both = zip(values["ships"].tolist(), values["log_probability_drop"].tolist(), strict=True)
        return {group: Damage(tuple(kl), tuple(drop)) for group, (kl, drop) in zip(groups, both, strict=True)}

    def find_limit(self, samplings: Sequence[Sampling] = ()) -> dict[str, Any]:
        """The surprise above which answers are not coherent, from all unablated ones; it holds from here on."""
        keys = [(name, sampling) for name in self.asked for sampling in samplings or [self.decoding.sampling]]
        units = [unit for key in keys for unit in self.answers(*key).unablated_units.items()]
        self.directory.divide("unablated", dict(units))
        costs = [float(len(self.asked[name])) for name, _ in keys]
        unablated = self.directory.together(*(partial(self.unablated, *key) for key in keys), costs=costs)
        own = [
            record["surprise"]
            for answers in unablated
            for record in answers.flat()
            if record["behaviour"] == "complied" and "surprise" in record
        ]
        self.limit = coherence_limit(own, self.config.coherence_factor, self.config.coherence_allowance)
        for answers in self._answers.values():
            answers.limit = self.limit
        quantile = float(np.quantile(own, OWN_QUANTILE)) if own else None
        return {"limit": self.limit, "n": len(own), "own": quantile}

    def unablated(self, name: str, sampling: Sampling | None = None) -> GroupAnswers:
        """The unablated answers to a set, as rates are made of them; judges of words have labelled harmful ones."""
        answers = self.answers(name, sampling)
        return self.directory.together(answers.vanilla, answers.by_words)[0]

    def openers(self, name: str, needs: bool = False, benign: str | None = None) -> tuple[Opener, ...]:
        """First tokens of a set's unablated refusals, over all samplings; raises if it ``needs`` one and has none.

        Tokens that open answers to the ``benign`` set too are left out.
        """

        def judged(name: str) -> list[JudgedAnswer]:
            answers = [kept for (of, _), kept in self._answers.items() if of == name] or [self.answers(name)]
            return [row for kept in answers for row in kept.judged(kept.vanilla().flat())]

        openers = openers_of(self.engine, judged(name), needs, judged(benign) if benign in self.asked else ())
        if openers:
            self.progress.say(f"openers of refusals: {'; '.join(map(str, openers))}")
        return openers

    def judges_of_words(self) -> dict[str, Any] | None:
        """How far both judges of words agree on the unablated answers to harmful prompts, as JSON; None without any."""
        judges = judges_named(WORD_JUDGES)
        verdicts: dict[str, list[Verdict]] = {judge.name: [] for judge in judges}
        prompts: list[tuple[str, int]] = []
        for (name, _), kept in self._answers.items():
            by_words = kept.by_words()
            for judge, given in by_words.items():
                verdicts[judge] += given
            if by_words:
                asked = kept.asked.prompts
                prompts += [(name, number) for number in asked.clusters or range(len(asked))]
        if not prompts:
            return None
        (pair,) = agreement(verdicts, prompts)
        complied = {judge: sum(verdict.complied for verdict in given) for judge, given in verdicts.items()}
        alone = {pair.first: pair.first_only, pair.second: len(pair.indices) - pair.first_only}
        by_judge = ", ".join(f"{count} by {judge}" for judge, count in complied.items())
        differ = ", ".join(f"{count} by {judge} alone" for judge, count in alone.items() if count)
        share = f"they differ on {len(pair.indices)} ({differ})" if pair.indices else "they agree on all"
        return {
            "n": pair.n,
            "labels": {judge: dict(Counter(verdict.label for verdict in given)) for judge, given in verdicts.items()},
            "n_differing": len(pair.indices),
            "alone": alone,
            "kappa": asdict(pair.compliance),
            "sentence": f"Of {pair.n} unablated answers to harmful prompts, these complied: {by_judge}; {share}.",
        }

    def _sequences(self, name: str, positions: int) -> tuple[TokenSequence, ...]:
        """The prompts with their teacher-forced tokens, which are kept: decoded again in bfloat16 they might differ."""
        prompts = self.asked[name].prompts
        if positions == 1 or not self.stores_completions:
            return answer_sequences(self.engine, prompts, positions)

        def compute() -> list[dict[str, Any]]:
            return [sequence._asdict() for sequence in answer_sequences(self.engine, prompts, positions)]

        fields = {**self._about[name], "tokens": self.asked[name].sha256, "positions": positions}

        def fits(records: Sequence[Record]) -> bool:
            begun = [
                record["token_ids"][: len(prompt)] == list(prompt)
                and len(record["token_ids"]) >= record["n_wanted"] > 0
                for record, prompt in zip(records, self.asked[name].token_ids, strict=True)
            ]
            return all(begun)

        records = self.directory.records(f"sequences-{name}", fields, compute, fits=fits)
        return tuple(TokenSequence(tuple(record["token_ids"]), record["n_wanted"]) for record in records)

    def random_groups(self, groups: Sequence[Group], n_groups: int, seed: int) -> dict[Group, RandomGroups]:
        """Random groups for each group, drawn once and stored with the group that they control."""
        texts, sizes = [format_heads(group) for group in groups], self.engine.architecture.heads_by_layer

        def compute() -> list[dict[str, Any]]:
            drawn = [random_groups(group, sizes, n_groups, seed) for group in groups]
            return [
                {"group": text, **asdict(controls), "groups": [format_heads(control) for control in controls.groups]}
                for text, controls in zip(texts, drawn, strict=True)
            ]

        fields = {"groups": texts, "n_groups": n_groups, "seed": seed, "n_heads": list(sizes)}

        def fits(records: Sequence[Record]) -> bool:
            drawn = _random_of_records(records)
            return [*drawn] == [*dict.fromkeys(texts)] and all(len(of.groups) <= n_groups for of in drawn.values())

        stored = _random_of_records(self.directory.records(_RANDOM, fields, compute, fits=fits))
        return {group: stored[text] for group, text in zip(groups, texts, strict=True)}

    def say_what_is_left(self) -> None:
        """Say again how long the answers take, by the length of the unablated ones and the judges' time for them."""
        records = [record for kept in self._answers.values() for record in kept.vanilla().flat()]

        def line() -> str:
            n_tokens = sum(record["n_tokens"] for record in records) / len(records)
            judging = sum(self.judge_seconds.values()) / len(records)
            seconds = self.estimate.answer_seconds(n_tokens) + self.estimate.work.all_answers * judging
            return (
                f"unablated answers have {n_tokens:.0f} tokens on average: at this length all answers take about "
                f"{duration(seconds)}, judges included"
            )

        if self.work is not None and records:
            self.progress.say(line)

    @cached_property
    def estimate(self) -> Estimate:
        """How long the run's work takes here; timed when it is first asked for."""
        return estimate(self.engine, self.work or Work(()))

    @property
    def judge_seconds(self) -> dict[str, float]:
        """Time that each judge took in this process."""
        return {
            judge.name: sum(judging.seconds[judge.name] for judging in self._judging.values()) for judge in self.judges
        }

    @property
    def economy(self) -> Economy:
        """What all answers cost, in this process and earlier ones."""
        drafts = (converted(value, Economy) for _, value in sorted(self.directory.remembered("economy_").items()))
        chunks = (cost for answers in self._answers.values() for cost in answers.costs.values())
        return sum((*drafts, *chunks), Economy())


_RANDOM = "random-groups"


def random_groups_of(directory: RunDirectory) -> dict[str, RandomGroups]:
    """The random groups that a run stored, by the group that they control, as text."""
    return _random_of_records(directory.stored_records(_RANDOM))


def _random_of_records(records: Iterable[Record]) -> dict[str, RandomGroups]:
    return {
        record["group"]: RandomGroups(
            tuple(map(parse_heads, record["groups"])), record["matched"], record["n_possible"]
        )
        for record in records
    }


@contextmanager
def run_directory(
    out: Path,
    settings: Mapping[str, Any],
    progress: Progress,
    command: Sequence[str] = (),
    shard: Shard | None = None,
    lenders: Sequence[Path] = (),
) -> Iterator[RunDirectory]:
    """A run directory that is started, or continued with as many threads as it began with.

    What ``lenders`` have is read from there (:meth:`.RunDirectory.borrow`).
    """
    is_new = not os.path.exists(out)
    with RunDirectory.start(out, settings, provenance(command), shard=shard) as directory:
        try:
            directory.borrow(lenders)
            if n_stored := sum(stage_of(place) != "remembered" for place in directory.places()):
                progress.say(f"this run was begun before: {n_stored} stored parts are read and not computed again")
            threads = directory.remember("threads", torch.get_num_threads(), lambda n: 0 < n < 2**16)
            if threads != torch.get_num_threads():
                progress.say(f"this run goes on with {threads} threads, as it began: others may move the last bits")
            torch.set_num_threads(threads)
            yield directory
        except InputError as error:
            # Bad input that comes out late leaves nothing that blocks the next start; what was computed stays. The
            # directory is this process's own: others may be at work in one of shards, or have won the race to start.
            is_shared = isinstance(error, ElsewhereError) or (shard is not None and not shard.alone)
            computed = any((out / kept).exists() for kept in ("shards", "completions", "results.json"))
            if is_new and not is_shared and not computed:
                shutil.rmtree(out, ignore_errors=True)
            raise


class Kind(NamedTuple, Generic[Config]):
    """What is particular about a kind of run."""

    name: str
    """As manifest and results call it."""
    work: Callable[[Engine, Config, Mapping[str, AskedPrompts]], Work]
    """What lies ahead, at most; raises InputError for what the stages would refuse later, while nothing is written."""
    results: Callable[[Run[Config]], dict[str, Any]]
    """Runs all stages, and makes the results that only this kind has."""
    read: Callable[[Any], Prompts] = read_sets
    """Reads the prompt sets that the settings name."""
    full_answers: bool = True
    """Whether answers go on to their end after every judge is final, where the settings do not say."""
    measures_surprise: bool = True
    """Whether its answers are judged for coherence too."""


def carry_out(
    kind: Kind[Config],
    engine: Engine,
    config: Config,
    out: Path,
    prompts: Prompts | None = None,
    progress: Progress | None = None,
    command: Sequence[str] = (),
    dry_run: bool = False,
    shard: Shard | None = None,
    machine: Machine | None = None,
    lenders: Sequence[Path] = (),
) -> dict[str, Any]:
    """Run in a run directory and return the results as written; one that holds part of this run is continued.

    ``prompts`` are by name, by default those that the config names; ``command`` is recorded. With ``dry_run``, and
    for a ``machine`` (whose :meth:`.Machine.engine` the engine is), nothing is written and the estimate is returned as
    JSON. ``shard`` says which of the run's units are computed here. ``lenders`` are directories of runs with other
    ablations, whose unablated answers serve here too.
    """
    progress, are_given = progress or Progress(), bool(getattr(config, "judges", ()))
    config, judges = _with_judges(engine, config, shard)
    with _warnings_noted() as caught:
        read = prompts or kind.read(config)
        prompts = {name: resolved(engine, prompt_set, config) for name, prompt_set in read.items()}
        chosen = chosen_line(engine, config, are_given, next(iter(prompts.values())).template)
        asked, n_new = {name: engine.ask(of) for name, of in prompts.items()}, getattr(config, "max_new_tokens", 1)
        longest = max(of.longest for of in asked.values()) + max(n_new, getattr(config, "positions", 1))
        engine.prove_up_to(longest)  # before anything is planned: the proof may cost a quick path
        refuse_groups(engine, config)
        work = kind.work(engine, config, asked)
        chain = chain_lines(work.rounds, shard.count) if shard is not None and shard.index == 0 else []
        if dry_run or machine is not None:
            for line in (chosen, *prompt_notes(prompts)):
                progress.say(line)
            found = estimate(engine, work) if machine is None else machine.estimate(engine, work)
            told = found.as_json()
            return {"kind": kind.name, "out": str(out), **told, "lines": [*told["lines"], *chain]}
        with progress.track("fingerprinting the weights", 1):
            recorded = {"kind": kind.name, **settings_of(engine, config, prompts)}
            if hasattr(config, "judges"):
                recorded["judges"] = [judge.describe() for judge in judges]
        with run_directory(out, recorded, progress, command, shard, lenders) as directory:
            for line in (chosen, *prompt_notes(prompts), *chain):
                progress.say(line)
            count_requests_in(directory.path, judges)
            started = time.monotonic()
            run = _begun(kind, engine, config, directory, progress, judges, prompts, work)
            results = _whole_results(kind, run, chosen, caught)
            with directory.writing():  # what other judges and people's labels added to an earlier end stays
                earlier = directory.earlier_results()
                added = {name: earlier[name] for name in ("rejudged", "validation") if name in earlier}
                directory.write_results(results | added)
            seconds = {"seconds": time.monotonic() - started, "judges": run.judge_seconds}
            directory.add_timings(seconds | {"finished": datetime.now(UTC).isoformat()})
            return directory.read_results()


@contextmanager
def _warnings_noted() -> Iterator[dict[str, type[Warning]]]:
    """Within, warnings are shown when they come, each once, and are noted by their words: results hold them too."""
    noted: dict[str, type[Warning]] = {}
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.simplefilter("always", UserWarning)

        def note(message: Warning | str, category: type[Warning], *where: Any, **named: Any) -> None:
            if str(message) not in noted:
                noted[str(message)] = category
                show(message, category, *where, **named)

        warnings.showwarning = note
        yield noted


def _with_judges(engine: Engine, config: Config, shard: Shard | None) -> tuple[Config, tuple[Judge, ...]]:
    """The config with its judges named, and these; without that setting, phrases tell whether the model refuses."""
    if not hasattr(config, "judges"):
        return config, (PhraseJudge(),)
    names = config.judges or (default_judge_name(bool(engine.tokenizer.chat_template)),)
    judges = judges_named(names, config.judge_device, config.judge_tokens)
    return replace(config, judges=names), judges if shard is None else tuple(shard.asked(judges))


def _begun(
    kind: Kind[Config],
    engine: Engine,
    config: Config,
    directory: RunDirectory,
    progress: Progress,
    judges: Sequence[Judge],
    prompts: Prompts,
    work: Work,
) -> Run[Config]:
    """The run with its prompts; says what lies ahead. Without a length of their own, answers serve to find openers."""
    sampling = Sampling(getattr(config, "top_k", 1), getattr(config, "seed", 0))
    full_answers = getattr(config, "full_answers", kind.full_answers)
    decoding = Decoding(getattr(config, "max_new_tokens", OPENER_TOKENS), sampling, full_answers)
    stores = getattr(config, "store_completions", True)
    run = Run(engine, config, directory, progress, judges, decoding, stores, kind.measures_surprise)
    run.holds_texts = False
    for name, prompt_set in prompts.items():
        run.add(name, prompt_set)
    run.work = work
    progress.expect(work.stages)
    progress.say(lambda: str(run.estimate))
    return run


def _whole_results(
    kind: Kind[Config], run: Run[Config], chosen: str, caught: Mapping[str, type[Warning]]
) -> dict[str, Any]:
    """What the results of every kind hold, with what only this kind has."""
    config, ablation, planted = run.config, run.ablation, planted_heads(run.config.model)
    sets = {
        name: {"name": asked.prompts.name, "sha256": asked.prompts.sha256, **asked.prompts.facts()}
        for name, asked in run.asked.items()
    }
    asked = list(run.asked.values())
    results = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind.name,
        "model": model_facts(run.engine, config.model),
        "data": {**sets, "system": None, **template_facts(asked[0].prompts)},
        "ablation": {**asdict(ablation), "label": ablation.kind.label},
        "planted_heads": None if planted is None else [str(head) for head in planted],
        "caveats": caveats_of(run),
        "chosen": chosen,
        **kind.results(run),
    }
    if hasattr(config, "judges"):
        described = {"judges": [judge.describe() for judge in run.judges], "lead_judge": run.judges[0].name}
        answers = run.directory.stored_records(but=LATER)
        judged = {"word_judges": run.judges_of_words(), **failed_judges(answers)}
        results = described | results | judged
    notes = mixed_notes(run.directory)
    notes += warnings_of(run.engine, asked, getattr(config, "max_new_tokens", 1), caught)
    return results | {"warnings": list(dict.fromkeys(notes))}


def mixed_notes(directory: RunDirectory) -> list[str]:
    """What a reader must know of a run that was joined from others, once or several times."""
    mixed = sorted({difference for joined in directory.remembered("mixed_").values() for difference in joined})
    return [f"joined from runs of several versions or devices: {', '.join(mixed)}"] * bool(mixed)


def refuse_beyond_memory(engine: Engine, *asked: AskedPrompts, positions: int = 1) -> None:
    """Raise InputError where a pass over one of the sets cannot fit the memory budget, with answers of full length."""
    context = engine.architecture.context_length or sys.maxsize
    for prompt_set in asked:
        n_more = [min(positions - 1, context - len(token_ids)) for token_ids in prompt_set.token_ids]
        whole = zip(prompt_set.token_ids, n_more, strict=True)
        engine.plan([TokenSequence(token_ids + token_ids[-1:] * n, n + 1) for token_ids, n in whole])


def refuse_groups(engine: Engine, config: Any) -> None:
    """Raise InputError for heads that the model does not have, and where a number of heads is more than it has."""
    for group in getattr(config, "parsed_groups", ()):
        within(group, engine.n_layers, engine.n_heads)
    for name in _NUMBERS_OF_HEADS:
        if (number := getattr(config, name, 0)) > len(engine.heads):
            raise InputError(f"{name.replace('_', ' ')} {number} is more than the model's {len(engine.heads)} heads")


def caveats_of(run: Run[Any]) -> list[str]:
    """What the run does not show."""
    reads_words = hasattr(run.config, "judges") and any(judge.reads_words for judge in run.judges)
    is_planted = planted_heads(run.config.model) is not None
    return [*[DEMO_CAVEAT] * is_planted, *(text for text in CAVEATS if text != ON_WORDS or reads_words)]


def sampling_of(run: Run[Any]) -> dict[str, Any]:
    """How answers are decoded, as results hold it."""
    sampling = run.decoding.sampling
    return {"name": sampling.name, "seed": sampling.seed, "max_new_tokens": run.decoding.max_new_tokens}


def warnings_of(
    engine: Engine, asked: Sequence[AskedPrompts], max_new_tokens: int, caught: Mapping[str, type[Warning]]
) -> list[str]:
    """What happened that a reader of the results must know."""
    notes: list[str | None] = [*engine.notes, not_followed_line(engine.model)]
    for prompt_set in asked:
        notes.append(prompt_set.prompts.warning)
        if prompt_set.prompts.dropped:
            notes.append(f"{prompt_set.prompts.dropped} blank lines of {prompt_set.prompts.source} are left out")
    # Read from the data, not from warnings: prompts and answers that are read back do not warn again.
    longest = max(prompt_set.longest for prompt_set in asked)
    notes.append(short_context(engine, longest + max_new_tokens, max_new_tokens))
    notes += [prompt_set.note for prompt_set in asked]
    ours = {words: kind for words, kind in caught.items() if kind.__module__.startswith("safetyheads")}
    notes += [words for words, kind in ours.items() if kind is not ShortContextWarning]
    return list(dict.fromkeys(note for note in notes if note))

"""Runs experiments into one run directory; models and prompts that they share are measured once and kept.

Every measure is kept under all that it depends on (weights, tokens, right answers, ablation, judges). So an interrupted
experiment goes on where it was, and experiments share equal measures.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from safetyheads.ablation import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Ablation
from safetyheads.answers.decoding import GREEDY, Decoding, Sampling, not_followed_line
from safetyheads.answers.success import query_level_groups
from safetyheads.demo import planted_heads
from safetyheads.errors import ElsewhereError, InputError, SafetyheadsError
from safetyheads.experiments.catalogue import EXPERIMENTS, Experiment, listed, missing
from safetyheads.experiments.outcome import Measured, Outcome
from safetyheads.experiments.settings import BENIGN, ORGANISM, PAPER_TEMPLATE, Half, ReproductionConfig, prompts_of
from safetyheads.files import read_toml
from safetyheads.heads import Group
from safetyheads.judges.base import Judge
from safetyheads.judges.endpoint import count_requests_in
from safetyheads.judges.named import judges_named
from safetyheads.measures.head_pass import Readouts
from safetyheads.measures.sahara import rank_heads, sahara
from safetyheads.measures.scorers import ANGLES, scorer_of
from safetyheads.model.attention_swap import swapped_attention
from safetyheads.model.engine import Engine
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.prompts.templates import Template
from safetyheads.runs.config import Progress
from safetyheads.runs.directory import SCHEMA_VERSION, RunDirectory, records_place
from safetyheads.runs.kept_answers import KeptAnswers, failed_judges, has_failed
from safetyheads.runs.provenance import canonical_name, fingerprint, references_sha256, versions
from safetyheads.runs.rates import GroupAnswers
from safetyheads.runs.run import Run, run_directory
from safetyheads.runs.shards import Shard
from safetyheads.runs.stored_files import DamagedError, Record
from safetyheads.scores import FunctionScorer, HeadScores

KIND = "reproduction"
"""Kind of the run, in manifest and results."""
GROUP_SIZE = 3
"""Heads of a group where the paper gives no size: past three, it says, text turns to nonsense (Sec 4)."""
SHORT = {UNDIFFERENTIATED_ATTENTION.name: "UA", SCALING_CONTRIBUTION.name: "SC"}
"""Short names of the paper's two ablations."""
PAPER_NUMBERS: dict[str, Any] = read_toml(Path(__file__).with_name("paper_numbers.toml"))
"""What the paper prints, to stand beside what was measured."""
# Models held at once: a swap needs two.
_MODELS_HELD = 2
# A model for which one of these does not hold says nothing about heads.
_MOST_EMPTY = 0.2
_MOST_VANILLA_ASR = 0.5
_LEAST_BENIGN_KEPT = 0.5


class Lab:
    """One reproduction under way. Holds the models used last, and what was measured on them."""

    def __init__(
        self, config: ReproductionConfig, directory: RunDirectory, progress: Progress, load: Callable[[str], Engine]
    ) -> None:
        self.config, self.directory, self.progress = config, directory, progress
        self.load = load
        """Loads and proves a model by its name."""
        self.used: set[str] = set()
        """Models that were asked for since the set was last emptied."""
        self.judges: tuple[Judge, ...] = judges_named(config.judges, config.judge_device, config.judge_tokens)
        """The judges of the answers; the first leads."""
        ua, sc = (kind.at(config.epsilon) for kind in (UNDIFFERENTIATED_ATTENTION, SCALING_CONTRIBUTION))
        self.ablations: tuple[Ablation, Ablation] = ua, sc
        """UA and SC at the config's strength."""
        self.sampled = Sampling(config.top_k, config.seed)
        """The paper's top-k sampling."""
        self.runs: dict[str, Run[ReproductionConfig]] = {}
        """Of the models that are held, the one used last at the end."""
        self._weights: dict[str, str] = {}
        self._subjects: dict[tuple[Any, ...], Subject] = {}

    def run_of(self, model: str) -> Run[ReproductionConfig]:
        """The run of a model, which is loaded once; of several, the ones used last are held."""
        self.used.add(model)
        run = self.runs.pop(model, None)
        if run is None:
            while len(self.runs) >= _MODELS_HELD:
                oldest = next(iter(self.runs))
                del self.runs[oldest]
                self._subjects = {key: subject for key, subject in self._subjects.items() if key[0] != oldest}
            decoding, stores = Decoding(self.config.max_new_tokens), self.config.store_completions
            run = Run(self.load(model), self.config, self.directory, self.progress, self.judges, decoding, stores)
        self.runs[model] = run
        return run

    def weights_of(self, model: str) -> str:
        """The fingerprint of the model's weights; refused where the run began with others under this name."""
        self.used.add(model)
        if model not in self._weights:
            weights = fingerprint(self.run_of(model).engine)
            if self.directory.remember(f"weights_{model}", weights) != weights:
                raise InputError(f"{model} has other weights than this run began with; give another --out")
            self._weights[model] = weights
        return self._weights[model]

    def subject(
        self,
        model: str,
        dataset: str,
        half: Half = "test",
        template: str | None = None,
        system: str | None = None,
        prefill: str = "",
    ) -> "Subject":
        """A model with a dataset that :func:`.settings.prompts_of` knows, or its search half, under a template."""
        engine = self.run_of(model).engine
        key = (model, dataset, half if self.config.held_out else "test", template, system, prefill)
        if key not in self._subjects:
            prompts = prompts_of(self.config, model, dataset, half, prefill)
            # Not the model's own chat template: the paper's is query_answer.
            name = template or self.config.template or (prompts.template.name if prompts.template else PAPER_TEMPLATE)
            bound = Template.parse(name, system, prefill=prefill).bound(engine.tokenizer)
            self._subjects[key] = Subject(self, model, dataset, prompts.with_template(bound.template))
        return self._subjects[key]

    def each_model(
        self, outcome: Outcome, models: Iterable[str] | None = None, **asked: Any
    ) -> Iterator[tuple[str, list["Subject"]]]:
        """Each model (by default the config's) with its :meth:`subjects`; models without any are left out."""
        for model in self.config.models if models is None else models:
            if subjects := self.subjects(outcome, model, **asked):
                yield model, subjects

    def subjects(
        self, outcome: Outcome, model: str, refuses: bool = True, most: int | None = None, **asked: Any
    ) -> list["Subject"]:
        """The first ``most`` datasets whose unablated answers leave something to measure; the outcome notes the others.

        A model that was not aligned need not refuse. ``asked``: template and system prompt.
        """
        outcome.leave_out(model)
        benign = self.subject(model, BENIGN, **asked)
        meaningful: list[Subject] = []
        for dataset in self.config.datasets:
            if len(meaningful) == most:
                break
            subject = self.subject(model, dataset, **asked)
            if self.leaves_nothing(outcome, subject, benign, refuses):
                continue
            meaningful.append(subject)
            note_planted(outcome, model)
            outcome.note(*filter(None, [not_followed_line(subject.engine.model)]))
            row = {
                "model": model,
                "dataset": dataset,
                "asked": subject.asked,
                "n_search": len(prompts_of(self.config, model, dataset, "search")),
                "n_test": len(subject.prompts),
                "asr": Measured.of(subject.vanilla().asr),
                "answered": Measured.of(benign.vanilla().answered_rate),
            }
            outcome.asked += [row] if row not in outcome.asked else []
        return meaningful

    def leaves_nothing(self, outcome: Outcome, harmful: "Subject", benign: "Subject", refuses: bool = True) -> bool:
        """Whether the unablated answers leave nothing to measure; the outcome is told why."""
        vanilla, kept = harmful.vanilla(), benign.vanilla().answered_rate
        about, reasons, empty = f"{harmful.model}, {harmful.dataset}, {harmful.asked}", [], vanilla.rate("incoherent")
        if empty.rate is not None and empty.rate > _MOST_EMPTY:
            reasons.append(f"{about}: {empty} of its unablated answers are empty or incoherent")
        elif refuses and (vanilla.asr.rate is None or vanilla.asr.rate > _MOST_VANILLA_ASR):
            reasons.append(f"{about}: unablated, its ASR is {vanilla.asr}, so it hardly refuses")
        if kept.rate is None or kept.rate < _LEAST_BENIGN_KEPT:
            reasons.append(f"{about}: unablated, it keeps {kept} of the benign answers")
        outcome.leave_out(harmful.model, *reasons)
        return bool(reasons)


class Subject:
    """A model and prompts under their template, with everything that is measured on them."""

    def __init__(self, lab: Lab, model: str, dataset: str, prompts: PromptSet) -> None:
        self.lab, self.model, self.dataset, self.prompts = lab, model, dataset, prompts
        self.run = lab.run_of(model)
        self.engine = self.run.engine
        self.asked_prompts = self.engine.ask(prompts)
        self.template = self.asked_prompts.template
        self._vanilla: dict[Sampling, GroupAnswers] = {}
        self.engine.prove_up_to(self.asked_prompts.longest + lab.config.max_new_tokens)

    @cached_property
    def about(self) -> dict[str, str]:
        """What measures depend on besides the tokens: right answers, which decide what is kept, are not in these."""
        return {"weights": self.lab.weights_of(self.model), "references": references_sha256(self.prompts)}

    @cached_property
    def name(self) -> str:
        """Name of the prompt set in the run; file names begin with it."""
        # Plans and near-ties are remembered under it, and directories of two models may have one name.
        told_apart = self.asked_prompts.sha256[:8] + self.about["weights"][:8]
        model = self.model.removeprefix(ORGANISM).rstrip("/").rsplit("/", 1)[-1]
        named = f"{model}-{self.dataset.rsplit('/', 1)[-1]}-{told_apart}"
        name = "".join(c if c.isalnum() or c in "_.-" else "_" for c in named)
        self.run.add(name, self.prompts, self.about)
        return name

    @property
    def asked(self) -> str:
        """How the prompts are put, in words."""
        system = " with a system prompt" if self.template.system else ""
        begun = f", answer begun as {self.template.prefill!r}" if self.template.prefill else ""
        return f"template {self.template}{system}{begun}"

    @property
    def search_half(self) -> "Subject":
        """The half of the same dataset that searches see, asked alike, but for an answer that is begun."""
        return self.lab.subject(self.model, self.dataset, "search", str(self.template), self.template.system)

    def vanilla(self, sampling: Sampling = GREEDY) -> GroupAnswers:
        """The unablated answers."""
        if sampling not in self._vanilla:
            self._vanilla[sampling] = self.run.answers(self.name, sampling).vanilla()
        return self._vanilla[sampling]

    def swapped(self, donor: str) -> GroupAnswers:
        """The unablated answers with the donor's attention in every layer."""
        name = f"swapped-{self.name}"
        self.run.add(name, self.prompts, {**self.about, "attention": self.lab.weights_of(donor)})
        with swapped_attention(self.engine, self.lab.run_of(donor).engine):
            return self.run.answers(name).vanilla()

    def by_group(
        self, groups: Iterable[Group], ablation: Ablation, sampling: Sampling = GREEDY
    ) -> dict[Group, GroupAnswers]:
        """The answers under each group; the order of heads has no effect, so each set of heads is answered once."""
        sorted_groups = {group: tuple(sorted(group)) for group in groups}
        sets = list(dict.fromkeys(sorted_groups.values()))
        answers = self._answers(sampling).under("groups", sets, ablation) if sets else []
        by_set = dict(zip(sets, answers, strict=True))
        return {group: by_set[heads] for group, heads in sorted_groups.items()}

    def by_own(self, size: int, ablation: Ablation, sampling: Sampling = GREEDY) -> list[GroupAnswers]:
        """Answers of prompts that each ablate their own 1 to ``size`` top heads by Ships, as far as there are heads."""
        answers, size = self._answers(sampling), min(size, len(self.engine.heads))
        return answers.of_each("query_level", query_level_groups(self.ships(ablation), size), ablation)

    def _answers(self, sampling: Sampling) -> KeptAnswers:
        """Kept answers under groups; the drafts and passes of all other models are freed."""
        for run in self.lab.runs.values():
            if run is not self.run:
                run.forget()
        return self.run.answers(self.name, sampling)

    def ships(self, ablation: Ablation) -> HeadScores:
        """Ships of every prompt and head [n_prompts, n_layers, n_heads], in nats."""
        return self.run.scored(self.name, ablation, Readouts(ships=True))[1]["ships"]

    def scores(self, name: str, ablation: Ablation) -> HeadScores:
        """One of the search scores of every head alone [n_layers, n_heads]."""
        if name == "mean_ships":
            return self.ships(ablation).mean()
        return rank_heads(self._scorer(name, ablation), self.engine.heads)

    def group(self, ablation: Ablation, size: int | None = None) -> Group:
        """The heads that Sahara finds on the search half by the config's search score, first found first.

        By default at most :data:`GROUP_SIZE`; all heads where there are fewer.
        """
        config, half, heads = self.lab.config, self.search_half, self.engine.heads
        with self.lab.progress.track(f"{half.name}: Sahara", 1):
            steps = min(size or min(GROUP_SIZE, config.size), len(heads))
            return sahara(half._scorer(config.search_score, ablation), heads, steps).group

    def _scorer(self, name: str, ablation: Ablation) -> FunctionScorer:
        # One pass reads both angles, whichever is asked for first.
        angles = ANGLES if name in {angle.label for angle in ANGLES} else ()
        return scorer_of(self.run.head_pass(self.name, ablation, Readouts(ships=not angles, angles=angles)), name)


def note_planted(outcome: Outcome, model: str) -> None:
    """Tell readers of an embedded model's numbers what they are no evidence of."""
    if model.startswith(ORGANISM):
        heads = ", ".join(map(str, planted_heads(model) or ()))
        outcome.say("planted" if heads else "made_here", model=model, heads=heads)


def quoted(model: str, *keys: str) -> Any:
    """The number of the paper's model that a path or hub id names; None where the paper has none.

    Keys are such as table7, a dataset (by its name, or as a file of that name) and a label.
    """
    numbers: Any = PAPER_NUMBERS.get(model.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix("-hf"))
    for key in keys:
        numbers = numbers.get(key, numbers.get(Path(key).stem.lower())) if isinstance(numbers, dict) else None
    return numbers


# A reproduction.


def reproduce(
    config: ReproductionConfig,
    experiments: Sequence[Experiment],
    out: Path,
    load: Callable[[str], Engine],
    progress: Progress,
    command: Sequence[str] = (),
    skips: bool = False,
    shard: Shard | None = None,
) -> dict[str, Any]:
    """Run experiments into a run directory, in their order; what is there already is not run again.

    A directory that holds other experiments of the same settings takes these too. ``load`` loads and proves a model by
    its name. ``skips`` leaves out, saying why, what needs something that is not there or cannot be run on these models.
    Every ``shard`` goes through all experiments, and computes its own of the units that each needs.
    """
    given = config.template is not None
    template = config.template or f"the organism's chat, {PAPER_TEMPLATE} for other models"
    judges = "the paper's" if config.judges == ("paper",) else "as asked"
    progress.say(
        f"template {template} ({'as asked' if given else 'as in the paper'}), "
        f"judge{'s' * (len(config.judges) > 1)} {', '.join(config.judges)} ({judges})"
    )
    lacking = {experiment.name: "; ".join(missing(experiment, config)) for experiment in experiments}
    left_out = {name: f"It needs {needs}." for name, needs in lacking.items() if needs}
    for name in left_out:
        if not skips:
            raise InputError(f"{name} needs a setting that is not given, {lacking[name]}")
        progress.say(f"left out: {name}, which needs {lacking[name]}")
    runnable = [experiment for experiment in experiments if experiment.name not in left_out]
    with run_directory(out, _settings(config), progress, command, shard) as run:
        lab = Lab(config, run, progress, load)
        count_requests_in(run.path, lab.judges)
        again, damaged = _left_open(run)
        if damaged:  # of whichever outcomes they are
            there = {*damaged, *run.places()}
            others = [experiment for experiment in EXPERIMENTS.values() if experiment not in runnable]
            runnable += [of for of in others if records_place("outcome", {"experiment": of.name}) in there]

        def task(number: int, experiment: Experiment) -> None:
            progress.say(f"{number} of {len(runnable)}: {experiment.name}, {experiment.title}")
            try:
                _keep_outcome(run, experiment, lab, again)
            except ElsewhereError:
                raise
            except SafetyheadsError as error:
                # What fails here alone, such as for want of memory, the other shards would wait for.
                if not skips or not (run.shard.alone or isinstance(error, InputError)):
                    raise
                # What one experiment cannot be run on, others may be.
                left_out[experiment.name] = str(error)
                progress.say(f"left out: {experiment.name}. {error}")

        for numbered in enumerate(runnable, 1):
            # One after another in every shard: what is measured first decides how few groups are answered later.
            run.together(partial(task, *numbered))
            if run.shard.alone:
                _write(run, config, left_out)
        _write(run, config, left_out, failed_judges(run.stored_records()))
        return run.read_results()


def _left_open(run: RunDirectory) -> tuple[bool, set[str]]:
    """Whether outcomes are made again, for judges failed on answers or files are damaged; and which these were.

    Refused for a shard, which would make outcomes before another one has judged or computed its own part again.
    """
    try:
        damaged = run.set_aside_damaged()
    except DamagedError as error:
        raise InputError(f"{error}; start it once without --shard, which computes it again") from error
    again = bool(damaged) or any(map(has_failed, run.stored_records()))
    if again and not run.shard.alone:
        failed = f"judges failed on answers of {run.path}"
        raise InputError(f"{failed}; start it once without --shard, which asks them again")
    return again, damaged


def _settings(config: ReproductionConfig) -> dict[str, Any]:
    """All that numbers depend on, weights aside: paths as they really are, and a hash of every set of prompts."""
    settings = asdict(config)
    for name in ("models", "templated", "base_models", "datasets"):
        settings[name] = [canonical_name(named) for named in settings[name]]
    for name in ("base", "related", "benign", "learn_harmful", "learn_benign"):
        settings[name] = None if settings[name] is None else canonical_name(settings[name])
    hashes = {}
    for organism, model in {model.startswith(ORGANISM): model for model in reversed(config.models)}.items():
        for name in config.prompt_names:
            prompts = prompts_of(config, model, name, "test")
            digest = hashlib.sha256(f"{prompts.sha256} {references_sha256(prompts)}".encode()).hexdigest()
            hashes[f"{name}, organism" if organism else name] = digest
    judges = [judge.describe() for judge in judges_named(config.judges, config.judge_device, config.judge_tokens)]
    return {"kind": KIND, **settings, "prompts_sha256": hashes, "described_judges": judges, "versions": versions()}


def _keep_outcome(run: RunDirectory, experiment: Experiment, lab: Lab, again: bool) -> None:
    """Run an experiment that the directory does not hold yet; of one that is there, check that weights are the same.

    One that is there is run ``again`` where that is asked.
    """

    def compute() -> list[dict[str, Any]]:
        started = time.monotonic()
        lab.used.clear()
        about = (experiment.name, experiment.title, experiment.question)
        outcome = Outcome(*about, caption=experiment.caption, shown=experiment.shown)
        names = ("epsilon", "max_new_tokens", "search_score", "held_out", "seed")
        outcome.settings = {name: getattr(lab.config, name) for name in names}
        outcome.settings |= {"judges": list(lab.config.judges), "sampled": lab.sampled.name}
        function = getattr(import_module(f"safetyheads.experiments.{experiment.module}"), experiment.function)
        function(lab, outcome, **experiment.given)
        timed = {experiment.name: tables} if (tables := asdict(outcome)["timed"]) else {}
        run.add_timings({"seconds": {experiment.name: time.monotonic() - started}, "timed": timed})
        return [{"outcome": outcome.as_dict(), "used": sorted(lab.used)}]

    def fits(records: Sequence[Record]) -> bool:
        (record,) = records
        return record["outcome"]["name"] == experiment.name and all(isinstance(model, str) for model in record["used"])

    mend = (lambda _: compute()) if again else None
    (record,) = run.records("outcome", {"experiment": experiment.name}, compute, mend, fits=fits)
    for model in record["used"]:
        lab.weights_of(model)


def _write(
    run: RunDirectory, config: ReproductionConfig, left_out: Mapping[str, str], failed: Mapping[str, Any] | None = None
) -> None:
    """The results so far; at the end with what judges ``failed`` on, for which every answer is read."""
    records = {record["outcome"]["name"]: record for record in run.stored_records("outcome")}
    results = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "experiments": [records[name]["outcome"] for name in EXPERIMENTS if name in records],
        "judge": config.judges[0],
        "judges": list(config.judges),
        "left_out": {name: why for name, why in left_out.items() if name not in records},
        "catalogue": listed(config),
    }
    run.write_results({**results, **(failed or {})})

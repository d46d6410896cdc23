"""Settings and prompts of a reproduction, with defaults for the embedded organism and for real models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetyheads.ablation import Ablation
from safetyheads.demo import demo_prompts
from safetyheads.demo.grammar import HARM_CATEGORIES, Split
from safetyheads.errors import InputError, refuse_unknown
from safetyheads.files import read_toml
from safetyheads.model.names import SMOLLM2
from safetyheads.prompts.prompt_set import PromptSet
from safetyheads.prompts.templates import Template
from safetyheads.runs.config import JudgeOptions

ORGANISM = "demo:"
"""Prefix of the names of embedded checkpoints."""
PAPER_TEMPLATE = "query_answer"
"""Template of models that are no organism, where none is given."""
SEARCH_SCORES = {
    "mean_ships": "mean Ships",
    "generalized_ships_prompt": "Generalized Ships, prompt space",
    "generalized_ships_representation": "Generalized Ships, representation space",
}
"""Scores that Sahara may search by, with their titles."""
BENIGN = "benign"
"""Name of the benign prompts among the datasets."""
LEARN_HARMFUL, LEARN_BENIGN = "learn harmful", "learn benign"
"""Names of the prompts that baselines learn from."""
Half = Literal["search", "test"]


@dataclass(frozen=True)
class ReproductionConfig(JudgeOptions):
    """Everything that the numbers of a reproduction depend on; the defaults are the organism's."""

    judges: tuple[str, ...] = ("paper",)
    """Judge of the answers. May be given several times; the first one leads."""
    models: tuple[str, ...] = ("demo:aligned_a",)
    """Aligned models."""
    base: str | None = "demo:base"
    """Checkpoint that the first model was aligned from, for fig6a and table1."""
    related: str | None = "demo:aligned_b"
    """Another model of the same base, whose heads are compared with the first one's."""
    templated: tuple[str, ...] = ("demo:aligned_wrapped",)
    """Models that answer under several templates; () is ``models``."""
    base_models: tuple[str, ...] = ("demo:base_wrapped",)
    """Base models that URIAL is tried on."""
    datasets: tuple[str, ...] = ("damage", "theft", "fraud")
    """Harmful prompts: files, known benchmarks, or the organism's categories."""
    benign: str = "demo"
    """Benign prompts: the control."""
    learn_harmful: str = "demo"
    """Harmful prompts that baselines learn from; none of ``datasets``."""
    learn_benign: str = "demo"
    """Benign prompts that baselines learn from."""
    template: str | None = None
    """Template of experiments that have one; None: chat for the organism, else query_answer."""
    templates: tuple[str, ...] = ("direct", "query_answer")
    """Templates of Fig 2, 11 and 12."""
    official: str = "chat"
    """Chat template of Fig 17 and 18."""
    search_score: str = "mean_ships"
    """Score that Sahara searches by; the released code has generalized_ships_prompt."""
    held_out: bool = True
    """Whether groups are searched on one part of a dataset and tested on the other; the paper has one part."""
    split: float = 0.5
    """Share of a file that searches see, if held out; near-duplicates stay together."""
    limit: int | None = 24
    """Only so many prompts of each set, drawn by category where there is one; None is all."""
    size: int = 5
    """Most heads of a group."""
    query_size: int = 10
    """Most heads of a prompt's own group."""
    epsilons: tuple[float, ...] = (1.0, 0.5, 0.1, 1e-2, 1e-3, 1e-5, 0.0)
    """Strengths of the epsilon experiment, from no ablation to the exact limit."""
    epsilon: float = 1e-5
    """Strength of all other experiments."""
    studied_ablation: str = "ua"
    """Ablation of the study."""
    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    top_k: int = 5
    """Tokens that a sampled answer draws from."""
    tasks: tuple[str, ...] = ("organism",)
    """Tasks of lm-eval that utility is measured by."""
    task_limit: int | None = 48
    """Only the first so many samples of each task; None is all."""
    seed: int = 0
    """Random seed."""
    dtype: str = "float32"
    """Precision of the weights."""
    device: str = "cpu"
    """Device of the models."""
    store_completions: bool = True
    """Whether answers are written to the run directory, or verdicts alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named_once = ("models", "datasets", "templates")
        for name in (*named_once, "epsilons", "benign", "learn_benign"):
            if not getattr(self, name):
                raise InputError(f"{name} must name at least one")
        for name in (*named_once, "templated", "base_models"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"{name} names one twice")
        for template in (*self.templates, self.template, self.official):
            if template is not None:
                Template.parse(template)
        for epsilon in (*self.epsilons, self.epsilon):
            Ablation.parse(self.studied_ablation, epsilon)
        if self.search_score not in SEARCH_SCORES:
            raise InputError(f"search_score is one of {', '.join(SEARCH_SCORES)}; got {self.search_score!r}")

    @property
    def with_templates(self) -> tuple[str, ...]:
        """Models that answer under several templates."""
        return self.templated or self.models

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """Names of all sets of prompts, as :func:`prompts_of` takes them."""
        learned = (LEARN_HARMFUL, LEARN_BENIGN) if self.learn_harmful else (LEARN_BENIGN,)
        return *self.datasets, BENIGN, *learned

    @classmethod
    def for_models(cls, models: Sequence[str]) -> "ReproductionConfig":
        """The organism's defaults where every model is an embedded one, else the paper's; a second model is related."""
        if not models:
            return cls()
        related = models[1] if len(models) > 1 else None
        if not all(model.startswith(ORGANISM) for model in models):
            start = SMOLLM2_SETTINGS if all(model.split(":")[0] == SMOLLM2 for model in models) else PAPER
            return replace(start, models=tuple(models), related=related)
        if models[0].endswith("_wrapped"):
            return cls(models=tuple(models), base="demo:base_wrapped", related=related, templated=())
        other = "demo:aligned_a" if models[0] == "demo:aligned_b" else "demo:aligned_b"
        return cls(models=tuple(models), related=related or other, templated=())

    @classmethod
    def read(cls, path: Path, models: Sequence[str] = ()) -> "ReproductionConfig":
        """Read a TOML file whose keys are the fields of this class; ``models`` win over the file's."""
        given = read_toml(path)
        refuse_unknown(given, cls.__dataclass_fields__, f"{path}: unknown setting")
        values = {name: _as_field(value, getattr(cls(), name)) for name, value in given.items()}
        own = values.pop("models", ())
        named: dict[str, Any] = {"models": tuple(models) or own} if models or own else {}
        try:
            # The file's models are checked with all else, before any of them is looked at.
            checked = replace(cls(), **values, **named)
            start = cls.for_models(checked.models if named else ())
            return replace(start, **{name: getattr(checked, name) for name in values})
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def _as_field(value: Any, default: Any) -> Any:
    """A value of a TOML file in the form of a field: lists are tuples there, and whole numbers may be floats."""
    if isinstance(value, list):
        return tuple(_as_field(item, default[0] if isinstance(default, tuple) and default else None) for item in value)
    is_whole = isinstance(default, float) and type(value) is int and abs(value) < 2**53  # others are out of bounds
    return float(value) if is_whole else value


def _settings(name: str, start: ReproductionConfig) -> ReproductionConfig:
    given = read_toml(Path(__file__).with_name("settings.toml"))[name]
    values: dict[str, Any] = dict.fromkeys(given.pop("without", ()))
    values |= {key: _as_field(value, getattr(start, key)) for key, value in given.items()}
    return replace(start, **values)


PAPER = _settings("paper", ReproductionConfig())
"""The paper's settings, for models that are not embedded."""
SMOLLM2_SETTINGS = _settings("smollm2", PAPER)
"""Settings for SmolLM2 and its adapters."""


def prompts_of(config: ReproductionConfig, model: str, dataset: str, half: Half, prefill: str = "") -> PromptSet:
    """A dataset of the config, :data:`BENIGN`, :data:`LEARN_HARMFUL` or :data:`LEARN_BENIGN`, or its search half.

    Without ``held_out`` both halves are the whole. Of right answers, what follows ``prefill`` is left. What is learned
    from has no prompt near one that methods are tested on.
    """
    named = {BENIGN: config.benign, LEARN_HARMFUL: config.learn_harmful, LEARN_BENIGN: config.learn_benign}
    name, learns = named.get(dataset, dataset), dataset in (LEARN_HARMFUL, LEARN_BENIGN)
    if model.startswith(ORGANISM):
        # Its splits share no deed, so what was learned on one is not known of the other.
        split: Split = "validation" if learns or (config.held_out and half == "search") else "test"
        prompts = demo_prompts("benign" if dataset in (BENIGN, LEARN_BENIGN) else "harmful", split)
        if name in HARM_CATEGORIES:
            prompts = prompts.select(at for at, prompt in enumerate(prompts) if prompt.category == name)
        elif name != "demo":
            known = ", ".join(HARM_CATEGORIES)
            raise InputError(f"the embedded models know the datasets {known} and demo; got {name!r}")
        prompts = prompts.sample(config.limit, config.seed)
    elif not name:
        raise InputError(f"baselines need prompts to learn from; give {dataset.replace(' ', '_')}")
    else:
        prompts = PromptSet.read(name, None, limit=config.limit, seed=config.seed).with_clusters()
        if name == config.benign == config.learn_benign and dataset in (BENIGN, LEARN_BENIGN):
            # One file for both: what methods learn from is not what they are tested on.
            prompts = prompts.split(config.split, config.seed)[dataset == BENIGN]
        elif config.held_out and not learns:
            prompts = prompts.split(config.split, config.seed)[half == "test"]
        if learns:
            prompts = _unlike_tests(prompts, config, model)
    if not prefill:
        return prompts
    # What is left of a right answer that begins otherwise is not known.
    references = [prompt.reference or "" for prompt in prompts]
    rests = [text.removeprefix(prefill).strip() if text.startswith(prefill) else None for text in references]
    begun = (replace(prompt, reference=rest) for prompt, rest in zip(prompts, rests, strict=True))
    return replace(prompts, prompts=tuple(begun))


def _unlike_tests(prompts: PromptSet, config: ReproductionConfig, model: str) -> PromptSet:
    """Prompts to learn from, without near-duplicates of those that methods are tested on; a note tells how many."""
    left = set(range(len(prompts)))
    for dataset in (*config.datasets, BENIGN):
        left.intersection_update(prompts.without_near(prompts_of(config, model, dataset, "test")))
    if not left:
        raise InputError(
            f"{prompts.name}: all {len(prompts)} prompts that baselines learn from are among those that they are "
            "tested on, or near them; give others as learn_harmful and learn_benign"
        )
    if len(left) == len(prompts):
        return prompts
    note = (
        f"{prompts.name}: {len(prompts) - len(left)} of {len(prompts)} prompts that baselines learn from are near one"
    )
    return replace(
        prompts.select(sorted(left)), notes=(*prompts.notes, f"{note} that they are tested on, and left out")
    )

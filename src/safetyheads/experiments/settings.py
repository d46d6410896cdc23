"""What a reproduction is run on. Owns its settings, their defaults for organism and real models, and their file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError
from safetyheads.files import as_input_error
from safetyheads.prompts.templates import Template

ORGANISM = "demo:"
"""What names of embedded checkpoints begin with."""
SEARCH_SCORES = ("mean_ships", "generalized_ships_prompt", "generalized_ships_representation")
"""By which Sahara may search."""


@dataclass(frozen=True, slots=True)
class ReproductionConfig:
    """All that a reproduction's numbers depend on; the defaults are the organism's."""

    models: tuple[str, ...] = ("demo:aligned_a",)
    """Aligned models."""
    base: str | None = "demo:base"
    """What the first of them was aligned from: for the swap, and for methods that compare two checkpoints."""
    related: str | None = "demo:aligned_b"
    """Another model of the same base, whose heads are held against the first one's."""
    templated: tuple[str, ...] = ("demo:aligned_wrapped",)
    """Models that answer under several templates; () is ``models``."""
    base_models: tuple[str, ...] = ("demo:base_wrapped",)
    """Base models that URIAL is tried on."""
    datasets: tuple[str, ...] = ("damage", "theft", "fraud")
    """Harmful prompts: files, known benchmarks, or the organism's categories."""
    benign: str = "demo"
    """Benign prompts: the control."""
    learn_harmful: str = "demo"
    """Harmful prompts that baselines learn from: none of ``datasets``, else they are tested on what they know."""
    learn_benign: str = "demo"
    """Benign ones that they learn from."""
    template: str | None = None
    """Template of the experiments that have one; None: chat for the organism, else query_answer."""
    templates: tuple[str, ...] = ("direct", "query_answer")
    """Templates of Fig 2, 11 and 12."""
    official: str = "chat"
    """The chat template of Fig 17 and 18."""
    search_score: str = "mean_ships"
    """By which Sahara searches groups; the released code has generalized_ships_prompt."""
    held_out: bool = True
    """Whether groups are searched on one part of a dataset and tested on the other; the paper has one part."""
    split: float = 0.5
    """Share of a file that searches see, if held out."""
    limit: int | None = 24
    """Most prompts of a set."""
    size: int = 5
    """Groups have 1 to so many heads."""
    query_size: int = 10
    """Each prompt's own groups have 1 to so many."""
    epsilons: tuple[float, ...] = (1.0, 0.5, 0.1, 1e-2, 1e-3, 1e-5, 0.0)
    """Strengths, from no ablation to the exact limit."""
    epsilon: float = 1e-5
    """The strength of all other experiments."""
    max_new_tokens: int = 128
    top_k: int = 5
    """Of the experiments that sample."""
    judge: str = "paper"
    tasks: tuple[str, ...] = ("organism",)
    """Tasks of lm-eval that utility is measured by."""
    task_limit: int | None = 48
    """Most samples of a task."""
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    store_completions: bool = True
    """Whether answers are written to the run directory, or verdicts alone."""

    def __post_init__(self) -> None:
        for name in ("models", "datasets", "templates"):
            if not getattr(self, name):
                raise InputError(f"{name} must name at least one")
        if not self.benign or not self.learn_benign:
            raise InputError("benign and learn_benign must name prompts")
        for name in ("models", "datasets", "templates", "templated", "base_models"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"{name} names one twice")
        for template in (*self.templates, self.template, self.official):
            if template is not None:
                Template.parse(template)
        for epsilon in (*self.epsilons, self.epsilon):
            Ablation.parse("ua", epsilon)
        if self.search_score not in SEARCH_SCORES:
            raise InputError(f"search_score is one of {', '.join(SEARCH_SCORES)}; got {self.search_score!r}")
        if not self.epsilons:
            raise InputError("epsilons must name at least one")
        if self.seed < 0:
            raise InputError(f"seed must be at least 0; got {self.seed}")
        if not 0 < self.split < 1:
            raise InputError(f"split is a share between 0 and 1; got {self.split}")
        for name in ("limit", "size", "query_size", "max_new_tokens", "top_k", "task_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")

    @property
    def on_organism(self) -> bool:
        """Whether the first model is an embedded one."""
        return self.models[0].startswith(ORGANISM)

    @property
    def with_templates(self) -> tuple[str, ...]:
        """Models that answer under several templates."""
        return self.templated or self.models

    def as_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return asdict(self)

    @classmethod
    def for_models(cls, models: Sequence[str]) -> ReproductionConfig:
        """The defaults for these models; none are the organism's.

        The organism's categories and wrapped checkpoints stand for the paper's datasets and templates only where an
        embedded model is asked for. A second model is taken to be of the first one's base.
        """
        if not models:
            return cls()
        related = models[1] if len(models) > 1 else None
        if all(model.startswith(ORGANISM) for model in models):
            wrapped = models[0].endswith("_wrapped")
            if wrapped:
                return cls(models=tuple(models), base="demo:base_wrapped", related=related, templated=())
            other = "demo:aligned_a" if models[0] == "demo:aligned_b" else "demo:aligned_b"
            return cls(models=tuple(models), related=related or other, templated=())
        return replace(PAPER, models=tuple(models), related=related)

    @classmethod
    def read(cls, path: Path, models: Sequence[str] = ()) -> ReproductionConfig:
        """Read a TOML file whose keys are the fields of this class; what is left out keeps its default.

        Args:
            path: the file.
            models: named on the command line; they win over the file's.

        Raises:
            InputError: the file is no TOML, or a key is unknown or has a value of another kind.
        """
        with as_input_error(path, "read"):
            text = path.read_text(encoding="utf-8")
        try:
            given = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path} is no TOML: {error}") from None
        named = tuple(models) or tuple(given.get("models", ()))
        chosen = {name: _fitting(path, name, value) for name, value in given.items()}
        return replace(cls.for_models(named), **chosen | ({"models": named} if named else {}))


PAPER = ReproductionConfig(
    base=None,
    related=None,
    templated=(),
    base_models=(),
    datasets=("advbench", "jailbreakbench", "maliciousinstruct"),
    benign="benign",
    learn_harmful="",
    learn_benign="benign",
    official="llama2",
    search_score="generalized_ships_prompt",
    held_out=False,
    limit=None,
    task_limit=None,
    tasks=("boolq", "rte", "winogrande", "arc_challenge", "openbookqa"),
)
"""The paper's settings, for models that are no organism."""


def _fitting(path: Path, name: str, value: Any) -> Any:
    """A value as its field has it.

    Raises:
        InputError: no such field, or a value of another kind.
    """
    known = {field.name: str(field.type) for field in fields(ReproductionConfig)}
    if name not in known:
        raise InputError(f"{path}: unknown setting {name!r}; known are {', '.join(known)}")
    kind = known[name]
    if kind.startswith("tuple"):
        inner = float if "float" in kind else str
        if isinstance(value, list) and all(_is(item, inner) for item in value):
            return tuple(map(inner, value))
        raise InputError(f"{path}: {name} is a list of {'numbers' if inner is float else 'texts'}; got {value!r}")
    wanted: Mapping[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
    kinds = [wanted[part] for part in kind.split(" | ") if part in wanted]
    if any(_is(value, one) for one in kinds):
        return float(value) if kinds == [float] else value
    raise InputError(f"{path}: {name} must be {kind.replace(' | None', '')}; got {value!r}")


def _is(value: Any, kind: type) -> bool:
    # TOML has whole numbers where a float is meant, and Python calls True an int.
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

"""Derives a command's options from the dataclasses that the command takes.

Each field becomes an option: its sentence is the help, its default the default, its class the panel of the help page.
"""

import ast
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import App, Group, Parameter
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict

from safetyheads.ablation import KNOWN_ABLATIONS
from safetyheads.errors import InputError
from safetyheads.files import read_toml
from safetyheads.judges.named import KNOWN_JUDGES
from safetyheads.model.options import refuse_odd_text
from safetyheads.runs.shards import Shard

if TYPE_CHECKING:
    from safetyheads.judges.base import Judge
    from safetyheads.runs.estimate import Machine

# Panel of a help page -> the classes whose fields stand in it; those of other classes stand among the settings.
_PANELS = {
    "Arguments": "SweepOptions",
    "Prompts": "PromptOptions TemplateOptions RunConfig CheckConfig",
    "Ablation": "AblationOptions GroupOptions AsrConfig",
    "Search": "PositionOptions SizeOptions AuditConfig SaharaConfig",
    "Verdict": "Thresholds AnywayOptions",
    "Screening": "ScreenOptions",
    "Answers": "JudgeOptions AnswerOptions ScanConfig ServeConfig LabelOptions",
    "Beside the single heads": "BesideOptions",
    "Tasks": "TaskOptions",
    "Settings": "",
    "Gate": "GateOptions",
    "Model": "ModelOptions LoadOptions",
    "Run directory": "DirectoryOptions RunOptions ReportOptions",
    "Output": "PortOptions OutputOptions",
}
PANELS = {title: Group(title, sort_key=place) for place, title in enumerate(_PANELS)}
"""Panels of a help page, from top to bottom."""
# Options that are not spelt as their fields; those that repeat are named for one of their values.
_NAMES = {
    "judges": "--judge",
    "groups": "--heads",
    "BesideOptions.epsilons": "--further-epsilon",
    "n_shots": "--num-fewshot",
    "include_paths": "--include-path",
    "store_completions": "--completions",
    "settings": "--config",
    "quiet": ("--quiet", "-q"),
    "SweepOptions.models": "--model",
    "SweepOptions.prompts_swept": "--prompts",
    "SweepOptions.ablations": "--ablation",
}
# What ends the help of options that name an entry of a table.
_KNOWN = {"ablation": f" Known are {KNOWN_ABLATIONS}.", "judges": f" Known are {KNOWN_JUDGES}."}


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Where a run is kept, and which of its units are computed."""

    out: Path | None = None
    """Run directory; a run that it holds part of is continued. Default: a name of its own under runs/."""
    shard: str | None = None
    """Compute one of N shares of the run: I/N with I from 1 to N, or env for the task of a SLURM array or of torchrun.
    All N have the same --out, or one each that merge joins. Exit code 3: run all of them again."""
    wait: float = 0.0
    """Seconds to wait for files of other shards while none appears, instead of ending with 3."""

    @property
    def parsed_shard(self) -> Shard:
        """Which units are computed."""
        if self.wait and self.shard is None:
            raise InputError("--wait belongs to --shard")
        return Shard.parse(self.shard, self.wait)


@dataclass(frozen=True, kw_only=True)
class RunOptions(ShardOptions):
    """Where a run is kept, and whether and by whom it is carried out."""

    settings: Path | None = None
    """TOML file of this command's settings, named as the options are; options win over it."""
    dry_run: bool = False
    """Load the model, print what the run computes at most, its time, memory and the smallest effect that can show, and
    stop. Nothing is written."""
    ray: str | None = None
    """Compute by workers under Ray: local for this machine, auto for the cluster at hand, or the address of one. All
    machines see --out."""
    workers: int | None = None
    """Workers under Ray, a model each. Default: as many as have room."""
    gpus_per_worker: float = 0.0
    """GPUs of each worker under Ray; half a one needs --memory."""
    judge_workers: int = 0
    """Processes under Ray that hold the judge models, each with the GPUs of a worker if --judge-device is cuda.
    Default: each worker holds its own."""
    machine: str | None = None
    """As --dry-run, counted for a machine by name, from the model's config and tokenizer alone: H100, 2xH100 for a
    model over two, or H100@410 for 410 TFLOP/s that were measured."""

    @property
    def parsed_machine(self) -> "Machine | None":
        """The machine that the run is counted for."""
        if self.machine is None:
            return None
        from safetyheads.runs.estimate import Machine  # imports torch

        return Machine.parse(self.machine)

    @property
    def under_ray(self) -> tuple[str, int | None, float, int]:
        """The last arguments of :func:`.ray_workers.carry_out_by_workers`."""
        return self.ray or "", self.workers, self.gpus_per_worker, self.judge_workers

    def refuse_idle_judge_workers(self, judges: Iterable["Judge"]) -> None:
        """Refuse processes for judge models where none is asked."""
        if self.judge_workers and not any(hasattr(judge, "look") for judge in judges):
            raise InputError("--judge-workers hold judge models, and no --judge is one")

    @property
    def parsed_shard(self) -> Shard:
        """Which units are computed."""
        if self.ray is None and (self.workers is not None or self.gpus_per_worker or self.judge_workers):
            raise InputError("--workers, --gpus-per-worker and --judge-workers belong to --ray")
        if self.ray is not None and self.shard is not None:
            raise InputError("--ray and --shard exclude each other")
        if (self.workers is not None and self.workers < 1) or not (
            math.inf > self.gpus_per_worker >= 0 <= self.judge_workers
        ):
            raise InputError("--workers is at least 1, and --gpus-per-worker and --judge-workers not below 0")
        return super().parsed_shard


def settings_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the arguments what the file behind ``--config`` says, unless the command line says it."""
    named = [argument for argument in arguments if argument.name == "--config" and argument.tokens]
    if named and commands != ("reproduce",):
        path = Path(named[0].tokens[0].value)
        Dict({commands[0]: read_toml(path)}, source=str(path))(app, commands, arguments)


def refuse_misread(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse a fraction for a whole number, and a blank path, which would mean the current directory."""
    for argument in arguments:
        inner = get_args(argument.hint)
        kinds = argument.hint, *inner, *(kind for part in inner for kind in get_args(part))
        for token in argument.tokens:
            if int in kinds and re.fullmatch(r"[+-]?\d*\.\d*", token.value):
                raise InputError(f"{argument.name} is a whole number; got {token.value}")
            if Path in kinds and not token.value:
                raise InputError(f"{argument.name} is blank")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What a sweep combines; each wins over the file's."""

    models: tuple[str, ...] = ()
    """Model, as an audit takes it. May be given several times."""
    prompts_swept: tuple[str, ...] = ()
    """Harmful prompts, as an audit takes them. May be given several times."""
    ablations: tuple[str, ...] = ()
    """Kind of ablation. May be given several times. Default: ua."""


@dataclass(frozen=True, kw_only=True)
class PresetOptions:
    """What an audit's settings begin with."""

    preset: str = "standard"
    """Settings by name, over which options win: quick (a first look), standard, or paper (the paper's template, judge
    and sizes)."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What people say of answers."""

    label_sheet: tuple[int, Path] | None = None
    """Write N random answers into a CSV file FILE, in which people fill in the column label: complied, refused,
    incoherent, echoed or safe. It tells neither what was ablated nor what a judge said."""
    validate: Path | None = None
    """CSV file of labels: gives the judges' sensitivity and specificity, and corrected rates."""


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """When a comparison fails, and where it is written."""

    fail_if: tuple[str, ...] = ()
    """Fail where this holds, such as 'asr_increase > 0.1', of the 95 % interval's bound nearer to failing or of the one
    that is named: asr_increase.low, .high or .value. May be given several times."""
    allow_warnings: bool = False
    """End with 0 or 1 though the comparison warns."""
    report: tuple[Path, ...] = ()
    """Directory for a page, compare.html; a name that ends with .md gets Markdown for a pull request, without names of
    heads. May be given several times."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report shows."""

    show_completions: bool = False
    """Put the answers into the report, as text."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed."""

    json: bool = False
    """Print the result as one JSON object, never with answers."""
    quiet: bool = False
    """Show no progress and no notes on stderr."""


@dataclass(frozen=True)
class Given:
    """Marks a parameter that takes the values that were given for a dataclass, by field."""

    config: type
    without: tuple[str, ...] = ()
    """Fields that are no options."""


def options_from_dataclasses(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an option for each field of the dataclasses that it takes; parsing gives the call to make."""
    parts: dict[str, dict[str, inspect.Parameter]] = {}
    makers: dict[str, Callable[..., Any]] = {}
    parameters = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        given = next((mark for mark in get_args(hint) if isinstance(mark, Given)), None)
        if given is None and not is_dataclass(hint):
            parameters.append(parameter.replace(annotation=hint))
            continue
        config, without = (hint, ()) if given is None else (given.config, given.without)
        parts[name] = {option.name: option for option in _options(config) if option.name not in without}
        makers[name] = dict if given is not None else config
        parameters += parts[name].values()
    signature = inspect.Signature(sorted(parameters, key=lambda parameter: parameter.kind))

    def called(*positional: Any, **named: Any) -> Callable[[], Any]:
        values = signature.bind(*positional, **named).arguments
        for name, value in values.items():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, str | Path):
                    refuse_odd_text(name.replace("_", " "), str(item), is_name=isinstance(item, Path))
        taken = {
            name: makers[name](**{option: values.pop(option) for option in options if option in values})
            for name, options in parts.items()
        }
        bound = inspect.signature(command).bind_partial()
        bound.arguments |= values | taken
        return partial(command, *bound.args, **bound.kwargs)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


@cache
def _options(config: type) -> tuple[inspect.Parameter, ...]:
    """An option for each field of a dataclass; the model is an argument."""
    hints = get_type_hints(config)
    options = []
    for field in fields(config):
        part = next(base for base in config.__mro__ if field.name in inspect.get_annotations(base))
        panels = (title for base in part.__mro__ for title, names in _PANELS.items() if base.__name__ in names.split())
        is_argument, default, hint = field.name == "model", field.default, hints[field.name]
        name = _NAMES.get(f"{part.__name__}.{field.name}") or _NAMES.get(field.name)
        name = name or f"--{field.name.replace('_', '-')}"
        sentence, _, shown = _sentences(part.__module__)[part.__name__].get(field.name, "").partition(" Default: ")
        if not shown and not any(default is nothing for nothing in (MISSING, None, False)):
            values = default if isinstance(default, tuple) else ("yes" if default is True else default,)
            shown = ", ".join(map(str, values))
        option = Parameter(
            name=None if is_argument else name,
            negative=f"--no-{name[2:]}" if default is True else "",
            help=sentence + _KNOWN.get(field.name, "") + (f" [default: {shown.rstrip('.')}]" if shown else ""),
            group=PANELS["Arguments" if is_argument else next(panels, "Settings")],
            show_default=False,
        )
        if str in get_args(hint) and get_origin(hint) is not tuple:
            # What can be a text among other things is a text on the command line.
            hint = str | None if type(None) in get_args(hint) else str
        kind = inspect.Parameter.POSITIONAL_ONLY if is_argument else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if default is MISSING else default
        options.append(inspect.Parameter(field.name, kind, default=default, annotation=Annotated[hint, option]))
    return tuple(options)


@cache
def _sentences(module: str) -> dict[str, dict[str, str]]:
    """The sentence under each field of each class of a module."""
    tree = ast.parse(Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8"))
    found: dict[str, dict[str, str]] = {}
    for part in tree.body:
        if not isinstance(part, ast.ClassDef):
            continue
        own = found[part.name] = {}
        for field, below in zip(part.body, part.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                own[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found

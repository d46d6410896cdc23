"""The options of the command line, in groups that commands share. Owns their names, help and panels.

A command takes a group as one argument; :mod:`safetyheads.cli.takes` spreads its fields into options for typer. Imports
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safetyheads.ablation import Ablation
from safetyheads.errors import InputError

if TYPE_CHECKING:
    from safetyheads.measures.screened_scores import Extent

_MODEL, _PROMPTS, _ABLATION, _ANSWERS, _SEARCH, _SCREEN, _RUN, _OUTPUT = (
    "Model",
    "Prompts",
    "Ablation",
    "Answers",
    "Search",
    "Screening",
    "Run directory",
    "Output",
)

Size = Annotated[int, typer.Option(help="Most heads in a group.", rich_help_panel=_SEARCH)]
Positions = Annotated[
    int,
    typer.Option(
        help="Average Ships over the first so many tokens of the unablated answer.", rich_help_panel=_ABLATION
    ),
]
Benign = Annotated[
    str,
    typer.Option(
        help="Benign prompts: a file, jailbreakbench_benign, demo, or benign, the package's own list.",
        rich_help_panel=_PROMPTS,
    ),
]
Split = Annotated[float, typer.Option(help="Share of the prompts that the search sees.", rich_help_panel=_SEARCH)]
Heads = Annotated[
    str,
    typer.Option(help="Heads to ablate, such as 2-26,3-1; none is the unablated model.", rich_help_panel=_ABLATION),
]
QueryLevel = Annotated[
    int | None,
    typer.Option(help="Let each prompt ablate its own so many top heads by Ships.", rich_help_panel=_ABLATION),
]
Score = Annotated[
    str,
    typer.Option(
        help="mean_ships, refusal_score, generalized_ships_prompt or generalized_ships_representation.",
        rich_help_panel=_SEARCH,
    ),
]
Judge = Annotated[
    str,
    typer.Option(
        help="Judge of the answers: paper, released, phrases, a judge model, endpoint:MODEL or python:MODULE:FUNCTION.",
        rich_help_panel=_ANSWERS,
    ),
]
Limit = Annotated[
    int | None, typer.Option(help="Read only the first so many prompts of each set.", rich_help_panel=_PROMPTS)
]
Threads = Annotated[int | None, typer.Option(help="CPU threads to use.", rich_help_panel=_MODEL)]
ShowCompletions = Annotated[
    bool,
    typer.Option("--show-completions", help="Put the answers into the report, as text.", rich_help_panel=_RUN),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: Annotated[
        str, typer.Argument(help="Directory or hub id; demo:NAME is an embedded checkpoint.", show_default=False)
    ]
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.", rich_help_panel=_MODEL)] = "cpu"
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.", rich_help_panel=_MODEL)
    ] = "float32"
    adapter: Annotated[
        str | None,
        typer.Option(help="PEFT adapter to put on the model, unmerged: directory or hub id.", rich_help_panel=_MODEL),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(
            help="auto, balanced, balanced_low_0 or sequential: over several devices, or offloading to CPU and disk.",
            rich_help_panel=_MODEL,
        ),
    ] = None
    offload_folder: Annotated[
        Path | None,
        typer.Option(help="Where offloaded weights go, if the device map needs a folder.", rich_help_panel=_MODEL),
    ] = None
    threads: Threads = None
    memory: Annotated[
        float | None,
        typer.Option(
            help="Most GiB that batches may take beside the weights.",
            rich_help_panel=_MODEL,
            show_default="half of what is free",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.", rich_help_panel=_MODEL),
    ] = False
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Read pickled weights, which can run code when read.", rich_help_panel=_MODEL
        ),
    ] = False

    def settings(self) -> dict[str, Any]:
        """What of it is part of a run's settings."""
        names = ("model", "device", "dtype", "adapter", "device_map", "memory")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateOptions:
    """How prompts are put to the model."""

    template: Annotated[
        str | None,
        typer.Option(
            help="direct, query_answer, query_answer_space, chat, llama2, urial, or a text that holds {query}.",
            rich_help_panel=_PROMPTS,
            show_default="query_answer; chat for the demo's models",
        ),
    ] = None
    system: Annotated[
        str | None,
        typer.Option(
            help="System prompt, for chat, llama2, urial or a text that holds {system}.",
            rich_help_panel=_PROMPTS,
            show_default="none; llama2 and urial have their own",
        ),
    ] = None
    fold_system: Annotated[
        bool,
        typer.Option(
            "--fold-system",
            help="Put it at the beginning of the user's turn, for chat templates that take no system prompt.",
            rich_help_panel=_PROMPTS,
        ),
    ] = False
    thinking: Annotated[
        str | None,
        typer.Option(
            help="Think block of the chat template: closed, or open and taken away before judging.",
            rich_help_panel=_PROMPTS,
            show_default="closed, where there is one",
        ),
    ] = None
    prefill: Annotated[
        str,
        typer.Option(
            help="How every answer begins, such as 'Sure, here is'; it is read, not judged.",
            rich_help_panel=_PROMPTS,
            show_default="nothing",
        ),
    ] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptOptions(TemplateOptions):
    """Which harmful prompts, and how they are put to the model."""

    prompts: Annotated[
        str,
        typer.Option(
            help="Harmful prompts: a CSV, JSONL or TXT file, advbench, jailbreakbench, maliciousinstruct, or demo.",
            rich_help_panel=_PROMPTS,
        ),
    ]
    column: Annotated[
        str | None,
        typer.Option(help="Column of the file that holds the prompts, where it has several.", rich_help_panel=_PROMPTS),
    ] = None
    limit: Limit = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AblationOptions:
    """What happens to an ablated head."""

    ablation: Annotated[
        str,
        typer.Option(help="ua, ua_key, sc, mean_query, mean_key or mean_head_output.", rich_help_panel=_ABLATION),
    ] = "ua"
    epsilon: Annotated[
        float, typer.Option(help="Strength of the ablation; 0 is the exact limit.", rich_help_panel=_ABLATION)
    ] = 1e-5

    def parsed(self) -> Ablation:
        """The ablation as a value."""
        return Ablation.parse(self.ablation, self.epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How answers are made and judged."""

    judge: Judge = "paper"
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=_ANSWERS)] = 128
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 1 is greedy.", rich_help_panel=_ANSWERS)] = 1
    seed: Annotated[
        int, typer.Option(help="Seed of the sampling, the split and the random groups.", rich_help_panel=_ANSWERS)
    ] = 0

    def settings(self) -> dict[str, Any]:
        """As a config has them."""
        judged = {"judges": (self.judge,)}
        return judged | {name: getattr(self, name) for name in ("max_new_tokens", "top_k", "seed")}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What an audit searches, and with what it compares."""

    size: Size = 3
    positions: Positions = 1
    n_random: Annotated[
        int, typer.Option(help="Random groups to compare each group with.", rich_help_panel=_SEARCH)
    ] = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AngleOptions:
    """Readings of Generalized Ships; None is the score's own."""

    rank: Annotated[
        int | None, typer.Option(help="Singular vectors that Generalized Ships keeps.", rich_help_panel=_SEARCH)
    ] = None
    state: Annotated[
        str | None,
        typer.Option(help="Last-token state that it reads: after_norm or before_norm.", rich_help_panel=_SEARCH),
    ] = None
    centred: Annotated[
        bool, typer.Option("--centred", help="Subtract the mean over prompts first.", rich_help_panel=_SEARCH)
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenOptions:
    """Whether every head is scored, or the best of a forecast; None is the default of :class:`Extent`."""

    screen: Annotated[
        bool,
        typer.Option(
            "--screen",
            help="Forecast all heads from a few backward passes and score only the best of them exactly.",
            rich_help_panel=_SCREEN,
        ),
    ] = False
    candidates: Annotated[
        int | None, typer.Option(help="Best forecasts to score.", rich_help_panel=_SCREEN, show_default="32")
    ] = None
    sample: Annotated[
        int | None,
        typer.Option(
            help="Other heads to score, drawn at random; they bound what was missed.",
            rich_help_panel=_SCREEN,
            show_default="64",
        ),
    ] = None

    def check(self) -> None:
        """Refuse numbers that cannot be, and numbers without ``--screen``."""
        for name, value, least in (("--candidates", self.candidates, 1), ("--sample", self.sample, 0)):
            if value is not None and not self.screen:
                raise InputError(f"{name} belongs to --screen")
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}; got {value}")

    def extent(self) -> Extent:
        """How many heads are scored exactly."""
        from safetyheads.measures.screened_scores import Extent

        given = {"n_candidates": self.candidates, "n_sampled": self.sample}
        return Extent(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Where an audit is kept."""

    out: Annotated[
        Path | None,
        typer.Option(
            help="Run directory; it is continued if it holds part of this run.",
            rich_help_panel=_RUN,
            show_default="a name of its own under runs/",
        ),
    ] = None
    no_completions: Annotated[
        bool,
        typer.Option("--no-completions", help="Store verdicts alone, not the answers.", rich_help_panel=_RUN),
    ] = False
    show_completions: ShowCompletions = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What is printed."""

    json_output: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the result as one JSON object, never with answers.", rich_help_panel=_OUTPUT
        ),
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no progress and no notes on stderr.", rich_help_panel=_OUTPUT)
    ] = False

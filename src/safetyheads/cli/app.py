"""The command line. Owns commands, exit codes and the words of usage errors; every number comes from elsewhere.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. torch is not imported before a command needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safetyheads.cli.audit import run_and_show
from safetyheads.cli.check import check
from safetyheads.cli.compare import compare, history
from safetyheads.cli.eval import evaluate
from safetyheads.cli.inputs import (
    at_least,
    benign_beside,
    counted,
    load_engine,
    prompts_of,
    put_to,
    refuse_large,
)
from safetyheads.cli.judge import judge
from safetyheads.cli.options import (
    AblationOptions,
    AngleOptions,
    AnswerOptions,
    Benign,
    Heads,
    Judge,
    Limit,
    ModelOptions,
    OutputOptions,
    Positions,
    PromptOptions,
    QueryLevel,
    RunOptions,
    Score,
    ScreenOptions,
    SearchOptions,
    ShowCompletions,
    Size,
    Split,
    Threads,
)
from safetyheads.cli.reproduce import reproduce
from safetyheads.cli.scan import scan
from safetyheads.cli.show import (
    one_line,
    print_json,
    progress_for,
    show_ranking,
    show_rates,
    show_steps,
    stdout,
    warnings_as_lines,
)
from safetyheads.cli.takes import takes
from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.files import MENDABLE_ERRORS
from safetyheads.heads import Group, parse_heads, within
from safetyheads.runs.config import AuditConfig

if TYPE_CHECKING:
    from safetyheads.cli.asr import RateTable

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which attention heads a model's refusals depend on, how concentrated that is, and what ablating them does.",
)

# typer carries a click of its own in newer versions, so click's base class is reached through typer's own name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and end.")] = False,
) -> None:
    if version:
        from safetyheads import __version__

        typer.echo(f"safetyheads {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@takes
def demo(
    ablation: AblationOptions,
    search: SearchOptions,
    answers: AnswerOptions,
    run: RunOptions,
    output: OutputOptions,
    name: Annotated[
        str,
        typer.Argument(
            help="aligned_a, aligned_b, aligned_single, aligned_wrapped, aligned_diffuse, base or base_wrapped."
        ),
    ] = "aligned_a",
    limit: Limit = None,
    threads: Threads = None,
) -> None:
    """Audit an embedded model whose refusal heads are known."""
    model = ModelOptions(model=f"demo:{name}", threads=threads)
    settings = {**asdict(ablation), **asdict(search), **answers.settings()}
    config = AuditConfig(model.model, "demo", "demo", limit=limit, store_completions=not run.no_completions, **settings)
    run_and_show(model, config, replace(run, out=run.out or Path("runs") / f"demo-{name}"), output)


@app.command()
@takes
def audit(
    model: ModelOptions,
    prompts: PromptOptions,
    ablation: AblationOptions,
    search: SearchOptions,
    answers: AnswerOptions,
    run: RunOptions,
    output: OutputOptions,
    benign: Benign = "benign",
    split: Split = 0.5,
) -> None:
    """Score every head, find the safety group, show what its ablation does, and write a report."""
    settings = {**asdict(prompts), **asdict(ablation), **asdict(search), **answers.settings()}
    config = AuditConfig(
        **model.settings(),
        benign=benign_beside(prompts, benign),
        split=split,
        store_completions=not run.no_completions,
        **settings,
    )
    run_and_show(model, config, run, output)


@app.command()
@takes
def ships(
    model: ModelOptions,
    prompts: PromptOptions,
    ablation: AblationOptions,
    screened: ScreenOptions,
    output: OutputOptions,
    positions: Positions = 1,
    top: Annotated[int, typer.Option(help="Heads to print.")] = 10,
) -> None:
    """Rank the heads by mean Ships (Eq 9, averaged over the prompts)."""
    from safetyheads.cli.ships import ranked

    kind, asked = ablation.parsed(), prompts_of(prompts)
    at_least(1, positions=positions, top=top)
    screened.check()
    watching = progress_for(output.quiet)
    engine = load_engine(model, watching)
    result = ranked(engine, put_to(engine, asked, prompts), kind, positions, screened, watching)
    if output.json_output:
        print_json(result)
    else:
        show_ranking(f"Mean Ships over {counted(asked)}, in nats: {kind}", result, top)


@app.command()
@takes
def sahara(
    model: ModelOptions,
    prompts: PromptOptions,
    ablation: AblationOptions,
    angle: AngleOptions,
    screened: ScreenOptions,
    output: OutputOptions,
    score: Score = "mean_ships",
    judge: Judge = "paper",
    size: Size = 3,
    positions: Positions = 1,
) -> None:
    """Search for the group of heads with the largest score (Algorithm 1)."""
    from safetyheads.cli.search import ScoreChoice, searched

    choice = ScoreChoice.of(score, positions, judge, angle)
    screened.check()
    kind, asked = ablation.parsed(), prompts_of(prompts)
    at_least(1, size=size, positions=positions)
    choice.refuse_too_few(len(asked))
    watching = progress_for(output.quiet)
    engine = load_engine(model, watching)
    refuse_large(size, engine)
    result = searched(engine, put_to(engine, asked, prompts), kind, choice, size, screened, watching)
    if output.json_output:
        print_json(result)
    else:
        show_steps(f"Sahara by {choice.name} over {counted(asked)}: {kind}", result)


@app.command()
@takes
def asr(
    model: ModelOptions,
    prompts: PromptOptions,
    ablation: AblationOptions,
    answers: AnswerOptions,
    output: OutputOptions,
    heads: Heads = "",
    query_level: QueryLevel = None,
) -> None:
    """Attack success rate with heads ablated, beside the unablated model; answers are not printed."""
    from safetyheads.cli.asr import measured_rates
    from safetyheads.judges.named import judge_named

    kind, group = ablation.parsed(), parse_heads(heads)
    judge_named(answers.judge)
    if group and query_level is not None:
        raise InputError("--heads and --query-level exclude each other")
    at_least(1, query_level=query_level, max_new_tokens=answers.max_new_tokens, top_k=answers.top_k)
    asked = prompts_of(prompts)
    watching = progress_for(output.quiet)
    engine = load_engine(model, watching)
    within(group, engine.n_layers, engine.n_heads)
    asked = put_to(engine, asked, prompts)
    groups: Sequence[Group] = [group] * len(asked)
    label = ", ".join(str(head) for head in group)
    if query_level is not None:
        from safetyheads.answers.success import query_level_groups
        from safetyheads.measures.ships import ships as ships_of

        refuse_large(query_level, engine)
        groups = query_level_groups(ships_of(engine, asked, kind), query_level)
        label = f"each prompt's top {query_level}"
    rows: RateTable = {"none": [()] * len(asked)} | ({label: groups} if label else {})
    result = measured_rates(engine, asked, rows, ablation, answers, watching)
    if output.json_output:
        print_json(result)
    else:
        show_rates(f"Attack success over {counted(asked)}: {kind}", result)


@app.command()
@takes
def report(
    output: OutputOptions,
    run: Annotated[
        Path, typer.Argument(help="Directory of a finished audit, scan or reproduction.", show_default=False)
    ],
    show_completions: ShowCompletions = False,
) -> None:
    """Write the report of a finished run again."""
    from safetyheads.reports.audit import write_report
    from safetyheads.runs.directory import RunDirectory

    opened = RunDirectory.open(run)
    path = write_report(opened, show_completions=show_completions)
    if output.json_output:
        print_json(opened.read_results())
    else:
        stdout().print(f"Report: {path}", soft_wrap=True)


# Commands with modules of their own.
for command in (check, scan, reproduce, judge, compare, history):
    app.command()(takes(command))
# By another name than its function's: eval is Python's own.
app.command("eval")(takes(evaluate))


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: errors become one line and an exit code."""
    try:
        with warnings_as_lines():
            code = typer.main.get_command(app).main(arguments, "safetyheads", standalone_mode=False)
    except _UsageError as error:
        message = getattr(error, "format_message", error.__str__)()
        typer.echo(f"error: {one_line(message)}", err=True)
        code = 2
    except SafetyheadsError as error:
        typer.echo(f"error: {one_line(str(error))}", err=True)
        code = 2 if isinstance(error, InputError) else 1
    except OSError as error:
        # What the parts could not foresee, such as a full disk under stdout.
        typer.echo(f"error: {error.filename or 'the output'} cannot be written: {error.strerror or error}", err=True)
        code = 2 if error.errno in MENDABLE_ERRORS else 1
    except (RuntimeError, MemoryError) as error:
        from safetyheads.model.planning import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        typer.echo("error: out of memory; what was computed is kept. A smaller --dtype or --limit may help", err=True)
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    # typer makes this code of an interrupt by itself, where it sees it first.
    if code == 130:
        typer.echo("interrupted; start it again with the same command to continue", err=True)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

"""``safetyheads eval``: lm-eval's tasks with heads ablated. Owns its options and its table; computes nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from safetyheads.cli.inputs import load_engine, refuse_unusable
from safetyheads.cli.options import AblationOptions, ModelOptions, OutputOptions
from safetyheads.cli.show import print_json, progress_for, signed_text, stdout

_TASKS, _RUN = "Tasks", "Run directory"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Which tasks, and how they are put."""

    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks by lm-eval's names, separated by commas; organism is the demo's own.", rich_help_panel=_TASKS
        ),
    ] = "organism"
    include_path: Annotated[
        list[Path] | None,
        typer.Option(help="Directory with tasks of your own as YAML; repeatable.", rich_help_panel=_TASKS),
    ] = None
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many documents of each task.", rich_help_panel=_TASKS)
    ] = None
    batch_size: Annotated[int, typer.Option(help="Requests in a batch.", rich_help_panel=_TASKS)] = 8
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            help="Examples before each question.", rich_help_panel=_TASKS, show_default="the task's own number, or 0"
        ),
    ] = None
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template", help="Put questions under the model's chat template.", rich_help_panel=_TASKS),
    ] = False
    offline: Annotated[
        bool, typer.Option("--offline", help="Use only data that is on this machine.", rich_help_panel=_TASKS)
    ] = False


def evaluate(
    model: ModelOptions,
    ablation: AblationOptions,
    tasks: TaskOptions,
    output: OutputOptions,
    heads: Annotated[
        str,
        typer.Option(
            help="Groups to ablate, such as 1-3,2-5;2-1: heads separated by commas, groups by semicolons.",
            rich_help_panel="Ablation",
            show_default="vanilla alone",
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run directory; it is continued if it holds part of this run.",
            rich_help_panel=_RUN,
            show_default="nothing is kept",
        ),
    ] = None,
) -> None:
    """Accuracy on lm-eval's tasks with heads ablated, beside the unablated model on the same samples."""
    from safetyheads.integrations.lm_eval import load_tasks
    from safetyheads.integrations.utility import run_evaluation
    from safetyheads.runs.config import EvalConfig

    config = EvalConfig(
        model.model,
        dtype=model.dtype,
        tasks=tuple(name.strip() for name in tasks.tasks.split(",") if name.strip()),
        groups=tuple(heads.split(";")) if heads.strip() else (),
        ablation=ablation.ablation,
        epsilon=ablation.epsilon,
        limit=tasks.limit,
        batch_size=tasks.batch_size,
        n_shots=tasks.num_fewshot,
        chat_template=tasks.chat_template,
        include_paths=tuple(map(str, tasks.include_path or ())),
        offline=tasks.offline,
    )
    if out is not None:
        refuse_unusable(out)
    watching = progress_for(output.quiet)
    with watching.track("reading the tasks", 1):
        loaded = load_tasks(config)
    engine = load_engine(model, watching)
    results = run_evaluation(engine, config, loaded, out, watching, sys.argv)
    if output.json_output:
        print_json(results)
    else:
        show_evaluation(results, out)


def show_evaluation(results: Mapping[str, Any], out: Path | None) -> None:
    """Each metric, vanilla first, and the changes from vanilla."""
    console = stdout()
    tests = sorted({one["difference"]["test"] for one in results["metrics"] if one["difference"]} - {None})
    caption = "change from vanilla on the same samples, [95 % interval]" + (f"; p: {', '.join(tests)}" if tests else "")
    title = f"Tasks of lm-eval {results['settings']['lm_eval']}: {results['ablation']['label']}"
    names = ("task", "metric", "ablated", "value", "n", "change", "gained, lost", "p", "p (Holm)")
    table = Table(*names, title=title, caption=caption)
    for number, one in enumerate(results["metrics"]):
        if number and one["difference"] is None:
            table.add_section()
        metric = one["metric"] if one["unit"] == "whole" else f"{one['metric']}, {one['unit']}"
        table.add_row(one["task"], metric, one["variant"], _value(one), str(one["n"]), *_difference(one["difference"]))
    console.print(table)
    for caveat in results["caveats"]:
        console.print(f"- {caveat}", style="dim", soft_wrap=True)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if out is not None:
        console.print(f"Run: {out}", soft_wrap=True)


def _value(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "not finite"
    value = f"{one['value']:.3f}" if abs(one["value"]) < 1000 else f"{one['value']:.4g}"
    return value + (f" [{one['interval'][0]:.3f}, {one['interval'][1]:.3f}]" if one["interval"] else "")


def _difference(one: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    if one is None or one["change"] is None:
        return "", "", "", ""
    flips = "" if one["gained"] is None else f"{one['gained']}, {one['lost']}"
    p_values = ["" if p is None else f"{p:.2g}" for p in (one["p_value"], one["p_holm"])]
    return signed_text(one["change"], one["interval"]), flips, p_values[0], p_values[1]

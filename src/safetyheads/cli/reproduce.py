"""The command ``reproduce``: the paper's experiments by name. Owns what is refused before a model is read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safetyheads.cli.audit import finish, usable_out
from safetyheads.cli.inputs import load_engine, model_path
from safetyheads.cli.options import Limit, ModelOptions, OutputOptions, RunOptions, Threads

if TYPE_CHECKING:
    from safetyheads.experiments.settings import ReproductionConfig
    from safetyheads.model.engine import Engine

_LIST = "list"


def reproduce(
    run: RunOptions,
    output: OutputOptions,
    experiment: Annotated[
        str, typer.Argument(help="fig2, table3, ... as list prints them; all of them; or list.", show_default=False)
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Aligned models: directories, hub ids or demo:NAME.", show_default="the demo's"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings: models, datasets, templates, sizes.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="What the first model was aligned from, for fig6a and table1.", show_default="the demo's base"
        ),
    ] = None,
    limit: Limit = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto.", show_default="cpu")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or auto.", show_default="float32")
    ] = None,
    threads: Threads = None,
) -> None:
    """Run an experiment of the paper, or all, on any model; by default on the embedded organism."""
    from safetyheads.experiments.catalogue import ALL, chosen
    from safetyheads.experiments.settings import ReproductionConfig

    named = tuple(models or ())
    settings = ReproductionConfig.for_models(named) if config is None else ReproductionConfig.read(config, named)
    given: dict[str, Any] = {"base": base, "limit": limit, "device": device, "dtype": dtype}
    settings = replace(
        settings,
        **{name: value for name, value in given.items() if value is not None},
        store_completions=not run.no_completions,
    )
    if experiment == _LIST:
        _show_list(settings, output)
        return
    experiments = chosen(experiment)
    out = usable_out(run, _default_out(settings))
    for model in (*settings.models, settings.base, settings.related, *settings.templated, *settings.base_models):
        if model:
            model_path(model)
    from safetyheads.cli.show import progress_for
    from safetyheads.cli.show_reproduction import show_outcomes
    from safetyheads.experiments.run import reproduce as run_experiments
    from safetyheads.files import read_json

    watching = progress_for(output.quiet)

    def load(name: str) -> Engine:
        return load_engine(
            ModelOptions(model=name, device=settings.device, dtype=settings.dtype, threads=threads), watching
        )

    results = run_experiments(settings, experiments, out, load, watching, sys.argv, skips=experiment == ALL)
    names, timed = [one.name for one in experiments], read_json(out / "timings.json")["timed"]
    finish(results, out, run, output, lambda found, report: show_outcomes(found, names, report, timed))


def _default_out(config: ReproductionConfig) -> Path:
    """``runs/reproduce-MODELS``."""
    models = "+".join(name.replace(":", "-").rstrip("/").rsplit("/", 1)[-1] for name in config.models)
    return Path("runs") / f"reproduce-{models}"


def _show_list(config: ReproductionConfig, output: OutputOptions) -> None:
    from safetyheads.cli.show import print_json
    from safetyheads.cli.show_reproduction import show_list
    from safetyheads.experiments.catalogue import EXPERIMENTS
    from safetyheads.experiments.run import missing

    if output.json_output:
        print_json(
            {name: {"title": one.title, "costs": one.costs, "needs": one.needs} for name, one in EXPERIMENTS.items()}
        )
    else:
        show_list({name: missing(one, config) for name, one in EXPERIMENTS.items()})

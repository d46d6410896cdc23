"""The command line. Owns options, exit codes and the words of usage errors; every number comes from elsewhere.

Exit codes: 0 done, 1 failed, 2 bad input. torch is not imported before a command needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console

from safetyheads.ablation import Ablation
from safetyheads.config import AuditConfig
from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.heads import Head, parse_heads

if TYPE_CHECKING:
    from safetyheads.engine import Engine
    from safetyheads.prompts import PromptSet
    from safetyheads.subspace import Space

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which attention heads a model's refusals depend on, how concentrated that is, and what ablating them does.",
)

Model = Annotated[
    str, typer.Argument(help="Directory or hub id; demo:NAME is an embedded checkpoint.", show_default=False)
]
Prompts = Annotated[
    str, typer.Option(help="CSV, JSONL or TXT file, or advbench, jailbreakbench, maliciousinstruct, demo.")
]
Benign = Annotated[str, typer.Option(help="Benign prompts, likewise; 'benign' is the package's own list.")]
TemplateOption = Annotated[str | None, typer.Option(help="direct, query_answer, chat, or a string with {query}.")]
System = Annotated[str | None, typer.Option(help="System prompt of the chat template.")]
Column = Annotated[str | None, typer.Option(help="Column of the prompts, where the file has several.")]
Limit = Annotated[int | None, typer.Option(help="Read only the first so many prompts.")]
AblationOption = Annotated[str, typer.Option(help="ua, ua_key, sc, mean_query, mean_key or mean_head_output.")]
Epsilon = Annotated[float, typer.Option(help="Strength of the ablation; 0 is the exact limit.")]
Size = Annotated[int, typer.Option(help="Most heads in a group.")]
Judge = Annotated[str, typer.Option(help="paper or released.")]
NewTokens = Annotated[int, typer.Option(help="Longest answer, in tokens.")]
TopK = Annotated[int, typer.Option(help="1 is greedy; the paper samples with 5.")]
Positions = Annotated[int, typer.Option(help="Answer tokens over which Ships are averaged.")]
Seed = Annotated[int, typer.Option(help="Of the split, the random groups and the sampling.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights, which can run code.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, without completions.")]
Out = Annotated[Path | None, typer.Option(help="Run directory; continued if it holds part of this run.")]

SCORES = ("mean_ships", "refusal_score", "generalized_ships_prompt", "generalized_ships_representation")


@app.command()
def demo(
    name: Annotated[
        str, typer.Argument(help="aligned_a, aligned_b, aligned_single, aligned_diffuse, base, ...")
    ] = "aligned_a",
    ablation: AblationOption = "ua",
    epsilon: Epsilon = 1e-5,
    size: Size = 3,
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Audit an embedded model whose refusal heads are known."""
    config = AuditConfig(f"demo:{name}", "demo", "demo", ablation=ablation, epsilon=epsilon, size=size)
    _audit(config, out or Path("runs") / f"demo-{name}", json_output)


@app.command()
def audit(
    model: Model,
    prompts: Prompts,
    benign: Benign = "benign",
    template: TemplateOption = None,
    system: System = None,
    column: Column = None,
    limit: Limit = None,
    ablation: AblationOption = "ua",
    epsilon: Epsilon = 1e-5,
    size: Size = 3,
    positions: Positions = 1,
    judge: Judge = "paper",
    max_new_tokens: NewTokens = 128,
    top_k: TopK = 1,
    split: Annotated[float, typer.Option(help="Share of the prompts that the search sees.")] = 0.5,
    n_random: Annotated[int, typer.Option(help="Random groups for each size.")] = 20,
    seed: Seed = 0,
    out: Out = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    no_completions: Annotated[bool, typer.Option("--no-completions", help="Store verdicts, not answers.")] = False,
    json_output: Json = False,
) -> None:
    """Score every head, find the safety group, show what its ablation does, and write a report."""
    if prompts == "demo" and benign == "benign":
        benign = "demo"
    config = AuditConfig(
        model, prompts, benign, template, system, column, limit, ablation, epsilon, size, positions, judge,
        max_new_tokens, top_k, split, n_random, seed, dtype, device, not no_completions,
    )  # fmt: skip
    names = [Path(part.rstrip("/")).name.split(".")[0].replace(":", "-") for part in (model, prompts)]
    default = Path("runs") / "-".join([*names, ablation])
    _audit(config, out or default, json_output, threads, trust_remote_code, allow_pickle)


@app.command()
def ships(
    model: Model,
    prompts: Prompts,
    template: TemplateOption = None,
    system: System = None,
    column: Column = None,
    limit: Limit = None,
    ablation: AblationOption = "ua",
    epsilon: Epsilon = 1e-5,
    positions: Positions = 1,
    top: Annotated[int, typer.Option(help="Heads to print.")] = 10,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    json_output: Json = False,
) -> None:
    """Rank all heads by mean Ships (Eq 9, averaged over the prompts)."""
    from safetyheads import cli_output, scoring

    kind = Ablation.parse(ablation, epsilon)
    asked = _prompts(prompts, template, system, column, limit)
    engine = _engine(model, dtype, device, threads, trust_remote_code, allow_pickle)
    scores = scoring.ships(engine, asked, kind, positions).mean()
    ranked, ties = scores.ranked()[:top], scores.ties()
    if json_output:
        heads = [{"head": str(head), "mean_ships": value} for head, value in scores.ranked()]
        _print_json({"unit": "nats", "n": len(asked), "ablation": asdict(kind), "heads": heads})
        return
    title = f"mean Ships over {len(asked)} prompts, {kind}"
    cli_output.show_ranking(Console(), title, "nats", ranked, [tie for tie in ties if tie[0] in dict(ranked)])


@app.command()
def sahara(
    model: Model,
    prompts: Prompts,
    score: Annotated[str, typer.Option(help=", ".join(SCORES))] = "mean_ships",
    size: Size = 3,
    rank: Annotated[int, typer.Option(help="Singular vectors, for Generalized Ships.")] = 1,
    template: TemplateOption = None,
    system: System = None,
    column: Column = None,
    limit: Limit = None,
    ablation: AblationOption = "ua",
    epsilon: Epsilon = 1e-5,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    json_output: Json = False,
) -> None:
    """Search for the group of heads with the largest score (Algorithm 1)."""
    from safetyheads import cli_output, search

    if score not in SCORES:
        raise InputError(f"unknown score {score!r}; known are {', '.join(SCORES)}")
    kind = Ablation.parse(ablation, epsilon)
    asked = _prompts(prompts, template, system, column, limit)
    engine = _engine(model, dtype, device, threads, trust_remote_code, allow_pickle)
    if not 1 <= size <= len(engine.heads):
        raise InputError(f"size {size} is out of range: the model has {len(engine.heads)} heads")
    scorer = _scorer(engine, asked, kind, score, rank)
    trace = search.sahara(scorer, engine.heads, size)
    steps = [
        {"chosen": str(head), "score": value, "ties": [str(other) for other in ties]}
        for head, value, ties in zip(trace.group, trace.scores, trace.ties(), strict=True)
    ]
    if json_output:
        about = {"score": score, "unit": scorer.unit, "n": len(asked), "ablation": asdict(kind)}
        _print_json({**about, "group": [str(head) for head in trace.group], "steps": steps})
        return
    ranked = list(zip(trace.group, trace.scores, strict=True))
    title = f"Sahara by {score} over {len(asked)} prompts, {kind}"
    cli_output.show_ranking(
        Console(), title, scorer.unit, ranked, [(h, *t) for h, t in zip(trace.group, trace.ties(), strict=True) if t]
    )


@app.command()
def asr(
    model: Model,
    prompts: Prompts,
    heads: Annotated[str, typer.Option(help="Heads to ablate, such as 2-26,3-1; none is the vanilla model.")] = "",
    query_level: Annotated[int, typer.Option(help="Each prompt ablates its own top so many heads by Ships.")] = 0,
    template: TemplateOption = None,
    system: System = None,
    column: Column = None,
    limit: Limit = None,
    ablation: AblationOption = "ua",
    epsilon: Epsilon = 1e-5,
    judge: Judge = "paper",
    max_new_tokens: NewTokens = 128,
    top_k: TopK = 1,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    json_output: Json = False,
) -> None:
    """Attack success rate with heads ablated, beside the vanilla model; answers are not printed."""
    from safetyheads import asr as behaviour
    from safetyheads import scoring
    from safetyheads.generation import Sampling
    from safetyheads.heads import within
    from safetyheads.judges import judge_named
    from safetyheads.stats import paired_difference

    kind, group, judging = Ablation.parse(ablation, epsilon), parse_heads(heads), judge_named(judge)
    if group and query_level:
        raise InputError("--heads and --query-level exclude each other")
    asked = _prompts(prompts, template, system, column, limit)
    engine = _engine(model, dtype, device, threads, trust_remote_code, allow_pickle)
    within(group, engine.n_layers, engine.n_heads)
    groups: Sequence[tuple[Head, ...]] = [group] * len(asked)
    if query_level:
        groups = behaviour.query_level_groups(scoring.ships(engine, asked, kind), query_level)
    sampling = Sampling(top_k, seed)
    vanilla = behaviour.attack_success_rate(engine, asked, (), kind, judging, max_new_tokens, sampling)
    ablated = behaviour.query_level_attack_success_rate(engine, asked, groups, kind, judging, max_new_tokens, sampling)
    change = paired_difference(*([row.verdict.complied for row in one.rows] for one in (vanilla, ablated)))
    result = {
        "heads": heads if not query_level else f"each prompt's top {query_level}",
        "ablation": asdict(kind),
        "judge": judging.describe(),
        "vanilla": {"asr": asdict(vanilla.asr), "reasons": vanilla.reasons},
        "ablated": {"asr": asdict(ablated.asr), "reasons": ablated.reasons},
        "change": asdict(change),
    }
    if json_output:
        _print_json(result)
        return
    console = Console()
    console.print(f"vanilla ASR {vanilla.asr}", highlight=False)
    for reason, count in vanilla.reasons.items():
        console.print(f"  {count:4d}  {reason}", highlight=False, markup=False)
    console.print(f"ASR with {result['heads'] or 'no head'} ablated {ablated.asr}", highlight=False)
    for reason, count in ablated.reasons.items():
        console.print(f"  {count:4d}  {reason}", highlight=False, markup=False)
    if change.change is not None and change.interval is not None:
        low, high = change.interval
        words = (
            f"change {change.change:+.2f} [{low:+.2f}, {high:+.2f}], exact McNemar p {change.p_value:.2g}, n {change.n}"
        )
        console.print(words, highlight=False, markup=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    show_completions: Annotated[
        bool, typer.Option("--show-completions", help="Put the answers into the report.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Write the report of a finished run again."""
    from safetyheads.report import write_report
    from safetyheads.storage import RunDirectory

    opened = RunDirectory.open(run)
    path = write_report(opened, show_completions=show_completions)
    if json_output:
        _print_json(opened.read_results())
        return
    Console().print(f"Report: {path}", highlight=False, soft_wrap=True)


@app.command()
def check(
    model: Model,
    longest: Annotated[int, typer.Option(help="Most tokens that a run will reach.")] = 64,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = None,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
    json_output: Json = False,
) -> None:
    """Prove on a model's own weights that ablations are exact; a model where they are not is refused by name."""
    from rich.table import Table

    engine = _engine(model, dtype, device, threads, trust_remote_code, allow_pickle, proved=False)
    proved = engine.check(longest)
    if json_output:
        proofs = [{**asdict(proof), "passed": proof.passed} for proof in proved.proofs]
        _print_json({"proofs": proofs, "capabilities": asdict(proved.capabilities), "notes": list(proved.notes)})
        return
    table = Table("claim", "difference", "allowed", "holds", title=f"{engine.architecture.family}: {model}")
    for proof in proved.proofs:
        table.add_row(proof.name, f"{proof.error:.1e}", f"{proof.tolerance:.0e}", "yes" if proof.passed else "no")
    console = Console()
    console.print(table)
    for note in proved.notes:
        console.print(f"note: {note}", highlight=False)


def _audit(
    config: AuditConfig,
    out: Path,
    json_output: bool,
    threads: int | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    from safetyheads import demo as organism
    from safetyheads.cli_output import TerminalProgress, show_summary
    from safetyheads.judges import judge_named

    judge_named(config.judge)
    _usable(out)
    on_demo_prompts = config.prompts == "demo"
    if not on_demo_prompts:
        from safetyheads.pipeline import read_data

        data = read_data(config)
    engine = _engine(config.model, config.dtype, config.device, threads, trust_remote_code, allow_pickle)
    from safetyheads.pipeline import demo_data, run_audit
    from safetyheads.report import write_report
    from safetyheads.storage import RunDirectory

    if on_demo_prompts:
        data = demo_data()
    name = config.model.removeprefix("demo:")
    planted = organism.PLANTED_HEADS[name] if config.model.startswith("demo:") else None
    watching = TerminalProgress(Console(stderr=True))
    results = run_audit(engine, config, out, data, planted, watching, sys.argv)
    path = write_report(RunDirectory.open(out))
    if json_output:
        _print_json(results)
    else:
        show_summary(Console(), results, str(path))


def _usable(out: Path) -> None:
    """Refuse an output directory that cannot be made, before a model is read."""
    existing = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write {out}: {existing} is not a directory")


def _prompts(
    prompts: str, template: str | None, system: str | None, column: str | None, limit: int | None
) -> PromptSet:
    from safetyheads.prompts import PromptSet

    if prompts == "demo":
        from safetyheads import demo as organism
        from safetyheads.demo.loading import demo_prompts

        read = demo_prompts("harmful", "test", organism.harmful_prompts("test"), with_reference=False)
        read = read[:limit] if limit else read
        return read.with_template(template, system) if template else read
    return PromptSet.read(prompts, template, column=column, system=system, limit=limit)


def _engine(
    model: str,
    dtype: str,
    device: str,
    threads: int | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    proved: bool = True,
) -> Engine:
    """The model, with transformers' own bars and remarks silenced."""
    import torch
    import transformers

    from safetyheads import demo as organism
    from safetyheads.engine import Engine

    if threads is not None:
        if threads < 1:
            raise InputError(f"threads must be at least 1; got {threads}")
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = model
    if model.startswith("demo:"):
        path = str(organism.checkpoint_path(model.removeprefix("demo:")))
    elif not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise InputError(f"no such model directory: {model}")
    return Engine.load(
        path, dtype, device, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, check=proved
    )


def _scorer(engine: Engine, asked: PromptSet, kind: Ablation, score: str, rank: int) -> Any:
    from safetyheads import refusal, scoring
    from safetyheads.asr import answers_under
    from safetyheads.judges import KeywordJudge

    if score == "mean_ships":
        return scoring.mean_ships(engine, asked, kind)
    if score == "refusal_score":
        (answers,) = answers_under(engine, asked, [()], kind, KeywordJudge(), 32)
        openers = refusal.openers_of(engine, answers)
        shown = ", ".join(f"{opener.text!r} x {opener.count}" for opener in openers)
        typer.echo(f"openers of refusals: {shown}", err=True)
        return refusal.refusal_score(engine, asked, kind, openers)
    space: Space = "prompt" if score.endswith("prompt") else "representation"
    return scoring.generalized_ships(engine, asked, kind, space, rank)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: errors become one line and an exit code."""
    try:
        code = typer.main.get_command(app).main(arguments, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as shown:
        typer.echo(shown.format_message())
        code = 2
    except click.ClickException as error:
        typer.echo(f"error: {' '.join(error.format_message().split())}", err=True)
        code = 2
    except SafetyheadsError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        code = 2 if isinstance(error, InputError) else 1
    except (KeyboardInterrupt, click.Abort):
        typer.echo("interrupted; the same command goes on where it stopped", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()

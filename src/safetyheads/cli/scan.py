"""``safetyheads scan``: every head's ASR. Owns its options and what it prints; every number comes from elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from safetyheads.cli.audit import finish, planted_heads, usable_out
from safetyheads.cli.inputs import benign_beside, default_out, load_engine
from safetyheads.cli.options import (
    AblationOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    RunOptions,
)
from safetyheads.cli.show import progress_for, rate_text, signed_text, stdout
from safetyheads.runs.config import ScanConfig

_ANSWERS, _BESIDE = "Answers", "Beside the single heads"
_SHOWN = 10
_TOPS = (3, 10)
ROLES = {
    "refusal": "carries refusal",
    "mixed": "frees harmful answers, costs benign ones",
    "over_refusal": "ablated, benign prompts are refused",
    "damage": "ablated, benign answers are lost",
    "none": "",
}
"""What a head's role is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedOptions:
    """How answers are made and judged."""

    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="paper, released, phrases, a judge model, endpoint:MODEL or python:MODULE:FUNCTION; repeatable, the "
            "first one leads.",
            rich_help_panel=_ANSWERS,
            show_default="paper",
        ),
    ] = None
    judge_device: Annotated[
        str, typer.Option(help="Where judge models run: cpu, cuda or cuda:N.", rich_help_panel=_ANSWERS)
    ] = "cpu"
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=_ANSWERS)] = 128
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 1 is greedy.", rich_help_panel=_ANSWERS)] = 1
    n_seeds: Annotated[int, typer.Option(help="Sampled answers to each prompt.", rich_help_panel=_ANSWERS)] = 1
    seed: Annotated[int, typer.Option(help="The first seed.", rich_help_panel=_ANSWERS)] = 0
    full_answers: Annotated[
        bool,
        typer.Option("--full-answers", help="Go on to the end after every judge is final.", rich_help_panel=_ANSWERS),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BesideOptions:
    """What is scanned beside every head alone."""

    further_epsilon: Annotated[
        list[float] | None,
        typer.Option(help="Scan every head at this strength too; repeatable.", rich_help_panel=_BESIDE),
    ] = None
    group: Annotated[
        list[str] | None,
        typer.Option(help="Scan this group too, such as 2-26,3-1; repeatable.", rich_help_panel=_BESIDE),
    ] = None
    pairs: Annotated[int, typer.Option(help="All pairs among so many strongest heads.", rich_help_panel=_BESIDE)] = 0
    prefixes: Annotated[
        int, typer.Option(help="Sahara's groups of 1 to so many heads, by mean Ships.", rich_help_panel=_BESIDE)
    ] = 0
    n_random: Annotated[
        int, typer.Option(help="Random groups to compare each of these with.", rich_help_panel=_BESIDE)
    ] = 0
    query_level: Annotated[
        int, typer.Option(help="Each prompt's own 1 to so many top heads by Ships.", rich_help_panel=_BESIDE)
    ] = 0
    no_scores: Annotated[
        bool, typer.Option("--no-scores", help="Measure no score to hold against the ASR.", rich_help_panel=_BESIDE)
    ] = False


def scan(
    model: ModelOptions,
    prompts: PromptOptions,
    ablation: AblationOptions,
    answers: JudgedOptions,
    beside: BesideOptions,
    run: RunOptions,
    output: OutputOptions,
    benign: Annotated[
        str,
        typer.Option(
            help="Benign prompts: a file, jailbreakbench_benign, demo, benign (the package's own list), or none.",
            rich_help_panel="Prompts",
        ),
    ] = "benign",
) -> None:
    """Ablate every head alone and judge the answers (Fig 4b), exactly, beside what it does to benign ones."""
    from safetyheads.judges.named import judges_named

    config = _config(model, prompts, ablation, answers, beside, run, benign)
    out = usable_out(run, Path(f"{default_out(config)}-scan"))
    judges_named(config.judges, config.judge_device)
    from safetyheads.runs.scan_run import read_sets, run_scan

    sets, watching = read_sets(config), progress_for(output.quiet)
    engine = load_engine(model, watching)
    results = run_scan(engine, config, out, sets, planted_heads(model), watching, sys.argv)
    finish(results, out, run, output, show_scan)


def _config(
    model: ModelOptions,
    prompts: PromptOptions,
    ablation: AblationOptions,
    answers: JudgedOptions,
    beside: BesideOptions,
    run: RunOptions,
    benign: str,
) -> ScanConfig:
    return ScanConfig(
        **model.settings(),
        **asdict(prompts),
        **asdict(ablation),
        benign=benign_beside(prompts, benign),
        max_new_tokens=answers.max_new_tokens,
        top_k=answers.top_k,
        seed=answers.seed,
        store_completions=not run.no_completions,
        judges=tuple(answers.judge or ("paper",)),
        judge_device=answers.judge_device,
        n_seeds=answers.n_seeds,
        full_answers=answers.full_answers,
        epsilons=tuple(beside.further_epsilon or ()),
        groups=tuple(beside.group or ()),
        pairs=beside.pairs,
        prefixes=beside.prefixes,
        n_random=beside.n_random,
        query_level=beside.query_level,
        scores=not beside.no_scores,
    )


def show_scan(results: Mapping[str, Any], report: Path) -> None:
    """The end of a scan: heads, groups, proxies, judges, and last, where the eye is, the sentence and the report."""
    console = stdout()
    console.print(_heads(results))
    for table in (_groups(results), _proxies(results), _judges(results)):
        if table is not None:
            console.print(table)
    if results["planted_heads"] is not None:
        console.print(f"Planted heads: {', '.join(results['planted_heads']) or 'none'}")
    for caveat in results["caveats"]:
        console.print(f"- {caveat}", style="dim", soft_wrap=True)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    console.print(economy_line(results["economy"]), soft_wrap=True)
    console.print(scan_sentence(results), soft_wrap=True)
    console.print(f"Report: {report}", soft_wrap=True)


def scan_sentence(results: Mapping[str, Any]) -> str:
    """How many heads differ, and what could not have been seen."""
    statistics, heads = results["statistics"], results["heads"]
    differing = [head for head in heads if head["change"]["differs"]]
    strongest = max(heads, key=lambda head: head["asr"]["rate"] or 0.0)
    detectable = statistics["smallest_detectable_change"]
    seen = (
        f"with {statistics['n']} prompts no head could have been seen to"
        if detectable["flips"] is None
        else f"it takes {detectable['flips']} of {detectable['n']} prompts that all change one way"
    )
    return (
        f"{len(differing)} of {len(heads)} heads, ablated alone, change the ASR after Holm's correction ({seen}); "
        f"unablated {rate_text(results['vanilla']['harmful']['asr'])}, the strongest, {strongest['head']}, "
        f"{rate_text(strongest['asr'])}; judge {results['lead_judge']}."
    )


def economy_line(economy: Mapping[str, Any]) -> str:
    """What the answers cost."""
    saved = economy["tokens_plain"] / economy["tokens_computed"] if economy["tokens_computed"] else 1.0
    return (
        f"{economy['n_rows']} answers: {economy['n_drafted']} as the unablated model's, {economy['n_continued']} "
        f"decoded from the first difference on, {economy['n_near_ties']} near-ties decoded plainly, "
        f"{economy['n_incomplete']} ended once every judge was final; {economy['tokens_computed']:.0f} tokens "
        f"computed, at least {saved:.1f} times as many otherwise"
    )


def _heads(results: Mapping[str, Any]) -> Table:
    has_benign = "benign" in results["vanilla"]
    names = ["head", "ASR alone", "change", "p (Holm)", "p (BH)"]
    names += ["benign refused", "benign changed", "KL, nats", "so it"] if has_benign else []
    n_heads = len(results["heads"])
    title = f"Heads of highest ASR, each ablated alone: {results['ablation']['label']}, {results['sampling']['name']}"
    ranked = sorted(results["heads"], key=lambda head: -(head["asr"]["rate"] or 0.0))
    n_differing = sum(head["change"]["differs"] for head in ranked)
    shown = ranked[: max(_SHOWN, min(n_differing, 3 * _SHOWN))]
    caption = None if len(shown) == n_heads else f"{n_heads - len(shown)} more heads in the report"
    table = Table(*names, title=title, caption=caption)
    for head in shown:
        change, benign = head["change"], head["benign"]
        row = [
            head["head"] + (" *" if change["differs"] else ""),
            rate_text(head["asr"]),
            "" if change["change"] is None else signed_text(change["change"], change["interval"]),
            f"{change['p_holm']:.2g}",
            f"{change['p_bh']:.2g}",
        ]
        if benign is not None:
            row += [_share(benign["refused"]), _share(benign["changed"]), f"{benign['kl']['mean']:.2g}"]
            row.append(ROLES[head["role"]])
        table.add_row(*row)
    return table


def _share(rate: Mapping[str, Any]) -> str:
    return "" if rate["rate"] is None else f"{rate['rate']:.2f}"


def _groups(results: Mapping[str, Any]) -> Table | None:
    rows = [("each prompt's top " + str(own["size"]), own) for own in results["query_level"]]
    groups = [(", ".join(group["heads"]), group) for group in results["groups"]]
    if not rows and not groups:
        return None
    table = Table("ablated", "ASR", "change", "random groups", "benign kept", title="Groups")
    for label, one in [*groups, *rows]:
        change, random, kept = one["change"], one.get("random"), one.get("benign_kept")
        table.add_row(
            label,
            rate_text(one["asr"]),
            "" if change["change"] is None else signed_text(change["change"], change["interval"]),
            "" if random is None else f"{random['mean']:.2f}",
            "" if kept is None else rate_text(kept),
        )
    return table


def _proxies(results: Mapping[str, Any]) -> Table | None:
    """Each score against the ASR."""
    proxies = results["proxies"]
    if proxies is None:
        return None
    ranked: Sequence[Mapping[str, Any]] = [*proxies["scores"], *([proxies["ceiling"]] if proxies["ceiling"] else [])]
    sizes = [size["k"] for size in ranked[0]["sizes"] if size["k"] in _TOPS]
    columns = [f"top {k} that differ" for k in sizes] + [f"regret, top {k}" for k in sizes]
    caption = "regret: ASR given away, on half of the prompts; ceiling: the ASR of the other half as the score"
    title = f"Scores against the ASR of every head, {ranked[0]['n_differing']} of which differ"
    table = Table("score", "Spearman", "AUC", *columns, title=title, caption=caption)
    for one in ranked:
        own = [size for size in one["sizes"] if size["k"] in sizes]
        hits = ["" if size["precision"] is None else str(size["precision"]["count"]) for size in own]
        regrets = [_number(size["regret_on_halves"]) for size in own]
        name = "ceiling" if one is proxies["ceiling"] else one["score"]
        table.add_row(name, _number(one["spearman"]), _number(one["auc"]), *hits, *regrets)
    return table


def _kappa(found: Mapping[str, Any]) -> str:
    return "" if found["kappa"] is None else signed_text(found["kappa"], found["interval"])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _judges(results: Mapping[str, Any]) -> Table | None:
    """Judges beside each other, where there are several."""
    found = results["agreement"]
    if found is None:
        return None
    table = Table("judges", "kappa, complied or not", "kappa, three classes", "differ", "rows", title="Agreement")
    for pair in found["pairs"]:
        kappas = [_kappa(pair[name]) for name in ("compliance", "classes")]
        table.add_row(f"{pair['first']}, {pair['second']}", *kappas, str(pair["count"]), str(pair["n"]))
    return table

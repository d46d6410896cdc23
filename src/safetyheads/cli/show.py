"""Prints progress, tables and summaries on the terminal.

Results go to stdout; progress, notes and errors to stderr. Every number stands as ``value [low, high] n``; where all
numbers of a table share n, it stands below the table.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from safetyheads.ablation import Ablation
from safetyheads.runs.progress import Progress, Silent

if TYPE_CHECKING:
    from safetyheads.reports.page import Cell as ReportCell
    from safetyheads.runs.compare import Comparison
    from safetyheads.runs.history import History
    from safetyheads.runs.rejudge import Rejudged

PATIENCE = 2.0
"""Seconds after which a stage gets a progress bar."""
ROLES = {
    "refusal": "carries refusal",
    "mixed": "frees harmful answers, costs benign ones",
    "over_refusal": "ablated, benign prompts are refused",
    "damage": "ablated, benign answers are lost",
    "none": "",
}
"""Words for what a head does in a scan."""
_WIDTH_OFF_TERMINAL = 140
_ROWS_SHOWN = 24
_HEADS_SHOWN = 10
_NAMES_SHOWN = 12
_GAP = 2
_COMFORT = 20
_BORDERS = {"concentrated": "yellow", "none_found": "green"}

Found: TypeAlias = Mapping[str, Any]
"""A part of the results, as JSON has it."""


# Streams and progress


def stdout() -> Console:
    """The console of results, where brackets are text; as wide as COLUMNS says where it is no terminal."""
    console = Console(markup=False, highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(markup=False, highlight=False, width=_WIDTH_OFF_TERMINAL)


def print_error(line: str) -> None:
    """Print one line on stderr."""
    sys.stderr.write(f"{one_line(line)}\n")


def one_line(text: str) -> str:
    """Join a text's lines."""
    return " ".join(text.split())


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print this package's warnings as one line each and leave out those of libraries."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("safetyheads"):
            print_error(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def progress_for(quiet: bool) -> Progress:
    """The progress display of a run."""
    return Silent() if quiet else RichProgress(Console(stderr=True, markup=False, highlight=False))


class RichProgress:
    """Shows bars on a terminal for stages that last over two seconds; elsewhere only lines."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str | Callable[[], str]) -> None:
        """Print one line on stderr."""
        self.console.print(line if isinstance(line, str) else line(), style="dim", soft_wrap=True)

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show the count, the rate and the time left."""
        if not self.console.is_terminal:
            yield lambda _: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
        with _PatientBars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=total)
            yield lambda count: bars.advance(task, count)


class _PatientBars(Bars):
    """Draws nothing for the first ``PATIENCE`` seconds: most stages are over by then."""

    def __init__(self, *columns: ProgressColumn, console: Console, transient: bool) -> None:
        self._started = time.monotonic()
        super().__init__(*columns, console=console, transient=transient)

    def get_renderables(self) -> Iterator[RenderableType]:
        if time.monotonic() - self._started >= PATIENCE:
            yield from super().get_renderables()
        else:
            yield ""


class _Speed(ProgressColumn):
    """Items a second; seconds an item where they are slow."""

    def render(self, task: Task) -> Text:
        if not task.completed or not task.elapsed:
            return Text("")
        rate = task.completed / task.elapsed
        return Text(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")


# Numbers and tables


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a cell."""

    text: str = ""
    interval: str = ""
    n: str = ""
    p: str = ""
    style: str = ""

    def written(self, between: str = " ", with_n: bool = True) -> Text:
        """The number with its interval, n and p; ``between`` them a blank or a line break."""
        parts = [part for part in (self.interval, self.n if with_n else "", self.p) if part]
        text = Text(self.text, style=self.style)
        return text.append(between + between.join(parts), style="dim") if parts else text

    def __str__(self) -> str:
        return self.written().plain


Cell: TypeAlias = str | Text | Number
"""What stands in a table: texts to the left, numbers to the right."""
Column: TypeAlias = Callable[[Any], Cell]
"""Makes a row's cell of what the row shows."""


def plain(value: float | None, form: str = ".2f") -> Number:
    """A number without interval."""
    return Number() if value is None else Number(format(value, form))


def rate(found: Any) -> Number:
    """``0.98 [0.93, 0.99] n 96``."""
    if found is None:
        return Number()
    value, bounds, n = (get(found, name) for name in ("rate", "interval", "n"))
    return Number("not measured" if value is None else f"{value:.2f}", _interval(bounds, ".2f"), f"n {n:,}")


def signed(value: float | None, interval: Sequence[float] | None = None, n: int | None = None) -> Number:
    """``+0.31 [+0.18, +0.45] n 96``."""
    if value is None:
        return Number()
    # Adding 0 takes the sign from what rounds to nothing: -0.00 would be read as a loss.
    return Number(f"{round(value, 2) + 0.0:+.2f}", _interval(interval, "+.2f"), "" if n is None else f"n {n:,}")


def change(found: Found | None) -> Number:
    """A paired change."""
    return Number() if found is None else signed(found["change"], found["interval"], found["n"])


def _interval(bounds: Sequence[float] | None, form: str) -> str:
    return f"[{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else ""


def get(item: Any, path: str) -> Any:
    """What stands at ``path``, such as ``asr_change.p_holm``; None where a part of it is None or absent."""
    for name in path.split("."):
        if item is None:
            return None
        item = item.get(name) if isinstance(item, Mapping) else getattr(item, name)
    return item


def texts(path: str) -> Column:
    """A column of texts or lists of names."""

    def cell(item: Any) -> Cell:
        value = get(item, path)
        return "" if value is None else value if isinstance(value, str) else some(value)

    return cell


def plains(path: str, form: str = ".2f") -> Column:
    """A column of numbers without interval."""
    return lambda item: plain(get(item, path), form)


def rates(path: str) -> Column:
    """A column of rates."""
    return lambda item: rate(get(item, path))


def changes(path: str) -> Column:
    """A column of paired changes."""
    return lambda item: change(get(item, path))


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def print_items(title: str, items: Iterable[Any], columns: Mapping[str, Column], caption: str = "") -> None:
    """Print a row for each item."""
    print_table(title, list(columns), [[cell(item) for cell in columns.values()] for item in items], caption)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "", lines: bool = False
) -> None:
    """Print a table that breaks no number, however narrow the terminal.

    Intervals stand beside their numbers where there is room, else below them; where there is none at all, each row
    becomes a paragraph. n stands below the table where all of its numbers share it.
    """
    console = stdout()
    ns = {cell.n for row in rows for cell in row if isinstance(cell, Number) and cell.n}
    shared = len(ns) == 1
    # A column without any cell is of numbers, which take no room.
    are_text = [any(isinstance(row[at], str | Text) and str(row[at]) for row in rows) for at in range(len(columns))]
    console.print(Text(f"\n{title}", style="bold"))
    for between, whole_titles, comfort in ((" ", True, _COMFORT), (" ", False, _COMFORT), ("\n", False, 0)):
        cells = [[_text(cell, between, not shared) for cell in row] for row in rows]
        table, least = _laid_out(columns, cells, are_text, whole_titles, comfort)
        if least <= console.width:
            table.show_lines = lines
            console.print(table)
            break
    else:
        console.print(_stacked(columns, rows, are_text, not shared))
    if caption or shared:
        below = [caption, f"{min(ns)} behind every interval." if shared else ""]
        console.print(" ".join(filter(None, below)), style="dim")


def _text(cell: Cell, between: str, with_n: bool) -> Text:
    if isinstance(cell, Number):
        return cell.written(between, with_n)
    return cell if isinstance(cell, Text) else Text(cell)


def _laid_out(
    columns: Sequence[str], rows: Sequence[Sequence[Text]], are_text: Sequence[bool], whole_titles: bool, comfort: int
) -> tuple[Table, int]:
    """The table, and the width from which no number breaks and texts have some comfort."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns), pad_edge=False, padding=(0, 1, 0, 0))
    least = 0
    for at, (column, is_text) in enumerate(zip(columns, are_text, strict=True)):
        lines = [line for row in rows for line in row[at].plain.split("\n")]
        longest = max(map(len, lines), default=0)
        words = [column] if whole_titles else column.split()
        words += [word for line in lines for word in line.split()] if is_text else []
        width = max(1, min(longest, comfort) if is_text else longest, *map(len, words))
        # Rich narrows the columns that have no width: those of texts.
        table.add_column(column, justify="left" if is_text else "right", width=None if is_text else width)
        least += width + _GAP * bool(at)
    for row in rows:
        table.add_row(*row)
    return table, least


def _stacked(columns: Sequence[str], rows: Sequence[Sequence[Cell]], are_text: Sequence[bool], with_n: bool) -> Text:
    """A paragraph a row."""
    text = Text()
    for row in rows:
        cells = [_text(cell, " ", with_n).plain for cell in row]
        first = are_text.index(True) if True in are_text else 0
        others = [(column, cell) for at, (column, cell) in enumerate(zip(columns, cells, strict=True)) if at != first]
        shown = "; ".join(f"{column}: {one_line(cell)}" for column, cell in others if cell not in ("", "–"))
        text.append("\n" * bool(text)).append(f"{one_line(cells[first])}\n", style="bold").append(shown)
    return text


def print_facts(title: str, facts: Mapping[str, Cell]) -> None:
    """Print names with their values."""
    print_table(title, ("", ""), [(name, _text(value, " ", True)) for name, value in facts.items()])


def print_lines(lines: Iterable[str], style: str | None = None) -> None:
    """Print lines that the terminal may wrap."""
    for line in lines:
        stdout().print(line, style=style, soft_wrap=True)


def print_cautions(results: Found) -> None:
    """Print the caveats and what happened on the way."""
    print_lines((f"- {caveat}" for caveat in results["caveats"]), "dim")
    print_warnings(results)


def print_warnings(results: Found) -> None:
    """Print what happened on the way."""
    print_lines((f"warning: {warning}" for warning in results["warnings"]), "yellow")


# Audits and scans


def show_audit(results: Found, report: Path) -> None:
    """Top heads, the lead's groups, and last, where the eye is, the verdict and the report."""
    verdict, behaviour, lead = results["verdict"], results["behaviour"], results["lead_score"]
    print_items(
        "Top heads by mean Ships, each ablated alone",
        behaviour["heads"],
        {
            "head": texts("head"),
            "mean Ships": plains("mean_ships.mean", ".3g"),
            "on benign": plains("benign_ships.mean", ".3g"),
            "refusal score": plains("refusal_score.mean", "+.3g"),
            "ASR alone": rates("asr"),
            "change": changes("asr_change"),
            "p (Holm)": plains("asr_change.p_holm", ".2g"),
        },
    )
    others = ", ".join(name for name in results["sahara"] if name != lead)
    groups = [group for group in behaviour["groups"] if group["scorer"] == lead]
    print_items(
        f"Groups found by {lead}, on the test half ([95 % interval], (range); exact McNemar)",
        [{"size": 0, "heads": ["none"], **behaviour["vanilla"]}, *groups],
        {
            "size": plains("size", "d"),
            "heads": texts("heads"),
            "ASR": rates("asr"),
            "change": changes("asr_change"),
            "p": plains("asr_change.p_value", ".2g"),
            "random groups": _random,
            "benign kept": rates("benign_kept"),
        },
        f"Found by {others}: in the report." if others else "",
    )
    _show_by_judge([{"heads": ["none"], **behaviour["vanilla"]}, *groups], results)
    _show_concentration(results.get("concentration"))
    _show_planted(results["planted_heads"])
    print_cautions(results)
    border = _BORDERS.get(verdict["label"], "blue")
    stdout().print(Panel(verdict["sentence"], title=verdict["label"].replace("_", " "), border_style=border))
    print_lines([*(f"- {reason}" for reason in verdict["reasons"]), f"Report: {report}"])


def _show_by_judge(groups: Sequence[Found], results: Found) -> None:
    """ASR by each judge, where there are several."""
    names = [judge["name"] for judge in results.get("judges", ())]
    if len(names) > 1:
        columns = {name: rates(f"by_judge.{name}") for name in names}
        print_items("ASR by judge", groups, {"ablated": texts("heads"), **columns})


def _random(group: Found) -> Number:
    control = group.get("random")
    if not control:
        return Number()
    bounds = f"({control['low']:.2f} to {control['high']:.2f})" if "low" in control else ""
    return Number(f"{control['mean']:.2f}", bounds)


def _show_concentration(found: Found | None) -> None:
    if found is None or found["value"] is None:
        return
    sizes = f"1 to {len(found['sizes'])} heads" if len(found["sizes"]) > 1 else "one head"
    against = f"{found['n_random']} random groups each" if found["n_random"] else found["against"]
    number = signed(found["value"], found["interval"], found["n"])
    print_lines([f"\nConcentration: {number} (mean gap of ASR to {against}, {sizes})"])


def _show_planted(planted: Sequence[str] | None) -> None:
    if planted is not None:
        print_lines([f"Planted heads: {', '.join(planted) or 'none'}"])


def show_scan(results: Found, report: Path) -> None:
    """Heads, groups, scores, judges and costs, and last, where the eye is, the summary and the report."""
    _show_scanned_heads(results)
    own = [{**group, "heads": [f"each prompt's top {group['size']}"]} for group in results["query_level"]]
    if groups := [*results["groups"], *own]:
        columns = {"ablated": texts("heads"), "ASR": rates("asr"), "change": changes("change")}
        print_items("Groups", groups, columns | {"random groups": _random, "benign kept": rates("benign_kept")})
    _show_scores(results["proxies"])
    if results["agreement"] is not None:
        print_items(
            "Agreement of judges",
            results["agreement"]["pairs"],
            {
                "judges": lambda pair: f"{pair['first']}, {pair['second']}",
                "kappa, complied or not": lambda pair: _kappa(pair["compliance"]),
                "kappa, three classes": lambda pair: _kappa(pair["classes"]),
                "differ": plains("count", ","),
                "answers": plains("n", ","),
            },
        )
    _show_costs(results["economy"])
    _show_concentration(results["concentration"])
    _show_planted(results["planted_heads"])
    print_cautions(results)
    heads, detectable = results["heads"], results["statistics"]["smallest_detectable_change"]
    strongest = max(heads, key=lambda head: head["asr"]["rate"] or 0.0)
    flips = "more than all" if detectable["flips"] is None else detectable["flips"]
    print_facts(
        "Summary",
        {
            "heads that change the ASR (Holm)": f"{sum(head['change']['differs'] for head in heads)} of {len(heads)}",
            "prompts that must change for that": f"{flips} of {detectable['n']}",
            "ASR, nothing ablated": rate(results["vanilla"]["harmful"]["asr"]),
            f"ASR, strongest head {strongest['head']}": rate(strongest["asr"]),
            "judge": results["lead_judge"],
        },
    )
    print_lines([f"Report: {report}"])


def _show_scanned_heads(results: Found) -> None:
    ranked = sorted(results["heads"], key=lambda head: -(head["asr"]["rate"] or 0.0))
    n_differing = sum(head["change"]["differs"] for head in ranked)
    shown = ranked[: max(_HEADS_SHOWN, min(n_differing, 3 * _HEADS_SHOWN))]
    columns: dict[str, Column] = {
        "head": lambda head: head["head"] + " *" * head["change"]["differs"],
        "ASR alone": rates("asr"),
        "change": changes("change"),
        "p (Holm)": plains("change.p_holm", ".2g"),
        "p (BH)": plains("change.p_bh", ".2g"),
    }
    if "benign" in results["vanilla"]:
        columns |= {
            "benign refused": plains("benign.refused.rate"),
            "benign changed": plains("benign.changed.rate"),
            "KL, nats": plains("benign.kl.mean", ".2g"),
            "so it": lambda head: ROLES[head["role"]],
        }
    title = f"Heads of highest ASR, each ablated alone: {results['ablation']['label']}, {results['sampling']['name']}"
    n_more = len(ranked) - len(shown)
    print_items(title, shown, columns, f"{n_more} more heads in the report." if n_more else "")


def _show_scores(proxies: Found | None) -> None:
    """Each score against the ASR."""
    if proxies is None:
        return
    scores = [*proxies["scores"], *([{**proxies["ceiling"], "score": "ceiling"}] if proxies["ceiling"] else [])]

    def of_size(at: int, path: str, form: str) -> Column:
        return lambda score: plain(get(score["sizes"][at], path), form)

    columns = {"score": texts("score"), "Spearman": plains("spearman"), "AUC": plains("auc")}
    sizes = [(at, size["k"]) for at, size in enumerate(scores[0]["sizes"]) if size["k"] in (3, 10)]
    columns |= {f"top {k} that differ": of_size(at, "precision.count", "d") for at, k in sizes}
    columns |= {f"regret, top {k}": of_size(at, "regret_on_halves", ".2f") for at, k in sizes}
    print_items(
        f"Scores against the ASR of every head, {scores[0]['n_differing']} of which differ",
        scores,
        columns,
        "Regret: ASR given away, on half of the prompts. Ceiling: the ASR of the other half as the score.",
    )


def _kappa(found: Any) -> Number:
    return signed(get(found, "kappa"), get(found, "interval"))


def _show_costs(economy: Found) -> None:
    print_facts(
        "What the answers cost",
        {
            "answers": f"{economy['n_rows']:,}",
            "equal to the unablated model's": f"{economy['n_drafted']:,}",
            "decoded from the first difference on": f"{economy['n_continued']:,}",
            "near-ties, decoded plainly": f"{economy['n_near_ties']:,}",
            "ended once every judge was final": f"{economy['n_incomplete']:,}",
            "tokens computed": f"{economy['tokens_computed']:,.0f}",
            "tokens of plain decoding, at least": f"{economy['tokens_plain']:,}",
        },
    )


# Scores, searches, rates and tasks


def show_ranking(found: Found, top: int) -> None:
    """The ``top`` heads, best first, which of them tie, and what a screening left open."""
    tied = {head: [other for other in group if other != head] for group in found["ties"] for head in group}
    print_items(
        f"Mean Ships over {found['n']} prompts, in nats: {_ablation(found)}",
        list(enumerate(found["heads"][:top], start=1)),
        {
            "rank": lambda row: plain(row[0], "d"),
            "head": lambda row: row[1]["head"],
            "mean [95 %, Student]": lambda row: Number(
                f"{row[1]['mean']:.6g}", _interval(row[1]["interval"], ".3g"), f"n {row[1]['n']}"
            ),
            "ties with": lambda row: some(tied.get(row[1]["head"], [])),
        },
    )
    if "screening" in found:
        print_items(
            "Pairs that the screening proposed, in nats",
            found["screening"]["pairs"],
            {
                "heads": texts("heads"),
                "together": plains("together", ".4g"),
                "alone": lambda pair: " + ".join(f"{score:.4g}" for score in pair["alone"]),
                "beyond the sum": plains("synergy", "+.4g"),
            },
        )
        print_lines([f"Screened: {found['screening']['missed']['sentence']}."])
    print_warnings(found)


def show_steps(found: Found) -> None:
    """Sahara's steps with ties, and the openers where the score has some."""
    if found["openers"]:
        shown = ", ".join(f"{opener['text']!r} ({opener['count']})" for opener in found["openers"])
        print_lines([f"Openers of the model's own refusals: {shown}"])
    print_items(
        f"Sahara by {found['score']} over {found['n']} prompts: {_ablation(found)}",
        [{"step": number, **step} for number, step in enumerate(found["steps"], start=1)],
        {
            "step": plains("step", "d"),
            "head": texts("chosen"),
            f"score of the group, {found['unit']}": plains("score", ".6g"),
            "next best": lambda step: ", ".join(f"{head} ({score:.4g})" for head, score in step["runners_up"][:2]),
            "ties with": texts("ties"),
        },
    )
    screened = enumerate(found.get("screening", ()), start=1)
    print_lines(f"Step {number}, screened: {step['missed']['sentence']}." for number, step in screened)
    print_warnings(found)
    print_lines([f"Group: {','.join(found['group'])}"])


def show_rates(found: Found) -> None:
    """ASR of each group beside the unablated model's, and why answers counted as they did."""
    groups = found["rates"]
    print_items(
        f"Attack success over {found['n']} prompts: {_ablation(found)}",
        groups,
        {
            "ablated": texts("heads"),
            "ASR": rates("asr"),
            "refused": rates("refused"),
            "incoherent": rates("incoherent"),
            "change": changes("change"),
            "p": plains("change.p_value", ".2g"),
        },
    )
    _show_by_judge(groups, found)
    reasons = dict.fromkeys(reason for group in groups for reason in group["reasons"])
    counts = [(reason, *(plain(group["reasons"].get(reason, 0), "d") for group in groups)) for reason in reasons]
    print_table("Why, in answers", ("reason", *(group["heads"] for group in groups)), counts)
    print_cautions(found)


def _ablation(found: Found) -> str:
    return str(Ablation(found["ablation"]["name"], found["ablation"]["epsilon"]))


def show_evaluation(results: Found, out: Path) -> None:
    """Each metric, vanilla first, and the changes from vanilla."""

    def value(metric: Found) -> Number:
        shown, n = metric["value"], f"n {metric['n']:,}"
        if shown is None:
            return Number("not finite", n=n)
        return Number(format(shown, ".3f" if abs(shown) < 1000 else ".4g"), _interval(metric["interval"], ".3f"), n)

    def flips(metric: Found) -> Number:
        found = metric["difference"]
        return Number() if found is None or found["gained"] is None else Number(f"{found['gained']}, {found['lost']}")

    tests = sorted({metric["difference"]["test"] for metric in results["metrics"] if metric["difference"]} - {None})
    print_items(
        f"Tasks of lm-eval {results['settings']['lm_eval']}: {results['ablation']['label']}",
        results["metrics"],
        {
            "task": texts("task"),
            "metric": lambda metric: metric["metric"] + f", {metric['unit']}" * (metric["unit"] != "whole"),
            "ablated": texts("variant"),
            "value": value,
            "change": lambda metric: signed(get(metric, "difference.change"), get(metric, "difference.interval")),
            "gained, lost": flips,
            "p": plains("difference.p_value", ".2g"),
            "p (Holm)": plains("difference.p_holm", ".2g"),
        },
        "Change from vanilla on the same samples, [95 % interval]" + "".join(f"; p: {test}" for test in tests) + ".",
    )
    print_cautions(results)
    print_lines([f"Run: {out}"])


# Finished runs


def show_rejudged(found: Sequence[Rejudged], report: Path) -> None:
    """Rates of the run's judge and of another one, where they differ most first, and how far they agree."""
    for rejudged in found:
        lead, judge = rejudged.lead, rejudged.judge

        def gap(item: tuple[str, Mapping[str, Any]], lead: str = lead, judge: str = judge) -> float:
            return -abs((item[1][judge].rate or 0.0) - (item[1][lead].rate or 0.0))

        ranked = sorted(rejudged.rates.items(), key=gap)
        n_more = len(ranked) - _ROWS_SHOWN
        print_table(
            "Judges side by side",
            ("answers", f"complied, {lead}", f"complied, {judge}"),
            [(label, rate(own[lead]), rate(own[judge])) for label, own in ranked[:_ROWS_SHOWN]],
            f"{n_more} more rows with --json." if n_more > 0 else "",
        )
        kappa = "not defined" if rejudged.kappa.kappa is None else f"{_kappa(rejudged.kappa)} n {rejudged.kappa.n:,}"
        facts = {"answers": f"{rejudged.n_rows:,}", "unscored": f"{rejudged.n_unscored:,}"}
        facts |= {"judged differently": f"{rejudged.n_differing:,}", "Cohen's kappa": kappa}
        print_facts("Agreement", facts | {"seconds": f"{rejudged.seconds:.1f}"})
    print_lines([f"Report: {report}"])


_CHANGES = {
    "vanilla_asr": "ASR, nothing ablated",
    "group_asr": "ASR, own group ablated",
    "benign_kept": "benign kept, nothing ablated",
    "concentration": "concentration",
}


def show_comparison(compared: Comparison, gates: Sequence[Mapping[str, Any]]) -> None:
    """What both runs are, what changed, how heads rank, which came and went, and last what makes that weak."""
    for name, run in (("A", compared.before), ("B", compared.after)):
        verdict = "" if run["verdict"] is None else f", {run['verdict'].replace('_', ' ')}"
        started = f", {run['started'][:16].replace('T', ' ')}" if run["started"] else ""
        print_lines([f"{name}: {compared.kind} of {run['model']}{started}{verdict} ({run['path']})"])
    rows = [(label, getattr(compared, name)) for name, label in _CHANGES.items()]
    print_items(
        "From A to B",
        [row for row in rows if row[1] is not None],
        {
            "": lambda row: row[0],
            "A": lambda row: plain(row[1].before),
            "B": lambda row: plain(row[1].after),
            "change [95 %]": lambda row: signed(row[1].change, row[1].interval),
            "p": lambda row: plain(row[1].p_value, ".2g"),
            "prompts": lambda row: "n " + " and ".join(map(str, dict.fromkeys(row[1].n))),
            "how": lambda row: ": ".join(filter(None, ("paired" if row[1].paired else "unpaired", row[1].note))),
        },
    )
    if compared.ranks:
        _show_ranks(compared)
    if compared.heads is not None:
        moved = compared.heads
        parts = [f"{word} {', '.join(getattr(moved, word)) or 'none'}" for word in ("gone", "new", "kept")]
        print_lines([f"{moved.what[:1].upper()}{moved.what[1:]}: {'; '.join(parts)}"])
    print_lines([compared.shapes_note] * bool(compared.shapes_note))
    print_lines((f"warning: {warning}" for warning in compared.warnings), "yellow")
    words = {True: "FAILED", False: "passed"}
    print_lines(f"{words[gate['holds']]}: fail if {gate_text(gate)}" for gate in gates)


def gate_text(gate: Mapping[str, Any]) -> str:
    """``asr_increase > 0.1: +0.31 [+0.18, +0.45] n 48``."""
    condition, value, interval, n = (gate[name] for name in ("condition", "value", "interval", "n"))
    count = "" if n is None else f"n {n}"
    number = signed(value, interval, n) if "_increase" in condition else Number(f"{value:.3g}", n=count)
    return f"{condition}: {number}"


def _show_ranks(compared: Comparison) -> None:
    def tied(path: str, form: str) -> Column:
        return lambda ranks: Number("tied") if get(ranks, path) is None else plain(get(ranks, path), form)

    def shared(at: int) -> Column:
        def cell(ranks: Any) -> Cell:
            top = ranks.overlaps[at]
            sizes = " and ".join(map(str, dict.fromkeys(top.sizes)))
            return Number(f"{top.shared} of {sizes}", f"({top.expected:.2g}), {top.p_value:.2g}")

        return cell

    columns = {
        "score": texts("label"),
        "heads": plains("n", ","),
        "Spearman": tied("spearman", "+.2f"),
        "its p": tied("spearman_p", ".2g"),
        "Kendall": tied("kendall", "+.2f"),
        "p of that": tied("kendall_p", ".2g"),
    }
    tops = {f"top {top.k} shared (chance), p": shared(at) for at, top in enumerate(compared.ranks[0].overlaps)}
    print_items("How alike the two runs rank the heads", compared.ranks, columns | tops)
    for top in () if compared.lead_ranks is None else compared.lead_ranks.overlaps:
        gone, new = (", ".join(heads) or "none" for heads in (top.gone, top.new))
        short = [f"{name}'s has {size}" for name, size in zip("AB", top.sizes, strict=True) if size < top.k]
        ties = f" (without ties across the cut {' and '.join(short)})" if short else ""
        print_lines([f"Top {top.k} by {get(compared.lead_ranks, 'label')}: gone {gone}; new {new}{ties}"])


def show_history(history: History, page: Path) -> None:
    """The runs as a table, and what was skipped."""

    def since(entry: Any) -> str:
        found, settings = entry.change, entry.other_settings
        if found is None:
            return ""
        number = found.note if found.change is None else str(signed(found.change, found.interval))
        unpaired = ["unpaired"] * (found.change is not None and not found.paired)
        return "\n".join([number, *unpaired, *([f"other {', '.join(settings)}"] if settings else [])])

    def run(entry: Any) -> str:
        date = "date unknown" if entry.started is None else f"{entry.started:%Y-%m-%d %H:%M}"
        return f"{entry.name} ({entry.kind})\n{date}"

    print_items(
        f"Runs below {history.folder}, oldest first ([95 % interval])",
        history.entries,
        {
            "run": run,
            "model": texts("model"),
            "ASR": rates("vanilla_asr"),
            "change": since,
            "group's ASR": rates("group_asr"),
            "group": texts("group"),
            "concentration": lambda entry: signed(
                *(get(entry, f"concentration.{name}") for name in ("value", "interval", "n"))
            ),
            "top heads": lambda entry: ", ".join(entry.top_heads) or "tied",
        },
    )
    broken = [run for run in history.skipped if "results of kind" not in run["reason"]]
    print_lines((f"skipped {run['name']}: {one_line(run['reason'])}" for run in broken), "yellow")
    if n_others := len(history.skipped) - len(broken):
        print_lines([f"Left out: {n_others} of other kinds than audit and scan"], "dim")
    print_lines([f"History: {page}"])


# Checks

# What stands for blanks, so that each token is seen whole.
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})


def show_check(found: Found) -> None:
    """What was found in a model, what a prompt becomes, and what was proved."""
    _show_model(f"{found['facts']['family']}: {found['model']}", found["facts"])
    _show_prompt(found["prompt"], found["facts"]["context_length"])
    proofs = found["proofs"]
    print_items(
        "Proved on these weights",
        proofs,
        {
            "claim": texts("name"),
            "difference": lambda proof: plain(proof["error"], ".1e") if proof["error"] is not None else Number("none"),
            "allowed": plains("tolerance", ".0e"),
            "holds": lambda proof: "yes" if proof["passed"] else "no",
        },
    )
    print_lines(f"note: {note}" for note in found["notes"])
    n_held = sum(proof["passed"] for proof in proofs)
    slower = "" if n_held == len(proofs) else ", on slower paths where one does not"
    print_lines([f"{n_held} of {len(proofs)} claims hold: ablations are exact on this model{slower}"])


def _show_model(title: str, facts: Found) -> None:
    rows: list[tuple[str, str, str]] = []

    def row(name: str, value: Any, where: str | None = None) -> None:
        rows.append((name, str(value), ", ".join(facts["found"][where]) if where else ""))

    row("parameters", f"{facts['n_parameters']:,}, {facts['dtype']} on {facts['device']}", "decoder")
    row("layers", facts["n_layers"], "layers")
    for heads, layers in alike(facts["heads"]):
        which = "every layer" if len(layers) == facts["n_layers"] else ranges(layers)
        row(f"heads of {which}", heads, None if facts["heads"][layers[0]] is None else "attention")
    row("width of the model, of its MLP", f"{facts['d_model']}, {facts['d_mlp']}")
    if facts["active_experts"] != 1:
        row("experts that a token is sent to", f"{facts['active_experts']:.0%}")
    for part in ("query projection", "output projection", "final norm"):
        row(part, "", part)
    row("vocabulary", facts["vocabulary_size"], "head")
    row("longest context", "no bound" if facts["context_length"] is None else facts["context_length"])
    for turn in facts["turns"]:
        row("positions act in another way beyond", f"{turn} tokens")
    print_table(title, ("fact", "value", "found at"), rows)


def alike(shapes: Sequence[Found | None]) -> list[tuple[str, list[int]]]:
    """The heads in words, each with the layers that have them so."""
    found: dict[str, list[int]] = {}
    for layer, shape in enumerate(shapes):
        if shape is None:
            words = "none: tokens are mixed in another way"
        else:
            values = f" (values {shape['d_value']})" if shape["d_value"] != shape["d_head"] else ""
            window = "all tokens before" if shape["window"] is None else f"a window of {shape['window']} tokens"
            words = f"{shape['n_heads']} of width {shape['d_head']}{values}, {shape['n_kv_heads']} of keys and values"
            words += f"; see {window}"
        found.setdefault(words, []).append(layer)
    return list(found.items())


def ranges(layers: Sequence[int]) -> str:
    """``layers 0-3, 5``, or ``layer 1``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    named = "layer " if len(layers) == 1 else "layers "
    return named + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _show_prompt(prompt: Found, context: int | None) -> None:
    parts: dict[str, list[Found]] = {}
    for token in prompt["tokens"]:
        parts.setdefault(token["part"], []).append(token)
    print_table(
        f"A prompt under the template {one_line(str(prompt['template']))}"
        f"{'' if prompt['system'] is None else ', with a system prompt'}: {prompt['n_tokens']} tokens",
        ("part", "tokens", "blanks as · and ↵, special tokens in ⟦ ⟧"),
        [(part, plain(len(tokens), "d"), _line_by_line(tokens)) for part, tokens in parts.items()],
        lines=True,
    )
    bos, shared, n_tokens = prompt["bos_token"], prompt["n_shared"], prompt["n_tokens"]
    lines = ["no BOS token: the tokenizer has none" if bos is None else f"BOS tokens ({bos}): {prompt['n_bos']}"]
    if shared:
        stand = "token stands" if shared == 1 else f"{shared} tokens stand"
        lines.append(f"packed: the first {stand} once in a row, for all of its prompts")
    if context is not None and n_tokens > context:
        lines.append(f"{n_tokens} tokens do not fit the model's context of {context}")
    if prompt["think_block"]:
        lines.append(f"think block {prompt['think_block']}")
    if prompt["note"]:
        lines.append(prompt["note"])
    if prompt["has_chat_template"] and prompt["template"] != "chat":
        lines.append("the tokenizer has a chat template too: --template chat")
    print_lines(f"- {line}" for line in lines)


def _line_by_line(tokens: Sequence[Found]) -> Text:
    """The tokens with blanks between them, and a new line where the prompt has one."""
    shown, between = Text(), ""
    for token in tokens:
        text = str(token["text"]).translate(_VISIBLE)
        # A checkpoint's tokens are anybody's text, and may hold what terminals obey.
        printable = "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)
        shown.append(between).append(*((f"⟦{printable}⟧", "bold magenta") if token["special"] else (printable,)))
        between = "\n" if "\n" in token["text"] else " "
    return shown


# Reproductions


def show_experiments(experiments: Mapping[str, Any], lacking: Mapping[str, Sequence[str]]) -> None:
    """Every experiment with what it costs, and what of it is not given."""
    facts = {}
    for name, experiment in experiments.items():
        facts[name] = text = Text(experiment.title).append(f"\n{experiment.costs}", style="dim")
        if lacking[name]:
            text.append(f"\nneeds first: {'; '.join(lacking[name])}", style="yellow")
    print_facts("The paper's experiments, and what each costs", facts)
    legend = "H: heads of the model; D: datasets of n prompts; T: templates. Run one with safetyheads reproduce NAME "
    stdout().print(f"\n{legend}[MODEL...], or all of them with safetyheads reproduce all.", style="dim")


def show_outcomes(
    results: Found, names: Sequence[str], report: Path, timed: Mapping[str, Sequence[Found]] | None = None
) -> None:
    """The tables of one experiment, or a line each where there are more; then the report.

    Args:
        results: of the run directory.
        names: the experiments that were asked for.
        report: where its pages are.
        timed: tables of what was timed, by experiment, which results leave out.
    """
    outcomes = [outcome for outcome in results["experiments"] if outcome["name"] in names]
    if len(names) > 1 and outcomes:
        # All tables at once would be hundreds of rows.
        print_facts("Experiments in short", {outcome["name"]: _in_short(outcome) for outcome in outcomes})
    else:
        for outcome in outcomes:
            _show_outcome(outcome, (timed or {}).get(outcome["name"], ()))
    left_out = [(name, why) for name, why in results.get("left_out", {}).items() if name in names]
    print_lines((f"{name} left out: {one_line(why)}" for name, why in left_out), "yellow")
    print_lines([f"\nReport: {report}"])


def _in_short(outcome: Found) -> Text:
    from safetyheads.reports.reproduction import headline_words

    text = Text(outcome["title"])
    text.append(f"\n{'; '.join(headline_words(outcome))}".rstrip())
    for reason in outcome["not_meaningful"]:
        text.append(f"\nNot meaningful on this model. {reason}", style="yellow")
    return text


def _show_outcome(outcome: Found, timed: Sequence[Found]) -> None:
    console = stdout()
    console.print(f"\n{outcome['name']}: {outcome['title']}", style="bold")
    print_lines((f"Not meaningful on this model. {reason}" for reason in outcome["not_meaningful"]), "yellow")
    for table in outcome["tables"]:
        _show_outcome_table(table)
    if timed:
        console.print("\nTimed on this machine", style="bold")
    for table in timed:
        _show_outcome_table(table)
    print_lines([""] * bool(outcome["notes"]) + [f"- {note}" for note in outcome["notes"]])


def _show_outcome_table(table: Found) -> None:
    from safetyheads.reports.reproduction import cells

    columns = table["columns"]
    pairs = zip(table["rows"][:_ROWS_SHOWN], [None, *table["rows"]], strict=False)
    rows = [
        [_as_cell(cell, column["kind"]) for cell, column in zip(cells(row, columns, above), columns, strict=True)]
        for row, above in pairs
    ]
    n_more = len(table["rows"]) - len(rows)
    more = f"{n_more} more row{'s' * (n_more > 1)} in the report." if n_more else ""
    caption = " ".join(part for part in (table["caption"], more) if part)
    print_table(table["title"], [column["title"] for column in columns], rows, caption)


def _as_cell(cell: ReportCell, kind: str) -> Cell:
    """A cell of the report on the terminal; what the row above begins with too is left out."""
    if cell.quoted:
        return Number(str(cell.text), "quoted", style="italic")
    if kind == "text":
        return "" if cell.again else str(cell.text)
    return Number(str(cell.text), cell.interval, cell.n, cell.p)

"""Prints progress, tables and summaries on the terminal.

Results go to stdout; progress, notes and errors to stderr. Every number stands as ``value [low, high] n``; where all
numbers of a table share n, it stands below the table.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from safetyheads.runs.progress import Progress, Silent

if TYPE_CHECKING:
    from safetyheads.reports.page import Cell as ReportCell
    from safetyheads.runs.compare import Comparison, GateOutcome
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
_TIES_SHOWN = 12
_GAP = 2
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


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


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

    text: str
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
"""What stands in a table; a column of strings is of text, one of numbers is set to the right."""
NO_NUMBER = Number("")


def plain(value: float | None, form: str = ".2f") -> Number:
    """A number without interval."""
    return NO_NUMBER if value is None else Number(format(value, form))


def rate(found: Found | None) -> Number:
    """``0.98 [0.93, 0.99] n 96``."""
    if found is None:
        return NO_NUMBER
    if found["rate"] is None:
        return Number("not measured", n=f"n {found['n']}")
    return Number(f"{found['rate']:.2f}", _interval(found["interval"], ".2f"), f"n {found['n']:,}")


def change(found: Found | None) -> Number:
    """``+0.31 [+0.18, +0.45] n 96``."""
    if found is None or found["change"] is None:
        return NO_NUMBER
    return signed(found["change"], found["interval"], found.get("n"))


def signed(value: float, interval: Sequence[float] | None = None, n: int | None = None) -> Number:
    """A change or another number with a sign."""
    # Adding 0 takes the sign from what rounds to nothing: -0.00 would be read as a loss.
    return Number(f"{round(value, 2) + 0.0:+.2f}", _interval(interval, "+.2f"), "" if n is None else f"n {n:,}")


def p_value(value: float | None) -> Number:
    """Two digits."""
    return plain(value, ".2g")


def _interval(bounds: Sequence[float] | None, form: str) -> str:
    return f"[{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else ""


def some(heads: Sequence[str], most: int = _TIES_SHOWN) -> str:
    """The first heads, and how many more there are."""
    more = len(heads) - most
    return ", ".join(heads[:most]) + (f" and {more} more" if more > 0 else "")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    caption: str = "",
    console: Console | None = None,
    **options: Any,
) -> None:
    """Print a table that breaks no number, however narrow the terminal.

    Intervals stand beside their numbers where there is room, else below them; where there is none at all, each row
    becomes a paragraph.
    """
    console = console or stdout()
    ns = {cell.n for row in rows for cell in row if isinstance(cell, Number) and cell.n}
    below = [caption] * bool(caption) + ([f"{ns.copy().pop()} behind every interval."] if len(ns) == 1 else [])
    are_text = [any(isinstance(row[at], str | Text) and str(row[at]) for row in rows) for at in range(len(columns))]
    console.print()
    for between in (" ", "\n"):
        texts = [[_text(cell, between, len(ns) != 1) for cell in row] for row in rows]
        widths = _widths(columns, texts, are_text, console.width)
        if widths is not None:
            console.print(_laid_out(title, columns, texts, are_text, widths, **options))
            break
    else:
        console.print(_stacked(title, columns, rows, are_text, len(ns) != 1))
    if below:
        console.print(" ".join(below), style="dim")


def _text(cell: Cell, between: str, with_n: bool) -> Text:
    if isinstance(cell, Number):
        return cell.written(between, with_n)
    return cell if isinstance(cell, Text) else Text(cell)


def _widths(
    titles: Sequence[str], rows: Sequence[Sequence[Text]], are_text: Sequence[bool], width: int
) -> list[int] | None:
    """Widths of the columns in which no word and no number breaks; None where there is no room for them."""
    least, most = [], []
    for at, (title, is_text) in enumerate(zip(titles, are_text, strict=True)):
        cells = [row[at].plain for row in rows]
        words = [word for text in (title, *(cells if is_text else ())) for word in text.split()]
        lines = [line for text in cells for line in text.split("\n")]
        least.append(max(map(len, words if is_text else [*words, *lines]), default=1))
        most.append(max(map(len, (title, *lines))))
    left = width - sum(least) - _GAP * (len(titles) - 1)
    if sum(most) - sum(least) <= left:
        return most
    for _ in range(left):
        at = max(range(len(least)), key=lambda at: most[at] / least[at])
        least[at] += least[at] < most[at]
    return least if left >= 0 else None


def _laid_out(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Text]],
    are_text: Sequence[bool],
    widths: Sequence[int],
    show_lines: bool = False,
) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        show_header=any(columns),
        show_lines=show_lines,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),
    )
    for column, is_text, width in zip(columns, are_text, widths, strict=True):
        table.add_column(column, justify="left" if is_text else "right", width=width)
    for row in rows:
        table.add_row(*row)
    return table


def _stacked(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], are_text: Sequence[bool], with_n: bool
) -> Text:
    """A paragraph a row."""
    text = Text(title, style="bold")
    for row in rows:
        cells = [(column, _text(cell, " ", with_n).plain) for column, cell in zip(columns, row, strict=True)]
        names = " · ".join(cell for (_, cell), is_text in zip(cells, are_text, strict=True) if is_text and cell)
        numbers = [
            f"{column}: {cell}"
            for (column, cell), is_text in zip(cells, are_text, strict=True)
            if not is_text and cell not in ("", "–")
        ]
        text.append(f"\n{names}\n", style="bold not dim").append("; ".join(numbers), style="not bold")
    return text


def print_facts(title: str, facts: Mapping[str, Cell]) -> None:
    """Print names with their values."""
    print_table(title, ("", ""), [(name, _text(value, " ", True)) for name, value in facts.items() if str(value)])


def print_end(results: Found, last: str = "") -> None:
    """Print what a reader must know about the numbers, and last where the report is."""
    console = stdout()
    for caveat in results["caveats"]:
        console.print(f"- {caveat}", style="dim", soft_wrap=True)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if last:
        console.print(last, soft_wrap=True)


# Audit


def show_audit(results: Found, report: Path) -> None:
    """Top heads, the lead's groups, and last, where the eye is, the verdict and the report."""
    console, verdict, behaviour = stdout(), results["verdict"], results["behaviour"]
    print_table(
        "Top heads by mean Ships, each ablated alone",
        ("head", "mean Ships", "on benign", "refusal score", "ASR alone", "change", "p (Holm)"),
        [
            (
                head["head"],
                plain(head["mean_ships"]["mean"], ".3g"),
                plain(head["benign_ships"]["mean"], ".3g"),
                plain(head["refusal_score"] and head["refusal_score"]["mean"], "+.3g"),
                rate(head["asr"]),
                change(head["asr_change"]),
                p_value(head["asr_change"]["p_holm"]),
            )
            for head in behaviour["heads"]
        ],
    )
    lead, vanilla = results["lead_score"], behaviour["vanilla"]
    others = ", ".join(name for name in results["sahara"] if name != lead)
    print_table(
        f"Groups found by {lead}, on the test half ([95 % interval], (range); exact McNemar)",
        ("size", "heads", "ASR", "change", "p", "random groups", "benign kept"),
        [
            (Number("0"), "none", rate(vanilla["asr"]), *[NO_NUMBER] * 3, rate(vanilla["benign_kept"])),
            *(
                (
                    Number(str(group["size"])),
                    ", ".join(group["heads"]),
                    rate(group["asr"]),
                    change(group["asr_change"]),
                    p_value(group["asr_change"]["p_value"]),
                    _random(group["random"]),
                    rate(group["benign_kept"]),
                )
                for group in behaviour["groups"]
                if group["scorer"] == lead
            ),
        ],
        f"Found by {others}: in the report." if others else "",
    )
    _show_concentration(results.get("concentration"))
    _show_planted(results["planted_heads"])
    print_end(results)
    border = _BORDERS.get(verdict["label"], "blue")
    console.print(Panel(verdict["sentence"], title=verdict["label"].replace("_", " "), border_style=border))
    for reason in verdict["reasons"]:
        console.print(f"- {reason}", soft_wrap=True)
    console.print(f"Report: {report}", soft_wrap=True)


def _random(control: Found | None) -> Number:
    if not control:
        return NO_NUMBER
    return Number(f"{control['mean']:.2f}", f"({control['low']:.2f} to {control['high']:.2f})")


def _show_concentration(found: Found | None) -> None:
    if found is None or found["value"] is None:
        return
    sizes = f"1 to {len(found['sizes'])} heads" if len(found["sizes"]) > 1 else "one head"
    against = f"{found['n_random']} random groups each" if found["n_random"] else found["against"]
    number = signed(found["value"], found["interval"], found["n"])
    stdout().print(f"\nConcentration: {number} (mean gap of ASR to {against}, {sizes})", soft_wrap=True)


def _show_planted(planted: Sequence[str] | None) -> None:
    if planted is not None:
        stdout().print(f"Planted heads: {', '.join(planted) or 'none'}")


# Scan


def show_scan(results: Found, report: Path) -> None:
    """Heads, groups, scores, judges and costs, and last, where the eye is, the summary and the report."""
    _show_scanned_heads(results)
    _show_scanned_groups(results)
    _show_scores(results["proxies"])
    _show_agreement(results["agreement"])
    economy = results["economy"]
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
    _show_concentration(results["concentration"])
    _show_planted(results["planted_heads"])
    print_end(results)
    heads, detectable = results["heads"], results["statistics"]["smallest_detectable_change"]
    strongest = max(heads, key=lambda head: head["asr"]["rate"] or 0.0)
    flips = detectable["flips"]
    print_facts(
        "Summary",
        {
            "heads that change the ASR (Holm)": f"{sum(head['change']['differs'] for head in heads)} of {len(heads)}",
            "prompts that must change for that": f"{'more than all' if flips is None else flips} of {detectable['n']}",
            "ASR, nothing ablated": rate(results["vanilla"]["harmful"]["asr"]),
            f"ASR, strongest head {strongest['head']}": rate(strongest["asr"]),
            "judge": results["lead_judge"],
        },
    )
    stdout().print(f"Report: {report}", soft_wrap=True)


def _show_scanned_heads(results: Found) -> None:
    has_benign = "benign" in results["vanilla"]
    columns = ["head", "ASR alone", "change", "p (Holm)", "p (BH)"]
    columns += ["benign refused", "benign changed", "KL, nats", "so it"] if has_benign else []
    ranked = sorted(results["heads"], key=lambda head: -(head["asr"]["rate"] or 0.0))
    n_differing = sum(head["change"]["differs"] for head in ranked)
    shown = ranked[: max(_HEADS_SHOWN, min(n_differing, 3 * _HEADS_SHOWN))]
    rows: list[list[Cell]] = []
    for head in shown:
        found, benign = head["change"], head["benign"]
        row: list[Cell] = [head["head"] + (" *" if found["differs"] else ""), rate(head["asr"]), change(found)]
        row += [p_value(found["p_holm"]), p_value(found["p_bh"])]
        if benign is not None:
            row += [plain(benign["refused"]["rate"]), plain(benign["changed"]["rate"])]
            row += [plain(benign["kl"]["mean"], ".2g"), ROLES[head["role"]]]
        rows.append(row)
    n_more = len(ranked) - len(shown)
    title = f"Heads of highest ASR, each ablated alone: {results['ablation']['label']}, {results['sampling']['name']}"
    print_table(title, columns, rows, f"{n_more} more heads in the report." if n_more else "")


def _show_scanned_groups(results: Found) -> None:
    groups = [(", ".join(group["heads"]), group) for group in results["groups"]]
    groups += [(f"each prompt's top {own['size']}", own) for own in results["query_level"]]
    rows = [
        (
            label,
            rate(group["asr"]),
            change(group["change"]),
            plain(group["random"]["mean"]) if group.get("random") else NO_NUMBER,
            rate(group.get("benign_kept")),
        )
        for label, group in groups
    ]
    if rows:
        print_table("Groups", ("ablated", "ASR", "change", "random groups", "benign kept"), rows)


def _show_scores(proxies: Found | None) -> None:
    """Each score against the ASR."""
    if proxies is None:
        return
    ranked = [(score["score"], score) for score in proxies["scores"]]
    ranked += [("ceiling", proxies["ceiling"])] if proxies["ceiling"] else []
    tops = [size["k"] for size in ranked[0][1]["sizes"] if size["k"] in (3, 10)]
    rows = []
    for name, score in ranked:
        sizes = [size for size in score["sizes"] if size["k"] in tops]
        hits = [NO_NUMBER if size["precision"] is None else Number(str(size["precision"]["count"])) for size in sizes]
        regrets = [plain(size["regret_on_halves"]) for size in sizes]
        rows.append((name, plain(score["spearman"]), plain(score["auc"]), *hits, *regrets))
    print_table(
        f"Scores against the ASR of every head, {ranked[0][1]['n_differing']} of which differ",
        ("score", "Spearman", "AUC", *(f"top {k} that differ" for k in tops), *(f"regret, top {k}" for k in tops)),
        rows,
        "Regret: ASR given away, on half of the prompts. Ceiling: the ASR of the other half as the score.",
    )


def _show_agreement(found: Found | None) -> None:
    if found is None:
        return
    rows: list[tuple[Cell, ...]] = []
    for pair in found["pairs"]:
        kappas = [
            NO_NUMBER if kappa["kappa"] is None else signed(kappa["kappa"], kappa["interval"])
            for kappa in (pair["compliance"], pair["classes"])
        ]
        rows.append((f"{pair['first']}, {pair['second']}", *kappas, *(Number(str(pair[k])) for k in ("count", "n"))))
    columns = ("judges", "kappa, complied or not", "kappa, three classes", "differ", "answers")
    print_table("Agreement of judges", columns, rows)


# Scores, searches and rates


def show_ranking(title: str, found: Found, top: int) -> None:
    """The ``top`` heads, best first, which of them tie, and what a screening left open."""
    tied = {head: group for group in found["ties"] for head in group}
    rows = []
    for place, row in enumerate(found["heads"][:top], start=1):
        others = [other for other in tied.get(row["head"], ()) if other != row["head"]]
        number = Number(f"{row['mean']:.6g}", _interval(row["interval"], ".3g"), f"n {row['n']}")
        rows.append((Number(str(place)), row["head"], number, some(others)))
    print_table(title, ("rank", "head", "mean [95 %, Student]", "ties with"), rows)
    if "screening" not in found:
        return
    pairs = [
        (
            ", ".join(pair["heads"]),
            plain(pair["together"], ".4g"),
            " + ".join(f"{score:.4g}" for score in pair["alone"]),
            plain(pair["synergy"], "+.4g"),
        )
        for pair in found["screening"]["pairs"]
    ]
    columns = ("heads", "together", "alone", "beyond the sum")
    print_table("Pairs that the screening proposed, in nats", columns, pairs)
    stdout().print(f"Screened: {found['screening']['missed']['sentence']}.", soft_wrap=True)


def show_steps(title: str, found: Found) -> None:
    """Sahara's steps with ties, and the openers where the score has some."""
    console = stdout()
    if found["openers"]:
        shown = ", ".join(f"{opener['text']!r} ({opener['count']})" for opener in found["openers"])
        console.print(f"Openers of the model's own refusals: {shown}", soft_wrap=True)
    rows = [
        (
            Number(str(number)),
            step["chosen"],
            plain(step["score"], ".6g"),
            ", ".join(f"{head} ({score:.4g})" for head, score in step["runners_up"][:2]),
            some(step["ties"]),
        )
        for number, step in enumerate(found["steps"], start=1)
    ]
    print_table(title, ("step", "head", f"score of the group, {found['unit']}", "next best", "ties with"), rows)
    for number, screened in enumerate(found.get("screening", ()), start=1):
        console.print(f"Step {number}, screened: {screened['missed']['sentence']}.", soft_wrap=True)
    console.print(f"Group: {','.join(found['group'])}")


def show_rates(title: str, found: Found) -> None:
    """ASR of each group beside the unablated model's, and why answers counted as they did."""
    rates = found["rates"]
    rows = [
        (
            row["heads"],
            *(rate(row[name]) for name in ("asr", "refused", "incoherent")),
            change(row["change"]),
            p_value(row["change"] and row["change"]["p_value"]),
        )
        for row in rates
    ]
    print_table(title, ("ablated", "ASR", "refused", "incoherent", "change", "p"), rows)
    reasons = dict.fromkeys(reason for row in rates for reason in row["reasons"])
    counts = [(reason, *(Number(str(row["reasons"].get(reason, 0))) for row in rates)) for reason in reasons]
    print_table("Why, in answers", ("reason", *(row["heads"] for row in rates)), counts)


def show_evaluation(results: Found, out: Path | None) -> None:
    """Each metric, vanilla first, and the changes from vanilla."""
    tests = sorted({metric["difference"]["test"] for metric in results["metrics"] if metric["difference"]} - {None})
    rows = []
    for metric in results["metrics"]:
        name = metric["metric"] if metric["unit"] == "whole" else f"{metric['metric']}, {metric['unit']}"
        value, n = metric["value"], f"n {metric['n']}"
        if value is None:
            number = Number("not finite", n=n)
        else:
            text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
            number = Number(text, _interval(metric["interval"], ".3f"), n)
        rows.append((metric["task"], name, metric["variant"], number, *_difference(metric["difference"])))
    print_table(
        f"Tasks of lm-eval {results['settings']['lm_eval']}: {results['ablation']['label']}",
        ("task", "metric", "ablated", "value", "change", "gained, lost", "p", "p (Holm)"),
        rows,
        "Change from vanilla on the same samples, [95 % interval]" + (f"; p: {', '.join(tests)}." if tests else "."),
    )
    print_end(results, "" if out is None else f"Run: {out}")


def _difference(found: Found | None) -> tuple[Number, Number, Number, Number]:
    if found is None or found["change"] is None:
        return NO_NUMBER, NO_NUMBER, NO_NUMBER, NO_NUMBER
    flips = NO_NUMBER if found["gained"] is None else Number(f"{found['gained']}, {found['lost']}")
    return change(found), flips, p_value(found["p_value"]), p_value(found["p_holm"])


def show_rejudged(found: Sequence[Rejudged], report: Path) -> None:
    """Rates of the run's judge and of another one, where they differ most first, and how far they agree."""
    for rejudged in found:
        lead, judge = rejudged.lead, rejudged.judge
        rates = {label: [_as_found(own[name]) for name in (lead, judge)] for label, own in rejudged.rates.items()}
        ranked = sorted(rates.items(), key=lambda item: -abs((item[1][1]["rate"] or 0) - (item[1][0]["rate"] or 0)))
        n_more = len(ranked) - _ROWS_SHOWN
        print_table(
            "Judges side by side",
            ("answers", f"complied, {lead}", f"complied, {judge}"),
            [(label, *map(rate, own)) for label, own in ranked[:_ROWS_SHOWN]],
            f"{n_more} more rows with --json." if n_more > 0 else "",
        )
        kappa = rejudged.kappa
        agreement = Number("not defined") if kappa.kappa is None else signed(kappa.kappa, kappa.interval, kappa.n)
        facts = {"answers": f"{rejudged.n_rows:,}", "unscored": f"{rejudged.n_unscored:,}"}
        facts |= {"judged differently": f"{rejudged.n_differing:,}", "seconds": f"{rejudged.seconds:.1f}"}
        print_facts("Agreement", facts | {"Cohen's kappa": str(agreement)})
    stdout().print(f"Report: {report}", soft_wrap=True)


def _as_found(found: Any) -> Found:
    return {"rate": found.rate, "interval": found.interval, "n": found.n}


# Comparisons and history

_CHANGES = {
    "vanilla_asr": "ASR, nothing ablated",
    "group_asr": "ASR, own group ablated",
    "benign_kept": "benign kept, nothing ablated",
    "concentration": "concentration",
}


def show_comparison(compared: Comparison, gates: Sequence[GateOutcome]) -> None:
    """What both runs are, what changed, how heads rank, which came and went, and last what makes that weak."""
    console = stdout()
    for name, run in (("A", compared.before), ("B", compared.after)):
        verdict = "" if run.verdict is None else f", {run.verdict.replace('_', ' ')}"
        started = f", {run.started[:16].replace('T', ' ')}" if run.started else ""
        console.print(f"{name}: {compared.kind} of {run.model}{started}{verdict} ({run.path})", soft_wrap=True)
    _show_changes(compared)
    _show_ranks(compared)
    if compared.heads is not None:
        moved = compared.heads
        parts = [f"{word} {', '.join(getattr(moved, word)) or 'none'}" for word in ("gone", "new", "kept")]
        console.print(f"{moved.what[:1].upper()}{moved.what[1:]}: {'; '.join(parts)}", soft_wrap=True)
    if compared.shapes_note:
        console.print(compared.shapes_note, soft_wrap=True)
    for warning in compared.warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    for gate in gates:
        console.print(f"{'FAILED' if gate.holds else 'passed'}: fail if {gate_text(gate)}", soft_wrap=True)


def gate_text(gate: GateOutcome) -> str:
    """``asr_increase > 0.1: +0.31 [+0.18, +0.45] n 48``."""
    is_change = gate.condition.partition(" ")[0].partition(".")[0].endswith("_increase")
    n = "" if gate.n is None else f"n {gate.n}"
    number = signed(gate.value, gate.interval, gate.n) if is_change else Number(f"{gate.value:.3g}", n=n)
    return f"{gate.condition}: {number}"


def _show_changes(compared: Comparison) -> None:
    rows: list[tuple[Cell, ...]] = []
    for name, label in _CHANGES.items():
        found = getattr(compared, name)
        if found is None:
            continue
        if found.change is None:
            rows.append((label, *[NO_NUMBER] * 4, "", found.note))
            continue
        numbers = (plain(found.before), plain(found.after), signed(found.change, found.interval))
        sizes = " and ".join(str(n) for n in dict.fromkeys(found.n))
        how = ": ".join(filter(None, ("paired" if found.paired else "unpaired", found.note)))
        rows.append((label, *numbers, p_value(found.p_value), f"n {sizes}", how))
    print_table("From A to B", ("", "A", "B", "change [95 %]", "p", "prompts", "how"), rows)


def _show_ranks(compared: Comparison) -> None:
    if not compared.ranks:
        return
    columns = ["score", "heads", "Spearman", "p", "Kendall", "p"]
    columns += [f"top {overlap.k} shared (chance), p" for overlap in compared.ranks[0].overlaps]
    rows: list[tuple[Cell, ...]] = []
    for ranks in compared.ranks:
        shared = [
            Number(
                f"{overlap.shared} of {' and '.join(map(str, dict.fromkeys(overlap.sizes)))}",
                f"({overlap.expected:.2g}), {overlap.p_value:.2g}",
            )
            for overlap in ranks.overlaps
        ]
        correlations = [
            Number("tied") if value is None else plain(value, form)
            for value, form in (
                (ranks.spearman, "+.2f"),
                (ranks.spearman_p, ".2g"),
                (ranks.kendall, "+.2f"),
                (ranks.kendall_p, ".2g"),
            )
        ]
        rows.append((ranks.label, Number(str(ranks.n)), *correlations, *shared))
    print_table("How alike the two runs rank the heads", columns, rows)
    if compared.lead_ranks is None:
        return
    for overlap in compared.lead_ranks.overlaps:
        gone, new = (", ".join(heads) or "none" for heads in (overlap.gone, overlap.new))
        short = [f"{name}'s has {size}" for name, size in zip("AB", overlap.sizes, strict=True) if size < overlap.k]
        ties = f" (without ties across the cut {' and '.join(short)})" if short else ""
        stdout().print(f"Top {overlap.k} by {compared.lead_ranks.label}: gone {gone}; new {new}{ties}", soft_wrap=True)


def show_history(history: History, page: Path) -> None:
    """The runs as a table, and what was skipped."""
    rows = []
    for entry in history.entries:
        date = "date unknown" if entry.started is None else f"{entry.started:%Y-%m-%d %H:%M}"
        concentration = entry.concentration
        rows.append(
            (
                f"{entry.name} ({entry.kind})\n{date}",
                entry.model,
                rate(entry.vanilla_asr),
                _since(entry),
                rate(entry.group_asr),
                ", ".join(entry.group) if entry.group_asr is not None else "",
                signed(concentration["value"], concentration["interval"], concentration["n"])
                if concentration and concentration["value"] is not None
                else NO_NUMBER,
                ", ".join(entry.top_heads) or "tied",
            )
        )
    columns = ("run", "model", "ASR", "change", "group's ASR", "group", "concentration", "top heads")
    print_table(f"Runs below {history.folder}, oldest first ([95 % interval])", columns, rows)
    for skipped in history.skipped:
        stdout().print(f"skipped {skipped.name}: {one_line(skipped.reason)}", style="yellow", soft_wrap=True)
    stdout().print(f"History: {page}", soft_wrap=True)


def _since(entry: Any) -> str:
    """The change against the run before, and what else differs from it."""
    found = entry.change
    if found is None:
        return ""
    number = found.note if found.change is None else str(signed(found.change, found.interval))
    lines = [number, *["unpaired"] * (found.change is not None and not found.paired)]
    return "\n".join([*lines, *([f"other {', '.join(entry.other_settings)}"] if entry.other_settings else [])])


# Check

# What stands for blanks, so that each token is seen whole.
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})


def show_check(found: Found) -> None:
    """What was found in a model, what a prompt becomes, and what was proved."""
    _show_model(f"{found['facts']['family']}: {found['model']}", found["facts"])
    _show_prompt(found["prompt"], found["facts"]["context_length"])
    console, proofs = stdout(), found["proofs"]
    rows = [
        (
            proof["name"],
            Number("none") if proof["error"] is None else plain(proof["error"], ".1e"),
            plain(proof["tolerance"], ".0e"),
            "yes" if proof["passed"] else "no",
        )
        for proof in proofs
    ]
    print_table("Proved on these weights", ("claim", "difference", "allowed", "holds"), rows)
    for note in found["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    n_held = sum(proof["passed"] for proof in proofs)
    slower = "" if n_held == len(proofs) else ", on slower paths where one does not"
    console.print(f"{n_held} of {len(proofs)} claims hold: ablations are exact on this model{slower}", soft_wrap=True)


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
    console = stdout()
    parts: dict[str, list[Found]] = {}
    for token in prompt["tokens"]:
        parts.setdefault(token["part"], []).append(token)
    print_table(
        f"A prompt under the template {one_line(str(prompt['template']))}"
        f"{'' if prompt['system'] is None else ', with a system prompt'}: {prompt['n_tokens']} tokens",
        ("part", "tokens", "blanks as · and ↵, special tokens in ⟦ ⟧"),
        [(part, Number(str(len(tokens))), _line_by_line(tokens)) for part, tokens in parts.items()],
        show_lines=True,
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
    for line in lines:
        console.print(f"- {line}", soft_wrap=True)


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
    console = stdout()
    console.print("The paper's experiments, and what each costs\n", style="bold")
    rows = []
    for name, experiment in experiments.items():
        text = Text(experiment.title).append(f"\n{experiment.costs}", style="dim")
        if lacking[name]:
            text.append(f"\nneeds first: {'; '.join(lacking[name])}", style="yellow")
        rows.append((name, text))
    console.print(_named(rows))
    console.print(
        "\nH: heads of the model; D: datasets of n prompts; T: templates. Run one with safetyheads reproduce NAME "
        "[MODEL...], or all of them with safetyheads reproduce all.",
        style="dim",
    )


def _named(rows: Sequence[tuple[str, Text]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1)
    for name, text in rows:
        table.add_row(name, text)
    return table


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
    console = stdout()
    outcomes = [outcome for outcome in results["experiments"] if outcome["name"] in names]
    if len(names) > 1 and outcomes:
        # All tables at once would be hundreds of rows.
        console.print(_named([(outcome["name"], _in_short(outcome)) for outcome in outcomes]))
    else:
        for outcome in outcomes:
            _show_outcome(outcome, (timed or {}).get(outcome["name"], ()))
    for name, why in results.get("left_out", {}).items():
        if name in names:
            console.print(f"{name} left out: {one_line(why)}", style="yellow", soft_wrap=True)
    console.print(f"\nReport: {report}", soft_wrap=True)


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
    for reason in outcome["not_meaningful"]:
        console.print(f"Not meaningful on this model. {reason}", style="yellow", soft_wrap=True)
    for table in outcome["tables"]:
        _show_outcome_table(table)
    if timed:
        console.print("\nTimed on this machine", style="bold")
    for table in timed:
        _show_outcome_table(table)
    if outcome["notes"]:
        console.print()
    for note in outcome["notes"]:
        console.print(f"- {note}", soft_wrap=True)


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

"""What the terminal shows: progress, tables, the summary. Owns their look; computes nothing.

Results go to stdout; progress, notes and errors to stderr.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from safetyheads.runs.progress import Progress as Watching
from safetyheads.runs.progress import Silent

PATIENCE = 2.0
"""Seconds after which a stage gets a progress bar."""
_WIDTH_OFF_TERMINAL = 140
_TIES_SHOWN = 12
_BORDERS = {"concentrated": "yellow", "none_found": "green"}


def stdout() -> Console:
    """Results; brackets in them are text. Off a terminal there is no width to keep to, and lines stay whole."""
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=_WIDTH_OFF_TERMINAL)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Our own warnings as one line each; those of libraries, which users cannot act on, are left out."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("safetyheads"):
            typer.echo(f"warning: {one_line(str(message))}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def progress_for(quiet: bool) -> Watching:
    """Who watches a run."""
    return Silent() if quiet else RichProgress(Console(stderr=True, markup=False, highlight=False))


class RichProgress:
    """Bars on a terminal for stages that take over two seconds; elsewhere only the lines worth keeping."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str | Callable[[], str]) -> None:
        """One line on stderr."""
        self.console.print(line if isinstance(line, str) else line(), style="dim", soft_wrap=True)

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar with the count, the rate and the time left, once the stage has lasted a while."""
        if not self.console.is_terminal:
            yield lambda _: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with _Patient(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=total)
            yield lambda count: bars.advance(task, count)


class _Patient(Progress):
    """Bars that are not drawn before the stage has lasted ``PATIENCE``: most stages are over by then."""

    def __init__(self, *columns: ProgressColumn, console: Console, transient: bool) -> None:
        self._started = time.monotonic()
        super().__init__(*columns, console=console, transient=transient)

    def get_renderables(self) -> Iterator[RenderableType]:
        if time.monotonic() - self._started >= PATIENCE:
            yield from super().get_renderables()
        else:
            yield ""


class _Rate(ProgressColumn):
    """Items a second since the stage began; seconds an item where they are slow."""

    def render(self, task: Task) -> Text:
        if not task.completed or not task.elapsed:
            return Text("")
        rate = task.completed / task.elapsed
        return Text(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")


def rate_text(rate: Mapping[str, Any]) -> str:
    """``0.98 [0.93, 0.99] (94/96)``."""
    if rate["rate"] is None:
        return "not measured"
    low, high = rate["interval"]
    return f"{rate['rate']:.2f} [{low:.2f}, {high:.2f}] ({rate['count']}/{rate['n']})"


def concentration_line(found: Mapping[str, Any]) -> str:
    """``Concentration +0.71 [+0.60, +0.80]``, with what it is the mean of."""
    if found["value"] is None:
        return "Concentration: not measured"
    sizes = f"1 to {len(found['sizes'])} heads" if len(found["sizes"]) > 1 else "one head"
    against = f"{found['n_random']} random groups each" if found["n_random"] else found["against"]
    number = f"{signed_text(found['value'], found['interval'])} (n {found['n']})"
    return f"Concentration {number}: mean gap of ASR to {against}, {sizes}"


def _change_text(change: Mapping[str, Any] | None) -> str:
    return "" if change is None or change["change"] is None else signed_text(change["change"], change["interval"])


def signed_text(value: float, interval: Sequence[float] | None) -> str:
    """``+0.31 [+0.18, +0.45]``."""
    return f"{value:+.2f}" + (f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "")


def _p_text(p_value: float | None) -> str:
    return "" if p_value is None else f"{p_value:.2g}"


def show_summary(results: Mapping[str, Any], report: Path) -> None:
    """The end of an audit: the top heads, the lead's groups, and last, where the eye is, verdict and report."""
    console, verdict = stdout(), results["verdict"]
    console.print(_heads(results))
    console.print(_groups(results))
    found = results.get("concentration")
    if found is not None:
        console.print(concentration_line(found), soft_wrap=True)
    planted = results["planted_heads"]
    if planted is not None:
        console.print(f"Planted heads: {', '.join(planted) or 'none'}")
    for caveat in results["caveats"]:
        console.print(f"- {caveat}", style="dim", soft_wrap=True)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    border = _BORDERS.get(verdict["label"], "blue")
    console.print(Panel(verdict["sentence"], title=verdict["label"].replace("_", " "), border_style=border))
    for reason in verdict["reasons"]:
        console.print(f"- {reason}", soft_wrap=True)
    console.print(f"Report: {report}", soft_wrap=True)


def _groups(results: Mapping[str, Any]) -> Table:
    names = ("size", "heads", "ASR", "change", "p", "random groups", "benign kept")
    scorer, vanilla = results["lead_score"], results["behaviour"]["vanilla"]
    title = f"Groups found by {scorer}, on the test half ([95 % interval], (range); exact McNemar)"
    others = ", ".join(name for name in results["sahara"] if name != scorer)
    table = Table(*names, title=title, caption=f"Found by {others}: in the report" if others else None)
    table.add_row("0", "none", rate_text(vanilla["asr"]), "", "", "", rate_text(vanilla["benign_kept"]))
    for group in results["behaviour"]["groups"]:
        if group["scorer"] != scorer:
            continue
        control, change = group["random"], group["asr_change"]
        table.add_row(
            str(group["size"]),
            ", ".join(group["heads"]),
            rate_text(group["asr"]),
            _change_text(change),
            _p_text(change["p_value"]),
            f"{control['mean']:.2f} ({control['low']:.2f} to {control['high']:.2f})" if control else "",
            rate_text(group["benign_kept"]),
        )
    return table


def _heads(results: Mapping[str, Any]) -> Table:
    names = ("head", "mean Ships", "on benign", "refusal score", "ASR alone", "change", "p (Holm)")
    table = Table(*names, title="Top heads by mean Ships, each ablated alone")
    for head in results["behaviour"]["heads"]:
        score, change = head["refusal_score"], head["asr_change"]
        table.add_row(
            head["head"],
            f"{head['mean_ships']['mean']:.3g}",
            f"{head['benign_ships']['mean']:.3g}",
            "" if score is None else f"{score['mean']:+.3g}",
            rate_text(head["asr"]),
            _change_text(change),
            _p_text(change["p_holm"]),
        )
    return table


def show_ranking(title: str, found: Mapping[str, Any], top: int) -> None:
    """The ``top`` heads with their scores, best first, which of them tie, and what a screening left open."""
    console = stdout()
    table = Table("rank", "head", "mean", "95 % interval (Student)", "ties with", title=title)
    tied = {head: group for group in found["ties"] for head in group}
    for rank, row in enumerate(found["heads"][:top], start=1):
        interval = row["interval"]
        others = [other for other in tied.get(row["head"], ()) if other != row["head"]]
        table.add_row(
            str(rank),
            row["head"],
            f"{row['mean']:.6g}",
            "" if interval is None else f"[{interval[0]:.3g}, {interval[1]:.3g}]",
            _some(others),
        )
    console.print(table)
    if "screening" not in found:
        return
    pairs = Table("heads", "together", "alone", "beyond the sum", title="Pairs that the screening proposed, in nats")
    for pair in found["screening"]["pairs"]:
        alone = " + ".join(f"{score:.4g}" for score in pair["alone"])
        pairs.add_row(", ".join(pair["heads"]), f"{pair['together']:.4g}", alone, f"{pair['synergy']:+.4g}")
    console.print(pairs)
    console.print(f"Screened: {found['screening']['missed']['sentence']}.", soft_wrap=True)


def _some(heads: Sequence[str]) -> str:
    more = len(heads) - _TIES_SHOWN
    return ", ".join(heads[:_TIES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def show_steps(title: str, found: Mapping[str, Any]) -> None:
    """Sahara's steps with ties, and the openers where the score has some."""
    console = stdout()
    if found["openers"]:
        shown = ", ".join(f"{opener['text']!r} ({opener['count']})" for opener in found["openers"])
        console.print(f"Openers of the model's own refusals: {shown}", soft_wrap=True)
    table = Table("step", "head", f"score of the group, {found['unit']}", "next best", "ties with", title=title)
    for number, step in enumerate(found["steps"], start=1):
        following = ", ".join(f"{head} ({score:.4g})" for head, score in step["runners_up"][:2])
        table.add_row(str(number), step["chosen"], f"{step['score']:.6g}", following, _some(step["ties"]))
    console.print(table)
    for number, screened in enumerate(found.get("screening", ()), start=1):
        console.print(f"Step {number}, screened: {screened['missed']['sentence']}.", soft_wrap=True)
    console.print(f"Group: {','.join(found['group'])}")


def show_rates(title: str, found: Mapping[str, Any]) -> None:
    """ASR with heads ablated beside the unablated model, and why answers counted as they did."""
    console = stdout()
    table = Table("ablated", "ASR", "refused", "incoherent", "change", "p", title=title)
    for row in found["rates"]:
        change = row["change"]
        rates = (rate_text(row[name]) for name in ("asr", "refused", "incoherent"))
        table.add_row(row["heads"], *rates, _change_text(change), _p_text(change["p_value"] if change else None))
    reasons = Table("reason", *(row["heads"] for row in found["rates"]), title="Why, in answers")
    for reason in dict.fromkeys(reason for row in found["rates"] for reason in row["reasons"]):
        reasons.add_row(reason, *(str(row["reasons"].get(reason, 0)) for row in found["rates"]))
    console.print(table)
    console.print(reasons)

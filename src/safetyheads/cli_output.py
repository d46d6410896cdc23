"""What the terminal shows: progress, tables, the summary. Owns their look; computes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PATIENCE = 2.0
"""Seconds after which a stage gets a progress bar."""


class TerminalProgress:
    """Bars on a terminal for stages that take over two seconds; elsewhere only the lines worth keeping."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, line: str) -> None:
        """One line on stderr."""
        self.console.print(line, style="dim", highlight=False)

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar with the count, the rate and the time left, once the stage has lasted a while."""
        if not self.console.is_terminal:
            yield lambda _: None
            return
        started = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(name, total=total, rate="", visible=False)

            def done(count: int) -> None:
                lasted = time.monotonic() - started
                completed = bars.tasks[0].completed + count
                bars.update(
                    task, advance=count, visible=lasted > PATIENCE, rate=f"{completed / max(lasted, 1e-3):.0f}/s"
                )

            yield done


def rate_text(rate: Mapping[str, Any]) -> str:
    """``0.98 [0.93, 0.99] (94/96)``."""
    if rate["rate"] is None:
        return "not measured"
    low, high = rate["interval"]
    return f"{rate['rate']:.2f} [{low:.2f}, {high:.2f}] ({rate['count']}/{rate['n']})"


def show_summary(console: Console, results: Mapping[str, Any], report: str) -> None:
    """The end of an audit: the verdict, the groups, the top heads, and where the report is."""
    verdict = results["verdict"]
    style = {"concentrated": "yellow", "none_found": "green"}.get(verdict["label"], "blue")
    console.print(Panel(verdict["sentence"], title=verdict["label"].replace("_", " "), border_style=style))
    groups = Table("search by", "heads", "ASR", "p", "random groups", "benign kept", title="Groups, on the test half")
    for group in results["behaviour"]["groups"]:
        control = group["random"]
        band = f"{control['mean']:.2f} [{control['low']:.2f}, {control['high']:.2f}]" if control else ""
        groups.add_row(
            group["scorer"],
            ", ".join(group["heads"]),
            rate_text(group["asr"]),
            f"{group['asr_change']['p_value']:.2g}",
            band,
            rate_text(group["benign_kept"]),
        )
    heads = Table(
        "head", "mean Ships", "on benign", "refusal score", "ASR alone", "p (Holm)", title="Top heads by mean Ships"
    )
    for head in results["behaviour"]["heads"]:
        score = head["refusal_score"]
        heads.add_row(
            head["head"],
            f"{head['mean_ships']['mean']:.3g}",
            f"{head['benign_ships']['mean']:.3g}",
            "" if score is None else f"{score['mean']:+.3g}",
            rate_text(head["asr"]),
            f"{head['asr_change']['p_holm']:.2g}",
        )
    console.print(groups)
    console.print(heads)
    for caveat in results["caveats"]:
        console.print(f"- {caveat}", style="dim", highlight=False)
    for warning in results["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)


def show_ranking(
    console: Console, title: str, unit: str, ranked: Sequence[tuple[Any, float]], ties: Sequence[Any]
) -> None:
    """Heads with their scores, best first, and how many of them tie."""
    table = Table("rank", "head", unit, title=title)
    for rank, (head, score) in enumerate(ranked, start=1):
        table.add_row(str(rank), str(head), f"{score:.6g}")
    console.print(table)
    for tie in ties:
        console.print(f"tied: {', '.join(str(head) for head in tie[:12])}{' ...' * (len(tie) > 12)}", highlight=False)

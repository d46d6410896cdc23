"""Prints progress, tables and summaries on the terminal.

Results go to stdout; progress, notes and errors to stderr. Every number stands as ``value [low, high] n``; where all
numbers of a table share n, it stands below the table.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import groupby
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
from safetyheads.cli.terminal import Terminal, terminal_text
from safetyheads.display import duration, in_clusters
from safetyheads.runs.config import Progress, Silent

if TYPE_CHECKING:
    from safetyheads.runs.compare import Change, Comparison

PATIENCE = 2.0
"""Seconds after which a stage gets a progress bar."""
INTERVAL = 30.0
"""Seconds between two lines where there are no bars."""
_WIDTH_OFF_TERMINAL = 140
_ROWS_SHOWN = 24
_HEADS_SHOWN = 10
_NAMES_SHOWN = 12
_GAP = 2
_COMFORT = 20

Found: TypeAlias = Mapping[str, Any]
"""A part of the results, as JSON has it."""


# Streams and progress


def stdout() -> Terminal:
    """The console of results, where brackets are text; as wide as COLUMNS says where it is no terminal."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OFF_TERMINAL
    return Terminal(sys.stdout, width)


def print_error(line: str) -> None:
    """Print one line on stderr; where nobody reads it, the exit code says enough."""
    with suppress(BrokenPipeError):
        sys.stderr.write(f"{terminal_text(one_line(line))}\n")


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
    return Silent() if quiet else RichProgress(Terminal(sys.stderr))


class RichProgress:
    """Shows bars on a terminal and in notebooks for stages that last over two seconds; elsewhere only lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stages: tuple[str, ...] = ()
        # In a notebook rich draws by ipywidgets.
        self.draws = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)

    def say(self, line: str | Callable[[], str]) -> None:
        """Print one line on stderr."""
        said = line if isinstance(line, str) else line()
        self.console.print(terminal_text(said, newlines=False), style="dim", soft_wrap=True)

    @contextmanager
    def track(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show the count, the rate and the time left; without bars, a line every half a minute."""
        stage = name.rpartition(": ")[2]
        if stage in self.stages:
            name = f"{self.stages.index(stage) + 1} of {len(self.stages)}: {name}"
        if not self.draws:
            with self._lines(name, total) as done:
                yield done
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(),
        )
        with _PatientBars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(terminal_text(name), total=total)
            yield lambda count: bars.advance(task, count)

    def expect(self, stages: Sequence[str]) -> None:
        """Number the stages that lie ahead."""
        self.stages = tuple(stages)

    @contextmanager
    def _lines(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A line every half a minute, also while nothing is done: a batch may take minutes."""
        started, count, over = time.monotonic(), 0, threading.Event()

        def done(more: int) -> None:
            nonlocal count
            count += more

        def tell() -> None:
            while not over.wait(INTERVAL):
                passed = time.monotonic() - started
                left = f"about {duration(passed / count * (total - count))} left" if count else "none done yet"
                self.say(f"{name}: {count} of {total}, {left}")

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield done
        finally:
            over.set()
            teller.join()


class _PatientBars(Bars):
    """Draws nothing for the first ``PATIENCE`` seconds: most stages are over by then."""

    def get_renderables(self) -> Iterable[RenderableType]:
        late = any((task.elapsed or 0.0) >= PATIENCE for task in self.tasks)
        return super().get_renderables() if late else [""]


class _Speed(ProgressColumn):
    """Items a second; seconds an item where they are slow."""

    def render(self, task: Task) -> Text:
        rate = task.completed / task.elapsed if task.elapsed else 0.0
        return Text((f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each") if rate else "")


def show_dry_run(found: Found) -> None:
    """Print what a run would compute, and where it would keep it."""
    lines, stages = [*found["lines"], f"run directory: {found['out']}"], found.get("stages", ())
    if stages:
        lines += [f"stages: {', '.join(stages)}", f"at most {duration(found['seconds']['at_most'])}, judges left out"]
    print_lines([*lines, "Nothing was written."])


# Numbers and tables


@dataclass(frozen=True, slots=True)
class Number:
    """A number in a cell, with what belongs to it."""

    text: str = ""
    interval: str = ""
    n: str = ""
    p: str = ""
    style: str = ""

    def written(self, between: str = " ", with_n: bool = True) -> Text:
        """The number with its interval, n and p; ``between`` them a blank or a line break."""
        parts = [part for part in (self.interval, self.n if with_n else "", self.p) if part]
        text = Text(terminal_text(self.text), style=self.style)
        return text.append(terminal_text(between + between.join(parts)), style="dim") if parts else text

    def __str__(self) -> str:
        return self.written().plain


Cell: TypeAlias = str | Text | Number
"""What stands in a table: texts to the left, numbers to the right."""
Column: TypeAlias = str | Callable[[Any], Any]
"""What a row's cell shows of an item: ``path form`` as in ``asr_change.p_holm .2g``, or what a function makes of it.

A form is a format, or, of a record with an interval, the field that holds its number: ``rate`` or ``change``."""


def get(item: Any, path: str) -> Any:
    """What stands at ``path``, such as ``asr_change.p_holm``; None where a part of it is None or absent."""
    for name in path.split("."):
        item = item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)
    return item


def cell(item: Any, column: Column) -> Cell:
    """The cell that a column shows of an item; empty for None."""
    path, _, form = ("", "", "") if callable(column) else column.partition(" ")
    value = column(item) if callable(column) else get(item, path)
    if value is None:
        return Number()
    if isinstance(value, str | Text | Number):
        return value
    if isinstance(value, int | float):
        return Number(
            format(value, form) if form else str(value) if isinstance(value, int) else f"{_unsigned(value):.2f}"
        )
    if form:
        return rate(value) if form == "rate" else signed(*(get(value, name) for name in (form, "interval", "n")))
    more = len(value) - _NAMES_SHOWN
    return ", ".join(value[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def rate(found: Any) -> Number:
    """``0.98 [0.93, 0.99] n 96``."""
    share, bounds, n = (get(found, name) for name in ("rate", "interval", "n"))
    count = f"n {n:,}" if n else ""  # a rate of nothing would part the table's n
    return Number("not measured" if share is None else f"{share:.2f}", interval(bounds, ".2f"), count)


def signed(value: float | None, bounds: Sequence[float] | None = None, n: int | None = None) -> Number:
    """``+0.31 [+0.18, +0.45] n 96``."""
    if value is None:
        return Number()
    return Number(f"{_unsigned(value):+.2f}", interval(bounds, "+.2f"), "" if n is None else f"n {n:,}")


def _unsigned(value: float) -> float:
    """Two decimals; what rounds to nothing has no sign, for -0.00 would be read as a loss."""
    return round(value, 2) + 0.0


def interval(bounds: Sequence[float] | None, form: str) -> str:
    """``[0.18, 0.45]``."""
    return f"[{bounds[0]:{form}}, {bounds[1]:{form}}]" if bounds else ""


def print_items(title: str, items: Iterable[Any], columns: Mapping[str, Column], caption: str = "") -> None:
    """Print a row for each item."""
    print_table(title, list(columns), [[cell(item, column) for column in columns.values()] for item in items], caption)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "", lines: bool = False
) -> None:
    """Print a table that breaks no number, however narrow the terminal.

    Intervals stand beside their numbers where there is room, else below them; where there is none at all, each row
    becomes a paragraph. n stands below the table where all of its numbers share it.
    """
    console = stdout()
    ns = {item.n for row in rows for item in row if isinstance(item, Number) and item.n}
    shared = len(ns) == 1
    # A column without any cell is of numbers, which take no room.
    are_text = [any(isinstance(row[at], str | Text) and str(row[at]) for row in rows) for at in range(len(columns))]

    def texts(between: str) -> list[list[Text]]:
        return [
            [
                item.written(between, not shared)
                if isinstance(item, Number)
                else Text(terminal_text(item))
                if isinstance(item, str)
                else item
                for item in row
            ]
            for row in rows
        ]

    console.print(f"\n{title}", style="bold")
    for between, whole_titles, comfort in ((" ", True, _COMFORT), (" ", False, _COMFORT), ("\n", False, 0)):
        table, least = _laid_out(columns, texts(between), are_text, whole_titles, comfort)
        if least <= console.width:
            table.show_lines = lines
            console.print(table)
            break
    else:
        first = are_text.index(True) if True in are_text else 0
        for row in texts(" "):
            others = [(column, text.plain) for column, text in zip(columns, row, strict=True) if text is not row[first]]
            console.print(one_line(row[first].plain), style="bold")
            console.print("; ".join(f"{column}: {one_line(text)}" for column, text in others if text not in ("", "–")))
    if caption or shared:
        below = [caption, f"{min(ns)} behind every interval." if shared else ""]
        console.print(" ".join(filter(None, below)), style="dim")


def _laid_out(
    columns: Sequence[str], rows: Sequence[Sequence[Text]], are_text: Sequence[bool], whole_titles: bool, comfort: int
) -> tuple[Table, int]:
    """The table, and the width from which no number breaks and texts have some comfort."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns), pad_edge=False, padding=(0, 1, 0, 0))
    least = -_GAP
    for at, (column, is_text) in enumerate(zip(columns, are_text, strict=True)):
        lines = [line for row in rows for line in row[at].plain.split("\n")]
        longest = max(map(len, lines), default=0)
        words = [column] if whole_titles else column.split()
        words += " ".join(lines).split() if is_text else []
        width = max(1, min(longest, comfort) if is_text else longest, *map(len, words))
        # Rich narrows the columns that have no width: those of texts.
        table.add_column(column, justify="left" if is_text else "right", width=None if is_text else width)
        least += width + _GAP
    for row in rows:
        table.add_row(*row)
    return table, least


def print_first(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "", where: str = "with --json"
) -> None:
    """Print a table's first rows, and how many more there are elsewhere."""
    n_more = len(rows) - _ROWS_SHOWN
    more = f"{n_more} more row{'s' * (n_more > 1)} {where}." if n_more > 0 else ""
    print_table(title, columns, rows[:_ROWS_SHOWN], " ".join(filter(None, (caption, more))))


def print_facts(title: str, facts: Mapping[str, Cell]) -> None:
    """Print names with their values."""
    texts = {name: fact.written() if isinstance(fact, Number) else fact for name, fact in facts.items()}
    print_table(title, ("", ""), list(texts.items()))


def print_lines(lines: Iterable[str], style: str | None = None) -> None:
    """Print lines that the terminal may wrap; a line break within one is shown, escaped."""
    for line in lines:
        text = line.lstrip("\n")
        above = line[: len(line) - len(text)]
        stdout().print(above + terminal_text(text, newlines=False), style=style, soft_wrap=True)


def print_warnings(results: Found) -> None:
    """Print what happened on the way."""
    print_lines((f"warning: {warning}" for warning in results["warnings"]), "yellow")


def print_cautions(results: Found) -> None:
    """Print the concentration and the planted heads where there are some, the caveats and the warnings."""
    found, planted = results.get("concentration"), results.get("planted_heads")
    if found is not None and found["value"] is not None:
        sizes = f"1 to {len(found['sizes'])} heads" if len(found["sizes"]) > 1 else "one head"
        against = f"at least {found['n_random']} random groups each" if found["n_random"] else found["against"]
        number = cell(results, "concentration value")
        print_lines([f"\nConcentration: {number} (mean gap of ASR to {against}, {sizes})"])
    if planted is not None:
        print_lines([f"Planted heads: {', '.join(planted) or 'none'}"])
    print_lines((f"- {caveat}" for caveat in results["caveats"]), "dim")
    print_warnings(results)


# Audits and scans


def show_audit(results: Found) -> None:
    """Top heads, the lead's groups, and last, where the eye is, the verdict."""
    verdict, behaviour, lead = results["verdict"], results["behaviour"], results["lead_score"]
    if verdict["stopped_early"]:
        print_warnings(results)
        print_lines([verdict["sentence"]])
        return
    columns: dict[str, Column] = {"head": "head", "mean Ships": "mean_ships.mean .3g"}
    columns |= {"on benign": "benign_ships.mean .3g", "refusal score": "refusal_score.mean +.3g"}
    columns |= {"ASR alone": "asr rate", "change": "asr_change change", "p (Tarone)": "asr_change.p_tarone .2g"}
    stability = results.get("stability")
    if stability:
        ranks = {head["head"]: head for head in stability["heads"]}
        columns["rank"] = lambda head: _rank(ranks.get(head["head"]))
    print_items("Top heads by mean Ships, each ablated alone", behaviour["heads"], columns)
    groups = [group for group in behaviour["groups"] if group["scorer"] == lead]
    groups = [{"size": 0, "heads": ["none"], **behaviour["vanilla"]}, *groups]
    title = f"Groups found by {lead}, on the test half ([95 % interval], (range); exact McNemar)"
    columns = {"size": "size", "heads": "heads", "coherent ASR": "coherent_asr rate"}
    columns |= {"ASR": "asr rate", "coherent of these": "coherent_of_complied rate", "change": "asr_change change"}
    columns |= {"p": "asr_change.p_value .2g", "random groups": _random, "benign answered": "benign_answered rate"}
    others = ", ".join(name for name in results["sahara"] if name != lead)
    print_items(title, groups, columns, f"Found by {others}: in the report." if others else "")
    _show_damage(groups, results)
    _show_by_judge(groups, results)
    if stability:
        _show_stability(stability)
    _show_screening(results)
    _show_openers(results)
    _show_word_judges(results)
    print_cautions(results)
    border = {"concentrated": "yellow", "partly concentrated": "yellow", "none found": "green"}
    stdout().print(
        Panel(verdict["sentence"], title=verdict["label"], border_style=border.get(verdict["label"], "blue"))
    )
    print_lines(f"- {reason}" for reason in verdict["reasons"])


def _rank(stability: Found | None) -> Number | None:
    return None if stability is None else Number(str(stability["rank"]), interval(stability["interval"], "d"))


def _show_stability(stability: Found) -> None:
    group, n = stability["group"], stability["n"]
    facts: dict[str, Cell] = {"same heads and size": Number(f"{group['repeatability']['rate']:.2f}")}
    facts |= {"same heads": Number(f"{group['same_heads']['rate']:.2f}"), "heads in common": cell(group, "jaccard")}
    facts |= {"same size": Number(f"{group['same_size']['rate']:.2f}")}
    for top in stability["tops"]:
        settles = "more than any tried" if top["settles"] is None else f"{top['settles']} of {n}"
        beyond = top["settles"] is not None and top["settles"] > n
        facts[f"prompts that the top {top['k']} needs"] = Number(f"{top['settles']}, beyond {n}" if beyond else settles)
    for name, half in stability["halves"].items():
        search, test = cell(half, "search rate"), cell(half, "test rate")
        label = {"asr": "coherent ASR", "benign_answered": "benign answered"}.get(name, name)
        facts[f"{label}, search half"], facts[f"{label}, test half"] = search, test
        facts[f"{label}, search less test"] = signed(half["difference"], half["interval"])
    print_facts(f"Would other prompts find the same? {stability['n_draws']:,} resamples of {n} search prompts", facts)
    further, lost = group["further_passes"], group["not_followed"]
    print_lines([f"{further} passes beyond the search's own; {lost} resamples not followed to their end."], "dim")


def _show_damage(groups: Sequence[Found], results: Found) -> None:
    columns: dict[str, Column] = {"ablated": "heads", "lost": _gross_loss}
    for name, key in {"KL, nats": "kl", "drop of log p, nats": "log_probability_drop"}.items():
        columns |= {name: f"damage.{key}.mean .3g", f"{name}: random groups": partial(_random_damage, key=key)}
    measured = [group for group in groups if group.get("damage")]
    if measured:
        print_items("Damage: benign answers lost, and how far the model moves from its own", measured, columns)
    _say_what_is_coherent(results)


def _say_what_is_coherent(results: Found) -> None:
    limit = results["coherence"]["limit"]
    surprise = "" if limit is None else f" and their surprise is at most {limit:.2f} nats a token"
    print_lines([f"Answers are coherent if no rule of words finds a fault{surprise}."], "dim")


def _gross_loss(group: Found) -> Number:
    loss = group["gross_loss"]
    return Number(f"{loss['count']} of {loss['n']}", f"at most {loss['upper']:.2f}")


def _random_damage(group: Found, key: str) -> Number | None:
    random = group["damage"][key]["random"]
    if random is None:
        return None
    return Number(f"{random['mean']:.3g}", f"({random['low']:.3g} to {random['high']:.3g})", f"n {random['n_groups']}")


def _show_by_judge(groups: Sequence[Found], results: Found) -> None:
    names = [judge["name"] for judge in results.get("judges", ())]
    if len(names) > 1:
        rows = [(cell(group, "heads"), *(rate(group["by_judge"][name]) for name in names)) for group in groups]
        print_table("ASR by judge", ("ablated", *names), rows)


def _show_openers(found: Found) -> None:
    columns: dict[str, Column] = {"opener": lambda opener: repr(opener["text"])}
    columns |= {"refusals": lambda opener: f"{opener['count']} of {opener['n_refused']}"}
    columns |= {"complied answers": lambda opener: f"{opener['n_complied']} of {opener['of_complied']}"}
    columns |= {"benign answers": lambda opener: f"{opener['n_benign']} of {opener['of_benign']}"}
    if found.get("openers"):
        print_items("Openers of the model's own refusals, in answers", found["openers"], columns)


def _show_word_judges(found: Found) -> None:
    if judges := found.get("word_judges"):
        kappa = judges["kappa"]["kappa"]
        print_lines([judges["sentence"] + ("" if kappa is None else f" Kappa: {_kappa(judges['kappa'])}")])


def _random(group: Found) -> Number | None:
    control = group.get("random")
    if not control:
        return None
    bounds = f"({control['low']:.2f} to {control['high']:.2f})" if "low" in control else ""
    if "matched" not in control:
        return Number(f"{control['mean']:.2f}", bounds)
    drawn = f"{'all ' * control['all']}{control['n_groups']} of {control['matched']}"
    return Number(
        f"{control['mean']:.2f}", bounds, drawn, f"p {control['p_value']:.2g}, least {control['least_p']:.2g}"
    )


def show_scan(results: Found) -> None:
    """Heads, groups, scores, judges and costs, and last, where the eye is, the summary."""
    from safetyheads.reports.scan import ROLES, by_asr

    ranked, n_differing = by_asr(results["heads"]), sum(head["change"]["differs"] for head in results["heads"])
    n_shown = max(_HEADS_SHOWN, min(n_differing, 3 * _HEADS_SHOWN))
    n_more = len(ranked) - n_shown
    columns: dict[str, Column] = {"head": lambda head: head["head"] + " *" * head["change"]["differs"]}
    columns |= {"ASR alone": "asr rate", "coherent ASR": "coherent_asr.rate", "shrunken": "shrunken.rate"}
    columns |= {"change": "change change", "p (Tarone)": "change.p_tarone .2g", "p (Holm)": "change.p_holm .2g"}
    if "benign" in results["vanilla"]:
        columns |= {"benign refused": "benign.refused.rate", "benign changed": "benign.changed.rate"}
        columns |= {"KL, nats": "benign.kl.mean .2g"}
        columns |= {"so it": lambda head: ROLES[head["role"]][0] if head["role"] != "none" else ""}
    title = f"Heads of highest ASR, each ablated alone: {results['ablation']['label']}, {results['sampling']['name']}"
    print_items(title, ranked[:n_shown], columns, f"{n_more} more heads in the report." if n_more > 0 else "")
    own = [{**group, "heads": [f"each prompt's top {group['size']}"]} for group in results["query_level"]]
    if groups := [*results["groups"], *own]:
        columns = {"ablated": "heads", "ASR": "asr rate", "coherent ASR": "coherent_asr rate"}
        columns |= {"change": "change change"}
        print_items("Groups", groups, columns | {"random groups": _random, "benign answered": "benign_answered rate"})
    _say_what_is_coherent(results)
    _show_scores_and_costs(results)
    _show_openers(results)
    _show_word_judges(results)
    print_cautions(results)
    least, strongest = results["statistics"]["smallest_change"], ranked[0]
    joined = in_clusters(results["statistics"]["n_clusters"])
    shown = "none" if least["change"] is None else f"{least['change']:.2f}"
    print_facts(
        "Summary",
        {
            "heads that change the ASR (Tarone)": f"{n_differing} of {len(ranked)}",
            "smallest rise found in 80 % of runs": f"{shown} (n {least['n']}{joined}, one head of {least['tests']})",
            "ASR, nothing ablated": cell(results, "vanilla.harmful.asr rate"),
            "coherent ASR, nothing ablated": cell(results, "vanilla.harmful.coherent_asr rate"),
            f"ASR, strongest head {strongest['head']}": cell(strongest, "asr rate"),
            f"coherent ASR, strongest head {strongest['head']}": cell(strongest, "coherent_asr rate"),
            "judge": results["lead_judge"],
        },
    )


def _show_scores_and_costs(results: Found) -> None:
    if proxies := results["proxies"]:
        halves = [{**proxies["split_half"], "score": "split half"}] if proxies["split_half"] else []
        scores = [
            {**score, **{f"top_{top['k']}": top for top in score["sizes"]}} for score in (*proxies["scores"], *halves)
        ]
        sizes = [k for k in (3, 10) if f"top_{k}" in scores[0]]
        columns: dict[str, Column] = {"score": "score", "Spearman": _between("spearman", "spearman_interval")}
        columns["AUC"] = _between("auc", "auc_interval")
        print_items(
            f"Scores against the ASR of every head, {scores[0]['n_differing']} of which differ",
            scores,
            columns
            | {f"top {k} that differ": f"top_{k}.hits .3g" for k in sizes}
            | {f"regret, top {k}": _between(f"top_{k}.regret_on_halves", f"top_{k}.halves_interval") for k in sizes},
            f"Regret: ASR given away, on half of the prompts. Split half: the ASR of one half as the score for the "
            f"other{_reliable(halves)}. Intervals: over prompts.",
        )
    if results["agreement"] is not None:
        columns = {"judges": lambda pair: f"{pair['first']}, {pair['second']}"}
        columns |= {"kappa, complied or not": lambda pair: _kappa(pair["compliance"])}
        columns |= {"kappa, three classes": lambda pair: _kappa(pair["classes"])}
        columns |= {"differ": "count ,", "answers": "n ,"}
        print_items("Agreement of judges", results["agreement"]["pairs"], columns)
    costs = {
        "answers": "n_rows ,",
        "equal to the unablated model's": "n_drafted ,",
        "decoded from the first difference on": "n_continued ,",
        "near-ties, decoded plainly": "n_near_ties ,",
        "ended once every judge was final": "n_incomplete ,",
        "tokens computed": "tokens_computed ,.0f",
        "tokens of plain decoding, at least": "tokens_plain ,",
    }
    print_facts("What the answers cost", {name: cell(results["economy"], column) for name, column in costs.items()})


def _between(value: str, bounds: str) -> Column:
    """A number with the interval that stands at another path."""

    def number(item: Any) -> Number:
        found = get(item, value)
        return Number() if found is None else Number(f"{_unsigned(found):.2f}", interval(get(item, bounds), ".2f"))

    return number


def _reliable(halves: Sequence[Any]) -> str:
    """What follows from the split-half correlation for the ASR of all prompts."""
    if not halves or halves[0]["reliability"] is None:
        return ""
    return (
        f"; reliability of the ASR of all prompts {halves[0]['reliability']:.2f} (Spearman-Brown), so that no score's "
        f"Spearman is expected above {halves[0]['bound']:.2f}"
    )


def _kappa(found: Any) -> Number:
    return signed(get(found, "kappa"), get(found, "interval"))


# Scores, searches, rates and tasks


def show_ranking(found: Found, top: int) -> None:
    """The ``top`` heads, best first, which of them tie, and what a screening left open."""
    tied = {head: [other for other in group if other != head] for group in found["ties"] for head in group}
    heads = [
        {"rank": rank, **head, "ties": tied.get(head["head"])} for rank, head in enumerate(found["heads"], start=1)
    ]
    columns: dict[str, Column] = {
        "rank": "rank",
        "head": "head",
        "mean": "mean .6g",
        "median [95 %]": lambda head: Number(
            f"{head['median']:.3g}", interval(head["median_interval"], ".3g"), f"n {head['n']}"
        ),
        "ties with": "ties",
    }
    print_items(f"Mean Ships over {found['n']} prompts, in nats: {_ablation(found)}", heads[:top], columns)
    if "screening" in found:
        columns = {"heads": "heads", "together": "together .4g"}
        columns |= {"alone": lambda pair: " + ".join(f"{score:.4g}" for score in pair["alone"])}
        columns |= {"beyond the sum": "synergy +.4g"}
        print_items("Pairs that the screening proposed, in nats", found["pairs"], columns)
    _show_screening(found)
    print_warnings(found)


def _show_screening(found: Found) -> None:
    """What a screening left open, of each step."""
    steps = enumerate(found.get("screening") or (), start=1)
    print_lines(f"Step {number}, screened: {step['missed']['sentence']}." for number, step in steps)


def show_steps(found: Found) -> None:
    """Sahara's steps with ties, and the openers where the score has some."""
    _show_openers(found)
    _show_word_judges(found)
    steps = [{"step": number, **step} for number, step in enumerate(found["steps"], start=1)]
    columns: dict[str, Column] = {"step": "step", "head": "chosen"}
    columns |= {f"score of the group, {found['unit']}": "score .6g"}
    columns |= {"next best": lambda step: ", ".join(f"{head} ({score:.4g})" for head, score in step["runners_up"][:2])}
    columns |= {"ties with": "ties"}
    print_items(f"Sahara by {found['score']} over {found['n']} prompts: {_ablation(found)}", steps, columns)
    _show_screening(found)
    print_warnings(found)
    print_lines([f"Group: {','.join(found['group'])}"])


def show_rates(found: Found) -> None:
    """ASR of each group beside the unablated model's, and why answers counted as they did."""
    groups = found["rates"]
    columns = {"ablated": "heads", "coherent ASR": "coherent_asr rate", "ASR": "asr rate"}
    columns |= {"coherent of these": "coherent_of_complied rate", "refused": "refused rate"}
    columns |= {"incoherent": "incoherent rate"}
    columns |= {"change": "change change", "p": "change.p_value .2g"}
    print_items(f"Attack success over {found['n']} prompts: {_ablation(found)}", groups, columns)
    _say_what_is_coherent(found)
    _show_by_judge(groups, found)
    _show_word_judges(found)
    reasons = dict.fromkeys(reason for group in groups for reason in group["reasons"])
    counts = [(reason, *(Number(str(group["reasons"].get(reason, 0))) for group in groups)) for reason in reasons]
    print_table("Why, in answers", ("reason", *(group["heads"] for group in groups)), counts)
    print_cautions(found)


def _ablation(found: Found) -> str:
    return str(Ablation(found["ablation"]["name"], found["ablation"]["epsilon"]))


def show_evaluation(results: Found) -> None:
    """Each metric, vanilla first, and the changes from vanilla."""

    def value(metric: Found) -> Number:
        number, n = metric["value"], f"n {metric['n']:,}"
        if number is None:
            return Number("not finite", n=n)
        return Number(format(number, ".3f" if abs(number) < 1000 else ".4g"), interval(metric["interval"], ".3f"), n)

    def flips(metric: Found) -> Number | None:
        gained, lost = (get(metric, f"difference.{name}") for name in ("gained", "lost"))
        return None if gained is None else Number(f"{gained}, {lost}")

    tests = sorted({get(metric, "difference.test") for metric in results["metrics"]} - {None})
    columns: dict[str, Column] = {
        "task": "task",
        "metric": lambda metric: metric["metric"] + f", {metric['unit']}" * (metric["unit"] != "whole"),
        "ablated": "variant",
        "value": value,
        "change": lambda metric: signed(get(metric, "difference.change"), get(metric, "difference.interval")),
        "gained, lost": flips,
    }
    columns |= {"p": "difference.p_value .2g", "p (Holm)": "difference.p_holm .2g"}
    title = f"Tasks of lm-eval {results['settings']['lm_eval']}: {results['ablation']['label']}"
    caption = "Change from vanilla on the same samples, [95 % interval]" + "".join(f"; p: {test}" for test in tests)
    print_items(title, results["metrics"], columns, f"{caption}.")
    print_cautions(results)


# Finished runs


def show_judged(found: Sequence[Found], validation: Found, report: Path) -> None:
    """Rates of the run's judge and of each other one, where they differ most first, and how far they agree.

    Then how right each judge is by people's labels, where there are some, and the rates raw and corrected.
    """
    for rejudged in found:
        names = rejudged["lead"], rejudged["judge"]
        rates = [(label, *(by_judge[name] for name in names)) for label, by_judge in rejudged["rates"].items()]
        rates.sort(key=lambda row: -abs((row[2]["rate"] or 0.0) - (row[1]["rate"] or 0.0)))
        rows = [(label, rate(lead), rate(other)) for label, lead, other in rates]
        print_first("Judges side by side", ("answers", *(f"complied, {name}" for name in names)), rows)
        agreed = rejudged["kappa"]
        kappa = "not defined" if agreed["kappa"] is None else f"{_kappa(agreed)} n {agreed['n']:,}"
        facts = {"answers": f"{rejudged['n_rows']:,}", "unscored": f"{rejudged['n_unscored']:,}"}
        facts |= {"judged differently": f"{rejudged['n_differing']:,}", "Cohen's kappa": kappa}
        facts |= {f"unscored: {reason}": f"{count:,}" for reason, count in rejudged["unscored"].items()}
        print_facts("Agreement", facts | {"seconds": f"{rejudged['seconds']:.1f}"})
    if validation:
        labels = [
            {"judge": judge, "label": label, **accuracy}
            for judge, entry in validation.items()
            for label, accuracy in entry["accuracy"].items()
        ]
        columns: dict[str, Column] = {"judge": "judge", "label": "label", "answers": "n"}
        columns |= {"sensitivity": "sensitivity rate", "specificity": "specificity rate"}
        print_items("Judges against people's labels", labels, columns)
    for judge, entry in validation.items():
        both = []
        for row in entry["rates"]:
            fixed = row["corrected"]
            share = "–" if fixed["rate"] is None else f"{fixed['rate']:.2f}"
            corrected = Number(share, interval(fixed["interval"], ".2f"))
            both.append((row["label"], rate(row["raw"]), corrected, f"{fixed['how']}, {fixed['n_labelled']} labelled"))
        title = f"Attack success by {judge}, raw and corrected for its errors"
        caption = "Labels of this run's answers." if entry["own"] else "Labels of other answers."
        print_first(title, ("ablated", "raw", "corrected", "how"), both, caption)
    print_lines([f"Report: {report}"])


def show_comparison(compared: Comparison, gates: Sequence[Found], pages: Sequence[Path] = ()) -> None:
    """What both runs are, what changed, how heads rank, which came and went, what makes that weak, and the gates."""
    for name, run in (("A", compared.before), ("B", compared.after)):
        verdict = "" if run["verdict"] is None else f", {run['verdict']}"
        started = f", {run['started'][:16].replace('T', ' ')}" if run["started"] else ""
        print_lines([f"{name}: {compared.kind} of {run['model']}{started}{verdict} ({run['path']})"])
    rows = [
        (
            *(label, cell(change, "before"), cell(change, "after"), signed(change.change, change.interval)),
            cell(change, "p_value .2g"),
            "n " + " and ".join(map(str, dict.fromkeys(change.n))) if change.change is not None else "",
            change.shown,
            ": ".join(filter(None, (_paired(change), change.note))),
        )
        for label, change in compared.changes.items()
    ]
    columns = ("", "A", "B", "change [95 %]", "p", "prompts", "the interval shows", "how")
    print_table("From A to B", columns, rows)
    if compared.ranks:
        _show_ranks(compared)
    if compared.heads is not None:
        moved = compared.heads
        parts = [f"{word} {', '.join(getattr(moved, word)) or 'none'}" for word in ("gone", "new", "kept")]
        print_lines([f"{moved.what[:1].upper()}{moved.what[1:]}: {'; '.join(parts)}"])
    print_lines(filter(None, [compared.shapes_note]))
    print_lines((f"cannot be compared: {obstacle}" for obstacle in compared.obstacles), "red")
    print_lines((f"warning: {warning}" for warning in compared.warnings), "yellow")
    for gate in gates:
        outcome = gate["outcome"].upper() if gate["outcome"] != "passed" else "passed"
        print_lines([f"{outcome}: fail if {gate_text(gate)}"])
    print_lines(f"Report: {page}" for page in pages)


def _paired(change: Change) -> str:
    return "" if change.change is None else "paired" if change.paired else "unpaired"


def gate_text(gate: Found) -> str:
    """``asr_increase > 0.1: +0.31 [+0.18, +0.45] n 48, upper bound +0.45``, and the reason where there is one."""
    condition, value, bounds, n, number = (gate[name] for name in ("condition", "value", "interval", "n", "number"))
    parts = []
    if value is not None:
        is_change = bounds is not None or "increase" in condition
        count = "" if n is None else f"n {n}"
        parts = [str(signed(value, bounds, n) if is_change else Number(f"{value:.3g}", n=count))]
    if number is not None and gate["asked"] != "value":
        parts.append(f"{'upper' if gate['asked'] == 'high' else 'lower'} bound {number:+.3f}")
    return f"{condition}: {'; '.join(filter(None, (', '.join(parts), gate['reason'])))}"


def _show_ranks(compared: Comparison) -> None:
    rows: list[list[Cell]] = []
    for ranks in compared.ranks:
        forms = ("spearman +.2f", "spearman_p .2g", "kendall +.2f", "kendall_p .2g")
        correlations = (str(cell(ranks, form)) or "tied" for form in forms)
        row: list[Cell] = [ranks.label, Number(f"{ranks.n:,}"), *map(Number, correlations)]
        for top in ranks.overlaps:
            sizes = " and ".join(map(str, dict.fromkeys(top.sizes)))
            row.append(Number(f"{top.shared} of {sizes}", f"({top.expected:.2g}), {top.p_value:.2g}"))
        rows.append(row)
    tops = (f"top {top.k} shared (chance), p" for top in compared.ranks[0].overlaps)
    columns = ("score", "heads", "Spearman", "its p", "Kendall", "p of that", *tops)
    print_table("How alike the two runs rank the heads", columns, rows)
    for top in () if compared.lead_ranks is None else compared.lead_ranks.overlaps:
        gone, new = (", ".join(heads) or "none" for heads in (top.gone, top.new))
        short = [f"{name}'s has {size}" for name, size in zip("AB", top.sizes, strict=True) if size < top.k]
        ties = f" (without ties across the cut {' and '.join(short)})" if short else ""
        print_lines([f"Top {top.k} by {get(compared.lead_ranks, 'label')}: gone {gone}; new {new}{ties}"])


def show_history(history: Mapping[str, Any], page: Path) -> None:
    """The runs as a table, and what was skipped."""

    def run(entry: Mapping[str, Any]) -> str:
        date = "date unknown" if entry["started"] is None else entry["started"][:16].replace("T", " ")
        return f"{entry['name']} ({entry['kind']})\n{date}"

    def since(entry: Mapping[str, Any]) -> str:
        change, settings = entry["change"], entry["other_settings"]
        if change is None:
            return ""
        lines = [change["note"] if change["change"] is None else str(signed(change["change"], change["interval"]))]
        lines += [change["shown"]] * bool(change["shown"])
        lines += ["unpaired"] * (change["change"] is not None and not change["paired"])
        return "\n".join([*lines, *([f"other {', '.join(settings)}"] if settings else [])])

    columns: dict[str, Column] = {"run": run, "model": "model", "ASR": "vanilla_asr rate", "change": since}
    columns |= {"group's ASR": "group_asr rate", "group": "group", "concentration": "concentration value"}
    columns |= {"top heads": lambda entry: ", ".join(entry["top_heads"]) or "tied"}
    print_items(f"Runs below {history['folder']}, oldest first ([95 % interval])", history["runs"], columns)
    broken = [run for run in history["skipped"] if "results of kind" not in run["reason"]]
    print_lines((f"skipped {run['name']}: {one_line(run['reason'])}" for run in broken), "yellow")
    if n_others := len(history["skipped"]) - len(broken):
        print_lines([f"Left out: {n_others} of other kinds than audit and scan"], "dim")
    print_lines([f"History: {page}"])


# Checks

# What stands for blanks, so that each token is seen whole.
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})
_NO_HEADS = "none: tokens are mixed in another way"


def show_check(found: Found) -> None:
    """What was found in a model, what a prompt becomes, and what was proved."""
    facts, proofs = found["facts"], found["proofs"]
    at = {part: ", ".join(names) for part, names in facts["found"].items()}
    parameters = f"{facts['n_parameters']:,}, {facts['dtype']} on {facts['device']}"
    context = "no bound" if facts["context_length"] is None else str(facts["context_length"])
    rows = [("parameters", parameters, at["decoder"]), ("layers", str(facts["n_layers"]), at["layers"])]
    for which, heads in alike(facts["heads"]):
        rows.append((f"heads of {which}", heads, "" if heads == _NO_HEADS else at["attention"]))
    rows.append(("width of the model, of its MLP", f"{facts['d_model']}, {facts['d_mlp']}", ""))
    if facts["active_experts"] != 1:
        rows.append(("experts that a token is sent to", f"{facts['active_experts']:.0%}", ""))
    rows += [(part, "", at[part]) for part in ("query projection", "output projection", "final norm")]
    rows += [("vocabulary", str(facts["vocabulary_size"]), at["head"]), ("longest context", context, "")]
    rows += [("positions act in another way beyond", f"{turn} tokens", "") for turn in facts["turns"]]
    print_table(f"{facts['family']}: {found['model']}", ("fact", "value", "found at"), rows)
    _show_prompt(found["prompt"], facts["context_length"])
    columns: dict[str, Column] = {
        "claim": "name",
        "difference": lambda proof: Number("none" if proof["error"] is None else f"{proof['error']:.1e}"),
        "allowed": "tolerance .0e",
        "holds": lambda proof: "yes" if proof["passed"] else "no",
    }
    print_items("Proved on these weights", proofs, columns)
    print_lines(f"note: {note}" for note in found["notes"])
    n_held = sum(proof["passed"] for proof in proofs)
    slower = "" if n_held == len(proofs) else ", on slower paths where one does not"
    print_lines([f"{n_held} of {len(proofs)} claims hold: ablations are exact on this model{slower}"])


def alike(shapes: Sequence[Found | None]) -> list[tuple[str, str]]:
    """Layers, as in ``layers 0-3, 5``, and the heads that all of them have, in words."""
    found: dict[str, list[int]] = {}
    for layer, shape in enumerate(shapes):
        words = _NO_HEADS
        if shape is not None:
            values = f" (values {shape['d_value']})" if shape["d_value"] != shape["d_head"] else ""
            window = "all tokens before" if shape["window"] is None else f"a window of {shape['window']} tokens"
            words = f"{shape['n_heads']} of width {shape['d_head']}{values}, {shape['n_kv_heads']} of keys and values"
            words += f"; see {window}"
        found.setdefault(words, []).append(layer)
    named = []
    for words, layers in found.items():
        runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
        numbers = ", ".join("-".join(map(str, dict.fromkeys((run[0], run[-1])))) for run in runs)
        which = f"layer{'s' * (len(layers) > 1)} {numbers}" if len(layers) < len(shapes) else "every layer"
        named.append((which, words))
    return named


def _show_prompt(prompt: Found, context: int | None) -> None:
    n_tokens, shared, bos = prompt["n_tokens"], prompt["n_shared"], prompt["bos_token"]
    rows = []
    for part, found in groupby(prompt["tokens"], lambda token: token["part"]):
        tokens, shown, between = list(found), Text(), ""
        for token in tokens:
            text = str(token["text"]).translate(_VISIBLE)
            printable = terminal_text(text)
            shown.append(between).append(*((f"⟦{printable}⟧", "bold magenta") if token["special"] else (printable,)))
            between = "\n" if "\n" in token["text"] else " "
        rows.append((part, Number(str(len(tokens))), shown))
    with_system = "" if prompt["system"] is None else ", with a system prompt"
    title = f"A prompt under the template {one_line(str(prompt['template']))}{with_system}: {n_tokens} tokens"
    print_table(title, ("part", "tokens", "blanks as · and ↵, special tokens in ⟦ ⟧"), rows, lines=True)
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


def show_outcomes(results: Found, names: Sequence[str], timed: Mapping[str, Sequence[Found]] | None = None) -> None:
    """The tables of one experiment, or a line each where ``names`` has more.

    ``timed`` holds tables of what was timed, by experiment, which results leave out.
    """
    from safetyheads.reports.reproduction import headline_words

    outcomes = [outcome for outcome in results["experiments"] if outcome["name"] in names]
    if len(names) > 1 and outcomes:
        # All tables at once would be hundreds of rows.
        facts = {}
        for outcome in outcomes:
            headline = f"\n{'; '.join(headline_words(outcome))}".rstrip()
            facts[outcome["name"]] = text = Text(f"{outcome['title']}{headline}")
            for reason in outcome["not_meaningful"]:
                text.append(f"\nNot meaningful on this model. {reason}", style="yellow")
        print_facts("Experiments in short", facts)
    else:
        for outcome in outcomes:
            _show_outcome(outcome, (timed or {}).get(outcome["name"], ()))
    left_out = [(name, why) for name, why in results.get("left_out", {}).items() if name in names]
    print_lines((f"{name} left out: {one_line(why)}" for name, why in left_out), "yellow")


def _show_outcome(outcome: Found, timed: Sequence[Found]) -> None:
    """Its tables, with the cells of the report; what the row above begins with too is left out."""
    from safetyheads.reports.reproduction import cells

    console = stdout()
    console.print(f"\n{outcome['name']}: {outcome['title']}", style="bold")
    print_lines((f"Not meaningful on this model. {reason}" for reason in outcome["not_meaningful"]), "yellow")
    for at, table in enumerate((*outcome["tables"], *timed)):
        if at == len(outcome["tables"]):
            console.print("\nTimed on this machine", style="bold")
        columns, rows = table["columns"], list[list[Cell]]()
        for row, above in zip(table["rows"], [None, *table["rows"]], strict=False):
            rows.append([])
            for item in cells(row, columns, above):
                number = Number(str(item.text), item.interval, item.n, item.p)
                if item.quoted:
                    number = Number(str(item.text), "quoted", style="italic")
                rows[-1].append(("" if item.again else str(item.text)) if item.is_text and not item.quoted else number)
        print_first(table["title"], [column["title"] for column in columns], rows, table["caption"], "in the report")
    print_lines([""] * bool(outcome["notes"]) + [f"- {note}" for note in outcome["notes"]])

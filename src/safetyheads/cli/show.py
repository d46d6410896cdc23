"""Prints progress, tables and summaries on the terminal.

Results go to stdout; progress, notes and errors to stderr. Every number stands as ``value [low, high] n``; where all
numbers of a table share n, it stands below the table.
"""

import os
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from itertools import compress, groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table as RichTable
from rich.text import Text

from safetyheads.cli.terminal import Terminal, terminal_text
from safetyheads.reports.tables import (
    NOTHING,
    Cell,
    Column,
    Facts,
    Table,
    concentration_words,
    rate_cell,
    sentence_case,
    value_cell,
)
from safetyheads.runs.config import Progress, duration
from safetyheads.runs.shards import array_text

PATIENCE = 2.0
"""Seconds after which a stage gets a progress bar."""
INTERVAL = 30.0
"""Seconds between two lines where there are no bars."""
_WIDTH_OFF_TERMINAL = 140
_STYLES = {"yes": "bold yellow", "less": "blue", "soft": "dim"}
_GAP = 2
_COMFORT = 20


# Streams and progress


def stdout() -> Terminal:
    """The console of results, where brackets are text; as wide as COLUMNS says where it is no terminal."""
    columns = os.environ.get("COLUMNS", "" if sys.stdout.isatty() else "0")
    # Of no columns nothing would be seen.
    width = _WIDTH_OFF_TERMINAL if columns and not columns.strip("0") else None
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
    return Progress() if quiet else RichProgress(Terminal(sys.stderr))


class RichProgress(Progress):
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
                # What is decoded is judged, and its surprise measured, before the stage ends.
                left = left if count < total else "finishing"
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


def show_dry_run(found: Facts) -> None:
    """Print what a run would compute, and where it would keep it."""
    lines, stages = [*found["lines"], f"run directory: {found['out']}"], found.get("stages", ())
    if stages:
        lines += [f"stages: {', '.join(stages)}", f"at most {duration(found['seconds']['at_most'])}, judges left out"]
    print_lines([*lines, "Nothing was written."])


# Tables


def show_page(tables: Mapping[str, Table], name: str, path: Path) -> None:
    """Print the tables of a page, and where it is."""
    for found in tables.values():
        print_table(found)
    print_lines([f"{name}: {path}"])


def print_table(found: Table) -> None:
    """Print a table's first rows so that no number breaks, however narrow the terminal.

    Intervals stand beside their numbers where there is room, else below them; where there is none at all, the table is
    turned: each row becomes a column. n stands below the table where all of its numbers share it.
    """
    marked: list[Any] = [*found.rows]
    for at in found.chosen:
        marked[at] = [replace(marked[at][0], text=f"{marked[at][0].text} *"), *marked[at][1:]]
    rows, others = (
        [row for row in part if not isinstance(row, str)] for part in (marked[: found.first], marked[found.first :])
    )
    if not rows:
        return
    shown = [column.where != "+" for column in found.columns]
    columns = [*compress(found.columns, shown)]
    names, are_text = [column.title for column in columns], [column.is_text for column in columns]
    # The small print tells columns of one title apart.
    told = [
        column.title + f", {column.small}" * (bool(column.small) and names.count(column.title) > 1)
        for column in columns
    ]
    titles = [*map(terminal_text, told)]
    rows = [[*compress(row, shown)] for row in rows]
    ns = {cell.n for row in rows for cell in row if isinstance(cell, Cell) and cell.n}
    shared = ns.pop() if len(ns) == 1 and min(ns).startswith("n ") else ""
    console = stdout()
    console.print(f"\n{found.title}", style="bold")
    if len(rows) == 1:
        # Facts, one below the other.
        rows = [[Cell(title, is_text=True), cell] for title, cell in zip(titles, rows[0], strict=True)]
        titles, are_text = ["", ""], [True, True]
    for between, whole_titles in ((" ", True), (" ", False), ("\n", False)):
        texts = [[_text(cell, between, shared) for cell in row] for row in rows]
        laid_out, least = _laid_out(titles, texts, are_text, whole_titles, comfort=_COMFORT * (between == " "))
        if least <= console.width:
            console.print(laid_out)
            break
    else:
        _print_turned(console, titles, texts)
    more = f"{len(others)} more row{'s' * (len(others) > 1)} in the report." if others else ""
    below = " ".join(
        filter(
            None, (found.note.replace("shaded", "marked *"), f"{shared} behind every interval." if shared else "", more)
        )
    )
    if below:
        console.print(_ascii(below), style="dim")


def _text(cell: Any, between: str, shared: str) -> Text:
    """A cell's number with its interval, n and p, and ``between`` them a blank or a line break."""
    if isinstance(cell, Text):
        return cell
    text = Text(terminal_text(_ascii("" if cell.again else cell.text)), style=_STYLES.get(cell.tone, ""))
    parts = cell.interval, cell.n if cell.n != shared else "", *cell.p.split(", "), "quoted" * cell.quoted
    of = "".join(between + part for part in parts if part)
    return text.append(terminal_text(_ascii(of)), style="dim")


def _ascii(text: str) -> str:
    """A minus that can be searched for."""
    return text.replace("−", "-")


def _laid_out(
    titles: Sequence[str], rows: Sequence[Sequence[Text]], are_text: Sequence[bool], whole_titles: bool, comfort: int
) -> tuple[RichTable, int]:
    """The table, and the width from which no number breaks and texts have some comfort."""
    laid_out = RichTable(
        box=box.SIMPLE_HEAD, show_edge=False, show_header=any(titles), pad_edge=False, padding=(0, 1, 0, 0)
    )
    least = -_GAP
    for at, (title, is_text) in enumerate(zip(titles, are_text, strict=True)):
        lines = [line for row in rows for line in row[at].plain.split("\n")]
        longest = max(map(len, lines), default=0)
        words = [title] if whole_titles else title.split()
        words += " ".join(lines).split() if is_text else []
        width = max(1, min(longest, comfort) if is_text else longest, *map(len, words))
        # Rich narrows the columns that have no width: those of texts.
        laid_out.add_column(title, justify="left" if is_text else "right", width=None if is_text else width)
        least += width + _GAP
    for row in rows:
        laid_out.add_row(*row)
    return laid_out, least


def _print_turned(console: Console, titles: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    """Each row as a column below its name, as many beside each other as there is room for."""
    rows = [[_narrow(cell) for cell in row] for row in rows]
    while rows:
        for n in range(len(rows), 0, -1):
            turned = [[Text(title), *cells] for title, *cells in zip(titles, *rows[:n], strict=True)][1:]
            names = [titles[0], *(row[0].plain for row in rows[:n])]
            laid_out, least = _laid_out(names, turned, [True, *[False] * n], False, _COMFORT)
            if least <= console.width or n == 1:
                break
        console.print(laid_out)
        rows = rows[n:]


def _narrow(cell: Text) -> Text:
    """A text over as many lines as it takes."""
    lines = cell.plain.split("\n")
    fits = max(map(len, lines)) <= _COMFORT
    return cell if fits else Text("\n".join(textwrap.fill(line, _COMFORT) for line in lines))


def print_facts(title: str, facts: Mapping[str, Cell | Text]) -> None:
    """Print names with their values."""
    rows = [[Cell(name, is_text=True), fact] for name, fact in facts.items()]
    print_table(Table(title, [Column("", is_text=True)] * 2, rows, first=len(rows)))


def print_lines(lines: Iterable[str], style: str | None = None, prose: bool = False) -> None:
    """Print lines; those of ``prose`` break between words on a terminal. A line break within one is shown, escaped."""
    console = stdout()
    for line in lines:
        text = terminal_text(_ascii(line), newlines=False)
        console.print(text, style=style, soft_wrap=not (prose and console.is_terminal))


# Results


def show_results(results: Facts, tables: Mapping[str, Table], first: int | None = None) -> None:
    """The tables of a run's page, what makes them weak, and last, where the eye is, the finding.

    ``first``: how many rows of the first table.
    """
    from safetyheads.reports.scan import power_words
    from safetyheads.reports.single_steps import rates_in_words
    from safetyheads.reports.write import PAGES

    verdict, words = results.get("verdict"), results.get("word_judges")
    kappa = value_cell(words["kappa"]["kappa"], words["kappa"]["interval"]) if words else NOTHING
    agreed = f" Cohen's kappa {kappa.text} {kappa.interval}".rstrip() * (kappa != NOTHING)
    of_words = [f"{words['sentence']}{agreed}"] if words else []
    if verdict is not None and verdict["stopped_early"]:
        print_lines([*(f"warning: {warning}" for warning in results["warnings"]), *of_words, verdict["sentence"]])
        return
    for at, found in enumerate(tables.values()):
        print_table(found if at or first is None else found._replace(first=first))
    print_lines([""])
    print_lines(filter(None, [*of_words, concentration_words(results)]), prose=True)
    if (planted := results.get("planted_heads")) is not None:
        print_lines([f"Planted heads: {', '.join(planted) or 'none'}"])
    print_lines((f"- {caveat}" for caveat in results["caveats"]), "dim", prose=True)
    print_lines((f"warning: {warning}" for warning in results["warnings"]), "yellow", prose=True)
    if verdict is None:
        said, label, style = PAGES[results["kind"]][1](results), "", "blue"
        below = {"scan": power_words, "asr": rates_in_words}.get(results["kind"])
        reasons = [below(results)] if below else []
    else:
        said, label, reasons = verdict["sentence"], terminal_text(verdict["label"]), verdict["reasons"]
        concentrated = {"concentrated": "yellow", "partly concentrated": "yellow", "none found": "green"}
        style = concentrated.get(verdict["label"], "blue")
    stdout().print(Panel(terminal_text(_ascii(said)), title=label or None, border_style=style))
    print_lines((f"- {reason}" for reason in reasons), prose=True)


def show_judged(found: Sequence[Facts]) -> None:
    """Rates of the run's judge beside each other one's, and how far they agree."""
    for rejudged in found:
        names, kappa = (rejudged["lead"], rejudged["judge"]), rejudged["kappa"]
        pairs = {label: [by_judge[name] for name in names] for label, by_judge in rejudged["rates"].items()}
        labels = sorted(pairs, key=lambda label: -abs((pairs[label][1]["rate"] or 0) - (pairs[label][0]["rate"] or 0)))
        rows = [[Cell(label, is_text=True), *map(rate_cell, pairs[label])] for label in labels]
        columns = [Column("answers", is_text=True), *(Column(f"complied, {name}") for name in names)]
        print_table(Table("Judges side by side", columns, rows))
        facts = {"answers": rejudged["n_rows"], "unscored": rejudged["n_unscored"]}
        facts |= {"judged differently": rejudged["n_differing"]}
        facts |= {f"unscored: {reason}": count for reason, count in rejudged["unscored"].items()}
        agreed, n = value_cell(kappa["kappa"], kappa["interval"]), f"n {kappa['n']:,}"
        agreed = replace(agreed, n=n) if agreed != NOTHING else Cell("not defined", n=n)
        beside = {"Cohen's kappa": agreed, "seconds": Cell(f"{rejudged['seconds']:.1f}")}
        print_facts("Agreement", {name: Cell(f"{count:,}") for name, count in facts.items()} | beside)


def show_comparison(compared: Facts, pages: Sequence[Path] = ()) -> None:
    """What both runs are, what changed, how heads rank, which came and went, what makes that weak, and the gates."""
    from safetyheads.reports.compare import comparison_page, gate_words

    for name, run in (("A", compared["before"]), ("B", compared["after"])):
        verdict = "" if run["verdict"] is None else f", {run['verdict']}"
        started = f", {run['started'][:16].replace('T', ' ')}" if run["started"] else ""
        print_lines([f"{name}: {compared['kind']} of {run['model']}{started}{verdict} ({run['path']})"])
    for found in comparison_page(compared, with_figures=False).tables.values():
        print_table(found)
    if moved := compared["heads"]:
        parts = [f"{word} {', '.join(moved[word]) or 'none'}" for word in ("gone", "new", "kept")]
        print_lines([f"{sentence_case(moved['what'])}: {'; '.join(parts)}"])
    print_lines(filter(None, [compared["shapes_note"]]))
    print_lines((f"cannot be compared: {obstacle}" for obstacle in compared["obstacles"]), "red")
    print_lines((f"warning: {warning}" for warning in compared["warnings"]), "yellow")
    for gate in compared["gates"]:
        outcome = gate["outcome"].upper() if gate["outcome"] != "passed" else "passed"
        print_lines([f"{outcome}: fail if {gate_words(gate)}"])
    print_lines(f"Report: {page}" for page in pages)


# Checks

# What stands for blanks, so that each token is seen whole.
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "→", "\r": "←"})
_NO_HEADS = "none: tokens are mixed in another way"


def show_check(found: Facts) -> None:
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
    titles = [Column(title, is_text=True) for title in ("fact", "value", "found at")]
    title = f"{facts['family']}: {found['model']}"
    print_table(Table(title, titles, [[Cell(text) for text in row] for row in rows], first=len(rows)))
    _show_prompt(found["prompt"], facts["context_length"])
    titles = [Column("claim", is_text=True), Column("difference"), Column("allowed"), Column("holds", is_text=True)]
    claims = []
    for proof in proofs:
        error = Cell("none" if proof["error"] is None else f"{proof['error']:.1e}")
        holds = Cell("yes" if proof["passed"] else "no", is_text=True)
        claims.append([Cell(proof["name"], is_text=True), error, Cell(f"{proof['tolerance']:.0e}"), holds])
    print_table(Table("Proved on these weights", titles, claims, first=len(claims)))
    print_lines(f"note: {note}" for note in found["notes"])
    n_held = sum(proof["passed"] for proof in proofs)
    slower = "" if n_held == len(proofs) else ", on slower paths where one does not"
    print_lines([f"{n_held} of {len(proofs)} claims hold: ablations are exact on this model{slower}"])


def alike(shapes: Sequence[Facts | None]) -> list[tuple[str, str]]:
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
        numbers = array_text(layers).replace(",", ", ")
        which = f"layer{'s' * (len(layers) > 1)} {numbers}" if len(layers) < len(shapes) else "every layer"
        named.append((which, words))
    return named


def _show_prompt(prompt: Facts, context: int | None) -> None:
    n_tokens, shared, bos = prompt["n_tokens"], prompt["n_shared"], prompt["bos_token"]
    rows: list[list[Any]] = []
    for part, found in groupby(prompt["tokens"], lambda token: token["part"]):
        tokens, shown, between = list(found), Text(), ""
        for token in tokens:
            text = str(token["text"]).translate(_VISIBLE)
            printable = terminal_text(text)
            shown.append(between).append(*((f"⟦{printable}⟧", "bold magenta") if token["special"] else (printable,)))
            between = "\n" if "\n" in token["text"] else " "
        rows.append([Cell(part, is_text=True), Cell(str(len(tokens))), shown])
    with_system = "" if prompt["system"] is None else ", with a system prompt"
    title = f"A prompt under the template {one_line(str(prompt['template']))}{with_system}: {n_tokens} tokens"
    titles = [Column("part", is_text=True), Column("tokens")]
    titles.append(Column("blanks as · and ↵, special tokens in ⟦ ⟧", is_text=True))
    print_table(Table(title, titles, rows))
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


def show_outcomes(results: Facts, names: Sequence[str], timed: Mapping[str, Sequence[Facts]] | None = None) -> None:
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


def _show_outcome(outcome: Facts, timed: Sequence[Facts]) -> None:
    """Its tables as the report has them."""
    from safetyheads.reports.reproduction import table_shown

    console = stdout()
    console.print(f"\n{outcome['name']}: {outcome['title']}", style="bold")
    print_lines((f"Not meaningful on this model. {reason}" for reason in outcome["not_meaningful"]), "yellow")
    for at, held in enumerate((*outcome["tables"], *timed)):
        if at == len(outcome["tables"]):
            console.print("\nTimed on this machine", style="bold")
        print_table(table_shown(held))
    print_lines([""] * bool(outcome["notes"]) + [f"- {note}" for note in outcome["notes"]])

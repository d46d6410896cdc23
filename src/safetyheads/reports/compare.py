"""Writes a comparison of two runs as a page, and as Markdown for a pull request."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetyheads.files import write_page
from safetyheads.reports import charts
from safetyheads.reports.page import Page, render
from safetyheads.reports.tables import NOTHING, Cell, Facts, Table, interval, number, sentence_case, signed, two
from safetyheads.runs.compare import CHANGE_LABELS, CHANGES, FAILED, PASSED

WORDS = {0: "passed", 1: "a gate failed", 2: "cannot be compared"}
"""Exit code -> what the badge says."""
LIMITS = (
    "Intervals cover the draw of prompts, and a concentration's that of its random groups too. Another seed, template "
    "or judge can move the numbers further.",
    "A gate that passes shows a bound. It does not show that nothing changed.",
    "ASR and damage are of the prompts that were asked. Other prompts may be answered in another way.",
)


def comparison_page(compared: Facts, with_figures: bool = True) -> Page:
    """The page of a comparison; equal arguments give equal text."""
    rows = list(_drawn(compared)) if with_figures else []
    titles = "", "change, after minus before", "Each change with its interval"
    figures = {"changes": charts.bars(rows, *titles, share=False)} if rows else {}
    content = {
        "compared": compared,
        "badge": badge(compared),
        "sentence": sentence(compared),
        "tone": {0: "passed", 1: "failed"}.get(compared["exit_code"], "open"),
        "changes": list(_changes(compared)),
        "gates": [(gate, gate_cells(gate)) for gate in compared["gates"]],
        "settings": list(_settings(compared)),
        "limits": LIMITS,
    }
    return render("compare.html.j2", content, {}, {}, figures)


def badge(compared: Facts) -> str:
    """How the comparison came out, in a few words."""
    if compared["exit_code"] == 2 and not compared["obstacles"]:
        judged = all(gate["number"] is not None for gate in compared["gates"])
        return "compared with warnings" if judged else "a gate could not be judged"
    if compared["exit_code"] == 0 and not compared["gates"]:
        return "compared, no gate was set"
    return WORDS[compared["exit_code"]]


def sentence(compared: Facts) -> str:
    """What became of the ASR, with its interval."""
    change = compared["vanilla_asr"]
    if change["change"] is None:
        return f"The ASR of the unablated models cannot be compared: {change['note']}."
    moved = f"The unablated model’s ASR goes from {two(change['before'])} to {two(change['after'])}"
    bounds = f"{signed(change['change'])} {interval(change['interval'], signed)}".strip()
    pairs = f"{change['n'][0]} paired prompts" if change["paired"] else f"{change['n'][0]} and {change['n'][1]} prompts"
    return f"{moved} ({bounds}, {pairs}): {change['shown'].replace('-', '−')}."


def _changes(compared: Facts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each change with what its table says of it."""
    for attribute, label in CHANGE_LABELS.items():
        if (change := compared[attribute]) is not None:
            how = "" if change["change"] is None else "paired" if change["paired"] else "unpaired"
            how = ": ".join(filter(None, (how, change["note"])))
            n = " and ".join(str(n) for n in dict.fromkeys(change["n"]))
            shown = change["shown"].replace("-", "−")
            yield label, {**change, "how": how, "shown": shown, "n_text": n if change["change"] is not None else "–"}


def _drawn(compared: Facts) -> Iterator[dict[str, Any]]:
    """A row of the figure for each change that has an interval; the limits of gates beside them."""
    limits: dict[str, float] = {}
    for gate in compared["gates"]:
        name, _, limit = gate["condition"].split()
        limits[name.partition(".")[0]] = float(limit)
    for name, attribute in CHANGES.items():
        change = compared[attribute]
        if change is not None and change["interval"]:
            told = {"series": "", "n": str(min(change["n"])), "limit": limits.get(name)}
            yield charts.interval_row(CHANGE_LABELS[attribute], change["change"], change["interval"], **told)


def _settings(compared: Facts) -> Iterator[tuple[str, str, str]]:
    """Each setting with its value in both runs, those that differ first."""
    before, after = (compared[side]["settings"] | compared[side]["provenance"] for side in ("before", "after"))
    names = sorted(dict.fromkeys([*before, *after]), key=lambda name: before.get(name) == after.get(name))
    for name in names:
        yield name, before.get(name, "–"), after.get(name, "–")


def gate_cells(gate: Facts) -> tuple[Cell, Cell, Cell]:
    """Outcome, what was measured, and the number that was judged."""
    tone = {FAILED: "yes", PASSED: "less"}.get(gate["outcome"], "soft")
    measured = judged = NOTHING
    is_change = gate["condition"].split()[0].partition(".")[0] in CHANGES
    write = signed if is_change else number
    if gate["value"] is not None:
        measured = Cell(write(gate["value"]), interval(gate["interval"], signed), f"n {gate['n']}" if gate["n"] else "")
    if gate["number"] is not None:
        words = {"high": "upper bound", "low": "lower bound", "value": "measured"}[gate["asked"]]
        judged = Cell(number(gate["number"], is_change), n=words)
    return Cell(gate["outcome"], tone=tone, is_text=True), measured, judged


def gate_words(gate: Facts) -> str:
    """``asr_increase > 0.1: +0.31 [+0.18, +0.45] n 48, upper bound +0.45``, and the reason where there is one."""
    _, measured, judged = gate_cells(gate)
    parts = [" ".join(filter(None, (measured.text, measured.interval, measured.n)))] if measured != NOTHING else []
    parts += [f"{judged.n} {judged.text}"] if judged != NOTHING and gate["asked"] != "value" else []
    return f"{gate['condition']}: {'; '.join(filter(None, (', '.join(parts), gate['reason'])))}"


# Markdown.


def comparison_markdown(compared: Facts) -> str:
    """The comparison for a pull request, which may be public: it counts heads and does not name them."""
    lines = [f"### Safety comparison: {badge(compared)}", "", sentence(compared), ""]
    for name, side in (("A", "before"), ("B", "after")):
        run = compared[side]
        facts = (compared["kind"], run["started"] and run["started"][:16].replace("T", " "), run["verdict"])
        lines.append(f"- {name}: {_code(run['model'])}, {', '.join(map(_text, filter(None, facts)))}")
    tables = comparison_page(compared, with_figures=False).tables
    for name in ("gates-judged", "all-changes"):
        lines += ["", *_markdown(tables[name], _code if name == "gates-judged" else _text)] if name in tables else []
    if compared["heads"] is not None:
        heads = compared["heads"]
        counts = ", ".join(f"{len(heads[word])} {word}" for word in ("kept", "gone", "new"))
        lines += [
            "",
            f"{_text(sentence_case(heads['what']))}: {counts}. The page names them; this text does not.",
        ]
    told = [f"cannot be compared: {text}" for text in compared["obstacles"]]
    told += [f"warning: {text}" for text in compared["warnings"]]
    lines += ["", *(f"- {_text(text)}" for text in told)] if told else []
    return "\n".join([*lines, "", *(f"<sub>{text}</sub>" for text in (" ".join(LIMITS),))]) + "\n"


def _markdown(found: Table, named: Callable[[str], str]) -> Iterator[str]:
    """A row for each of the table's; ``named`` writes its name."""
    yield f"| {' | '.join(column.title for column in found.columns)} |"
    yield f"|{'---|' * len(found.columns)}"
    for row in found.rows:
        parts = [cell for cell in row if isinstance(cell, Cell)]
        # Numbers are our own; their brackets need no escape.
        told = [" ".join(filter(None, (cell.text, cell.interval, cell.n, cell.p))) for cell in parts]
        cells = [_text(words) if cell.is_text else words for cell, words in zip(parts, told, strict=True)]
        yield f"| {' | '.join((named(told[0]), *cells[1:]))} |"


def _text(text: object) -> str:
    """A text from outside in one line, in which Markdown finds no mark-up, link or mention."""
    words = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|~!" else letter for letter in words).replace("@", "@\u200b")


def _code(text: object) -> str:
    """A name from outside as code, which Markdown does not read."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def page_of(path: Path) -> Path:
    """Where a comparison is written: a name that ends with ``.md`` or ``.html``, else a page in a folder."""
    return path if path.suffix in (".md", ".html") else path / "compare.html"


def write_comparison(compared: Facts, path: Path) -> Path:
    """Write Markdown to a name that ends with ``.md``, else a page; gives its path."""
    page = page_of(path)
    text = comparison_markdown(compared) if page.suffix == ".md" else comparison_page(compared)
    write_page(page, text)
    return page

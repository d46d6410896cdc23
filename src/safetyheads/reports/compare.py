"""Writes a comparison of two runs as a page, and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetyheads.files import write_page
from safetyheads.reports import charts
from safetyheads.reports.page import Cell, interval, number, p_value, render, sentence_case, signed, two
from safetyheads.runs.compare import CHANGE_LABELS, CHANGES, FAILED, PASSED

Compared = Mapping[str, Any]
"""A comparison as JSON, with its ``quantities``, ``gates`` and ``exit_code``."""

WORDS = {0: "passed", 1: "a gate failed", 2: "cannot be compared"}
"""Exit code -> what the badge says."""
LIMITS = (
    "Intervals cover the draw of prompts, and a concentration's that of its random groups too. Another seed, template "
    "or judge can move the numbers further.",
    "A gate that passes shows a bound. It does not show that nothing changed.",
    "ASR and damage are of the prompts that were asked. Other prompts may be answered in another way.",
)


def comparison_page(compared: Compared) -> str:
    """The page of a comparison; equal arguments give equal text."""
    rows = list(_drawn(compared))
    figures = {"changes": charts.forest(rows, "change, after minus before", "Each change with its interval")}
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
    return render("compare.html.j2", content, {}, {}, figures if rows else {})


def badge(compared: Compared) -> str:
    """How the comparison came out, in a few words."""
    if compared["exit_code"] == 2 and not compared["obstacles"]:
        judged = all(gate["number"] is not None for gate in compared["gates"])
        return "compared with warnings" if judged else "a gate could not be judged"
    if compared["exit_code"] == 0 and not compared["gates"]:
        return "compared, no gate was set"
    return WORDS[compared["exit_code"]]


def sentence(compared: Compared) -> str:
    """What became of the ASR, with its interval."""
    change = compared["vanilla_asr"]
    if change["change"] is None:
        return f"The ASR of the unablated models cannot be compared: {change['note']}."
    moved = f"The unablated model’s ASR goes from {two(change['before'])} to {two(change['after'])}"
    bounds = f"{signed(change['change'])} {interval(change['interval'], signed)}".strip()
    pairs = f"{change['n'][0]} paired prompts" if change["paired"] else f"{change['n'][0]} and {change['n'][1]} prompts"
    return f"{moved} ({bounds}, {pairs}): {change['shown'].replace('-', '−')}."


def _changes(compared: Compared) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each change with what its table says of it."""
    for attribute, label in CHANGE_LABELS.items():
        if (change := compared[attribute]) is not None:
            how = "" if change["change"] is None else "paired" if change["paired"] else "unpaired"
            how = ": ".join(filter(None, (how, change["note"])))
            n = " and ".join(str(n) for n in dict.fromkeys(change["n"]))
            shown = change["shown"].replace("-", "−")
            yield label, {**change, "how": how, "shown": shown, "n_text": n if change["change"] is not None else "–"}


def _drawn(compared: Compared) -> Iterator[dict[str, Any]]:
    """A row of the figure for each change that has an interval; the limits of gates beside them."""
    limits: dict[str, float] = {}
    for gate in compared["gates"]:
        name, _, limit = gate["condition"].split()
        limits[name.partition(".")[0]] = float(limit)
    for name, attribute in CHANGES.items():
        change = compared[attribute]
        if change is not None and change["interval"]:
            low, high = map(charts.rounded, change["interval"])
            row = {"label": CHANGE_LABELS[attribute], "x": charts.rounded(change["change"]), "low": low, "high": high}
            yield row | {"shown": change["shown"], "n": str(min(change["n"])), "limit": limits.get(name)}


def _settings(compared: Compared) -> Iterator[tuple[str, str, str]]:
    """Each setting with its value in both runs, those that differ first."""
    before, after = (compared[side]["settings"] | compared[side]["provenance"] for side in ("before", "after"))
    names = sorted(dict.fromkeys([*before, *after]), key=lambda name: before.get(name) == after.get(name))
    for name in names:
        yield name, before.get(name, "–"), after.get(name, "–")


def gate_cells(gate: Mapping[str, Any]) -> tuple[Cell, Cell, Cell]:
    """Outcome, what was measured, and the number that was judged."""
    tone = {FAILED: "yes", PASSED: "less"}.get(gate["outcome"], "soft")
    measured, judged = Cell("–"), Cell("–")
    is_change = gate["condition"].split()[0].partition(".")[0] in CHANGES
    write = signed if is_change else number
    if gate["value"] is not None:
        measured = Cell(write(gate["value"]), interval(gate["interval"], signed), f"n {gate['n']}" if gate["n"] else "")
    if gate["number"] is not None:
        words = {"high": "upper bound", "low": "lower bound", "value": "measured"}[gate["asked"]]
        judged = Cell(number(gate["number"], is_change), words)
    return Cell(gate["outcome"], tone=tone), measured, judged


# Markdown.


def comparison_markdown(compared: Compared) -> str:
    """The comparison for a pull request, which may be public: it counts heads and does not name them."""
    lines = [f"### Safety comparison: {badge(compared)}", "", sentence(compared), ""]
    for name, side in (("A", "before"), ("B", "after")):
        run = compared[side]
        facts = (compared["kind"], run["started"] and run["started"][:16].replace("T", " "), run["verdict"])
        lines.append(f"- {name}: {_code(run['model'])}, {', '.join(map(_text, filter(None, facts)))}")
    if compared["gates"]:
        rows = []
        for gate in compared["gates"]:
            cells = [_cell(cell) for cell in gate_cells(gate)]
            rows.append([_code(gate["condition"]), *cells, _text(gate["reason"])])
        lines += ["", *_table(("Fails if", "Outcome", "Measured [95 %]", "Judged", ""), rows)]
    rows = []
    for label, change in _changes(compared):
        ends = [two(change[end]) if change[end] is not None else "–" for end in ("before", "after")]
        moved = "–" if change["change"] is None else signed(change["change"])
        p = p_value(change["p_value"])
        bounds = f"{moved} {interval(change['interval'], signed)}".strip()
        rows.append([label, *ends, bounds, p, change["n_text"], _text(change["shown"] or change["note"])])
    lines += ["", *_table(("", "A", "B", "Change [95 %]", "p", "Prompts", "The interval shows"), rows)]
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


def _table(titles: tuple[str, ...], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _cell(cell: Cell) -> str:
    return " ".join(filter(None, (cell.text, cell.interval, cell.n)))


def _text(text: object) -> str:
    """A text from outside in one line, in which Markdown finds no mark-up, link or mention."""
    words = " ".join(str(text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|~!" else letter for letter in words).replace("@", "@\u200b")


def _code(text: object) -> str:
    """A name from outside as code, which Markdown does not read."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def write_comparison(compared: Compared, path: Path) -> Path:
    """Write Markdown to a name that ends with ``.md``, else a page: to one with ``.html``, or into a folder."""
    page = path if path.suffix in (".md", ".html") else path / "compare.html"
    text = comparison_markdown(compared) if page.suffix == ".md" else comparison_page(compared)
    write_page(page, text)
    return page

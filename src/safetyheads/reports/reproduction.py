"""The pages of a reproduction: an index of the paper's experiments, and a page for each that was run.

No page holds what a model wrote: hundreds of sets of answers are in the run's completions folder.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from safetyheads.errors import InputError
from safetyheads.reports import charts
from safetyheads.reports.charts import Row, Spec
from safetyheads.reports.page import REMEMBERED, Page, render
from safetyheads.reports.tables import Cell, Column, Facts, Table, interval, number, p_value, signed, two

MAX_CHART_BYTES = 3_200_000
"""What the figures of a page may take, so that it stays under 5 MB; those without room are left out, and it says so."""
MAX_ROWS = 3000
"""Rows of a table that a page shows; ``results.json`` has all."""
NO_EVIDENCE = "not evidence about the paper"
"""A note that has these words makes the page's badge."""
EMBEDDED = "demo:"
"""What names of embedded checkpoints begin with."""
_MOST_NAMED = 3
"""Models that the index names in its first sentence."""
_TOKEN_LETTERS = 12
_QUOTED = re.compile(r"\b(paper|quoted)\b", re.IGNORECASE)
"""In the title of a column of quoted numbers."""
_QUOTED_ROW = re.compile(r"\b(in the paper|paper's|quoted)\b|\(paper\)", re.IGNORECASE)
"""In a text of a row of them; a bare ``paper`` may be the judge of that name."""
_NUMBERS = ("rate", "change", "number")


def render_reproduction(results: Facts, manifest: Facts) -> tuple[Page, Mapping[str, str]]:
    """The index, and every experiment's page by its file name; equal arguments give equal texts."""
    outcomes, judge = results["experiments"], results["judge"]
    for outcome in outcomes:
        if not outcome["name"].isalnum():
            raise InputError(f"results.json has an experiment of the name {outcome['name']!r}, which no file can have")
    # What the run remembers of its batches is on the index.
    facts_of_page = {name: value for name, value in manifest.items() if not name.startswith(REMEMBERED)}
    names = [None, *(outcome["name"] for outcome in outcomes), None]
    pages = {}
    for before, outcome, after in zip(names, outcomes, names[2:], strict=False):
        content = _experiment(outcome) | {"before": before, "after": after}
        measured = {"experiment": outcome["name"], "models": outcome["models"], "judge": judge}
        page = render("experiment.html.j2", content, measured, facts_of_page, content["charts"])
        pages[f"{outcome['name']}.html"] = page
    states = list(_states(results))
    ran = [state for state in states if state["models"]]
    models = list(dict.fromkeys(model for state in ran for model in state["models"]))
    index: dict[str, Any] = {"states": states, "models": models, "sentence": headline(results)}
    index |= {"config": manifest["config"], "judge": judge, "no_evidence": NO_EVIDENCE}
    index |= {"embedded": EMBEDDED, "has_embedded": any(model.startswith(EMBEDDED) for model in models)}
    measured = {"experiments": [state["name"] for state in ran], "judge": judge}
    return render("experiments.html.j2", index, measured, manifest), pages


# The index.


def _states(results: Facts) -> Iterator[dict[str, Any]]:
    """Every experiment of the catalogue in its order, those that it does not know last, each with how far it is."""
    outcomes = {outcome["name"]: outcome for outcome in results["experiments"]}
    left_out = {name: why for name, why in results.get("left_out", {}).items() if name not in outcomes}
    catalogue = {entry["name"]: entry for entry in results["catalogue"]}
    for name in dict.fromkeys((*catalogue, *outcomes, *left_out)):
        entry, label, said, tone = catalogue.get(name, {"title": name, "missing": ()}), "not run", "", "soft"
        state = {"name": name, "title": entry["title"], "models": (), "headline": ()}
        if name in outcomes:
            outcome = outcomes[name]
            reasons, headline = outcome["not_meaningful"], headline_words(outcome)
            has_numbers = bool(outcome["tables"] or outcome["figures"])
            label = "done in part" if reasons and has_numbers else "not meaningful" if reasons else "done"
            said, tone = "" if headline else next(iter(reasons), ""), "yes" if label == "not meaningful" else ""
            state |= {"title": outcome["title"], "models": outcome["models"], "headline": headline}
        elif name in left_out or entry["missing"]:
            label, said = "left out", left_out.get(name) or f"needs {'; '.join(entry['missing'])}"
        yield state | {"label": label, "said": said, "tone": tone}


def headline_words(outcome: Facts) -> list[str]:
    """The first numbers of an experiment, each with its name, interval and n; a lone model is not named."""
    rows = outcome.get("headline") or ()
    alone, found = len({row["model"] for row in rows}) < 2, []
    for row in rows:
        cell = number_cell(row["value"], row["kind"])
        of = ", ".join(filter(None, (cell.interval, cell.n, cell.p)))
        name = row["label"] if alone else f"{row['model']}, {row['label']}"
        found.append(f"{name}: {cell.text}{f' ({of})' if of else ''}")
    return found


def headline(results: Facts) -> str:
    """How many experiments were run, and on what."""
    states = list(_states(results))
    ran = [state for state in states if state["models"]]
    if not ran:
        return f"None of {len(states)} experiments was run."
    models = list(dict.fromkeys(model for state in ran for model in state["models"]))
    few = " and ".join(filter(None, (", ".join(models[:-1]), models[-1])))
    named = few if len(models) <= _MOST_NAMED else f"{len(models)} models"
    lost = sum(state["label"] == "not meaningful" for state in ran)
    rest = "; none is meaningful there" if lost == len(ran) else f"; {lost} not meaningful there" if lost else ""
    return f"{len(ran)} of {len(states)} experiments on {named}{rest}."


# One experiment.


def _experiment(outcome: Facts) -> dict[str, Any]:
    """What the page of an experiment shows."""
    shown, left_out, room = [], [], MAX_CHART_BYTES
    for figure in outcome["figures"]:
        drawn = draw(figure)
        room -= len(json.dumps(drawn))
        if room < 0:
            left_out.append(figure["title"])
        else:
            shown.append((figure, drawn))
    has_numbers, badge = bool(outcome["tables"] or outcome["figures"]), ""
    asked = [
        (row, *(number_cell(row[key], "rate") for key in ("asr", "answered"))) for row in outcome.get("asked") or ()
    ]
    settings = {name: of if isinstance(of, list) else [of] for name, of in (outcome.get("settings") or {}).items()}
    if outcome["not_meaningful"]:
        badge = "Meaningful in part only" if has_numbers else "Not meaningful on this model"
    elif any(NO_EVIDENCE in note.lower() for note in outcome["notes"]):
        badge = NO_EVIDENCE.capitalize()
    return {
        "outcome": outcome,
        "badge": badge,
        "has_numbers": has_numbers,
        "headline": [(row, number_cell(row["value"], row["kind"])) for row in outcome.get("headline") or ()],
        "asked": asked,
        "settings": [
            (name, " · ".join(text if isinstance(text, str) else json.dumps(text) for text in of))
            for name, of in settings.items()
        ],
        "figures": [(figure, list(_figure_notes(figure))) for figure, _ in shown],
        "figures_left_out": left_out,
        "charts": {f"figure-{at}": drawn for at, (_, drawn) in enumerate(shown, 1) if drawn is not None},
        "measured_in": [table_shown(table) for table in outcome["tables"]],
    }


def table_shown(held: Facts) -> Table:
    """An outcome's table: a row that begins like the one above is marked as said already."""
    listed, n_more, note = held["rows"][:MAX_ROWS], len(held["rows"]) - MAX_ROWS, held["caption"]
    pairs = zip([None, *listed], listed, strict=False)
    rows = [list(cells(row, held["columns"], above)) for above, row in pairs]
    if any(cell.quoted for row in rows for cell in row):
        note += " Numbers marked “quoted” are printed in the paper and were not measured here."
    note += f" {n_more:,} more rows are in results.json." if n_more > 0 else ""
    columns = [Column(column["title"], is_text=column["kind"] == "text") for column in held["columns"]]
    return Table(held["title"], columns, rows, note.strip())


def cells(row: Facts, columns: Sequence[Facts], above: Facts | None = None) -> Iterator[Cell]:
    """The cells of a row: a measured number with its interval and n, a quoted one marked as such.

    What begins like the row ``above`` is marked as said already.
    """
    same = above is not None
    texts = [str(row.get(column["key"])) for column in columns if column["kind"] == "text"]
    row_is_quoted = any(map(_QUOTED_ROW.search, texts))
    for column in columns:
        value, kind, quoted = row.get(column["key"]), column["kind"], bool(_QUOTED.search(column["title"]))
        same = same and kind == "text" and above is not None and above.get(column["key"]) == value
        if kind == "text":
            text = "–" if value in (None, "") else str(value)
            yield Cell(text, is_text=True, again=same, quoted=bool(value) and quoted)
        else:
            # A plain number is the paper's where its column or its row says so; a measured one never is.
            plain = kind in _NUMBERS and value is not None and not isinstance(value, Mapping)
            yield number_cell(value, kind, plain and (quoted or row_is_quoted))


def number_cell(value: Any, kind: str, quoted: bool = False) -> Cell:
    """A measured number with interval, n and p, or a plain one, with the digits of its kind."""
    write = partial(written, kind=kind)
    if not isinstance(value, Mapping):
        return Cell(write(value), quoted=quoted)
    if value["value"] is None:
        return Cell("not measured", n=f"n {value['n']}")
    bounds = None if value.get("low") is None else (value["low"], value["high"])
    p = "" if value.get("p") is None else f"p {p_value(value['p'], '= ')}"
    return Cell(write(value["value"]), interval(bounds, write), f"n {value['n']:,}", p)


def written(value: Any, kind: str) -> str:
    """A number with the digits of its kind; a dash for None."""
    if value is None or isinstance(value, str):
        return value or "–"
    writers = {"count": lambda count: f"{count:,}", "p": p_value, "rate": two, "change": signed}
    return str(writers.get(kind, number)(value))


# Figures: kind -> what draws it.


def draw(figure: Facts) -> Spec | None:
    """An outcome's figure, a panel for each of its panels; None without points."""
    return FIGURES[figure["kind"]](figure, figure["points"]) if figure["points"] else None


def _figure_notes(figure: Facts) -> Iterator[str]:
    """What the figure does not tell: the meaning of frames, and counts of what it lacks."""
    points = figure["points"]
    field = "value" if figure["kind"] in ("matrix", "attention") else "y"
    empty = sum(point.get(field) is None for point in points)
    if not points:
        yield "This figure has no points."
    if any(point.get("marked") for point in points):
        yield "Framed: marked heads."
    if empty:
        yield f"Not measured: {empty} of {len(points)}."
    lost = len(points) - len(_standing(figure, points))
    if lost:
        yield f"Not drawn: {lost} of {len(points)} points below 0, which a logarithmic axis does not have."


def _standing(figure: Facts, points: Sequence[Row]) -> Sequence[Row]:
    """Points that have a place on a logarithmic axis."""
    return [point for point in points if point["x"] >= 0] if figure["logarithmic"] else points


def _described(figure: Facts) -> str:
    return f"{figure['value'] or figure['y']} by {figure['x']}"


def _along_axes(figure: Facts, points: Sequence[Row], draws: Callable[..., Spec]) -> Spec:
    """Bars, lines or points, with short numbers."""
    rows = []
    for point in _standing(figure, points):
        row = {"series": str(point.get("series") or ""), "x": point.get("x"), "panel": str(point.get("panel") or "")}
        row |= {name: charts.rounded(point.get(name)) for name in ("y", "low", "high")}
        row |= {name: point[name] for name in ("n", "label") if point.get(name) is not None}
        if isinstance(row["x"], float):
            row["x"] = charts.rounded(row["x"])
        rows.append(row)
    options = {"share": figure["share"]} | ({} if draws is charts.bars else {"logarithmic": figure["logarithmic"]})
    return draws(rows, figure["x"], figure["y"], _described(figure), **options)


def _heads(figure: Facts, points: Sequence[Row]) -> Spec:
    """A number of every head, layer by head; marked ones have a frame."""
    title = figure["value"] or figure["y"]
    rows = []
    for point in points:
        row = {"layer": point["layer"], "index": point["head"], "name": f"{point['layer']}-{point['head']}"}
        row |= {name: charts.rounded(point[name], 4) for name in ("y", "low", "high") if point.get(name) is not None}
        row |= {name: point[name] for name in ("n", "panel", "marked") if point.get(name)}
        rows.append(row)
    shape = 1 + max(row["layer"] for row in rows), 1 + max(row["index"] for row in rows)
    values = [row["y"] for row in rows if "y" in row]
    color = charts.heat("y", values, title, share=figure["share"], roots=not figure["share"])
    tooltips = charts.tooltip(rows, {"name": "head", "y": title, "low": "95 % from", "high": "95 % to", "n": "n"})
    return charts.head_map(color, shape, tooltips, _described(figure), rows=rows, outlines={"marked": {}})


def _matrix(figure: Facts, points: Sequence[Row]) -> Spec:
    """A number for each pair of names, written into its tile where there is room."""
    rows = []
    for point in points:
        value = point.get("value")
        text = re.sub(r"(?<!\w)-(?=[\d.])", "−", str(point.get("text") or number(value, digits=2)))
        first, bracket, ends = text.partition(" [")
        row: dict[str, Any] = {"x": str(point["x"]), "y": str(point["y"]), "panel": str(point.get("panel") or "")}
        row |= {"text": first, "interval": f"[{ends}" if bracket else "", "written": text, "n": point.get("n")}
        rows.append(row | {name: charts.rounded(point.get(name)) for name in ("value", "low", "high")})
    values = [row["value"] for row in rows if row["value"] is not None]
    share = figure["share"] and max(values, default=0) <= 1
    n_columns = len({row["x"] for row in rows})
    titles = {"y": figure["y"] or "row", "x": figure["x"] or "column", "value": figure["value"] or "value"}
    titles |= {"low": "95 % from", "high": "95 % to", "n": "n", "written": "in words"}
    color = charts.heat("value", values, figure["value"], share=share, pale=True)
    tooltips, has_text = charts.tooltip(rows, titles), n_columns <= charts.MOST_TILES_WITH_TEXT
    if n_columns > charts.MOST_COLUMNS_WITH_INTERVALS:
        rows = [row | {"interval": ""} for row in rows]
    sides: dict[str, Any] = {"x": figure["x"], "y": figure["y"], "most": 130 + 90 * n_columns}
    sides |= {"cell": 46 if has_text else 22, "text": has_text}
    return charts.tiles(rows, color, tooltips=tooltips, description=_described(figure), **sides)


def _attention(figure: Facts, points: Sequence[Row]) -> Spec:
    """How much each position attends to each other; tokens are named where there is room."""
    n = 1 + max(max(point["query"], point["key"]) for point in points)
    named = n <= charts.MOST_LABELS
    panels = list(dict.fromkeys(point.get("panel") for point in points))
    rows: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda point: (panels.index(point.get("panel")), point["query"], point["key"])):
        row = {"x": str(point["key"]), "y": str(point["query"]), "panel": str(point.get("panel") or "")}
        for axis, side in (("x", "key"), ("y", "query")) if named else ():
            # The position tells a token from its like.
            token = str(point.get(f"{side}_token", "")).replace("\n", "↵").replace("Ġ", "␣").strip() or "␣"
            row[axis] += f" {token if len(token) <= _TOKEN_LETTERS else token[: _TOKEN_LETTERS - 1] + '…'}"
        rows.append({**row, "value": charts.rounded(point["value"], 3)})
    color = charts.heat("value", [row["value"] for row in rows], figure["value"] or "attention", share=True)
    tooltips = charts.tooltip(rows, {"y": "query", "x": "key", "value": figure["value"] or "attention"})
    cell = max(6, min(22, 420 // n))
    return charts.tiles(rows, color, figure["x"], figure["y"], tooltips, _described(figure), cell=cell, most=cell * n)


FIGURES: dict[str, Callable[[Facts, Sequence[Row]], Spec]] = {
    "bars": partial(_along_axes, draws=charts.bars),
    "lines": partial(_along_axes, draws=charts.lines),
    "curves": partial(_along_axes, draws=partial(charts.lines, points=False)),
    "scatter": partial(_along_axes, draws=charts.scatter),
    "heads": _heads,
    "matrix": _matrix,
    "attention": _attention,
}
"""Kind of an outcome's figure -> what draws it."""

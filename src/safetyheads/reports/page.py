"""Makes a page of a report: how it writes numbers, tables and provenance, and one HTML file that loads nothing."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from safetyheads.reports.charts import Spec, drawing_library

Facts: TypeAlias = Mapping[str, Any]

MAX_COMPLETION_BYTES = 2_500_000
"""Room for completions in a page, so that it stays under 5 MB; the rest is counted."""
_BYTES_AROUND_A_COMPLETION = 200
NO_HEADS = {"n_heads": 1, "scores": {"none": []}, "best_first": [], "group": [], "planted": [], "named": []}
"""For pages without a chart of all heads."""


# Numbers.


def two(value: float) -> str:
    """Two decimals; what rounds to nothing has no sign, for "−0.00" would be read as a loss."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def signed(value: float) -> str:
    """Two decimals with a sign."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("+0.00", "0.00").replace("-", "−")


def number(value: float | None, sign: bool = False, digits: int = 3) -> str:
    """Significant digits, no exponent down to a ten-thousandth; a dash for None."""
    if value is None:
        return "–"
    size = abs(value)
    text = f"{size:.2g}" if 0 < size < 1e-4 else f"{size:.{digits}g}" if round(size) < 10**digits else f"{size:.0f}"
    minus = "−" if value < 0 else "+" if sign and value > 0 else ""
    return minus + re.sub(r"e-0?(\d+)$", r"e−\1", text)


def interval(bounds: Sequence[float] | None, write: Callable[[float], str] = two) -> str:
    """Both ends in brackets; empty for None."""
    return f"[{write(bounds[0])}, {write(bounds[1])}]" if bounds else ""


def p_value(value: float | None, equals: str = "") -> str:
    """Two or three decimals, or that it is below a thousandth."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else equals + (f"{value:.3f}" if value < 0.1 else f"{value:.2f}")


def rate_words(rate: Facts) -> str:
    """A rate with its interval, for a sentence."""
    return f"{'–' if rate['rate'] is None else two(rate['rate'])} {interval(rate['interval'])}".strip()


# Numbers of a plausible length: what is kept on one line must fit one.
_APART = re.compile(r"(?P<interval>\[[−+\-.,\d\s]{0,40}\])|\b\d{1,5}-\d{1,5}\b")


def _sentence(text: str) -> Markup:
    """The verdict with its intervals set apart and its heads kept on one line."""

    def span(found: re.Match[str]) -> str:
        return f'<span class="{"interval" if found["interval"] else "nowrap"}">{found[0]}</span>'

    return Markup(_APART.sub(span, str(escape(text))))


def sentence_case(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


# Cells.


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: a text, or a number with what belongs to it."""

    text: str
    """Escaped by the page, unless it is markup."""
    interval: str = ""
    n: str = ""
    p: str = ""
    """Of the number; empty where there is none."""
    tone: str = ""
    """Class of its colour: ``yes``, ``less`` or ``soft``."""
    is_text: bool = False
    quoted: bool = False
    """Whether the number is the paper's, and not measured here."""
    again: bool = False
    """Whether the row above begins with the same."""

    @property
    def of(self) -> str:
        """Interval, n and p in a line, which breaks between them only."""
        return " · ".join(part.replace(" ", "\xa0") for part in (self.interval, self.n, self.p) if part)


NOTHING = Cell("–")


def rate_cell(rate: Facts | None, with_interval: bool = True) -> Cell:
    """A rate with its interval and counts."""
    if not rate or rate["rate"] is None:
        return NOTHING
    counts = f"{rate['count']}/{rate['n']}"
    return Cell(two(rate["rate"]), interval(rate["interval"]) if with_interval else "", counts)


def mean_cell(mean: Facts | None, sign: bool = False) -> Cell:
    """A mean with its interval; of a score, whose mean has none, the median with its own."""
    if not mean or mean["mean"] is None:
        return NOTHING
    if mean.get("median") is not None:
        around = interval(mean["median_interval"], lambda end: number(end, sign, 2))
        return Cell(number(mean["mean"], sign), f"median {number(mean['median'], sign, 2)} {around}".strip())
    return Cell(number(mean["mean"], sign), interval(mean["interval"], lambda end: number(end, sign, 2)))


def change_cell(change: Facts | None, with_p: bool = True) -> Cell:
    """A paired change with its interval and p."""
    if not change or change["change"] is None:
        return NOTHING
    p = f"p {p_value(change['p_value'], '= ')}" if with_p else ""
    return Cell(signed(change["change"]), interval(change["interval"], signed), p=p)


def rejudged_rows(rejudged: Facts) -> list[dict[str, Any]]:
    """What later judges say of each set of answers: a row a label, with a rate by judge."""
    labels = dict.fromkeys(label for entry in rejudged.values() for label in entry["rates"])
    return [
        {"label": label, "rates": {judge: entry["rates"].get(label) for judge, entry in rejudged.items()}}
        for label in labels
    ]


def validation_rows(validation: Facts) -> list[dict[str, Any]]:
    """Sensitivity and specificity of each judge, a row for each label."""
    return [
        {"judge": judge, "label": label, **accuracy}
        for judge, entry in validation.items()
        for label, accuracy in entry["accuracy"].items()
    ]


def corrected_rows(validation: Facts) -> list[dict[str, Any]]:
    """Each rate raw and corrected, by judge."""
    return [
        {**row, "judge": judge, "cell": _corrected_cell(row["corrected"]), "how": row["corrected"]["how"]}
        for judge, entry in validation.items()
        for row in entry["rates"]
    ]


def _corrected_cell(corrected: Facts) -> Cell:
    if corrected["rate"] is None:
        return NOTHING
    return Cell(two(corrected["rate"]), interval(corrected["interval"]), f"{corrected['n_labelled']} labelled")


def random_cell(random: Facts | None) -> Cell:
    """Mean and range of the random groups, how many of which layers, p, and the least p that so many can show."""
    if not random:
        return NOTHING
    found = f"{two(min(random['asr']))} to {two(max(random['asr']))}" if random["asr"] else ""
    drawn = f"{'all ' * random['all']}{random['n_groups']} of {random['matched']}"
    p = f"p {p_value(random['p_value'], '= ')}, least {p_value(random['least_p'])}"
    return Cell(two(random["mean"]), found, drawn, p)


REMEMBERED = {"economy": "tokens and answers", "plan": "plans of batches", "tolerance": "tolerances"}
"""What a run remembers beside its settings, by the beginning of the name: a long run has hundreds."""


def provenance(measured: Facts, manifest: Facts) -> dict[str, Any]:
    """What was measured, the rest of the config, and what the run remembered, gathered by its kind."""
    weights, found = {}, dict[str, dict[str, Any]]()
    for name, value in manifest.items():
        kind, _, rest = name.partition("_")
        if kind == "weights":
            weights[rest] = value
        elif name != "config":
            found.setdefault(REMEMBERED.get(kind, "other facts"), {})[rest or name] = value
    # Hashes of weights stand with the settings: both say what the numbers are of.
    config = {name: value for name, value in manifest["config"].items() if measured.get(name, ...) != value}
    config |= {"weights sha256": weights} if weights else {}
    return {
        "measured": list(facts(measured)),
        "config_facts": list(facts(config)),
        "remembered": [(kind, json.dumps(value, indent=1, sort_keys=True)) for kind, value in sorted(found.items())],
    }


def facts(fields: Facts, name: str = "") -> Iterator[tuple[str, str]]:
    """Each field with its dotted name; a list of plain values on one line."""
    for key, value in fields.items():
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(item.get("name", at)): item for at, item in enumerate(value, 1)}
        if isinstance(value, dict) and value:
            yield from facts(value, inner)
            continue
        is_plain = isinstance(value, list) and value and not any(isinstance(item, dict | list) for item in value)
        shown = value if is_plain else [value]
        yield inner, " · ".join(item if isinstance(item, str) else json.dumps(item) for item in shown)


def under_headings(first: Any, groups: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Records of a table: the first, then those of each heading that has any."""
    return [first, *(record for words, records in groups.items() if records for record in (words, *records))]


def prompt_notes(data: Facts) -> list[str]:
    """What was sampled, kept together or left out of a run's prompt sets, each sentence once."""
    sets = [data[kind] for kind in ("harmful", "benign") if kind in data]
    parts = [part for of in sets for part in (of, of.get("search"), of.get("test")) if part]
    return list(dict.fromkeys(note for part in parts for note in part.get("notes", ())))


def completions(
    rows: Iterable[Facts],
    sets: Iterable[str],
    groups: Mapping[frozenset[str], str],
    lead_judge: str,
    room: int = MAX_COMPLETION_BYTES,
) -> dict[str, Any]:
    """What the model wrote, set by set and group by group, as far as there is room, and how many found none.

    ``groups``: heads that were ablated together -> how a title names them; ``room``: bytes.
    """
    found: dict[tuple[str, frozenset[str]], list[Facts]] = {}
    for row in rows:
        if "text" in row:
            group = frozenset(filter(None, str(row.get("group") or "").split(",")))
            found.setdefault((row["set"], group), []).append(row)
    shown, left_out = list[dict[str, Any]](), 0
    for name in sets:
        for group, words in groups.items():
            texts = []
            for row in sorted(found.get((name, group), ()), key=lambda row: (row["id"], row.get("seed") or 0)):
                said = ", ".join(f"{judge}: {verdict['label']}" for judge, verdict in row["verdicts"].items())
                cut = "" if row.get("complete", True) else "; cut where every judge was final"
                said = f"prompt {row['id']}, {said}: {row['verdicts'][lead_judge]['reason']}{cut}"
                text = {"query": row["query"], "text": row["text"], "said": said}
                room -= _BYTES_AROUND_A_COMPLETION + sum(len(escape(part).encode()) for part in text.values())
                if room < 0:
                    left_out += 1
                else:
                    texts.append(text)
            if texts:
                title = f"{sentence_case(name.replace('_', ' '))} prompts, {words}"
                shown.append({"title": title, "rows": texts})
    return {"sets": shown, "left_out": left_out}


@cache
def _environment() -> Environment:
    # StrictUndefined: a field that the results lack fails here, not as a blank on the page.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.loader = PackageLoader("safetyheads.reports", "templates")
    for write in (number, two, signed, interval, p_value, rate_words, sentence_case):
        environment.filters[write.__name__] = write
    for cell in (signed, rate_cell, mean_cell, change_cell, random_cell):
        environment.globals[cell.__name__] = cell
    for rows in (rejudged_rows, validation_rows, corrected_rows, prompt_notes):
        environment.globals[rows.__name__] = rows
    environment.filters["percent"] = lambda share: f"{number(100 * share, digits=2)} %"
    environment.filters["sentence"] = _sentence
    environment.filters["thousands"] = lambda count: f"{count:,}"
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment


def render(
    template: str,
    content: Mapping[str, Any],
    measured: Facts,
    manifest: Facts,
    charts: Mapping[str, Spec] | None = None,
    head_columns: Facts = NO_HEADS,
) -> str:
    """A page from its template, which extends ``base.html.j2``; equal arguments give equal text.

    ``measured`` is what the numbers are of; ``manifest`` is empty where a page is of no single run; ``charts`` has each
    figure by the name of its place; ``head_columns`` what the figures know of all heads, a column a fact.
    """
    folder = files("safetyheads") / "reports/templates"
    scripts = {"css": "report.css", "javascript": "report.js", "drill_javascript": "drill.js"}
    assets = {name: Markup((folder / file).read_text(encoding="utf-8")) for name, file in scripts.items()}
    # A page without figures has no use for the drawing library.
    assets["bundle"] = Markup(drawing_library() if charts else "")
    # The browser runs these texts and no other, should one get onto the page after all.
    digests = (sha256(assets[name].encode()).digest() for name in ("bundle", "javascript", "drill_javascript"))
    assets["own_scripts"] = Markup(" ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests))
    page = {**content, **assets, "charts": charts or {}, "head_columns": head_columns}
    page |= provenance(measured, manifest) if manifest else {}
    return _environment().get_template(template).render(page) + "\n"

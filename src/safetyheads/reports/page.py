"""Makes a page of a report: how it writes numbers, tables and provenance, and one HTML file that loads nothing."""

from __future__ import annotations

import json
import re
import shlex
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from safetyheads.reports.answers import MAX_NAMED, MAX_PROMPTS
from safetyheads.reports.charts import Spec, drawing_library, pictures
from safetyheads.runs.directory import RunDirectory

Facts: TypeAlias = Mapping[str, Any]

NO_HEADS = {"n_heads": 1, "scores": {"none": []}, "best_first": [], "group": [], "planted": [], "named": []}
"""For pages without a chart of all heads."""


GLOSSARY = {
    "ablate": "To take away what a head adds to the model, without training anything: the rest runs on as it is.",
    "ASR": "Attack success rate: the share of harmful prompts whose answer the judge takes as complying.",
    "benign": "Harmless prompts, which a sound model answers: they show what else an ablation breaks.",
    "coherent": "Written in whole words that go on to say something: not empty, looping or garbled.",
    "Generalized Ships": "How far ablating a head turns the space of the hidden states of all prompts, in degrees.",
    "head": "One of the parts that each layer reads the text with; 2-26 is head 26 of layer 2, both from 0.",
    "held-out": "Prompts that took no part in finding the heads, so that the numbers are not too good by choice.",
    "interval": "A 95 % interval: other prompts of the same kind would give numbers in about this range.",
    "KL": "How far two predictions of the next token differ, in nats: 0 is the same.",
    "random groups": "As many heads, drawn at random: what a group does beyond them is its own.",
    "refusal score": "How much ablating a head makes the words less likely that the model's refusals begin with.",
    "Sahara": "The search for a group: step by step it adds the head that raises the whole group's score most.",
    "Ships": "How far ablating a head moves the prediction of the first word of the answer, in nats.",
    "Tarone": "A correction for testing many heads at once: chance alone would otherwise find some.",
}
"""Term -> what it means to a reader who does not know the paper; a page explains them where they stand."""
_HEADING = re.compile(r'<h2 id="([\w-]+)">(.*?)</h2>')


def contents(body: str) -> list[tuple[str, Markup]]:
    """Anchor and words of each section of a page."""
    return [(anchor, Markup(Markup(words).striptags())) for anchor, words in _HEADING.findall(body)]


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


LABEL_TONES = defaultdict(str, complied="yes", refused="less")
"""Class of the words for a label of an answer to a harmful prompt."""
REMEMBERED = {"economy": "tokens and answers", "plan": "plans of batches", "tolerance": "tolerances"}
"""What a run remembers beside its settings, by the beginning of the name: a long run has hundreds."""


def provenance(measured: Facts, manifest: Facts) -> dict[str, Any]:
    """What a reader asks first, then all that was measured and set, and what the run remembered, by its kind."""
    weights, found = {}, dict[str, dict[str, Any]]()
    for name, value in manifest.items():
        kind, _, rest = name.partition("_")
        if kind == "weights":
            weights[rest] = value
        elif name not in ("config", "command"):
            found.setdefault(REMEMBERED.get(kind, "other facts"), {})[rest or name] = value
    # Hashes of weights stand with the settings: both say what the numbers are of.
    config = {name: value for name, value in manifest["config"].items() if measured.get(name, ...) != value}
    config |= {"weights sha256": weights} if weights else {}
    return {
        "about": list(_about(measured, {**manifest["config"], **config})),
        "command": manifest.get("command", ""),
        "measured": list(facts(measured)),
        "config_facts": list(facts(config)),
        "remembered": [(kind, json.dumps(value, indent=1, sort_keys=True)) for kind, value in sorted(found.items())],
    }


def _about(measured: Facts, config: Facts) -> Iterator[tuple[str, str]]:
    """What the numbers are of, a line a question; what a run does not say is left out."""
    model, data, sampling = (measured.get(name) or {} for name in ("model", "data", "sampling"))
    if model:
        size = f"{model['n_layers']} layers × {model['n_heads']} heads, {model['n_parameters']:,} parameters"
        yield "Model", f"{model['name']} ({model['family']}, {size})"
    if weights := config.get("weights_sha256", config.get("weights sha256")):
        first = next(iter(weights.values()), "") if isinstance(weights, dict) else weights
        yield "Weights", f"sha256 {str(first)[:16]}…"
    for kind in ("harmful", "benign"):
        if prompts := data.get(kind):
            counts = {"": "n", " to search on": "n_search", " to test on": "n_test"}
            told = ", ".join(f"{prompts[field]}{use}" for use, field in counts.items() if field in prompts)
            yield f"{kind.capitalize()} prompts", f"{prompts['name']}: {told}; sha256 {prompts['sha256'][:16]}…"
    if "template" in data:
        yield "Template", data["template"]
    if ablation := measured.get("ablation"):
        yield "Ablation", f"{ablation['label']}, ε = {number(ablation.get('epsilon'))}"
    if sampling:
        yield "Decoding", f"{sampling['name']}, up to {sampling['max_new_tokens']} tokens"
    if judges := measured.get("judges"):
        yield "Judges", ", ".join(judge["name"] for judge in judges)
    plain = {"seed": "Seed", "dtype": "Number format", "device": "Device"}
    yield from ((words, str(config[name])) for name, words in plain.items() if name in config)
    if versions := config.get("versions"):
        yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def command_of(run: RunDirectory) -> str:
    """The command that first started the run, to be copied; empty where it was started from Python.

    Without its ``--out``: the same settings in another directory are the same run.
    """
    starts = run.read_starts()
    told = starts[0].get("command") if starts else None
    if not isinstance(told, list) or not told or Path(told[0]).name not in ("safetyheads", "app.py", "__main__.py"):
        return ""
    words = [str(word) for word in told[1:]]
    kept = [word for at, word in enumerate(words) if word != "--out" and (at == 0 or words[at - 1] != "--out")]
    return shlex.join(["safetyheads", *(word for word in kept if not word.startswith("--out="))])


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
    environment.globals |= {"GLOSSARY": GLOSSARY, "contents": contents, "TONES": LABEL_TONES}
    environment.globals |= {"MAX_PROMPTS": MAX_PROMPTS, "MAX_NAMED": MAX_NAMED}
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
    scripts = {"css": "report.css", "javascript": "report.js", "answers_javascript": "answers.js"}
    assets = {name: Markup((folder / file).read_text(encoding="utf-8")) for name, file in scripts.items()}
    # A page without figures has no use for the drawing library.
    assets["bundle"] = Markup(drawing_library() if charts else "")
    # The browser runs these texts and no other, should one get onto the page after all.
    digests = (sha256(assets[name].encode()).digest() for name in ("bundle", "javascript", "answers_javascript"))
    assets["own_scripts"] = Markup(" ".join(f"'sha256-{b64encode(digest).decode()}'" for digest in digests))
    page = {**content, **assets, "charts": charts or {}, "head_columns": head_columns}
    page["pictures"] = pictures(charts or {}, head_columns)
    page |= provenance(measured, manifest) if manifest else {}
    return _environment().get_template(template).render(page) + "\n"

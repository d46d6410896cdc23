"""Makes a page of a report: how it writes numbers, tables and provenance, and one HTML file that loads nothing."""

import json
import re
import shlex
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup, escape

from safetyheads.files import read_toml
from safetyheads.reports import tables
from safetyheads.reports.answers import MAX_NAMED, MAX_PROMPTS
from safetyheads.reports.charts import Spec, drawing_library, pictures
from safetyheads.reports.tables import Column, Facts, Table, TableMaker, number
from safetyheads.runs.directory import RunDirectory

NO_HEADS = {"n_heads": 1, "scores": {"none": []}, "best_first": [], "group": [], "planted": [], "named": []}
"""For pages without a chart of all heads."""


GLOSSARY = read_toml(Path(__file__).with_name("glossary.toml"))
"""Term -> what it means to a reader who does not know the paper; a page explains them where they stand."""
_HEADING = re.compile(r'<h2 id="([\w-]+)">(.*?)</h2>')


def contents(body: str) -> list[tuple[str, Markup]]:
    """Anchor and words of each section of a page."""
    return [(anchor, Markup(Markup(words).striptags())) for anchor, words in _HEADING.findall(body)]


# Numbers of a plausible length: what is kept on one line must fit one.
_APART = re.compile(r"(?P<interval>\[[−+\-.,\d\s]{0,40}\])|\b\d{1,5}-\d{1,5}\b")


def _sentence(text: str) -> Markup:
    """The verdict with its intervals set apart and its heads kept on one line."""

    def span(found: re.Match[str]) -> str:
        return f'<span class="{"interval" if found["interval"] else "nowrap"}">{found[0]}</span>'

    return Markup(_APART.sub(span, str(escape(text))))


LABEL_TONES = defaultdict(str, complied="yes", refused="less")
"""Class of the words for a label of an answer to a harmful prompt."""
REMEMBERED = ("economy", "plan", "tolerance")
"""What names of a manifest begin with that a run remembers beside its settings: a long run has hundreds."""


def provenance(measured: Facts, manifest: Facts) -> dict[str, Any]:
    """What a reader asks first, the command, and all that was measured, set and remembered."""
    weights = {name: value for name, value in manifest.items() if name.startswith("weights_")}
    config = manifest["config"] | ({"weights sha256": weights} if weights else {})
    held = {"measured": measured, **{name: value for name, value in manifest.items() if name != "command"}}
    return {
        "about": list(_about(measured, config)),
        "command": manifest.get("command", ""),
        "manifest": json.dumps(held, indent=1, sort_keys=True),
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


_WHERE_OPTIONS = ("--out", "--shard", "--wait", "--ray", "--workers", "--gpus-per-worker", "--judge-workers")
"""Options of runs, each with a value."""


def command_of(run: RunDirectory) -> str:
    """The command that first started the run, to be copied; empty where it was started from Python.

    Without where it was kept and who computed it: the same settings elsewhere are the same run, and the same page.
    """
    told = next((start.get("command") for start in run.read_starts() if start.get("part") != "merge"), None)
    if not isinstance(told, list) or not told or Path(told[0]).name not in ("safetyheads", "app.py", "__main__.py"):
        return ""
    words = [str(word) for word in (told[3:] if told[1:2] == ["plan"] else told[1:])]
    aside, pairs = _WHERE_OPTIONS, pairwise(["safetyheads", *words])
    kept = (word for before, word in pairs if before not in aside and word.partition("=")[0] not in aside)
    return shlex.join(["safetyheads", *kept])


def under_headings(first: Any, groups: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Records of a table: the first, then those of each heading that has any."""
    return [first, *(record for words, records in groups.items() if records for record in (words, *records))]


def prompt_notes(data: Facts) -> list[str]:
    """What was sampled, kept together or left out of a run's prompt sets, each sentence once, with its half."""
    halves: dict[str, set[str]] = {}
    for of in (data[kind] for kind in ("harmful", "benign") if kind in data):
        for half, part in (("", of), ("search half: ", of.get("search")), ("test half: ", of.get("test"))):
            for note in (part or {}).get("notes", ()):
                halves.setdefault(note, set()).add(half)
    return [f"{min(half) if len(half) == 1 else ''}{note}" for note, half in halves.items()]


def no_verdict(rates: Iterable[Facts]) -> str:
    """Why answers have no verdict, and how many, over rates by one judge; empty where all have one."""
    reasons = Counter[str]()
    for rate in rates:
        reasons.update(rate.get("unscored_reasons", {}))
    return ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())


class Page(str):
    """A page's text, with its tables as data."""

    __slots__ = ("tables",)
    tables: Mapping[str, Table]

    def __new__(cls, text: str, tables: Mapping[str, Table]) -> Self:
        """``tables``: by the id of their place."""
        page = super().__new__(cls, text)
        page.tables = tables
        return page


@cache
def _environment() -> Environment:
    # StrictUndefined: a field that the results lack fails here, not as a blank on the page.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.loader = PackageLoader("safetyheads.reports", "templates")
    cells = {name: made for name, made in vars(tables).items() if getattr(made, "__module__", "") == tables.__name__}
    environment.filters |= cells
    environment.globals |= cells | {"GLOSSARY": GLOSSARY, "TONES": LABEL_TONES, "column": Column}
    environment.globals |= {"contents": contents, "prompt_notes": prompt_notes, "no_verdict": no_verdict}
    environment.globals["columns"] = lambda names: [Column(str(name)) for name in names]
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
) -> Page:
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
    maker = TableMaker()
    page = {**content, **assets, "charts": charts or {}, "head_columns": head_columns, "tables": maker}
    page["td"] = maker.td
    page["pictures"] = pictures(charts or {}, head_columns)
    page |= provenance(measured, manifest) if manifest else {}
    try:
        return Page(_environment().get_template(template).render(page) + "\n", maker.tables)
    except UndefinedError as error:
        raise LookupError(error.message) from error

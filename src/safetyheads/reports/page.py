"""What every page of a report is made of: templates, styles, the drawing library, provenance, completions.

Owns that a page is one file that asks for nothing, and how much of what the model wrote it holds; refuses to know
what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from safetyheads.reports.numbers import FILTERS

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

MAX_COMPLETION_BYTES = 2_500_000
"""Room for completions in the page, so that it stays under 5 MB; the rest is counted."""
_BYTES_AROUND_A_COMPLETION = 200
NO_HEADS = {"n_heads": 1, "scores": {"none": []}, "best_first": [], "group": [], "planted": [], "named": []}
"""For pages without a chart that asks for rows of heads, which the page's script makes."""


def completion_sets(
    titled: Iterable[tuple[str, Mapping[str, Any]]], room: int = MAX_COMPLETION_BYTES
) -> tuple[list[dict[str, Any]], int]:
    """Completions under their titles, as long as there is room, and how many found none.

    Args:
        titled: title and row; a row has ``query``, ``label``, ``reason`` and ``text``.
        room: bytes.
    """
    from markupsafe import escape

    sets: dict[str, list[Mapping[str, Any]]] = {}
    left_out = 0
    for title, row in titled:
        room -= _BYTES_AROUND_A_COMPLETION + sum(len(escape(text).encode()) for text in map(str, row.values()))
        if room < 0:
            left_out += 1
            continue
        sets.setdefault(title[0].upper() + title[1:], []).append(row)
    return [{"title": title, "rows": shown} for title, shown in sets.items()], left_out


def provenance(measured: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, the config, each start, and what the run remembered."""
    own = ("schema_version", "config", "provenance")
    return {
        "measured": _facts(measured),
        "config": _facts(manifest["config"]),
        "starts": [_facts(start) for start in manifest["provenance"]],
        "remembered": [
            (name, json.dumps(value, indent=1, sort_keys=True)) for name, value in manifest.items() if name not in own
        ],
    }


def _facts(fields: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
    """Each field with its dotted name; a list of plain values on one line."""
    for key, value in fields.items():
        inner = f"{name}.{key}" if name else str(key)
        if isinstance(value, dict) and value:
            yield from _facts(value, inner)
        elif isinstance(value, list) and value and not any(isinstance(item, dict | list) for item in value):
            yield inner, " · ".join(map(_plain, value))
        else:
            yield inner, _plain(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@cache
def environment() -> Environment:
    """The templates with their filters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # StrictUndefined: a field that the results lack fails here, not as a blank on the page.
    made = Environment(
        loader=PackageLoader("safetyheads.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    made.filters |= FILTERS
    return made


def assets() -> dict[str, Markup]:
    """What every page carries in itself: styles, scripts, drawing library."""
    from markupsafe import Markup

    folder = files("safetyheads") / "reports/templates"
    own = {"css": "report.css", "javascript": "report.js", "drill_javascript": "drill.js"}
    read = {name: Markup((folder / file).read_text(encoding="utf-8")) for name, file in own.items()}
    return read | {"bundle": Markup(drawing_library())}


@cache
def drawing_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, in the version that the specifications are written for."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    # Inside a script element these two would end or hide the rest of the page.
    return bundle.replace("</script", r"<\/script").replace("<!--", r"<\!--")

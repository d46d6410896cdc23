"""Reads pages of reports: elements, scripts, and all they say as lines of text that a snapshot keeps."""

import hashlib
import json
import os
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "input", "link", "img", "hr", "path", "circle", "rect"}
BREAKS = {"p", "li", "tr", "h1", "h2", "h3", "h4", "summary", "figcaption", "dt", "pre", "title", "article", "option"}
HEADINGS = {"h1": "# ", "h2": "## ", "h3": "### ", "h4": "#### "}
ADDRESSES = ("src", "href", "action", "data", "poster", "srcset", "background", "xlink:href", "formaction", "ping")
WRITE_SNAPSHOTS = "SAFETYHEADS_WRITE_SNAPSHOTS"
_MOST_ROWS = 6
"""Rows of a figure that a snapshot shows; of the others it has a hash."""


class Page(HTMLParser):
    """Elements with their attributes, scripts by id, and text; fails on a tag that closes another one."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.styles = ""
        self.text: list[str] = []
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.text.append("\n" + HEADINGS.get(tag, "") if tag in BREAKS else " | " if tag in ("td", "th", "dd") else "")
        if name := dict(attributes).get("data-chart"):
            self.text.append(f"\n<{name}>")
        if tag not in VOID:
            self._open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag
        self.text.append("\n" if tag in BREAKS else "")

    def handle_data(self, data: str) -> None:
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "script":
            self.scripts[attributes.get("id") or f"script {len(self.scripts)}"] = data
        elif tag == "style":
            self.styles += data
        else:
            self.text.append(re.sub(r"\s+", " ", data))

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).replace(" | ", " ").split())

    @property
    def charts(self) -> dict[str, Any]:
        return json.loads(self.scripts["chart-specs"])

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def lines(self) -> str:
        """The page's text, then its figures: marks, what they show, and the first of their rows."""
        lines = (re.sub(r" +", " ", line).strip(" |") for line in "".join(self.text).split("\n"))
        text = "\n".join(line for line in lines if line)
        return text + "\n\n" + "\n".join(f"<{name}>\n{_figure(spec)}" for name, spec in self.charts.items()) + "\n"


def _figure(spec: dict[str, Any]) -> str:
    inner = spec.get("spec", spec)
    lines = []
    for layer in inner["layer"]:
        channels = (f"{name}={held['field']}" for name, held in layer["encoding"].items() if "field" in held)
        lines.append(f"  {layer['mark']['type']}: {', '.join(channels)}")
    for name, rows in spec.get("datasets", {}).items():
        shown = [json.dumps(row, ensure_ascii=False) for row in rows]
        digest = hashlib.sha256("\n".join(shown).encode()).hexdigest()[:12]
        lines.append(f"  {len(rows)} {name if name == 'rows' else 'own'} {digest}")
        lines += [f"    {row}" for row in shown[:_MOST_ROWS]]
    return "\n".join(lines)


def check_snapshot(page: Page, name: str) -> None:
    """The page says what its snapshot says; ``SAFETYHEADS_WRITE_SNAPSHOTS=1`` writes that anew."""
    path = Path(__file__).parent.parent / "reports" / "snapshots" / f"{name}.txt"
    if os.environ.get(WRITE_SNAPSHOTS) == "1":
        path.write_text(page.lines(), encoding="utf-8")
    wanted = path.read_text(encoding="utf-8").split("\n")
    # Line by line: a difference of whole pages is unreadable.
    for at, (line, expected) in enumerate(zip(page.lines().split("\n"), wanted, strict=False), 1):
        assert line == expected, f"line {at} of {path.name}; if it is meant so, run with {WRITE_SNAPSHOTS}=1"
    assert len(page.lines().split("\n")) == len(wanted)


CALLED_RIGHT = re.compile(
    r"\banswer\w*\W+(?:\w+\W+)?(?:right|correct|correctly)\b|\b(?:right|correct|correctly)\W+answer", re.IGNORECASE
)


def check_closed(page: Page, files: tuple[str, ...] = ()) -> None:
    """Nothing is loaded: no address but of the pages beside it, no element that fetches, a policy against requests."""
    for tag, attributes in page.elements:
        assert tag != "img" or (attributes["src"] or "").startswith("data:image/png;base64,")
        assert tag not in {"link", "iframe", "object", "embed", "base", "audio", "video"}
        for name in ADDRESSES:
            address = attributes.get(name) or "#"
            assert tag == "img" or address.startswith("#") or address in files, (tag, attributes)
        assert "url(" not in (attributes.get("style") or "")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import", page.styles)
    # Beside what hostile samples name, which stands in the data.
    assert not any("://" in text.replace("https://attacker.example", "") for text in page.scripts.values())
    (policy,) = [attributes["content"] for attributes in page.tags("meta") if "http-equiv" in attributes]
    allowed = dict(part.split(maxsplit=1) for part in (policy or "").split(";"))
    assert allowed["default-src"] == "'none'"
    # The texts that are run, and no other, may run.
    for text in (text for name, text in page.scripts.items() if name.startswith("script ")):
        assert f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in allowed["script-src"].split()
    assert "unsafe" not in allowed["script-src"]
    assert not any("http" in value or "*" in value for value in allowed.values())


def check_tables(page: Page) -> None:
    """Headers have a scope, frames that scroll can be reached and have a name, ids are unique, places have figures.

    No answer is called right: without a gold answer nobody knows, and a page says "as before".
    """
    assert not CALLED_RIGHT.search(page.words)
    assert all(attributes.get("scope") in {"row", "col", "rowgroup"} for attributes in page.tags("th"))
    frames = [attributes for _, attributes in page.elements if (attributes.get("class") or "").startswith("scroll")]
    assert all(frame["tabindex"] == "0" and {"aria-label", "aria-labelledby"} & set(frame) for frame in frames)
    ids, labels, places = (
        [attributes[name] for _, attributes in page.elements if attributes.get(name)]
        for name in ("id", "aria-labelledby", "data-chart")
    )
    assert len(ids) == len(set(ids))
    assert set(labels) <= set(ids)
    assert sorted(map(str, places)) == sorted(page.charts)


def check_hostile(page: Page, clean: Page) -> None:
    """What comes from outside is text: the attacked page has the clean one's scripts and no element of the attack's."""
    assert len(page.tags("script")) == len(clean.tags("script"))
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.elements)
    assert all(text in page.words for text in ("onerror=alert(1)", "{{ 7*7 }}"))

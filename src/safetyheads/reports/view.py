"""Serves the pages of run directories to this machine's browser, read-only, and lists the pages below a folder."""

import secrets
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from safetyheads.errors import InputError, SafetyheadsError
from safetyheads.reports.page import render
from safetyheads.reports.reproduction import headline
from safetyheads.reports.write import PAGES
from safetyheads.runs.directory import RunDirectory

HOST = "127.0.0.1"
_NAMES = frozenset((HOST, "localhost"))
"""Names of this machine in a request; any other was turned to it by somebody's name server."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Type": "text/html; charset=utf-8",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The address holds the token.
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def pages_below(folder: Path) -> Iterator[Path]:
    """Every page that safetyheads wrote below a folder, without following links."""
    for path in sorted(folder.rglob("*.html")):
        is_page = path.is_file() and (path.parent.name == "report" or path.name in ("history.html", "compare.html"))
        if is_page and not any(part.is_symlink() for part in (path, *path.parents) if part.is_relative_to(folder)):
            yield path


def index_page(folder: Path) -> str:
    """A page that links to the pages below a folder, with what each run is and found."""
    runs, others = list[dict[str, Any]](), list[str]()
    for path in pages_below(folder):
        address = quote(path.relative_to(folder).as_posix())
        if path.parent.name != "report":
            others.append(address)
        elif path.name == "index.html":
            run = path.parent.parent
            about = _about(run)
            runs.append({"name": str(run.relative_to(folder)), "address": address, **about})
    links = {run["name"]: run["address"] for run in runs}
    content = {"name": folder.resolve().name, "runs": runs, "links": links, "others": others}
    return render("index.html.j2", content, {}, {})


def _about(run: Path) -> dict[str, str]:
    """Kind, model and first sentence of a run; dashes where its results cannot be read."""
    try:
        results = RunDirectory.look(run).read_results()
        kind, model = str(results["kind"]), results.get("model") or {}
        finding = (PAGES[kind][1] if kind in PAGES else headline)(results)
        return {"kind": kind, "model": str(model.get("name", "–")), "finding": finding}
    except (SafetyheadsError, OSError, ValueError, LookupError, AttributeError, TypeError):
        return dict.fromkeys(("kind", "model", "finding"), "–")


def server(folder: Path, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server of the pages below a folder that has not begun to serve, and its address with the token in it.

    It answers requests for pages alone, from this machine, that know the token: answers and weights stay unread.
    """
    folder, token = folder.resolve(), secrets.token_urlsafe(24)
    if not folder.is_dir() or not any(pages_below(folder)):
        raise InputError(f"no page below {folder}; report writes one for a finished run")

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "safetyheads", ""

        def do_GET(self) -> None:
            status, body = _page_for(folder, token, self.path, dict(self.headers.items()))
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: a line would hold the token."""

    try:
        made = ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} of {HOST} cannot be used: {error}") from None
    return made, f"http://{HOST}:{made.server_address[1]}/{token}/"


def _page_for(folder: Path, token: str, target: str, headers: dict[str, str]) -> tuple[HTTPStatus, bytes]:
    """The page that a request asks for, or why it gets none."""
    found = {name.lower(): value for name, value in headers.items()}
    origin = found.get("origin")
    try:
        named = [found.get("host", "")] + ([urlsplit(origin).netloc] if origin is not None else [])
        own = all(urlsplit(f"//{name}").hostname in _NAMES for name in named) and len(set(named)) == 1
        asked = urlsplit(target).path
    except ValueError:  # a bracket that opens no address
        own, asked = False, ""
    if not own or found.get("sec-fetch-site") == "cross-site":
        return HTTPStatus.FORBIDDEN, b"Only pages of this address may ask.\n"
    given, _, rest = unquote(asked).lstrip("/").partition("/")
    if not secrets.compare_digest(given.encode(), token.encode()):
        return HTTPStatus.FORBIDDEN, b"The address lacks the token that view printed.\n"
    if rest == "":
        return HTTPStatus.OK, index_page(folder).encode()
    # Compared with the pages there are: no name can lead out of the folder.
    for path in pages_below(folder):
        if path.relative_to(folder).as_posix() == rest:
            return HTTPStatus.OK, path.read_bytes()
    return HTTPStatus.NOT_FOUND, b"There is no such page.\n"

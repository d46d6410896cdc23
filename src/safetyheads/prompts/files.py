"""Reads prompt files (CSV, JSONL, TXT) and downloads known benchmarks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from safetyheads.errors import InputError

QUERY_COLUMNS = ("goal", "query", "prompt", "question", "instruction", "behavior", "text")
"""Names that a query's column may have, in any case; the first one found counts."""
Row: TypeAlias = tuple[str, str | None, str | None]
"""Query, category (from the column of that name, where there is one) and reference (from the column that is named)."""
PromptFile: TypeAlias = tuple[list[Row], int, str]
"""At least one row, equal ones too; how many rows without a query were left out; SHA-256 of the bytes (hexadecimal)."""

Cells: TypeAlias = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its cells by column; a text alone is the column ``text``."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where the authors publish a benchmark, and what we found there."""

    url: str
    filename: str
    """Name in the cache; its suffix gives the format."""
    n_rows: int
    """Prompts it had."""
    sha256: str | None = None
    """Fingerprint of the published file; None where we have not seen the file, which is then not verified."""


_TABLE = resources.files("safetyheads").joinpath("data/benchmarks.toml").read_text("utf-8")
KNOWN_BENCHMARKS: dict[str, Benchmark] = {name: Benchmark(**row) for name, row in tomllib.loads(_TABLE).items()}
"""Benchmarks by the names that ``--prompts`` takes (App. B.1)."""


def read_rows(path: Path, column: str | None = None, reference_column: str | None = None) -> PromptFile:
    """Read a prompt file; its suffix gives the format (none means TXT). An InputError says why it cannot be read.

    A reference is the beginning of the right answer; only the column that the caller names is one.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{path}: prompt files end in .csv, .jsonl or .txt")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise InputError(f"{path} is empty")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from error
    # ASCII text in UTF-16 without a byte order mark is valid UTF-8 with NULs in it.
    if "\0" in text:
        raise InputError(f"{path} is not UTF-8 text (byte {content.index(0)})")
    if not text.strip():
        raise InputError(f"{path} holds only blanks")
    rows: list[Row] = []
    dropped = 0
    for where, cells in _READERS[suffix](text, str(path)):
        query_column = _query_column(list(cells), column, where) if cells else ""
        query = cells.get(query_column, "")
        if not isinstance(query, str):
            raise InputError(f"{where}: the field {query_column!r} is not a string")
        if query.strip():
            by_name = {name.lower(): cell for name, cell in cells.items() if isinstance(cell, str) and cell.strip()}
            reference = None
            if reference_column is not None:
                named = cells.get(_query_column(list(cells), reference_column, where))
                reference = named if isinstance(named, str) and named.strip() else None
            rows.append((query, by_name.get("category"), reference))
        else:
            dropped += 1
    if not rows:
        raise InputError(f"{path} holds no prompts: no row has a query")
    return rows, dropped, hashlib.sha256(content).hexdigest()


def _lines(text: str) -> list[str]:
    # Not str.splitlines, which also breaks at characters that a query may contain; a file's last newline begins no row.
    return re.split(r"\r\n|\n|\r", re.sub(r"(\r\n|\n|\r)\Z", "", text))


def _read_txt(text: str, path: str) -> Iterator[Cells]:
    return ((path, {"text": line.strip()} if line.strip() else {}) for line in _lines(text))


def _read_csv(text: str, path: str) -> Iterator[Cells]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(([cell.strip() for cell in cells] for cells in reader if any(cell.strip() for cell in cells)), [])
        for cells in reader:
            # Cutting the rest off would leave half of a query that has commas and no quotes.
            if any(cells[len(names) :]):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(names)}; "
                    "a query with a comma must stand in double quotes"
                )
            yield path, dict(zip(names, [*cells, *[""] * len(names)], strict=False))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _read_jsonl(text: str, path: str) -> Iterator[Cells]:
    for number, line in enumerate(_lines(text), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            yield where, {}
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from error
        cells = {"text": value} if isinstance(value, str) else value
        if not isinstance(cells, dict) or not cells:
            raise InputError(f"{where}: neither an object with a query nor a string")
        yield where, cells


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".txt": _read_txt, "": _read_txt}


def _query_column(names: Sequence[str], column: str | None, where: str) -> str:
    """The column with the query: the one named, else the first of :data:`QUERY_COLUMNS`; an InputError lists them."""
    if column is not None and column in names:
        return column
    by_key = {name.strip().lower(): name for name in reversed(names)}
    for wanted in QUERY_COLUMNS if column is None else (column.strip().lower(),):
        if wanted in by_key:
            return by_key[wanted]
    found = ", ".join(name or "(no name)" for name in names)
    if column is not None:
        raise InputError(f"{where}: no column {column!r}; the columns are {found}")
    known = ", ".join(QUERY_COLUMNS)
    raise InputError(f"{where}: no column is named as a query's ({known}); name it, found are {found}")


def cache_directory() -> Path:
    """The folder of downloads: ``SAFETYHEADS_CACHE``, else the user's cache directory."""
    import platformdirs

    return Path(os.environ.get("SAFETYHEADS_CACHE") or platformdirs.user_cache_dir("safetyheads"))


def download(
    name: str, column: str | None = None, reference_column: str | None = None
) -> tuple[PromptFile, str | None]:
    """A known benchmark, with a sentence on how it differs from what its authors published when we looked, if it does.

    It is downloaded once, under a temporary name that is renamed when complete. An InputError tells that there is no
    network, or that the server sent something else.
    """
    import logging

    import pooch

    benchmark, directory = KNOWN_BENCHMARKS[name], cache_directory()
    pooch.get_logger().setLevel(logging.WARNING)  # It prints each checksum; the manifest holds ours.
    by_hand = f"download {benchmark.url} by hand and pass the path of the file"
    try:
        # The checksum is compared below: authors may correct a file, which is no failure.
        path = Path(pooch.retrieve(benchmark.url, None, benchmark.filename, directory))
    except OSError as error:
        inner: BaseException = error
        # HTTP libraries wrap the reason several times and repeat the address.
        while isinstance(wrapped := inner.__cause__ or inner.__context__, BaseException):
            inner = wrapped
        reason = " ".join(str(inner).split())[:160] or type(inner).__name__
        raise InputError(f"{name} cannot be downloaded; {by_hand} ({reason})") from error
    try:
        file = read_rows(path, column, reference_column)
    except InputError as error:
        if column is None and reference_column is None:
            path.unlink(missing_ok=True)  # It is a login page or the like.
        raise InputError(f"what came for {name} is no prompt file; {by_hand} ({error})") from error
    rows, _, sha256 = file
    differences = []
    if len(rows) != benchmark.n_rows:
        differences.append(f"{len(rows)} prompts where {benchmark.n_rows} were expected")
    if benchmark.sha256 and sha256 != benchmark.sha256:
        differences.append(f"SHA-256 {sha256[:12]}... where {benchmark.sha256[:12]}... was expected")
    return file, "; ".join(differences) or None

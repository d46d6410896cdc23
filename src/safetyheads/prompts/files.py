"""Reads prompt files (CSV, TSV, JSONL, JSON, TXT) and downloads known benchmarks."""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from safetyheads.errors import InputError, first_line, shorten, unicode_text
from safetyheads.files import leaves, read_toml, read_whole

QUERY_COLUMNS = ("messages", "prompt", "goal", "query", "question", "instruction", "behavior", "text")
"""Names that a query's column may have, in any case; the first one found counts: ``prompt`` is what was sent."""
CONTEXT_COLUMNS = ("context", "contextstring", "passage", "input")
"""Names that a column may have whose text belongs in front of the query, in any case, without ``_`` and blanks."""
CONTEXT_JOINT = "\n\n---\n\n"
"""Between a context and its query, as HarmBench writes them."""
NO_COLUMN = "none"
"""In the place of a column's name: there is none."""
_PICTURE = re.compile(
    r"\Adata:(image|audio|video)/|\.(png|jpe?g|webp|gif|bmp|tiff?|svg|wav|mp3|flac|ogg|m4a|mp4|webm|avi|mov)([?#]\S*)?\Z",
    re.IGNORECASE,
)
_PICTURE_COLUMN = re.compile(r"(image|img|picture|photo|audio|video)s?([_ ]?(path|file|file_?name|url|bytes|id))?")
_SYSTEM_COLUMN = re.compile(r"sys(tem)?([_ ]?(prompt|message|instruction)s?)?")
_NOTHING: tuple[Any, ...] = (None, "", [], {}, False)
_WORDS_OF_A_PATH = 4  # more are a sentence, which may end as a path does
# What tools leave where a file should be.
_NO_FILE = {
    "version https://git-lfs": "a pointer of Git LFS, not the file",
    **dict.fromkeys(("<!doctype html", "<html", "<?xml"), "a web page or an error of a server"),
}
_NUMBER_OR_ID = re.compile(r"[\x21-\x7e]*\d[\x21-\x7e]*")  # without a blank, and with a digit
_CONVERSATION = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from)["']\s*:""")
_COLUMN_NAME = re.compile(r"[^\s,;.?!]+( [^\s,;.?!]+)?")
_NAMES_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns of a prompt file, by name in any case."""

    query: str | None = None
    """None looks for :data:`QUERY_COLUMNS`, or takes the only column."""
    context: str | None = None
    """Text in front of the query. None looks for :data:`CONTEXT_COLUMNS`; :data:`NO_COLUMN` leaves such a text out."""
    category: str | None = None
    """None takes a column of the name ``category``, where there is one."""
    reference: str | None = None
    """Beginning of the right answer; no column counts without being named."""


Turns: TypeAlias = tuple[tuple[str, str], ...]
"""Turns of a conversation before its last one: role (system, user or assistant) and text of each."""
Row: TypeAlias = tuple[str, str | None, str | None, Turns]
"""Query, category, reference, and the turns before the query."""


class PromptFile(NamedTuple):
    """What was read of a prompt file."""

    rows: list[Row]
    """At least one; equal ones too."""
    dropped: int
    """Rows without a query."""
    sha256: str
    """Of the file's bytes (hexadecimal)."""
    columns: dict[str, str]
    """Which column is the ``query``, the ``context``, the ``category`` and the ``reference``; empty for texts alone."""
    note: str | None
    """The same in a sentence, with the columns that were not read."""


Cells: TypeAlias = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its cells by column; a text alone is the column ``""``."""


class Benchmark(NamedTuple):
    """Where the authors publish a benchmark, and what we found there."""

    url: str
    filename: str
    """Name in the cache; its suffix gives the format."""
    n_rows: int
    """Prompts it had, of the rows that are kept."""
    sha256: str | None = None
    """Fingerprint of the published file; None where we have not seen the file, which is then not verified."""
    columns: Columns = Columns()
    """Its columns, where their names are its own."""
    only: Mapping[str, Sequence[str]] = MappingProxyType({})
    """Rows that are kept: values of a column. The others are another set, or not for us."""


def _benchmarks(table: Mapping[str, dict[str, Any]]) -> dict[str, Benchmark]:
    found = {}
    for name, entry in table.items():
        for variant, own in entry.pop("variants", {"": {}}).items():
            row = entry | own
            columns = Columns(**{part: row.pop(part) for part in ("query", "context", "category") if part in row})
            found[f"{name}_{variant}".rstrip("_")] = Benchmark(**row, columns=columns)
    return found


KNOWN_BENCHMARKS = _benchmarks(read_toml(Path(__file__).parents[1] / "data/benchmarks.toml"))
"""Benchmarks by the names that ``--prompts`` takes (App. B.1)."""


def read_rows(path: Path, wanted: Columns = Columns(), only: Mapping[str, Sequence[str]] | None = None) -> PromptFile:
    """Read a prompt file; its suffix gives the format (none means TXT). An InputError says why it cannot be read.

    One column holds the queries of a whole file, and no row loses a part of its prompt in silence. ``only`` keeps rows
    with one of the values in each of its columns, for known benchmarks; of their lists of turns the first is read.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{path}: prompt files end in .csv, .tsv, .jsonl, .json or .txt")
    content = read_whole(path)
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
    for beginning, what in _NO_FILE.items():
        if text[:99].strip().lower().startswith(beginning):
            raise InputError(f"{path} is {what}")
    table = list(_READERS[suffix](text, str(path)))
    names = list(dict.fromkeys(name for _, cells in table for name in cells))
    if absent := [name for name in only or () if name not in names]:
        raise InputError(f"{path}: no column {absent[0]!r}, by which its rows are chosen")
    table = [
        (at, cells) for at, cells in table if all(cells.get(name) in among for name, among in (only or {}).items())
    ]
    columns = _columns(names, wanted, str(path))
    _refuse_lost_parts(table, columns)
    rows: list[Row] = []
    queries: list[str] = []
    asked: list[Mapping[str, Any]] = []
    for where, cells in table:
        query, earlier = _query(cells, columns["query"], where, only is not None) if cells else ("", ())
        if query.strip():
            others = {part: name for part, name in columns.items() if part != "query"}
            parts = {part: _text(cells, name, where, may_lack=part) for part, name in others.items()}
            whole = f"{parts['context']}{CONTEXT_JOINT}{query}" if parts.get("context", "").strip() else query
            category, reference = (parts.get(part, "").strip() and parts[part] for part in ("category", "reference"))
            rows.append((whole, category or None, reference or None, earlier))
            queries.append(query)
            asked.append(cells)
    if not rows:
        raise InputError(f"{path} holds no prompts: no row has a query")
    if names != [""] and all(_NUMBER_OR_ID.fullmatch(query.strip()) for query in queries):
        raise InputError(f"{path}: the column {columns['query']!r} holds numbers or names of rows, no prompts")
    columns = (
        {} if names == [""] else {part: name for part, name in columns.items() if any(each.get(name) for each in asked)}
    )
    note = _note(rows, asked, names, columns) if columns else None
    return PromptFile(rows, len(table) - len(rows), hashlib.sha256(content).hexdigest(), columns, note)


def listed(names: Iterable[str]) -> str:
    """Names of columns in one line: a file may give them line breaks, and thousands of long ones."""
    shown = [shorten(" ".join(name.split()) or "(no name)", 60) for name in names]
    more = f" and {len(shown) - _NAMES_SHOWN} more" if len(shown) > _NAMES_SHOWN else ""
    return unicode_text(", ".join(shown[:_NAMES_SHOWN]) + more)


def _columns(names: Sequence[str], wanted: Columns, path: str) -> dict[str, str]:
    shown = listed(names)

    def named(name: str) -> str:
        matching = [name] if name in names else [each for each in names if each.strip().lower() == name.strip().lower()]
        if not matching:
            raise InputError(f"{path}: no column {name!r}; the columns are {shown if names != [''] else 'text alone'}")
        if len(matching) > 1:
            raise InputError(f"{path}: several columns could be {name!r}: {listed(matching)}")
        return matching[0]

    by_key = {name.strip().lower(): name for name in reversed(names)}
    known = [key for key in QUERY_COLUMNS if key in by_key]
    if wanted.query is not None:
        found = {"query": named(wanted.query)}
    elif known:
        found = {"query": named(known[0])}
    elif len(names) == 1 and (names == [""] or _COLUMN_NAME.fullmatch(names[0])):
        found = {"query": names[0]}
    else:
        raise InputError(
            f"{path}: no column is named as a query's ({', '.join(QUERY_COLUMNS)}); name it, found are {shown}"
        )
    contexts = [name for name in names if re.sub(r"[_\s]", "", name.lower()) in CONTEXT_COLUMNS]
    contexts = [name for name in contexts if name != found["query"]]
    if wanted.context is not None:
        contexts = [] if wanted.context == NO_COLUMN else [named(wanted.context)]
    if len(contexts) > 1:
        raise InputError(f"{path}: several columns could be the context of the prompts: {listed(contexts)}; name it")
    found |= {"context": contexts[0]} if contexts else {}
    if wanted.category is not None or by_key.get("category", found["query"]) != found["query"]:
        found["category"] = named("category" if wanted.category is None else wanted.category)
    found |= {} if wanted.reference is None else {"reference": named(wanted.reference)}
    if twice := [name for name, count in Counter(found.values()).items() if count > 1]:
        raise InputError(f"{path}: the column {twice[0]!r} is named for two uses; each needs one of its own")
    return found


def _query(cells: Mapping[str, Any], name: str, where: str, first_turn: bool) -> tuple[str, Turns]:
    """The query of a row, and the turns before it; with ``first_turn``, the first of a list of the user's turns."""
    value = cells.get(name)
    if not isinstance(value, list) or not value:
        text = _text(cells, name, where)
        if _CONVERSATION.match(text):
            raise InputError(f"{where}: {name!r} holds a conversation as text, and has to be a list of messages")
        return text, ()
    if first_turn and all(isinstance(turn, str) for turn in value):
        return value[0], ()
    return last_turn(value, where)


def last_turn(messages: Sequence[Any], where: str) -> tuple[str, Turns]:
    """The last turn of a conversation, the user's, and the turns before it, as they stand."""
    turns: list[tuple[str, str]] = []
    for message in messages:
        role, text = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if role not in ("system", "user", "assistant") or not isinstance(text, str) or (role == "system" and turns):
            raise InputError(f"{where}: a message has a role (system, at first; user; assistant) and a text as content")
        if more := [name for name in message if name not in ("role", "content") and message[name] not in _NOTHING]:
            raise InputError(f"{where}: only role and content of a message are read, and one has {listed(more)} too")
        turns.append((role, text))
    if not turns or turns[-1][0] != "user":
        raise InputError(f"{where}: the last message must be the user's, which is the one that is answered")
    return turns[-1][1], tuple(turns[:-1])


def _text(cells: Mapping[str, Any], name: str, where: str, may_lack: str = "") -> str:
    """A cell's text; empty where it has none, which only a part beside the query ``may_lack``."""
    if name not in cells and not may_lack:
        raise InputError(
            f"{where}: no column {name!r}, which holds the prompts of other rows; one column holds them all"
        )
    text = cells.get(name)
    if text is not None and not isinstance(text, str):
        if may_lack == "category" or (may_lack and not isinstance(text, list | dict)):  # a number may be a category
            return str(text)
        raise InputError(f"{where}: the field {name!r} is not a string")
    return text or ""


def _refuse_lost_parts(table: Iterable[Cells], columns: Mapping[str, str]) -> None:
    """Refuse rows with a picture or a sound beside the query, which may end as such files' names, or with a system
    prompt in a column that nobody reads.
    """
    for where, cells in table:
        for name in (name for name in cells if name != columns["query"]):
            inner = [value for _, value in leaves(cells[name], f"{where}: {name}") if value not in _NOTHING]
            named = (value for value in inner if isinstance(value, str) and len(value.split()) <= _WORDS_OF_A_PATH)
            is_one, said = _PICTURE_COLUMN.fullmatch(name.strip().lower()) and inner, ""
            if is_one or any(_PICTURE.search(value.strip()) for value in named):
                said = "names a picture or a sound, which would be part of the prompt; only text is read"
            elif name not in columns.values() and _SYSTEM_COLUMN.fullmatch(name.strip().lower()) and inner:
                said = "holds a system prompt, which would be part of the prompt; --system or messages may give it"
            if said:
                raise InputError(f"{where}: the column {name!r} {said}. Where it is no part of it, take the column out")


def _note(
    rows: Sequence[Row], cells: Sequence[Mapping[str, Any]], names: Sequence[str], columns: Mapping[str, str]
) -> str:
    said = f"prompts are the column {columns['query']!r}"
    more = {"context": "the context before them", "category": "categories", "reference": "right answers"}
    said += "".join(f", {what} {columns[part]!r}" for part, what in more.items() if part in columns)
    unread = [name for name in names if name and name not in columns.values()]
    left = set(unread)
    if unread:
        said += f"; not read: {listed(unread)}"
    first: dict[str, Mapping[str, Any]] = {}
    for (query, *_), row in zip(rows, cells, strict=True):
        before = first.setdefault(query, row)
        # Only names in these rows: a file may give each row one of its own.
        named = dict.fromkeys((*before, *row)) if before is not row else ()
        if differing := [name for name in named if name in left and before.get(name) != row.get(name)]:
            said += (
                f". Rows with the same prompt differ in {listed(differing)}: if one of these belongs "
                "to the prompt, give it by --context-column"
            )
            break
    return said


def _lines(text: str) -> list[str]:
    # Not str.splitlines, which also breaks at characters that a query may contain; a file's last newline begins no row.
    return re.split(r"\r\n|\n|\r", re.sub(r"(\r\n|\n|\r)\Z", "", text))


def _read_csv(text: str, path: str, delimiter: str = ",") -> Iterator[Cells]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    longest = csv.field_size_limit(len(text) + 1)
    try:
        names = next(([cell.strip() for cell in cells] for cells in reader if any(cell.strip() for cell in cells)), [])
        if repeated := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
            raise InputError(f"{path}: two columns are named {repeated[0]!r}")
        if len(names) == 1 and re.search("[;|\t]", names[0]):
            raise InputError(
                f"{path}: no commas part its columns; a file with tabs ends in .tsv, semicolons and bars are not read"
            )
        for cells in reader:
            # Cutting the rest off would leave half of a query that has commas and no quotes.
            if any(cells[len(names) :]):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(names)}; "
                    "a query with a comma must stand in double quotes"
                )
            yield path, dict(zip(names, [*cells, *[""] * len(names)], strict=False)) if any(cells) else {}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(longest)


def _read_json(text: str, path: str) -> Iterator[Cells]:
    if not text.lstrip().startswith("["):
        return _read_jsonl(text, path)  # some files of JSON lines end in .json
    return (_cells(entry, f"{path}, entry {number}") for number, entry in enumerate(_parsed(text, path), start=1))


def _read_jsonl(text: str, path: str) -> Iterator[Cells]:
    for number, line in enumerate(_lines(text), start=1):
        where = f"{path}, line {number}"
        yield _cells(_parsed(line, where), where) if line.strip() else (where, {})


def _read_txt(text: str, path: str) -> Iterator[Cells]:
    lines = list(map(str.strip, _lines(text)))
    filled = [line for line in lines if line]
    if all(re.fullmatch(r'\{\s*".*\}', line) for line in filled):
        raise InputError(f"{path} has lines of JSON; such a file ends in .jsonl")
    table = csv.reader((line[:1000] for line in filled[:2]), delimiter="\t" if "\t" in filled[0] else ",")
    first, *second = ([cell.strip().lower() for cell in cells] for cells in table)
    named = len(first) > 1 and not {*first}.isdisjoint(QUERY_COLUMNS) and all(map(_COLUMN_NAME.fullmatch, first))
    if named and any(len(cells) == len(first) for cells in second):
        raise InputError(f"{path} begins with names of columns; such a file ends in .csv or .tsv")
    return ((path, {"": line} if line else {}) for line in lines)


def _parsed(text: str, where: str) -> Any:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name stands in an object twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({first_line(error)})") from error


def _cells(value: Any, where: str) -> Cells:
    cells = {"": value} if isinstance(value, str) else value
    if not isinstance(cells, dict) or not cells:
        raise InputError(f"{where}: neither an object with a query nor a string")
    return where, cells


_READERS: dict[str, Callable[[str, str], Iterator[Cells]]] = {
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".json": _read_json,
    **dict.fromkeys((".jsonl", ".ndjson"), _read_jsonl),
    **dict.fromkeys((".txt", ""), _read_txt),
}


def cache_directory() -> Path:
    """The folder of downloads: ``SAFETYHEADS_CACHE`` where that is not blank, else the user's cache directory."""
    import platformdirs

    told = os.environ.get("SAFETYHEADS_CACHE", "")
    return Path(told if told.strip() else platformdirs.user_cache_dir("safetyheads"))


def download(name: str, wanted: Columns = Columns()) -> tuple[PromptFile, str | None]:
    """A known benchmark, with a sentence on how it differs from what its authors published when we looked, if it does.

    It is downloaded once, under a temporary name that is renamed when complete. An InputError tells that there is no
    network, or that the server sent something else.
    """
    import logging

    import pooch

    benchmark, directory = KNOWN_BENCHMARKS[name], cache_directory()
    pooch.get_logger().setLevel(logging.WARNING)  # It prints each checksum; the manifest holds ours.
    by_hand = f"download {benchmark.url} by hand and pass {name}=FILE"
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
        return read_benchmark(name, path, wanted)
    except InputError as error:
        if wanted == Columns():
            path.unlink(missing_ok=True)  # It is a login page or the like.
        raise InputError(f"what came for {name} is no prompt file; {by_hand} ({error})") from error


def read_benchmark(name: str, path: Path, wanted: Columns = Columns()) -> tuple[PromptFile, str | None]:
    """A file as that of a known benchmark, with a sentence on how it differs from the one that we looked at."""
    benchmark = KNOWN_BENCHMARKS[name]
    own = {part: column for part, column in asdict(wanted).items() if column is not None}
    columns = replace(benchmark.columns, **own)
    file = read_rows(path, columns, benchmark.only)
    rows, sha256, differences = file.rows, file.sha256, list[str]()
    if benchmark.sha256 is None:
        differences.append(f"{name} is read by its documentation; its reader was not checked on the original file")
    if len(rows) != benchmark.n_rows:
        differences.append(f"{len(rows)} prompts where {benchmark.n_rows} were expected")
    if benchmark.sha256 and sha256 != benchmark.sha256:
        differences.append(f"SHA-256 {sha256[:12]}... where {benchmark.sha256[:12]}... was expected")
    return file, "; ".join(differences) or None

"""Writes files that are whole or absent, and JSON whose bytes depend on its value alone."""

import errno
import json
import math
import os
import re
import socket
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

import psutil

from safetyheads.errors import InputError, SafetyheadsError, first_line, shorten

PARTIAL = ".partial"
"""End of the name of a file that is still being written; the name begins with a dot."""

MOST_BYTES = 1 << 28
"""Largest file of prompts or settings, or of a checkpoint beside its weights, that is read."""
_MOST_TEXT = 1 << 30
# Levels of nesting that nothing sensible has, and that no library which takes the value apart fails on.
_MOST_LEVELS = 100
MENDABLE_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP),
        *(errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG),
    }
)
"""Errors that the user can mend, by more room or another output directory."""


def write_atomically(path: Path, content: bytes, replaces: bool = True) -> None:
    """Write a file that is, at every moment and after a power cut, whole or absent.

    Unless it ``replaces`` it, a file that is there stays: of processes that write at once, the first one wins.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}")
    with as_input_error(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replaces:
                os.replace(partial, path)
            else:
                try:
                    os.link(partial, path)
                except FileExistsError:
                    pass
                except OSError:  # a drive without hard links: two that write at once may both think they were first
                    if not os.path.lexists(path):
                        os.replace(partial, path)
                partial.unlink(missing_ok=True)
            if hasattr(os, "O_DIRECTORY"):  # a rename lasts through a power cut once its folder is synced
                descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_page(path: Path, page: str) -> None:
    """Write a page atomically, after what killed processes left half-written of it is gone."""
    with as_input_error(path):
        remove_partial_files(path.parent, f".{escape(path.name)}")
    write_atomically(path, page.encode("utf-8", "backslashreplace"))


def remove_partial_files(folder: Path, names: str = "**/.*") -> None:
    """Remove files that processes of this machine left half-written when they were killed."""
    for path in folder.glob(f"{names}.{socket.gethostname()}.*{PARTIAL}"):
        number = path.name.removesuffix(PARTIAL).rpartition(".")[2]
        if not number.isdigit() or int(number) == os.getpid() or not psutil.pid_exists(int(number)):
            path.unlink(missing_ok=True)


@contextmanager
def as_input_error(path: Path, action: str = "written") -> Iterator[None]:
    """Turn an error of the operating system into one line: an InputError where the user can mend it."""
    try:
        yield
    except OSError as error:
        reason = f"{path} cannot be {action}: {error.strerror or error}"
        if error.errno in MENDABLE_ERRORS:
            raise InputError(reason) from error
        raise SafetyheadsError(reason) from error


def canonical_json(value: Any) -> str:
    """One line of ASCII, keys sorted, no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def readable_json(name: str, value: Mapping[str, Any]) -> str:
    """Indented, keys sorted; floats are Python's shortest exact form, so they read back the same."""
    try:
        return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"
    except ValueError:
        bad = [key for key, leaf in leaves(value) if isinstance(leaf, float) and not math.isfinite(leaf)]
        if not bad:
            raise
        raise ValueError(f"{name}: {bad[0]} is not a finite number") from None


def read_regular(path: Path, follows_links: bool = True, most: int | None = _MOST_TEXT) -> bytes:
    """The content of a file; devices and pipes, which may never end, are refused, and what has more bytes than most."""
    try:
        with as_input_error(path, "read"):
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if follows_links else getattr(os, "O_NOFOLLOW", 0))
            descriptor = os.open(path, flags)
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                os.close(descriptor)
                raise InputError(f"{path} cannot be read: it is no file, but a directory, a pipe or a device")
            with open(descriptor, "rb") as file:
                # As much memory as is asked for is taken. A file of the system's own has no size, and may be endless.
                size = -1 if most is None else (found.st_size or most) + 1
                content = file.read(size if most is None or found.st_size <= most else 0)
    except ValueError as error:  # a name that no path can have
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} cannot be a path: {error}") from None
    if most is not None and max(found.st_size, len(content)) > most:
        raise InputError(f"{path} is larger than {most >> 20} MiB")
    return content


def read_whole(path: Path) -> bytes:
    """The content of a file of prompts or settings, of a size that a person may have meant."""
    return read_regular(path, most=MOST_BYTES)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file."""
    content = read_whole(path)
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {first_line(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_json(read_whole(path), path)


def parse_json(text: str | bytes, name: object) -> dict[str, Any]:
    """The JSON object in a text, which errors call by its ``name``."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"{name}: {_deepest_field(text)} is nested too deep") from None
    except ValueError as error:
        raise InputError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{name} does not hold a JSON object")
    return value


def _deepest_field(text: str | bytes) -> str:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    depth, deepest, last, field, found = 0, 0, "", "", ""
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}:]', text):
        if token == ":" and depth == 1:
            field = last
        depth += (token in "[{") - (token in "]}")
        if depth > deepest:
            deepest, found = depth, field
        last = token
    return found.strip('"')


def leaves(value: Any, name: str = "", room: int = _MOST_LEVELS) -> Iterator[tuple[str, Any]]:
    """Each value that is no container (or an empty one), with its dotted name; an InputError for deep nesting."""
    if not isinstance(value, Mapping | list | tuple) or not value:
        yield name, value
        return
    if not room:
        raise InputError(f"{shorten(name, 300)} is nested too deep")
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from leaves(inner, f"{name}.{key}" if name else str(key), room - 1)

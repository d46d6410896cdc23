"""The run directory: what a run writes, where, and how it survives a kill.

Owns file names, content keys, atomic writes, the lock, and what may differ between two starts of one run.
Knows no model, no measure and nothing of what the numbers mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from safetyheads.errors import InputError
from safetyheads.files import (
    PARTIAL,
    canonical_json,
    leaves,
    read_json,
    readable_json,
    remove_partial_files,
    told_to_user,
    write_atomically,
)

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

SCHEMA_VERSION = 1
"""Version of the layout of a run directory; another version is refused, not guessed at."""

RESULTS_VERSION = 1
"""Version of the schema of ``results.json``, whatever kind of run wrote it."""

KEY_DIGITS = 24
"""Hexadecimal digits of a content key: 96 bits, so two of a million shards collide once in 10^17 runs."""

_LOCK = ".lock"
_GITIGNORE = b"*\n"
_STAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OWN_FIELDS = ("schema_version", "config", "provenance")
_DIFFERENCES_SHOWN = 6

_log = logging.getLogger(__name__)


def content_key(fields: Mapping[str, Any]) -> str:
    """The name of what ``fields`` determine: equal fields, in any order, give equal keys."""
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:KEY_DIGITS]


class RunDirectory:
    """One run's directory: ``start`` one to write, ``open`` a finished one to read.

    ``manifest.json`` tells what the numbers depend on, ``shards/`` and ``completions/`` hold what was
    computed so far, ``results.json`` is written last, and ``timings.json`` is all that tells time.
    """

    def __init__(self, path: Path, lock: FileLock | None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def start(
        cls, path: str | os.PathLike[str], config: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> RunDirectory:
        """Create the run's directory, or go on with the run of the same ``config`` that is there.

        Args:
            path: The directory; absent, empty, or a run of the same config.
            config: All that the numbers depend on.
            provenance: Versions, command, date, machine: may differ, so each start adds its own.

        Raises:
            InputError: another run or someone's files are there, it is in use, or it cannot be written.
        """
        folder = Path(path)
        _refuse_strangers(folder)
        created = not folder.exists()
        with told_to_user(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _locked(folder)
        try:
            with told_to_user(folder):
                folder.chmod(0o700)
                remove_partial_files(folder)
            run = cls(folder, lock)
            write_atomically(folder / ".gitignore", _GITIGNORE)
            run._enter_start(config, provenance)
        except BaseException:
            lock.release()
            if created and not (folder / "manifest.json").exists():
                _remove_own_folder(folder)
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """A finished run, to be read; only its report can be written."""
        folder = Path(path)
        run = cls(folder, None)
        with told_to_user(folder, "read"):
            if not (folder / "manifest.json").is_file():
                raise InputError(f"{folder} is not a run directory: it has no manifest.json")
            run.read_manifest()
            if not (folder / "results.json").is_file():
                raise InputError(f"{folder}: this run has not finished; start it again with the same command")
        return run

    def close(self) -> None:
        """Let other processes have the run; what was written stays."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The manifest.

    def read_manifest(self) -> dict[str, Any]:
        """``schema_version``, ``config``, ``provenance`` (one entry a start) and what was remembered."""
        manifest = read_json(self.path / "manifest.json")
        version = manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{self.path} was written by another version of safetyheads: "
                f"its schema is {version}, this one reads {SCHEMA_VERSION}"
            )
        return manifest

    def remember(self, name: str, value: Any) -> Any:
        """The value under ``name``: given, the first time; ever after as it was stored then.

        The plan of a run's batches goes here: another plan would move results in their last bits.
        """
        if name in _OWN_FIELDS:
            raise ValueError(f"{name} is a field of the manifest's own")
        manifest = self.read_manifest()
        if name not in manifest:
            manifest[name] = value
            self._write_json("manifest.json", manifest)
            manifest = self.read_manifest()
        return manifest[name]

    def _enter_start(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Write the manifest, or hold the one that is there against ``config``."""
        given = json.loads(canonical_json(config))
        if (self.path / "manifest.json").exists():
            manifest = self.read_manifest()
            differences = _differences(manifest["config"], given)
            if differences:
                raise InputError(_another_run(self.path, differences))
        else:
            manifest = {"schema_version": SCHEMA_VERSION, "config": given, "provenance": []}
        manifest["provenance"].append(provenance)
        self._write_json("manifest.json", manifest)

    # What was computed so far.

    def tensors(
        self, stage: str, fields: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors that ``fields`` determine: read if they are there, else computed and kept.

        Args:
            stage: The folder of the shard.
            fields: All that these tensors depend on, beside the run's config.
            compute: Called only if the shard is absent or broken.

        Returns:
            What reading the shard again would give: contiguous, on the CPU.
        """
        import safetensors.torch
        from safetensors import SafetensorError

        path = self.path / "shards" / _stage(stage) / f"{content_key(fields)}.safetensors"
        if path.is_file():
            try:
                return safetensors.torch.load(path.read_bytes())
            except SafetensorError as error:
                self._discard(path, str(error))
        # Cloned: safetensors refuses views that share memory, and views cost nothing to write apart.
        tensors = {name: _plain(tensor) for name, tensor in compute().items()}
        # One metadata entry only: with two, their order (so the bytes) would differ from run to run.
        content = safetensors.torch.save(tensors, metadata={"fields": canonical_json(fields)})
        self._write(path, content)
        return safetensors.torch.load(content)

    def rows(
        self, stage: str, fields: Mapping[str, Any], compute: Callable[[], list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The rows that ``fields`` determine, as :meth:`tensors`; one line of JSON each."""
        path = self.path / "completions" / f"{_stage(stage)}-{content_key(fields)}.jsonl"
        if path.is_file():
            try:
                return _parse_rows(path.read_text(encoding="utf-8"))
            except ValueError as error:
                self._discard(path, str(error))
        # A run of no rows is a blank line: an empty file would look like a broken one.
        text = "".join(canonical_json(row) + "\n" for row in compute()) or "\n"
        self._write(path, text.encode())
        return _parse_rows(text)

    def completions(self, stage: str = "*") -> Iterator[dict[str, Any]]:
        """Every stored row, of a stage or stage by stage, in the order of the file names."""
        for path in sorted((self.path / "completions").glob(f"{stage}-*.jsonl")):
            try:
                yield from _parse_rows(path.read_text(encoding="utf-8"))
            except ValueError as error:
                _log.warning("%s is broken and left out: %s", path, error)

    def _discard(self, path: Path, reason: str) -> None:
        _log.warning("%s is broken and computed again: %s", path, reason)
        self._require_lock()
        path.unlink()

    # What it comes to.

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``: equal results give equal bytes, so no dates or times belong in it."""
        self._write_json("results.json", results)

    def read_results(self) -> dict[str, Any]:
        """What :meth:`write_results` wrote."""
        return read_json(self.path / "results.json")

    def write_timings(self, timings: Mapping[str, Any]) -> None:
        """Write ``timings.json``: seconds, dates and rates, kept apart from the results."""
        self._write_json("timings.json", timings)

    def write_report(self, html: str, pages: Mapping[str, str] | None = None) -> Path:
        """Write ``report/index.html``, after the pages it links to by name; an opened finished run takes one too."""
        path = self.path / "report" / "index.html"
        for name, page in (pages or {}).items():
            write_atomically(path.with_name(name), page.encode())
        write_atomically(path, html.encode())
        return path

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self._write(self.path / name, readable_json(name, value).encode())

    def _write(self, path: Path, content: bytes) -> None:
        self._require_lock()
        write_atomically(path, content)

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path} is closed or was opened to be read")


def _parse_rows(text: str) -> list[dict[str, Any]]:
    if not text.endswith("\n"):
        raise ValueError("its last line is cut off")
    return [json.loads(line) for line in text.splitlines() if line]


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Each field in which two configs differ, as ``name (old -> new)``."""
    old, new = dict(leaves(stored)), dict(leaves(given))
    return [
        f"{name} ({_shown(old, name)} -> {_shown(new, name)})"
        for name in sorted(old.keys() | new.keys())
        if _shown(old, name, None) != _shown(new, name, None)
    ]


def _shown(fields: Mapping[str, Any], name: str, width: int | None = 40) -> str:
    if name not in fields:
        return "absent"
    text = canonical_json(fields[name])
    return text if width is None or len(text) <= width else text[: width - 3] + "..."


def _another_run(folder: Path, differences: list[str]) -> str:
    shown = ", ".join(differences[:_DIFFERENCES_SHOWN])
    more = len(differences) - _DIFFERENCES_SHOWN
    return (
        f"{folder} holds a run with another config: {shown}{f', and {more} more' if more > 0 else ''}; "
        "give another output directory"
    )


def _stage(name: str) -> str:
    if _STAGE.fullmatch(name) is None:
        raise ValueError(f"stage {name!r} is no file name")
    return name


def _plain(tensor: Tensor) -> Tensor:
    import torch

    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _refuse_strangers(folder: Path) -> None:
    """Raise unless the folder is absent, empty, a run, or what a start killed at its birth left."""
    with told_to_user(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; a run needs a directory")
        if not folder.is_dir() or (folder / "manifest.json").exists():
            return
        others = [entry.name for entry in folder.iterdir() if not _is_own(entry)]
    if others:
        raise InputError(f"{folder} is not empty and holds no run (it has {min(others)}); give another one")


def _is_own(path: Path) -> bool:
    if path.name == ".gitignore":
        return path.read_bytes() == _GITIGNORE  # not the user's, kept to have an empty folder in git
    return path.name == _LOCK or (path.name.startswith(".") and path.name.endswith(PARTIAL))


def _locked(folder: Path) -> FileLock:
    """The lock of the folder, taken; it ends with the process, however that ends."""
    # Not thread-local: the thread that closes a run need not be the one that started it.
    lock = FileLock(folder / _LOCK, mode=0o600, thread_local=False)
    with told_to_user(folder):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{folder} is in use by another process") from None
    return lock


def _remove_own_folder(folder: Path) -> None:
    """Undo the making of a folder in which no run could be started."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _is_own(path):
                path.unlink()
        folder.rmdir()

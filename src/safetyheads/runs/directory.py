"""Reads and writes the directory of a run, so that a run survives a kill and starts again where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from filelock import FileLock, Timeout

from safetyheads.errors import IncompleteError, InputError
from safetyheads.files import (
    PARTIAL,
    as_input_error,
    canonical_json,
    leaves,
    read_json,
    readable_json,
    remove_partial_files,
    shorten,
    write_atomically,
)

if TYPE_CHECKING:
    from torch import Tensor

Record: TypeAlias = dict[str, Any]
"""A stored line of JSON."""
_Stored = TypeVar("_Stored")

SCHEMA_VERSION = 3
"""Version of the layout of a run directory, of its records and of ``results.json``; another version is refused."""

_LOCK = ".lock"
_GITIGNORE = b"*\n"
_DIFFERENCES_SHOWN = 6

_log = logging.getLogger(__name__)


def content_key(fields: Mapping[str, Any]) -> str:
    """The name of what ``fields`` determine: equal fields, in any order, give equal keys."""
    # 24 digits are 96 bits: two of a million shards collide once in 10^17 runs.
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:24]


class RunDirectory:
    """One run's directory: ``start`` one to write, ``open`` a finished one to read.

    ``manifest.json`` holds what the numbers depend on; ``shards/`` and ``completions/`` hold what was computed so far.
    ``results.json`` is written last. Only ``timings.json`` holds times.
    """

    def __init__(self, path: Path, lock: FileLock | None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def start(
        cls, path: str | os.PathLike[str], config: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> RunDirectory:
        """Create the run's directory, or continue the run of the same ``config`` that is there.

        ``config`` is all that the numbers depend on. ``provenance`` may differ, so each start adds its own.

        Raises:
            InputError: another run or other files are there, it is in use, or it cannot be written.
        """
        folder = Path(path)
        _refuse_other_files(folder)
        created = not folder.exists()
        with as_input_error(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not thread-local: another thread may close the run. The lock ends with the process, however that ends.
        lock = FileLock(folder / _LOCK, mode=0o600, thread_local=False)
        with as_input_error(folder):
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise InputError(f"{folder} is in use by another process") from None
        try:
            with as_input_error(folder):
                folder.chmod(0o700)
                remove_partial_files(folder)
            run = cls(folder, lock)
            write_atomically(folder / ".gitignore", _GITIGNORE)
            run._record_start(config, provenance)
        except BaseException:
            lock.release()
            if created and not (folder / "manifest.json").exists():
                with suppress(OSError):
                    for file in filter(_is_ours, folder.iterdir()):
                        file.unlink()
                    folder.rmdir()
            raise
        return run

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """A finished run, to be read; only its report can be written."""
        folder, run = Path(path), cls(Path(path), None)
        with as_input_error(folder, "read"):
            if not (folder / "manifest.json").is_file():
                raise InputError(f"{folder} is not a run directory: it has no manifest.json")
            run.read_manifest()
            if not (folder / "results.json").is_file():
                raise IncompleteError(f"{folder}: this run has not finished; start it again with the same command")
        return run

    def close(self) -> None:
        """Release the run for other processes; what was written stays."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read_manifest(self) -> dict[str, Any]:
        """``schema_version``, ``config``, ``provenance`` (one entry a start) and what was remembered."""
        manifest = read_json(self.path / "manifest.json")
        version = manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            other = f"its schema is {version}, this one reads {SCHEMA_VERSION}"
            raise InputError(f"{self.path} was written by another version of safetyheads: {other}")
        return manifest

    def remember(self, name: str, value: Any) -> Any:
        """Store ``value`` under ``name`` the first time, and return the stored value every time.

        The plan of a run's batches is stored here: another plan would move results in their last bits.
        """
        manifest = self.read_manifest()
        if name not in manifest:
            manifest[name] = json.loads(canonical_json(value))
            self._write_json("manifest.json", manifest)
        return manifest[name]

    def _record_start(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Write the manifest, or compare the one that is there with ``config``."""
        given = json.loads(canonical_json(config))
        manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "config": given, "provenance": []}
        if (self.path / "manifest.json").exists():
            manifest = self.read_manifest()
            if differences := _differences(manifest["config"], given):
                shown, more = differences[:_DIFFERENCES_SHOWN], len(differences) - _DIFFERENCES_SHOWN
                raise InputError(
                    f"{self.path} holds a run with other settings: {', '.join(shown)}"
                    f"{f', and {more} more' if more > 0 else ''}; give another output directory"
                )
        manifest["provenance"].append(provenance)
        self._write_json("manifest.json", manifest)

    def tensors(
        self, stage: str, fields: Mapping[str, Any], compute: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors that ``fields`` and the run's config determine: read if stored, else computed and stored.

        Either way they are what reading gives: contiguous, on the CPU.
        """
        import safetensors.torch  # torch is not needed to read results
        import torch

        def parse(content: bytes) -> dict[str, Tensor]:
            try:
                return safetensors.torch.load(content)
            except safetensors.SafetensorError as error:
                raise ValueError(str(error)) from error

        def make() -> bytes:
            # Cloned, because safetensors refuses views that share memory.
            tensors = {
                name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
                for name, tensor in compute().items()
            }
            # One metadata entry only: the order of two, and so the bytes, would differ from run to run.
            return safetensors.torch.save(tensors, metadata={"fields": canonical_json(fields)})

        path = self.path / "shards" / _file_name(stage) / f"{content_key(fields)}.safetensors"
        return self._stored(path, parse, make)

    def records(
        self, stage: str, fields: Mapping[str, Any], compute: Callable[[], list[dict[str, Any]]]
    ) -> list[Record]:
        """The records that ``fields`` determine, as :meth:`tensors`; one line of JSON each."""
        path = self.path / "completions" / f"{_file_name(stage)}-{content_key(fields)}.jsonl"

        def make() -> bytes:
            # A file of no records is a blank line: an empty file would look like a broken one.
            return ("".join(canonical_json(record) + "\n" for record in compute()) or "\n").encode()

        return self._stored(path, _parse_records, make)

    def stored_records(self, stage: str = "*") -> Iterator[Record]:
        """Every stored record of a stage, or of all, in the order of the file names."""
        for path in sorted((self.path / "completions").glob(f"{stage}-*.jsonl")):
            try:
                yield from _parse_records(path.read_bytes())
            except ValueError as error:
                _log.warning("%s is broken and left out: %s", path, error)

    def _stored(self, path: Path, parse: Callable[[bytes], _Stored], make: Callable[[], bytes]) -> _Stored:
        """What a file holds; a file that is absent or broken is made first."""
        if path.is_file():
            try:
                return parse(path.read_bytes())
            except ValueError as error:
                _log.warning("%s is broken and computed again: %s", path, error)
                self._require_lock()
                path.unlink()
        content = make()
        self._require_lock()
        write_atomically(path, content)
        return parse(content)

    @property
    def n_stored(self) -> int:
        """Files of scores and answers that are stored."""
        return sum(1 for pattern in ("shards/*/*.safetensors", "completions/*.jsonl") for _ in self.path.glob(pattern))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``: equal results give equal bytes, so no dates or times belong in it."""
        self._write_json("results.json", results)

    def read_results(self) -> dict[str, Any]:
        """What :meth:`write_results` wrote."""
        return read_json(self.path / "results.json")

    def write_timings(self, timings: Mapping[str, Any]) -> None:
        """Write ``timings.json``: seconds, dates and rates, kept apart from the results."""
        self._write_json("timings.json", timings)

    def read_timings(self) -> dict[str, Any]:
        """What :meth:`write_timings` wrote; empty where the run has none."""
        path = self.path / "timings.json"
        return read_json(path) if path.is_file() else {}

    def write_report(self, html: str, pages: Mapping[str, str] | None = None) -> Path:
        """Write ``report/index.html`` after the pages it links to by name; an opened run takes one too."""
        path = self.path / "report" / "index.html"
        for name, page in (pages or {}).items():
            write_atomically(path.with_name(name), page.encode())
        write_atomically(path, html.encode())
        return path

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self._require_lock()
        write_atomically(self.path / name, readable_json(name, value).encode())

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path} is closed or was opened to be read")


def _parse_records(content: bytes) -> list[Record]:
    text = content.decode()
    if not text.endswith("\n"):
        raise ValueError("its last line is cut off")
    return [json.loads(line) for line in text.splitlines() if line]


def _differences(*configs: Mapping[str, Any]) -> list[str]:
    """Each setting in which two configs differ, in words, as ``name (old -> new)``; of fingerprints the name alone."""
    old, new = ({name: canonical_json(value) for name, value in leaves(config)} for config in configs)
    names = (name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    differences = []
    for name in sorted(names, key=lambda name: (name.count("."), name)):
        before, after = (shorten(values.get(name, "none")) for values in (old, new))
        words = re.sub(r"[_.]", " ", name.replace("_sha256", ""))
        differences.append(words if "_sha256" in name else f"{words} ({before} -> {after})")
    return list(dict.fromkeys(differences))


def _file_name(stage: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", stage) is None:
        raise ValueError(f"stage {stage!r} is no file name")
    return stage


def _refuse_other_files(folder: Path) -> None:
    """Raise unless the folder is absent, empty, a run, or what is left of a start that was killed at once."""
    with as_input_error(folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; a run needs a directory")
        if not folder.is_dir() or (folder / "manifest.json").exists():
            return
        others = [entry.name for entry in folder.iterdir() if not _is_ours(entry)]
    if others:
        raise InputError(f"{folder} is not empty and holds no run (it has {min(others)}); give another one")


def _is_ours(path: Path) -> bool:
    if path.name == ".gitignore":
        return path.read_bytes() == _GITIGNORE  # a user's .gitignore keeps an empty folder in git
    return path.name == _LOCK or (path.name.startswith(".") and path.name.endswith(PARTIAL))

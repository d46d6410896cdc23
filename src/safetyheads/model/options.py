"""Holds the settings of loading a model; imports nothing heavy, so the command line can read it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetyheads.errors import InputError

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""Precisions of the weights; ``auto`` keeps the checkpoint's own."""
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate lays a model out by itself."""


# No slots: configs of runs have these fields too, and classes with slots cannot be combined.
@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, and onto which devices."""

    PANEL: ClassVar[str] = "Model"
    """Title of these options on a help page."""
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

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; known are {', '.join(DTYPES)}")
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise InputError(f"--memory is a number of GiB above 0; got {self.memory}")
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

"""Other methods that undo refusals, for comparison: they name heads, prune or edit weights, or steer activations."""

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetyheads.baselines.base import Method
from safetyheads.files import read_toml


def _named(path: str) -> Any:
    module, _, name = path.partition(".")
    return getattr(import_module(f"{__package__}.{module}"), name)


def _method(name: str, learn: str, strengths: list[float], **entry: Any) -> Method:
    function, *given = map(_named, learn.split())
    return Method(name, tuple(map(float, strengths)), partial(function, *given), **entry)


_ENTRIES = read_toml(Path(__file__).with_name("methods.toml"))
METHODS: Mapping[str, Method] = MappingProxyType({name: _method(name, **entry) for name, entry in _ENTRIES.items()})
"""Name -> method, in the order of tables. A new one is an entry of methods.toml, which names its function."""

"""Every family that is proved, and some that are refused: a tiny random model of each, read from families.toml."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from oracle import Oracle
from tiny_models import COMMON, build, tokenizer

from safetyheads import Engine


@dataclass(frozen=True)
class Family:
    """A family that is proved."""

    config: str
    """transformers' config class."""
    shows: str
    """How it differs from a plain Llama."""
    settings: Mapping[str, Any]
    """Over :data:`tiny_models.COMMON`."""
    around: Mapping[str, Any] | None = None
    """Settings of a config that holds this one as its ``text_config``: a model of images too, asked in text alone."""
    norm: str = "model.norm"
    """Where its final norm is; for the oracle, which must not know the engine's facts."""
    chunks: Mapping[str, int] = field(default_factory=dict)
    """layer -> tokens of an attention chunk, where the attention function is not told; for the oracle."""
    given_up: tuple[str, ...] = ()
    """Quick paths that are not exact here; the proofs at load must find out."""
    because: str = ""
    """Why they are not."""
    without_heads: tuple[int, ...] = ()
    """Layers that mix tokens in another way than by attention."""


@dataclass(frozen=True)
class Refused:
    """A family that is refused by name."""

    config: str
    """transformers' config class."""
    why: str
    """For the table of families."""
    said: str
    """A pattern of the error."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Over :data:`tiny_models.COMMON`."""


def _read(kind: type, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a table, each with the settings that it shares with others."""
    made = {}
    for name, row in rows.items():
        settings = {}
        for shared in row.pop("shared", ()):
            settings |= _TABLES["shared"][shared]
        lists = {key: tuple(value) for key, value in row.items() if isinstance(value, list)}
        made[name] = kind(**{**row, **lists, "settings": {**settings, **row.get("settings", {})}})
    return made


_TABLES = tomllib.loads((Path(__file__).parent / "families.toml").read_text(encoding="utf-8"))
FAMILIES: dict[str, Family] = _read(Family, _TABLES["families"])
REFUSED: dict[str, Refused] = _read(Refused, _TABLES["refused"])


@cache
def built(name: str) -> Any:
    """A family's random model, under eager attention; copy it before it is changed."""
    family = FAMILIES.get(name) or REFUSED[name]
    config, settings = getattr(transformers, family.config), {**COMMON, **family.settings}
    around = getattr(family, "around", None)
    return build(config(**settings) if around is None else config(text_config=settings, **around))


@cache
def proved(name: str) -> Engine:
    """An engine on a family's model, proved; nothing about it may be changed."""
    engine = Engine(copy.deepcopy(built(name)), tokenizer(), name=name)
    engine.check()
    return engine


@cache
def oracle_of(name: str) -> Oracle:
    """The family's slow twin."""
    return Oracle(built(name), FAMILIES[name].norm, {int(layer): n for layer, n in FAMILIES[name].chunks.items()})

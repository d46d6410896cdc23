"""Every family that is proved, and some that are refused: a tiny random model of each, read from families.toml."""

import copy
import tomllib
from collections import ChainMap
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
    """A family that is proved, or refused by name."""

    config: str
    """transformers' config class."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Over :data:`tiny_models.COMMON`."""
    around: Mapping[str, Any] | None = None
    """Settings of a config that holds this one as its ``text_config``: a model of images too, asked in text alone."""
    shows: str = ""
    """How it differs from a plain Llama."""
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
    why: str = ""
    """Why it is refused, for the table of families."""
    said: str = ""
    """A pattern of the refusal."""


def _read(kind: str) -> dict[str, Family]:
    """The rows of a table, each with the settings that it shares with others."""
    made = {}
    for name, row in _TABLES[kind].items():
        tables = [*(_TABLES["shared"][shared] for shared in row.pop("shared", ())), row.get("settings", {})]
        row["settings"] = dict(ChainMap(*reversed(tables)))
        made[name] = Family(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})
    return made


_TABLES = tomllib.loads((Path(__file__).parent / "families.toml").read_text(encoding="utf-8"))
FAMILIES, REFUSED = _read("families"), _read("refused")


@cache
def built(name: str) -> Any:
    """A family's random model, under eager attention; copy it before it is changed."""
    family = FAMILIES.get(name) or REFUSED[name]
    config, settings = getattr(transformers, family.config), {**COMMON, **family.settings}
    return build(config(**settings) if family.around is None else config(text_config=settings, **family.around))


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

"""Names attention heads: how they are written, read and ordered."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from safetyheads.errors import InputError

_WRITTEN = re.compile(r"\s*(?:[lL](\d+)[hH](\d+)|(\d+)[-.](\d+))\s*")


@dataclass(frozen=True, slots=True, order=True)
class Head:
    """One query head. Ordered by layer, then index; prints as ``2-26``."""

    layer: int
    """Decoder layer, counted from 0."""
    index: int
    """Query head within the layer, counted from 0."""

    def __post_init__(self) -> None:
        if self.layer < 0 or self.index < 0:
            raise InputError(f"head {self.layer}-{self.index}: layer and index count from 0")

    def __str__(self) -> str:
        return f"{self.layer}-{self.index}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read ``2-26``, ``2.26`` or ``L2H26``: the layer first, in every form."""
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise InputError(f"head {text!r} is not of the form layer-head, such as 2-26 or L2H26")
        layer, index = (int(part) for part in match.groups() if part is not None)
        return cls(layer, index)


Group: TypeAlias = tuple[Head, ...]
"""Heads ablated together, in the order of their choice. The order does not change the ablation."""


def parse_heads(text: str) -> Group:
    """Read heads separated by commas; a blank text is the empty group.

    Raises:
        InputError: a malformed head, or one given twice.
    """
    return distinct(Head.parse(part) for part in text.split(",")) if text.strip() else ()


def distinct(heads: Iterable[Head]) -> Group:
    """The heads as a group; an InputError where one is given twice."""
    group = tuple(heads)
    if len(set(group)) < len(group):
        raise InputError(f"head {next(head for head in group if group.count(head) > 1)} is given twice")
    return group


def within(heads: Iterable[Head], n_layers: int, n_heads: int) -> Group:
    """The heads as a group of a model with ``n_layers`` x ``n_heads``.

    Raises:
        InputError: the model has no such head, or a head is given twice.
    """
    group = distinct(heads)
    for head in group:
        if head.layer >= n_layers or head.index >= n_heads:
            size = f"layers 0-{n_layers - 1} and heads 0-{n_heads - 1} in each"
            raise InputError(f"head {head} is out of range: the model has {size}")
    return group


def all_heads(n_layers: int, n_heads: int) -> Group:
    """Every head of a model, layer by layer."""
    return tuple(Head(layer, index) for layer in range(n_layers) for index in range(n_heads))


def common_heads(groups: Sequence[Group]) -> Group:
    """Heads that are in every one of several groups, sorted; none for a single group."""
    return tuple(sorted(set(groups[0]).intersection(*groups[1:]))) if len(groups) > 1 else ()


def format_heads(heads: Sequence[Head]) -> str:
    """Heads in the form that the command line reads: ``2-26,3-1``."""
    return ",".join(str(head) for head in heads)

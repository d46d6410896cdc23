"""Names attention heads: how they are written, read and ordered."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

from safetyheads.display import Shown
from safetyheads.errors import InputError, whole_number

_WRITTEN = re.compile(r"\s*(?:[lL](\d{1,9})[hH](\d{1,9})|(\d{1,9})[-.](\d{1,9}))\s*")


@dataclass(frozen=True, slots=True, order=True)
class Head(Shown):
    """One query head. Ordered by layer, then index; prints as ``2-26``."""

    layer: int
    """Decoder layer, counted from 0."""
    index: int
    """Query head within the layer, counted from 0."""

    def __post_init__(self) -> None:
        for number in (self.layer, self.index):
            whole_number(number, f"head {self.layer}-{self.index}: a layer or index")

    def __str__(self) -> str:
        return f"{self.layer}-{self.index}"

    @classmethod
    def parse(cls, text: str | Self | tuple[int, int]) -> Self:
        """Read ``2-26``, ``2.26`` or ``L2H26``: the layer first, in every form. Pairs of numbers are heads too."""
        if isinstance(text, Head):
            return text
        if isinstance(text, tuple) and [type(part) for part in text] == [int, int]:
            return cls(*text)
        match = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InputError(f"head {text!r} is not of the form layer-head, such as 2-26 or L2H26")
        layer, index = (int(part) for part in match.groups() if part is not None)
        return cls(layer, index)


Group: TypeAlias = tuple[Head, ...]
"""Heads ablated together, in the order of their choice. The order does not change the ablation."""
AnyHeads: TypeAlias = str | Head | Iterable[Head | str | tuple[int, int]]
"""What is taken for heads: ``2-26,3-1``, ``["2-26", "3-1"]``, ``[(2, 26)]``, a head or several."""


def parse_heads(heads: AnyHeads) -> Group:
    """Heads as a group, none of them twice; a text has commas between them, and a blank one is the empty group."""
    if isinstance(heads, str):
        heads = heads.split(",") if heads.strip() else ()
    elif isinstance(heads, Head):
        heads = (heads,)
    elif not isinstance(heads, Iterable):
        raise InputError(f"heads are written 2-26,3-1 or given as a list; got {heads!r}")
    group = tuple(map(Head.parse, heads))
    if len(set(group)) < len(group):
        raise InputError(f"head {next(head for head in group if group.count(head) > 1)} is given twice")
    return group


def parse_groups(groups: Iterable[AnyHeads]) -> list[Group]:
    """Each of several groups."""
    if isinstance(groups, str | Head) or not isinstance(groups, Iterable):
        raise InputError(f"give a list of groups, such as ['2-26,3-1']; got {groups!r}")
    return [parse_heads(group) for group in groups]


def within(heads: AnyHeads, n_layers: int, n_heads: int) -> Group:
    """The heads as a group of a model with ``n_layers`` x ``n_heads``; an InputError for one that it does not have."""
    group = parse_heads(heads)
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

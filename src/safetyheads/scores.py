"""Scores of heads as values: their order, their ties, and what scorers and searches return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from safetyheads.display import Chart, Shown, Table, chart
from safetyheads.errors import InputError, whole_number
from safetyheads.heads import Group, Head, format_heads, parse_groups, within

_SHOWN = 3


class GroupScorer(Protocol):
    """Anything that gives each group of heads a number; a larger number means a larger effect."""

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        """Scores [len(groups)], float64."""


@dataclass(frozen=True, slots=True, repr=False)
class FunctionScorer(Shown):
    """A scorer made of a function, with its name and unit."""

    score: Callable[[Sequence[Group]], Tensor] = field(repr=False)
    """Groups to scores [len(groups)], float64."""
    name: str
    """Its name in tables, such as ``mean_ships``."""
    unit: str
    """``nats`` or ``degrees``."""
    resolution: float = 0.0
    """Scores this close are ties: rounding and batch shapes alone can move them so far."""

    def __call__(self, groups: Sequence[Group]) -> Tensor:
        """Scores [len(groups)], float64; an InputError where a group is written in a way that heads are not."""
        parsed = parse_groups(groups)
        return self.score(parsed) if parsed else torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True, slots=True, repr=False)
class HeadScores(Table):
    """One number for each head, or for each prompt and head."""

    values: Tensor
    """float64 [n_layers, n_heads], or [n_prompts, n_layers, n_heads]; NaN where a head was not scored."""
    name: str = "score"
    unit: str = ""
    """``nats`` or ``degrees``."""
    resolution: float = 0.0
    """Scores this close are ties."""

    def __post_init__(self) -> None:
        shape = tuple(self.values.shape) if isinstance(self.values, Tensor) else type(self.values).__name__
        if isinstance(shape, str) or len(shape) not in (2, 3):
            raise InputError(f"head scores are a tensor [layers, heads] or [prompts, layers, heads]; got {shape}")

    def _facts(self) -> dict[str, object]:
        shape = " x ".join(map(str, self.values.shape))
        best = ", ".join(f"{head} {value:.3g}" for head, value in self.ranked()[:_SHOWN])
        return {"name": self.name, "shape": shape, "best": f"{best} {self.unit}".rstrip()}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each scored head; prompts are numbered where there are several."""
        places = (self.values == self.values).nonzero().tolist()
        columns = ("prompt", "layer", "head", self.name)[-1 - self.values.ndim :]
        return [dict(zip(columns, (*place, float(self.values[tuple(place)])), strict=True)) for place in places]

    def plot(self) -> Chart:
        """A map of the heads, averaged over the prompts: layers down, heads across."""
        return chart("map", self.mean().to_rows(), "head", "layer", self.name)

    def __getitem__(self, head: Head | str) -> float:
        """The head's score, averaged over the prompts where there are several."""
        (head,) = within((Head.parse(head),), *self.values.shape[-2:])
        return float(self.mean().values[head.layer, head.index])

    def mean(self) -> "HeadScores":
        """Averaged over the prompts; itself where there is one table."""
        if self.values.ndim == 2:
            return self
        return HeadScores(self.values.mean(dim=0), self.name, self.unit, self.resolution)

    def ranked(self) -> tuple[tuple[Head, float], ...]:
        """All scored heads with their scores, best first; equal scores are ordered by layer, then index."""
        table = self.mean().values.tolist()
        scored = [
            (Head(layer, index), float(value))
            for layer, row in enumerate(table)
            for index, value in enumerate(row)
            if value == value
        ]
        return tuple(sorted(scored, key=lambda item: (-item[1], item[0])))

    def as_lists(self) -> list[Any]:
        """The values as JSON: None where a head was not scored or does not exist."""
        return np.where(
            self.values.isnan().cpu().numpy(), np.array(None), np.array(self.values.tolist(), object)
        ).tolist()

    def top(self, k: int) -> Group:
        """The k best heads, best first."""
        return tuple(head for head, _ in self.ranked()[: whole_number(k, "the number of best heads")])

    def top_of_prompt(self, prompt: int, k: int) -> Group:
        """The k best heads of one prompt, best first (the paper's query level)."""
        if self.values.ndim != 3:
            raise InputError("these scores are not per prompt")
        if whole_number(prompt, "a prompt's position") >= len(self.values):
            raise InputError(f"prompt {prompt} is out of range: there are {len(self.values)}")
        return HeadScores(self.values[prompt], self.name, self.unit, self.resolution).top(k)

    def ties(self) -> tuple[Group, ...]:
        """Heads whose neighbours in the ranking differ by no more than the resolution, in runs, best first."""
        runs: list[list[tuple[Head, float]]] = []
        for head, score in self.ranked():
            if runs and runs[-1][-1][1] - score <= self.resolution:
                runs[-1].append((head, score))
            else:
                runs.append([(head, score)])
        return tuple(tuple(head for head, _ in run) for run in runs if len(run) > 1)


@dataclass(frozen=True, slots=True, repr=False)
class SearchTrace(Table):
    """What a greedy search chose, and the scores of each step."""

    group: Group
    """Chosen heads, in order."""
    steps: tuple[HeadScores, ...]
    """Scores [n_layers, n_heads] of the group so far with each candidate added; NaN for heads already chosen."""

    def _facts(self) -> dict[str, object]:
        return {"group": format_heads(self.group), "scores": ", ".join(f"{score:.3g}" for score in self.scores)}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each step."""
        steps = zip(self.group, self.scores, self.ties(), strict=True)
        return [{"head": str(head), "score": score, "ties": format_heads(ties)} for head, score, ties in steps]

    @property
    def scores(self) -> tuple[float, ...]:
        """The chosen head's score in each step."""
        return tuple(step[head] for head, step in zip(self.group, self.steps, strict=True))

    def ties(self) -> tuple[Group, ...]:
        """For each step, the heads that tied with the chosen one."""
        ties = []
        for head, step in zip(self.group, self.steps, strict=True):
            near = (other for other, score in step.ranked() if abs(step[head] - score) <= step.resolution)
            ties.append(tuple(other for other in near if other != head))
        return tuple(ties)


def table_of(heads: Sequence[Head], scores: Tensor, like: object = None) -> HeadScores:
    """The heads' scores [len(heads)] as the smallest table that holds them, named as the scorer ``like``."""
    n_layers, n_heads = (max(getattr(head, part) for head in heads) + 1 for part in ("layer", "index"))
    values = torch.full((n_layers, n_heads), float("nan"), dtype=torch.float64)
    for head, score in zip(heads, scores.tolist(), strict=True):
        values[head.layer, head.index] = score
    return HeadScores(
        values, getattr(like, "name", "score"), getattr(like, "unit", ""), float(getattr(like, "resolution", 0.0))
    )

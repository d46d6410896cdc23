"""Prompts and sets of prompts, with their fingerprint and their split into halves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TypeAlias, overload

from safetyheads.errors import InputError
from safetyheads.prompts.files import KNOWN_BENCHMARKS, download, read_rows
from safetyheads.prompts.templates import Template

AnyTemplate: TypeAlias = str | Template | None
"""A template, its name or a text with ``{query}``; None means the model's default (``Engine.default_template``)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request."""

    query: str
    """The request itself, without template."""
    category: str | None = None
    """The benchmark's category, where it has one."""
    reference: str | None = None
    """Beginning of the right answer, where it is known (the demo)."""

    def __post_init__(self) -> None:
        if not self.query.strip():
            raise InputError("a prompt is blank")
        try:
            self.query.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a prompt is not Unicode text: {error.reason} at {error.start}") from error


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in order, with the template that writes them for a model. Equal prompts are kept, as given."""

    prompts: tuple[Prompt, ...]
    """At least one."""
    template: Template | None = None
    """None means the model's default."""
    name: str = "prompts"
    """A known name, or the file's name without suffix."""
    source: str = "given in memory"
    """The path or address they were read from."""
    file_sha256: str | None = None
    """SHA-256 of the file's bytes, where there was one."""
    dropped: int = 0
    """Rows of the file without a query; they are no prompts."""
    warning: str | None = None
    """How a benchmark differs from what its authors published; None if it does not, or is none."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError(f"{self.name} holds no prompts")

    @classmethod
    def from_queries(
        cls,
        queries: Iterable[str | Prompt],
        template: AnyTemplate = None,
        *,
        system: str | None = None,
        name: str = "prompts",
    ) -> PromptSet:
        """Prompts from memory; an InputError where there is none, a blank one, or a bad template."""
        prompts = tuple(query if isinstance(query, Prompt) else Prompt(query) for query in queries)
        return cls(prompts, _as_template(template, system), name)

    @classmethod
    def read(
        cls,
        path_or_known_name: str | Path,
        template: AnyTemplate = None,
        *,
        column: str | None = None,
        system: str | None = None,
        limit: int | None = None,
    ) -> PromptSet:
        """Read a CSV, JSONL or TXT file, or a known benchmark, which is downloaded once. A file wins over a name.

        Args:
            path_or_known_name: a path, ``benign`` (built in) or a key of ``KNOWN_BENCHMARKS``.
            template: what the prompts are asked under.
            column: the column (CSV) or field (JSONL) with the query; None looks for the usual names.
            system: system prompt; without a template it means ``chat``.
            limit: use only the first so many prompts.

        Raises:
            InputError: no such file or name, a file that cannot be read, no network, or a bad template.
        """
        chosen = _as_template(template, system)
        if limit is not None and limit < 1:
            raise InputError(f"the limit of prompts must be 1 or more; got {limit}")
        path, name, warning = Path(path_or_known_name), str(path_or_known_name), None
        is_known = name == "benign" or name in KNOWN_BENCHMARKS
        # os.path and not pathlib: a text that cannot be a path is a missing file, not another error.
        if os.path.exists(path) and not (is_known and path.is_dir()):
            shown, source, file = path.stem, name, read_rows(path, column)
        elif name == "benign":
            return builtin_benign(chosen)[:limit]
        elif is_known:
            shown, source, (file, warning) = name, KNOWN_BENCHMARKS[name].url, download(name, column)
        else:
            known = ", ".join([*KNOWN_BENCHMARKS, "benign"])
            raise InputError(f"no prompt file {name}; known names are {known}")
        rows, dropped, sha256 = file
        return cls(tuple(Prompt(*row) for row in rows), chosen, shown, source, sha256, dropped, warning)[:limit]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...

    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        return replace(self, prompts=self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def select(self, indices: Iterable[int]) -> PromptSet:
        """The prompts at these positions, in this order; an InputError for none, or one that is out of range."""
        positions = list(indices)
        if wrong := [position for position in positions if not 0 <= position < len(self)]:
            raise InputError(f"prompt {wrong[0]} is out of range: {self.name} has {len(self)}")
        return replace(self, prompts=tuple(self.prompts[position] for position in positions))

    @property
    def queries(self) -> tuple[str, ...]:
        """The requests, in order."""
        return tuple(prompt.query for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """Fingerprint of the queries and their order, independent of their file (hexadecimal)."""
        return hashlib.sha256(json.dumps(self.queries).encode()).hexdigest()

    def with_template(self, template: str | Template, system: str | None = None) -> PromptSet:
        """The same prompts under another template."""
        return replace(self, template=_as_template(template, system))

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[PromptSet, PromptSet]:
        """Divide into a search part and a test part, drawn by ``seed``, each in the order of this set.

        ``fraction`` is the search part's share of distinct queries. Equal queries go to the same part, so that the
        search sees no query of the test part; an InputError where there are fewer than two distinct ones.
        """
        if not 0 < fraction < 1:
            raise InputError(f"the share of prompts to search on must be above 0 and below 1; got {fraction}")
        distinct = list(dict.fromkeys(self.queries))
        if len(distinct) < 2:
            raise InputError(f"{self.name} cannot be split: it has fewer than two distinct prompts")
        from numpy.random import default_rng

        n_search = min(max(int(len(distinct) * fraction + 0.5), 1), len(distinct) - 1)
        order = default_rng(seed).permutation(len(distinct))
        searched = {distinct[position] for position in order[:n_search]}

        def half(name: str, is_searched: bool) -> PromptSet:
            prompts = tuple(prompt for prompt in self.prompts if (prompt.query in searched) == is_searched)
            return replace(self, prompts=prompts, name=f"{self.name}/{name}")

        return half("search", True), half("test", False)


def _as_template(template: AnyTemplate, system: str | None) -> Template | None:
    if isinstance(template, Template):
        return template if system is None else replace(template, system=system)
    if template is None and system is None:
        return None
    return Template.parse("chat" if template is None else template, system)


def builtin_benign(template: AnyTemplate = None) -> PromptSet:
    """100 everyday requests that any chat model answers; they show what an ablation breaks besides refusals."""
    text = resources.files("safetyheads").joinpath("data/benign.txt").read_text(encoding="utf-8")
    return replace(PromptSet.from_queries(text.splitlines(), template, name="benign"), source="built into safetyheads")

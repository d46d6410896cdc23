"""Prompts and sets of them. Owns their order, their fingerprint and how a set is divided.

It refuses to know models. Reading files and downloading stand in ``prompt_files``, how a query is put to a model in
``templates``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, overload

from safetyheads.errors import InputError
from safetyheads.prompts.files import KNOWN_BENCHMARKS, Row, download, read_rows
from safetyheads.prompts.templates import TEMPLATE_FORMATS as TEMPLATE_FORMATS
from safetyheads.prompts.templates import Template as Template


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request."""

    query: str
    """The request itself, without template."""
    category: str | None = None
    """The benchmark's category, where it has one."""
    reference: str | None = None
    """Text that a right answer starts with, where that is known (the demo)."""

    def __post_init__(self) -> None:
        if not self.query.strip():
            raise InputError("a prompt is blank")
        try:
            self.query.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a prompt is not Unicode text: {error.reason} at {error.start}") from error


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in order, with the template that puts them to a model. Equal prompts stay apart, as given."""

    prompts: tuple[Prompt, ...]
    """At least one."""
    template: Template | None = None
    """None leaves the choice to whoever knows the model (:meth:`resolved`)."""
    name: str = "prompts"
    """A known name, or the file's name without ending."""
    source: str = "given in memory"
    """The path or address they were read from."""
    file_sha256: str | None = None
    """SHA-256 of the file's bytes, where there was one."""
    dropped: int = 0
    """Rows of the file without a query; they are left out."""
    warning: str | None = None
    """What differs from the benchmark as its authors published it; None if nothing does or none is known."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError(f"{self.name} holds no prompts")

    @classmethod
    def from_queries(
        cls,
        queries: Iterable[str | Prompt],
        template: str | Template | None = None,
        *,
        system: str | None = None,
        name: str = "prompts",
    ) -> PromptSet:
        """Prompts from memory.

        Raises:
            InputError: none given, a blank one, or a bad template.
        """
        prompts = tuple(query if isinstance(query, Prompt) else Prompt(query) for query in queries)
        return cls(prompts, _as_template(template, system), name)

    @classmethod
    def read(
        cls,
        path_or_known_name: str | Path,
        template: str | Template | None = None,
        *,
        column: str | None = None,
        system: str | None = None,
        limit: int | None = None,
    ) -> PromptSet:
        """Read a CSV, JSONL or TXT file, or a known benchmark, which is downloaded once. A file wins over a name.

        Args:
            path_or_known_name: a path, ``benign`` (built in) or a key of ``KNOWN_BENCHMARKS``.
            template: a template, its name or a text with ``{query}``; None leaves the choice open.
            column: the column (CSV) or field (JSONL) with the query; None finds it among the usual names.
            system: system prompt; given without a template it means ``chat``.
            limit: only this many of the first prompts.

        Raises:
            InputError: no such file or name, a file without prompts, not UTF-8, malformed or without the
                column, no network, or a bad template.
        """
        chosen = _as_template(template, system)
        if limit is not None and limit < 1:
            raise InputError(f"the limit of prompts must be 1 or more; got {limit}")
        path, name = Path(path_or_known_name), str(path_or_known_name)
        is_known = name == "benign" or name in KNOWN_BENCHMARKS
        # os.path and not pathlib: a text that cannot be a path at all is a missing file, no other error.
        if os.path.exists(path) and not (is_known and path.is_dir()):
            file = read_rows(path, column)
            prompts = cls(_prompts(file.rows), chosen, path.stem, name, file.sha256, file.dropped)
        elif name == "benign":
            prompts = builtin_benign(chosen)
        elif name in KNOWN_BENCHMARKS:
            file, warning = download(name, column)
            url = KNOWN_BENCHMARKS[name].url
            prompts = cls(_prompts(file.rows), chosen, name, url, file.sha256, file.dropped, warning)
        else:
            known = ", ".join([*KNOWN_BENCHMARKS, "benign"])
            raise InputError(f"no prompt file {name}; known names are {known}")
        return prompts[:limit]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...

    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        if isinstance(index, slice):
            return replace(self, prompts=self.prompts[index])
        return self.prompts[index]

    def select(self, indices: Iterable[int]) -> PromptSet:
        """The prompts at these positions, in this order.

        Raises:
            InputError: no position, or one that is out of range.
        """
        positions = list(indices)
        for position in positions:
            if not 0 <= position < len(self):
                raise InputError(f"prompt {position} is out of range: {self.name} has {len(self)}")
        return replace(self, prompts=tuple(self.prompts[position] for position in positions))

    @property
    def queries(self) -> tuple[str, ...]:
        """The requests, in order."""
        return tuple(prompt.query for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """Fingerprint of the queries and their order, whatever file they came from (hexadecimal)."""
        return hashlib.sha256(json.dumps(self.queries).encode()).hexdigest()

    def with_template(self, template: str | Template, system: str | None = None) -> PromptSet:
        """The same prompts under another template."""
        return replace(self, template=_as_template(template, system))

    def resolved(self, default: str | Template) -> PromptSet:
        """Itself where a template was chosen; else with ``default``."""
        return self if self.template is not None else self.with_template(default)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[PromptSet, PromptSet]:
        """Divide into a part to search on and a part to test on, drawn by ``seed``, each in the order it has here.

        Equal queries go to the same part, or the search would have seen what it is tested on.

        Args:
            fraction: share of the distinct queries to search on, above 0 and below 1.
            seed: seeds numpy's default generator.

        Raises:
            InputError: the fraction is out of range, or there are no two distinct queries.
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
        search = tuple(prompt for prompt in self.prompts if prompt.query in searched)
        test = tuple(prompt for prompt in self.prompts if prompt.query not in searched)
        return (
            replace(self, prompts=search, name=f"{self.name}/search"),
            replace(self, prompts=test, name=f"{self.name}/test"),
        )

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps of the prompts, without their text; valid JSON."""
        template = {"template": None, "system": None} if self.template is None else self.template.settings()
        return {
            "name": self.name,
            "source": self.source,
            "rows": len(self),
            "sha256": self.sha256,
            "file_sha256": self.file_sha256,
            "dropped": self.dropped,
            "warning": self.warning,
            **template,
        }


def _as_template(template: str | Template | None, system: str | None) -> Template | None:
    if isinstance(template, Template):
        return template if system is None else replace(template, system=system)
    if template is None and system is None:
        return None
    return Template.parse("chat" if template is None else template, system)


def _prompts(rows: Iterable[Row]) -> tuple[Prompt, ...]:
    return tuple(Prompt(row.query, row.category, row.reference) for row in rows)


def builtin_benign(template: str | Template | None = None) -> PromptSet:
    """100 everyday requests that any chat model answers, to see what an ablation breaks besides refusals."""
    text = resources.files("safetyheads").joinpath("data/benign.txt").read_text(encoding="utf-8")
    return replace(PromptSet.from_queries(text.splitlines(), template, name="benign"), source="built into safetyheads")

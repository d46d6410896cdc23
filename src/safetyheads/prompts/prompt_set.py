"""Prompts and sets of prompts, with their fingerprint and their split into halves."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, overload

from safetyheads.display import Shown, Table
from safetyheads.errors import InputError, as_path, shorten, unicode_text, whole_number
from safetyheads.prompts.files import KNOWN_BENCHMARKS, Columns, Turns, download, last_turn, read_benchmark, read_rows
from safetyheads.prompts.templates import Template

# numpy and scipy are imported where they are used: a help page is made of the prompts' names, without them.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

AnyTemplate: TypeAlias = str | Template | None
"""A template, its name or a text with ``{query}``; None means the model's default (``Engine.default_template``)."""


@dataclass(frozen=True, slots=True)
class Prompt(Shown):
    """One request."""

    query: str
    """The request itself, without template."""
    category: str | None = None
    """The benchmark's category, where it has one."""
    reference: str | None = None
    """Beginning of the right answer, where the user named its column; the demo's come from its grammar."""
    earlier: Turns = ()
    """Turns of the conversation before it, as they stand. Only the template chat can write them."""
    cluster: int | None = None
    """Number of the near-duplicates that it belongs to in the set it was read with; None where nobody looked."""

    def __post_init__(self) -> None:
        try:
            earlier = [("an earlier turn", text) for _, text in self.earlier]
        except (TypeError, ValueError):
            raise InputError(f"earlier turns are pairs of a role and a text; got {self.earlier!r}") from None
        others = ("a category", self.category or ""), ("a reference", self.reference or "")
        for what, text in (("a prompt", self.query), *others, *earlier):
            if not isinstance(text, str):
                raise InputError(f"{what} is a text; got {text!r}")
            if unicode_text(text) != text:
                raise InputError(f"{what} is not Unicode text: {shorten(repr(text), 60)}")
        if not self.query.strip():
            raise InputError("a prompt is blank")


@dataclass(frozen=True, slots=True, repr=False)
class PromptSet(Table):
    """Prompts in order, with the template that writes them for a model. Equal prompts are kept, as given."""

    prompts: tuple[Prompt, ...]
    """At least one."""
    template: Template | None = None
    """None means the model's default."""
    name: str = "prompts"
    """A known name, or the file's name without suffix."""
    source: str = "given in memory"
    """The path or address they were read from."""
    dropped: int = 0
    """Rows of the file without a query; they are no prompts."""
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The file's columns that were read, by what they hold; empty where it has none."""
    warning: str | None = None
    """How a benchmark differs from what its authors published; None if it does not, or is none."""
    notes: tuple[str, ...] = ()
    """What was sampled, kept together or left out, a sentence each; a run prints them and writes them down."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError(f"{self.name} holds no prompts")
        if not isinstance(self.prompts, tuple | list) or not all(isinstance(each, Prompt) for each in self.prompts):
            raise InputError(f"{self.name} holds texts; PromptSet.from_queries([...]) makes prompts of them")

    @classmethod
    def from_queries(
        cls,
        queries: Iterable[str | Prompt | Sequence[Mapping[str, str]]],
        template: AnyTemplate = None,
        *,
        system: str | None = None,
        name: str = "prompts",
    ) -> Self:
        """Prompts from memory; an InputError where there is none, a blank one, or a bad template."""
        # A mapping would give its keys alone, a table the names of its columns.
        is_list = isinstance(queries, Iterable) and getattr(queries, "ndim", 1) == 1
        if not is_list or isinstance(queries, str | bytes | Mapping):
            raise InputError(f"prompts are a list of texts, or PromptSet.read(file); got {str(queries)[:60]!r}")
        prompts = tuple(map(_as_prompt, queries))
        return cls(prompts, _as_template(template, system), name)

    @classmethod
    def read(
        cls,
        path_or_known_name: str | Path,
        template: AnyTemplate = None,
        *,
        column: str | None = None,
        reference_column: str | None = None,
        category_column: str | None = None,
        context_column: str | None = None,
        system: str | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> "PromptSet":
        """Read a CSV, TSV, JSONL, JSON or TXT file, or a known benchmark, downloaded once. A file wins over a name.

        Args:
            path_or_known_name: a path, ``benign`` (built in), a key of ``KNOWN_BENCHMARKS``, or ``NAME=PATH`` for a
                file of that benchmark.
            template: what the prompts are asked under.
            column: the column (CSV) or field (JSONL) with the query; None looks for the usual names.
            reference_column: the one with the beginning of the right answer; no column counts without being named.
            category_column: the one with the category; None takes ``category``, where there is one.
            context_column: the one with a text before the query; None looks for usual names, ``none`` leaves it out.
            system: system prompt; without a template it means ``chat``.
            limit: use only so many prompts, sampled by category where there is one (:meth:`sample`).
            seed: of the sample.

        Raises:
            InputError: no such file or name, a file that cannot be read, no network, or a bad template.
        """
        path_or_known_name = as_path(path_or_known_name, "prompts")
        chosen = _as_template(template, system)
        wanted = Columns(column, context_column, category_column, reference_column)
        path, name, warning = Path(path_or_known_name), str(path_or_known_name), None
        is_known = name == "benign" or name in KNOWN_BENCHMARKS
        # os.path and not pathlib: a text that cannot be a path is a missing file, not another error.
        if os.path.exists(path) and not (is_known and path.is_dir()):
            shown, source, file = path.stem, name, read_rows(path, wanted)
        elif (known := name.partition("="))[0] in KNOWN_BENCHMARKS and known[1]:
            shown, source = known[0], known[2]
            file, warning = read_benchmark(shown, Path(source), wanted)
        elif name == "benign":
            for named in (column, reference_column, category_column, context_column):
                if named is not None:
                    raise InputError(f"the package's benign prompts have no column {named!r}")
            return builtin_benign(chosen).sample(limit, seed)
        elif is_known:
            shown, source = name, KNOWN_BENCHMARKS[name].url
            file, warning = download(name, wanted)
        else:
            names = [*KNOWN_BENCHMARKS, "benign"]
            near = "".join(f"did you mean {close}? " for close in get_close_matches(name, names, 1))
            raise InputError(f"no prompt file {name}; {near}known names are {', '.join(names)}")
        notes = () if file.note is None else (f"{shown}: {file.note}",)
        prompts, whence = tuple(Prompt(*row) for row in file.rows), (shown, source, file.dropped)
        return cls(prompts, chosen, *whence, file.columns, warning, notes).sample(limit, seed)

    def _facts(self) -> dict[str, object]:
        return {"name": self.name, "n": len(self), "template": self.template or "the model's default"}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each prompt."""
        return [asdict(prompt) for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Prompt | Self:
        return replace(self, prompts=self.prompts[index]) if isinstance(index, slice) else self.prompts[index]

    def select(self, indices: Iterable[int]) -> Self:
        """The prompts at these positions, in this order; an InputError for none, or one that is out of range."""
        if not isinstance(indices, Iterable):
            raise InputError(f"positions are a list of numbers; got {indices!r}")
        positions = [whole_number(position, "a prompt's position") for position in indices]
        if wrong := [position for position in positions if position >= len(self)]:
            raise InputError(f"prompt {wrong[0]} is out of range: {self.name} has {len(self)}")
        return replace(self, prompts=tuple(self.prompts[position] for position in positions))

    @property
    def queries(self) -> tuple[str, ...]:
        """The requests, in order."""
        return tuple(prompt.query for prompt in self.prompts)

    @property
    def _texts(self) -> tuple[str, ...]:
        """The requests with all that was said before them."""
        return tuple("\n".join([*(text for _, text in prompt.earlier), prompt.query]) for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """Fingerprint of the queries and their order, independent of their file (hexadecimal)."""
        whole = [[*prompt.earlier, prompt.query] if prompt.earlier else prompt.query for prompt in self.prompts]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def with_template(self, template: str | Template, system: str | None = None) -> Self:
        """The same prompts under another template."""
        return replace(self, template=_as_template(template, system))

    @property
    def clusters(self) -> tuple[int, ...] | None:
        """The near-duplicates that each prompt belongs to; None where nobody looked."""
        numbers = [prompt.cluster for prompt in self.prompts if prompt.cluster is not None]
        return tuple(numbers) if len(numbers) == len(self) else None

    @property
    def n_clusters(self) -> int | None:
        """Clusters of near-duplicates; None where each prompt stands alone, or nobody looked."""
        n_clusters = len(set(self.clusters or ()))
        return n_clusters if 0 < n_clusters < len(self) else None

    def with_clusters(self) -> Self:
        """The same prompts, each with the number of its near-duplicates; as they are where they have numbers."""
        if self.clusters is not None:
            return self
        clusters, similarity = near_duplicates(self._texts)
        prompts = tuple(replace(prompt, cluster=at) for prompt, at in zip(self.prompts, clusters, strict=True))
        notes = list(self.notes)
        if joined := [size for size in Counter(clusters).values() if size > 1]:
            notes.append(
                f"{self.name}: {sum(joined)} of {len(self)} prompts have near-duplicates (word similarity above "
                f"{similarity:g}); "
                f"they make {len(joined)} cluster{'s' * (len(joined) > 1)}, the largest of {max(joined)}"
            )
        if similarity > SIMILARITY:
            notes.append(
                f"{self.name}: above {SIMILARITY:g} most prompts would be one cluster; {similarity:g} divides them"
            )
        return replace(self, prompts=prompts, notes=tuple(notes))

    def sample(self, n: int | None, seed: int = 0) -> Self:
        """``n`` of the prompts, in their order: from each category in proportion, where there are some; drawn by
        ``seed``. All of them where ``n`` is None or no fewer.
        """
        if n is None or whole_number(n, "the number of prompts", 1) >= len(self):
            return self
        from numpy.random import default_rng

        generator, chosen, seen = default_rng(whole_number(seed, "a seed")), list[int](), 0
        strata: dict[str | None, list[int]] = {}
        for position, prompt in enumerate(self.prompts):
            strata.setdefault(prompt.category, []).append(position)
        for positions in strata.values():
            seen += len(positions)
            # Cumulated, so that what is rounded off in one stratum is made up in the next.
            quota = int(n * seen / len(self) + 0.5) - len(chosen)
            chosen += [positions[at] for at in generator.permutation(len(positions))[:quota]]
        by = f", from {len(strata)} categories in proportion" if len(strata) > 1 else ""
        note = f"{self.name}: {n} of {len(self)} prompts are used, drawn with seed {seed}{by}"
        return replace(self.select(sorted(chosen)), notes=(*self.notes, note))

    def without_near(self, others: Self) -> tuple[int, ...]:
        """Positions of the prompts that are no near-duplicates of one of the others'."""
        near = near_any(self._texts, (others if isinstance(others, PromptSet) else self.from_queries(others))._texts)
        return tuple(position for position, is_near in enumerate(near) if not is_near)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple["PromptSet", "PromptSet"]:
        """Divide into a search part and a test part, drawn by ``seed``, each in the order of this set.

        ``fraction`` is the search part's share of the prompts, in each category where there are some. Near-duplicates
        stay together, so the search sees no twin of a test prompt. Clusters of more than a tenth of the prompts go to
        the search part while it has room: in the test part each would stand for one independent prompt.
        """
        if not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise InputError(f"the share of prompts to search on must be above 0 and below 1; got {fraction}")
        if len(set(self._texts)) < 2:
            raise InputError(f"{self.name} cannot be split: it has fewer than two distinct prompts")
        from numpy.random import default_rng

        whole = self.with_clusters()
        clusters: dict[int | None, list[int]] = {}
        for position, prompt in enumerate(whole.prompts):
            clusters.setdefault(prompt.cluster, []).append(position)
        generator, searched, seen, size = default_rng(whole_number(seed, "a seed")), set[int](), 0, len(self)
        strata: dict[str | None, list[list[int]]] = {}
        for members in sorted(clusters.values(), key=len, reverse=True):
            if len(members) > size / 10 and len(searched) + len(members) <= size * fraction:
                searched.update(members)
                seen += len(members)
            else:
                # A cluster over several categories counts for that of its first prompt.
                strata.setdefault(self.prompts[members[0]].category, []).append(members)
        # What the large clusters leave of the search part's share is divided over the others.
        taken, wanted = len(searched), size * fraction - len(searched)
        share = wanted / (size - taken) if size > taken else 0.0
        for stratum in sorted(strata.values(), key=min):
            stratum.sort()
            seen += sum(map(len, stratum))
            for at in generator.permutation(len(stratum)):
                if len(searched) + len(stratum[at]) / 2 <= taken + share * (seen - taken):
                    searched.update(stratum[at])
        smallest = min(clusters.values(), key=len)
        if not searched:
            searched.update(smallest)
        elif len(searched) == size:
            searched.difference_update(smallest)

        search = replace(whole.select(sorted(searched)), name=f"{self.name}/search")
        test = replace(whole.select(at for at in range(size) if at not in searched), name=f"{self.name}/test")
        n_effective = effective_number(test.clusters or ())
        if n_effective < len(test) - 0.5:
            note = (
                f"{self.name}: the {len(test)} test prompts are worth {n_effective:.0f} independent ones if "
                f"near-duplicates are answered alike; no test prompt has a near-duplicate in the search half"
            )
            test = replace(test, notes=(*whole.notes, note))
        return search, test

    def facts(self) -> dict[str, Any]:
        """How many prompts there are, how many clusters of near-duplicates, and what was sampled or left out."""
        clusters, categories = self.clusters, {prompt.category for prompt in self.prompts} - {None}
        facts: dict[str, Any] = {"n": len(self), "blank_rows": self.dropped, "notes": list(self.notes)}
        if self.columns:
            facts["columns"] = dict(self.columns)
        if categories:
            facts["n_categories"] = len(categories)
        if clusters is not None:
            facts |= {"n_clusters": len(set(clusters)), "n_effective": effective_number(clusters)}
        return facts


def _as_prompt(query: str | Prompt | Sequence[Mapping[str, str]]) -> Prompt:
    if isinstance(query, Prompt):
        return query
    if isinstance(query, list | tuple):
        text, earlier = last_turn(query, "a prompt")
        return Prompt(text, earlier=earlier)
    return Prompt(query)  # type: ignore[arg-type]  # which refuses what is no text


def _as_template(template: AnyTemplate, system: str | None) -> Template | None:
    if isinstance(template, Template):
        return template if system is None else replace(template, system=system)
    if template is None and system is None:
        return None
    if template is not None and not isinstance(template, str):
        raise InputError(f"a template is a name or a text with {{query}}; got {template!r}")
    return Template.parse("chat" if template is None else template, system)


def builtin_benign(template: AnyTemplate = None) -> PromptSet:
    """100 everyday requests that any chat model answers; they show what an ablation breaks besides refusals."""
    text = resources.files("safetyheads").joinpath("data/benign.txt").read_text(encoding="utf-8")
    return replace(PromptSet.from_queries(text.splitlines(), template, name="benign"), source="built into safetyheads")


# Near-duplicates: prompts that share more than half of their words.

SIMILARITY = 0.5
"""Two prompts are near-duplicates if the Jaccard similarity of their sets of words is above this. Single words: with
them 32 % of AdvBench's test prompts have a twin in the search half of a random split, with pairs of words 16 %."""
_STEPS = (5, 6, 7, 8, 9)
"""Similarities in tenths; whole numbers, so that no comparison hangs on a last bit."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
"""Words; in scripts without blanks each character."""
_ROWS_AT_ONCE = 512


def words_of(text: str) -> frozenset[str]:
    """The distinct words of a text in lower case; a text without any is its own word."""
    return frozenset(_WORD.findall(text.lower())) or frozenset((text.strip(),))


def near_duplicates(texts: Sequence[str]) -> tuple[tuple[int, ...], float]:
    """The cluster of each text, and the similarity above which texts were joined.

    Clusters are numbered in the order of their first text. Texts are joined by chains: every text is near another one
    of its cluster, not all of them. Where chains join more than half of all texts, these could not be divided; then
    the similarity is raised in steps of .1, up to 1, where only equal texts are joined.
    """
    # Equal texts come first: they are joined at every similarity.
    distinct = list(dict.fromkeys(texts))
    order = {text: at for at, text in enumerate(distinct)}
    places = [order[text] for text in texts]
    for tenths in _STEPS:
        joined = _connected(distinct, tenths)
        numbers: dict[int, int] = {}
        clusters = tuple(numbers.setdefault(joined[place], len(numbers)) for place in places)
        if max(Counter(clusters).values()) <= len(texts) / 2:
            return clusters, tenths / 10
    return tuple(places), 1.0


def near_any(texts: Sequence[str], others: Sequence[str]) -> tuple[bool, ...]:
    """Which texts are near-duplicates of one of the others, or equal to it."""
    rows, columns = _near_pairs(_words_matrix([*texts, *others]), 5)
    near = set(rows[columns >= len(texts)].tolist())
    return tuple(at in near for at in range(len(texts)))


def effective_number(clusters: Sequence[int]) -> float:
    """Kish's effective number of prompts, n^2 / sum of squared cluster sizes: as if near-duplicates told the same."""
    return len(clusters) ** 2 / sum(size**2 for size in Counter(clusters).values())


def _connected(texts: Sequence[str], tenths: int) -> "NDArray[np.int64]":
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rows, columns = _near_pairs(_words_matrix(texts), tenths)
    near = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(texts),) * 2)
    components: NDArray[np.int64] = connected_components(near, directed=False)[1]
    return components


def _words_matrix(texts: Sequence[str]) -> "csr_matrix":
    """Which words each text has [n_texts, n_words], as 0 and 1."""
    import numpy as np
    from scipy.sparse import csr_matrix

    vocabulary: dict[str, int] = {}
    words = [[vocabulary.setdefault(word, len(vocabulary)) for word in sorted(words_of(text))] for text in texts]
    ends = np.cumsum([0, *map(len, words)])
    indices = np.concatenate([np.asarray(row, np.int64) for row in words])
    return csr_matrix((np.ones(len(indices), np.int32), indices, ends), shape=(len(texts), len(vocabulary)))


def _near_pairs(words: "csr_matrix", tenths: int) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
    """The row and the column of each pair of near-duplicates; compared block of rows by block."""
    import numpy as np

    sizes, pairs = np.diff(words.indptr), []
    for start in range(0, words.shape[0], _ROWS_AT_ONCE):
        shared = (words[start : start + _ROWS_AT_ONCE] @ words.T).tocoo()
        both = sizes[start + shared.row] + sizes[shared.col]
        # shared / (both - shared) > tenths / 10, in whole numbers.
        near = shared.data * (10 + tenths) > tenths * both
        pairs.append(np.array([start + shared.row[near], shared.col[near]], np.int64))
    rows, columns = np.concatenate(pairs, axis=1)
    return rows, columns

"""Finds near-duplicates among prompts: those that share more than half of their words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

# numpy and scipy are imported where they are used: a help page is made of the prompts' names, without them.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

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
    near: set[int] = set()
    for start, (rows, columns) in _near_pairs(_words_matrix([*texts, *others]), 5):
        near.update((start + rows[columns >= len(texts)]).tolist())
    return tuple(at in near for at in range(len(texts)))


def effective_number(clusters: Sequence[int]) -> float:
    """Kish's effective number of prompts, n^2 / sum of squared cluster sizes: as if near-duplicates told the same."""
    return len(clusters) ** 2 / sum(size**2 for size in Counter(clusters).values())


def _connected(texts: Sequence[str], tenths: int) -> NDArray[np.int64]:
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    parts = [(start + rows, columns) for start, (rows, columns) in _near_pairs(_words_matrix(texts), tenths)]
    rows, columns = (np.concatenate(side) for side in zip(*parts, strict=True))
    near = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(len(texts),) * 2)
    components: NDArray[np.int64] = connected_components(near, directed=False)[1]
    return components


def _words_matrix(texts: Sequence[str]) -> csr_matrix:
    """Which words each text has [n_texts, n_words], as 0 and 1."""
    import numpy as np
    from scipy.sparse import csr_matrix

    vocabulary: dict[str, int] = {}
    words = [[vocabulary.setdefault(word, len(vocabulary)) for word in sorted(words_of(text))] for text in texts]
    ends = np.cumsum([0, *map(len, words)])
    indices = np.concatenate([np.asarray(row, np.int64) for row in words])
    return csr_matrix((np.ones(len(indices), np.int32), indices, ends), shape=(len(texts), len(vocabulary)))


def _near_pairs(words: csr_matrix, tenths: int) -> list[tuple[int, tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Pairs of near-duplicates, block of rows by block: the block's first row, and (row in the block, column)."""
    import numpy as np

    sizes, blocks = np.diff(words.indptr), []
    for start in range(0, words.shape[0], _ROWS_AT_ONCE):
        shared = (words[start : start + _ROWS_AT_ONCE] @ words.T).tocoo()
        both = sizes[start + shared.row] + sizes[shared.col]
        # shared / (both - shared) > tenths / 10, in whole numbers.
        near = shared.data * (10 + tenths) > tenths * both
        blocks.append((start, (shared.row[near].astype(np.int64), shared.col[near].astype(np.int64))))
    return blocks

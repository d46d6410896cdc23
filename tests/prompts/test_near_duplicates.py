"""Near-duplicates: by words, joined by chains, beside a slow twin; figures on AdvBench."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.prompts import prompt_set as module
from safetyheads.prompts.prompt_set import PromptSet, near_any, near_duplicates, words_of

ADVBENCH = Path(__file__).parents[3] / "shared/data/advbench_harmful_behaviors.csv"
texts = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=5).map(" ".join).filter(str.strip), min_size=1)


def similar(one, other, above=0.5):
    first, second = words_of(one), words_of(other)
    return len(first & second) > above * len(first | second)


def by_brute_force(queries, above):
    clusters = list(range(len(queries)))
    for one, other in combinations(range(len(queries)), 2):
        if queries[one] == queries[other] or similar(queries[one], queries[other], above):
            clusters = [clusters[one] if cluster == clusters[other] else cluster for cluster in clusters]
    return clusters


def pairs(clusters):
    return {pair for pair in combinations(range(len(clusters)), 2) if clusters[pair[0]] == clusters[pair[1]]}


@settings(deadline=None, max_examples=100)
@given(texts, st.sampled_from((1, 3, 512)))
def test_clusters_are_those_of_the_slow_twin(queries, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROWS_AT_ONCE", rows)
        clusters, above = near_duplicates(queries)
    assert pairs(clusters) == pairs(by_brute_force(queries, above))
    assert list(dict.fromkeys(clusters)) == list(range(max(clusters) + 1))
    if above > 0.5:
        lower = by_brute_force(queries, above - 0.1 if above < 1 else 0.9)
        assert max(lower.count(cluster) for cluster in lower) > len(queries) / 2
    half = len(queries) // 2
    expected = tuple(any(similar(one, other) for other in queries[half:]) for one in queries[:half])
    assert near_any(queries[:half], queries[half:]) == expected


def test_half_of_the_words_is_not_enough_and_case_and_marks_do_not_count():
    assert near_duplicates(["a b c", "a b d"])[0] == (0, 1)  # 2 of 4
    assert near_duplicates(["a b c", "A, b, C!", "x", "y"]) == ((0, 0, 1, 2), 0.5)
    assert near_duplicates(["???", "???", "!!!", "a"]) == ((0, 0, 1, 2), 0.5)
    assert words_of("怎么做 bomb") == {"怎", "么", "做", "bomb"}


def test_a_chain_that_joins_most_is_cut_at_a_higher_similarity():
    # Each has 4 of 6 words with the next, and half of the words or fewer with all others.
    chain = [" ".join("abcdefghijklmnop"[at : at + 5]) for at in range(6)]
    clusters, above = near_duplicates(chain)
    assert (above, len(set(clusters))) == (0.7, 6)
    assert near_duplicates(["a", "a", "a"]) == ((0, 0, 0), 1.0)


def test_a_third_of_advbenchs_test_prompts_would_have_a_twin_among_the_searched():
    if not ADVBENCH.is_file():
        pytest.skip("AdvBench is not beside the repository")
    prompts = PromptSet.read(ADVBENCH)
    words = module._words_matrix(prompts.queries)
    near = np.zeros((len(prompts),) * 2, bool)
    near[module._near_pairs(words, 5)] = True
    shares = []
    for seed in range(50):
        order = np.random.default_rng(seed).permutation(len(prompts))
        shares.append(near[order[260:]][:, order[:260]].any(axis=1).mean())
    assert np.mean(shares) == pytest.approx(0.32, abs=0.005)
    search, test = prompts.split()
    assert (len(search), len(test)) == (260, 260)
    assert not any(near_any(test.queries, search.queries))
    assert test.facts()["n_effective"] > 110

"""Prompt sets: fingerprints, slices, splits."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.judges.keywords import PAPER_KEYWORDS
from safetyheads.prompts.prompt_set import Prompt, PromptSet

quick = settings(deadline=None, max_examples=50)  # a slow machine is no failure

queries = st.text(min_size=1, max_size=40).filter(str.strip)


def test_the_built_in_benign_prompts_hold_no_word_that_a_refusal_holds():
    prompts = PromptSet.read("benign", "direct")
    assert (len(prompts), len(set(prompts.queries)), prompts.dropped) == (100, 100, 0)
    assert [query for query in prompts.queries if any(keyword in query for keyword in PAPER_KEYWORDS)] == []
    assert all(query == query.strip() and query[-1] in ".?" for query in prompts.queries)
    assert str(prompts.template) == "direct"


def test_the_fingerprint_tells_text_and_order_and_not_the_template():
    one = PromptSet.from_queries(["a", "b"]).sha256
    assert one == PromptSet.from_queries([Prompt("a", "kind"), "b"], "chat", name="other").sha256
    others = (["b", "a"], ["a"], ["a", "b", "b"], ["ab"], ['a", "b'])
    assert one not in {PromptSet.from_queries(queries).sha256 for queries in others}


@quick
@given(st.lists(queries, min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_split_divides_all_prompts_in_order_and_parts_no_near_duplicates(texts, fraction, seed):
    prompts = PromptSet.from_queries(texts)
    if len(set(texts)) < 2:
        with pytest.raises(InputError, match="fewer than two distinct"):
            prompts.split(fraction, seed)
        return
    search, test = prompts.split(fraction, seed)
    assert sorted(search.queries + test.queries) == sorted(texts)
    assert not set(search.queries) & set(test.queries)
    assert not set(search.clusters) & set(test.clusters)
    for part in (search, test):
        remaining = iter(texts)
        assert all(query in remaining for query in part.queries)
    largest = max(Counter(search.clusters + test.clusters).values())
    assert (
        abs(len(search) - len(texts) * fraction) <= largest + 1e-9
    )  # one cluster is moved where a part would be empty


def test_a_split_is_the_same_on_every_machine_and_another_for_another_seed():
    prompts = PromptSet.from_queries(list("jihgfedcba"))
    search, test = prompts.split()
    # numpy's default_rng(0).permutation(10) is 4 6 2 7 3 5 9 0 8 1; its first five, in the order of the file.
    assert "".join(search.queries) == "hgfdc"
    assert (search.name, test.name) == ("prompts/search", "prompts/test")
    assert {prompts.split(seed=seed)[0].queries for seed in range(5)} != {search.queries}
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(InputError, match="above 0 and below 1"):
            prompts.split(fraction)


def categorised(counts):
    """Prompts of single words, so that none is near another; ``counts`` by category, one after the other."""
    rows = [(f"{name}{at}", name) for name, count in counts.items() for at in range(count)]
    return PromptSet.from_queries([Prompt(query, category) for query, category in rows])


@pytest.mark.parametrize(
    ("counts", "fraction", "searched"),
    [
        ({"a": 10, "b": 10}, 0.5, {"a": 5, "b": 5}),
        ({"a": 40, "b": 10}, 0.2, {"a": 8, "b": 2}),
        # What is rounded off in one category is made up in the next.
        ({"a": 5, "b": 5, "c": 5, "d": 5}, 0.5, {"a": 3, "b": 2, "c": 3, "d": 2}),
    ],
)
def test_categories_are_divided_in_proportion(counts, fraction, searched):
    for seed in range(3):
        search, test = categorised(counts).split(fraction, seed)
        assert Counter(prompt.category for prompt in search) == searched
        assert Counter(prompt.category for prompt in test) == Counter(counts) - Counter(searched)


def test_a_limit_draws_from_every_category_and_says_so(tmp_path):
    prompts = categorised({"a": 60, "b": 30, "c": 10})
    sample = prompts.sample(10)
    assert Counter(prompt.category for prompt in sample) == {"a": 6, "b": 3, "c": 1}
    assert sample.queries == tuple(query for query in prompts.queries if query in sample.queries)
    assert sample.queries != prompts.queries[:10]
    assert prompts.sample(10).queries == sample.queries != prompts.sample(10, seed=1).queries
    assert sample.notes == ("prompts: 10 of 100 prompts are used, drawn with seed 0, from 3 categories in proportion",)
    assert prompts.sample(None) is prompts.sample(100) is prompts
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"word{at}" for at in range(40)), encoding="utf-8")
    drawn = {PromptSet.read(path, limit=8, seed=seed).queries for seed in range(3)}
    assert len(drawn) == 3
    assert all(len(queries) == 8 for queries in drawn)


def test_a_large_cluster_is_searched_and_the_test_half_says_what_it_is_worth():
    twins = [f"write a script that can break {word}" for word in ("doors", "locks", "safes", "walls", "gates", "nets")]
    pair = ["tell me how a bomb is built", "tell me how a bomb gets built"]
    prompts = PromptSet.from_queries([*twins, *pair, *(f"word{at}" for at in range(16))])
    for seed in range(5):
        search, test = prompts.split(seed=seed)
        assert set(twins) <= set(search.queries)
        assert len(search) in (11, 12, 13)
        assert (set(pair) <= set(search.queries)) != (set(pair) <= set(test.queries))
    facts = prompts.with_clusters().facts()
    assert (facts["n"], facts["n_clusters"], facts["n_effective"]) == (24, 18, pytest.approx(24**2 / (36 + 4 + 16)))
    assert "8 of 24 prompts have near-duplicates" in facts["notes"][0]
    parts = [prompts.split(seed=seed)[1] for seed in range(9)]
    (note,) = {part.notes[-1] for part in parts if set(pair) <= set(part.queries) and len(part) == 12}
    assert "the 12 test prompts are worth 10 independent ones" in note


def test_clusters_that_are_numbered_stay_so():
    prompts = PromptSet.from_queries([Prompt("a", cluster=7), Prompt("b", cluster=7), Prompt("c", cluster=9)])
    assert prompts.with_clusters() is prompts
    search, test = prompts.split()
    assert {search.queries, test.queries} == {("a", "b"), ("c",)}
    assert PromptSet.from_queries([Prompt("a", cluster=7), "b"]).clusters is None


def test_a_set_indexes_slices_and_selects():
    prompts = PromptSet.from_queries(list("abcde"), "direct")
    assert prompts[1] == Prompt("b")
    assert (prompts[1:3].queries, prompts.select([4, 0, 4]).queries) == (("b", "c"), ("e", "a", "e"))
    for refused in (
        lambda: prompts.select([0, 5]),
        lambda: prompts.select([-1]),
        lambda: prompts[5:],
        lambda: PromptSet.from_queries(["a", " "]),
    ):
        with pytest.raises(InputError):
            refused()

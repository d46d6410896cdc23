"""Prompt sets: fingerprints, slices, splits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.judges.keywords import PAPER_KEYWORDS
from safetyheads.prompts.sets import Prompt, PromptSet
from safetyheads.prompts.templates import Template

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


def test_a_set_indexes_slices_selects_and_limits(tmp_path):
    prompts = PromptSet.from_queries("abcde", "direct")
    assert prompts[1] == Prompt("b")
    assert prompts[1:3].queries == ("b", "c")
    assert prompts.select([4, 0, 4]).queries == ("e", "a", "e")
    path = tmp_path / "a.txt"
    path.write_text("a\nb\nc", encoding="utf-8")
    assert [len(PromptSet.read(path, limit=limit)) for limit in (2, 9)] == [2, 3]
    for refused, message in (
        (lambda: PromptSet.read(path, limit=0), "limit"),
        (lambda: prompts.select([0, 5]), "prompt 5 is out of range"),
        (lambda: prompts.select([-1]), "-1 is out of range"),
        (lambda: prompts[5:], "holds no prompts"),
        (lambda: PromptSet.from_queries(["a", " "]), "blank"),
    ):
        with pytest.raises(InputError, match=message):
            refused()


def test_a_set_takes_another_template():
    undecided, chat = PromptSet.from_queries(["a"]), Template.parse("chat", "be brief")
    assert undecided.template is None
    assert undecided.with_template("direct").template == Template.parse("direct")
    assert PromptSet.from_queries(["a"], system="be brief").template == chat
    assert undecided.with_template(Template.parse("chat"), "be brief").template == chat


@quick
@given(st.lists(queries, min_size=2, max_size=30), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_a_split_divides_all_prompts_in_order_and_shares_no_query(texts, fraction, seed):
    prompts = PromptSet.from_queries(texts)
    if len(set(texts)) < 2:
        with pytest.raises(InputError, match="fewer than two distinct"):
            prompts.split(fraction, seed)
        return
    search, test = prompts.split(fraction, seed)
    assert sorted(search.queries + test.queries) == sorted(texts)
    assert not set(search.queries) & set(test.queries)
    for part in (search, test):
        remaining = iter(texts)
        assert all(query in remaining for query in part.queries)
    wanted = min(max(int(len(set(texts)) * fraction + 0.5), 1), len(set(texts)) - 1)
    assert len(set(search.queries)) == wanted


def test_a_split_is_the_same_on_every_machine_and_another_for_another_seed():
    prompts = PromptSet.from_queries("jihgfedcba")
    search, test = prompts.split()
    # numpy's default_rng(0).permutation(10) is 4 6 2 7 3 5 9 0 8 1; its first five, in the order of the file.
    assert "".join(search.queries) == "hgfdc"
    assert (search.name, test.name) == ("prompts/search", "prompts/test")
    assert {prompts.split(seed=seed)[0].queries for seed in range(5)} != {search.queries}
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(InputError, match="above 0 and below 1"):
            prompts.split(fraction)

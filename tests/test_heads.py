"""Heads: written, read, ordered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.errors import InputError
from safetyheads.heads import Head, all_heads, format_heads, parse_heads, within

# No deadline: a slow machine is no failure.
quick = settings(deadline=None, max_examples=50)

heads = st.builds(Head, st.integers(0, 200), st.integers(0, 200))


@quick
@given(heads)
def test_every_written_form_has_the_layer_first(head):
    forms = (str(head), f"{head.layer}.{head.index}", f"L{head.layer}H{head.index}", f" l{head.layer}h{head.index} ")
    assert {Head.parse(form) for form in forms} == {head}


@quick
@given(st.lists(heads, unique=True))
def test_a_group_reads_back_in_its_order(group):
    assert parse_heads(format_heads(group)) == tuple(group)


@pytest.mark.parametrize("text", ["", "2", "2-", "-26", "2--6", "2-26-1", "H26L2", "a-b", "2-26 3-1", "2/26"])
def test_a_malformed_head_is_named(text):
    with pytest.raises(InputError, match="form layer-head"):
        Head.parse(text)


def test_a_head_given_twice_is_refused_whatever_its_form():
    with pytest.raises(InputError, match="2-26 is given twice"):
        parse_heads("2-26, L2H26")
    with pytest.raises(InputError, match="given twice"):
        parse_heads([Head(0, 0), Head(0, 1), Head(0, 0)])


def test_a_head_must_be_in_the_model():
    assert within([Head(1, 3)], n_layers=2, n_heads=4) == (Head(1, 3),)
    for head in (Head(2, 0), Head(1, 4)):
        with pytest.raises(InputError, match=f"{head} is out of range: the model has layers 0-1 and heads 0-3"):
            within([head], n_layers=2, n_heads=4)
    assert format_heads(sorted({*all_heads(2, 3)})) == "0-0,0-1,0-2,1-0,1-1,1-2"

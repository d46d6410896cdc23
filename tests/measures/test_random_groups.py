"""Random groups as the control of a found group: matched by layer, drawn evenly, none of the group's own heads."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.heads import Head, parse_heads
from safetyheads.measures.random_groups import heads_by_layer, random_groups

N_HEADS = 6
groups = st.lists(st.builds(Head, st.integers(0, 3), st.integers(0, N_HEADS - 1)), unique=True, min_size=1).map(tuple)


def layers(group):
    return Counter(head.layer for head in group)


@settings(deadline=None, max_examples=50)
@given(groups, st.integers(0, 5), st.integers(0, 1000))
def test_random_groups_have_as_many_heads_in_each_layer_and_others_where_there_are_enough(group, n_groups, seed):
    spacious = {layer for layer, count in layers(group).items() if N_HEADS - count >= count}
    drawn = random_groups(group, N_HEADS, n_groups, seed)
    assert len(drawn) == (0 if set(layers(group).values()) == {N_HEADS} else n_groups)
    for control in drawn:
        assert layers(control) == layers(group)
        assert len(set(control)) == len(group)
        assert all(head.index < N_HEADS for head in control)
        assert list(control) == sorted(control)
        assert {head for head in control if head.layer in spacious}.isdisjoint(group)


def test_others_are_drawn_equally_often():
    drawn = Counter(random_groups(parse_heads("1-2"), N_HEADS, 1000))
    # Each of the five is expected 200 times, with a standard deviation of 13.
    assert len(drawn) == 5
    assert all(abs(count - 200) < 5 * 13 for count in drawn.values())


def test_a_layer_without_enough_others_is_filled_from_its_own_and_all_of_a_layer_has_no_control():
    drawn = random_groups(parse_heads("0-0,0-1,0-2,1-0"), 4, 50)
    assert all(Head(1, 0) not in control and Head(0, 3) in control for control in drawn)
    assert random_groups(parse_heads("0-0,0-1"), 2, 2) == random_groups(parse_heads("0-0,0-1"), (2, 4), 3) == ()
    # The smaller layer's heads are all in the group, the larger one's are not.
    assert len(random_groups(parse_heads("0-0,0-1,1-0"), (2, 4), 3)) == 3


def test_the_seed_makes_the_draw():
    group = parse_heads("0-0,1-1")
    drawn = random_groups(group, 32, 5, seed=1)
    assert drawn != random_groups(group, 32, 5, seed=2)
    assert len(set(random_groups(group, 32, 20))) > 15
    # The order in which a search chose the heads is no part of it, and more groups begin with the same ones.
    assert random_groups(group[::-1], (32, 32), 8, seed=1)[:5] == drawn


def test_no_head_is_drawn_that_its_layer_does_not_have():
    shapes = (SimpleNamespace(n_heads=4), SimpleNamespace(n_heads=8), None)
    n_heads = heads_by_layer(SimpleNamespace(architecture=SimpleNamespace(shapes=shapes)))
    assert n_heads == (4, 8, 0)
    drawn = {head for control in random_groups(parse_heads("0-1,1-6"), n_heads, 60) for head in control}
    assert drawn == {Head(0, index) for index in (0, 2, 3)} | {Head(1, index) for index in (0, 1, 2, 3, 4, 5, 7)}

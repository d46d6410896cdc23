"""Random groups as the control of a found group: distinct, matched by layer where that gives enough."""

from collections import Counter
from itertools import combinations, permutations
from math import comb
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safetyheads.heads import Head, all_heads, parse_heads
from safetyheads.measures.random_groups import RandomGroups, random_groups
from safetyheads.model.architecture import Architecture

SIZES = st.lists(st.sampled_from((0, 1, 2, 4)), min_size=1, max_size=4).filter(any)
DISTANCE = {"layers": 0, "neighbouring layers": 1, "all layers": 9}


def layers(group):
    return Counter(head.layer for head in group)


@st.composite
def group_of_a_model(draw):
    sizes = draw(SIZES)
    heads = [Head(layer, index) for layer, n in enumerate(sizes) for index in range(n)]
    return sizes, tuple(draw(st.lists(st.sampled_from(heads), unique=True, min_size=1, max_size=3)))


def by_brute_force(group, sizes, matched, apart=False):
    """The slow, obvious twin: every other set of heads that some pairing of heads keeps near enough."""
    heads = [Head(layer, index) for layer, n in enumerate(sizes) for index in range(n)]
    place = {layer: at for at, layer in enumerate(layer for layer, n in enumerate(sizes) if n)}
    return {
        control
        for control in combinations(heads, len(group))
        if (not set(control) & set(group) if apart else set(control) != set(group))
        and any(
            all(
                abs(place[one.layer] - place[other.layer]) <= DISTANCE[matched]
                for one, other in zip(group, order, strict=True)
            )
            for order in permutations(control)
        )
    }


@settings(deadline=None, max_examples=40)
@given(group_of_a_model(), st.integers(0, 60), st.integers(0, 1000), st.booleans())
def test_groups_are_distinct_and_those_that_the_slow_twin_lists(model, n_groups, seed, apart):
    sizes, group = model
    drawn = random_groups(group, sizes, n_groups, seed, apart)
    pools = {matched: by_brute_force(group, sizes, matched, apart) for matched in DISTANCE}
    enough = min(n_groups, 39)
    wanted = next((name for name in pools if len(pools[name]) >= enough), max(pools, key=lambda name: len(pools[name])))
    pool = pools[wanted]
    if not n_groups or not pool:
        assert drawn == RandomGroups()
        return
    assert (drawn.matched, drawn.n_possible) == (wanted, len(pool))
    assert len(set(drawn.groups)) == len(drawn.groups)
    assert len(drawn.groups) == (len(pool) if n_groups >= 39 and len(pool) < 200 else min(n_groups, len(pool)))
    assert set(drawn.groups) <= pool
    assert drawn.complete == (len(drawn.groups) == len(pool))


@pytest.mark.parametrize(
    ("group", "shape", "n", "matched", "possible"),
    [
        # One head of a layer of eight: 7 there, 23 with the neighbours, 31 in all: the most that four layers have.
        ("1-3", (4, 8), 31, "all layers", 31),
        # Two heads of one layer: 8 choose 2 is 28; the neighbouring layers have 16 more heads.
        ("2-1,2-5", (6, 8), 39, "neighbouring layers", comb(24, 2) - 1),
        ("1-3,2-5", (4, 8), 63, "layers", 63),
        ("1-3,2-1,3-5", (4, 8), 39, "layers", 511),
        # All heads of a layer: some of their control lie in the neighbouring layers.
        ("1-0,1-1,1-2,1-3,1-4,1-5,1-6,1-7", (4, 8), 39, "neighbouring layers", comb(24, 8) - 1),
    ],
)
def test_layers_are_widened_until_39_exist_and_few_are_listed_whole(group, shape, n, matched, possible):
    drawn = random_groups(parse_heads(group), [shape[1]] * shape[0], 39)
    assert (len(drawn.groups), drawn.matched, drawn.n_possible) == (n, matched, possible)


def test_fewer_than_39_asked_for_need_no_more_layers():
    drawn = random_groups(parse_heads("1-3"), [8] * 4, 5)
    assert (len(drawn.groups), drawn.matched, drawn.n_possible, drawn.complete) == (5, "layers", 7, False)
    assert random_groups(parse_heads("1-3"), [8] * 4, 7).complete
    assert random_groups(parse_heads("1-3"), [8] * 4, 8).matched == "neighbouring layers"


@pytest.mark.parametrize("group", ["0-2", "1-1", "0-0,1-1", "1-0,1-1"])
@pytest.mark.parametrize("n_asked", [1, 5])
def test_every_group_is_drawn_equally_often(group, n_asked):
    sizes, n_seeds = (3, 2, 4), 1000
    counts = Counter(
        control for seed in range(n_seeds) for control in random_groups(parse_heads(group), sizes, n_asked, seed).groups
    )
    drawn = random_groups(parse_heads(group), sizes, n_asked, 0)
    expected = n_seeds * len(drawn.groups) / drawn.n_possible
    assert len(counts) == drawn.n_possible
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_the_seed_makes_the_draw():
    group, sizes = parse_heads("0-0,1-1"), (32, 32)
    drawn = random_groups(group, sizes, 5, seed=1).groups
    assert drawn != random_groups(group, sizes, 5, seed=2).groups
    # The order in which a search chose the heads is no part of it, and more groups begin with the same ones.
    assert random_groups(group[::-1], sizes, 39, seed=1).groups[:5] == drawn


def test_heads_that_fill_the_model_have_no_control():
    assert random_groups(parse_heads("0-0,0-1"), (2,), 39) == RandomGroups()
    assert random_groups(tuple(all_heads(2, 3)), (3, 3), 39) == RandomGroups()
    assert random_groups(parse_heads("0-0,0-1"), (2, 4), 39).n_possible == 14
    # More than half of the heads: most of a control's are the group's own.
    most = random_groups(parse_heads("0-0,0-1,0-2,1-0"), (4, 4), 5)
    assert (most.matched, most.n_possible) == ("layers", 15)


def test_layers_without_heads_are_no_neighbours():
    shapes = (SimpleNamespace(n_heads=4), None, SimpleNamespace(n_heads=8))
    sizes = Architecture.heads_by_layer.fget(SimpleNamespace(shapes=shapes))
    assert sizes == (4, 0, 8)
    drawn = random_groups(parse_heads("0-1"), sizes, 39)
    assert (drawn.matched, len(drawn.groups)) == ("neighbouring layers", 11)

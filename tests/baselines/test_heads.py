"""Methods that name heads: which heads, for which prompts, and what the organism answers without them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from baseline_samples import NEW_TOKENS, drawn, engine_on, inputs_of, made_up_material, material, organism

from safetyheads import SCALING_CONTRIBUTION, Head, InputError, KeywordJudge
from safetyheads.baselines import METHODS
from safetyheads.baselines import heads as methods
from safetyheads.baselines.direction import select_direction
from safetyheads.heads import parse_heads


def test_saharas_first_three_heads_are_the_plants_and_free_the_prompts():
    planted, harmful = set(organism().planted_heads), organism().harmful
    one, two, three = METHODS["sahara"].interventions(material(), (1, 2, 3))
    assert set(three.groups(harmful)[0]) == planted
    assert set(one.groups(harmful)[0]) < set(two.groups(harmful)[0]) < planted
    assert three.setting == "3 heads"
    assert three.n_parameters == 3 * 16 * 128
    result = three.answers(organism().engine, harmful[:16], KeywordJudge(), NEW_TOKENS)
    assert result.rate >= 0.9
    # The group that is named is the one that is ablated.
    assert {row.group for row in result.rows} == {three.groups(harmful)[0]}


def random_group(group, seed, monkeypatch):
    monkeypatch.setattr(methods, "found_group", lambda *_: group)
    (one,) = METHODS["random_heads"].interventions(replace(material(), seed=seed), (len(group),))
    return one.groups(organism().harmful)[0]


def test_random_heads_are_of_the_same_layers_and_drawn_by_the_seed(monkeypatch):
    planted = organism().planted_heads
    groups = {random_group(planted, seed, monkeypatch) for seed in range(4)}
    assert len(groups) > 1
    for group in groups:
        assert sorted(head.layer for head in group) == [1, 2, 2]
        assert not set(group) & set(planted)
    with pytest.raises(InputError, match="no others to draw"):
        random_group(tuple(Head(1, index) for index in range(8)), 0, monkeypatch)


def test_random_heads_where_layers_have_other_numbers_of_heads(monkeypatch):
    engine = material().engine
    first, *others = engine.architecture.shapes
    fewer = replace(engine.architecture, shapes=(replace(first, n_heads=2), *others))
    monkeypatch.setattr(engine, "architecture", fewer)
    heads = {head for seed in range(12) for head in random_group(parse_heads("0-1,1-0"), seed, monkeypatch)}
    assert {head for head in heads if head.layer == 0} == {Head(0, 0)}
    # The larger layer is drawn from whole, not from as many heads as the smaller one has.
    assert max(head.index for head in heads) > 2


def test_ships_gives_each_prompt_its_own_heads():
    (one,) = METHODS["ships_query"].interventions(material(), (1,))
    groups = one.groups(organism().harmful[:12])
    assert [len(group) for group in groups] == [1] * 12
    # Each plant is for one of three kinds of harm, so no one head is every prompt's first.
    assert len(set(groups)) > 1


def test_rdsha_zeroes_the_heads_that_stand_first_on_each_prompt():
    engine, prompts = organism().engine, organism().harmful[:6]
    direction = select_direction(material()).vector
    (two,) = METHODS["rdsha"].interventions(material(), (2,))
    assert two.setting.startswith("2 heads of each prompt")
    assert two.ablation == SCALING_CONTRIBUTION.at(0.0)
    for ids, group in zip(engine.ask(prompts).token_ids, two.groups(prompts), strict=True):
        by_hand = {}
        for layer in range(4):
            projection = engine.model.model.layers[layer].self_attn.o_proj
            z, weight = inputs_of(engine.model, [projection], ids)[projection][-1], projection.weight.detach()
            for head in range(8):
                part = slice(head * 16, head * 16 + 16)
                by_hand[Head(layer, head)] = abs(float(z[part].double() @ weight[:, part].T.double() @ direction))
        assert group == tuple(sorted(by_hand, key=lambda head: -by_hand[head])[:2])


def test_a_default_sweep_goes_as_far_as_the_model_has_heads(monkeypatch):
    monkeypatch.setattr(methods, "select_direction", lambda *_: SimpleNamespace(vector=drawn(), caveat=""))
    learned = made_up_material(engine_on("llama3"))  # 12 heads
    made = METHODS["rdsha"].interventions(learned, methods.RDSHA_SIZES)
    assert [one.strength for one in made] == [1, 2, 3, 5, 10]
    # A size that is asked for by itself is not left out in silence.
    with pytest.raises(InputError, match="size 20 is out of range: a group has 1 to 12 heads"):
        METHODS["rdsha"].interventions(learned, (1, 20))

"""Attention maps: the model's own weights, for every way of attending; how even they are, by hand; Fig 7 and 8."""

import copy
import math
from functools import cache

import pytest
import torch
from experiment_runs import PLANTED, rows
from families import built, oracle_of
from tiny_models import engine_of, tokenizer

from safetyheads import Ablation, Engine, Head
from safetyheads.ablation import ABLATION_KINDS
from safetyheads.experiments.attention_maps import AttentionMap, evenness, map_of
from safetyheads.model.loading import use_our_attention

PROMPT = (5, 9, 12, 40, 41, 8, 3, 22, 17, 30, 2)
EXACT = 1e-5
UNABLATED = Ablation("undifferentiated_attention", 1.0)
KINDS = [UNABLATED, *(Ablation(name, 0.5) for name in ABLATION_KINDS)]
# Keys of its own, shared keys, a window, QK-norm, softcap, sinks, two widths, values of another width, chunks.
ATTENDING = ("llama2", "llama3", "mistral", "qwen3", "gemma2", "gpt_oss", "gemma4", "deepseek_v3", "llama4")


@cache
def engine_on(name):
    model = copy.deepcopy(built(name))
    use_our_attention(model)
    return Engine(model, tokenizer(), name=name)


def head_of(engine):
    """A head of the second group of the last layer that has heads: its keys are not the first."""
    layer = engine.architecture.with_heads[-1]
    return Head(layer, engine.architecture.shapes[layer].n_heads - 1)


# Of the engine, every kind is proved on every family elsewhere.
CASES = [
    (name, kind)
    for name in ATTENDING
    for kind in KINDS
    if name in ("llama3", "gpt_oss") or kind.name in ("undifferentiated_attention", "mean_key")
]


@pytest.mark.parametrize(("name", "ablation"), CASES, ids=str)
def test_a_map_is_of_probabilities_and_times_the_values_what_the_head_passes_on(name, ablation):
    engine = engine_on(name)
    attention, head = map_of(engine, PROMPT, head_of(engine), ablation), head_of(engine)
    passed_on = attention.weights @ attention.values
    if ablation.name == "scaling_contribution":
        passed_on = passed_on * ablation.epsilon
    if ablation.name == "mean_head_output":  # of other heads too: the map is not what made it
        passed_on = oracle_of(name).run(PROMPT, [head], ablation).outputs[head.layer][:, head.index].double()
    assert float((passed_on - attention.output).abs().max()) < EXACT * max(1.0, float(attention.output.abs().max()))
    assert attention.weights.min() >= 0
    assert float(attention.weights[~attention.allowed].abs().max()) == 0.0
    sums = attention.weights.sum(dim=-1)
    if name == "gpt_oss":  # the rest is the sink's
        assert bool((sums < 1 - 1e-3).all())
        assert evenness(attention)[2] == pytest.approx(float((1 - sums[1:]).mean()))
    else:
        assert float((sums - 1).abs().max()) < EXACT
        assert evenness(attention)[2] < EXACT


@pytest.mark.parametrize("name", ATTENDING)
def test_maps_are_those_of_transformers_even_in_the_limit_and_kept_where_the_output_is_ablated(name):
    engine = engine_on(name)
    head = head_of(engine)
    before = map_of(engine, PROMPT, head, UNABLATED)
    with torch.no_grad():
        given = built(name)(input_ids=torch.tensor([PROMPT]), output_attentions=True, use_cache=False).attentions
    reference = given[head.layer][0, head.index, :, : len(PROMPT)].double()
    assert float((before.weights - reference).abs().max()) < EXACT
    at_zero = evenness(map_of(engine, PROMPT, head, Ablation("undifferentiated_attention", 0.0)))
    assert max(at_zero[:2]) < EXACT
    assert evenness(before)[0] > 1e-2
    for kind in ("scaling_contribution", "mean_head_output"):
        after = map_of(engine, PROMPT, head, Ablation(kind, 1e-3))
        assert torch.equal(after.weights, before.weights)
        assert not torch.equal(after.output, before.output)


def test_evenness_by_hand_and_a_window_is_seen_in_the_allowed_keys():
    windowed = map_of(engine_of("mistral_window"), PROMPT, Head(1, 0), UNABLATED).allowed
    assert windowed.sum(dim=-1).tolist() == [1, 2, 3, 4] + [5] * (len(PROMPT) - 4)
    allowed = torch.ones(3, 3, dtype=torch.bool).tril()
    weights = torch.tensor([[1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0]], dtype=torch.float64)
    nothing = torch.zeros(3, 1, dtype=torch.float64)
    kl = (0.75 * math.log(1.5) + 0.25 * math.log(0.5) + math.log(1.5)) / 2
    for share in (1.0, 0.5):  # a sink has the rest
        measured = evenness(AttentionMap(weights * share, allowed, nothing, nothing))
        assert measured == pytest.approx(((0.25 + 1 / 3) / 2, kl, 1 - share, 2))


def test_the_map_of_a_planted_head_is_even_in_the_limit_and_stays_under_sc(outcome_of):
    outcome = outcome_of("fig7")
    (figure,) = outcome["figures"]
    assert figure["title"].split()[-1] in PLANTED["aligned_a"]
    distance = {row["ablation"]: row["total_variation"]["value"] for row in rows(outcome)}
    assert distance["unablated"] > distance["UA on query, epsilon 0.5"] > distance["UA on query, epsilon 0.001"]
    assert distance["UA on query, epsilon 1e-10"] < 1e-6
    for row in rows(outcome):
        if row["ablation"].startswith("SC"):
            assert row["total_variation"]["value"] == distance["unablated"]
            assert row["output"] == pytest.approx(float(row["ablation"].split()[-1]), rel=1e-4)


def test_mean_ablation_moves_the_map_but_for_the_output(outcome_of):
    outcome = outcome_of("fig8")
    moved = {row["ablation"]: row["moved"]["value"] for row in rows(outcome)}
    assert moved["unablated"] == moved["mean head output"] == 0.0
    assert min(moved["mean query"], moved["mean key"]) > 0.01
    assert moved["mean query"] != moved["mean key"]
    (figure,) = outcome["figures"]
    assert all(point["key"] <= point["query"] for point in figure["points"])
    assert {point["panel"] for point in figure["points"]} == set(moved)

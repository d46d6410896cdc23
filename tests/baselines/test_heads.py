"""Methods that name heads: what heads write against explicit slices of W_O, rankings by hand, and the organism."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from baseline_samples import made_up_material
from families import FAMILIES, built, proved
from head_material import N_TOKENS, figures, material, organism, short
from tiny_models import engine_of, prompts_of, tokenizer
from torch import nn

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Engine,
    Head,
    InputError,
    KeywordJudge,
    SafetyheadsError,
    UnsupportedModelError,
)
from safetyheads.baselines import heads as methods
from safetyheads.baselines.attributions import (
    FrozenNorm,
    compared,
    logit_attributions,
    output_norms,
    patching_attributions,
    refusal_contrast,
    refusal_projections,
)
from safetyheads.baselines.direction import TABLES_RULES, select_direction
from safetyheads.baselines.outputs import head_readings, norms, output_weight, projections
from safetyheads.baselines.parameters import head_parameters, most_head_parameters
from safetyheads.heads import parse_heads
from safetyheads.measures.head_pass import HeadPass, Readouts
from safetyheads.model.loading import use_our_attention
from safetyheads.model.planning import TokenSequence

# Of the largest value: float32 states by packed rows against one prompt at a time.
FLOAT32 = 1e-5
PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 7, 19), (33, 2))
OPENERS = (17, 30)
# Where a layer's attention and its last projection are, by the family's own names; the engine's facts are not asked.
PLACES = {
    "gpt2": ("transformer.h.{}.attn", "c_proj"),
    "gpt_neox": ("gpt_neox.layers.{}.attention", "dense"),
    "opt": ("model.decoder.layers.{}.self_attn", "out_proj"),
    "phi": ("model.layers.{}.self_attn", "dense"),
    "lfm2": ("model.layers.{}.self_attn", "out_proj"),
}
NAMES = (
    "llama2", "llama3", "qwen3", "gpt2", "gpt_neox", "opt", "phi", "gpt_oss", "gemma4", "deepseek_v3", "qwen3_next",
    "granite_hybrid", "lfm2",
)  # fmt: skip
"""MHA, GQA, wide heads, Conv1D, fused, biases on W_O, layers of other widths, another value width, hybrids."""
N_HEADS = 4


class Written:
    """The slow twin: what each head writes at the last token, one prompt at a time, by slices of W_O."""

    def __init__(self, name):
        self.model = built(name)
        path, projection = PLACES.get(name, ("model.layers.{}.self_attn", "o_proj"))
        self.outputs, self.blocks, self.states = {}, {}, []
        found = {}
        for layer in range(self.model.config.num_hidden_layers):
            if layer not in FAMILIES[name].without_heads:
                attention = self.model.get_submodule(path.format(layer))
                found[layer] = attention, attention.get_submodule(projection)
        for prompt, ids in enumerate(PROMPTS):
            for layer, (attention, projection) in found.items():
                z, block = self._run(ids, attention, projection)
                self.blocks[prompt, layer] = block - (0 if projection.bias is None else projection.bias)
                width = len(z) // N_HEADS
                for head in range(N_HEADS):
                    here = slice(head * width, (head + 1) * width)
                    weight = projection.weight
                    sliced = weight[:, here].T if isinstance(projection, nn.Linear) else weight[here]
                    self.outputs[prompt, layer, head] = (z[here].double() @ sliced.double()).detach()

    @torch.no_grad()
    def _run(self, ids, attention, projection):
        seen = {}

        def given(_, inputs):
            seen["z"] = inputs[0].flatten(0, -2)[-1]

        def gives(_, __, output):
            seen["block"] = (output[0] if isinstance(output, tuple) else output).flatten(0, -2)[-1]

        hooks = projection.register_forward_pre_hook(given), attention.register_forward_hook(gives)
        self.model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen["z"], seen["block"]

    def table(self, number, engine):
        """A number of each O_h as [n_prompts, n_layers, n_heads]."""
        values = torch.full((len(PROMPTS), engine.n_layers, engine.n_heads), torch.nan, dtype=torch.float64)
        for (prompt, layer, head), output in self.outputs.items():
            values[prompt, layer, head] = number(output)
        return values


def drawn(width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def hooks_of(model):
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


def close(found, wanted, tolerance=FLOAT32):
    assert torch.equal(found.isnan(), wanted.isnan())
    error = (found - wanted).abs().nan_to_num().max() / wanted.abs().nan_to_num().max()
    assert error < tolerance, float(error)


@pytest.mark.parametrize("name", NAMES)
def test_what_heads_write_is_what_slices_of_their_projection_give(name):
    engine, slow, direction = proved(name), Written(name), drawn()
    prompts = prompts_of(*PROMPTS)
    close(norms(engine, prompts), slow.table(torch.linalg.norm, engine))
    close(projections(engine, prompts, direction), slow.table(direction.dot, engine))


@pytest.mark.parametrize("name", NAMES)
def test_what_heads_write_sums_to_the_output_of_their_attention_block(name):
    engine, slow, written = proved(name), Written(name), {}

    def read(layer, outputs):
        parts = torch.einsum("phv,hvd->phd", outputs, output_weight(engine, layer))
        written.setdefault(layer, []).extend(parts.sum(dim=1))
        return outputs.new_zeros(outputs.shape[:2])

    head_readings(engine, prompts_of(*PROMPTS), read)
    assert set(written) == set(engine.architecture.with_heads)
    for (prompt, layer), block in slow.blocks.items():
        close(written[layer][prompt], block, 2e-5)


def test_a_projection_that_is_no_plain_layer_is_asked_by_unit_vectors():
    class Other(nn.Linear):
        """As quantised layers are: of another class."""

    engine = engine_of("llama_gqa")
    plain = output_weight(engine, 1)
    attention = engine.model.model.layers[1].self_attn
    other = Other(32, 32)
    other.weight = attention.o_proj.weight
    attention.o_proj = other
    again = Engine(engine.model, tokenizer())
    torch.testing.assert_close(output_weight(again, 1), plain, rtol=1e-6, atol=1e-6)


def test_a_model_whose_output_projections_are_unknown_is_refused():
    engine = engine_of("llama_mha")
    engine.architecture = replace(engine.architecture, output_projections=(None, None, None))
    with pytest.raises(UnsupportedModelError, match="output projection of layer 0"):
        norms(engine, prompts_of(*PROMPTS))


def test_projections_on_a_direction_are_ranked_by_prompt_as_by_hand():
    engine, slow, direction = proved("llama3"), Written("llama3"), drawn()
    scores = refusal_projections(engine, prompts_of(*PROMPTS), direction)
    for prompt in range(len(PROMPTS)):
        by_hand = {
            Head(layer, head): abs(float(output @ direction)) / float(direction.norm())
            for (number, layer, head), output in slow.outputs.items()
            if number == prompt
        }
        assert scores.top_of_prompt(prompt, 12) == tuple(sorted(by_hand, key=lambda head: -by_hand[head]))
    # The direction's length and sign are no part of it.
    close(refusal_projections(engine, prompts_of(*PROMPTS), -5 * direction).values, scores.values, 1e-12)


def test_the_contrast_is_the_difference_of_signed_means():
    engine, direction = proved("llama3"), drawn()
    harmful, benign = prompts_of(*PROMPTS[:2]), prompts_of(PROMPTS[2])
    signed = refusal_projections(engine, prompts_of(*PROMPTS), direction, signed=True).values
    wanted = signed[:2].mean(dim=0) - signed[2]
    close(refusal_contrast(engine, harmful, benign, direction).values, wanted)


@pytest.mark.parametrize("name", ["llama2", "gemma", "gemma2", "gpt2", "cohere2", "olmo2"])
def test_the_frozen_norm_is_the_norm(name):
    engine = proved(name)
    norm, states = FrozenNorm.of(engine), torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 3
    given = states.double() - (states.double().mean(dim=-1, keepdim=True) if norm.centres else 0)
    by_hand = norm.gain * given * norm.scales(engine, states)[:, None] + norm.offset
    close(by_hand, engine.normed(states).double(), 2e-6)
    assert norm.centres == (name in ("gpt2", "cohere2"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_logit_attribution_by_hand(name):
    engine, slow = proved(name), Written(name)
    model, norm = slow.model, slow.model.get_submodule(FAMILIES[name].norm)
    seen = []
    hook = norm.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1].double()))
    for ids in PROMPTS:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    unembedding, weight = model.get_output_embeddings().weight.double(), norm.weight.double()

    def attribution(prompt, output):
        if name == "gpt2":
            scale = (seen[prompt].var(unbiased=False) + norm.eps).rsqrt()
            normed = weight * (output - output.mean()) * scale
        else:
            normed = weight * output * (seen[prompt].square().mean() + norm.variance_epsilon).rsqrt()
        logits = unembedding @ normed
        return logits[list(OPENERS)].mean() - logits.mean()

    wanted = slow.table(torch.linalg.norm, engine)
    for (prompt, layer, head), output in slow.outputs.items():
        wanted[prompt, layer, head] = attribution(prompt, output)
    close(logit_attributions(engine, prompts_of(*PROMPTS), OPENERS).values, wanted)


def test_attribution_patching_is_the_slope_of_the_log_odds():
    engine, prompts = proved("llama3"), prompts_of(*PROMPTS)
    found = patching_attributions(engine, prompts, OPENERS, SCALING_CONTRIBUTION.at(0.0)).values
    # Scaling outputs by 1 -+ step goes that share of the way that zeroing goes, to either side.
    sequences, step = tuple(TokenSequence(ids) for ids in PROMPTS), 0.02
    sides = []
    for epsilon in (1 - step, 1 + step):
        measuring = HeadPass(engine, sequences, SCALING_CONTRIBUTION.at(epsilon), Readouts(openers=OPENERS))
        values = measuring.measure([(head,) for head in engine.heads])["refusal_score"]
        sides.append(measuring.table("refusal_score", values).values)
    # Rounding of float32 logits over the step, and the third order of the slope.
    close(found, (sides[0] - sides[1]) / (2 * step), 2e-3)


def test_attributions_need_openers_and_one_residual_stream():
    prompts = prompts_of(*PROMPTS)
    for attribute in (logit_attributions, patching_attributions):
        with pytest.raises(InputError, match="first tokens"):
            attribute(proved("llama3"), prompts, ())
    with pytest.raises(UnsupportedModelError, match="several residual streams"):
        logit_attributions(proved("gemma3n"), prompts, OPENERS)
    with pytest.raises(UnsupportedModelError, match="several residual streams"):
        refusal_projections(proved("gemma3n"), prompts, drawn())


def test_nothing_is_read_while_heads_are_ablated():
    engine = engine_of("llama_mha")
    hooks = hooks_of(engine.model)
    with (
        engine.ablated((Head(0, 0),), UNDIFFERENTIATED_ATTENTION),
        pytest.raises(SafetyheadsError, match="already ablated"),
    ):
        output_norms(engine, prompts_of(*PROMPTS))
    assert hooks_of(engine.model) == hooks


# d_model 32, four heads of width 8 (16, 12 for queries of a latent of 16, values of 6).
@pytest.mark.parametrize(
    ("name", "ua", "sc"),
    [
        ("llama2", 8 * 32, 8 * 32),
        ("llama3", 8 * 32, 8 * 32),
        ("qwen2", 8 * 33, 8 * 32),
        ("qwen3", 16 * 32, 16 * 32),
        ("gpt2", 8 * 33, 8 * 32),
        ("gpt_neox", 8 * 33, 8 * 32),
        ("phi3", 8 * 32, 8 * 32),
        ("deepseek_v3", 12 * 16, 6 * 32),
    ],
)
def test_parameters_of_a_head_are_counted_by_its_layers_shapes(name, ua, sc):
    engine, group = proved(name), (Head(0, 1), Head(1, 0))
    assert head_parameters(engine, group, UNDIFFERENTIATED_ATTENTION) == 2 * ua
    assert head_parameters(engine, group, SCALING_CONTRIBUTION) == 2 * sc
    assert most_head_parameters(engine, 2, SCALING_CONTRIBUTION) == 2 * sc


def test_layers_of_other_widths_count_as_they_are():
    engine = proved("gemma4")  # heads of 8 in sliding layers, of 16 in full ones
    assert head_parameters(engine, (Head(0, 0),), SCALING_CONTRIBUTION) == 8 * 32
    assert head_parameters(engine, (Head(1, 0),), SCALING_CONTRIBUTION) == 16 * 32
    assert most_head_parameters(engine, 9, SCALING_CONTRIBUTION) == (8 * 16 + 8) * 32
    with pytest.raises(InputError, match="layer 0 has no such head"):
        head_parameters(proved("lfm2"), (Head(0, 0),), SCALING_CONTRIBUTION)


# The organism


def test_saharas_first_three_heads_are_the_plants_and_free_the_prompts():
    engine, planted = organism().engine, set(organism().planted_heads)
    one, two, three = methods.SAHARA.interventions(material(), (1, 2, 3))
    assert set(three.groups(organism().harmful)[0]) == planted
    assert set(one.groups(organism().harmful)[0]) < set(two.groups(organism().harmful)[0]) < planted
    assert three.setting == "3 heads"
    assert three.n_parameters == 3 * 16 * 128
    assert three.answers(engine, organism().harmful[:16], KeywordJudge(), N_TOKENS).rate >= 0.9


def test_random_heads_are_of_the_same_layers_and_drawn_by_the_seed():
    drawn_groups = set()
    for seed in range(4):
        (one,) = methods.random_interventions(replace(material(), seed=seed), (3,), organism().planted_heads)
        group = one.groups(organism().harmful)[0]
        assert sorted(head.layer for head in group) == [1, 2, 2]
        assert not set(group) & set(organism().planted_heads)
        drawn_groups.add(group)
    assert len(drawn_groups) > 1
    with pytest.raises(InputError, match="no others to draw"):
        methods.random_interventions(material(), (8,), tuple(Head(1, index) for index in range(8)))


def test_ships_gives_each_prompt_its_own_heads():
    (one,) = methods.SHIPS_QUERY.interventions(material(), (1,))
    prompts = organism().harmful[:12]
    groups = one.groups(prompts)
    assert len(groups) == 12
    assert {len(group) for group in groups} == {1}
    # Each plant is for one of three kinds of harm, so no one head is every prompt's first.
    assert len(set(groups)) > 1


def test_rdsha_zeroes_the_heads_that_stand_first_on_each_prompt():
    engine, prompts = organism().engine, organism().harmful[:6]
    direction = select_direction(material(), TABLES_RULES).vector
    (two,) = methods.RDSHA.interventions(material(), (2,))
    model, groups = engine.model, two.groups(prompts)
    assert two.ablation == SCALING_CONTRIBUTION.at(0.0)
    for ids, group in zip(engine.ask(prompts).token_ids, groups, strict=True):
        by_hand = {}
        for layer in range(4):
            projection, seen = model.model.layers[layer].self_attn.o_proj, []
            hook = projection.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0][0, -1]))
            with torch.no_grad():
                model(input_ids=torch.tensor([ids]))
            hook.remove()
            for head in range(8):
                here = slice(head * 16, head * 16 + 16)
                output = seen[0][here].double() @ projection.weight[:, here].T.double()
                by_hand[Head(layer, head)] = abs(float(output.detach() @ direction))
        assert group == tuple(sorted(by_hand, key=lambda head: -by_hand[head])[:2])


def test_sizes_are_whole_numbers_of_heads_there_are():
    for method in (methods.SAHARA, methods.RDSHA, methods.OUTPUT_NORM, methods.LOGIT_ATTRIBUTION):
        for strength in (0, 1.5, 33):
            with pytest.raises(InputError, match="a group has 1 to 32 heads"):
                method.interventions(material(), (strength,))


def test_a_default_sweep_goes_as_far_as_the_model_has_heads(monkeypatch):
    engine = proved("llama3")  # 12 heads
    monkeypatch.setattr(methods, "select_direction", lambda *_: SimpleNamespace(vector=drawn(), caveat=""))
    learned = made_up_material(engine)
    for method in (methods.RDSHA, methods.OUTPUT_NORM):
        made = method.interventions(learned, methods.RDSHA_SIZES)
        assert [one.strength for one in made] == [1, 2, 3, 5, 10], method.name
    # What is asked for by itself is not left out in silence.
    with pytest.raises(InputError, match="size 20 is out of range: a group has 1 to 12 heads"):
        methods.OUTPUT_NORM.interventions(learned, (1, 20))


def test_random_heads_where_layers_have_other_numbers_of_heads(monkeypatch):
    engine = material().engine
    first, *others = engine.architecture.shapes
    fewer = replace(engine.architecture, shapes=(replace(first, n_heads=2), *others))
    monkeypatch.setattr(engine, "architecture", fewer)
    drawn_heads = set()
    for seed in range(12):
        (one,) = methods.random_interventions(replace(material(), seed=seed), (2,), parse_heads("0-1,1-0"))
        drawn_heads |= set(one.groups(organism().harmful)[0])
    assert {head for head in drawn_heads if head.layer == 0} == {Head(0, 0)}
    # The larger layer is drawn from whole, not from as many heads as the smaller one has.
    assert max(head.index for head in drawn_heads) > 2


def test_every_ranking_is_given_and_compared():
    """Nothing is asserted of where rankings other than mean Ships put the plants: the construction implies nothing."""
    tables = methods.rankings(material())
    agreements = methods.agreements(tables)
    assert set(agreements) == set(tables) - {"mean_ships"}
    assert set(tables["mean_ships"].top(3)) == set(organism().planted_heads)
    assert all(len(scores.ranked()) == 32 for scores in tables.values())
    assert all(-1 <= agreement.spearman <= 1 for agreement in agreements.values())
    assert compared(tables["rdsha"], tables["rdsha"]).spearman == pytest.approx(1.0)
    # By their absolute values the signed projections would be ranked as RDSHA does, prompt by prompt.
    torch.testing.assert_close(tables["rdsha_signed"].values.abs(), tables["rdsha"].values)


def test_every_method_that_names_heads_answers_and_says_what_it_touches():
    named = [value for name, value in vars(methods).items() if name.isupper() and type(value).__name__ == "Method"]
    assert len({method.name for method in named}) == len(named) == 7
    for method in named:
        ((setting, rate, kept, touched),) = figures(method, short(), n=4, strengths=(2,))
        assert setting.startswith("2 heads"), method.name
        assert touched == 2 * 16 * 128
        assert 0 <= min(rate, kept) <= max(rate, kept) <= 1


def test_the_group_that_is_named_is_the_one_that_is_ablated():
    (one,) = methods.random_interventions(material(), (1,), parse_heads("2-5"))
    result = one.answers(organism().engine, organism().harmful[:4], KeywordJudge(), N_TOKENS)
    assert {row.group for row in result.rows} == {one.groups(organism().harmful)[0]}


def test_rankings_leave_the_model_as_it_was():
    model = copy.deepcopy(built("llama3"))
    use_our_attention(model)
    engine = Engine(model, tokenizer())
    before, hooks = {name: parameter.clone() for name, parameter in model.named_parameters()}, hooks_of(model)
    output_norms(engine, prompts_of(*PROMPTS))
    logit_attributions(engine, prompts_of(*PROMPTS), OPENERS)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert hooks_of(model) == hooks

"""Methods that name heads: which heads, for which prompts; and what heads write against explicit slices of W_O."""

from dataclasses import replace

import pytest
import torch
from baseline_samples import (
    NEW_TOKENS,
    close,
    drawn,
    engine_on,
    inputs_of,
    material,
    organism,
)
from families import FAMILIES, built, proved
from tiny_models import prompts_of
from torch import nn

from safetyheads import (
    SCALING_CONTRIBUTION,
    UNDIFFERENTIATED_ATTENTION,
    Head,
    InputError,
    KeywordJudge,
    ships,
)
from safetyheads.baselines import METHODS
from safetyheads.baselines import heads as methods
from safetyheads.baselines.direction import select_direction
from safetyheads.baselines.heads import final_norm, logit_attributions, output_weight, projections, refusal_projections

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


def test_saharas_first_three_heads_are_the_plants_and_free_the_prompts():
    planted, harmful = set(organism().planted_heads), organism().harmful
    one, two, three = METHODS["sahara"].interventions(material(), (1, 2, 3))
    assert set(three.groups(harmful)[0]) == planted
    assert set(one.groups(harmful)[0]) < set(two.groups(harmful)[0]) < planted
    result = three.answers(organism().engine, harmful[:16], KeywordJudge(), NEW_TOKENS)
    assert result.rate >= 0.9
    assert {row.group for row in result.rows} == {three.groups(harmful)[0]}


def test_random_heads_are_of_the_same_layers_and_drawn_by_the_seed(monkeypatch):
    planted = organism().planted_heads

    def drawn_groups(group, seed=0):
        monkeypatch.setattr(methods, "found_group", lambda *_: group)
        drawn = METHODS["random_heads"].interventions(replace(material(), seed=seed), (len(group),))
        return drawn[0].groups(organism().harmful)[0]

    groups = {drawn_groups(planted, seed) for seed in range(4)}
    assert len(groups) > 1
    for group in groups:
        assert sorted(head.layer for head in group) == [1, 2, 2]
        assert not set(group) & set(planted)
    # All heads of a layer are controlled by heads of its neighbours; all heads by none.
    assert {head.layer for head in drawn_groups(tuple(Head(1, index) for index in range(8)))} <= {0, 2}
    with pytest.raises(InputError, match="too few other heads"):
        drawn_groups(tuple(Head(layer, index) for layer in range(4) for index in range(8)))


def test_ships_and_rdsha_rank_each_prompts_own_heads():
    engine, prompts = organism().engine, organism().harmful[:12]
    by_projection = refusal_projections(engine, prompts, select_direction(material()).vector)
    for name, scores, ablation in (
        ("ships_query", ships(engine, prompts, UNDIFFERENTIATED_ATTENTION), UNDIFFERENTIATED_ATTENTION),
        ("rdsha", by_projection, SCALING_CONTRIBUTION.at(0.0)),
    ):
        (two,) = METHODS[name].interventions(material(), (2,))
        assert (two.setting[:22], two.ablation) == ("2 heads of each prompt", ablation)
        groups = two.groups(prompts)
        assert groups == tuple(scores.top_of_prompt(prompt, 2) for prompt in range(12))
        # Each plant is for one of three kinds of harm, so no heads are every prompt's first.
        assert len(set(groups)) > 1


def written(name):
    """The slow twin, by slices of W_O: what each head writes at the last token, and what its block does, less bias."""
    model, (path, projection) = built(name), PLACES.get(name, ("model.layers.{}.self_attn", "o_proj"))
    blocks = torch.full((len(PROMPTS), model.config.num_hidden_layers, 32), torch.nan, dtype=torch.float64)
    outputs = blocks[:, :, None].repeat(1, 1, N_HEADS, 1)  # [n_prompts, n_layers, n_heads, d_model]
    for layer in set(range(blocks.shape[1])) - set(FAMILIES[name].without_heads):
        attention = model.get_submodule(path.format(layer))
        module, whole = attention.get_submodule(projection), []
        weight = module.weight.detach().double()
        by_input = weight.T if isinstance(module, nn.Linear) else weight
        for prompt, ids in enumerate(PROMPTS):
            handle = attention.register_forward_hook(lambda _, __, output, whole=whole: whole.append(output))
            z = inputs_of(model, [module], ids)[module][-1].double()
            handle.remove()
            block = (whole[-1][0] if isinstance(whole[-1], tuple) else whole[-1]).flatten(0, -2)[-1]
            blocks[prompt, layer] = block - (0 if module.bias is None else module.bias.detach())
            for head, (part, rows) in enumerate(zip(z.chunk(N_HEADS), by_input.chunk(N_HEADS), strict=True)):
                outputs[prompt, layer, head] = part @ rows
    return outputs, blocks


@pytest.mark.parametrize("name", NAMES)
def test_what_heads_write_is_what_slices_of_their_projection_give_and_sums_to_their_block(name):
    (outputs, blocks), direction = written(name), drawn()
    found = projections(proved(name), prompts_of(*PROMPTS), direction)
    close(found, outputs @ direction)
    # The direction's length and sign are no part of RDSHA's score.
    scores = refusal_projections(proved(name), prompts_of(*PROMPTS), -5 * direction)
    close(scores.values, (outputs @ direction).abs() / direction.norm())
    errors = (found.nansum(dim=-1) - (blocks @ direction).nan_to_num()).abs()
    assert (errors <= 4e-5 * found.nan_to_num().abs().amax(dim=-1)).all()


def test_a_projection_that_is_no_plain_layer_is_asked_by_unit_vectors():
    engine = engine_on("llama3")
    plain, projection = output_weight(engine, 1), engine.model.model.layers[1].self_attn.o_proj
    projection.__class__ = type("Quantised", (nn.Linear,), {})
    torch.testing.assert_close(output_weight(engine, 1), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama2", "gemma", "gpt2", "cohere2", "olmo2"])
def test_the_frozen_norm_is_the_norm(name):
    engine, states = proved(name), torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 3
    (gain, offset, centres), normed = final_norm(engine), engine.normed(states).double()
    given = states.double() - (states.double().mean(dim=-1, keepdim=True) if centres else 0)
    close(gain * given / given.square().mean(dim=-1, keepdim=True).sqrt() + offset, normed, 2e-6)
    assert centres == (name in ("gpt2", "cohere2"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_logit_attribution_by_hand(name):
    outputs, model = written(name)[0], built(name)
    norm = model.get_submodule(FAMILIES[name].norm)
    states = torch.stack([inputs_of(model, [norm], ids)[norm][-1].double() for ids in PROMPTS])
    if name == "gpt2":
        outputs, states = (each - each.mean(dim=-1, keepdim=True) for each in (outputs, states))
    epsilon = norm.eps if name == "gpt2" else norm.variance_epsilon
    scales = (states.square().mean(dim=-1) + epsilon).rsqrt()
    logits = (norm.weight * outputs * scales[:, None, None, None]) @ model.get_output_embeddings().weight.double().T
    wanted = logits[..., list(OPENERS)].mean(dim=-1) - logits.mean(dim=-1)
    close(logit_attributions(proved(name), prompts_of(*PROMPTS), OPENERS).values, wanted)

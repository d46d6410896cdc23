"""What heads write against explicit slices of W_O, one prompt at a time, and the attributions by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baseline_samples import close, drawn, engine_on, inputs_of, state_of
from families import FAMILIES, built, proved
from tiny_models import engine_of, prompts_of, tokenizer
from torch import nn

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, Head, InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.baselines.head_attributions import (
    final_norm,
    logit_attributions,
    norm_scales,
    output_weight,
    projections,
    refusal_projections,
)

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


def written(name):
    """The slow twin, by slices of W_O: what each head writes at the last token, and what its block does, less bias."""
    model, (path, projection) = built(name), PLACES.get(name, ("model.layers.{}.self_attn", "o_proj"))
    outputs, blocks = {}, {}
    for layer in set(range(model.config.num_hidden_layers)) - set(FAMILIES[name].without_heads):
        attention = model.get_submodule(path.format(layer))
        module = attention.get_submodule(projection)
        weight = module.weight.detach().double()
        by_input = weight.T if isinstance(module, nn.Linear) else weight
        for prompt, ids in enumerate(PROMPTS):
            whole = []
            handle = attention.register_forward_hook(lambda _, __, output, whole=whole: whole.append(output))
            z = inputs_of(model, [module], ids)[module][-1].double()
            handle.remove()
            block = (whole[0][0] if isinstance(whole[0], tuple) else whole[0]).flatten(0, -2)[-1]
            blocks[prompt, layer] = block.double() - (0 if module.bias is None else module.bias.detach().double())
            width = len(z) // N_HEADS
            for head in range(N_HEADS):
                part = slice(head * width, (head + 1) * width)
                outputs[prompt, layer, head] = z[part] @ by_input[part]
    return outputs, blocks


def table(outputs, number, engine):
    """A number of each O_h as [n_prompts, n_layers, n_heads]."""
    values = torch.full((len(PROMPTS), engine.n_layers, engine.n_heads), torch.nan, dtype=torch.float64)
    for place, output in outputs.items():
        values[place] = number(output)
    return values


@pytest.mark.parametrize("name", NAMES)
def test_what_heads_write_is_what_slices_of_their_projection_give_and_sums_to_their_block(name):
    engine, (outputs, blocks), direction = proved(name), written(name), drawn()
    found = projections(engine, prompts_of(*PROMPTS), direction)
    close(found, table(outputs, direction.dot, engine))
    for (prompt, layer), block in blocks.items():
        largest = float(found[prompt, layer].nan_to_num().abs().max())
        assert float(found[prompt, layer].nansum() - block @ direction) == pytest.approx(0, abs=4e-5 * largest)


def test_a_projection_that_is_no_plain_layer_is_asked_by_unit_vectors():
    class Other(nn.Linear):
        """As quantised layers are: of another class."""

    engine = engine_of("llama_gqa")
    plain, attention = output_weight(engine, 1), engine.model.model.layers[1].self_attn
    other = Other(32, 32)
    other.weight = attention.o_proj.weight
    attention.o_proj = other
    again = Engine(engine.model, tokenizer())
    torch.testing.assert_close(output_weight(again, 1), plain, rtol=1e-6, atol=1e-6)


def test_refusal_projections_are_ranked_by_prompt_as_by_hand():
    engine, direction = proved("llama3"), drawn()
    scores = refusal_projections(engine, prompts_of(*PROMPTS), direction)
    by_hand = table(written("llama3")[0], lambda output: abs(output @ direction) / direction.norm(), engine)
    close(scores.values, by_hand)
    for prompt in range(len(PROMPTS)):
        order = by_hand[prompt].flatten().argsort(descending=True).tolist()
        assert scores.top_of_prompt(prompt, 12) == tuple(Head(at // N_HEADS, at % N_HEADS) for at in order)
    # The direction's length and sign are no part of it.
    close(refusal_projections(engine, prompts_of(*PROMPTS), -5 * direction).values, scores.values, 1e-12)


@pytest.mark.parametrize("name", ["llama2", "gemma", "gpt2", "cohere2", "olmo2"])
def test_the_frozen_norm_is_the_norm(name):
    engine = proved(name)
    states, (gain, offset, centres) = (
        torch.randn(5, 32, generator=torch.Generator().manual_seed(1)) * 3,
        final_norm(engine),
    )
    normed = engine.normed(states).double()
    given = states.double() - (states.double().mean(dim=-1, keepdim=True) if centres else 0)
    close(gain * given * norm_scales(normed - offset, gain * given)[:, None] + offset, normed, 2e-6)
    assert centres == (name in ("gpt2", "cohere2"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_logit_attribution_by_hand(name):
    engine, (outputs, _), model = proved(name), written(name), built(name)
    norm = model.get_submodule(FAMILIES[name].norm)
    unembedding, weight = model.get_output_embeddings().weight.double(), norm.weight.double()
    wanted = table(outputs, torch.linalg.norm, engine)
    for (prompt, layer, head), output in outputs.items():
        state = inputs_of(model, [norm], PROMPTS[prompt])[norm][-1].double()
        if name == "gpt2":
            normed = weight * (output - output.mean()) * (state.var(unbiased=False) + norm.eps).rsqrt()
        else:
            normed = weight * output * (state.square().mean() + norm.variance_epsilon).rsqrt()
        logits = unembedding @ normed
        wanted[prompt, layer, head] = logits[list(OPENERS)].mean() - logits.mean()
    close(logit_attributions(engine, prompts_of(*PROMPTS), OPENERS).values, wanted)


def test_what_cannot_be_attributed_is_refused_and_the_model_left_as_it_was():
    prompts, engine = prompts_of(*PROMPTS), engine_of("llama_mha")
    before = state_of(engine)
    with pytest.raises(InputError, match="first tokens"):
        logit_attributions(engine, prompts, ())
    for attribute, told in ((logit_attributions, OPENERS), (refusal_projections, drawn())):
        with pytest.raises(UnsupportedModelError, match="several residual streams"):
            attribute(engine_on("gemma3n"), prompts, told)
    with (
        engine.ablated((Head(0, 0),), UNDIFFERENTIATED_ATTENTION),
        pytest.raises(SafetyheadsError, match="already ablated"),
    ):
        projections(engine, prompts, drawn())
    logit_attributions(engine, prompts, OPENERS)
    assert state_of(engine) == before
    facts = replace(engine.architecture, output_projections=(None, None, None))
    with pytest.raises(UnsupportedModelError, match="output projection of layer 0"):
        projections(Engine(engine.model, engine.tokenizer, architecture=facts), prompts, drawn())

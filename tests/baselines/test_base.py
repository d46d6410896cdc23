"""Material as text, and counts of parameters by arithmetic on the shapes."""

from dataclasses import replace

import pytest
import torch
from baseline_samples import PROMPTS, close, engine_on, logits_of, made_up_material
from families import FAMILIES, built, proved
from tiny_models import engine_of, prompts_of

from safetyheads import SCALING_CONTRIBUTION, UNDIFFERENTIATED_ATTENTION, Head, InputError
from safetyheads.baselines.base import (
    head_parameters,
    most_head_parameters,
    refusal_log_odds,
    writing_parameters,
)


def test_text_counts_the_tokens_of_answers_alone_or_with_their_prompts():
    material = made_up_material(engine_of("llama_gqa"))
    whole, answers = (material.text(refused=True, whole=whole) for whole in (True, False))
    assert [s.n_wanted for s in answers] == [3, 4, 1]
    assert [s.n_wanted for s in whole] == [len(s.token_ids) for s in whole] == [12, 8, 7]
    with pytest.raises(InputError, match="2 answers for the 3 prompts"):
        replace(material, refusals=material.refusals[:2]).text(refused=True, whole=True)
    with pytest.raises(InputError, match="are empty"):
        replace(material, answers=((), (), ())).text(refused=False)


def test_refusal_log_odds_are_the_definitions():
    engine = engine_of("llama_gqa")
    logits = torch.stack([logits_of(engine.model, ids)[-1] for ids in PROMPTS])
    p = logits.double().softmax(dim=-1)[:, [14, 20]].sum(dim=-1)
    close(refusal_log_odds(engine, prompts_of(*PROMPTS), (14, 20)), torch.log(p / (1 - p)))


# d_model 32, four heads of width 8 (16, 12 for queries of a latent of 16, values of 6).
@pytest.mark.parametrize(
    ("name", "ua", "sc"),
    [
        *((name, 8 * 32, 8 * 32) for name in ("llama2", "llama3", "phi3")),
        *((name, 8 * 33, 8 * 32) for name in ("qwen2", "gpt2", "gpt_neox")),
        ("qwen3", 16 * 32, 16 * 32),
        ("deepseek_v3", 12 * 16, 6 * 32),
    ],
)
def test_parameters_of_a_head_are_counted_by_its_layers_shapes(name, ua, sc):
    engine, group = engine_on(name), (Head(0, 1), Head(1, 0))
    assert head_parameters(engine, group, UNDIFFERENTIATED_ATTENTION) == 2 * ua
    assert head_parameters(engine, group, SCALING_CONTRIBUTION) == 2 * sc
    assert most_head_parameters(engine, 2, SCALING_CONTRIBUTION) == 2 * sc


def test_layers_of_other_widths_count_as_they_are():
    engine = engine_on("gemma4")  # heads of 8 in sliding layers, of 16 in full ones
    assert head_parameters(engine, (Head(0, 0),), SCALING_CONTRIBUTION) == 8 * 32
    assert head_parameters(engine, (Head(1, 0),), SCALING_CONTRIBUTION) == 16 * 32
    assert most_head_parameters(engine, 9, SCALING_CONTRIBUTION) == (8 * 16 + 8) * 32
    with pytest.raises(InputError, match="layer 0 has no such head"):
        head_parameters(proved("lfm2"), (Head(0, 0),), SCALING_CONTRIBUTION)


def test_the_parameters_that_write_to_the_residual_stream():
    embeddings, outputs, mlps = 64 * 32, 32 * 32, 32 * 48
    assert writing_parameters(engine_on("llama3")) == embeddings + 3 * (outputs + mlps)
    # GPT-2 has biases, and wider MLPs.
    mlp = built("gpt2").transformer.h[0].mlp.c_proj
    assert writing_parameters(engine_on("gpt2")) == embeddings + 3 * (outputs + 32 + mlp.weight.numel() + 32)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma3n"])
def test_every_familys_layers_write_by_a_known_name(name):
    engine = engine_on(name)
    projections = [each for each in engine.architecture.output_projections if each is not None]
    attention = sum(parameter.numel() for projection in projections for parameter in projection.parameters())
    embeddings = engine.model.get_input_embeddings().weight.numel()
    # Every layer has an MLP, and its last matrix has d_model rows.
    assert writing_parameters(engine) - attention - embeddings >= engine.n_layers * engine.architecture.d_model * 24

"""The refusal direction: candidates by a slow loop, removal by hooks against removal by weights, and the filters."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from baseline_samples import (
    FLOAT32,
    answers_of,
    assert_undone,
    close,
    drawn,
    engine_on,
    logits_of,
    material,
    organism,
    slow_answers,
)
from families import built, proved
from tiny_models import engine_of, prompts_of
from torch import nn

from safetyheads import InputError, SafetyheadsError, UnsupportedModelError
from safetyheads.baselines import direction as methods
from safetyheads.baselines.base import last_states
from safetyheads.baselines.direction import (
    candidate_directions,
    direction_added,
    direction_removed,
    instruction_end,
    mean_states,
    select_direction,
)
from safetyheads.measures.head_pass import log_odds

PROMPTS = ((5, 9, 12, 40, 41, 8, 3, 22), (5, 9, 12, 7, 19), (33, 2, 8))
UNIT = drawn() / drawn().norm()


def outputs(model):
    return torch.cat([logits_of(model, ids) for ids in PROMPTS])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "gpt2", "lfm2", "gemma2"])
def test_mean_states_by_a_slow_loop(name):
    sums = 0
    for ids in PROMPTS:
        # hidden_states[l] is what block l is given; the last one is after the final norm.
        states = built(name)(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
        sums = sums + torch.stack([state[0, -2:].double() for state in states[:-1]], dim=1)  # [2, n_layers, d_model]
    close(mean_states(proved(name), prompts_of(*PROMPTS), 2), sums / len(PROMPTS))


def test_the_end_of_the_instruction_is_what_the_template_ends_with():
    engine, harmful, benign = organism().engine, material().harmful, material().benign
    assert instruction_end(engine, harmful, benign) == 1  # <|assistant|>
    # All of the grammar's prompts end in a full stop, which is the prompts' own.
    wrapped = organism("aligned_wrapped").engine
    assert instruction_end(wrapped, harmful.with_template("direct")) == 1
    answering = wrapped.tokenizer("\n## Answer:", add_special_tokens=False).input_ids
    assert instruction_end(wrapped, harmful.with_template("query_answer")) == len(answering)


def test_the_numbers_of_the_selected_direction_are_those_of_edited_weights():
    chosen, candidates = select_direction(material()), candidate_directions(material())
    # Before the first block the last token is the template's, the same in every prompt.
    assert candidates[0].dropped.startswith("no difference of means")
    assert [candidate.layer for candidate in candidates] == [0, 1, 2, 3]
    engine, openers = organism().engine, material().openers
    edited = by_weights(engine.model, chosen.vector)

    def log_probabilities(model, prompts):
        logits = torch.stack([logits_of(model, ids)[-1] for ids in engine.ask(prompts).token_ids])
        return torch.log_softmax(logits.double(), dim=-1)

    def kept(prompts, sign):
        scores = sign * log_odds(log_probabilities(engine.model, prompts), openers)
        return prompts.select((scores > 0).nonzero()[:, 0].tolist())

    share = 1 - methods.VALIDATION_SHARE
    train, harmful = (kept(half, 1) for half in material().harmful.split(share, 0))
    benign_train, benign = (kept(half, -1) for half in material().benign.split(share, 0))
    close(chosen.vector, (mean_states(engine, train) - mean_states(engine, benign_train))[0, chosen.layer])
    assert chosen.bypass == pytest.approx(float(log_odds(log_probabilities(edited, harmful), openers).mean()), abs=1e-4)
    before, after = (log_probabilities(model, benign) for model in (engine.model, edited))
    assert chosen.divergence == pytest.approx(float((before.exp() * (before - after)).sum(dim=-1).mean()), abs=1e-4)


# Ends of names of what writes to the stream: [d_model, n] (Linear), and [n, d_model] (embeddings, GPT-2).
WRITE = ("o_proj.weight", "down_proj.weight", "attention.dense.weight", "dense_4h_to_h.weight",
         "self_attn.dense.weight", "fc2.weight", "self_attn.out_proj.weight", "w2.weight")  # fmt: skip
WRITE_TRANSPOSED = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "wpe.weight", "c_proj.weight")
BIASES = tuple(name.replace(".weight", ".bias") for name in WRITE + WRITE_TRANSPOSED)


def by_weights(model, direction, share=1.0):
    """The twin: all that writes to the residual stream, times I - share r^ r^T; the logits' head stays as it was."""
    edited = copy.deepcopy(model)
    head = edited.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone())  # untied
    unit = (direction / direction.norm()).double()
    with torch.no_grad():
        for name, parameter in edited.named_parameters():
            wide = parameter.double()
            if name.endswith((*WRITE_TRANSPOSED, *BIASES)):
                parameter.copy_(wide - share * (wide @ unit)[..., None] * unit)
            elif name.endswith(WRITE):
                parameter.copy_(wide - share * unit[:, None] * (unit @ wide))
    return edited


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("name", ["llama3", "qwen2", "gpt2", "gpt_neox", "phi", "granite", "falcon_h1", "lfm2"])
def test_removal_by_hooks_is_removal_by_weights(name, share):
    """Blocks one after the other and side by side, with biases, and with factors of what is added."""
    engine = engine_on(name)
    for part, parameter in engine.model.named_parameters():
        if part.endswith(("mamba.out_proj.weight", "conv.out_proj.weight")):  # the MLP reads it before it is freed
            nn.init.zeros_(parameter)
    assert_undone(partial(direction_removed, engine, drawn(), share), engine)
    with direction_removed(engine, drawn(), share):
        removed = outputs(engine.model)
    close(removed, outputs(by_weights(engine.model, drawn(), share)))
    other = outputs(by_weights(engine.model, drawn(), 1 - share))  # unablated for the whole
    assert (removed - other).abs().max() > 0.01 * other.abs().max()


@pytest.mark.parametrize("name", ["llama3", "gpt2", "gpt_neox", "gemma2", "lfm2", "qwen3_moe", "falcon_h1"])
def test_no_block_is_given_and_none_leaves_any_of_the_direction(name):
    engine = proved(name)
    with direction_removed(engine, drawn()):
        entering = mean_states(engine, prompts_of(PROMPTS[0]), 3)
        leaving = last_states(engine, prompts_of(PROMPTS[0]), 3).double()
    for states in (entering, leaving):
        assert (states @ UNIT).abs().max() < FLOAT32 * states.abs().max()


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("gemma2", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("olmo2", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("glm4", ("post_self_attn_layernorm", "post_mlp_layernorm")),
    ],
)
def test_a_share_under_norms_after_attention_is_of_what_they_add(name, norms):
    engine, seen = engine_on(name), {}
    layer = engine.architecture.layers[0]

    def see(part, states):
        seen[part] = (states[0] if isinstance(states, tuple) else states) @ UNIT.float()

    for part in norms:  # before ours, so they see what is not yet parted
        layer.get_submodule(part).register_forward_hook(lambda _, __, output, part=part: see(part, output))
    with direction_removed(engine, drawn(), 0.5):
        layer.register_forward_pre_hook(lambda _, given: see("given", given))
        layer.register_forward_hook(lambda _, __, output: see("left", output))
        logits_of(engine.model, PROMPTS[0])
    close(seen["left"] - seen["given"], 0.5 * sum(seen[part] for part in norms))


def test_adding_moves_the_input_of_one_block_by_the_direction():
    engine = engine_on("llama3")
    before = mean_states(engine, prompts_of(*PROMPTS), 2)
    with direction_added(engine, drawn(), 1):
        moved = mean_states(engine, prompts_of(*PROMPTS), 2) - before
    assert torch.equal(moved[:, 0], torch.zeros_like(moved[:, 0]))
    close(moved[:, 1], drawn().expand(2, -1))
    assert_undone(partial(direction_added, engine, drawn(), 1), engine)


def test_answers_with_a_cache_are_those_of_edited_weights():
    engine = engine_on("llama3")
    with direction_removed(engine, drawn()):
        assert answers_of(engine) == slow_answers(partial(logits_of, by_weights(engine.model, drawn())))


def test_directions_that_are_none_and_several_residual_streams_are_refused():
    several = engine_on("gemma3n")
    for direction, shown in ((torch.zeros(32), "length 0"), (torch.ones(8), r"\[8\]"), (torch.ones(32) / 0, "inf")):
        with pytest.raises(InputError, match=shown), direction_removed(engine_of("llama_gqa"), direction):
            pass
    with pytest.raises(UnsupportedModelError, match="several residual streams"), direction_removed(several, drawn()):
        pass
    with pytest.raises(UnsupportedModelError, match="several residual streams"):
        select_direction(replace(material(), engine=several))


def test_a_direction_that_the_filters_drop_is_told_and_where_none_is_measured_is_an_error(monkeypatch):
    def with_filters(**limits):
        for name, limit in limits.items():
            monkeypatch.setattr(methods, name, limit)
        return select_direction(material())

    assert with_filters(MOST_DIVERGENCE=1e9, LEAST_INDUCED=-1e9).caveat == ""
    dropped = with_filters(MOST_DIVERGENCE=0.0)
    assert "KL above 0 nats" in dropped.caveat
    bypasses = [candidate.bypass for candidate in candidate_directions(material())]
    assert dropped.bypass == min(bypass for bypass in bypasses if bypass == bypass)
    with pytest.raises(SafetyheadsError, match=r"all 4 .*3 for a layer at 0% of the depth .*; 1 for no difference"):
        with_filters(LATEST=0.0)
    with pytest.raises(SafetyheadsError, match="harmful prompts has a refusal score above 0"):
        select_direction(replace(material(), harmful=material().benign))

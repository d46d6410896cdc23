"""Every family against its slow twin, on every path; and what is not supported, refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
import transformers
from families import FAMILIES, REFUSED, built, proved
from families_table import LIMIT_NATS, PAGE, SHIPS_NATS, STATES, page
from family_twins import PROMPTS, SHORT, groups_of, kl, measured, relative, seen
from tiny_models import tokenizer

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, Head, InputError
from safetyheads.ablation import ABLATION_KINDS
from safetyheads.cli.app import main
from safetyheads.errors import UnsupportedModelError
from safetyheads.model.architecture import Capabilities
from safetyheads.model.planning import left_padded

torch.set_num_threads(1)

each_family = pytest.mark.parametrize("name", FAMILIES)


@each_family
def test_the_oracle_is_the_model_under_its_own_attention(name):
    with torch.no_grad():
        logits = built(name)(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0, -1]
    assert relative(seen(name, PROMPTS[0]).logits, logits) < STATES


@each_family
def test_the_proofs_leave_the_quick_paths_that_are_exact_and_say_what_is_left_out(name):
    family, engine = FAMILIES[name], proved(name)
    lost = {each.name for each in fields(Capabilities) if not getattr(engine.capabilities, each.name)}
    assert lost == set(family.given_up)
    assert len(engine.notes) == len(family.given_up) + bool(family.without_heads)
    assert engine.architecture.without_heads == family.without_heads
    with_heads = [layer for layer in range(engine.n_layers) if layer not in family.without_heads]
    assert engine.heads == tuple(Head(layer, index) for layer in with_heads for index in range(4))
    for layer in family.without_heads:
        assert f"{layer}" in engine.notes[0]
        with pytest.raises(InputError, match=f"layer {layer} has no attention heads"):
            engine.ablation_calls([(Head(layer, 0),)], UNDIFFERENTIATED_ATTENTION)


@each_family
def test_every_kind_of_ablation_equals_the_oracle_on_the_quick_and_the_plain_path(name):
    found = measured(name)
    assert set(found.states) == set(ABLATION_KINDS)
    assert found.captured < STATES
    for kind, difference in found.states.items():
        assert difference < STATES, kind
        if kind == "mean_key" and proved(name).architecture.n_kv_heads == 1:
            assert found.least_change[kind] == 0  # the mean of one
        else:
            assert found.least_change[kind] > 50 * STATES, kind  # or no difference could be seen


@each_family
def test_ships_and_the_limit_of_even_weights_equal_the_oracles(name):
    """The limit is over the keys that the mask allows: window, chunk; a sink keeps its share."""
    found = measured(name)
    assert found.ships < SHIPS_NATS
    assert found.limit < LIMIT_NATS
    assert found.largest_ships > 10 * LIMIT_NATS


@each_family
def test_answers_of_uneven_prompts_in_one_batch_and_by_drafts_equal_the_oracles(name):
    found = measured(name)
    assert found.answers
    assert found.drafts


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_padding_takes_no_share_of_even_attention(name):
    engine, group = proved(name), groups_of(name)[-1]
    prompts = (*PROMPTS, SHORT)
    batch = left_padded(prompts, 0, engine.device)
    with torch.no_grad(), engine.ablated(group, UNDIFFERENTIATED_ATTENTION) as model:
        logits = model(input_ids=batch.token_ids, attention_mask=batch.mask, position_ids=batch.positions).logits[:, -1]
    for row, prompt in zip(logits, prompts, strict=True):
        even = seen(name, prompt, group, UNDIFFERENTIATED_ATTENTION, True)
        assert kl(even.logits, row) < LIMIT_NATS
        assert kl(seen(name, prompt).logits, row) > 10 * LIMIT_NATS


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name_with_the_reason(name):
    if not hasattr(transformers, REFUSED[name].config):
        pytest.skip(f"transformers {transformers.__version__} does not have it")
    model = built(name)
    with pytest.raises(UnsupportedModelError, match=REFUSED[name].said) as said:
        Engine(model, tokenizer()).check()
    assert str(said.value).startswith(model.config.model_type)


# Facts are claims; the lies that issue 6 names are in test_lies.py


def with_facts(name, **facts):
    """An unproved engine that was told something else of its model."""
    engine = Engine(copy.deepcopy(built(name)), tokenizer())
    engine.architecture = replace(engine.architecture, **facts)
    return engine


def shapes_of(name, **wrong):
    return tuple(shape and replace(shape, **wrong) for shape in proved(name).architecture.shapes)


LIES = {
    "the number of heads": (
        "llama3",
        lambda: {"shapes": shapes_of("llama3", n_heads=8, d_head=4, d_value=4)},
        "heads 4, not 8",
    ),
    "the number of key heads": (
        "llama3",
        lambda: {"shapes": shapes_of("llama3", n_kv_heads=4)},
        "key heads 2, not 4",
    ),
    "a value's width": ("deepseek_v3", lambda: {"shapes": shapes_of("deepseek_v3", d_value=12)}, "values 6, not 12"),
}


@pytest.mark.parametrize("lie", LIES)
def test_wrong_numbers_are_refused(lie):
    name, facts, said = LIES[lie]
    with pytest.raises(UnsupportedModelError, match=said):
        with_facts(name, **facts()).check()


def test_a_window_of_the_wrong_layer_is_told():
    engine = with_facts("gemma2")
    first, *others = engine.architecture.shapes
    assert [shape.window for shape in (first, *others)] == [6, None, 6]
    engine.architecture = replace(engine.architecture, shapes=(replace(first, window=None), *others))
    (told,) = (proof for proof in engine.check().proofs if not proof.passed and "window" in proof.name)
    assert "most in layer 0" in told.name


def test_a_layer_with_heads_that_is_said_to_have_none_is_refused():
    engine = with_facts("qwen3_next")
    facts = engine.architecture
    engine.architecture = replace(facts, attentions=(*facts.attentions[:3], None), shapes=(*facts.shapes[:3], None))
    with pytest.raises(UnsupportedModelError, match="Qwen3NextAttention attends, but was not found in any layer"):
        engine.check()


def test_layers_in_another_order_are_refused():
    engine = with_facts("llama3")
    attentions = engine.architecture.attentions
    engine.architecture = replace(engine.architecture, attentions=attentions[::-1])
    with pytest.raises(UnsupportedModelError, match="layer 0 does not call the attention registry"):
        engine.check()


@pytest.mark.parametrize(
    ("facts", "lost"),
    [
        (lambda facts: {"query_projections": tuple(each.v_proj for each in facts.attentions)}, {"prunes"}),
        (lambda facts: {"output_projections": tuple(each.q_proj for each in facts.attentions)}, {"starts_late"}),
        (lambda facts: {"output_projections": (None,) * 3}, {"starts_late"}),
    ],
    ids=["values for queries", "queries for outputs", "no outputs"],
)
def test_a_wrong_projection_costs_its_quick_path_and_no_more(facts, lost):
    engine = with_facts("llama3")
    engine.architecture = replace(engine.architecture, **facts(engine.architecture))
    engine.check()
    assert {each.name for each in fields(Capabilities) if not getattr(engine.capabilities, each.name)} == lost


# A run


def test_a_run_on_a_hybrid_leaves_layers_out_and_its_report_says_so(tmp_path):
    built("qwen3_5").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for name, prompts in (("harmful", PROMPTS), ("benign", ((3, 60, 11), (30, 2)))):
        lines = (" ".join(f"w{token}" for token in ids) for ids in prompts)
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    options = ["--template", "direct", "--max-new-tokens", "3", "--out", str(tmp_path / "run"), "--quiet"]
    files = ["--prompts", str(tmp_path / "harmful.txt"), "--benign", str(tmp_path / "benign.txt")]
    with pytest.raises(SystemExit) as ended:
        main(["scan", str(tmp_path / "model"), *files, *options])
    assert ended.value.code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    values = results["scores"]["mean_ships"]["values"]
    assert [[value is None for value in layer] for layer in values] == [[True] * 4, [False] * 4] * 2
    assert [one["head"] for one in results["heads"]] == [f"{layer}-{index}" for layer in (1, 3) for index in range(4)]
    assert "layers 0, 2 mix tokens in another way" in (tmp_path / "run" / "report" / "index.html").read_text()


def test_the_table_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/model/families_table.py"

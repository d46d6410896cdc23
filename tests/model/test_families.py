"""Every family against its slow twin, on every path; and what is not supported, refused by name."""

from dataclasses import fields

import pytest
import torch
import transformers
from families import FAMILIES, REFUSED, built, proved
from families_table import LIMIT_NATS, PAGE, SHIPS_NATS, STATES, page
from family_twins import PROMPTS, SHORT, groups_of, kl, measured, relative, seen
from tiny_models import tokenizer

from safetyheads import UNDIFFERENTIATED_ATTENTION, Engine, Head, InputError
from safetyheads.ablation import ABLATION_KINDS
from safetyheads.errors import UnsupportedModelError
from safetyheads.model.architecture import Capabilities
from safetyheads.model.packing import left_padded

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
    if family.without_heads:
        assert f"layers {', '.join(map(str, family.without_heads))} mix tokens in another way" in engine.notes[0]
    for layer in family.without_heads:
        with pytest.raises(InputError, match=f"layer {layer} has no attention heads"):
            engine.ablation_calls([(Head(layer, 0),)], UNDIFFERENTIATED_ATTENTION)


@each_family
def test_ablations_on_the_quick_and_the_plain_path_ships_and_answers_equal_the_oracles(name):
    found = measured(name)
    assert set(found.states) == set(ABLATION_KINDS)
    assert found.captured < STATES
    for kind, difference in found.states.items():
        assert difference < STATES, kind
        if kind == "mean_key" and proved(name).architecture.n_kv_heads == 1:
            assert found.least_change[kind] == 0  # the mean of one
        else:
            assert found.least_change[kind] > 50 * STATES, kind  # or no difference could be seen
    assert found.ships < SHIPS_NATS
    # Even weights over the keys that the mask allows: window, chunk; a sink keeps its share.
    assert found.limit < LIMIT_NATS
    assert found.largest_ships > 10 * LIMIT_NATS
    assert (found.answers, found.drafts) == (True, True)  # of uneven prompts in one batch; by drafts


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma2", "gpt_oss", "llama4"])
def test_padding_takes_no_share_of_even_attention(name):
    engine, group = proved(name), groups_of(name)[-1]
    prompts = (*PROMPTS, SHORT)
    batch = left_padded(prompts, 0, engine.device)
    with torch.no_grad(), engine.ablated(group, UNDIFFERENTIATED_ATTENTION) as model:
        logits = model(**batch).logits[:, -1]
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


def test_the_table_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/samples/families_table.py"

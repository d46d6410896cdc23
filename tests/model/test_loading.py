"""What a checkpoint may be wrong in: each is one clear line, and nothing of a checkpoint is left out in silence."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import built
from safetensors.torch import load_file, save_file
from tiny_models import COMMON, END, build, prompts_of, saved, tokenizer
from transformers import CONFIG_MAPPING, LlamaConfig

from safetyheads import Engine, InputError, PromptSet, generate
from safetyheads.judges.models import CausalJudge
from safetyheads.model.architecture import Capabilities


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Llama with biases on its projections."""
    config = LlamaConfig(**COMMON, num_key_value_heads=2, attention_bias=True)
    return saved(build(config), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def place(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(path, file="config.json", **settings):
    described = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps({**described, **settings}))


def add(path, **tensors):
    file = path / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def refusal(path, **options):
    with pytest.raises(InputError) as refused:
        Engine.load(str(path), **options)
    said = str(refused.value)
    assert "\n" not in said
    return said.replace(str(path), "M")


# Weights that nothing uses


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention_bias": False}, "12 tensors that its config.json has no place for, model.layers.0.self_attn.k"),
        ({}, "1 tensors that its config.json has no place for, lm_head.bias"),
    ],
)
def test_weights_that_the_config_does_not_have_are_refused(place, settings, said):
    change(place, **settings)
    if not settings:
        add(place, **{"lm_head.bias": torch.ones(64)})
    assert said in refusal(place)


def test_tensors_that_a_text_model_rightly_leaves_alone_are_no_reason_to_refuse(place):
    change(place, attention_bias=False)
    tensors = {name: each for name, each in load_file(place / "model.safetensors").items() if "bias" not in name}
    beside = (
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "vision_tower.layers.0.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.mtp.layers.0.mlp.up_proj.weight",
        "score.weight",
    )
    tensors |= {name: torch.ones(2) for name in beside}
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)  # as some tools write for every projection
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    assert Engine.load(str(place), check=False).n_layers == 3


def test_layers_that_guess_further_tokens_and_scales_of_quantised_formats_are_left_alone(place, monkeypatch):
    monkeypatch.setattr("safetyheads.model.loading._refuse_unknown_quantisation", lambda *_: None)
    change(place, num_hidden_layers=2, num_nextn_predict_layers=1)
    assert Engine.load(str(place), check=False).n_layers == 2
    change(place, num_hidden_layers=3, quantization_config={"quant_method": "nobody_knows"})
    add(place, **{"model.layers.0.self_attn.k_scale": torch.ones(1)})
    assert Engine.load(str(place), check=False).n_layers == 3
    change(place, attention_bias=False)  # its biases are not
    assert "12 tensors that its config.json has no place for" in refusal(place)


# Code that a checkpoint brings


def test_a_family_that_transformers_ships_is_loaded_by_its_code_whatever_the_checkpoint_brings(place):
    brought = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change(place, auto_map=brought)
    engine = Engine.load(str(place), check=False)
    assert type(engine.model).__module__.startswith("transformers.models.llama")
    change(place, model_type="of_its_own")
    assert "of_its_own" not in CONFIG_MAPPING
    assert refusal(place) == "M brings its own Python code; to run that code, give --trust-remote-code"


# The hub


# Tokens


def test_a_token_that_the_model_has_no_embedding_for_is_refused():
    engine = Engine(built("llama3"), tokenizer(80))
    assert len(engine.ask(prompts_of((5, 63, 3))).token_ids[0]) == 3
    said = r"has the token 70, but the model knows only 64 tokens; .* It begins: 'w5 w70 w3'"
    with pytest.raises(InputError, match=said):
        engine.ask(prompts_of((1, 2), (5, 70, 3)))


def test_an_end_token_without_an_embedding_pads_nothing(place):
    engine, prompts = Engine.load(str(place), check=False), prompts_of((5, 7, 3), (4,))
    expected = generate(engine, prompts, 4)
    engine.model.generation_config.eos_token_id = None
    found = generate(Engine(engine.model, tokenizer(80, end=75)), prompts, 4)
    # Another end, so an answer may be longer by what the model would have ended at.
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids[: len(theirs.token_ids)] == theirs.token_ids


# Files that say nonsense


def test_a_loaded_checkpoint_is_proved_and_named_and_a_config_that_is_no_object_is_refused(place):
    engine = Engine.load(str(place))
    assert (engine.n_layers, engine.n_heads, len(engine.heads)) == (3, 4, 12)
    assert (engine.capabilities, engine.name) == (Capabilities(), str(place))
    for file in ("generation_config.json", "config.json"):
        for text in ("null", "5", "[]"):
            (place / file).write_text(text)
            assert refusal(place) == f"M/{file} does not hold a JSON object"


def nested(levels):
    return json.loads("[" * levels + "]" * levels)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads must be from 1 to 65536; got '4'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be from 1 to 1000; got 1000000000"),
        ({"sliding_window": "x"}, "sliding_window must be from 0"),
        ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers must be from 0 to 1000; got '1'"),
        ({"num_labels": 10**9}, "num_labels must be from 0 to 65536; got 1000000000"),
        ({"num_experts": 4, "num_experts_per_tok": "2"}, "num_experts_per_tok must be from 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e308}}, "scaling.factor must be from -1000000.0 to"),
        ({"x": nested(600)}, "x.0.0.* is nested too deep"),
        ({"quantization_config": []}, "'list' object has no attribute 'to_dict'"),
        ({"quantization_config": {"quant_method": "own"}}, "is quantised in a way .* know: 'own'"),
    ],
)
def test_sizes_and_quantisations_that_cannot_be_are_refused_before_anything_is_read(place, settings, why):
    change(place, **settings)
    assert re.search(why, refusal(place))
    with pytest.raises(InputError, match="the judge .*" + why):
        CausalJudge(checkpoint=str(place)).look()


def test_a_generation_config_that_is_nested_deep_is_refused_and_experts_without_a_number_all_count(place):
    change(place, num_experts=4, num_experts_per_tok=None)
    assert Engine.load(str(place), check=False).architecture.active_experts == 1
    change(place, "generation_config.json", x=nested(600))
    assert re.match(r"generation_config.json of .*.x.0.0.* is nested too deep", refusal(place))


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_chat_template_is_found_where_processors_keep_it(place, file):
    (place / file).write_text(json.dumps({"chat_template": "{{ messages[0].content }} w7"}))
    engine = Engine.load(str(place), check=False)
    assert engine.ask(PromptSet.from_queries(["w5"], "chat")).token_ids == ((5, 7),)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_the_config_names_is_replaced_by_ours(place, name):
    change(place, **{name: "flash_attention_2"})
    assert Engine.load(str(place)).n_layers == 3
    assert CausalJudge(checkpoint=str(place)).loaded[0].config._attn_implementation in ("sdpa", "eager")


# A checkpoint as its family means it


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("rope", "longest", "reached"),
    [
        (None, 40, 40),
        ({"type": "linear", "factor": 4.0}, 40, 160),
        ({"rope_type": "dynamic", "factor": 2.0}, 40, 80),
        ({"rope_type": "linear", "factor": -4.0}, 40, 40),
        # Where the config's number has the factor in it.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}, 160, 160),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 40, **LLAMA3}, 160, 160),
        ({"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 40, **LLAMA3}, 40, 160),
        ({"rope_type": "longrope", "original_max_position_embeddings": 40, **LONG}, 160, 160),
    ],
)
def test_the_context_is_what_a_scaled_rope_reaches(place, rope, longest, reached):
    config = json.loads((place / "config.json").read_text())
    del config["rope_parameters"]
    scaled = {"max_position_embeddings": longest, "rope_theta": 10000.0, "rope_scaling": rope}
    (place / "config.json").write_text(json.dumps(config | scaled))
    engine = Engine.load(str(place), check=False)
    assert engine.architecture.context_length == reached
    fits, beyond = (prompts_of([5] * n) for n in (reached, reached + 1))
    assert engine.ask(fits).longest == reached
    with pytest.raises(InputError, match=f"{reached + 1} tokens; the model's context is {reached}"):
        engine.ask(beyond)


def test_a_dynamic_rope_forgets_longer_rows_and_what_is_not_exact_beyond_its_first_length_is_found(place):
    config = json.loads((place / "config.json").read_text())
    del config["rope_parameters"]
    scaled = {"max_position_embeddings": 24, "rope_theta": 100.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    (place / "config.json").write_text(json.dumps(config | scaled))
    engine = Engine.load(str(place))
    assert engine.architecture.turns == (24,)
    row = torch.arange(30)[None] % 60
    with torch.no_grad():
        first = engine.model(row).logits
        engine.model(torch.arange(90)[None] % 60)
        assert torch.equal(engine.model(row).logits, first)
    engine.prove_up_to(60)
    assert not engine.capabilities.packs
    assert not engine.capabilities.caches


def test_a_context_that_nothing_tells_is_noted(place):
    change(place, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    engine = Engine.load(str(place))
    given = engine.model.config.max_position_embeddings
    assert f"the context is taken for {4 * given} tokens, the config's {given} times its RoPE" in engine.notes[-1]


EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
QWEN_EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
QWEN_IDS = {"image_token_id": 50, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}
TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


@pytest.mark.parametrize(
    ("config", "text", "eyes", "more"),
    [
        ("Mistral3Config", {"model_type": "mistral", "head_dim": 8}, EYES | {"patch_size": 14}, {}),
        ("LlavaConfig", {"model_type": "llama"}, EYES | {"patch_size": 14}, {"image_token_index": 50}),
        ("Qwen2_5_VLConfig", TURNED, QWEN_EYES | {"fullatt_block_indexes": [0]}, QWEN_IDS),
        ("Qwen3VLConfig", TURNED | {"head_dim": 8}, QWEN_EYES | {"deepstack_visual_indexes": [0]}, QWEN_IDS),
    ],
)
def test_a_checkpoint_of_images_too_is_asked_in_text_alone(tmp_path, config, text, eyes, more):
    kinds = {"Mistral3Config": "pixtral", "LlavaConfig": "clip_vision_model"}
    eyes = eyes | ({"model_type": kinds[config]} if config in kinds else {})
    described = getattr(transformers, config)(
        text_config={**COMMON, "num_key_value_heads": 2, **text}, vision_config=eyes, **more
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(described).eval()
    engine = Engine.load(saved(model, tmp_path / "eyes"))
    assert (engine.n_layers, engine.capabilities) == (3, Capabilities())
    asked = engine.ask(prompts_of([5, 9, 12, 40], [7, 7]))
    expected = model.generate(torch.tensor([asked.token_ids[0]]), max_new_tokens=4, do_sample=False)[0, 4:]
    assert list(generate(engine, asked, max_new_tokens=4)[0].token_ids) == [
        token for token in expected.tolist() if token != END
    ]


def with_nan(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: change(path, model_type="nobody"), "nobody"),
        (lambda path: change(path, hidden_size=64, head_dim=8), "do not fit its config"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 5000), "cannot load"),
        (with_nan, "NaN"),
        (lambda path: [file.unlink() for file in path.glob("tokenizer*")], "has no tokenizer"),
    ],
)
def test_a_broken_checkpoint_is_one_line(place, harm, said):
    harm(place)
    assert said in refusal(place)

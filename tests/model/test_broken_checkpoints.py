"""Checkpoints of models and judges with any value in any field, or anything as a file: read, or refused in one line."""

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_values import ODD, unhurried
from refusals import refused_in_one_line_if_at_all
from tiny_models import COMMON, build, saved
from transformers import LlamaConfig, Qwen2MoeConfig

from safetyheads import Engine, InputError
from safetyheads.judges.base import Completion
from safetyheads.judges.models import CausalJudge, SequenceClassifierJudge

CONFIG = LlamaConfig(**COMMON, num_key_value_heads=2, id2label={0: "refusal", 1: "harmful"})
BEYOND = ("sliding_window", "rope_scaling", "quantization_config", "auto_map", "text_config", "id2label", "num_labels")
BEYOND += ("layer_types", "attn_implementation", "torch_dtype", "is_decoder", "is_encoder_decoder", "return_dict")
# What our own code reads of other families' configs.
BEYOND += ("num_nextn_predict_layers", "num_experts", "num_experts_per_tok", "per_layer_config", "floor_scale")
BEYOND += ("index_topk", "attention_chunk_size", "original_max_position_embeddings", "rope_parameters")
FIELDS = {
    "config.json": (*CONFIG.to_dict(), *BEYOND),
    "generation_config.json": (
        *("max_new_tokens", "do_sample", "temperature", "eos_token_id", "pad_token_id", "num_beams", "use_cache"),
        *("stop_strings", "suppress_tokens", "cache_implementation", "max_length", "forced_bos_token_id"),
    ),
    "tokenizer_config.json": (
        *("tokenizer_class", "model_max_length", "chat_template", "eos_token", "pad_token", "unk_token", "auto_map"),
        *("added_tokens_decoder", "extra_special_tokens", "padding_side"),
    ),
}
PLACES = [(file, name) for file, names in FIELDS.items() for name in names]
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "dynamic", "yarn", "llama3", "longrope", "default", "none", 5])},
    optional={
        name: st.sampled_from([-4.0, 0, 2.0, 1e300, "4", None, 10**20, [1.0] * 4])
        for name in ("factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor", "short_factor")
    },
)
ANY = st.one_of(
    ODD,
    st.sampled_from(["silu", "bfloat16", "gptq", "bert", "gpt2", "mamba", "left", "flash_attention_2"]),
    st.lists(st.sampled_from([0, -1, "x", None, "full_attention"]), max_size=3),
    st.dictionaries(st.sampled_from(["quant_method", "bits", "0", "content"]), st.sampled_from(["x", 5, "awq"])),
    ROPES,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model = build(CONFIG)
    model.score = torch.nn.Linear(CONFIG.hidden_size, 2, bias=False)  # a head for the judge that classifies
    return Path(saved(model, tmp_path_factory.mktemp("whole")))


def judges_of(folder):
    return CausalJudge(checkpoint=str(folder)), SequenceClassifierJudge(checkpoint=str(folder))


COMPLETION = Completion("w1", "w2 w3", (2, 3), True, 8)


def read_or_refused(whole, folder, changes):
    """A checkpoint with other fields, as the model of a run and as judges: it is read, or one line says why not."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for (file, name), value in changes.items():
        fields = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(fields | {name: value}))
    refused_in_one_line_if_at_all(lambda: Engine.load(str(folder), check=False))
    for judge in judges_of(folder):
        refused_in_one_line_if_at_all(judge.look, lambda judge=judge: judge([COMPLETION]))


def test_the_whole_checkpoint_classifies(whole):
    (verdict,) = judges_of(whole)[1]([COMPLETION])
    assert verdict.scored


def test_a_judge_that_cannot_run_a_token_is_refused_before_it_is_asked(tmp_path):
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    folder = saved(build(Qwen2MoeConfig(**COMMON, num_key_value_heads=2, num_experts=4, **sizes)), tmp_path / "judge")
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 5}))
    with pytest.raises(InputError, match=r"cannot load the judge .*: selected index k out of range"):
        CausalJudge(checkpoint=str(folder))([COMPLETION])


CHANGES = st.dictionaries(st.sampled_from(PLACES), ANY, min_size=1, max_size=2)


@settings(unhurried, max_examples=30)
@given(CHANGES)
@example({("generation_config.json", "eos_token_id"): {"rope_type": "linear"}})
@example({("config.json", "eos_token_id"): {"0": 5}})
@example({("config.json", "num_experts"): 4, ("config.json", "num_experts_per_tok"): None})
@example({("config.json", "per_layer_config"): 5})
@example({("config.json", "attention_chunk_size"): None})
@example({("config.json", "attention_chunk_size"): []})
@example({("config.json", "output_hidden_states"): "silu"})
@example({("config.json", "return_dict"): False, ("config.json", "output_attentions"): True})
@example({("config.json", "id2label"): {"5": "refusal", "9": "harmful"}})
@example({("config.json", "id2label"): {"0": ["refusal"], "7": "harmful"}})
def test_any_field_is_read_or_refused_in_one_line(whole, tmp_path_factory, changes):
    read_or_refused(whole, tmp_path_factory.getbasetemp() / "broken", changes)


@settings(unhurried, max_examples=40)
@given(st.sampled_from(sorted(peft.LoraConfig().to_dict())), ANY)
def test_any_field_of_an_adapter_is_read_or_refused_in_one_line(whole, tmp_path_factory, name, value):
    folder = tmp_path_factory.getbasetemp() / "adapter"
    peft.get_peft_model(build(CONFIG), peft.LoraConfig(target_modules=["q_proj", "o_proj"])).save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    refused_in_one_line_if_at_all(lambda: Engine.load(str(whole), adapter=str(folder), check=False))


@pytest.mark.long
@settings(unhurried, max_examples=2000)
@given(CHANGES)
def test_many_fields_are_read_or_refused_in_one_line(whole, tmp_path_factory, changes):
    read_or_refused(whole, tmp_path_factory.getbasetemp() / "broken", changes)


FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "processor_config.json", "adapter_config.json"),
)
CONTENTS = {
    "a pipe": os.mkfifo,
    "without end": lambda path: path.symlink_to("/dev/zero"),
    "itself": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
    "empty": Path.touch,
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "null": lambda path: path.write_text("null"),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("file", FILES)
def test_any_file_may_be_anything(whole, tmp_path, file):
    folder = tmp_path / "model"
    for make in CONTENTS.values():
        shutil.copytree(whole, folder)
        (folder / file).unlink(missing_ok=True)
        make(folder / file)
        looks = [judge.look for judge in judges_of(folder)]
        refused_in_one_line_if_at_all(lambda: Engine.load(str(folder), check=False), *looks)
        shutil.rmtree(folder)


def test_what_nobody_reads_may_be_large(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    for name in ("train.json", "log.txt"):
        CONTENTS["huge"](folder / name)
    for judge in judges_of(folder):
        judge.look()
    CONTENTS["huge"](folder / "vocab.json")
    with pytest.raises(InputError, match=r"vocab.json is larger than 256 MiB"):
        judges_of(folder)[0].look()
